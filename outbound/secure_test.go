package outbound

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/balance"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/secure/securetest"
	"github.com/pillion-proxy/pillion/internal/serve/servetest"
)

// endpointOfMesh is the address of servers at port 81.
var endpointOfMesh = netip.AddrPortFrom(nettest.Elsewhere4, 81)

const (
	idOfServer = "spiffe://cluster.local/ns/shop/sa/server"
	idOfClient = "spiffe://cluster.local/ns/shop/sa/client"
	sni        = "outbound_.81_._.web.shop.svc.cluster.local"
)

var unlimited = mesh.Breakers{Connections: 1 << 30, Pending: 1 << 30, Requests: 1 << 30, Retries: 1 << 30}

// meshRig is a role with a control plane, and a service whose endpoints have the given TLS modes.
type meshRig struct {
	*servetest.Rig
	authority *securetest.Authority
	plane     *servetest.Configured
	lookup    balance.Lookup // of names of hosts; set before the first request that needs it
}

// newMeshRig configures a cluster whose endpoint must be expected.
func newMeshRig(t *testing.T, expected string, endpoints ...mesh.Endpoint) *meshRig {
	t.Helper()
	m := &meshRig{authority: securetest.New(t, "root of the mesh")}
	m.plane = &servetest.Configured{}
	m.plane.Own.Store(m.authority.Identity(t, idOfClient))
	at := servetest.Place{Outbound: true, Rules: true, New: func(t testing.TB, parts servetest.Parts) servetest.Role {
		proxy, err := New(Config{
			Poller: parts.Poller, OwnPorts: servetest.OwnPorts(), OwnAddresses: parts.Addresses, Flows: parts.Flows,
			Settings: parts.Settings, HTTP: parts.HTTP, Mesh: m.plane, Wait: nettest.Patience,
			Lookup: func(ctx context.Context, name string, family mesh.DNSFamily) ([]netip.Addr, time.Duration, error) {
				return m.lookup(ctx, name, family)
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		return proxy
	}}
	edit := (*mesh.Snapshot)(nil).Edit()
	edit.SetCluster("web", &mesh.Cluster{Name: "web", Discovery: mesh.ByEDS, Assignment: "web", Breakers: unlimited, Transports: []mesh.Transport{
		{Name: "tlsMode-istio", TLSMode: "istio", TLS: &mesh.UpstreamTLS{
			SNI: sni, ALPN: []string{"istio-peer-exchange", "istio"}, Certificate: "default", Roots: "ROOTCA",
			Names: []mesh.NameMatcher{{StringMatcher: mesh.StringMatcher{Text: expected}}},
		}},
		{Name: "tlsMode-disabled"},
	}})
	edit.SetAssignment("web", &mesh.Assignment{Name: "web", Localities: []mesh.Locality{{Endpoints: endpoints}}})
	edit.SetListener("0.0.0.0_81", &mesh.Listener{
		Name: "0.0.0.0_81", Direction: mesh.Outbound, Virtual: true,
		Addresses: []netip.AddrPort{netip.MustParseAddrPort("0.0.0.0:81")},
		Default:   &mesh.FilterChain{TCP: &mesh.TCPProxy{Clusters: []mesh.TCPCluster{{Name: "web", Weight: 1}}}},
	})
	snapshot, _ := edit.Snapshot()
	m.plane.InForce.Store(snapshot)
	m.Rig = servetest.NewRig(t, at, servetest.Defaults())
	return m
}

// hasten makes the role dial for a client that is silent for some milliseconds. A client that is slow beside other work is
// taken for a silent one.
func (m *meshRig) hasten(t *testing.T) {
	t.Helper()
	settings := m.Settings
	settings.DetectionDelay = 5 * time.Millisecond
	if err := m.Role.Apply(settings); err != nil {
		t.Fatal(err)
	}
}

// reconfigure sets the endpoints before the first connection.
func (m *meshRig) reconfigure(endpoints []mesh.Endpoint) {
	edit := m.plane.InForce.Load().Edit()
	edit.SetAssignment("web", &mesh.Assignment{Name: "web", Localities: []mesh.Locality{{Endpoints: endpoints}}})
	snapshot, _ := edit.Snapshot()
	m.plane.InForce.Store(snapshot)
}

func istio(address netip.AddrPort) mesh.Endpoint {
	return mesh.Endpoint{Address: address, Weight: 1, TLSMode: "istio"}
}

// seen is what an endpoint has seen of a connection.
type seen struct {
	sni, alpn, peer string
	proto           string // of HTTP
}

// serveTLS serves HTTP of both versions over mutual TLS, and echoes other protocols.
func (m *meshRig) serveTLS(t *testing.T, port string) <-chan seen {
	t.Helper()
	conns, all, done := m.Listen(t, port), make(chan seen, 10), make(chan struct{})
	config := &tls.Config{
		Certificates: []tls.Certificate{*m.authority.Leaf(t, idOfServer, nil)}, ClientAuth: tls.RequireAndVerifyClientCert,
		ClientCAs: m.authority.Roots.Pool, NextProtos: []string{"istio-http/1.1", "istio-h2", "istio"},
	}
	serve := func(raw net.Conn) {
		defer raw.Close()
		conn := tls.Server(raw, config)
		if conn.Handshake() != nil {
			return
		}
		state := conn.ConnectionState()
		s := seen{sni: state.ServerName, alpn: state.NegotiatedProtocol, peer: state.PeerCertificates[0].URIs[0].String()}
		if s.alpn == "istio" {
			all <- s
			io.Copy(conn, conn)
			return
		}
		server := &http.Server{Protocols: new(http.Protocols), Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			s.proto = r.Proto
			all <- s
			io.WriteString(w, "hello")
		})}
		server.Protocols.SetUnencryptedHTTP2(true)
		server.Protocols.SetHTTP1(true)
		listener := &single{conns: make(chan net.Conn, 1), done: done}
		listener.conns <- struct{ net.Conn }{conn}
		server.Serve(listener)
	}
	go func() {
		for {
			select {
			case conn := <-conns:
				go serve(conn)
			case <-done:
				return
			}
		}
	}()
	t.Cleanup(func() { close(done) })
	return all
}

// single is a listener of one connection.
type single struct {
	conns chan net.Conn
	done  chan struct{}
}

func (l *single) Accept() (net.Conn, error) {
	select {
	case conn := <-l.conns:
		return conn, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *single) Close() error   { return nil }
func (l *single) Addr() net.Addr { return &net.TCPAddr{} }

// request makes a request over a connection of the rig.
func (m *meshRig) request(t *testing.T, conn net.Conn, http2 bool) (*http.Response, error) {
	t.Helper()
	transport := &http.Transport{Protocols: new(http.Protocols)}
	transport.Protocols.SetUnencryptedHTTP2(http2)
	transport.Protocols.SetHTTP1(!http2)
	transport.DialContext = func(context.Context, string, string) (net.Conn, error) { return conn, nil }
	defer transport.CloseIdleConnections()
	response, err := (&http.Client{Transport: transport, Timeout: nettest.Patience}).Get("http://web/")
	if err == nil {
		io.Copy(io.Discard, response.Body)
		response.Body.Close()
	}
	return response, err
}

func TestEndpointsWithSidecarsAreReachedByMutualTLS(t *testing.T) {
	m := newMeshRig(t, idOfServer, istio(endpointOfMesh))
	endpoint := m.serveTLS(t, "81")
	for _, http2 := range []bool{false, true} {
		want := seen{sni, "istio-http/1.1", idOfClient, "HTTP/1.1"}
		if http2 {
			want.alpn, want.proto = "istio-h2", "HTTP/2.0"
		}
		if response, err := m.request(t, m.Dial(t, m.At(81)), http2); err != nil || response.StatusCode != 200 {
			t.Fatalf("HTTP/2 %v: %v, %v", http2, response, err)
		}
		if got := <-endpoint; got != want {
			t.Errorf("the endpoint saw %+v, want %+v", got, want)
		}
		if got := m.Await(t); got.Peer != idOfServer || got.Reason != flow.Completed {
			t.Errorf("HTTP/2 %v: the record has the peer %q and the reason %v", http2, got.Peer, got.Reason)
		}
	}
	conn := m.Dial(t, m.At(81))
	servetest.Send(t, conn, "\x00opaque")
	servetest.Expect(t, conn, "\x00opaque")
	conn.Close()
	if got, want := <-endpoint, (seen{sni, "istio", idOfClient, ""}); got != want {
		t.Errorf("the endpoint saw %+v, want %+v", got, want)
	}
	if got := m.Await(t); got.Peer != idOfServer {
		t.Errorf("the record has the peer %q", got.Peer)
	}
}

// A server that is not the one that the configuration expects gets no byte of the client.
func TestAnotherServerGetsNothing(t *testing.T) {
	m := newMeshRig(t, "spiffe://cluster.local/ns/shop/sa/another", istio(endpointOfMesh))
	endpoint := m.serveTLS(t, "81")
	response, err := m.request(t, m.Dial(t, m.At(81)), false)
	if err != nil || response.StatusCode != http.StatusServiceUnavailable {
		t.Fatalf("%v, %v", response, err)
	}
	got := m.Await(t)
	if got.Reason != flow.UpstreamTLS || !strings.HasPrefix(got.TransportFailure, "TLS_error: the peer's names are not accepted") || got.Peer != "" {
		t.Errorf("the record is %+v", got)
	}
	if !strings.Contains(got.TransportFailure, idOfServer) || !strings.Contains(got.TransportFailure, "sa/another") {
		t.Errorf("%q does not have the name and the one that is expected", got.TransportFailure)
	}
	if len(endpoint) > 0 {
		t.Errorf("the server saw %+v", <-endpoint)
	}
}

// A server that does not accept the client's certificate rejects it after the client's part of the handshake has ended
// (TLS 1.3). That is a failed handshake as well.
func TestARejectedCertificateIsAFailedHandshake(t *testing.T) {
	for _, protocol := range []string{"HTTP/1.1", "HTTP/2", "other"} {
		m := newMeshRig(t, idOfServer, istio(endpointOfMesh))
		foreign := securetest.New(t, "another root").Identity(t, idOfClient)
		foreign.Roots = m.authority.Roots
		m.plane.Own.Store(foreign)
		m.serveTLS(t, "81")
		client := m.Dial(t, m.At(81))
		if protocol == "other" {
			servetest.Send(t, client, "\x00question")
			client.SetDeadline(time.Now().Add(nettest.Patience))
			io.ReadAll(client)
		} else if response, err := m.request(t, client, protocol == "HTTP/2"); err != nil || response.StatusCode != http.StatusServiceUnavailable {
			t.Errorf("%s: %v, %v", protocol, response, err)
		}
		got := m.Await(t)
		if got.Reason != flow.UpstreamTLS || !strings.HasPrefix(got.TransportFailure, "TLS_error: the peer rejected the handshake: ") ||
			!strings.Contains(got.Err.Error(), "certificate") {
			t.Errorf("%s: %v, %q, %v", protocol, got.Reason, got.TransportFailure, got.Err)
		}
		client.Close()
	}
}

// A response that ends with the connection is whole after the server's close message only, with or without a length: an
// attacker can send FIN.
func TestATruncatedResponseIsNotWhole(t *testing.T) {
	m := newMeshRig(t, idOfServer, istio(endpointOfMesh))
	conns := m.Listen(t, "81")
	config := &tls.Config{
		Certificates: []tls.Certificate{*m.authority.Leaf(t, idOfServer, nil)}, ClientAuth: tls.RequireAnyClientCert, NextProtos: []string{"istio-http/1.1", "istio"},
	}
	const length, chunks = "Content-Length: 9\r\n", "Transfer-Encoding: chunked\r\n"
	for _, c := range []struct {
		framing, body string
		closed        bool // by a close message
		whole         bool
	}{
		{"", "beginning", true, true}, {"", "beginning", false, false},
		{length, "beginning", false, true}, {length, "begin", true, false}, {length, "begin", false, false},
		{chunks, "9\r\nbeginning\r\n0\r\n\r\n", false, true}, {chunks, "9\r\nbeginning\r\n", true, false}, {chunks, "9\r\nbeginning\r\n", false, false},
	} {
		client := m.Dial(t, m.At(81))
		client.SetDeadline(time.Now().Add(nettest.Patience))
		servetest.Send(t, client, "GET / HTTP/1.1\r\nHost: web\r\n\r\n")
		raw := servetest.Take(t, conns)
		server := tls.Server(raw, config)
		if _, err := http.ReadRequest(bufio.NewReader(server)); err != nil {
			t.Fatal(err)
		}
		io.WriteString(server, "HTTP/1.1 200 OK\r\n"+c.framing+"\r\n"+c.body)
		if c.closed {
			server.CloseWrite()
		}
		raw.CloseWrite()
		response, err := http.ReadResponse(bufio.NewReader(client), nil)
		if err == nil {
			_, err = io.ReadAll(response.Body)
		}
		if (err == nil) != c.whole {
			t.Errorf("%q, closed %v: the client reads %v", c.framing+c.body, c.closed, err)
		}
		raw.Close()
		client.Close()
		m.Await(t)
	}
}

// A plain server behind an endpoint that must be reached by TLS gets a ClientHello and nothing else.
func TestNothingIsSentWithoutTLS(t *testing.T) {
	m := newMeshRig(t, idOfServer, istio(endpointOfMesh))
	conns := m.Listen(t, "81")
	client := m.Dial(t, m.At(81))
	servetest.Send(t, client, "\x00secret")
	server := servetest.Take(t, conns)
	server.SetDeadline(time.Now().Add(nettest.Patience))
	var hello [3]byte
	if _, err := io.ReadFull(server, hello[:]); err != nil || hello[0] != 22 {
		t.Fatalf("the server receives % x, %v", hello, err)
	}
	io.WriteString(server, "220 ready\r\n")
	rest, _ := io.ReadAll(server)
	if strings.Contains(string(rest), "secret") {
		t.Error("the server received the client's bytes")
	}
	if got := m.Await(t); got.Reason != flow.UpstreamTLS {
		t.Errorf("the reason is %v", got.Reason)
	}
}

// If only some endpoints have a sidecar, one is chosen here, because the network could choose another one.
func TestOneOfDifferentEndpointsIsDialled(t *testing.T) {
	for _, mode := range []string{"istio", ""} {
		m := newMeshRig(t, idOfServer)
		near := m.At(82)
		endpoints := []mesh.Endpoint{
			{Address: near, Weight: 1, TLSMode: mode},
			{Address: netip.MustParseAddrPort("192.0.2.9:9"), Weight: 1, Health: mesh.Unhealthy},
		}
		if mode == "" {
			endpoints[1].TLSMode = "istio"
		}
		m.reconfigure(endpoints)
		var saw <-chan seen
		var conns <-chan *net.TCPConn
		if mode == "istio" {
			saw = m.serveTLS(t, "82")
		} else {
			conns = m.Listen(t, "82")
		}
		client := m.Dial(t, m.At(81))
		servetest.Send(t, client, "\x00opaque")
		if mode == "istio" {
			servetest.Expect(t, client, "\x00opaque")
			<-saw
		} else {
			servetest.Expect(t, servetest.Take(t, conns), "\x00opaque")
		}
		client.Close()
	}
}

// A silent client of endpoints that differ is not judged by another choice when it speaks.
func TestALateClientKeepsItsEndpoint(t *testing.T) {
	for range 6 {
		m := newMeshRig(t, idOfServer)
		m.hasten(t)
		m.reconfigure([]mesh.Endpoint{
			istio(m.At(82)),
			{Address: m.At(83), Weight: 1},
		})
		saw, conns := m.serveTLS(t, "82"), m.Listen(t, "83")
		client := m.Dial(t, m.At(81))
		select {
		case got := <-saw:
			if got.alpn != "istio" {
				t.Errorf("ALPN %q", got.alpn)
			}
			servetest.Send(t, client, "\x00late")
			servetest.Expect(t, client, "\x00late")
		case plain := <-conns:
			servetest.Send(t, client, "\x00late")
			servetest.Expect(t, plain, "\x00late")
		}
		client.Close()
	}
}

// Requests on connections that an earlier root has verified end in order when the root changes, and the next connection is
// verified by the roots in force.
func TestAnotherRootRetiresConnections(t *testing.T) {
	for _, http2 := range []bool{false, true} {
		m := newMeshRig(t, idOfServer, istio(endpointOfMesh))
		endpoint := m.serveTLS(t, "81")
		var dials int
		transport := &http.Transport{Protocols: new(http.Protocols)}
		transport.Protocols.SetUnencryptedHTTP2(http2)
		transport.Protocols.SetHTTP1(!http2)
		transport.DialContext = func(context.Context, string, string) (net.Conn, error) {
			dials++
			return m.TryDial(m.At(81))
		}
		client := &http.Client{Transport: transport, Timeout: nettest.Patience}
		get := func() int {
			t.Helper()
			response, err := client.Get("http://web/")
			if err != nil {
				t.Fatal(err)
			}
			io.Copy(io.Discard, response.Body)
			response.Body.Close()
			m.Await(t)
			return response.StatusCode
		}
		renewed := m.authority.Identity(t, idOfClient)
		for range 2 {
			if status := get(); status != 200 {
				t.Fatalf("status %d", status)
			}
			<-endpoint
			m.plane.Own.Store(renewed) // another certificate, and the same roots
		}
		if dials != 1 {
			t.Errorf("HTTP/2 %v: %d connections for two requests", http2, dials)
		}
		other := *m.plane.Own.Load()
		other.Roots = securetest.New(t, "another root").Roots
		m.plane.Own.Store(&other)
		m.Wake()
		nettest.Eventually(t, "requests meet the roots in force", func() bool {
			status := get()
			for len(endpoint) > 0 {
				<-endpoint
			}
			return status == http.StatusServiceUnavailable
		})
		transport.CloseIdleConnections()
	}
}

// Where the host of a request decides which server is expected, it is the SNI, and the server's certificate must have it. That is
// the host that its route sends. An address is no SNI. Over HTTP/2, and without a host, nothing is sent.
func TestTheHostOfARequestIsVerified(t *testing.T) {
	r := newRouted(t, to("web"))
	m := r.meshRig
	edit := m.plane.InForce.Load().Edit()
	sent := func(domain, as string) mesh.VirtualHost {
		r := to("web")
		r.Forward.HostRewrite = as
		return mesh.VirtualHost{Name: domain, Domains: []mesh.Domain{{Kind: mesh.DomainExact, Text: domain}}, Routes: []mesh.Route{r}}
	}
	edit.SetRoutes("81", &mesh.Routes{Name: "81", Hosts: []mesh.VirtualHost{
		sent("alias.example", "Web.example:81"), sent("renamed.web.example", "other.example"),
		{Name: "any", Domains: []mesh.Domain{{Kind: mesh.DomainAny}}, Routes: []mesh.Route{to("web")}},
	}})
	edit.SetCluster("web", &mesh.Cluster{Name: "web", Discovery: mesh.OriginalDestination, Breakers: unlimited, Transports: []mesh.Transport{
		{Name: "simple", TLS: &mesh.UpstreamTLS{Roots: "ca", HostSNI: true, HostName: true}},
	}})
	edit.SetSecret("ca", &mesh.Secret{Name: "ca", Roots: &mesh.Roots{CA: m.authority.Roots.PEM}})
	snapshot, _ := edit.Snapshot()
	m.plane.InForce.Store(snapshot)
	conns, names, done := m.Listen(t, "81"), make(chan string, 10), make(chan struct{})
	config := &tls.Config{Certificates: []tls.Certificate{*m.authority.Leaf(t, "", func(c *x509.Certificate) {
		c.DNSNames, c.IPAddresses = []string{"web.example", "renamed.web.example"}, []net.IP{net.IPv4(192, 0, 2, 7)}
	})}}
	go func() {
		for {
			select {
			case raw := <-conns:
				go func() {
					defer raw.Close()
					conn := tls.Server(raw, config)
					in := bufio.NewReader(conn)
					for {
						if _, err := http.ReadRequest(in); err != nil {
							return
						}
						names <- conn.ConnectionState().ServerName
						io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
					}
				}()
			case <-done:
				return
			}
		}
	}()
	defer close(done)
	conn := m.Dial(t, m.At(81))
	in := bufio.NewReader(conn)
	for _, c := range []struct {
		host, sni string
		status    int
	}{
		{"web.example", "web.example", 200},
		{"WEB.example:81", "web.example", 200},
		{"192.0.2.7:81", "", 200},
		{"alias.example", "web.example", 200},
		{"renamed.web.example", "", 503},
		{"other.example", "", 503},
	} {
		io.WriteString(conn, "GET / HTTP/1.1\r\nHost: "+c.host+"\r\n\r\n")
		response, err := http.ReadResponse(in, nil)
		if err != nil {
			t.Fatal(err)
		}
		io.Copy(io.Discard, response.Body)
		if response.StatusCode != c.status {
			t.Errorf("%s: status %d, want %d", c.host, response.StatusCode, c.status)
		}
		if c.status == 200 && response.StatusCode == 200 {
			if got := <-names; got != c.sni {
				t.Errorf("%s: SNI %q, want %q", c.host, got, c.sni)
			}
		}
		if got := m.Await(t); c.status == 503 && got.Reason != flow.UpstreamTLS {
			t.Errorf("%s: %v", c.host, got.Reason)
		}
	}
	conn.Close()
	response, err := m.request(t, m.Dial(t, m.At(81)), true)
	if err != nil || response.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("HTTP/2: %v, %v", response, err)
	}
	if got := m.Await(t); got.Reason != flow.UpstreamTLS || len(names) > 0 {
		t.Errorf("HTTP/2: %v, %d requests arrived", got.Reason, len(names))
	}
}
