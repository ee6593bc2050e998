package outbound

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/serve/servetest"
)

// routed is a rig whose clients reach HTTP services at port 81 by routes.
type routed struct {
	*meshRig
	routes *mesh.Routes
}

// to is a route to clusters with equal weights.
func to(clusters ...string) mesh.Route {
	f := &mesh.Forward{NotFoundCode: http.StatusServiceUnavailable}
	for _, name := range clusters {
		f.Clusters = append(f.Clusters, mesh.WeightedCluster{Name: name, Weight: 1})
	}
	return mesh.Route{Name: "default", Match: anyPath, Forward: f}
}

var anyPath = mesh.RouteMatch{Kind: mesh.PathPrefix, Path: "/"}

// newRouted starts an agent with the routes of the host "web".
func newRouted(t *testing.T, routes ...mesh.Route) *routed {
	t.Helper()
	r := &routed{newMeshRig(t, idOfServer), &mesh.Routes{Name: "81", IgnorePort: true, Hosts: []mesh.VirtualHost{
		{Name: "web", Domains: []mesh.Domain{{Kind: mesh.DomainExact, Text: "web"}, {Kind: mesh.DomainExact, Text: nettest.Elsewhere4.String()}}, Routes: routes},
		{Name: "allow_any", Domains: []mesh.Domain{{Kind: mesh.DomainAny}}, Routes: []mesh.Route{to("PassthroughCluster")}},
	}}}
	r.push(func(e *mesh.Edit) {
		e.SetListener("0.0.0.0_81", &mesh.Listener{
			Name: "0.0.0.0_81", Direction: mesh.Outbound, Virtual: true,
			Addresses: []netip.AddrPort{netip.MustParseAddrPort("0.0.0.0:81")},
			Filters:   []mesh.ListenerFilter{{Kind: mesh.TLSInspector}, {Kind: mesh.HTTPInspector}},
			Default:   &mesh.FilterChain{HTTP: &mesh.HTTPManager{RouteName: "81"}},
		})
		e.SetRoutes("81", r.routes)
		e.SetCluster("PassthroughCluster", &mesh.Cluster{Name: "PassthroughCluster", Discovery: mesh.OriginalDestination, Breakers: unlimited})
	})
	return r
}

// push changes the configuration in force.
func (r *routed) push(change func(*mesh.Edit)) {
	edit := r.plane.InForce.Load().Edit()
	change(edit)
	snapshot, _ := edit.Snapshot()
	r.plane.InForce.Store(snapshot)
}

// cluster sets a cluster with endpoints at ports of the peer.
func (r *routed) cluster(name string, change func(*mesh.Cluster), ports ...uint16) {
	c := &mesh.Cluster{Name: name, Discovery: mesh.ByEDS, Assignment: name, Breakers: unlimited, Balancing: mesh.Balancing{Policy: mesh.RoundRobin}}
	if change != nil {
		change(c)
	}
	r.push(func(e *mesh.Edit) { e.SetCluster(name, c) })
	r.endpoints(name, ports...)
}

func (r *routed) endpoints(name string, ports ...uint16) {
	l := mesh.Locality{}
	for _, port := range ports {
		l.Endpoints = append(l.Endpoints, mesh.Endpoint{Address: r.At(port), Weight: 1})
	}
	r.push(func(e *mesh.Edit) {
		e.SetAssignment(name, &mesh.Assignment{Name: name, Localities: []mesh.Locality{l}})
	})
}

// serve starts a server that answers with its port.
func (r *routed) serve(t *testing.T, ports ...uint16) {
	t.Helper()
	for _, port := range ports {
		r.handle(t, port, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, port) })
	}
}

func (r *routed) handle(t *testing.T, port uint16, handler http.HandlerFunc) {
	t.Helper()
	listener := r.Peer.Listen(t, "tcp4", r.At(port).String())
	server := &http.Server{Handler: handler, Protocols: new(http.Protocols)}
	server.Protocols.SetHTTP1(true)
	server.Protocols.SetUnencryptedHTTP2(true)
	served := make(chan struct{})
	go func() {
		defer close(served)
		server.Serve(listener)
	}()
	t.Cleanup(func() { server.Close(); <-served })
}

// client is an HTTP/1 connection.
type client struct {
	net.Conn
	read *bufio.Reader
}

func (r *routed) client(t *testing.T) *client {
	t.Helper()
	conn := r.Dial(t, r.At(81))
	return &client{conn, bufio.NewReader(conn)}
}

// get sends a request and returns the status and the body.
func (c *client) get(t *testing.T, host string, lines ...string) (int, string) {
	t.Helper()
	status, body, _ := c.send(t, "GET", host, lines...)
	return status, body
}

