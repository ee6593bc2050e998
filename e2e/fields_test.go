package e2e

import (
	"net/http"
	"regexp"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

var (
	uuid4        = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`)
	milliseconds = regexp.MustCompile(`^[0-9]+$`)
)

// requestFields are the fields of requests that the agent may add, in the order in which tellFields writes them.
var requestFields = []string{"X-Request-Id", "X-Forwarded-Proto", "X-Forwarded-For"}

// tellFields answers with the request fields that the server received, one per line, and with response fields of its own.
func tellFields(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Server", "the workload's own")
	w.Header().Set("Date", "the workload's own, too")
	for _, name := range requestFields {
		w.Write([]byte(strings.Join(r.Header[name], "|") + "\n"))
	}
}

func TestMissingFieldsAreAdded(t *testing.T) {
	t.Parallel()
	newStage(t).everyDialogue(t, tellFields, func(t *testing.T, d *dialogue) {
		forwardedFor := "" // outbound the workload is the client, and sets the field itself if it forwards for another
		if d.to.Name == "pod" {
			forwardedFor = nettest.PeerIP4.String()
		}
		ids := make(map[string]bool)
		for range 3 {
			response := d.do(t, d.request(t, "GET", "/", nil))
			got := strings.Split(text(t, response), "\n")
			if !uuid4.MatchString(got[0]) || ids[got[0]] {
				t.Errorf("the request id is %q, want a new UUID of version 4", got[0])
			}
			ids[got[0]] = true
			if got[1] != "http" || got[2] != forwardedFor {
				t.Errorf("forwarded proto %q for %q, want http and %q", got[1], got[2], forwardedFor)
			}
			if took := response.Header["X-Envoy-Upstream-Service-Time"]; len(took) != 1 || !milliseconds.MatchString(took[0]) {
				t.Errorf("the service time is %q", took)
			}
			if response.Header.Get("Server") != "the workload's own" || response.Header.Get("Date") != "the workload's own, too" {
				t.Errorf("Server and Date are %q and %q", response.Header["Server"], response.Header["Date"])
			}
		}
	})
}

func TestExistingFieldsAreKept(t *testing.T) {
	t.Parallel()
	newStage(t).everyDialogue(t, tellFields, func(t *testing.T, d *dialogue) {
		request := d.request(t, "GET", "/", nil)
		request.Header = http.Header{
			"X-Request-Id": {"anything"}, "X-Forwarded-Proto": {"https"}, "X-Forwarded-For": {"192.0.2.1, 192.0.2.2"},
		}
		if got := text(t, d.do(t, request)); got != "anything\nhttps\n192.0.2.1, 192.0.2.2\n" {
			t.Errorf("the server got\n%s", got)
		}
	})
}

func TestForwardedForFollowsTheFlag(t *testing.T) {
	t.Parallel()
	peer := nettest.PeerIP4.String()
	for flag, want := range map[string][2]string{
		"set-if-absent": {peer, "192.0.2.1"},
		"append":        {peer, "192.0.2.1, " + peer},
		"off":           {"", "192.0.2.1"},
	} {
		t.Run(flag, func(t *testing.T) {
			t.Parallel()
			s := newStage(t, "--x-forwarded-for", flag)
			for _, http2 := range []bool{false, true} {
				d := newDialogue(t, s.inbound(), http2, tellFields)
				for i, sent := range []string{"", "192.0.2.1"} {
					request := d.request(t, "GET", "/", nil)
					if sent != "" {
						request.Header.Set("X-Forwarded-For", sent)
					}
					got := strings.Split(text(t, d.do(t, request)), "\n")[2]
					if strings.ReplaceAll(got, "|", ", ") != want[i] {
						t.Errorf("HTTP/2 %v: %q became %q, want %q", http2, sent, got, want[i])
					}
				}
			}
		})
	}
}

// Hop-by-hop fields are not forwarded, in either direction (RFC 9110 §7.6.1).
func TestHopByHopFieldsAreNotForwarded(t *testing.T) {
	t.Parallel()
	newStage(t).eachDirection(t, func(t *testing.T, w way) {
		downstream, upstream := w.ask(t, "GET / HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, X-Mine\r\nKeep-Alive: timeout=5\r\n"+
			"X-Mine: secret\r\nProxy-Connection: keep-alive\r\nTE: trailers, deflate\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\nX-Kept: 1\r\n\r\n")
		request := readMessage(t, upstream, "")
		for _, name := range []string{"Keep-Alive", "X-Mine", "Proxy-Connection", "Upgrade", "HTTP2-Settings"} {
			if value(request, name) != "" {
				t.Errorf("%s reached upstream:\n%s", name, request)
			}
		}
		if te := value(request, "TE"); te != "" && te != "trailers" || value(request, "X-Kept") != "1" {
			t.Errorf("TE is %q, X-Kept %q", te, value(request, "X-Kept"))
		}
		writes(t, upstream, "HTTP/1.1 200 OK\r\nConnection: X-Theirs\r\nX-Theirs: secret\r\nKeep-Alive: timeout=9\r\nX-Kept: 2\r\nContent-Length: 0\r\n\r\n")
		answer := readMessage(t, downstream, "")
		if value(answer, "X-Theirs") != "" || value(answer, "Keep-Alive") != "" || value(answer, "X-Kept") != "2" {
			t.Errorf("downstream got\n%s", answer)
		}
	})
}

// Naming Host, a length or an identity in Connection does not remove that field: upstream would read a different request.
func TestConnectionCannotRemoveEndToEndFields(t *testing.T) {
	t.Parallel()
	newStage(t).eachDirection(t, func(t *testing.T, w way) {
		_, upstream := w.ask(t, "POST / HTTP/1.1\r\nHost: a\r\nConnection: host, content-length, x-forwarded-for, x-request-id\r\n"+
			"X-Forwarded-For: 192.0.2.1\r\nX-Request-Id: 7\r\nContent-Length: 4\r\n\r\nbody")
		request := readMessage(t, upstream, "body")
		for name, want := range map[string]string{"Host": "a", "Content-Length": "4", "X-Forwarded-For": "192.0.2.1", "X-Request-Id": "7"} {
			if got := value(request, name); got != want {
				t.Errorf("%s is %q, want %q", name, got, want)
			}
		}
	})
}
