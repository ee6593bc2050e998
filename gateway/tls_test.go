package gateway

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/controlplane"
	"github.com/pillion-proxy/pillion/internal/controlplane/pushtest"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/identity"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/secure/securetest"
	"github.com/pillion-proxy/pillion/internal/serve"
	"github.com/pillion-proxy/pillion/internal/serve/servetest"
	"github.com/pillion-proxy/pillion/internal/wire"
	"github.com/pillion-proxy/pillion/internal/xds"
)

// Names in the push of pushtest.Gateway.
const (
	shop, mutual, passed = "shop.example.test", "mutual.example.test", "pass.example.test"
	certificate, roots   = "kubernetes://shop-cert", "kubernetes://shop-cert-cacert"
	nginx                = "outbound|80||nginx-service.default.svc.cluster.local"
	reviews              = "outbound|9080||reviews.default.svc.cluster.local"
	reviewsTLS           = "outbound|443||reviews.default.svc.cluster.local"
)

// pushed is a gateway that a recorded push of istiod configures. Its servers are at ports of the pod.
type pushed struct {
	*servetest.Rig
	*controlplane.Store
	at       uint16
	clock    atomic.Int64 // seconds by which the store's clock is ahead
	issuer   *securetest.Authority
	stranger *securetest.Authority
}

func (*pushed) Identity() *identity.Identity { return nil }

// newPushed starts a gateway at a port of the push.
func newPushed(t *testing.T, at uint16) *pushed {
	t.Helper()
	p := &pushed{at: at, issuer: securetest.New(t, "root of partners"), stranger: securetest.New(t, "root of strangers")}
	store, err := controlplane.NewStore(controlplane.StoreConfig{
		Log: slog.New(slog.DiscardHandler), Now: func() time.Time { return time.Now().Add(time.Duration(p.clock.Load()) * time.Second) },
	})
	if err != nil {
		t.Fatal(err)
	}
	p.Store = store
	for _, u := range pushtest.Gateway() {
		p.accepts(t, u)
	}
	p.Rig = servetest.NewRig(t, servetest.Place{Port: at, New: func(t testing.TB, parts servetest.Parts) servetest.Role {
		proxy, err := New(Config{Poller: parts.Poller, Flows: parts.Flows, Settings: parts.Settings, HTTP: parts.HTTP, Mesh: p})
		if err != nil {
			t.Fatal(err)
		}
		return proxy
	}}, servetest.Defaults())
	p.endpoint(t, nginx, 9001)
	p.endpoint(t, reviews, 9002)
	p.endpoint(t, reviewsTLS, 9003)
	return p
}

func (p *pushed) accepts(t testing.TB, u xds.Update) {
	t.Helper()
	if outcome := p.Update(u); len(outcome.Rejected) > 0 {
		t.Fatalf("rejected: %v", outcome.Rejected)
	}
	if p.Rig != nil {
		p.Wake()
	}
}

// giveUp lets the time pass that the store waits for secrets.
func (p *pushed) giveUp() {
	p.clock.Add(60)
	p.Tick()
	p.Wake()
}

// endpoint makes a port of the pod the only endpoint of a cluster. It is not one of the mesh, so it is plain.
func (p *pushed) endpoint(t testing.TB, cluster string, port uint16) {
	t.Helper()
	b := wire.AppendVarint(wire.AppendString(nil, 2, p.Address.String()), 3, uint64(port))
	for _, number := range []int{1, 1, 1, 2, 2} { // socket_address, address, endpoint, lb_endpoints, endpoints
		b = wire.AppendBytes(nil, number, b)
	}
	p.accepts(t, xds.Update{Type: xds.Endpoints, Resources: []xds.Resource{{
		Name: cluster, TypeURL: xds.Endpoints.URL(), Value: append(wire.AppendString(nil, 1, cluster), b...),
	}}})
}

func (p *pushed) secret(t testing.TB, name string, b []byte) {
	t.Helper()
	p.accepts(t, xds.Update{Type: xds.Secrets, Resources: []xds.Resource{{Name: name, TypeURL: xds.Secrets.URL(), Value: b}}})
}