func (c *client) send(t *testing.T, method, host string, lines ...string) (int, string, http.Header) {
	t.Helper()
	c.SetDeadline(time.Now().Add(nettest.Patience))
	servetest.Send(t, c, method+" / HTTP/1.1\r\nHost: "+host+"\r\n"+strings.Join(append(lines, "", ""), "\r\n"))
	response, err := http.ReadResponse(c.read, nil)
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response.StatusCode, string(body), response.Header
}

// The requests of one connection go to several endpoints of several clusters, by their weights.
func TestRequestsAreDividedByWeight(t *testing.T) {
	route := to("v1", "v2")
	route.Forward.Clusters[0].Weight = 3
	r := newRouted(t, route)
	r.serve(t, 82, 83, 84)
	r.cluster("v1", nil, 82, 83)
	r.cluster("v2", nil, 84)
	c, counts := r.client(t), map[string]int{}
	const n = 2000
	for range n {
		status, body := c.get(t, "web")
		if status != 200 {
			t.Fatalf("status %d", status)
		}
		counts[body]++
		ended := r.Await(t)
		if want := map[string]string{"82": "v1", "83": "v1", "84": "v2"}[body]; ended.Cluster != want || ended.Route != "default" || fmt.Sprint(ended.Upstream.Port()) != body {
			t.Fatalf("the record of a request to %s: cluster %q, route %q, upstream %v", body, ended.Cluster, ended.Route, ended.Upstream)
		}
	}
	for body, want := range map[string]float64{"82": 3. / 8, "83": 3. / 8, "84": 1. / 4} {
		if d := float64(counts[body]) - n*want; d*d > 36*n*want*(1-want) { // six standard deviations
			t.Errorf("%v: %s got %d, want %v", counts, body, counts[body], n*want)
		}
	}
}

// POST requests are not repeatable, and yet need no connection each: the peer sees two in all.
func TestEndpointsKeepTheirConnections(t *testing.T) {
	r := newRouted(t, to("v1"))
	opened := make(chan netip.AddrPort, 100)
	for _, port := range []uint16{82, 83} {
		r.handle(t, port, func(w http.ResponseWriter, q *http.Request) {
			opened <- netip.MustParseAddrPort(q.RemoteAddr)
		})
	}
	r.cluster("v1", nil, 82, 83)
	c, seen := r.client(t), map[netip.AddrPort]bool{}
	for range 20 {
		if status, _, _ := c.send(t, "POST", "web", "Content-Length: 0"); status != 200 {
			t.Fatalf("status %d", status)
		}
		seen[<-opened] = true
	}
	if len(seen) != 2 {
		t.Errorf("20 requests to two endpoints took %d connections", len(seen))
	}
}

// A connection serves as many requests as the cluster permits, also across clients. A push that changes other parts of the
// cluster keeps it.
func TestConnectionsServeAsManyRequestsAsTheClusterPermits(t *testing.T) {
	for requests, want := range map[uint32]int{1: 6, 2: 3, 0: 1} {
		r := newRouted(t, to("v1"))
		opened := make(chan string, 100)
		r.handle(t, 82, func(w http.ResponseWriter, q *http.Request) { opened <- q.RemoteAddr })
		seen := map[string]bool{}
		for i := range 3 {
			r.cluster("v1", func(c *mesh.Cluster) { c.HTTP.MaxRequests, c.Balancing.MinRing = requests, uint64(i) }, 82)
			c := r.client(t)
			for range 2 {
				if status, _ := c.get(t, "web"); status != 200 {
					t.Fatalf("status %d", status)
				}
				seen[<-opened] = true
			}
			c.Close()
			r.AwaitListed(t, 0) // the upstream connection is in the pool, unless it has served enough
		}
		if len(seen) != want {
			t.Errorf("with %d requests for each, 6 requests took %d connections, want %d", requests, len(seen), want)
		}
	}
}

