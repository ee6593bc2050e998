package inbound

import (
	"bufio"
	"bytes"
	"context"
	crand "crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/identity"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/secure/securetest"
	"github.com/pillion-proxy/pillion/internal/serve/servetest"
)

// push puts a mode in force and wakes the connections, as the agent does.
func (m *meshRig) push(t *testing.T, mode string) {
	t.Helper()
	m.plane.InForce.Store(snapshotOf(t, modes[mode], !strings.HasPrefix(mode, "DISABLE")))
	m.Wake()
}

// client1 is a client of HTTP/1.1 with one connection.
type client1 struct {
	net.Conn
	in *bufio.Reader
}

func (m *meshRig) client1(t *testing.T, secured bool) *client1 {
	t.Helper()
	var conn net.Conn = m.Dial(t, m.At(81))
	if secured {
		var err error
		if conn, err = m.handshake(t, conn, m.client, "istio-http/1.1", "istio", "http/1.1"); err != nil {
			t.Fatal(err)
		}
	}
	return &client1{conn, bufio.NewReader(conn)}
}

// request returns the status of a response, and whether it announces the end of the connection.
func (c *client1) request(t *testing.T) (status int, closes bool) {
	t.Helper()
	io.WriteString(c, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
	response, err := http.ReadResponse(c.in, nil)
	if err != nil {
		t.Fatal(err)
	}
	io.Copy(io.Discard, response.Body)
	return response.StatusCode, response.Close
}

func (c *client1) expect(t *testing.T, status int, closes bool) {
	t.Helper()
	if got, closed := c.request(t); got != status || closed != closes {
		t.Errorf("status %d, announces the close %v; want %d, %v", got, closed, status, closes)
	}
}

// ends reports whether the connection ends in order.
func (c *client1) ends() error {
	if b, err := c.in.ReadByte(); err != io.EOF {
		return fmt.Errorf("read %d, %v", b, err)
	}
	return nil
}

// gone is the mode that no longer allows connections with or without TLS.
func gone(secured bool) string {
	if secured {
		return "DISABLE, auto"
	}
	return "STRICT, auto"
}

// A push that no longer allows the mode of a connection lets its requests end, and then the connection.
func TestAPushRetiresConnectionsOfAnotherMode(t *testing.T) {
	for _, secured := range []bool{false, true} {
		m := newMeshRig(t, "PERMISSIVE, auto")
		busy, idle, kept := m.client1(t, secured), m.client1(t, secured), m.client1(t, secured)
		for _, c := range []*client1{busy, idle, kept} {
			c.expect(t, 200, false)
			m.Await(t)
		}
		m.push(t, gone(secured))
		busy.expect(t, 200, true)
		if err := busy.ends(); err != nil {
			t.Errorf("TLS %v: after the last response: %v", secured, err)
		}
		m.push(t, "PERMISSIVE, auto")
		kept.expect(t, 200, false)
		m.push(t, gone(secured))
		for _, c := range []*client1{idle, kept} {
			if err := c.ends(); err != nil {
				t.Errorf("TLS %v: an idle connection does not end: %v", secured, err)
			}
		}
		m.push(t, "PERMISSIVE, auto")
		allowed := m.client1(t, !secured)
		allowed.expect(t, 200, false)
		m.push(t, gone(secured))
		allowed.expect(t, 200, false)
	}
}

// New connections obey at once.
func TestNewConnectionsObeyAPush(t *testing.T) {
	m := newMeshRig(t, "PERMISSIVE, auto")
	for range 3 {
		m.push(t, "STRICT, auto")
		if got := m.outcome(t, plainHTTP); got != closed {
			t.Errorf("without TLS to STRICT: %s", got)
		}
		if got := m.outcome(t, tlsOfHTTP); got != mutual {
			t.Errorf("TLS to STRICT: %s", got)
		}
		m.push(t, "PERMISSIVE, auto")
		if got := m.outcome(t, plainHTTP); got != carried {
			t.Errorf("without TLS to PERMISSIVE: %s", got)
		}
	}
}

// A filter chain that is refused refuses the next request: it may have a policy that is not understood.
func TestARefusedChainBindsTheNextRequest(t *testing.T) {
	m := newMeshRig(t, "PERMISSIVE, auto")
	c := m.client1(t, true)
	c.expect(t, 200, false)
	var refused []*mesh.FilterChain
	for _, own := range modes["PERMISSIVE, auto"] {
		changed := *own
		changed.Refused = true
		refused = append(refused, &changed)
	}
	m.plane.InForce.Store(snapshotOf(t, refused, true))
	if status, _ := c.request(t); status != http.StatusNotFound {
		t.Errorf("status %d", status)
	}
}

// Bytes of an unknown protocol go on for a while: their peers cannot be asked to close.
func TestAPushDoesNotCutOpaqueBytes(t *testing.T) {
	m := newMeshRig(t, "PERMISSIVE, auto")
	conn := m.Dial(t, m.At(81))
	servetest.Send(t, conn, "\x00before")
	servetest.Expect(t, conn, "\x00before")
	m.push(t, "STRICT, auto")
	servetest.Send(t, conn, "during")
	servetest.Expect(t, conn, "during")
	m.push(t, "PERMISSIVE, auto")
	servetest.Send(t, conn, "after")
	servetest.Expect(t, conn, "after")
	conn.CloseWrite()
	servetest.ExpectEnd(t, conn, io.EOF)
	if got := m.Await(t); got.Reason != flow.Closed {
		t.Errorf("%v", got.Reason)
	}
}

// echoHTTP answers requests of both versions with their bodies.
func (m *meshRig) echoHTTP(t *testing.T, port string) {
	t.Helper()
	conns, done := m.Listen(t, port), make(chan struct{})
	server := &http.Server{Protocols: new(http.Protocols), Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		w.Write(body)
	})}
	server.Protocols.SetHTTP1(true)
	server.Protocols.SetUnencryptedHTTP2(true)
	var serving sync.WaitGroup
	serving.Go(func() { server.Serve(&connListener{conns, done}) })
	t.Cleanup(func() { close(done); server.Close(); serving.Wait() })
}