// secrets delivers the certificate and the roots, and returns the certificate.
func (p *pushed) secrets(t testing.TB) *tls.Certificate {
	t.Helper()
	c := p.issuer.ECDSA(t, shop, mutual)
	p.secret(t, certificate, securetest.Secret(t, certificate, c))
	p.secret(t, roots, securetest.RootsSecret(roots, p.issuer.Roots, nil))
	return c
}

// changed returns the configuration in force with changed filter chains.
func (p *pushed) changed(change func(*mesh.Listener)) *mesh.Snapshot {
	before := p.Snapshot()
	l := *before.Bound(p.at)
	l.Chains = nil
	for _, c := range before.Bound(p.at).Chains {
		chain := *c
		l.Chains = append(l.Chains, &chain)
	}
	change(&l)
	if err := l.Index(); err != nil {
		panic(err)
	}
	edit := before.Edit()
	edit.SetListener(l.Name, &l)
	next, _ := edit.Snapshot()
	return next
}

// handshake connects with TLS, from any goroutine.
func (p *pushed) handshake(config *tls.Config) (*tls.Conn, error) {
	raw, err := p.Client.Dial("tcp4", p.At(p.at).String(), nettest.Patience)
	if err != nil {
		return nil, err
	}
	raw.SetDeadline(time.Now().Add(nettest.Patience))
	conn := tls.Client(raw, config)
	if err := conn.Handshake(); err != nil {
		raw.Close()
		return nil, err
	}
	return conn, nil
}

// partner is the configuration of a client that asks for a name and has a certificate, or not.
func (p *pushed) partner(name string, c *tls.Certificate) *tls.Config {
	config := &tls.Config{ServerName: name, RootCAs: p.issuer.Roots.Pool, InsecureSkipVerify: true}
	if c != nil {
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return c, nil }
	}
	return config
}

// get sends a request over HTTP/1 and returns the status and the body.
func get(conn net.Conn, host string) (status int, body string, err error) {
	if _, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: "+host+"\r\n\r\n"); err != nil {
		return 0, "", err
	}
	response, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return 0, "", err
	}
	b, err := io.ReadAll(response.Body)
	return response.StatusCode, string(b), err
}

// Nor has one that leaves before TLS, or after the handshake, as a browser does with a connection that it did not need.
func TestAConnectionOfTLSWithoutARequestIsNotRefused(t *testing.T) {
	p := newPushed(t, 443)
	p.secrets(t)
	bare := p.Dial(t, p.At(p.at))
	bare.CloseWrite()
	servetest.ExpectEnd(t, bare, io.EOF)
	if got := p.Await(t); got.Reason != flow.Closed {
		t.Errorf("before TLS: %v, %v", got.Reason, got.Err)
	}
	conn, err := p.handshake(p.partner(shop, nil))
	if err != nil {
		t.Fatal(err)
	}
	conn.CloseWrite()
	servetest.ExpectEnd(t, conn, io.EOF)
	if got := p.Await(t); got.Reason != flow.Closed {
		t.Errorf("after the handshake: %v, %v", got.Reason, got.Err)
	}
}

// A certificate that is missing closes its servers, and the reason names it. They are open when it has come.
func TestServersWaitForTheirCertificates(t *testing.T) {
	p := newPushed(t, 443)
	serveAt(t, p.Rig, 9001)
	if p.Snapshot() != nil && p.Snapshot().Bound(443) != nil {
		t.Error("the listener is in force before its certificates")
	}
	p.giveUp()
	if _, err := p.handshake(p.partner(shop, nil)); err == nil {
		t.Error("the handshake succeeds without a certificate")
	}
	if got := p.Await(t); got.Reason != flow.TLSNoIdentity || !strings.Contains(got.Err.Error(), certificate) {
		t.Errorf("%s: %v", got.Reason, got.Err)
	}
	if p.Snapshot().Bound(80) == nil || p.Snapshot().Bound(31400) == nil {
		t.Error("other listeners are not in force")
	}
	p.secrets(t)
	conn, err := p.handshake(p.partner(shop, nil))
	if err != nil {
		t.Fatal(err)
	}
	if status, body, err := get(conn, shop); status != 200 || body != "9001" || err != nil {
		t.Errorf("%d, %q, %v", status, body, err)
	}
}

// serveAt starts a server that answers with its port.
func serveAt(t *testing.T, r *servetest.Rig, port uint16) { (&rig{Rig: r}).serve(t, port) }

