package gateway

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/serve/servetest"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

func TestAnIncompleteConfigurationIsAnError(t *testing.T) {
	for _, config := range []Config{{}, {Mesh: &servetest.Configured{}}} {
		if proxy, err := New(config); err == nil || proxy != nil {
			t.Errorf("New(%+v) = %v, %v", config, proxy, err)
		}
	}
}

const (
	port = 8080
	name = "0.0.0.0_8080"
)

var unlimited = mesh.Breakers{Connections: 1 << 30, Pending: 1 << 30, Requests: 1 << 30, Retries: 1 << 30}

// rig is a gateway in a pod, with servers at other ports of the pod.
type rig struct {
	*servetest.Rig
	plane *servetest.Configured
}

func newRig(t *testing.T) *rig {
	t.Helper()
	r := &rig{plane: &servetest.Configured{}}
	snapshot, _ := (*mesh.Snapshot)(nil).Edit().Snapshot()
	r.plane.InForce.Store(snapshot)
	r.Rig = servetest.NewRig(t, servetest.Place{Port: port, New: func(t testing.TB, parts servetest.Parts) servetest.Role {
		proxy, err := New(Config{Poller: parts.Poller, Flows: parts.Flows, Settings: parts.Settings, HTTP: parts.HTTP, Mesh: r.plane, Rejudge: true})
		if err != nil {
			t.Fatal(err)
		}
		return proxy
	}}, servetest.Defaults())
	return r
}

// push changes the configuration in force.
func (r *rig) push(change func(*mesh.Edit)) {
	edit := r.plane.InForce.Load().Edit()
	change(edit)
	snapshot, _ := edit.Snapshot()
	r.plane.InForce.Store(snapshot)
	r.Wake()
}

// listen sets the listener.
func (r *rig) listen(chain *mesh.FilterChain) {
	r.push(func(e *mesh.Edit) {
		e.SetListener(name, &mesh.Listener{
			Name: name, Direction: mesh.Outbound, Addresses: []netip.AddrPort{netip.MustParseAddrPort("0.0.0.0:8080")},
			Default: chain,
		})
	})
}

// cluster sets a cluster with endpoints at ports of the pod.
func (r *rig) cluster(name string, ports ...uint16) {
	l := mesh.Locality{}
	for _, port := range ports {
		l.Endpoints = append(l.Endpoints, mesh.Endpoint{Address: r.At(port), Weight: 1})
	}
	r.push(func(e *mesh.Edit) {
		e.SetCluster(name, &mesh.Cluster{
			Name: name, Discovery: mesh.Static, Breakers: unlimited, Balancing: mesh.Balancing{Policy: mesh.RoundRobin},
			Hosts: &mesh.Assignment{Name: name, Localities: []mesh.Locality{l}},
		})
	})
}

// host is a virtual host whose requests go to a cluster.
func host(domain, cluster string) mesh.VirtualHost {
	return mesh.VirtualHost{
		Name: domain, Domains: []mesh.Domain{{Kind: mesh.DomainExact, Text: domain}},
		Routes: []mesh.Route{{Match: mesh.RouteMatch{Kind: mesh.PathPrefix, Path: "/"}, Forward: &mesh.Forward{
			Clusters: []mesh.WeightedCluster{{Name: cluster, Weight: 1}}, NotFoundCode: 503,
		}}},
	}
}

// route sets the routes of the listener.
func (r *rig) route(hosts ...mesh.VirtualHost) {
	r.push(func(e *mesh.Edit) {
		e.SetRoutes("http.8080", &mesh.Routes{Name: "http.8080", IgnorePort: true, Hosts: hosts})
	})
}

func manager() *mesh.FilterChain {
	return &mesh.FilterChain{HTTP: &mesh.HTTPManager{RouteName: "http.8080"}}
}

// serve starts a server that answers with its port.
func (r *rig) serve(t *testing.T, port uint16) {
	t.Helper()
	listener := r.Pod.Listen(t, "tcp4", r.At(port).String())
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, port) })}
	served := make(chan struct{})
	go func() {
		defer close(served)
		server.Serve(listener)
	}()
	t.Cleanup(func() { server.Close(); <-served })
}

// A client that leaves before its first byte has asked for nothing: its connection is closed in order, and not refused.
func TestAConnectionWithoutARequestIsNotRefused(t *testing.T) {
	r := newRig(t)
	r.listen(manager())
	for begin, want := range map[string]flow.Reason{"": flow.Closed, "\x00": flow.MeshRefused, "\r\n": flow.MeshRefused} {
		conn := r.Dial(t, r.At(port))
		servetest.Send(t, conn, begin)
		conn.CloseWrite()
		end := map[bool]error{true: io.EOF, false: syscall.ECONNRESET}[want == flow.Closed]
		servetest.ExpectEnd(t, conn, end)
		if got := r.Await(t); got.Reason != want || (got.Err == nil) != (want == flow.Closed) {
			t.Errorf("%q: %v, %v", begin, got.Reason, got.Err)
		}
	}
}

