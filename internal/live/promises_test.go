package live

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
)

func TestAViewKeepsOnlyTheFieldsThatARecordNames(t *testing.T) {
	_, table, server := serve(t, Sources{})
	ended(table, open(table, flow.Inbound, flow.HTTP11), func(r *flow.Record) {
		r.HTTP.Fields, r.HTTP.ResponseFields = [][]byte{[]byte("secret-cookie")}, [][]byte{[]byte("secret-set-cookie")}
		r.HTTP.ForwardedFor = []byte("secret-address")
	})
	for _, path := range []string{"/live", "/live/records"} {
		if _, _, body := get(t, server.URL+path); strings.Contains(body, "secret") {
			t.Errorf("%s has a field that Record does not name: %s", path, body)
		}
	}
}

func TestPeersOverTheBoundShareOneTally(t *testing.T) {
	v := New(Config{})
	table := flow.NewTable(v)
	for i := range maxPeers + 30 {
		c := flow.Open(flow.Inbound, netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, 100, byte(i)}), 4711))
		c.OriginalDestination = service
		table.List(c)
		table.Carry(c, flow.HTTP11, flow.Hello{})
		ended(table, c, nil)
	}
	s := look(v, table)
	if d := find(t, s.Peers, otherName); d.Requests != 30 || len(s.Peers) != maxPeers+1 {
		t.Errorf("%d peers, %+v", len(s.Peers), d)
	}
}

// A name that is too long for a tally counts by its address, so that names cannot take more memory than their number allows.
func TestALongHostIsCountedByItsAddress(t *testing.T) {
	v := New(Config{})
	table := flow.NewTable(v)
	c := open(table, flow.Outbound, flow.HTTP11)
	longest := strings.Repeat("a", maxHost)
	for _, host := range []string{longest, longest + "a"} {
		ended(table, c, func(r *flow.Record) { r.HTTP.Authority = []byte(host) })
	}
	s := look(v, table)
	if a, b := find(t, s.Destinations, longest), find(t, s.Destinations, service.String()); a.Requests != 1 || b.Requests != 1 || len(s.Destinations) != 2 {
		t.Errorf("%+v", s.Destinations)
	}
}

func TestTheBusiestComeFirst(t *testing.T) {
	v := New(Config{})
	table := flow.NewTable(v)
	c := open(table, flow.Outbound, flow.HTTP11)
	for i, host := range []string{"idle", "b.test", "a.test", "busy"} {
		for range []int{1, 2, 2, 5}[i] {
			ended(table, c, func(r *flow.Record) { r.HTTP.Authority = []byte(host) })
		}
		if host == "idle" {
			v.started = v.started.Add(-time.Minute) // its second is long over
		}
	}
	var got []string
	for _, d := range look(v, table).Destinations {
		got = append(got, d.Name)
	}
	if fmt.Sprint(got) != "[busy a.test b.test idle]" {
		t.Errorf("%v", got)
	}
}

// A relay lasts as long as its two sides want, so its duration says nothing about latency.
func TestAnUpgradedRequestHasNoLatency(t *testing.T) {
	v := New(Config{})
	table := flow.NewTable(v)
	c := open(table, flow.Inbound, flow.HTTP11)
	r := request(c, func(r *flow.Record) { r.HTTP.Upgraded = true })
	r.Opened = r.Opened.Add(-time.Hour)
	r.Close(table, flow.Completed, nil)
	if s := look(v, table); s.Inbound.Requests != 1 || s.Inbound.P50MS != 0 || s.Inbound.P99MS != 0 {
		t.Errorf("%+v", s.Inbound)
	}
}

func TestTextsOfReasonsNameSettingsAsTheReaderSpellsThem(t *testing.T) {
	v := New(Config{SettingName: func(setting string) string { return "--" + strings.ToLower(setting) }})
	table := flow.NewTable(v)
	open(table, flow.Outbound, flow.Opaque).Close(table, flow.UpstreamTimeout, nil)
	if s := look(v, table); len(s.Reasons) != 1 || !strings.Contains(s.Reasons[0].Text, "`--connecttimeout`") {
		t.Errorf("%+v", s.Reasons)
	}
}

func TestTheSnapshotNamesThePod(t *testing.T) {
	for _, c := range []struct{ pod, namespace, want string }{{"web-1", "shop", "shop/web-1"}, {"web-1", "", "web-1"}, {"", "shop", ""}} {
		v := New(Config{Pod: c.pod, Namespace: c.namespace})
		text, err := json.Marshal(v.snapshot(&Sources{}))
		var s Snapshot
		if err != nil || json.Unmarshal(text, &s) != nil || s.Pod != c.pod || s.Namespace != c.namespace || s.PodName() != c.want {
			t.Errorf("%+v: %q, %v", c, s.PodName(), err)
		}
		if c.pod == "" && strings.Contains(string(text), `"pod"`) {
			t.Errorf("an unknown pod has a name: %s", text)
		}
	}
}