// Clients meet the server whose name they ask for, by its mode. Each failure has its reason.
func TestClientsMeetTheServerWhoseNameTheyAskFor(t *testing.T) {
	p := newPushed(t, 443)
	serveAt(t, p.Rig, 9001)
	p.secrets(t)
	good := p.issuer.ECDSA(t, "partner.example")
	revoked := p.issuer.Leaf(t, "", func(c *x509.Certificate) { c.SerialNumber.SetInt64(99) })
	p.secret(t, roots, securetest.RootsSecret(roots, p.issuer.Roots, p.issuer.Revoke(t, revoked)))
	for name, test := range map[string]struct {
		sni    string
		client *tls.Certificate
		want   flow.Reason // of a connection that is not served
	}{
		"SIMPLE": {shop, nil, ""},
		"SIMPLE, with a certificate that is not asked for": {shop, good, ""},
		"a name in upper case":                             {"SHOP.Example.TEST", nil, ""},
		"MUTUAL":                                           {mutual, good, ""},
		"MUTUAL without a certificate":                     {mutual, nil, flow.TLSNoCertificate},
		"MUTUAL in upper case, without one":                {"MUTUAL.example.test", nil, flow.TLSNoCertificate},
		"a certificate of another CA":                      {mutual, p.stranger.ECDSA(t, "partner.example"), flow.TLSUnknownRoot},
		"an expired certificate":                           {mutual, p.issuer.Leaf(t, "", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }), flow.TLSExpired},
		"a revoked certificate":                            {mutual, revoked, flow.TLSPeerRefused},
		"an unknown name":                                  {"unknown.example.test", nil, flow.MeshRefused},
		"a name below a server's":                          {"a." + shop, nil, flow.MeshRefused},
		"no name":                                          {"", nil, flow.MeshRefused},
		"an address, which clients do not send":            {"192.0.2.1", nil, flow.MeshRefused},
	} {
		t.Run(name, func(t *testing.T) {
			conn, err := p.handshake(p.partner(test.sni, test.client))
			host := strings.ToLower(test.sni)
			status, body := 0, ""
			if err == nil {
				status, body, err = get(conn, host)
			}
			if conn != nil {
				defer conn.Close()
			}
			switch got := p.Await(t); {
			case test.want == "" && (err != nil || status != 200 || body != "9001" || got.Cluster != nginx):
				t.Errorf("%d, %q, %v; the record is %+v", status, body, err, got)
			case test.want != "" && (err == nil || got.Reason != test.want || got.Request):
				t.Errorf("status %d, error %v, reason %s (%v); want %s", status, err, got.Reason, got.Err, test.want)
			}
		})
	}
}

// The chain that the name in the handshake has chosen routes the hosts of its own server only, in both versions of HTTP: a
// client without a certificate does not reach the hosts of the server that asks for one.
func TestAChainRoutesTheHostsOfItsOwnServerOnly(t *testing.T) {
	p := newPushed(t, 443)
	serveAt(t, p.Rig, 9001)
	p.secrets(t)
	for _, version := range []string{"HTTP/1.1", "HTTP/2.0"} {
		transport := &http.Transport{ForceAttemptHTTP2: version == "HTTP/2.0", DialTLSContext: func(context.Context, string, string) (net.Conn, error) {
			config := p.partner(shop, nil)
			if version == "HTTP/2.0" {
				config.NextProtos = []string{"h2", "http/1.1"}
			}
			return p.handshake(config)
		}}
		for host, want := range map[string]int{shop: 200, shop + ":443": 200, mutual: 404, "MUTUAL.example.test": 404, passed: 404, "unknown.test": 404} {
			request, err := http.NewRequest("GET", "https://"+shop+"/", nil)
			if err != nil {
				t.Fatal(err)
			}
			request.Host = host
			response, err := transport.RoundTrip(request)
			if err != nil {
				t.Fatal(err)
			}
			io.Copy(io.Discard, response.Body)
			response.Body.Close()
			if got := p.Await(t); response.StatusCode != want || response.Proto != version || (got.Cluster == nginx) != (want == 200) {
				t.Errorf("%s %s: %d, %s; the record is %+v", version, host, response.StatusCode, response.Proto, got)
			}
		}
		transport.CloseIdleConnections()
	}
}

