package inbound

import (
	"bufio"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/secure/securetest"
	"github.com/pillion-proxy/pillion/internal/serve/servetest"
)

const (
	idOfServer = "spiffe://cluster.local/ns/shop/sa/server"
	idOfClient = "spiffe://cluster.local/ns/shop/sa/client"
)

// Protocols that filter chains of istiod match: of HTTP and of TCP inside mutual TLS, and of HTTP without TLS.
var (
	meshHTTP = []string{"istio-http/1.0", "istio-http/1.1", "istio-h2"}
	meshTCP  = []string{"istio-peer-exchange", "istio"}
	plain    = []string{"http/1.1", "h2c"}
)

// chain is a filter chain as istiod makes them.
func chain(transport string, protocols []string, isHTTP, ended bool) *mesh.FilterChain {
	c := &mesh.FilterChain{Match: mesh.ChainMatch{Transport: transport, Protocols: protocols}}
	if isHTTP {
		c.HTTP = &mesh.HTTPManager{Routes: &mesh.Routes{}}
	} else {
		c.TCP = &mesh.TCPProxy{Clusters: []mesh.TCPCluster{{Name: "inbound|81||", Weight: 1}}}
	}
	if ended {
		c.TLS = &mesh.DownstreamTLS{ALPN: []string{"h2", "http/1.1"}, Certificates: []string{"default"}, Roots: "ROOTCA", RequireClient: true}
	}
	return c
}

// modes are the filter chains that istiod makes for a mode of PeerAuthentication and the protocol of a port.
var modes = map[string][]*mesh.FilterChain{
	"PERMISSIVE, HTTP": {chain("tls", append(meshHTTP, meshTCP...), true, true), chain("raw_buffer", nil, true, false)},
	"PERMISSIVE, TCP":  {chain("tls", append(meshTCP, meshHTTP...), false, true), chain("raw_buffer", nil, false, false), chain("tls", nil, false, false)},
	"PERMISSIVE, auto": {
		chain("tls", meshHTTP, true, true), chain("tls", meshTCP, false, true),
		chain("raw_buffer", plain, true, false), chain("raw_buffer", nil, false, false), chain("tls", nil, false, false),
	},
	"STRICT, HTTP":  {chain("tls", nil, true, true)},
	"STRICT, TCP":   {chain("tls", nil, false, true)},
	"STRICT, auto":  {chain("tls", meshHTTP, true, true), chain("tls", nil, false, true)},
	"DISABLE, HTTP": {chain("raw_buffer", nil, true, false)},
	"DISABLE, TCP":  {chain("raw_buffer", nil, false, false)},
	"DISABLE, auto": {chain("raw_buffer", plain, true, false), chain("raw_buffer", nil, false, false)},
}

// What a client sends, in the order of the columns of the table.
const (
	plainHTTP = iota
	plainOther
	tlsOfHTTP
	tlsOfTCP
	tlsOfOthers
	httpAsTCP // HTTP, and the ALPN of TCP: a client of the mesh that does not know the port's protocol
)

// Outcomes of a connection.
const (
	closed  = "closed"
	carried = "carried"
	mutual  = "mutual"  // TLS is ended, and the client known
	through = "through" // TLS is not ended
)

func TestEveryModeTreatsEveryClientAsConfigured(t *testing.T) {
	for mode, want := range map[string][6]string{
		"PERMISSIVE, HTTP": {carried, closed, mutual, closed, closed, mutual},
		"PERMISSIVE, TCP":  {carried, carried, mutual, mutual, through, mutual},
		"PERMISSIVE, auto": {carried, carried, mutual, mutual, through, mutual},
		"STRICT, HTTP":     {closed, closed, mutual, closed, mutual, mutual},
		"STRICT, TCP":      {closed, closed, mutual, mutual, mutual, mutual},
		"STRICT, auto":     {closed, closed, mutual, mutual, mutual, mutual},
		"DISABLE, HTTP":    {carried, closed, closed, closed, closed, closed},
		"DISABLE, TCP":     {carried, carried, through, through, through, through},
		"DISABLE, auto":    {carried, carried, through, through, through, through},
	} {
		t.Run(mode, func(t *testing.T) {
			m := newMeshRig(t, mode)
			for sends := range want {
				if got := m.outcome(t, sends); got != want[sends] {
					t.Errorf("client %d: %s, want %s", sends, got, want[sends])
				}
			}
		})
	}
}