// The fields in which a request asks for retries and timeouts count here, and go no further.
func TestARequestAsksForItsRetries(t *testing.T) {
	r := newRouted(t, to("v1"))
	received := make(chan http.Header, 100)
	r.handle(t, 82, func(w http.ResponseWriter, q *http.Request) {
		received <- q.Header
		w.WriteHeader(503)
	})
	r.cluster("v1", nil, 82)
	for _, test := range []struct {
		lines    []string
		attempts int
		flags    string
	}{
		{nil, 1, ""},
		{[]string{"x-envoy-retry-on: 5xx"}, 2, "URX"},
		{[]string{"X-Envoy-Retry-On: gateway-error", "x-envoy-max-retries: 2"}, 3, "URX"},
		{[]string{"x-envoy-retry-on: retriable-status-codes", "x-envoy-retriable-status-codes: 503"}, 2, "URX"},
		{[]string{"x-envoy-max-retries: 2"}, 1, ""},
	} {
		lines := append(test.lines, "x-envoy-upstream-rq-timeout-ms: 60000", "x-envoy-upstream-rq-per-try-timeout-ms: 30000",
			"x-envoy-upstream-stream-duration-ms: 60000", "x-envoy-hedge-on-per-try-timeout: true", "x-envoy-upstream-rq-timeout-alt-response: 1")
		if status, _ := r.client(t).get(t, "web", lines...); status != 503 {
			t.Errorf("%q: status %d", test.lines, status)
		}
		ended := r.Await(t)
		if int(ended.Attempts) != test.attempts || ended.Flags != test.flags {
			t.Errorf("%q: %d attempts, flags %q", test.lines, ended.Attempts, ended.Flags)
		}
		for range test.attempts {
			for name := range <-received {
				if strings.HasPrefix(name, "X-Envoy-") && name != "X-Envoy-Attempt-Count" && name != "X-Envoy-Expected-Rq-Timeout-Ms" {
					t.Errorf("%q: the server received %s", test.lines, name)
				}
			}
		}
	}
}

func TestRequestsAreRoutedByHeader(t *testing.T) {
	jason := to("v2")
	jason.Name = "jason"
	jason.Match.Headers = []mesh.HeaderMatcher{{Name: "end-user", Kind: mesh.HeaderText, Text: mesh.StringMatcher{Text: "jason"}}}
	r := newRouted(t, jason, to("v1"))
	r.serve(t, 82, 83)
	r.cluster("v1", nil, 82)
	r.cluster("v2", nil, 83)
	c := r.client(t)
	for range 3 {
		if _, body := c.get(t, "web", "end-user: jason"); body != "83" {
			t.Errorf("jason reached %s", body)
		}
		if ended := r.Await(t); ended.Route != "jason" || ended.Cluster != "v2" {
			t.Errorf("the record has route %q and cluster %q", ended.Route, ended.Cluster)
		}
		if _, body := c.get(t, "web"); body != "82" {
			t.Errorf("another reached %s", body)
		}
		r.Await(t)
	}
}

// Requests to hosts without a route go to the original destination, or are answered if the mesh has no other traffic.
func TestOtherHosts(t *testing.T) {
	r := newRouted(t, to("v1"))
	r.serve(t, 81, 82)
	r.cluster("v1", nil, 82)
	if status, body := r.client(t).get(t, "elsewhere"); status != 200 || body != "81" {
		t.Errorf("%d from %s", status, body)
	}
	if ended := r.Await(t); ended.Cluster != "PassthroughCluster" {
		t.Errorf("the cluster is %q", ended.Cluster)
	}
	blocked := r.routes.Hosts[1]
	blocked.Routes = []mesh.Route{{Name: "block_all", Match: anyPath, Respond: &mesh.Response{Status: 502}}}
	closed := &mesh.Routes{Name: "81", Hosts: []mesh.VirtualHost{r.routes.Hosts[0], blocked}}
	r.push(func(e *mesh.Edit) { e.SetRoutes("81", closed) })
	c := r.client(t)
	if status, _ := c.get(t, "elsewhere"); status != 502 {
		t.Errorf("status %d", status)
	}
	if status, body := c.get(t, "web"); status != 200 || body != "82" { // on the same connection
		t.Errorf("%d from %s", status, body)
	}
}

// An open connection follows pushes with its next request, and stays open when its endpoint goes.
func TestAnOpenConnectionFollowsPushes(t *testing.T) {
	r := newRouted(t, to("v1"))
	r.serve(t, 82, 83)
	r.cluster("v1", nil, 82)
	c := r.client(t)
	for i := range 10 {
		port := uint16(82 + i%2)
		r.endpoints("v1", port)
		if status, body := c.get(t, "web"); status != 200 || body != fmt.Sprint(port) {
			t.Fatalf("request %d: %d from %s, want %d", i, status, body, port)
		}
	}
}

func TestRequestsWithoutAnEndpointAreAnswered(t *testing.T) {
	r := newRouted(t, to("v1"))
	release, arrived := make(chan struct{}), make(chan struct{}, 10)
	r.handle(t, 82, func(http.ResponseWriter, *http.Request) { arrived <- struct{}{}; <-release })
	check := func(t *testing.T, flags, body string) http.Header {
		t.Helper()
		c := r.client(t)
		status, got, header := c.send(t, "GET", "web")
		if ended := r.Await(t); status != 503 || got != body || ended.Flags != flags {
			t.Errorf("%d %q with the flags %q, want 503 %q with %q", status, got, ended.Flags, body, flags)
		}
		return header
	}
	t.Run("no such cluster", func(t *testing.T) { check(t, "NC", "") })
	r.cluster("v1", nil)
	t.Run("no endpoint", func(t *testing.T) { check(t, "UH", "no healthy upstream") })
	r.cluster("v1", func(c *mesh.Cluster) { c.Breakers.Requests = 1 }, 82)
	t.Run("overflow", func(t *testing.T) {
		first := r.client(t)
		servetest.Send(t, first, "GET / HTTP/1.1\r\nHost: web\r\n\r\n")
		<-arrived
		header := check(t, "UO", "upstream connect error or disconnect/reset before headers. reset reason: overflow")
		if header.Get("x-envoy-overloaded") != "true" {
			t.Errorf("the fields are %v", header)
		}
		close(release)
		if response, err := http.ReadResponse(first.read, nil); err != nil || response.StatusCode != 200 {
			t.Errorf("%v, %v", response, err)
		}
	})
}

