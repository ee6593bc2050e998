package serve

import (
	"bufio"
	"context"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/http1/http1test"
	"github.com/pillion-proxy/pillion/internal/httpforward"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/tcp"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

// rig is a role that carries connections from loopback to an origin. The origin answers every request with 200.
type rig struct {
	role    *Role
	address string             // of the role
	carried chan struct{}      // connections whose protocol is known
	records chan flow.Protocol // of what has ended
	ended   chan struct{}      // connections whose records are all in records
}

// Opened implements flow.Opener.
func (r *rig) Opened(*flow.Record) { r.carried <- struct{}{} }

// Closed implements flow.Sink.
func (r *rig) Closed(record *flow.Record) { r.records <- record.Protocol }

func newRig(t *testing.T, settings Settings, http httpforward.Settings) *rig {
	t.Helper()
	poller, err := tcp.NewPoller()
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{carried: make(chan struct{}, 10), records: make(chan flow.Protocol, 10), ended: make(chan struct{}, 10)}
	origin, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	pool := upstream.NewPool(time.Hour)
	if r.role, err = NewRole(Config{
		Poller: poller, Flows: flow.NewTable(r), Settings: settings, HTTP: httpforward.Config{Pool: pool, Settings: http},
	}); err != nil {
		t.Fatal(err)
	}
	listener, err := poller.Listen(netip.MustParseAddrPort("127.0.0.1:0"))
	if err != nil {
		t.Fatal(err)
	}
	r.address = listener.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	var conns sync.WaitGroup
	conns.Go(func() {
		for {
			conn, err := origin.Accept()
			if err != nil {
				return
			}
			conns.Go(func() { answer(conn) })
		}
	})
	to := upstream.Target{Address: origin.Addr().(*net.TCPAddr).AddrPort()}
	conns.Go(func() {
		for {
			down, err := listener.Accept()
			if err != nil {
				return
			}
			conns.Go(func() { r.walk(ctx, down, to) })
		}
	})
	t.Cleanup(func() {
		listener.Close()
		origin.Close()
		cancel()
		poller.WakeAll()
		pool.Close()
		conns.Wait()
		poller.Close()
	})
	return r
}

// walk is a role's walk without a policy.
func (r *rig) walk(ctx context.Context, down *tcp.Conn, to upstream.Target) {
	defer func() { r.ended <- struct{}{} }()
	c := r.role.Open(ctx, down)
	defer c.Close()
	c.Record.OriginalDestination = to.Address
	c.List()
	if c.ReadFirst(true) && (c.HTTP() || c.Dial(&to)) && c.WatchBoth() {
		c.Carry(&to)
	}
}

// answer serves a connection of the origin. It reads what is not HTTP to its end, and so it does with a body that
// net/http does not read, such as one with long trailers.
func answer(conn net.Conn) {
	defer conn.Close()
	reader := bufio.NewReader(conn)
	for {
		request, err := http.ReadRequest(reader)
		if err != nil {
			io.Copy(io.Discard, reader)
			return
		}
		if _, err := io.Copy(io.Discard, request.Body); err != nil {
			io.Copy(io.Discard, reader)
			return
		}
		io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
	}
}

// outcome sends bytes, and returns the protocol of their record and the status of the response. Behind each part the
// client pauses until the connection is carried. behind is whether the bytes follow another request.
func (r *rig) outcome(t *testing.T, behind bool, parts ...string) string {
	t.Helper()
	conn, err := net.Dial("tcp", r.address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(nettest.Patience))
	reader := bufio.NewReader(conn)
	if behind {
		io.WriteString(conn, "GET /before HTTP/1.1\r\nHost: a\r\n\r\n")
		if response, err := http.ReadResponse(reader, nil); err != nil || response.StatusCode != 200 {
			t.Fatalf("the request before is answered %v, %v", response, err)
		}
		<-r.carried
		<-r.records
	}
	for i, part := range parts {
		if i > 0 && !behind {
			<-r.carried
		}
		io.WriteString(conn, part)
	}
	conn.(*net.TCPConn).CloseWrite()
	answer, _ := io.ReadAll(reader)
	<-r.ended // a record leaves the table before it is reported
	what := "not recorded"
	for first := true; len(r.records) > 0; first = false {
		if protocol := <-r.records; first {
			what = protocol.String()
		}
	}
	for len(r.carried) > 0 {
		<-r.carried
	}
	if status, isHTTP := strings.CutPrefix(string(answer), "HTTP/1.1 "); isHTTP && len(status) > 3 {
		what += " " + status[:3]
	}
	return what
}

// opaqueFirst are the messages that are carried as opaque bytes when they come first. Behind a request they are answered
// 400, because HTTP is expected there, or not at all. No server that was tried serves them.
var opaqueFirst = map[string]string{
	"a vertical tab for a space":        "no method",
	"NUL in the method":                 "no method",
	"no method":                         "no method",
	"a method alone":                    "no version",
	"a method that is no token":         "no method",
	"a method beyond ASCII":             "no method",
	"HTTP/0.9":                          "no version; a server closes after it, so that no other request follows",
	"an empty version":                  "no version",
	"HTTPS/1.1":                         "no version",
	"the preface of HTTP/2":             "HTTP/2",
	"a response where a request is due": "no method",
	"a TLS hello":                       "TLS",
	"nothing":                           "incomplete",
	"an empty line and nothing":         "incomplete",
	"half a request line":               "incomplete",
	"a method of every token character": "a method that detection does not know, because words of other protocols would be held",
}

// The position of a request in its connection does not matter: a request that is seen by the agent and answered by the
// server behind another request is not hidden when it is the first one.
func TestTheFirstRequestIsJudgedLikeEveryOther(t *testing.T) {
	r := newRig(t,
		Settings{ConnectTimeout: nettest.Patience, DetectionDelay: nettest.Patience, DetectionHold: nettest.Patience},
		httpforward.Settings{MaxHeadBytes: 64 << 10, MaxHeadFields: 300})
	exceptions := maps.Clone(opaqueFirst)
	for _, m := range http1test.Requests {
		first, second := r.outcome(t, false, m.Bytes), r.outcome(t, true, m.Bytes)
		reason := exceptions[m.Name]
		delete(exceptions, m.Name)
		switch known := strings.HasPrefix(reason, "a method"); {
		case (first != second) != (reason != ""):
			t.Errorf("%s: %q: %s, but behind another request %s; expected to differ: %q", m.Name, m.Bytes[:min(len(m.Bytes), 60)], first, second, reason)
		case reason != "" && strings.HasSuffix(second, " 200") && !known:
			t.Errorf("%s: %q is a request, and hidden when it is the first one", m.Name, m.Bytes)
		}
	}
	if len(exceptions) > 0 {
		t.Errorf("not in the table of messages: %v", exceptions)
	}
}

// A pause that outlasts the hold does not hide a request either, once its path has begun.
func TestAPauseInTheFirstLineDoesNotHideARequest(t *testing.T) {
	r := newRig(t,
		Settings{ConnectTimeout: nettest.Patience, DetectionDelay: nettest.Patience, DetectionHold: time.Millisecond},
		httpforward.Settings{MaxHeadBytes: 64 << 10, MaxHeadFields: 300})
	for _, c := range []struct{ before, behind, first, second string }{
		{"GET /", "a HTTP/1.1\r\nHost: a\r\n\r\n", "HTTP/1.1 200", "HTTP/1.1 200"},
		{"GET /a HTTP/1.", "1\r\nHost: a\r\n\r\n", "HTTP/1.1 200", "HTTP/1.1 200"},
		{"\r\nput http://a/", "b HTTP/1.0\r\nHost: a\r\n\r\n", "HTTP/1.0 200", "HTTP/1.0 200"},
		{"GET /a", " b HTTP/1.1\r\nHost: a\r\n\r\n", "HTTP/1.1 400", "HTTP/1.1 400"},
		{"POST  /a", " HTTP/1.1\r\nHost: a\r\n\r\n", "HTTP/1.1 400", "HTTP/1.1 400"},
		{"GE", "T / HTTP/1.1\r\nHost: a\r\n\r\n", "opaque 200", "HTTP/1.1 200"}, // see docs/limits.md
	} {
		if first, second := r.outcome(t, false, c.before, c.behind), r.outcome(t, true, c.before, c.behind); first != c.first || second != c.second {
			t.Errorf("%q, pause, %q: %s, and behind another request %s; want %s and %s", c.before, c.behind, first, second, c.first, c.second)
		}
	}
}