// client is an HTTP/1 connection.
type client struct {
	net.Conn
	read *bufio.Reader
}

func (r *rig) client(t *testing.T) *client {
	t.Helper()
	conn := r.Dial(t, r.At(port))
	return &client{conn, bufio.NewReader(conn)}
}

func (c *client) get(t *testing.T, host string) (*http.Response, string) {
	t.Helper()
	c.SetDeadline(time.Now().Add(nettest.Patience))
	servetest.Send(t, c, "GET /path?q HTTP/1.1\r\nHost: "+host+"\r\n\r\n")
	response, err := http.ReadResponse(c.read, nil)
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response, string(body)
}

// Each request goes to the cluster of its host; the port in the host does not matter. Other hosts have no route.
func TestRequestsAreRoutedByHost(t *testing.T) {
	r := newRig(t)
	r.serve(t, 9001)
	r.serve(t, 9002)
	r.cluster("outbound|80||one", 9001)
	r.cluster("outbound|80||two", 9002)
	secure := host("secure.example", "outbound|80||one")
	secure.RequireTLS = mesh.TLSRequired
	r.route(host("one.example", "outbound|80||one"), host("two.example", "outbound|80||two"), secure)
	r.listen(manager())
	c := r.client(t)
	for _, test := range []struct {
		host, body, cluster, location string
		status                        int
	}{
		{"one.example", "9001", "outbound|80||one", "", 200},
		{"two.example:30293", "9002", "outbound|80||two", "", 200},
		{"ONE.example:80", "9001", "outbound|80||one", "", 200},
		{"other.example", "", "", "", 404},
		{"secure.example:8080", "", "", "https://secure.example:8080/path?q", 301},
	} {
		response, body := c.get(t, test.host)
		if response.StatusCode != test.status || body != test.body || response.Header.Get("Location") != test.location {
			t.Errorf("%s: %d, %q, location %q", test.host, response.StatusCode, body, response.Header.Get("Location"))
		}
		got := r.Await(t)
		if got.Direction != flow.Outbound || got.Cluster != test.cluster || got.OriginalDestination != r.At(port) {
			t.Errorf("%s: the record is %+v", test.host, got)
		}
	}
}

// Bytes go to an endpoint of the listener's cluster. Those that look like HTTP are bytes there as well, and the server may
// be the side that begins.
func TestBytesGoToTheListenersCluster(t *testing.T) {
	r := newRig(t)
	conns := r.Listen(t, "9001")
	r.cluster("outbound|9000||tcp", 9001)
	r.listen(&mesh.FilterChain{TCP: &mesh.TCPProxy{Clusters: []mesh.TCPCluster{{Name: "outbound|9000||tcp", Weight: 1}}}})
	for _, text := range []string{"GET / HTTP/1.1\r\n", "\x16\x03\x01 no TLS", "\x00opaque"} {
		client := r.Dial(t, r.At(port))
		server := servetest.Take(t, conns)
		servetest.Send(t, server, "220 ready\r\n")
		servetest.Expect(t, client, "220 ready\r\n")
		servetest.Send(t, client, text)
		servetest.Expect(t, server, text)
		client.Close()
		server.Close()
		if got := r.Await(t); got.Request || got.Protocol != flow.Opaque || got.Cluster != "outbound|9000||tcp" || got.Upstream != r.At(9001) {
			t.Errorf("%q: the record is %+v", text, got)
		}
	}
}

// A connection without a listener or a filter chain reaches no server.
func TestWithoutAListenerConnectionsAreRefused(t *testing.T) {
	r := newRig(t)
	servetest.ExpectRefusal(t, r.Client, r.At(port))
	if got := r.Await(t); got.Reason != flow.MeshRefused || !strings.Contains(got.Err.Error(), "no listener") {
		t.Errorf("the record is %+v", got)
	}
	r.listen(&mesh.FilterChain{Refused: true})
	servetest.ExpectRefusal(t, r.Client, r.At(port))
	if got := r.Await(t); got.Reason != flow.MeshRefused {
		t.Errorf("the record is %+v", got)
	}
}

