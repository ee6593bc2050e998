package httpforward

import (
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/route"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// greetHub begins a connection to a hub.
func greetHub(t testing.TB, r *rig, settings string) *speaker {
	t.Helper()
	client := newSpeaker(t, r.dial(t))
	send(t, client.conn, http2.ClientPreface)
	client.sends(strings.TrimSpace("SETTINGS " + settings))
	for _, frame := range []string{"SETTINGS 3=256 6=65536", "WINDOW 0 983041", "SETTINGS ack"} {
		client.reads(frame)
	}
	return client
}

// acceptHub accepts a hub's connection, and answers its greeting.
func acceptHub(t testing.TB, o *origin, settings string) *speaker {
	t.Helper()
	server := newSpeaker(t, o.accept())
	expect(t, server.conn, http2.ClientPreface)
	server.reads("SETTINGS 2=0 6=65536")
	server.reads("WINDOW 0 983041")
	server.sends(strings.TrimSpace("SETTINGS " + settings))
	return server
}

// toOrigin sends everything to one origin.
func toOrigin(o *origin) Router {
	return &planned{decide: func(_ *Request, d *Decision) { d.Target = upstream.Target{Address: o.address} }}
}

func TestAHubHasItsOwnStreamNumbersAndWindows(t *testing.T) {
	o := newOrigin(t)
	r := newHub(t, o.address, toOrigin(o), plain)
	client := greetHub(t, r, "4=5")
	client.sends("HEADERS 7 end " + getFields)
	server := acceptHub(t, o, "4=3")
	server.reads("HEADERS 1 end " + getFields)
	server.reads("SETTINGS ack")
	client.sends("PING 12345678") // is answered here
	client.reads("PING ack 12345678")
	server.sends("HEADERS 1 :status=200")
	server.sends("DATA 1 end 1234567")
	client.reads("HEADERS 7 :status=200")
	client.reads("DATA 7 12345")
	client.sends("POST 9")
	client.sends("DATA 9 abcdef")
	server.reads("POST 3")
	server.reads("DATA 3 abc")
	server.sends("WINDOW 3 100")
	server.reads("DATA 3 def")
	client.sends("WINDOW 7 100")
	client.reads("DATA 7 end 67")
	client.sends("HEADERS 9 end grpc-x=1") // trailers
	server.reads("HEADERS 3 end grpc-x=1")
	server.sends("HEADERS 3 :status=103 link=a")
	server.sends("HEADERS 3 end :status=204")
	client.reads("HEADERS 9 :status=103 link=a")
	client.reads("HEADERS 9 end :status=204")
	if got := r.records.await(t, 0); got.reason != flow.Completed || got.sent != 7 {
		t.Errorf("the record is %+v", got)
	}
	if got := r.records.await(t, 1); got.reason != flow.Completed || got.received != 6 {
		t.Errorf("the record is %+v", got)
	}
}

// A raised or lowered initial window changes those of open streams.
func TestAHubFollowsAnInitialWindow(t *testing.T) {
	o := newOrigin(t)
	r := newHub(t, o.address, toOrigin(o), plain)
	client := greetHub(t, r, "4=2")
	client.sends("GET 1")
	server := acceptHub(t, o, "")
	server.reads("GET 1")
	server.sends("HEADERS 1 :status=200")
	server.sends("DATA 1 end 123456")
	client.reads("HEADERS 1 :status=200")
	client.reads("DATA 1 12")
	client.sends("SETTINGS 4=0")
	client.reads("SETTINGS ack")
	client.sends("WINDOW 1 2")
	client.sends("PING 12345678")
	client.reads("PING ack 12345678")
	client.sends("SETTINGS 4=3")
	client.reads("DATA 1 345")
	client.reads("SETTINGS ack")
	client.sends("WINDOW 1 9")
	client.reads("DATA 1 end 6")
}

func TestResetsPassAHub(t *testing.T) {
	o := newOrigin(t)
	r := newHub(t, o.address, toOrigin(o), plain)
	client := greetHub(t, r, "")
	client.sends("POST 1")
	server := acceptHub(t, o, "")
	server.reads("POST 1")
	server.reads("SETTINGS ack")
	client.sends("RST 1 CANCEL")
	server.reads("RST 1 CANCEL")
	client.sends("GET 3")
	server.reads("GET 3")
	server.sends("HEADERS 3 :status=200")
	server.sends("RST 3 INTERNAL_ERROR")
	client.reads("HEADERS 3 :status=200")
	client.reads("RST 3 INTERNAL_ERROR")
	client.sends("GET 5")
	server.reads("GET 5")
	server.sends("RST 5 INTERNAL_ERROR")
	if got := client.next(); !strings.HasPrefix(got, "HEADERS 5 :status=503 server=pillion") {
		t.Errorf("read %q", got)
	}
	client.sends("POST 7")
	server.reads("POST 7")
	server.sends("HEADERS 7 end :status=200") // before the end of the request
	server.sends("RST 7 NO_ERROR")
	if got := client.next(); !strings.HasPrefix(got, "DATA 5 end upstream_connect_error") {
		t.Errorf("read %q", got)
	}
	client.reads("HEADERS 7 end :status=200")
	client.reads("RST 7 NO_ERROR")
	for i, want := range []recorded{
		{reason: flow.DownstreamLeft, flags: "DC"}, {reason: flow.UpstreamReset, flags: "UR", status: 200},
		{reason: flow.UpstreamReset, flags: "UR", status: 503}, {reason: flow.Completed, status: 200},
	} {
		if got := r.records.await(t, i); got.reason != want.reason || got.flags != want.flags || got.status != want.status {
			t.Errorf("record %d is %+v, want %+v", i, got, want)
		}
	}
}

// Streams above the last one of a GOAWAY, and refused ones, were not processed: they are sent again, with their bodies.
func TestAHubSendsRefusedStreamsAgain(t *testing.T) {
	o := newOrigin(t)
	r := newHub(t, o.address, toOrigin(o), plain)
	client := greetHub(t, r, "")
	client.sends("GET 1")
	first := acceptHub(t, o, "")
	first.reads("GET 1")
	first.reads("SETTINGS ack")
	client.sends("POST 3")
	client.sends("DATA 3 ab")
	first.reads("POST 3")
	first.reads("DATA 3 ab")
	first.sends("GOAWAY 1 NO_ERROR")
	second := acceptHub(t, o, "")
	second.reads("POST 1")
	second.reads("DATA 1 ab")
	second.reads("SETTINGS ack")
	second.sends("RST 1 REFUSED_STREAM")
	second.reads("POST 3")
	second.reads("DATA 3 ab")
	client.sends("DATA 3 end c")
	second.reads("DATA 3 end c")
	second.sends("HEADERS 3 end :status=200")
	client.reads("HEADERS 3 end :status=200")
	first.sends("HEADERS 1 end :status=200")
	client.reads("HEADERS 1 end :status=200")
	first.reads("the end")
	for i := range 2 {
		if got := r.records.await(t, i); got.reason != flow.Completed || got.status != 200 {
			t.Errorf("record %d is %+v", i, got)
		}
	}
}

func TestAHubRetriesAtAnotherEndpoint(t *testing.T) {
	var failures atomic.Int32
	bad := serveHTTP2(t, func(w http.ResponseWriter, r *http.Request) {
		failures.Add(1)
		io.Copy(io.Discard, r.Body)
		w.WriteHeader(503)
	})
	good := serveHTTP2(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%s %s", body, r.Header.Get("x-envoy-attempt-count"))
	})
	closed := netip.MustParseAddrPort("127.0.0.1:9")
	held := &leases{}
	plan := &route.Plan{CountAttempts: true, Retry: retrying(mesh.Retry5xx|mesh.RetryConnectFailure, 2)}
	r := newHub(t, bad, &planned{leases: held, decide: func(q *Request, d *Decision) {
		d.Plan = plan
		d.Target.Address = [...]netip.AddrPort{bad, closed, good}[q.Attempt]
	}})
	body := strings.Repeat("x", 100_000)
	response, err := http2Client(t).Post("http://"+r.address+"/", "text/plain", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(response.Body)
	response.Body.Close()
	if err != nil || string(got) != body+" 3" || failures.Load() != 1 {
		t.Errorf("%s: read %d bytes and %v after %d failures", response.Status, len(got), err, failures.Load())
	}
	if got := r.records.await(t, 0); got.status != 200 || got.attempts != 3 || got.flags != "" || got.received != 100_000 {
		t.Errorf("the record is %+v", got)
	}
	held.check(t, []Outcome{
		{Status: 503, GRPC: -1, Reason: flow.Completed, Connected: true},
		{GRPC: -1, Reason: flow.UpstreamRefused},
		{Status: 200, GRPC: -1, Reason: flow.Completed, Connected: true},
	})
}

// A response that is not forwarded is stopped, unless it has ended: on a closed stream no reset may be sent (RFC 9113 §5.1).
func TestAHubStopsResponsesThatItRetries(t *testing.T) {
	o := newOrigin(t)
	plan := &route.Plan{Retry: retrying(mesh.Retry5xx, 3)}
	r := newHub(t, o.address, &planned{decide: func(_ *Request, d *Decision) { d.Plan, d.Target.Address = plan, o.address }}, plain)
	client := greetHub(t, r, "")
	client.sends("POST 1")
	server := acceptHub(t, o, "")
	server.reads("POST 1")
	server.reads("SETTINGS ack")
	server.sends("HEADERS 1 end :status=503") // before the end of the request
	server.reads("RST 1 CANCEL")
	server.reads("POST 3")
	client.sends("DATA 1 end body")
	server.reads("DATA 3 end body")
	server.sends("HEADERS 3 :status=503")
	server.reads("RST 3 CANCEL")
	server.reads("POST 5")
	server.reads("DATA 5 end body")
	server.sends("HEADERS 5 end :status=503")
	server.reads("POST 7")
	server.reads("DATA 7 end body")
	server.sends("HEADERS 7 end :status=200")
	client.reads("HEADERS 1 end :status=200")
	if got := r.records.await(t, 0); got.status != 200 || got.attempts != 4 {
		t.Errorf("the record is %+v", got)
	}
}

// placed is a lease that counts the places of requests that are sent again.
type placed struct {
	Lease
	taken *atomic.Int32
	none  bool // there is no place
}

func (p placed) Retry() bool {
	if !p.none {
		p.taken.Add(1)
	}
	return !p.none
}

func (p placed) EndRetry() { p.taken.Add(-1) }

// A reply that is not taken, and the call with it, hold no place among the requests that are sent again.
func TestAReplyHoldsNoPlaceOfARetry(t *testing.T) {
	o := newOrigin(t)
	held, taken, decisions := &leases{}, new(atomic.Int32), new(atomic.Int32)
	plan := &route.Plan{Retry: retrying(mesh.Retry5xx, 2)}
	r := newHub(t, o.address, &planned{decide: func(_ *Request, d *Decision) {
		if decisions.Add(1) == 2 && taken.Load() != 1 {
			t.Errorf("another attempt has %d places", taken.Load())
		}
		d.Plan, d.Target.Address, d.Lease = plan, o.address, placed{held.open(), taken, false}
	}}, plain)
	client := greetHub(t, r, "4=0")
	client.sends("GET 1")
	for range 3 {
		server := acceptHub(t, o, "")
		server.reads("GET 1")
		server.conn.Close()
	}
	if got := client.next(); !strings.HasPrefix(got, "HEADERS 1 :status=503") {
		t.Fatalf("the client read %q", got)
	}
	if n := taken.Load(); n != 0 || r.records.count() != 0 {
		t.Errorf("a reply that is not taken holds %d places; %d records", n, r.records.count())
	}
	client.sends("WINDOW 1 1000")
	if got := client.next(); !strings.HasPrefix(got, "DATA 1 end upstream_connect_error") {
		t.Errorf("the client read %q", got)
	}
	if got := r.records.await(t, 0); got.attempts != 3 || taken.Load() != 0 {
		t.Errorf("the record is %+v, %d places", got, taken.Load())
	}
	held.check(t, nil)
}

// A cancelled call of gRPC is not reported as a failure of the server where there is no place for another attempt either.
func TestACancelledCallWithoutAPlaceForARetryIsCancelled(t *testing.T) {
	o := newOrigin(t)
	held, taken := &leases{}, new(atomic.Int32)
	plan := &route.Plan{Retry: retrying(mesh.Retry5xx, 2)}
	r := newHub(t, o.address, &planned{decide: func(_ *Request, d *Decision) {
		d.Plan, d.Target.Address, d.Lease = plan, o.address, placed{held.open(), taken, true}
	}}, plain)
	client := greetHub(t, r, "")
	client.sends("HEADERS 1 end :method=POST :scheme=http :authority=a :path=/ content-type=application/grpc te=trailers")
	server := acceptHub(t, o, "")
	if got := server.next(); !strings.HasPrefix(got, "HEADERS 1 end") {
		t.Fatalf("the server read %q", got)
	}
	server.reads("SETTINGS ack")
	server.sends("RST 1 CANCEL")
	client.reads("RST 1 CANCEL")
	if got := r.records.await(t, 0); got.attempts != 1 || got.reason != flow.UpstreamReset {
		t.Errorf("the record is %+v", got)
	}
	held.check(t, nil)
}

// One that is cancelled at its last attempt is recorded as a failure after which no retry was left.
func TestACancelledCallWithoutARetryLeftIsCancelled(t *testing.T) {
	o := newOrigin(t)
	r := newHub(t, o.address, &planned{decide: func(_ *Request, d *Decision) {
		d.Plan, d.Target.Address = &route.Plan{Retry: retrying(mesh.Retry5xx, 1)}, o.address
	}}, plain)
	client := greetHub(t, r, "")
	client.sends("HEADERS 1 end :method=POST :scheme=http :authority=a :path=/ content-type=application/grpc te=trailers")
	server := acceptHub(t, o, "")
	server.next()
	server.reads("SETTINGS ack")
	server.sends("RST 1 CANCEL")
	if got := server.next(); !strings.HasPrefix(got, "HEADERS 3 end") {
		t.Fatalf("the server read %q", got)
	}
	server.sends("RST 3 CANCEL")
	client.reads("RST 1 CANCEL")
	if got := r.records.await(t, 0); got.attempts != 2 || got.flags != "URX,UR" {
		t.Errorf("the record is %+v", got)
	}
}

func TestTheLastAttemptOfAHubIsForwarded(t *testing.T) {
	origin := serveHTTP2(t, func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(503); io.WriteString(w, "sorry") })
	r := newHub(t, origin, &planned{decide: func(_ *Request, d *Decision) { d.Plan = &route.Plan{Retry: retrying(mesh.Retry5xx, 2)} }})
	response, err := http2Client(t).Get("http://" + r.address + "/")
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(response.Body)
	response.Body.Close()
	if err != nil || string(got) != "sorry" || response.StatusCode != 503 {
		t.Errorf("%s: read %q and %v", response.Status, got, err)
	}
	if got := r.records.await(t, 0); got.status != 503 || got.attempts != 3 || !strings.Contains(got.flags, "URX") {
		t.Errorf("the record is %+v", got)
	}
}