// fixed is a configuration that tests change by themselves.
type fixed struct {
	*controlplane.Store
	snapshot atomic.Pointer[mesh.Snapshot]
	recorder serve.Recorder
}

func (f *fixed) Snapshot() *mesh.Snapshot   { return f.snapshot.Load() }
func (*fixed) Identity() *identity.Identity { return nil }

// start starts a gateway with the configuration.
func (f *fixed) start(t *testing.T, port uint16) *servetest.Rig {
	t.Helper()
	return servetest.NewRig(t, servetest.Place{Port: port, New: func(t testing.TB, parts servetest.Parts) servetest.Role {
		proxy, err := New(Config{Poller: parts.Poller, Flows: parts.Flows, Settings: parts.Settings, HTTP: parts.HTTP, Mesh: f, Recorder: f.recorder})
		if err != nil {
			t.Fatal(err)
		}
		return proxy
	}}, servetest.Defaults())
}

// follow starts a gateway with the configuration of p, which the caller changes by itself, and serves a request of a client with
// a certificate or without one. The client holds the next request.
func (p *pushed) follow(t *testing.T, f *fixed, name string, c *tls.Certificate) (*servetest.Rig, *tls.Conn) {
	t.Helper()
	f.Store = p.Store
	if f.snapshot.Load() == nil {
		f.snapshot.Store(p.Snapshot())
	}
	r := f.start(t, 443)
	serveAt(t, r, 9001)
	p.Rig.Discard()
	conn := tls.Client(r.Dial(t, r.At(443)), p.partner(name, c))
	if status := hold(t, conn, bufio.NewReader(conn), name); status != 200 {
		t.Fatalf("status %d", status)
	}
	r.Await(t)
	return r, conn
}

// wantRefused ends the request that the client holds, and checks that it reaches no server and that its connection ends.
func wantRefused(t *testing.T, r *servetest.Rig, conn *tls.Conn) {
	t.Helper()
	servetest.Send(t, conn, "\r\n")
	response, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	if got := r.Await(t); response.StatusCode != 404 || !response.Close || got.Reason != flow.MeshRefused || got.UpstreamEnd.IsValid() {
		t.Errorf("status %d, close %v; the record is %+v", response.StatusCode, response.Close, got)
	}
}

// A client that has shown no certificate does not go on where the server asks for one now: its next request is refused, also
// one that has begun, and its connection ends.
func TestAServerThatBecomesMutualDrainsItsConnections(t *testing.T) {
	p := newPushed(t, 443)
	p.secrets(t)
	f := &fixed{}
	r, conn := p.follow(t, f, shop, nil)
	f.snapshot.Store(p.changed(func(l *mesh.Listener) {
		asking := *l.Chains[0].TLS
		asking.Roots, asking.RequireClient = roots, true
		l.Chains[0].TLS = &asking
	}))
	r.Wake()
	wantRefused(t, r, conn)
	if _, _, err := get(tls.Client(r.Dial(t, r.At(443)), p.partner(shop, nil)), shop); err == nil {
		t.Error("a new client without a certificate is served")
	}
}

// A connection whose filter chain is gone, while its listener stays, is refused likewise.
func TestAServerThatIsRemovedRefusesItsConnections(t *testing.T) {
	p := newPushed(t, 443)
	p.secrets(t)
	f := &fixed{}
	r, conn := p.follow(t, f, shop, nil)
	f.snapshot.Store(p.changed(func(l *mesh.Listener) { l.Chains = l.Chains[1:] }))
	r.Wake()
	wantRefused(t, r, conn)
}