// A host that fails is ejected, and retries reach another one.
func TestAFailingHostIsEjected(t *testing.T) {
	route := to("v1")
	route.Forward.Retry = &mesh.RetryPolicy{On: mesh.Retry5xx, Retries: 2, OtherHosts: true}
	r := newRouted(t, route)
	failures := 0
	r.handle(t, 82, func(w http.ResponseWriter, _ *http.Request) { failures++; w.WriteHeader(500) })
	r.serve(t, 83)
	r.cluster("v1", func(c *mesh.Cluster) {
		c.Outliers = &mesh.Outliers{Consecutive5xx: 3, Interval: time.Minute, Ejection: time.Minute, MaxPercent: 100}
	}, 82, 83)
	c := r.client(t)
	for range 50 {
		if status, body := c.get(t, "web"); status != 200 || body != "83" {
			t.Fatalf("%d %s", status, body)
		}
	}
	if failures != 3 {
		t.Errorf("the failing host got %d requests, want 3", failures)
	}
}

// The streams of one HTTP/2 connection are balanced one by one.
func TestTheStreamsOfAnHTTP2ConnectionAreBalanced(t *testing.T) {
	r := newRouted(t, to("v1"))
	r.serve(t, 82, 83)
	r.cluster("v1", nil, 82, 83)
	client := r.twoClient(t)
	served := make(map[uint16]int)
	for range 40 {
		response, err := client.Get("http://web/")
		if err != nil || response.StatusCode != 200 {
			t.Fatalf("%v, %v", response, err)
		}
		response.Body.Close()
		ended := r.Await(t)
		if served[ended.Upstream.Port()]++; ended.Cluster != "v1" || ended.Protocol != flow.HTTP2 {
			t.Errorf("the record is %+v", ended)
		}
	}
	if len(served) != 2 || served[82] == 0 || served[83] == 0 {
		t.Errorf("the endpoints served %v", served)
	}
}

// A client of an HTTP listener may be silent for a while; nothing is dialled meanwhile. What is not HTTP is refused.
func TestASilentClientOfAnHTTPListener(t *testing.T) {
	r := newRouted(t, to("v1"))
	r.serve(t, 82)
	r.cluster("v1", nil, 82)
	c := r.client(t)
	r.AwaitListed(t, 1)
	if status, body := c.get(t, "web"); status != 200 || body != "82" {
		t.Errorf("%d %s", status, body)
	}
	r.Await(t)
	other := r.Dial(t, r.At(81))
	servetest.Send(t, other, "\x00opaque")
	if ended := r.Await(t); ended.Reason != flow.MeshRefused {
		t.Errorf("the reason is %v", ended.Reason)
	}
}

// A connection of bytes ends when it has been silent, or open, for as long as its filter chain permits.
func TestConnectionsOfBytesHaveTheLimitsOfTheirChain(t *testing.T) {
	for want, proxy := range map[flow.Reason]*mesh.TCPProxy{
		flow.IdleTimeout: {IdleTimeout: 100 * time.Millisecond, MaxDuration: time.Hour},
		flow.MaxDuration: {MaxDuration: 100 * time.Millisecond},
	} {
		r := newRouted(t)
		proxy.Clusters = []mesh.TCPCluster{{Name: "v1", Weight: 1}}
		r.cluster("v1", nil, 82)
		r.bytes(proxy)
		r.Listen(t, "82")
		io.WriteString(r.Dial(t, r.At(81)), "\x00opaque") // on a busy machine the time may be over before
		if ended := r.Await(t); ended.Reason != want {
			t.Errorf("the reason is %v, want %v", ended.Reason, want)
		}
	}
}

// bytes makes port 81 one of bytes.
func (r *routed) bytes(proxy *mesh.TCPProxy) {
	r.push(func(e *mesh.Edit) {
		e.SetListener("0.0.0.0_81", &mesh.Listener{
			Name: "0.0.0.0_81", Direction: mesh.Outbound, Virtual: true,
			Addresses: []netip.AddrPort{netip.MustParseAddrPort("0.0.0.0:81")},
			Default:   &mesh.FilterChain{TCP: proxy},
		})
	})
}

