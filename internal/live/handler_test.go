package live

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/nettest"
)

// serve serves a view.
func serve(t *testing.T, sources Sources) (*View, *flow.Table, *httptest.Server) {
	t.Helper()
	return serveWithin(t, nettest.Patience, sources)
}

// serveWithin is serve with a time limit of the server for requests that do not extend it.
func serveWithin(t testing.TB, limit time.Duration, sources Sources) (*View, *flow.Table, *httptest.Server) {
	t.Helper()
	v := New(Config{Version: "v1"})
	table := flow.NewTable(v)
	sources.Table = table
	server := httptest.NewUnstartedServer(v.Handler(sources))
	server.Config.ReadTimeout, server.Config.WriteTimeout = limit, limit
	server.Start()
	t.Cleanup(server.Close)
	t.Cleanup(v.Close)
	return v, table, server
}

func get(t *testing.T, address string, fields ...string) (int, http.Header, string) {
	t.Helper()
	r, err := http.NewRequest("GET", address, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(fields); i += 2 {
		if r.Header.Set(fields[i], fields[i+1]); fields[i] == "Host" {
			r.Host = fields[i+1]
		}
	}
	response, err := http.DefaultTransport.(*http.Transport).Clone().RoundTrip(withClose(r))
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response.StatusCode, response.Header, string(body)
}

func withClose(r *http.Request) *http.Request { r.Close = true; return r }

// follow opens a stream, waits until the view has the follower, and returns the lines.
func follow(t testing.TB, v *View, address string) *bufio.Scanner {
	t.Helper()
	before := len(v.following.list())
	r, _ := http.NewRequestWithContext(t.Context(), "GET", address, nil)
	response, err := http.DefaultTransport.(*http.Transport).Clone().RoundTrip(withClose(r))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { response.Body.Close() })
	if response.StatusCode != http.StatusOK || len(v.following.list()) <= before {
		t.Fatalf("%s: %s, %d follow", address, response.Status, len(v.following.list()))
	}
	lines := bufio.NewScanner(response.Body)
	lines.Buffer(nil, 1<<20)
	return lines
}

func TestOnlyRequestsForThisMachineAreServed(t *testing.T) {
	_, _, server := serve(t, Sources{})
	port := server.URL[strings.LastIndex(server.URL, ":"):]
	for _, c := range []struct {
		path, host, site string
		code             int
	}{
		{"/live", "localhost" + port, "", 200},
		{"/live", "LOCALHOST", "", 200},
		{"/live", "127.0.0.1:9", "same-origin", 200},
		{"/live", "127.9.9.9", "none", 200},
		{"/live", "[::1]" + port, "", 200},
		{"/live", "attacker.example" + port, "", 403},
		{"/live", "localhost.attacker.example", "", 403},
		{"/live", "127.0.0.1.attacker.example", "", 403},
		{"/live", "10.0.0.1" + port, "", 403},
		{"/live", "[2001:db8::1]", "", 403},
		{"/live/tap", "attacker.example", "", 403},
		{"/live/events", "attacker.example", "", 403},
		{"/live/records", "attacker.example", "", 403},
		{"/live", "localhost", "cross-site", 403},
		{"/live/events", "localhost", "same-site", 403}, // another port of localhost is another program
		{"/", "localhost", "cross-site", 200},           // a link from elsewhere; the page itself has no data
		{"/", "attacker.example", "", 403},
	} {
		code, header, body := get(t, server.URL+c.path, "Host", c.host, "Sec-Fetch-Site", c.site, "Origin", "http://attacker.example")
		if code != c.code || header.Get("Access-Control-Allow-Origin") != "" || code == 403 && !strings.Contains(body, "port-forward") {
			t.Errorf("%s for %s from %q: %d, want %d: %q", c.path, c.host, c.site, code, c.code, body)
		}
	}
}