// A push that changes the filter chain or the routes keeps open connections, and their next requests follow it.
func TestOpenConnectionsFollowPushes(t *testing.T) {
	r := newRig(t)
	r.serve(t, 9001)
	r.serve(t, 9002)
	r.cluster("one", 9001)
	r.cluster("two", 9002)
	r.route(host("a", "one"))
	r.listen(manager())
	c := r.client(t)
	if _, body := c.get(t, "a"); body != "9001" {
		t.Errorf("before: %q", body)
	}
	r.route(host("a", "two"))
	r.listen(manager())
	if response, body := c.get(t, "a"); body != "9002" || response.Close {
		t.Errorf("after: %q, close %v", body, response.Close)
	}
}

// The connections of a removed listener are served until they have ended: the response to the next request announces the end.
func TestConnectionsOfARemovedListenerAreDrained(t *testing.T) {
	r := newRig(t)
	r.serve(t, 9001)
	r.cluster("one", 9001)
	r.route(host("a", "one"))
	r.listen(manager())
	c := r.client(t)
	c.get(t, "a")
	r.push(func(e *mesh.Edit) {
		e.SetListener(name, nil)
		e.SetRoutes("http.8080", nil)
	})
	response, body := c.get(t, "a")
	if response.StatusCode != 200 || body != "9001" || !response.Close {
		t.Errorf("%d, %q, close %v", response.StatusCode, body, response.Close)
	}
	servetest.ExpectEnd(t, c, io.EOF)
	servetest.ExpectRefusal(t, r.Client, r.At(port))
}

// The HTTP/2 connections of a removed listener end by GOAWAY, and a request in progress is finished before.
func TestStreamsOfARemovedListenerAreFinished(t *testing.T) {
	r := newRig(t)
	conns := r.Listen(t, "9001")
	r.cluster("one", 9001)
	r.route(host("a", "one"))
	r.listen(manager())
	transport := &http.Transport{Protocols: new(http.Protocols), DialContext: func(context.Context, string, string) (net.Conn, error) { return r.TryDial(r.At(port)) }}
	transport.Protocols.SetUnencryptedHTTP2(true)
	type result struct {
		response *http.Response
		err      error
	}
	results := make(chan result, 1)
	go func() {
		response, err := (&http.Client{Transport: transport, Timeout: nettest.Patience}).Get("http://a/")
		results <- result{response, err}
	}()
	server := servetest.Take(t, conns)
	if _, err := http.ReadRequest(bufio.NewReader(server)); err != nil {
		t.Fatal(err)
	}
	r.push(func(e *mesh.Edit) { e.SetListener(name, nil) })
	servetest.Send(t, server, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
	got := <-results
	if got.err != nil || got.response.StatusCode != 200 {
		t.Fatal(got)
	}
	if body, err := io.ReadAll(got.response.Body); string(body) != "ok" || err != nil {
		t.Errorf("%q, %v", body, err)
	}
	r.AwaitListed(t, 0)
	transport.CloseIdleConnections()
}

// A connection that has not begun ends when its listener is removed.
func TestASilentConnectionEndsWithItsListener(t *testing.T) {
	r := newRig(t)
	r.cluster("tcp", 9001)
	r.Listen(t, "9001")
	for _, chain := range []*mesh.FilterChain{manager(), {TLS: &mesh.DownstreamTLS{}, HTTP: &mesh.HTTPManager{}}} {
		r.listen(chain)
		c := r.Dial(t, r.At(port))
		r.AwaitListed(t, 1)
		r.push(func(e *mesh.Edit) { e.SetListener(name, nil) })
		servetest.ExpectEnd(t, c, io.EOF)
		if got := r.Await(t); got.Reason != flow.Drained {
			t.Errorf("the record is %+v", got)
		}
	}
}

// Bytes of a body pass when they arrive, in both directions and from one version of HTTP to the other.
func TestBodiesAreNotHeld(t *testing.T) {
	r := newRig(t)
	listener := r.Pod.Listen(t, "tcp4", r.At(9001).String())
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		http.NewResponseController(w).EnableFullDuplex()
		buf := make([]byte, 100)
		for {
			n, err := q.Body.Read(buf)
			w.Write(buf[:n])
			if w.(http.Flusher).Flush(); err != nil {
				return
			}
		}
	})}
	served := make(chan struct{})
	go func() { defer close(served); server.Serve(listener) }()
	t.Cleanup(func() { server.Close(); <-served })
	r.cluster("one", 9001)
	r.route(host("a", "one"))
	r.listen(manager())
	for _, http2 := range []bool{false, true} {
		transport := &http.Transport{Protocols: new(http.Protocols), DialContext: func(context.Context, string, string) (net.Conn, error) { return r.TryDial(r.At(port)) }}
		transport.Protocols.SetHTTP1(!http2)
		transport.Protocols.SetUnencryptedHTTP2(http2)
		body, write := io.Pipe()
		request, _ := http.NewRequest("POST", "http://a/", body)
		go io.WriteString(write, "first")
		response, err := (&http.Client{Transport: transport, Timeout: nettest.Patience}).Do(request)
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 5)
		for _, text := range []string{"first", "later"} {
			if n, err := io.ReadFull(response.Body, got); err != nil || string(got) != text {
				t.Fatalf("HTTP/2 %v: %q, %v; want %q", http2, got[:n], err, text)
			}
			go io.WriteString(write, "later")
		}
		write.Close()
		response.Body.Close()
		transport.CloseIdleConnections()
	}
}