// A push that shows the certificates of clients in another way loses no request: a connection shows its client as it began, and
// ends in order, and the next one follows the configuration in force. The push comes between two requests, in the middle of one, or
// before the first.
func TestAConnectionShowsItsClientAsItBegan(t *testing.T) {
	p := newPushed(t, 443)
	p.secrets(t)
	shows := func(action mesh.ClientCertAction, uri bool) *mesh.Snapshot {
		return p.changed(func(l *mesh.Listener) {
			for _, c := range l.Chains {
				h := &mesh.HTTPManager{}
				*h = *c.HTTP
				h.ClientCert, h.ClientCertDetails = action, mesh.ClientCertDetails{URI: uri}
				c.HTTP = h
			}
		})
	}
	f := &fixed{Store: p.Store}
	f.snapshot.Store(p.Snapshot())
	r := f.start(t, 443)
	r.Discard()
	(&rig{Rig: r}).handle(t, 9001, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Seen-Cert", strings.Join(r.Header["X-Forwarded-Client-Cert"], "; "))
	})
	const claim = "URI=spiffe://a"
	own := p.issuer.Leaf(t, "spiffe://b", nil)
	hash := fmt.Sprintf("Hash=%x", sha256.Sum256(own.Certificate[0]))
	push := func(s *mesh.Snapshot) { f.snapshot.Store(s); r.Wake() }
	for _, test := range []struct {
		before, after mesh.ClientCertAction
		first, next   string
	}{
		{mesh.ForwardClientCert, mesh.ReplaceClientCert, claim, hash + ";URI=spiffe://b"},
		{mesh.ReplaceClientCert, mesh.ReplaceClientCert, hash, hash + ";URI=spiffe://b"},
		{mesh.AppendClientCert, mesh.RemoveClientCert, claim + "," + hash, ""},
	} {
		begin, change := shows(test.before, false), shows(test.after, true)
		for _, two := range []bool{false, true} {
			name := fmt.Sprintf("%v, then %v, HTTP/2 %v", test.before, test.after, two)
			push(begin)
			var dialled atomic.Int32
			transport := &http.Transport{ForceAttemptHTTP2: two, DialTLSContext: func(context.Context, string, string) (net.Conn, error) {
				dialled.Add(1)
				config := p.partner(mutual, own)
				if two {
					config.NextProtos = []string{"h2"}
				}
				return tls.Client(r.Dial(t, r.At(443)), config), nil
			}}
			ask := func() string {
				request, err := http.NewRequest("GET", "https://"+mutual+"/", nil)
				if err != nil {
					t.Fatal(err)
				}
				request.Header.Set("X-Forwarded-Client-Cert", claim)
				response, err := transport.RoundTrip(request)
				if err != nil {
					t.Fatalf("%s: %v", name, err)
				}
				response.Body.Close()
				if response.StatusCode != 200 {
					t.Fatalf("%s: a request is answered %d", name, response.StatusCode)
				}
				return response.Header.Get("Seen-Cert")
			}
			if got := ask(); got != test.first {
				t.Errorf("%s: the server sees %q, want %q", name, got, test.first)
			}
			push(change)
			for begun := time.Now(); time.Since(begun) < nettest.Patience; {
				got := ask()
				if dialled.Load() > 1 {
					break
				} else if got != test.first {
					t.Errorf("%s: on the connection of before the server sees %q, want %q", name, got, test.first)
				}
			}
			if got := ask(); got != test.next || dialled.Load() != 2 {
				t.Errorf("%s: over connection %d the server sees %q, want %q", name, dialled.Load(), got, test.next)
			}
			transport.CloseIdleConnections()
		}
		for _, when := range []string{"in a request", "after the handshake"} {
			push(begin)
			conn := tls.Client(r.Dial(t, r.At(443)), p.partner(mutual, own))
			read := bufio.NewReader(conn)
			begun := "GET / HTTP/1.1\r\nHost: " + mutual + "\r\n"
			if when == "in a request" {
				hold(t, conn, read, mutual)
				begun = ""
			} else if err := conn.Handshake(); err != nil {
				t.Fatal(err)
			}
			push(change)
			servetest.Send(t, conn, begun+"X-Forwarded-Client-Cert: "+claim+"\r\n\r\n")
			response, err := http.ReadResponse(read, nil)
			if err != nil {
				t.Fatal(err)
			}
			if got := response.Header.Get("Seen-Cert"); response.StatusCode != 200 || !response.Close || got != test.first {
				t.Errorf("%v, then %v %s: %d, close %v, and the server sees %q, want %q", test.before, test.after, when, response.StatusCode, response.Close, got, test.first)
			}
			servetest.ExpectEnd(t, conn, io.EOF)
		}
	}
}

// sessions keeps what a client may resume, whatever the name is that it asks for.
type sessions struct {
	last atomic.Pointer[tls.ClientSessionState]
}

