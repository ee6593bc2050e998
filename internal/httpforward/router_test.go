package httpforward

import (
	"bufio"
	"bytes"
	"net/http"
	"net/netip"
	"reflect"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// byPath routes paths that begin with a prefix to other, and everything else to home.
type byPath struct {
	prefix      []byte
	other, home upstream.Target
}

func (p *byPath) Route(r *Request) Decision {
	if r.Connection == nil || len(r.Method) == 0 || len(r.Authority) == 0 {
		return Decision{} // the tests below fail: the request is not forwarded
	}
	if bytes.HasPrefix(r.Path, p.prefix) {
		return Decision{Target: p.other, Cluster: "other", Route: "by path"}
	}
	return Decision{Target: p.home, Cluster: "home", Route: "default"}
}

func newByPath(home, other *origin) *byPath {
	return &byPath{[]byte("/other"), upstream.Target{Address: other.address}, upstream.Target{Address: home.address}}
}

const getHome, getOther = "GET /home HTTP/1.1\r\nHost: a\r\n\r\n", "GET /other HTTP/1.1\r\nHost: a\r\n\r\n"

func TestEachRequestGoesToTheTargetThatTheRouterChose(t *testing.T) {
	for _, pipelined := range []bool{false, true} {
		home, other := newOrigin(t), newOrigin(t)
		r := newRig(t, home.address, false, plain)
		r.set(func() { r.router = newByPath(home, other) })
		client := r.dial(t)
		if pipelined {
			send(t, client, getHome+getOther+getOther+getHome)
		}
		step := func(request string) {
			if !pipelined {
				send(t, client, request)
			}
		}
		step(getHome)
		atHome := home.accept()
		expect(t, atHome, getHome)
		send(t, atHome, ok("home"))
		expect(t, client, ok("home"))
		step(getOther)
		atOther := other.accept()
		if idle := r.pool.Idle(); idle != 1 {
			t.Errorf("%d connections in the pool after a change of target, want the one to the first", idle)
		}
		for range 2 {
			expect(t, atOther, getOther)
			send(t, atOther, ok("other"))
			expect(t, client, ok("other"))
			if !pipelined {
				break
			}
		}
		step(getHome)
		expect(t, atHome, getHome) // on the connection that waited in the pool
		send(t, atHome, ok("again"))
		expect(t, client, ok("again"))
		if reused := r.pool.Stats.Reused.Load(); reused != 1 {
			t.Errorf("%d connections taken from the pool, want 1", reused)
		}
		for i, want := range []string{"/home", "/other"} {
			if got := r.records.await(t, i); got.path != want || got.reason != "completed" {
				t.Errorf("record %d: %+v, want %s", i, got, want)
			}
		}
	}
}

func TestAConnectionWithNTLMIsClosedWhenARequestGoesElsewhere(t *testing.T) {
	home, other := newOrigin(t), newOrigin(t)
	r := newRig(t, home.address, false, plain)
	r.set(func() { r.router = newByPath(home, other) })
	client := r.dial(t)
	bound := "GET /home HTTP/1.1\r\nHost: a\r\nAuthorization: NTLM abc\r\n\r\n"
	send(t, client, bound)
	atHome := home.accept()
	expect(t, atHome, bound)
	send(t, atHome, ok("home"))
	expect(t, client, ok("home"))
	send(t, client, getOther)
	atOther := other.accept()
	expect(t, atOther, getOther)
	send(t, atOther, ok("other"))
	expect(t, client, ok("other"))
	readsEnd(t, atHome, "the server with the authenticated connection")
	send(t, client, getHome)
	again := home.accept()
	expect(t, again, getHome)
	if idle := r.pool.Idle(); idle != 1 {
		t.Errorf("%d connections in the pool, want the one that was not authenticated", idle)
	}
}

func TestARequestIsSentAgainToTheTargetOfItsOwnDecision(t *testing.T) {
	home, other := newOrigin(t), newOrigin(t)
	r := newRig(t, home.address, false, plain)
	r.set(func() { r.router = newByPath(home, other) })
	client := r.dial(t)
	send(t, client, getOther)
	first := other.accept()
	expect(t, first, getOther)
	send(t, first, ok("1"))
	expect(t, client, ok("1"))
	send(t, client, getOther)
	expect(t, first, getOther)
	first.SetLinger(0)
	first.Close()
	second := other.accept()
	expect(t, second, getOther)
	send(t, second, ok("2"))
	expect(t, client, ok("2"))
}

func TestAnEarlyConnectionServesNoRequestForAnotherTarget(t *testing.T) {
	home, other := newOrigin(t), newOrigin(t)
	r := newRig(t, home.address, false, plain)
	r.set(func() { r.router = newByPath(home, other) })
	r.set(func() { r.early = true })
	client := r.dial(t)
	send(t, client, getOther)
	early, atOther := home.accept(), other.accept()
	expect(t, atOther, getOther)
	readsEnd(t, early, "the server of the early connection") // it has served nothing, so the pool does not take it
	send(t, atOther, ok("other"))
	expect(t, client, ok("other"))
}

func TestAnHTTP2RequestForAnotherUpstreamIsMisdirected(t *testing.T) {
	var served atomic.Int32
	home := serveHTTP2(t, func(w http.ResponseWriter, r *http.Request) {
		served.Add(1)
		if strings.HasPrefix(r.URL.Path, "/other") {
			t.Errorf("the connection's upstream received %s", r.URL.Path)
		}
	})
	other := newOrigin(t)
	r := newRig(t, home, true, plain)
	r.set(func() {
		r.router = &byPath{[]byte("/other"), upstream.Target{Address: other.address}, upstream.Target{Address: home}}
	})
	client := http2Client(t)
	for i, want := range []struct {
		path   string
		record recorded
	}{
		{"/home", recorded{cluster: "home", status: 200, details: "via_upstream", reason: flow.Completed}},
		{"/other", recorded{cluster: "other", status: 421, flags: "NR", details: "misdirected_request", reason: flow.UpstreamUnreachable}},
		{"/home", recorded{cluster: "home", status: 200, details: "via_upstream", reason: flow.Completed}},
	} {
		response, err := client.Post("http://"+r.address+want.path, "text/plain", strings.NewReader("hello"))
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		if response.StatusCode != want.record.status {
			t.Errorf("%s: status %d, want %d", want.path, response.StatusCode, want.record.status)
		}
		got := r.records.await(t, i)
		if got.path != want.path || got.status != want.record.status || got.flags != want.record.flags ||
			got.details != want.record.details || got.reason != want.record.reason || got.cluster != want.record.cluster {
			t.Errorf("%s: record %+v, want %+v", want.path, got, want.record)
		}
	}
	if n := served.Load(); n != 2 {
		t.Errorf("upstream served %d requests, want 2", n)
	}
}

// A connection that was authenticated cannot be replaced by another: the request has to fail, so that its client starts
// the authentication again.
func TestARequestOnAnAuthenticatedConnectionIsNotSentAgain(t *testing.T) {
	home := newOrigin(t)
	r := newRig(t, home.address, false, plain)
	client := r.dial(t)
	bound := "GET /home HTTP/1.1\r\nHost: a\r\nAuthorization: NTLM abc\r\n\r\n"
	send(t, client, bound)
	server := home.accept()
	expect(t, server, bound)
	send(t, server, ok("home"))
	expect(t, client, ok("home"))
	send(t, client, getHome)
	expect(t, server, getHome)
	server.Close()
	if got := r.records.await(t, 1); got.status != 503 || got.flags != "UC" || got.reason != flow.UpstreamClosed {
		t.Errorf("record %+v, want a 503 for a closed upstream", got)
	}
	if n := r.pool.Stats.Retried.Load(); n != 0 {
		t.Errorf("sent again %d times, want 0", n)
	}
}

// A decision without an upstream must not fall back to the connection's own target.
func TestARequestWithoutARouteIsNotForwarded(t *testing.T) {
	home := newOrigin(t)
	r := newRig(t, home.address, false, plain)
	r.set(func() { r.router = newByPath(home, &origin{}) })
	client := r.dial(t)
	reader := bufio.NewReader(client)
	for i := range 2 {
		send(t, client, getOther)
		if got := head(t, reader); !strings.HasPrefix(got, "HTTP/1.1 404 Not Found\r\n") {
			t.Errorf("the client received %q, want a 404", got)
		}
		want := recorded{status: 404, flags: "NR", details: "route_not_found", reason: flow.UpstreamUnreachable, cluster: "other"}
		if got := r.records.await(t, i); got.status != want.status || got.flags != want.flags ||
			got.details != want.details || got.reason != want.reason || got.cluster != want.cluster {
			t.Errorf("record %+v, want %+v", got, want)
		}
	}
	send(t, client, getHome) // on the same connection
	server := home.accept()
	expect(t, server, getHome)
	send(t, server, ok("home"))
	expect(t, reader, ok("home"))
	if got := r.records.await(t, 2); got.cluster != "home" || got.route != "default" {
		t.Errorf("record %+v, want the names of the decision", got)
	}
}

func TestAnHTTP2RequestWithoutARouteIsNotForwarded(t *testing.T) {
	home := serveHTTP2(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/home" {
			t.Errorf("upstream received %s", r.URL.Path)
		}
	})
	r := newRig(t, home, true, plain)
	r.set(func() { r.router = &byPath{[]byte("/other"), upstream.Target{}, upstream.Target{Address: home}} })
	client := http2Client(t)
	for i, want := range []struct {
		path, flags, details string
		status               int
	}{{"/other", "NR", "route_not_found", 404}, {"/home", "", "via_upstream", 200}} {
		response, err := client.Get("http://" + r.address + want.path)
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		if got := r.records.await(t, i); response.StatusCode != want.status || got.status != want.status ||
			got.flags != want.flags || got.details != want.details {
			t.Errorf("%s: status %d, record %+v, want %+v", want.path, response.StatusCode, got, want)
		}
	}
}

// Without a Router, the names of a request are those of its connection.
func TestARequestHasTheNamesOfItsConnection(t *testing.T) {
	record := flow.Record{Cluster: "PassthroughCluster", Route: "allow_any"}
	c := Connection{Record: &record, Target: upstream.Target{Address: netip.MustParseAddrPort("192.0.2.1:80")}}
	want := Decision{Target: c.Target, Cluster: "PassthroughCluster", Route: "allow_any"}
	if got := c.route(nil); !reflect.DeepEqual(got, want) {
		t.Errorf("the decision is %+v, want %+v", got, want)
	}
}