// A request whose attempts take too long is tried again, and then answered.
func TestTheTimesOfAHub(t *testing.T) {
	release := make(chan struct{})
	origin := serveHTTP2(t, func(w http.ResponseWriter, r *http.Request) { <-release })
	policy := retrying(mesh.RetryGatewayError, 1)
	policy.TryTimeout = 10 * time.Millisecond
	for _, c := range []struct {
		plan     *route.Plan
		flags    string
		attempts uint8
	}{{&route.Plan{Timeout: 10 * time.Millisecond}, "UT", 1}, {&route.Plan{Timeout: time.Minute, Retry: policy}, "UT,URX", 2}} {
		r := newHub(t, origin, &planned{decide: func(_ *Request, d *Decision) { d.Plan = c.plan }})
		response, err := http2Client(t).Get("http://" + r.address + "/")
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(response.Body)
		response.Body.Close()
		if err != nil || string(got) != "upstream request timeout" || response.StatusCode != 504 {
			t.Errorf("%s: read %q and %v", response.Status, got, err)
		}
		if got := r.records.await(t, 0); got.status != 504 || got.attempts != c.attempts || !strings.Contains(got.flags, "UT") {
			t.Errorf("the record is %+v", got)
		}
	}
	close(release)
}

// Replies are delayed, and have their bodies, over the windows of downstream.
func TestAHubReplies(t *testing.T) {
	text := strings.Repeat("long ", 50_000)
	reply := &route.Reply{Status: 200, Body: text, Reason: flow.Completed, Details: "direct_response", Fields: []route.Field{{Name: "content-type", Value: "text/plain"}}}
	o := newOrigin(t)
	r := newHub(t, o.address, &planned{decide: func(_ *Request, d *Decision) {
		d.Target, d.Reply, d.Delay = upstream.Target{}, reply, 20*time.Millisecond
	}})
	began := time.Now()
	response, err := http2Client(t).Get("http://" + r.address + "/")
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(response.Body)
	response.Body.Close()
	if err != nil || string(got) != text || response.ContentLength != int64(len(text)) || time.Since(began) < 20*time.Millisecond {
		t.Errorf("%s: read %d bytes and %v after %v", response.Status, len(got), err, time.Since(began))
	}
	if got := r.records.await(t, 0); got.status != 200 || got.sent != uint64(len(text)) || got.details != "direct_response" {
		t.Errorf("the record is %+v", got)
	}
}