func (s *sessions) Get(string) (*tls.ClientSessionState, bool) {
	last := s.last.Load()
	return last, last != nil
}

func (s *sessions) Put(_ string, state *tls.ClientSessionState) { s.last.Store(state) }

// The session of one server opens no other one: servers give no session to resume.
func TestSessionsAreNotResumed(t *testing.T) {
	p := newPushed(t, 443)
	serveAt(t, p.Rig, 9001)
	p.secrets(t)
	p.Discard()
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		kept := &sessions{}
		for _, name := range []string{shop, shop, mutual} {
			config := p.partner(name, nil)
			config.ClientSessionCache, config.MaxVersion = kept, version
			resumed, status := false, 0
			conn, err := p.handshake(config)
			if err == nil {
				resumed = conn.ConnectionState().DidResume
				status, _, err = get(conn, name)
				conn.Close()
			}
			if resumed || kept.last.Load() != nil || (status == 200) != (name == shop) {
				t.Errorf("%s with version %#x: resumed %v, a session is kept: %v, status %d, error %v", name, version, resumed, kept.last.Load() != nil, status, err)
			}
		}
	}
}

// TLS that passes goes to the cluster of the name that its client asks for, and other names and plain bytes are refused.
func TestTLSThatPassesGoesByItsServerName(t *testing.T) {
	p := newPushed(t, 8443)
	p.secrets(t) // without them the first configuration waits
	inner := p.issuer.ECDSA(t, passed)
	conns := p.Rig.Listen(t, "9003")
	served := make(chan error, 1)
	go func() {
		conn := <-conns
		server := tls.Server(conn, &tls.Config{Certificates: []tls.Certificate{*inner}})
		_, err := io.Copy(server, server)
		served <- errors.Join(err, server.CloseWrite(), conn.Close())
	}()
	conn, err := p.handshake(&tls.Config{ServerName: strings.ToUpper(passed), RootCAs: p.issuer.Roots.Pool})
	if err != nil {
		t.Fatal(err)
	}
	servetest.Send(t, conn, "inside")
	servetest.Expect(t, conn, "inside")
	if err := conn.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, conn); err != nil {
		t.Error(err)
	}
	conn.Close()
	if err := <-served; err != nil {
		t.Error(err)
	}
	if got := p.Await(t); got.Cluster != reviewsTLS || got.Protocol != flow.TLS || got.Reason != flow.Closed {
		t.Errorf("the record is %+v", got)
	}
	for _, name := range []string{shop, ""} {
		if _, err := p.handshake(p.partner(name, nil)); err == nil {
			t.Errorf("the handshake for %q succeeds", name)
		}
		if got := p.Await(t); got.Reason != flow.MeshRefused || got.UpstreamEnd.IsValid() {
			t.Errorf("%q: the record is %+v", name, got)
		}
	}
	plain := p.Dial(t, p.At(8443))
	servetest.Send(t, plain, "GET / HTTP/1.1\r\nHost: "+passed+"\r\n\r\n")
	servetest.ExpectEnd(t, plain, syscall.ECONNRESET)
	if got := p.Await(t); got.Reason != flow.MeshRefused || got.UpstreamEnd.IsValid() {
		t.Errorf("plain: the record is %+v", got)
	}
}

// While certificates and roots change again and again, no handshake and no request is lost, and the last certificate is the
// one that new connections get.
func TestCertificatesRotateUnderLoad(t *testing.T) {
	const clients, requests, rotations = 4, 50, 20
	p := newPushed(t, 443)
	serveAt(t, p.Rig, 9001)
	p.secrets(t)
	p.Discard()
	partner := p.issuer.ECDSA(t, "partner.example")
	var load sync.WaitGroup
	var handshakes atomic.Int64
	for i := range clients {
		kept, err := p.handshake(p.partner(shop, nil))
		if err != nil {
			t.Fatal(err)
		}
		name := []string{shop, mutual}[i%2]
		load.Go(func() {
			defer kept.Close()
			for range requests {
				conn, err := p.handshake(p.partner(name, partner))
				if err != nil {
					t.Error(err)
					return
				}
				for c, host := range map[net.Conn]string{conn: name, kept: shop} {
					if status, _, err := get(c, host); status != 200 || err != nil {
						t.Errorf("%s: %d, %v", host, status, err)
					}
				}
				handshakes.Add(1)
				conn.Close()
			}
		})
	}
	var last *tls.Certificate
	for i := range rotations {
		nettest.Eventually(t, "requests between two rotations", func() bool { return handshakes.Load() > int64(i*clients*requests/rotations/2) || t.Failed() })
		last = p.secrets(t)
	}
	load.Wait()
	conn, err := p.handshake(p.partner(shop, nil))
	if err != nil || !conn.ConnectionState().PeerCertificates[0].Equal(last.Leaf) {
		t.Errorf("error %v, or another certificate than the last one", err)
	}
}