// connListener is a net.Listener of the connections of a rig's server.
type connListener struct {
	conns <-chan *net.TCPConn
	done  chan struct{}
}

func (l *connListener) Accept() (net.Conn, error) {
	select {
	case conn := <-l.conns:
		return conn, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}
func (l *connListener) Close() error   { return nil }
func (l *connListener) Addr() net.Addr { return &net.TCPAddr{} }

// loader makes requests until it is stopped.
type loader struct {
	secured, http2 bool
	client         http.Client
	requests       atomic.Int64
}

// credentials are what clients authenticate with, at each handshake.
type credentials struct {
	certificate *tls.Certificate
	servers     *x509.CertPool
}

func (m *meshRig) newLoader(t *testing.T, secured, http2 bool, current *atomic.Pointer[credentials]) *loader {
	t.Helper()
	transport := &http.Transport{Protocols: new(http.Protocols), MaxIdleConnsPerHost: 2}
	transport.Protocols.SetHTTP1(!http2)
	transport.Protocols.SetHTTP2(http2 && secured)
	transport.Protocols.SetUnencryptedHTTP2(http2 && !secured)
	transport.DialContext = func(context.Context, string, string) (net.Conn, error) { return m.TryDial(m.At(83)) }
	transport.DialTLSContext = func(context.Context, string, string) (net.Conn, error) {
		raw, err := m.TryDial(m.At(83))
		if err != nil {
			return nil, err
		}
		c, alpn := current.Load(), []string{"istio-http/1.1", "istio", "http/1.1"}
		if http2 {
			alpn = []string{"istio-h2", "istio", "h2"}
		}
		conn := tls.Client(raw, &tls.Config{
			Certificates: []tls.Certificate{*c.certificate}, InsecureSkipVerify: true, NextProtos: alpn,
			VerifyConnection: func(state tls.ConnectionState) error {
				_, err := state.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: c.servers})
				return err
			},
		})
		return conn, conn.Handshake()
	}
	t.Cleanup(transport.CloseIdleConnections)
	return &loader{secured: secured, http2: http2, client: http.Client{Transport: transport, Timeout: nettest.Patience}}
}

// once makes a request and compares the echo.
func (l *loader) once(body []byte) error {
	scheme := "http"
	if l.secured {
		scheme = "https"
	}
	response, err := l.client.Post(scheme+"://workload.example/", "application/octet-stream", bytes.NewReader(body))
	if err != nil {
		return err
	}
	defer response.Body.Close()
	got, err := io.ReadAll(response.Body)
	if err == nil && (response.StatusCode != 200 || sha256.Sum256(got) != sha256.Sum256(body)) {
		err = fmt.Errorf("status %d, %d bytes for %d", response.StatusCode, len(got), len(body))
	}
	l.requests.Add(1)
	return err
}