func TestAHubMirrors(t *testing.T) {
	copied := make(chan string, 1)
	mirror := serveHTTP2(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		copied <- fmt.Sprintf("%s %s %s %s", r.Method, r.Host, r.URL, body)
	})
	origin := serveHTTP2(t, func(w http.ResponseWriter, r *http.Request) { io.Copy(io.Discard, r.Body) })
	held := &leases{}
	r := newHub(t, origin, &planned{leases: held, decide: func(_ *Request, d *Decision) {
		d.Mirrors = []Mirror{{Target: upstream.Target{Address: mirror}, Policy: &mesh.Mirror{}, Lease: held.open()}}
	}})
	response, err := http2Client(t).Post("http://"+r.address+"/a", "text/plain", strings.NewReader("hello"))
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	host := strings.Replace(r.address, ":", "-shadow:", 1)
	select {
	case got := <-copied:
		if want := "POST " + host + " /a hello"; got != want {
			t.Errorf("copied %q, want %q", got, want)
		}
	case <-time.After(nettest.Patience):
		t.Error("no copy")
	}
	held.check(t, nil)
}

// A drain announces the end, serves what comes meanwhile, and ends after the last stream.
func TestAHubDrains(t *testing.T) {
	o := newOrigin(t)
	r := newHub(t, o.address, toOrigin(o), plain)
	client := greetHub(t, r, "")
	client.sends("GET 1")
	server := acceptHub(t, o, "")
	server.reads("GET 1")
	server.reads("SETTINGS ack")
	r.engine.Drain()
	r.poller.WakeAll()
	client.reads("GOAWAY 2147483647 NO_ERROR")
	client.sends("GET 3")
	server.reads("GET 3")
	client.reads("GOAWAY 3 NO_ERROR")
	client.sends("GET 5")
	client.reads("RST 5 REFUSED_STREAM")
	server.sends("HEADERS 1 end :status=200")
	server.sends("HEADERS 3 end :status=200")
	client.reads("HEADERS 1 end :status=200")
	client.reads("HEADERS 3 end :status=200")
	client.reads("the end")
}