// An upgraded connection passes both ways.
func TestUpgradesPass(t *testing.T) {
	r := newRig(t)
	conns := r.Listen(t, "9001")
	r.cluster("one", 9001)
	r.route(host("a", "one"))
	chain := manager()
	chain.HTTP.Upgrades = []mesh.Upgrade{{Protocol: "websocket"}}
	r.listen(chain)
	c := r.client(t)
	servetest.Send(t, c, "GET /chat HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
	server := servetest.Take(t, conns)
	if request, err := http.ReadRequest(bufio.NewReader(server)); err != nil || request.Header.Get("Upgrade") != "websocket" {
		t.Fatalf("%v, %v", request, err)
	}
	servetest.Send(t, server, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
	if response, err := http.ReadResponse(c.read, nil); err != nil || response.StatusCode != 101 {
		t.Fatalf("%v, %v", response, err)
	}
	servetest.Send(t, server, "\x81\x02hi")
	got := make([]byte, 4)
	if _, err := io.ReadFull(c.read, got); err != nil || string(got) != "\x81\x02hi" {
		t.Errorf("%q, %v", got, err)
	}
	servetest.Send(t, c, "\x81\x02ho")
	servetest.Expect(t, server, "\x81\x02ho")
}

// A client that begins with TLS at a listener for HTTP is refused.
func TestTLSAtAListenerForHTTPIsRefused(t *testing.T) {
	r := newRig(t)
	r.route()
	r.listen(manager())
	conn := r.Dial(t, r.At(port))
	servetest.Send(t, conn, "\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00")
	servetest.ExpectEnd(t, conn, syscall.ECONNRESET)
}

// Clients of each version of HTTP reach servers of the other one.
func TestEachVersionOfHTTPReachesTheOther(t *testing.T) {
	r := newRig(t)
	listener := r.Pod.Listen(t, "tcp4", r.At(9001).String())
	server := &http.Server{Protocols: new(http.Protocols), Handler: http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		w.Header().Set("Trailer", "Length")
		body, _ := io.ReadAll(q.Body)
		fmt.Fprintf(w, "%s %s %s", q.Proto, q.Host, body)
		w.(http.Flusher).Flush() // a length would leave HTTP/1 no place for trailers
		w.Header().Set("Length", fmt.Sprint(len(body)))
	})}
	server.Protocols.SetHTTP1(true)
	server.Protocols.SetUnencryptedHTTP2(true)
	served := make(chan struct{})
	go func() { defer close(served); server.Serve(listener) }()
	t.Cleanup(func() { server.Close(); <-served })
	r.listen(manager())
	for protocol, want := range map[mesh.UpstreamProtocol]string{mesh.UpstreamHTTP1: "HTTP/1.1 a sent", mesh.UpstreamHTTP2: "HTTP/2.0 a sent"} {
		r.cluster("one", 9001)
		cluster := *r.plane.InForce.Load().Cluster("one")
		cluster.HTTP.Protocol = protocol
		r.push(func(e *mesh.Edit) { e.SetCluster("one", &cluster) })
		r.route(host("a", "one"))
		for _, http2 := range []bool{false, true} {
			transport := &http.Transport{Protocols: new(http.Protocols), DialContext: func(context.Context, string, string) (net.Conn, error) { return r.TryDial(r.At(port)) }}
			transport.Protocols.SetHTTP1(!http2)
			transport.Protocols.SetUnencryptedHTTP2(http2)
			response, err := (&http.Client{Transport: transport, Timeout: nettest.Patience}).Post("http://a/", "text/plain", strings.NewReader("sent"))
			if err != nil {
				t.Fatal(err)
			}
			body, err := io.ReadAll(response.Body)
			response.Body.Close()
			if err != nil || string(body) != want || response.Trailer.Get("Length") != "4" || (response.ProtoMajor == 2) != http2 {
				t.Errorf("HTTP/2 %v: %s, %q, %v, trailers %v; want %q", http2, response.Proto, body, err, response.Trailer, want)
			}
			transport.CloseIdleConnections()
		}
	}
}