// A flood of names without a server costs a connection each, and leaves nothing behind.
func TestAFloodOfUnknownNamesIsRefused(t *testing.T) {
	const names, lanes = 2000, 8
	p := newPushed(t, 443)
	serveAt(t, p.Rig, 9001)
	p.secrets(t)
	p.Discard()
	var flood sync.WaitGroup
	for lane := range lanes {
		flood.Go(func() {
			for i := range names / lanes {
				if _, err := p.handshake(p.partner(fmt.Sprintf("n%d-%d.example.test", lane, i), nil)); err == nil {
					t.Error("a handshake for an unknown name succeeds")
				}
			}
		})
	}
	conn, err := p.handshake(p.partner(shop, nil))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for range 20 {
		if status, _, err := get(conn, shop); status != 200 || err != nil {
			t.Errorf("%d, %v", status, err)
		}
	}
	flood.Wait()
	p.AwaitListed(t, 1)
}

// withCatchAll starts a gateway whose server for mutual asks for certificates, and whose other one is for all names.
func withCatchAll(t *testing.T, p *pushed) *servetest.Rig {
	t.Helper()
	f := &fixed{Store: p.Store}
	f.snapshot.Store(p.changed(func(l *mesh.Listener) { l.Chains[0].Match.ServerNames = nil }))
	return f.start(t, 443)
}

// A client cannot hide the name that it asks for from the choice of its filter chain: crypto/tls accepts a ClientHello, or a name,
// that the sniffer does not.
func TestAServerNameCannotBeHidden(t *testing.T) {
	p := newPushed(t, 443)
	p.secrets(t)
	r := withCatchAll(t, p)
	serveAt(t, r, 9001)
	long := make([]string, 80) // 20 KiB
	for i := range long {
		long[i] = fmt.Sprintf("p%d-%s", i, strings.Repeat("x", 240))
	}
	for _, test := range []struct {
		name      string
		protocols []string
		want      flow.Reason
	}{
		{"any.example.test", nil, flow.Completed},
		{"any.example.test", long, flow.TLSFailed},
		{mutual, long, flow.TLSFailed},
		{mutual + "\x00", nil, flow.TLSFailed},
		{mutual + "\r\n", nil, flow.TLSFailed},
		{mutual + " ", nil, flow.TLSFailed},
		{"\xff" + mutual, nil, flow.TLSFailed},
	} {
		config := p.partner(test.name, nil)
		config.NextProtos = test.protocols
		conn := tls.Client(r.Dial(t, r.At(443)), config)
		if status, _, err := get(conn, shop); (err == nil) != (test.want == flow.Completed) {
			t.Errorf("%q: status %d", test.name, status)
		}
		if got := r.Await(t); got.Reason != test.want || got.Request != (test.want == flow.Completed) {
			t.Errorf("%q: %s (%v)", test.name, got.Reason, got.Err)
		}
	}
}