// An upstream that cannot be reached, does not speak HTTP/2, or ends, fails its requests and no others.
func TestAHubOutlivesItsUpstreams(t *testing.T) {
	good := serveHTTP2(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "good") })
	other := newOrigin(t)
	var served sync.WaitGroup
	defer served.Wait()
	for _, answer := range []string{"HTTP/1.1 400 Bad Request\r\n\r\n", ""} {
		served.Go(func() {
			conn := other.accept()
			io.ReadFull(conn, make([]byte, 24))
			io.WriteString(conn, answer)
			conn.Close()
		})
	}
	r := newHub(t, good, &planned{decide: func(q *Request, d *Decision) {
		switch string(q.Path) {
		case "/refused":
			d.Target.Address = netip.MustParseAddrPort("127.0.0.1:9")
		case "/other":
			d.Target.Address = other.address
		}
	}})
	client := http2Client(t)
	for i, c := range []struct {
		path   string
		status int
	}{{"/", 200}, {"/refused", 503}, {"/", 200}, {"/other", 0}, {"/other", 0}, {"/", 200}} {
		response, err := client.Get("http://" + r.address + c.path)
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		if c.status != 0 && response.StatusCode != c.status || c.status == 0 && response.StatusCode/100 != 5 {
			t.Errorf("%s: %s", c.path, response.Status)
		}
		if got := r.records.await(t, i); got.status != response.StatusCode {
			t.Errorf("the record is %+v", got)
		}
	}
}