const detectionDelay = 5 * time.Millisecond

// meshRig is a role with a control plane, in front of a workload that answers HTTP and TLS and echoes everything else.
type meshRig struct {
	*servetest.Rig
	authority *securetest.Authority
	client    *tls.Certificate
	plane     *servetest.Configured
	slashes   mesh.EscapedSlashes // of chains with policies
}

func newMeshRig(t *testing.T, mode string) *meshRig {
	t.Helper()
	return newDelayedMeshRig(t, mode, detectionDelay)
}

func newDelayedMeshRig(t *testing.T, mode string, delay time.Duration) *meshRig {
	t.Helper()
	return newMeshRigOf(t, mode, delay, func(*Config) {})
}

// newMeshRigOf is newDelayedMeshRig with a configuration that change has changed.
func newMeshRigOf(t *testing.T, mode string, delay time.Duration, change func(*Config)) *meshRig {
	t.Helper()
	m := &meshRig{authority: securetest.New(t, "root of the mesh")}
	m.client = m.authority.Leaf(t, idOfClient, nil)
	plane := &servetest.Configured{}
	plane.Own.Store(m.authority.Identity(t, idOfServer))
	m.plane = plane
	plane.InForce.Store(snapshotOf(t, modes[mode], !strings.HasPrefix(mode, "DISABLE")))
	at := servetest.Place{Rules: true, New: func(t testing.TB, parts servetest.Parts) servetest.Role {
		config := Config{
			Poller: parts.Poller, OwnPorts: servetest.OwnPorts(), OwnAddresses: parts.Addresses, Flows: parts.Flows,
			Settings: parts.Settings, HTTP: parts.HTTP, Mesh: plane, Wait: nettest.Patience,
		}
		change(&config)
		proxy, err := New(config)
		if err != nil {
			t.Fatal(err)
		}
		return proxy
	}}
	settings := servetest.Defaults()
	settings.DetectionDelay = delay
	m.Rig = servetest.NewRig(t, at, settings)
	own := m.authority.Leaf(t, "", func(c *x509.Certificate) { c.DNSNames = []string{"workload.example"} })
	conns, served := m.Listen(t, "81"), make(chan struct{})
	go func() {
		for {
			select {
			case conn := <-conns:
				go answer(conn, own)
			case <-served:
				return
			}
		}
	}()
	t.Cleanup(func() { close(served) })
	return m
}

// snapshotOf returns a snapshot with an inbound listener. inspected is whether the listener looks at first bytes.
func snapshotOf(t *testing.T, chains []*mesh.FilterChain, inspected bool) *mesh.Snapshot {
	t.Helper()
	l := &mesh.Listener{Name: "virtualInbound", Direction: mesh.Inbound, UseOriginalDst: true, Chains: chains}
	if inspected {
		l.Filters = []mesh.ListenerFilter{{Kind: mesh.TLSInspector}, {Kind: mesh.HTTPInspector}}
	}
	if err := l.Index(); err != nil {
		t.Fatal(err)
	}
	edit := (*mesh.Snapshot)(nil).Edit()
	edit.SetListener(l.Name, l)
	s, _ := edit.Snapshot()
	return s
}