// newChanging routes requests to v1, at port 82, and has the clusters to which the bytes of port 81 may go.
func newChanging(t *testing.T) *routed {
	t.Helper()
	r := newRouted(t, to("v1"))
	r.serve(t, 81, 82)
	r.cluster("v1", nil, 82)
	r.push(func(e *mesh.Edit) {
		e.SetCluster("BlackHoleCluster", &mesh.Cluster{Name: "BlackHoleCluster", Discovery: mesh.Static, Breakers: unlimited})
		e.SetCluster("secured", &mesh.Cluster{Name: "secured", Discovery: mesh.OriginalDestination, Breakers: unlimited, Transports: []mesh.Transport{
			{Name: "tls", TLS: &mesh.UpstreamTLS{Roots: "ROOTCA"}},
		}})
	})
	return r
}

// A connection whose port becomes one of bytes serves the requests that are on their way as before, and ends: at its original
// destination they would be without the TLS of their cluster, or where no connection may go. Where the bytes of new connections
// go there as they are, so do its requests.
func TestRequestsOfAPortThatBecomesOneOfBytes(t *testing.T) {
	r := newChanging(t)
	requests := r.plane.InForce.Load()
	for cluster, want := range map[string]string{"v1": "82", "secured": "82", "BlackHoleCluster": "82", "gone": "82", "PassthroughCluster": "81"} {
		r.plane.InForce.Store(requests)
		one, two := r.client(t), r.twoClient(t)
		get := func() (bodies [2]string) {
			_, bodies[0] = one.get(t, "web")
			if bodies[1] = bodies[0]; cluster != "v1" && want == "82" {
				return bodies // the client may open another connection by now
			}
			response, err := two.Get("http://web/")
			if err != nil {
				t.Fatal(err)
			}
			body, _ := io.ReadAll(response.Body)
			response.Body.Close()
			bodies[1] = string(body)
			return bodies
		}
		if got := get(); got != [2]string{"82", "82"} {
			t.Fatalf("before: %q", got)
		}
		r.bytes(&mesh.TCPProxy{Clusters: []mesh.TCPCluster{{Name: cluster, Weight: 1}}})
		if got := get(); got != [2]string{want, want} {
			t.Errorf("%s: %q, want %s", cluster, got, want)
		}
		if want == "82" {
			if _, err := one.read.ReadByte(); err != io.EOF {
				t.Errorf("%s: the connection does not end: %v", cluster, err)
			}
		} else if _, got := one.get(t, "web"); got != want {
			t.Errorf("%s: then %q, want %s", cluster, got, want)
		}
	}
}

// A connection that goes to its original destination without routes does not do so when new ones may not any more.
func TestRequestsWithoutRoutesEndWithTheirPassage(t *testing.T) {
	r := newRouted(t, to("v1"))
	r.serve(t, 81, 82)
	r.cluster("v1", nil, 82)
	r.push(func(e *mesh.Edit) {
		e.SetCluster("BlackHoleCluster", &mesh.Cluster{Name: "BlackHoleCluster", Discovery: mesh.Static, Breakers: unlimited})
	})
	client := r.client(t)
	for _, step := range []struct{ cluster, want string }{{"", "82"}, {"PassthroughCluster", "81"}, {"BlackHoleCluster", ""}} {
		if step.cluster != "" {
			r.bytes(&mesh.TCPProxy{Clusters: []mesh.TCPCluster{{Name: step.cluster, Weight: 1}}})
		}
		if status, body := client.get(t, "web"); step.want == "" && status != 503 || step.want != "" && body != step.want {
			t.Fatalf("%q: status %d, %q", step.cluster, status, body)
		}
	}
	if _, err := client.read.ReadByte(); err != io.EOF {
		t.Errorf("the connection does not end: %v", err)
	}
}