// Peers that exceed a window, or break the rules otherwise, are stopped.
func TestAHubStopsBreachesOfTheRules(t *testing.T) {
	for name, c := range map[string]struct{ sends, want string }{
		"idle stream":            {"DATA 5 a", "GOAWAY 0 PROTOCOL_ERROR"},
		"even stream":            {"HEADERS 2 end " + getFields, "GOAWAY 0 PROTOCOL_ERROR"},
		"window of zero":         {"WINDOW 0 0", "GOAWAY 0 PROTOCOL_ERROR"},
		"window too large":       {"WINDOW 0 2147483647", "GOAWAY 0 FLOW_CONTROL_ERROR"},
		"continuation of naught": {"RAW 00000009040000000100", "GOAWAY 0 PROTOCOL_ERROR"},
		"frame too large":        {"RAW 004001000000000001", "GOAWAY 0 FRAME_SIZE_ERROR"},
		"malformed request":      {"HEADERS 1 end :method=GET", "RST 1 PROTOCOL_ERROR"},
		"extended CONNECT":       {"HEADERS 1 :method=CONNECT :protocol=websocket :scheme=http :path=/ :authority=a", "RST 1 PROTOCOL_ERROR"},
	} {
		t.Run(name, func(t *testing.T) {
			o := newOrigin(t)
			r := newHub(t, o.address, toOrigin(o), plain)
			client := greetHub(t, r, "")
			client.sends(c.sends)
			client.reads(c.want)
			if got := r.records.await(t, 0); got.reason != flow.BadFraming {
				t.Errorf("the record is %+v", got)
			}
		})
	}
}