// answer serves a connection of the workload.
func answer(conn net.Conn, certificate *tls.Certificate) {
	defer conn.Close()
	in := bufio.NewReader(conn)
	first, err := in.Peek(1)
	if err != nil {
		return
	}
	switch first[0] {
	case 'G':
		for {
			request, err := http.ReadRequest(in)
			if err != nil {
				return
			}
			io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n")
			seen(request).Write(conn)
			io.WriteString(conn, "\r\n")
		}
	case 'P':
		var protocols http.Protocols
		protocols.SetUnencryptedHTTP2(true)
		server := http.Server{Protocols: &protocols, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { maps.Copy(w.Header(), seen(r)) })}
		ended := make(chan net.Conn)
		server.ConnState = func(conn net.Conn, state http.ConnState) {
			if state == http.StateClosed {
				close(ended)
			}
		}
		conns := make(chan net.Conn, 1)
		conns <- begun{conn, in}
		server.Serve(&oneConn{conns, ended})
	case 22:
		inner := tls.Server(begun{conn, in}, &tls.Config{Certificates: []tls.Certificate{*certificate}})
		io.Copy(inner, inner)
	default:
		io.Copy(conn, in)
	}
}

// seen returns what the workload sees of a request, as fields of the response.
func seen(r *http.Request) http.Header {
	claims := ""
	if h := r.Header; h.Get("Seen-Sub") != "" {
		claims = fmt.Sprintf("%s, %v, %v", strings.Join(h["Seen-Sub"], " "), h.Get("Authorization") != "", len(h["X-Payload"]) == 1 && len(h.Get("X-Payload")) > 20)
	}
	return http.Header{
		"Seen-Claims": {claims}, "Seen-Target": {r.RequestURI}, "Seen-Cert": {r.Header.Get("X-Forwarded-Client-Cert")},
	}
}

// oneConn is a listener that accepts one connection, and is closed when that ends.
type oneConn struct {
	conns, ended chan net.Conn
}

func (l *oneConn) Accept() (net.Conn, error) {
	select {
	case conn := <-l.conns:
		return conn, nil
	case <-l.ended:
		return nil, net.ErrClosed
	}
}

func (l *oneConn) Close() error   { return nil }
func (l *oneConn) Addr() net.Addr { return &net.TCPAddr{} }

// begun is a connection of which some bytes were read.
type begun struct {
	net.Conn
	in *bufio.Reader
}

func (b begun) Read(p []byte) (int, error) { return b.in.Read(p) }

// outcome makes a connection and returns what becomes of it.
func (m *meshRig) outcome(t *testing.T, sends int) string {
	t.Helper()
	raw := m.Dial(t, m.At(81))
	raw.SetDeadline(time.Now().Add(nettest.Patience))
	var conn net.Conn = raw
	text := "GET / HTTP/1.1\r\nHost: a\r\n\r\n"
	alpn := []string{"istio-http/1.1", "istio", "http/1.1"}
	switch sends {
	case plainOther:
		text = "\x00other bytes"
	case tlsOfTCP:
		text, alpn = "\x00other bytes", []string{"istio-peer-exchange", "istio"}
	case tlsOfOthers:
		alpn = []string{"http/1.1"}
	case httpAsTCP:
		alpn = []string{"istio-peer-exchange", "istio"}
	}
	ended := false
	if sends >= tlsOfHTTP {
		secured := tls.Client(raw, &tls.Config{Certificates: []tls.Certificate{*m.client}, InsecureSkipVerify: true, NextProtos: alpn})
		if err := secured.Handshake(); err != nil {
			raw.Close()
			m.Await(t)
			return closed
		}
		peer := secured.ConnectionState().PeerCertificates[0]
		ended = len(peer.URIs) == 1 && peer.URIs[0].String() == idOfServer
		conn = secured
	}
	io.WriteString(conn, text)
	var first [12]byte
	n, err := io.ReadFull(conn, first[:])
	if err != nil && string(first[:n]) == text {
		err = nil // the echo
	}
	conn.Close()
	got := m.Await(t)
	switch {
	case (got.Reason == flow.MeshRefused || got.Reason == flow.TLSRequired) && err != nil:
		return closed
	case err != nil:
		return err.Error()
	case ended && got.Peer == idOfClient:
		return mutual
	case sends >= tlsOfHTTP && !ended && got.Peer == "":
		return through
	case sends < tlsOfHTTP && got.Peer == "":
		return carried
	}
	return "peer " + got.Peer
}