// Certificates, keys, roots and revocations change, and the mode becomes STRICT and PERMISSIVE again, while requests of both
// versions and opaque bytes pass with and without TLS. None is lost, except new connections without TLS while it is STRICT.
func TestRotationLosesNoByte(t *testing.T) {
	m := newMeshRig(t, "PERMISSIVE, auto")
	m.Discard()
	m.echoHTTP(t, "83")
	next := securetest.New(t, "next root of the mesh")
	both, err := identity.ParseRoots(m.authority.Roots.PEM, next.Roots.PEM)
	if err != nil {
		t.Fatal(err)
	}
	var current atomic.Pointer[credentials]
	present := func(by *securetest.Authority, roots *identity.Roots) {
		current.Store(&credentials{by.Leaf(t, idOfClient, nil), roots.Pool})
	}
	own := func(by *securetest.Authority, roots *identity.Roots, revoked *identity.Revocations) {
		i := by.Identity(t, idOfServer)
		i.Roots, i.Revocations = roots, revoked
		m.plane.Own.Store(i)
	}
	present(m.authority, m.authority.Roots)

	var strict atomic.Int64 // odd while STRICT
	stop := make(chan struct{})
	var loading sync.WaitGroup
	var loaders []*loader
	for kind := range 4 {
		l := m.newLoader(t, kind&1 != 0, kind&2 != 0, &current)
		loaders = append(loaders, l)
		for worker := range 2 {
			random := rand.New(rand.NewPCG(uint64(kind), uint64(worker)))
			loading.Go(func() {
				body := make([]byte, 40_000)
				crand.Read(body)
				for {
					select {
					case <-stop:
						return
					default:
					}
					before := strict.Load()
					err := l.once(body[:random.IntN(len(body))])
					if err != nil && (l.secured || before&1 == 0 && before == strict.Load()) {
						t.Errorf("TLS %v, HTTP/2 %v: %v", l.secured, l.http2, err)
						return
					}
				}
			})
		}
	}
	streams := []*stream{m.newStream(t, nil), m.newStream(t, current.Load())}
	for _, s := range streams {
		loading.Go(func() { s.run(stop) })
	}
	settle := func(step string) {
		before := make([]int64, len(loaders))
		for i, l := range loaders {
			before[i] = l.requests.Load()
		}
		nettest.Eventually(t, "requests go on after "+step, func() bool {
			return t.Failed() || !slices.ContainsFunc(loaders, func(l *loader) bool {
				return l.requests.Load() < before[slices.Index(loaders, l)]+5 && (l.secured || strict.Load()&1 == 0)
			})
		})
		for _, l := range loaders {
			l.client.CloseIdleConnections() // further handshakes
		}
	}
	settle("the beginning")
	own(m.authority, m.authority.Roots, nil)
	settle("a new certificate and key")
	own(m.authority, both, nil)
	settle("a second root")
	present(next, both)
	settle("clients under the second root")
	own(next, both, nil)
	settle("this workload under the second root")
	own(next, next.Roots, revocations(t, next, 99))
	settle("the end of the first root, and a revocation list")
	for range 2 {
		strict.Add(1)
		m.push(t, "STRICT, auto")
		settle("STRICT")
		m.push(t, "PERMISSIVE, auto")
		strict.Add(1)
		settle("PERMISSIVE")
	}
	close(stop)
	loading.Wait()
	for _, s := range streams {
		s.check(t)
	}
}

// revocations is a list of next that revokes a number.
func revocations(t *testing.T, by *securetest.Authority, number int64) *identity.Revocations {
	t.Helper()
	der, err := x509.CreateRevocationList(crand.Reader, &x509.RevocationList{
		Number: big.NewInt(1), ThisUpdate: time.Now().Add(-time.Hour), NextUpdate: time.Now().Add(time.Hour),
		RevokedCertificateEntries: []x509.RevocationListEntry{{SerialNumber: big.NewInt(number), RevocationTime: time.Now().Add(-time.Minute)}},
	}, by.Certificate, by.Key)
	if err != nil {
		t.Fatal(err)
	}
	r, err := identity.ParseRevocations(pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der}))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// stream sends bytes that are echoed, and hashes what it sends and what it receives.
type stream struct {
	conn           net.Conn
	closeWrite     func() error
	sent, received [32]byte
	bytes          int64
	err            error
}

// newStream begins TLS with the credentials; nil: none.
func (m *meshRig) newStream(t *testing.T, c *credentials) *stream {
	t.Helper()
	raw := m.Dial(t, m.At(81))
	s := &stream{conn: raw, closeWrite: raw.CloseWrite}
	if c != nil {
		conn, err := m.handshake(t, raw, c.certificate, meshTCP...)
		if err != nil {
			t.Fatal(err)
		}
		s.conn, s.closeWrite = conn, conn.CloseWrite
	}
	return s
}

func (s *stream) run(stop <-chan struct{}) {
	received := make(chan error, 1)
	go func() {
		sum := sha256.New()
		_, err := io.Copy(sum, s.conn)
		sum.Sum(s.received[:0])
		received <- err
	}()
	sum, piece := sha256.New(), make([]byte, 5000)
	piece[0] = 0 // opaque
	for s.err == nil {
		select {
		case <-stop:
			sum.Sum(s.sent[:0])
			s.err = errors.Join(s.closeWrite(), <-received)
			return
		default:
		}
		_, s.err = s.conn.Write(piece)
		sum.Write(piece)
		s.bytes += int64(len(piece))
		crand.Read(piece)
	}
}

func (s *stream) check(t *testing.T) {
	t.Helper()
	if s.err != nil || s.sent != s.received || s.bytes == 0 {
		t.Errorf("a stream of %d bytes, %T: %v", s.bytes, s.conn, s.err)
	}
}