func TestABrowserGetsThePageAndOthersTheIndex(t *testing.T) {
	_, _, server := serve(t, Sources{Index: func() string { return "/live\n" }})
	code, header, body := get(t, server.URL, "Accept", "text/html,application/xhtml+xml;q=0.9,*/*;q=0.8")
	policy := header.Get("Content-Security-Policy")
	if code != 200 || !strings.HasPrefix(body, "<!doctype html>") || !strings.HasPrefix(policy, "default-src 'none'; script-src 'sha256-") ||
		strings.Contains(policy, "unsafe") {
		t.Errorf("%d %v %.60q", code, header, body)
	}
	if _, _, body := get(t, server.URL, "Accept", "*/*"); body != "/live\n" {
		t.Errorf("the index is %q", body)
	}
	for _, c := range []struct {
		method, path string
		code         int
	}{{"GET", "/live/unknown", 404}, {"GET", "/other", 404}, {"POST", "/live", 405}} {
		answer := httptest.NewRecorder()
		r := httptest.NewRequest(c.method, "http://localhost"+c.path, nil)
		New(Config{}).Handler(Sources{}).ServeHTTP(answer, r)
		if answer.Code != c.code {
			t.Errorf("%s %s: %d, want %d", c.method, c.path, answer.Code, c.code)
		}
	}
}

func TestThePageMakesNoMarkupFromValues(t *testing.T) {
	for _, word := range []string{"innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "http://", "https://", "style=\""} {
		if text := strings.ReplaceAll(page, "http://www.w3.org/2000/svg", ""); strings.Contains(text, word) {
			t.Errorf("page.html has %s", word)
		}
	}
}

func TestTheSnapshotHasGatesAndOpenConnections(t *testing.T) {
	gates := func() []Gate {
		return []Gate{{Name: "inbound", Open: true}, {Name: "addresses", Why: "not listed yet"}}
	}
	_, table, server := serve(t, Sources{Gates: gates})
	old := open(table, flow.Outbound, flow.TLS)
	old.Opened = old.Opened.Add(-time.Hour)
	old.Sent.Store(7)
	for range maxConnections + 20 {
		open(table, flow.Inbound, flow.Opaque)
	}
	undecided := flow.Open(flow.Inbound, client)
	table.List(undecided)
	_, _, body := get(t, server.URL+"/live")
	var s Snapshot
	if err := json.Unmarshal([]byte(body), &s); err != nil {
		t.Fatal(err)
	}
	if s.Ready || len(s.Gates) != 2 || s.Gates[1].Why != "not listed yet" || s.Open != maxConnections+22 || len(s.Connections) != maxConnections {
		t.Errorf("ready %v, gates %v, %d open, %d listed", s.Ready, s.Gates, s.Open, len(s.Connections))
	}
	if first := s.Connections[0]; first.Direction != "inbound" || first.Protocol != "opaque" {
		t.Errorf("the oldest of the listed is %+v", first)
	}
	if last := s.Connections[maxConnections-1]; last.Protocol != "" || last.Downstream != "198.51.100.2:4711" {
		t.Errorf("the youngest is %+v", last)
	}
	for _, c := range s.Connections[1:] {
		if c.AgeSeconds > s.Connections[0].AgeSeconds {
			t.Fatal("the oldest does not come first")
		}
	}
	if strings.Contains(body, ":null") {
		t.Errorf("null in %.300s", body)
	}
}