// handshake begins TLS as a client of the mesh.
func (m *meshRig) handshake(t *testing.T, raw net.Conn, certificate *tls.Certificate, alpn ...string) (*tls.Conn, error) {
	t.Helper()
	raw.SetDeadline(time.Now().Add(nettest.Patience))
	conn := tls.Client(raw, &tls.Config{
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return certificate, nil },
		InsecureSkipVerify:   true, NextProtos: alpn,
	})
	return conn, conn.Handshake()
}

// A server that speaks first is heard by a client that is silent, without TLS and inside it.
func TestAServerThatSpeaksFirstIsHeard(t *testing.T) {
	for _, mode := range []string{"PERMISSIVE, TCP", "PERMISSIVE, TCP with TLS", "STRICT, TCP with TLS"} {
		mode, ended := strings.CutSuffix(mode, " with TLS")
		m := newMeshRig(t, mode)
		conns := m.Listen(t, "82")
		var conn net.Conn = m.Dial(t, m.At(82))
		if ended {
			var err error
			if conn, err = m.handshake(t, conn, m.client, meshTCP...); err != nil {
				t.Fatal(err)
			}
		}
		workload := servetest.Take(t, conns)
		servetest.Send(t, workload, "hello")
		servetest.Expect(t, conn, "hello")
		conn.Close()
		workload.Close()
		if got := m.Await(t); ended != (got.Peer == idOfClient) {
			t.Errorf("%s, TLS %v: the record has the peer %q", mode, ended, got.Peer)
		}
	}
}

// A client whose first bytes come after the workload was dialled is judged by them.
func TestATLSClientMayBeLate(t *testing.T) {
	m := newMeshRig(t, "PERMISSIVE, TCP")
	conns := m.Listen(t, "82")
	raw := m.Dial(t, m.At(82))
	workload := servetest.Take(t, conns)
	conn, err := m.handshake(t, raw, m.client, meshTCP...)
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(conn, "question")
	servetest.Expect(t, workload, "question")
	servetest.Send(t, workload, "answer")
	servetest.Expect(t, conn, "answer")
	conn.Close()
	workload.Close()
	if got := m.Await(t); got.Peer != idOfClient {
		t.Errorf("the record has the peer %q", got.Peer)
	}
}

// Where no connection passes without TLS, silence is not taken for another protocol after the detection delay.
func TestAClientThatMustBeginWithTLSIsWaitedFor(t *testing.T) {
	m := newDelayedMeshRig(t, "STRICT, TCP", 0) // a delay that were applied would be over when the client begins
	raw := m.Dial(t, m.At(81))
	m.AwaitListed(t, 1)
	if _, err := m.handshake(t, raw, m.client, meshTCP...); err != nil {
		t.Error(err)
	}
	raw.Close()
	m.Await(t)
}

func TestAFailedHandshakeHasAReason(t *testing.T) {
	m := newMeshRig(t, "STRICT, HTTP")
	foreign := securetest.New(t, "root of another mesh").Leaf(t, idOfClient, nil)
	for name, c := range map[string]struct {
		certificate *tls.Certificate
		reason      flow.Reason
		text        string
	}{
		"no certificate": {&tls.Certificate{}, flow.TLSNoCertificate, "the client has no certificate"},
		"another root":   {foreign, flow.TLSUnknownRoot, `issued by "CN=root of another mesh"`},
	} {
		conn, err := m.handshake(t, m.Dial(t, m.At(81)), c.certificate, meshHTTP...)
		if err == nil {
			_, err = conn.Read(make([]byte, 1)) // in TLS 1.3 the client learns it later
		}
		if err == nil || !strings.Contains(err.Error(), "certificate") {
			t.Errorf("%s: the client learns %v, want an alert", name, err)
		}
		conn.Close()
		if got := m.Await(t); got.Reason != c.reason || !strings.Contains(got.Err.Error(), c.text) {
			t.Errorf("%s: %v, %v", name, got.Reason, got.Err)
		}
	}
}