// Floods end the connection.
func TestAHubEndsFloods(t *testing.T) {
	for name, frame := range map[string]string{"pings": "PING 12345678", "settings": "SETTINGS", "priorities": "PRIORITY 1"} {
		t.Run(name, func(t *testing.T) {
			o := newOrigin(t)
			r := newHub(t, o.address, toOrigin(o), plain)
			client := greetHub(t, r, "")
			go func() {
				for range 10 * idleBurst {
					if client.write(strings.Fields(frame)) != nil {
						return
					}
				}
			}()
			if got := r.records.await(t, 0); got.reason != flow.Overload {
				t.Errorf("the record is %+v", got)
			}
		})
	}
}

// A gRPC server that cancels a call at its deadline may be sooner than the client.
func TestAHubPassesOnThatACallWasCanceled(t *testing.T) {
	o := newOrigin(t)
	r := newHub(t, o.address, toOrigin(o), plain)
	client := greetHub(t, r, "")
	const call = ":method=POST :scheme=http :path=/ :authority=a content-type=application/grpc"
	client.sends("HEADERS 1 " + call)
	server := acceptHub(t, o, "")
	server.reads("HEADERS 1 " + call)
	server.reads("SETTINGS ack")
	server.sends("RST 1 CANCEL")
	client.reads("RST 1 CANCEL")
	if got := r.records.await(t, 0); got.reason != flow.UpstreamReset || got.flags != "UR" {
		t.Errorf("the record is %+v", got)
	}
}