func TestRecordsAreCopiesCutAtTheirBounds(t *testing.T) {
	v, table, server := serve(t, Sources{})
	c := open(table, flow.Inbound, flow.HTTP11)
	c.SetTLS(flow.Hello{ServerName: "sni.test"})
	path := []byte("/" + strings.Repeat("é", 200))
	r := request(c, func(r *flow.Record) {
		r.HTTP.Path, r.HTTP.Method, r.HTTP.Status, r.HTTP.ServiceTime = path, []byte("PATCH"), 503, 1500*time.Microsecond
		r.Received.Store(3)
		r.TransportFailure = "delayed_connect_error"
		r.Cluster, r.Route = "outbound|80||web", "main"
	})
	r.Close(table, flow.UpstreamRefused, nil)
	copy(path, "overwritten")
	_, _, body := get(t, server.URL+"/live/records")
	var answer Records
	if err := json.Unmarshal([]byte(body), &answer); err != nil || len(answer.Records) != 1 {
		t.Fatalf("%v: %s", err, body)
	}
	got := answer.Records[0]
	got.Time, got.DurationMS = time.Time{}, 0
	want := Record{
		Number: 1, Direction: "inbound", Protocol: "HTTP/1.1", Request: true,
		Downstream: "198.51.100.2:4711", Destination: "203.0.113.7:80", Upstream: "203.0.113.7:80", Cluster: "outbound|80||web", Route: "main",
		Method: "PATCH", Path: "/" + strings.Repeat("é", 127) + "\uFFFD…", Authority: "example.test", Status: 503,
		Flags: "UF", Details: "upstream_reset_before_response_started{remote_connection_failure}", Reason: "upstream_refused", Failed: true,
		Failure: "delayed_connect_error", ServiceMS: 1.5, Received: 3, RequestID: "3f7b6f0e-0000-4000-8000-000000000000", UserAgent: "curl/7.88.1",
		SNI: "sni.test",
	}
	if got != want {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	for range 250 {
		ended(table, c, nil)
	}
	if list := v.last.records(&Filter{}); len(list) != lastRecords || list[0].Number != 152 || list[99].Number != 251 {
		t.Errorf("%d records, from %d to %d", len(list), list[0].Number, list[len(list)-1].Number)
	}
}

func TestFilters(t *testing.T) {
	_, table, server := serve(t, Sources{})
	in, out := open(table, flow.Inbound, flow.HTTP11), open(table, flow.Outbound, flow.HTTP2)
	name := func(id string, change func(*flow.Record)) func(*flow.Record) {
		return func(r *flow.Record) {
			r.HTTP.ID = []byte(id)
			if change != nil {
				change(r)
			}
		}
	}
	ended(table, in, name("a", nil))
	ended(table, out, name("b", func(r *flow.Record) { r.HTTP.Status = 503 }))
	ended(table, out, name("c", func(r *flow.Record) { r.HTTP.Authority, r.HTTP.Path = []byte("Other.test:8080"), []byte("/v2/x") }))
	ended(table, out, name("d", func(r *flow.Record) {
		r.HTTP.Status = 404
		r.Upstream = netip.MustParseAddrPort("[2001:db8::7]:443")
		r.Downstream = netip.MustParseAddrPort("[::ffff:192.0.2.9]:1000")
	}))
	c := open(table, flow.Outbound, flow.HTTP2)
	c.SetTLS(flow.Hello{ServerName: "Server.test"})
	ended(table, c, name("e", func(r *flow.Record) {
		r.HTTP.Authority, r.HTTP.Path, r.HTTP.Status = []byte("[2001:DB8::5]:80"), []byte("*"), 500
		r.Downstream = netip.MustParseAddrPort("198.51.100.9:1")
		r.OriginalDestination = netip.MustParseAddrPort("198.51.100.9:2")
		r.Upstream = r.OriginalDestination
	}))
	for query, want := range map[string]string{
		"": "abcde", "direction=inbound": "a", "direction=outbound": "bcde", "host=example.TEST": "abd", "host=other.test": "c",
		"host=other.test:8080": "c", "host=other.test:80": "", "path=/v2/": "c", "path=/": "abcd", "status=5xx": "be", "status=404": "d",
		"host=2001:db8::5": "e", "host=[2001:db8::5]:80": "e", "host=server.test": "e", "status=2xx&direction=outbound": "c", "address=203.0.113.0/24": "abcd", "address=198.51.100.2": "abc", "address=192.0.2.9:1000": "d",
		"address=192.0.2.9:1001": "", "address=[2001:db8::7]:443": "d", "address=2001:db8::/32": "d", "host=": "abcde",
	} {
		code, _, body := get(t, server.URL+"/live/records?"+query)
		var answer Records
		var got string
		json.Unmarshal([]byte(body), &answer)
		for _, r := range answer.Records {
			got += r.RequestID
		}
		if code != 200 || got != want {
			t.Errorf("%s: %d %q, want %q", query, code, got, want)
		}
	}
	for query, want := range map[string]string{
		"direction=up":                        `direction="up": not a direction: use inbound or outbound`,
		"status=6xx":                          `status="6xx": not a status: use one such as 404, or a class such as 5xx`,
		"status=99":                           `status="99": not a status: use one such as 404, or a class such as 5xx`,
		"address=example":                     `address="example": not an address: use one such as 192.0.2.1, 192.0.2.1:80, [2001:db8::1]:80 or 192.0.2.0/24`,
		"colour=red":                          `colour="red": unknown: use direction, host, path, status, address`,
		"path=/" + strings.Repeat("x", 300):   `path="/` + strings.Repeat("x", 39) + `": too long: use 256 bytes at most`,
		"n=3":                                 `n="3": unknown: use direction, host, path, status, address`,
		"host=a;b":                            "",
		"direction=inbound&direction=sideway": `direction="sideway": not a direction: use inbound or outbound`,
	} {
		code, _, body := get(t, server.URL+"/live/records?"+query)
		if want != "" && (code != 400 || body != want+"\n") {
			t.Errorf("%s: %d %q, want %q", query, code, body, want)
		}
	}
	if code, _, body := get(t, server.URL+"/live/tap?n=many"); code != 400 || body != "n=\"many\": not a count: use a whole number; 0: no limit\n" {
		t.Errorf("%d %q", code, body)
	}
}

func TestATapSendsRecordsAsTheyCloseAndEndsAfterItsCount(t *testing.T) {
	v, table, server := serve(t, Sources{})
	c := open(table, flow.Outbound, flow.HTTP11)
	ended(table, c, nil) // before the tap follows
	lines := follow(t, v, server.URL+"/live/tap?n=2&path=/b")
	for _, path := range []string{"/a", "/b1", "/a", "/b2", "/b3"} {
		ended(table, c, func(r *flow.Record) { r.HTTP.Path = []byte(path) })
	}
	var got []string
	for lines.Scan() {
		var tapped Tapped
		if err := json.Unmarshal(lines.Bytes(), &tapped); err != nil {
			t.Fatal(err)
		}
		got = append(got, tapped.Path)
	}
	if fmt.Sprint(got) != "[/b1 /b2]" || lines.Err() != nil {
		t.Errorf("%v, %v", got, lines.Err())
	}
	nettest.Eventually(t, "the tap leaves", func() bool { return v.following.all.Load() == nil })
}

// next reads events up to the first of that name and returns its data.
func next(t *testing.T, lines *bufio.Scanner, name string) string {
	t.Helper()
	for lines.Scan() {
		if lines.Text() == "event: "+name && lines.Scan() {
			return strings.TrimPrefix(lines.Text(), "data: ")
		}
	}
	t.Fatalf("no %s: %v", name, lines.Err())
	return ""
}

func TestEventsBeginWithTheLastRecordsAndContinue(t *testing.T) {
	v, table, server := serve(t, Sources{})
	c := open(table, flow.Inbound, flow.HTTP11)
	ended(table, c, nil)
	lines := follow(t, v, server.URL+"/live/events")
	var s Snapshot
	if err := json.Unmarshal([]byte(next(t, lines, "snapshot")), &s); err != nil || s.Inbound.Requests != 1 || s.Followers != 1 {
		t.Fatalf("%v %+v", err, s)
	}
	var r Record
	if err := json.Unmarshal([]byte(next(t, lines, "record")), &r); err != nil || r.Number != 1 {
		t.Fatalf("%v %+v", err, r)
	}
	const many = 3 * recordsPerSecond
	began := time.Now()
	for range many {
		ended(table, c, func(r *flow.Record) { r.HTTP.Path = []byte("/x\n\nevent: snapshot\n") })
	}
	// Two seconds begin at most while they close, unless the machine is slow. Some of them are over the rate then.
	seconds := int(time.Since(began)/time.Second) + 2
	var records, skipped int
	for records+skipped < many && lines.Scan() {
		switch lines.Text() {
		case "event: record":
			records++
		case "event: skipped":
			var told struct{ Skipped int }
			lines.Scan()
			json.Unmarshal([]byte(strings.TrimPrefix(lines.Text(), "data: ")), &told)
			skipped += told.Skipped
		}
	}
	if records < recordsPerSecond || records > seconds*recordsPerSecond || records+skipped != many {
		t.Errorf("%d records and %d skipped of %d", records, skipped, many)
	}
	next(t, lines, "snapshot")
	v.Close()
	for lines.Scan() {
	}
	if lines.Err() != nil {
		t.Errorf("the stream did not end in order: %v", lines.Err())
	}
}

func TestASlowFollowerLosesRecordsThatAreCounted(t *testing.T) {
	v := New(Config{})
	table := flow.NewTable(v)
	c := open(table, flow.Inbound, flow.HTTP11)
	slow, err := v.following.join(Filter{}, 0)
	if err != nil {
		t.Fatal(err)
	}
	for range queueLength + 10 {
		ended(table, c, nil)
	}
	if len(slow.queue) != queueLength || slow.missed.Load() != 10 {
		t.Errorf("%d are queued and %d missed", len(slow.queue), slow.missed.Load())
	}
	r := request(c, nil)
	r.Reason = flow.Completed
	if n := testing.AllocsPerRun(100, func() { v.Closed(r) }); n != 0 {
		t.Errorf("a record that no follower takes allocates %v times", n)
	}
}

func TestFollowersAreBounded(t *testing.T) {
	v, _, server := serve(t, Sources{})
	for range maxFollowers {
		if _, err := v.following.join(Filter{}, 0); err != nil {
			t.Fatal(err)
		}
	}
	for _, path := range []string{"/live/tap", "/live/events"} {
		if code, _, body := get(t, server.URL+path); code != 503 || !strings.Contains(body, "16 pages and taps") {
			t.Errorf("%s: %d %q", path, code, body)
		}
	}
	for _, f := range v.following.list() {
		v.following.leave(f)
	}
	if v.following.all.Load() != nil {
		t.Error("when the last has left there is still a list")
	}
}

// Many goroutines close records while others read: no record is lost, and the race detector finds no race.
func TestReadersLoseNoRecord(t *testing.T) {
	v, table, server := serve(t, Sources{})
	const carriers, each = 4, 300
	lines := follow(t, v, server.URL+"/live/tap?n="+fmt.Sprint(carriers*each))
	var carrying sync.WaitGroup
	for i := range carriers {
		carrying.Go(func() {
			c := open(table, flow.Direction(i%2), flow.HTTP11)
			for j := range each {
				ended(table, c, func(r *flow.Record) { r.HTTP.Authority = fmt.Appendf(nil, "h%d.test", j%7) })
			}
			table.Leave(c)
		})
	}
	counted := 0
	for lines.Scan() {
		var tapped Tapped
		json.Unmarshal(lines.Bytes(), &tapped)
		if counted += int(tapped.Skipped); tapped.Record != nil {
			counted++
		}
		if counted%100 == 0 {
			get(t, server.URL+"/live")
		}
		if counted == carriers*each {
			break
		}
	}
	carrying.Wait()
	s := look(v, table)
	if counted != carriers*each || s.Inbound.Requests+s.Outbound.Requests != carriers*each || s.Open != 0 {
		t.Errorf("%d received, %d and %d counted", counted, s.Inbound.Requests, s.Outbound.Requests)
	}
}

func FuzzFilter(f *testing.F) {
	f.Add("direction=inbound&status=5xx&address=192.0.2.0/24")
	f.Add("address=[::1]:80&host=A&path=%00")
	f.Fuzz(func(t *testing.T, text string) {
		query, err := url.ParseQuery(text)
		if err != nil {
			return
		}
		if filter, err := ParseFilter(query); err == nil {
			e := &entry{number: 1}
			e.fill(&flow.Record{HTTP: &flow.Request{Path: []byte("/")}})
			filter.matches(e)
		}
	})
}

func TestAStreamOutlivesTheServersTimeLimits(t *testing.T) {
	nettest.UnderLimit(t, 500*time.Millisecond, func(t testing.TB, limit time.Duration) { // in which a request is read
		v, table, server := serveWithin(t, limit, Sources{})
		began := time.Now()
		tap := follow(t, v, server.URL+"/live/tap")
		events := follow(t, v, server.URL+"/live/events")
		// The first comes at once, and the others after a second each: one at least after the limit.
		for snapshots, late := 0, false; snapshots < 2 || !late; {
			if !events.Scan() {
				t.Fatalf("the events end after %d snapshots: %v", snapshots, events.Err())
			}
			if events.Text() == "event: snapshot" {
				snapshots++
				late = time.Since(began) > 2*limit
			}
		}
		ended(table, open(table, flow.Inbound, flow.HTTP11), nil)
		if !tap.Scan() || !strings.Contains(tap.Text(), "example.test") {
			t.Errorf("the tap ended, or sent %q: %v", tap.Text(), tap.Err())
		}
	})
}