// The workload learns who calls, and never what a client without a certificate claims.
func TestTheWorkloadLearnsItsClient(t *testing.T) {
	http := func(tls bool) *mesh.FilterChain {
		c := chain("raw_buffer", nil, true, false)
		if tls {
			c = chain("tls", nil, true, true)
		}
		c.HTTP.ClientCert, c.HTTP.ClientCertDetails = mesh.AppendClientCert, mesh.ClientCertDetails{Subject: true, URI: true}
		return c
	}
	modes["with client certificates"] = []*mesh.FilterChain{http(true), http(false)}
	defer delete(modes, "with client certificates")
	m := newMeshRig(t, "with client certificates")
	digest := sha256.Sum256(m.client.Certificate[0])
	element := "By=" + idOfServer + ";Hash=" + hex.EncodeToString(digest[:]) + `;Subject="";URI=` + idOfClient
	const ask, claim = "GET / HTTP/1.1\r\nHost: a\r\n", "X-Forwarded-Client-Cert: By=a;URI=forged\r\n"
	for _, c := range []struct {
		tls        bool
		text, want string
	}{
		{true, ask, element}, {true, ask + claim, "By=a;URI=forged," + element}, {false, ask, ""}, {false, ask + claim, ""},
		{true, ask + claim + claim, "By=a;URI=forged,By=a;URI=forged," + element}, {false, ask + claim + claim, ""},
		{true, ask + "Connection: x-forwarded-client-cert\r\n", element}, {false, ask + claim + "Connection: x-forwarded-client-cert\r\n", ""},
	} {
		var conn net.Conn = m.Dial(t, m.At(81))
		if c.tls {
			var err error
			if conn, err = m.handshake(t, conn, m.client, meshHTTP...); err != nil {
				t.Fatal(err)
			}
		}
		servetest.Send(t, conn, c.text+"Connection: close\r\n\r\n")
		all, _ := io.ReadAll(conn)
		if _, got, _ := strings.Cut(string(all), "Seen-Cert: "); !strings.HasPrefix(got, c.want+"\r\n") {
			t.Errorf("TLS %v, %q: the workload sees %q, want %q", c.tls, c.text, got, c.want)
		}
		conn.Close()
		m.Await(t)
	}
}

// A chain for HTTP carries nothing else, also after a client was silent inside TLS: opaque bytes would reach the workload
// with whatever fields the client gives itself.
func TestSilenceInsideTLSDoesNotOpenAChainForHTTP(t *testing.T) {
	for _, mode := range []string{"PERMISSIVE, HTTP", "STRICT, HTTP"} {
		m := newMeshRig(t, mode)
		conns := m.Listen(t, "82")
		conn, err := m.handshake(t, m.Dial(t, m.At(82)), m.client, meshHTTP...)
		if err != nil {
			t.Fatal(err)
		}
		workload := servetest.Take(t, conns) // the silence was noticed
		io.WriteString(conn, "\x00foo / HTTP/1.1\r\nX-Forwarded-Client-Cert: URI=spiffe://forged\r\n\r\n")
		if got, _ := io.ReadAll(workload); len(got) > 0 {
			t.Errorf("%s: the workload receives %q", mode, got)
		}
		conn.Close()
		if got := m.Await(t); got.Reason != flow.MeshRefused {
			t.Errorf("%s: the reason is %v", mode, got.Reason)
		}
	}
}