// A connection of HTTP/2 whose port becomes one of bytes serves its requests by its last routes, and without any as the bytes of new
// connections: where these may not go, requests are refused. Then it ends in order, with the last request that is served.
func TestHTTP2OfAPortThatBecomesOneOfBytes(t *testing.T) {
	type step struct{ cluster, want string }
	for name, steps := range map[string][]step{
		"with routes":    {{"", "200 82"}, {"secured", "200 82"}},
		"without routes": {{"", "200 82"}, {"PassthroughCluster", "200 81"}, {"BlackHoleCluster", "503 "}},
	} {
		t.Run(name, func(t *testing.T) {
			r := newChanging(t)
			conn := r.Dial(t, r.At(81))
			conn.SetDeadline(time.Now().Add(nettest.Patience))
			servetest.Send(t, conn, http2.ClientPreface)
			framer := http2.NewFramer(conn, conn)
			framer.ReadMetaHeaders = hpack.NewDecoder(4<<10, nil)
			var block bytes.Buffer
			encoder := hpack.NewEncoder(&block)
			framer.WriteSettings()
			var farewells []string
			// next returns what comes on a stream until its end; on stream zero, until that of the connection.
			next := func(stream uint32) (got string) {
				for {
					frame, err := framer.ReadFrame()
					if stream == 0 && err == io.EOF {
						return "the end"
					}
					if err != nil {
						t.Fatal(err)
					}
					switch f := frame.(type) {
					case *http2.MetaHeadersFrame:
						got = f.PseudoValue("status") + " "
					case *http2.DataFrame:
						got += string(f.Data())
					case *http2.GoAwayFrame:
						farewells = append(farewells, fmt.Sprint(f.LastStreamID, " ", f.ErrCode))
					case *http2.RSTStreamFrame:
						t.Fatal(f)
					}
					if h := frame.Header(); stream != 0 && h.StreamID == stream && h.Flags.Has(http2.FlagDataEndStream) {
						return got
					}
				}
			}
			stream := uint32(1)
			for _, step := range steps {
				if step.cluster != "" {
					r.bytes(&mesh.TCPProxy{Clusters: []mesh.TCPCluster{{Name: step.cluster, Weight: 1}}})
				}
				block.Reset()
				for _, field := range []string{":method=GET", ":scheme=http", ":path=/", ":authority=web"} {
					name, value, _ := strings.Cut(field, "=")
					encoder.WriteField(hpack.HeaderField{Name: name, Value: value})
				}
				framer.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: block.Bytes(), EndStream: true, EndHeaders: true})
				if got := next(stream); got != step.want && !(step.want == "503 " && strings.HasPrefix(got, step.want)) {
					t.Fatalf("%q: read %q, want %q", step.cluster, got, step.want)
				}
				stream += 2
			}
			next(0)
			if want := []string{"2147483647 NO_ERROR", fmt.Sprint(stream-2, " NO_ERROR")}; !slices.Equal(farewells, want) {
				t.Errorf("the connection ends with %q, want %q", farewells, want)
			}
		})
	}
}

func TestConnectionsOfBytesAreDividedByWeight(t *testing.T) {
	r := newRouted(t, to("v1"))
	r.cluster("v1", nil, 82)
	r.cluster("v2", func(c *mesh.Cluster) { c.Breakers.Connections = 1 }, 83)
	r.bytes(&mesh.TCPProxy{Clusters: []mesh.TCPCluster{{Name: "v1", Weight: 1}, {Name: "v2", Weight: 1}, {Name: "gone", Weight: 0}}})
	first, second := r.Listen(t, "82"), r.Listen(t, "83")
	refused := 0
	for n := [2]int{}; n[0] < 5 || n[1] < 1 || refused < 1; {
		client := r.Dial(t, r.At(81))
		servetest.Send(t, client, "\x00opaque")
		select {
		case conn := <-first:
			servetest.Expect(t, conn, "\x00opaque")
			n[0]++
		case conn := <-second:
			servetest.Expect(t, conn, "\x00opaque")
			n[1]++
		case ended := <-r.Records():
			if ended.Reason != flow.UpstreamOverflow || ended.Cluster != "v2" || ended.Flags != "UO" || n[1] != 1 {
				t.Fatalf("%+v", ended)
			}
			refused++
		}
	}
}

// A refused connection of TLS is recorded with the server name that the client asked for.
func TestARefusedConnectionOfTLSHasItsServerName(t *testing.T) {
	r := newRouted(t, to("v1"))
	r.bytes(&mesh.TCPProxy{Clusters: []mesh.TCPCluster{{Name: "gone", Weight: 1}}})
	client := tls.Client(r.Dial(t, r.At(81)), &tls.Config{ServerName: "web.shop"})
	if err := client.Handshake(); err == nil {
		t.Error("the handshake succeeds")
	}
	if ended := r.Await(t); ended.Reason != flow.MeshRefused || ended.Protocol != flow.TLS || ended.ServerName != "web.shop" {
		t.Errorf("%v %v %q", ended.Reason, ended.Protocol, ended.ServerName)
	}
}

// twoClient is a client of HTTP/2 with one connection to port 81.
func (r *routed) twoClient(t *testing.T) *http.Client {
	transport := &http.Transport{Protocols: new(http.Protocols)}
	transport.Protocols.SetUnencryptedHTTP2(true)
	transport.DialContext = func(context.Context, string, string) (net.Conn, error) { return r.TryDial(r.At(81)) }
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: nettest.Patience}
}