func TestResponsesAreNotCachedAndStayOnTheirSite(t *testing.T) {
	_, _, server := serve(t, Sources{})
	for _, path := range []string{"/", "/live", "/live/records", "/live/tap?n=many"} {
		_, header, _ := get(t, server.URL+path, "Accept", "text/html")
		for name, want := range map[string]string{"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
			"Cross-Origin-Resource-Policy": "same-origin", "Access-Control-Allow-Origin": ""} {
			if got := header.Get(name); got != want {
				t.Errorf("%s: %s is %q, want %q", path, name, got, want)
			}
		}
	}
	_, header, _ := get(t, server.URL, "Accept", "text/html")
	if header.Get("Referrer-Policy") != "no-referrer" || header.Get("Vary") != "Accept" {
		t.Errorf("%v", header)
	}
	for _, directive := range []string{"connect-src 'self'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"} {
		if !strings.Contains(header.Get("Content-Security-Policy"), directive) {
			t.Errorf("the policy lacks %s: %s", directive, header.Get("Content-Security-Policy"))
		}
	}
}

// recorder is a response whose time limits are known.
type recorder struct {
	*httptest.ResponseRecorder
	limits []time.Time
}

func (r *recorder) SetWriteDeadline(limit time.Time) error {
	r.limits = append(r.limits, limit)
	return nil
}

// A tap without records sends an empty line every 15 seconds, each within a time limit of its own, and ends with the view.
func TestAnIdleTapHasAHeartbeatAndEndsWithTheView(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := New(Config{})
		response := &recorder{ResponseRecorder: httptest.NewRecorder()}
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			v.Handler(Sources{}).ServeHTTP(response, httptest.NewRequest("GET", "http://localhost/live/tap", nil))
		}()
		time.Sleep(3*heartbeat + time.Second)
		v.Close()
		<-ended
		if body := response.Body.String(); body != "\n\n\n" {
			t.Errorf("%q", body)
		}
		if last := response.limits[len(response.limits)-1]; !last.Equal(time.Now().Add(writeTimeout - time.Second)) {
			t.Errorf("the last write has until %v, now is %v", last, time.Now())
		}
	})
}

// A page gets a snapshot each second.
func TestAPageGetsASnapshotEachSecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := New(Config{})
		response := httptest.NewRecorder()
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			v.Handler(Sources{}).ServeHTTP(response, httptest.NewRequest("GET", "http://localhost/live/events", nil))
		}()
		time.Sleep(5*time.Second + time.Second/10)
		v.Close()
		<-ended
		if n := strings.Count(response.Body.String(), "event: snapshot\n"); n != 6 {
			t.Errorf("%d snapshots in five seconds, want the first one and five", n)
		}
		if !strings.HasPrefix(response.Body.String(), "retry: 1000\n\n") || response.Header().Get("Content-Type") != "text/event-stream" {
			t.Errorf("%v %.40q", response.Header(), response.Body)
		}
	})
}

func TestMatchingDoesNotAllocate(t *testing.T) {
	query := map[string][]string{"direction": {"inbound"}, "host": {"EXAMPLE.test"}, "path": {"/a"}, "status": {"2xx"}, "address": {"198.51.100.0/24"}}
	filter, err := ParseFilter(query)
	if err != nil {
		t.Fatal(err)
	}
	e := &entry{number: 1}
	r := request(open(flow.NewTable(), flow.Inbound, flow.HTTP11), nil)
	r.Reason = flow.Completed
	e.fill(r)
	if !filter.matches(e) {
		t.Fatal("the record does not match")
	}
	if n := testing.AllocsPerRun(100, func() { filter.matches(e) }); n != 0 {
		t.Errorf("a match allocates %v times", n)
	}
}

// Every method but GET and HEAD is refused, as no path changes anything.
func TestThereAreNoCommands(t *testing.T) {
	v := New(Config{})
	for _, path := range []string{"/", "/live", "/live/records", "/live/tap", "/live/events"} {
		for _, method := range []string{http.MethodPost, http.MethodPut, http.MethodDelete, http.MethodOptions} {
			response := httptest.NewRecorder()
			v.Handler(Sources{}).ServeHTTP(response, httptest.NewRequest(method, "http://localhost"+path, nil))
			if response.Code != http.StatusMethodNotAllowed {
				t.Errorf("%s %s: %d", method, path, response.Code)
			}
		}
	}
}

// An opaque connection belongs to its destination while it is open, not only at its end.
func TestAnOpaqueConnectionCountsAtItsDestinationWhenItOpens(t *testing.T) {
	for _, protocol := range []flow.Protocol{flow.Opaque, flow.TLS} {
		v := New(Config{})
		table := flow.NewTable(v)
		open(table, flow.Outbound, protocol)
		if d := find(t, look(v, table).Destinations, service.String()); d.Connections != 1 || d.Flows != 0 {
			t.Errorf("%s: %+v", protocol, d)
		}
	}
}

// A record that closes between a page's arrival and the list of the last records is in both, and is sent once.
func TestAPageGetsEachRecordOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := New(Config{})
		table := flow.NewTable(v)
		c := open(table, flow.Inbound, flow.HTTP11)
		closed := false
		gates := func() []Gate { // is called for the first snapshot, when the page follows already
			if !closed {
				closed = true
				ended(table, c, nil)
			}
			return nil
		}
		response := httptest.NewRecorder()
		done := make(chan struct{})
		go func() {
			defer close(done)
			v.Handler(Sources{Gates: gates}).ServeHTTP(response, httptest.NewRequest("GET", "http://localhost/live/events", nil))
		}()
		time.Sleep(3 * time.Second)
		v.Close()
		<-done
		if n := strings.Count(response.Body.String(), "event: record\n"); n != 1 {
			t.Errorf("the record is sent %d times", n)
		}
	})
}