// serverNames returns a ClientHello with a server_name extension of other names.
func serverNames(t *testing.T, names ...string) []byte {
	t.Helper()
	client, server := net.Pipe()
	defer server.Close()
	go tls.Client(client, &tls.Config{ServerName: "x.test", InsecureSkipVerify: true}).Handshake()
	record := make([]byte, 1<<14)
	n, err := server.Read(record)
	if err != nil {
		t.Fatal(err)
	}
	vector := func(bytes int, content []byte) []byte {
		size := make([]byte, 8)
		binary.BigEndian.PutUint64(size, uint64(len(content)))
		return append(size[8-bytes:], content...)
	}
	entry := func(name string) []byte { return append([]byte{0}, vector(2, []byte(name))...) }
	extension := func(list []byte) []byte { return append([]byte{0, 0}, vector(2, vector(2, list))...) }
	var list []byte
	for _, name := range names {
		list = append(list, entry(name)...)
	}
	hello := record[5+4 : n]
	before, after, found := bytes.Cut(hello, extension(entry("x.test")))
	if !found {
		t.Fatal("the ClientHello has another server_name extension")
	}
	at := 2 + 32 // version and random
	at += 1 + int(before[at])
	at += 2 + int(binary.BigEndian.Uint16(before[at:]))
	at += 1 + int(before[at])
	extensions := slices.Concat(before[at+2:], extension(list), after)
	message := append([]byte{1}, vector(3, slices.Concat(before[:at], vector(2, extensions)))...)
	return append([]byte{22, 3, 1}, vector(2, message)...)
}

// A ClientHello with a name that clients must not send is not answered, not even by the server for all names.
func TestHostileServerNamesMeetNoServer(t *testing.T) {
	p := newPushed(t, 443)
	p.secrets(t)
	r := withCatchAll(t, p)
	for name, names := range map[string][]string{
		"a dot at the end":         {mutual + "."},
		"two names":                {shop, mutual},
		"two names, the other way": {mutual, shop},
		"an empty name":            {""},
		"an empty name before one": {"", mutual},
	} {
		t.Run(name, func(t *testing.T) {
			conn := r.Dial(t, r.At(443))
			servetest.Send(t, conn, string(serverNames(t, names...)))
			answer := make([]byte, 1)
			if n, err := conn.Read(answer); n == 1 && answer[0] != 21 || n == 0 && !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("answered by a record of type %d, error %v", answer[0], err)
			}
			conn.Close()
			if got := r.Await(t); got.Request || got.Reason != flow.TLSFailed {
				t.Errorf("the record is %+v", got)
			}
		})
	}
}

// Where the server name of a client chooses the cluster (AUTO_PASSTHROUGH), it reaches those of services only, also if the filter
// chain takes all server names.
func TestAServerNameChoosesServicesOnly(t *testing.T) {
	r := newRig(t)
	conns := r.Listen(t, "82")
	const service = "outbound_.82_._.web"
	names := map[string]bool{service: true, "outbound_.83_._.web": false, "PassthroughCluster": false, "web": false, "": false, "x.outbound_.82_._.web": false}
	for name := range names {
		if name != "outbound_.83_._.web" && name != "" {
			r.cluster(name, 82)
		}
	}
	r.push(func(e *mesh.Edit) {
		l := &mesh.Listener{
			Name: name, Direction: mesh.Outbound, Addresses: []netip.AddrPort{netip.MustParseAddrPort("0.0.0.0:8080")},
			Filters: []mesh.ListenerFilter{{Kind: mesh.TLSInspector}},
			Chains:  []*mesh.FilterChain{{Match: mesh.ChainMatch{Transport: "tls"}, ClusterIsSNI: true, TCP: &mesh.TCPProxy{Clusters: []mesh.TCPCluster{{Name: "web", Weight: 1}}}}},
		}
		if err := l.Index(); err != nil {
			t.Error(err)
		}
		e.SetListener(name, l)
	})
	for sni, passes := range names {
		raw := r.Dial(t, r.At(port))
		conn := tls.Client(raw, &tls.Config{ServerName: sni, InsecureSkipVerify: true})
		ended := make(chan error)
		go func() { ended <- conn.Handshake() }()
		if passes {
			server := servetest.Take(t, conns)
			first := make([]byte, 1)
			if _, err := io.ReadFull(server, first); err != nil || first[0] != 22 {
				t.Errorf("%q: the server reads %x, %v", sni, first, err)
			}
			server.Close()
		}
		if err := <-ended; err == nil {
			t.Errorf("%q: a handshake succeeds", sni)
		}
		raw.Close()
		if got := r.Await(t); (got.Reason == flow.MeshRefused) == passes || got.Upstream.IsValid() != passes {
			t.Errorf("%q: the record has %v, %v, upstream %v", sni, got.Reason, got.Err, got.Upstream)
		}
		if len(conns) > 0 {
			t.Errorf("%q: a server was dialled", sni)
		}
	}
}