// A client that was silent while the configuration became stricter is judged by the one in force when it sends.
func TestAPushBindsAClientThatIsSilent(t *testing.T) {
	m := newMeshRig(t, "PERMISSIVE, TCP")
	conns := m.Listen(t, "82")
	conn := m.Dial(t, m.At(82))
	workload := servetest.Take(t, conns)
	m.plane.InForce.Store(snapshotOf(t, modes["STRICT, TCP"], true))
	io.WriteString(conn, "\x00early")
	if got, _ := io.ReadAll(workload); len(got) > 0 {
		t.Errorf("the workload receives %q", got)
	}
	if got := m.Await(t); got.Reason != flow.TLSRequired {
		t.Errorf("the reason is %v", got.Reason)
	}
}

// A push that shows the certificates of clients in another way loses no request: a connection shows its client as it began, and
// ends in order, and the next one follows the configuration in force.
func TestAConnectionShowsItsClientAsItBegan(t *testing.T) {
	asking := []mesh.HTTPFilter{{Name: "a filter that a route may enable", Disabled: true, ExtAuthz: &mesh.ExtAuthz{}}}
	shows := func(filters []mesh.HTTPFilter, change func(*mesh.HTTPManager)) *mesh.Snapshot {
		c := chain("tls", nil, true, true)
		c.HTTP.ClientCert, c.HTTP.Filters = mesh.AppendClientCert, filters
		change(c.HTTP)
		return snapshotOf(t, []*mesh.FilterChain{c}, true)
	}
	http1, http2 := []string{"istio-http/1.1", "http/1.1"}, []string{"istio-h2", "h2"}
	for _, engine := range []struct {
		name      string
		protocols []string
		filters   []mesh.HTTPFilter
	}{{"HTTP/1", http1, nil}, {"HTTP/2", http2, nil}, {"HTTP/2 to several connections", http2, asking}} {
		name := engine.name
		for _, after := range []mesh.ClientCertAction{mesh.AppendClientCert, mesh.RemoveClientCert, mesh.ForwardClientCert} {
			m := newMeshRig(t, "STRICT, HTTP")
			m.plane.InForce.Store(shows(engine.filters, func(*mesh.HTTPManager) {}))
			var dialled atomic.Int32
			transport := &http.Transport{Protocols: new(http.Protocols), DialContext: func(context.Context, string, string) (net.Conn, error) {
				dialled.Add(1)
				return m.handshake(t, m.Dial(t, m.At(81)), m.client, engine.protocols...)
			}}
			transport.Protocols.SetHTTP1(name == "HTTP/1")
			transport.Protocols.SetUnencryptedHTTP2(name != "HTTP/1")
			client := &http.Client{Transport: transport}
			ask := func() string {
				response, err := client.Get("http://a/")
				if err != nil {
					t.Fatalf("%s, %v: %v", name, after, err)
				}
				response.Body.Close()
				if response.StatusCode != 200 {
					t.Fatalf("%s, %v: a request is answered %d", name, after, response.StatusCode)
				}
				return response.Header.Get("Seen-Cert")
			}
			before := ask()
			if !strings.HasPrefix(before, "By="+idOfServer+";Hash=") || strings.Contains(before, "URI=") {
				t.Errorf("%s: the workload sees %q", name, before)
			}
			m.plane.InForce.Store(shows(engine.filters, func(h *mesh.HTTPManager) { h.ClientCert, h.ClientCertDetails.URI = after, true }))
			begun := time.Now()
			for dialled.Load() == 1 && time.Since(begun) < nettest.Patience {
				if got := ask(); dialled.Load() == 1 && got != before {
					t.Errorf("%s, %v: on the connection of before the workload sees %q", name, after, got)
				}
			}
			want := ""
			if after == mesh.AppendClientCert {
				want = before + ";URI=" + idOfClient
			}
			if got := ask(); got != want || dialled.Load() < 2 { // the client may have made a third one already
				t.Errorf("%s, %v: over connection %d the workload sees %q, want %q", name, after, dialled.Load(), got, want)
			}
			transport.CloseIdleConnections()
		}
	}
}