// A request goes to the endpoint in the version of HTTP that its cluster asks for. gRPC needs HTTP/2.
func TestRequestsAreSentInTheProtocolOfTheirCluster(t *testing.T) {
	for protocol, want := range map[mesh.UpstreamProtocol][3]string{
		mesh.UpstreamHTTP1: {"1", "1", "2"}, mesh.UpstreamHTTP2: {"2", "2", "2"}, mesh.UpstreamAsDownstream: {"1", "2", "2"},
	} {
		r := newRouted(t, to("v1"))
		r.handle(t, 82, func(w http.ResponseWriter, q *http.Request) { fmt.Fprint(w, q.ProtoMajor) })
		r.cluster("v1", func(c *mesh.Cluster) { c.HTTP.Protocol = protocol }, 82)
		var got [3]string
		_, got[0] = r.client(t).get(t, "web")
		client := r.twoClient(t)
		for i, kind := range []string{"text/plain", "application/grpc"} {
			response, err := client.Post("http://web/", kind, strings.NewReader("x"))
			if err != nil {
				t.Fatal(err)
			}
			body, _ := io.ReadAll(response.Body)
			response.Body.Close()
			got[1+i] = string(body)
		}
		if got != want {
			t.Errorf("protocol %v: a client of HTTP/1, one of HTTP/2 and gRPC reach HTTP/%v, want %v", protocol, got, want)
		}
	}
}

// An upstream connection of HTTP/2 serves as many streams as the cluster permits, and for as long.
func TestHTTP2ConnectionsHaveTheLimitsOfTheirCluster(t *testing.T) {
	for name, c := range map[string]struct {
		limit func(*mesh.Cluster)
		want  int
	}{
		"requests": {func(c *mesh.Cluster) { c.HTTP.MaxRequests = 2 }, 3},
		"lifetime": {func(c *mesh.Cluster) { c.HTTP.MaxLifetime = 1 }, 6},
		"none":     {nil, 1},
	} {
		for protocol := range map[mesh.UpstreamProtocol]bool{mesh.UpstreamHTTP1: true, mesh.UpstreamHTTP2: true} {
			r := newRouted(t, to("v1"))
			seen := map[string]bool{}
			r.handle(t, 82, func(w http.ResponseWriter, q *http.Request) { seen[q.RemoteAddr] = true })
			r.cluster("v1", func(config *mesh.Cluster) {
				if config.HTTP.Protocol = protocol; c.limit != nil {
					c.limit(config)
				}
			}, 82)
			client := r.twoClient(t)
			for range 6 {
				response, err := client.Get("http://web/")
				if err != nil || response.StatusCode != 200 {
					t.Fatalf("%v, %v", response, err)
				}
				response.Body.Close()
				r.Await(t)
			}
			if len(seen) != c.want {
				t.Errorf("%s, protocol %v: 6 requests took %d connections, want %d", name, protocol, len(seen), c.want)
			}
		}
	}
}

// A request does not wait for the names of hosts that get a copy of it.
func TestARequestDoesNotWaitForTheNamesOfItsMirror(t *testing.T) {
	for _, two := range []bool{false, true} {
		route := to("v1")
		route.Forward.Mirrors = []mesh.Mirror{{Cluster: "mirror", Fraction: mesh.Fraction{Numerator: 1, Denominator: 1}}}
		r := newRouted(t, route)
		asked, answered := make(chan bool, 100), make(chan bool)
		r.lookup = func(ctx context.Context, _ string, _ mesh.DNSFamily) ([]netip.Addr, time.Duration, error) {
			ctx, cancel := context.WithTimeout(ctx, 4*time.Second) // a request that waits does so for 5 s
			defer cancel()
			asked <- true
			select {
			case <-answered:
			case <-ctx.Done():
				t.Errorf("HTTP/2 %v: the request waits", two)
			}
			return nil, 0, errors.New("no such host")
		}
		r.serve(t, 82)
		r.cluster("v1", nil, 82)
		r.cluster("mirror", func(c *mesh.Cluster) {
			c.Discovery, c.DNS = mesh.StrictDNS, mesh.DNS{Refresh: time.Hour}
			c.Hosts = &mesh.Assignment{Localities: []mesh.Locality{{Endpoints: []mesh.Endpoint{{Host: "mirror.test", Port: 83, Weight: 1}}}}}
		})
		if got, _ := r.asker(t, two).ask(t, "/"); got != "82" {
			t.Errorf("port %s", got)
		}
		<-asked
		close(answered)
	}
}

// Beyond the cluster's limit of retries, the client gets what the attempt before has had, as by Envoy. Places are given back.
func TestARetryBeyondTheLimitIsNotMade(t *testing.T) {
	for _, two := range []bool{false, true} {
		route := to("v1")
		route.Forward.Retry = &mesh.RetryPolicy{On: mesh.Retry5xx | mesh.Retry4xx, Retries: 2}
		r := newRouted(t, route)
		arrived, release := make(chan bool, 10), make(chan bool)
		r.handle(t, 82, func(w http.ResponseWriter, q *http.Request) {
			switch attempt := q.Header.Get("x-envoy-attempt-count"); {
			case q.URL.Path == "/again" && attempt == "2":
				arrived <- true
				<-release
			case q.URL.Path == "/long" && attempt == "2":
				w.(http.Flusher).Flush()
				arrived <- true
				<-release
			case q.URL.Path == "/again", q.URL.Path == "/long":
				w.WriteHeader(503)
			default:
				w.WriteHeader(409)
				io.WriteString(w, "conflict")
			}
		})
		r.routes.Hosts[0].CountAttempts = true
		r.cluster("v1", func(c *mesh.Cluster) { c.Breakers.Retries = 1 }, 82)
		ask := func(path string) (int, string) {
			response, err := r.asker(t, two).Get("http://web" + path)
			if err != nil {
				t.Error(err)
				return 0, ""
			}
			defer response.Body.Close()
			body, _ := io.ReadAll(response.Body)
			return response.StatusCode, string(body)
		}
		for range 3 { // each gives its place back
			done := make(chan int, 1)
			go func() { status, _ := ask("/again"); done <- status }()
			<-arrived
			if status, body := ask("/other"); status != 409 || body != "conflict" {
				t.Errorf("HTTP/2 %v: %d %q beyond the limit", two, status, body)
			}
			if got := r.Await(t); got.Attempts != 1 || got.Flags != "UO" || got.Reason != flow.Completed {
				t.Errorf("HTTP/2 %v: the record beyond the limit is %+v", two, got)
			}
			release <- true
			if status := <-done; status != 200 {
				t.Errorf("HTTP/2 %v: %d within the limit", two, status)
			}
			if got := r.Await(t); got.Attempts != 2 || got.Flags != "" {
				t.Errorf("HTTP/2 %v: the record within the limit is %+v", two, got)
			}
		}
		done := make(chan int, 1)
		go func() { status, _ := ask("/long"); done <- status }()
		<-arrived // its response has begun
		nettest.Eventually(t, "the place of a response that has begun", func() bool { ask("/other"); return r.Await(t).Flags == "URX" })
		release <- true
		if status := <-done; status != 200 {
			t.Errorf("HTTP/2 %v: %d for a long response", two, status)
		}
		r.Await(t)
		r.cluster("v1", func(c *mesh.Cluster) { c.Breakers.Retries = 1 }, 9)
		for range 3 {
			if ask("/"); strings.Contains(r.Await(t).Flags, "UO") {
				t.Errorf("HTTP/2 %v: a request that got no response keeps its place", two)
			}
		}
		r.cluster("v1", func(c *mesh.Cluster) { c.Breakers.Retries = 0 }, 9)
		if status, body := ask("/"); status != 503 || !strings.Contains(body, "connection failure") {
			t.Errorf("HTTP/2 %v: %d %q for a connection that fails", two, status, body)
		}
		if got := r.Await(t); got.Flags != "UO,UF" && got.Flags != "UO,UF,URX" {
			t.Errorf("HTTP/2 %v: the flags are %s", two, got.Flags)
		}
	}
}

// A cluster may limit the streams of its connections of HTTP/2 to fewer than the server takes: further requests get connections of
// their own.
func TestAClusterLimitsTheStreamsOfAConnection(t *testing.T) {
	const requests = 4
	for limit, want := range map[uint32]int{0: 1, 1: requests, 2: requests / 2} {
		r := newRouted(t, to("v1"))
		together, arrived := make(chan struct{}), make(chan string, requests)
		r.handle(t, 82, func(_ http.ResponseWriter, q *http.Request) {
			if q.URL.Path != "/" {
				return
			}
			arrived <- q.RemoteAddr
			select {
			case <-together:
			case <-q.Context().Done():
			}
		})
		r.cluster("v1", func(c *mesh.Cluster) { c.HTTP.Protocol, c.HTTP.MaxStreams = mesh.UpstreamHTTP2, limit }, 82)
		client, ended := r.twoClient(t), make(chan error)
		get := func(path string) error {
			response, err := client.Get("http://web" + path)
			if err == nil {
				response.Body.Close()
			}
			return err
		}
		if err := get("/first"); err != nil { // the server's own limit is known
			t.Fatal(err)
		}
		r.Await(t)
		for range requests {
			go func() { ended <- get("/") }()
		}
		conns := map[string]bool{}
		for range requests {
			conns[<-arrived] = true
		}
		close(together)
		for range requests {
			if err := <-ended; err != nil {
				t.Error(err)
			}
			r.Await(t)
		}
		if len(conns) != want {
			t.Errorf("with a limit of %d, %d requests take %d connections, want %d", limit, requests, len(conns), want)
		}
	}
}
