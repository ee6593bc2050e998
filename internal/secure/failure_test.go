package secure

import (
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/secure/securetest"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

// A server agrees on its most preferred protocol that the client offers, and on none without one in common.
func TestALPNWithoutOverlapIsNoError(t *testing.T) {
	w := newWorld(t)
	for _, c := range []struct {
		server, client []string
		want           string
	}{
		{[]string{"h2", "http/1.1"}, []string{"istio-http/1.1", "istio", "http/1.1"}, "http/1.1"},
		{[]string{"h2", "http/1.1"}, []string{"http/1.1", "h2"}, "h2"},
		{[]string{"h2", "http/1.1"}, []string{"istio-peer-exchange", "istio"}, ""},
		{[]string{"h2", "http/1.1"}, nil, ""},
		{nil, []string{"h2"}, ""},
	} {
		_, e, err := w.serve(t, w.mutual(c.server...), w.peer(c.client...), nil)
		if err != nil || e.session.Protocol != c.want {
			t.Errorf("%q with %q: %v, %v", c.server, c.client, e.session, err)
		}
	}
}

// Each way in which a client can be wrong has a failure of its own, whose text has what an operator needs.
func TestClientsAreRejectedByName(t *testing.T) {
	w := newWorld(t)
	other := securetest.New(t, "root of another mesh")
	uris := func(texts ...string) func(*x509.Certificate) {
		return func(c *x509.Certificate) {
			c.URIs = nil
			for _, text := range texts {
				c.URIs = append(c.URIs, securetest.URL(t, text))
			}
		}
	}
	for name, c := range map[string]struct {
		client  *tls.Certificate // nil: none
		server  func(*ServerConfig)
		peer    func(*tls.Config)
		failure Failure
		detail  string
	}{
		"no certificate":   {nil, nil, nil, NoCertificate, ""},
		"expired":          {w.Leaf(t, idOfClient, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }), nil, nil, Expired, "sa/client"},
		"not yet valid":    {w.Leaf(t, idOfClient, func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }), nil, nil, NotYetValid, "sa/client"},
		"another root":     {other.Leaf(t, idOfClient, nil), nil, nil, UnknownRoot, "root of another mesh"},
		"for servers only": {w.Leaf(t, idOfClient, func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[:1] }), nil, nil, WrongUsage, "sa/client"},
		"no URI":           {w.Leaf(t, "", func(c *x509.Certificate) { c.DNSNames = []string{"web.example"} }), nil, nil, NoSPIFFE, "web.example"},
		"two URIs":         {w.Leaf(t, "", uris(idOfClient, idOfServer)), nil, nil, NoSPIFFE, "sa/client"},
		"a URI of the web": {w.Leaf(t, "", uris("https://cluster.local/ns/shop/sa/client")), nil, nil, NoSPIFFE, "https://"},
		"a foreign domain": {w.Leaf(t, "spiffe://other.example/ns/shop/sa/client", nil), func(s *ServerConfig) {
			s.Clients.Names = names(t, mesh.NameMatcher{StringMatcher: mesh.StringMatcher{Kind: mesh.MatchPrefix, Text: "spiffe://cluster.local/"}})
		}, nil, NameRefused, `"spiffe://other.example/ns/shop/sa/client", want "spiffe://cluster.local/"…`},
		"a certificate of a leaf": {issuedByLeaf(t, w), nil, nil, UnknownRoot, ""},
		"an old version":          {w.client, func(s *ServerConfig) { s.MinVersion = tls.VersionTLS13 }, func(p *tls.Config) { p.MaxVersion = tls.VersionTLS12 }, Version, ""},
		"no suite in common": {w.client, nil, func(p *tls.Config) {
			p.MaxVersion = tls.VersionTLS12
			p.CipherSuites = []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA256}
		}, Version, ""},
		"no roots yet": {w.client, func(s *ServerConfig) { s.Clients.Trust = func() (Trust, error) { return Trust{}, errNoRoots } }, nil, NoIdentity, "roots"},
		"no certificate of ours": {w.client, func(s *ServerConfig) {
			s.Certificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return nil, errNoCertificate }
		}, nil, NoIdentity, "issued"},
		"a client that rejects us": {w.client, nil, func(p *tls.Config) { p.InsecureSkipVerify, p.ServerName = false, "web.example" }, Alert, "bad certificate"},
	} {
		t.Run(name, func(t *testing.T) {
			server, peer := w.mutual(), w.peer()
			peer.Certificates = nil
			if c.client != nil {
				peer.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return c.client, nil }
			}
			if c.server != nil {
				c.server(&server)
			}
			if c.peer != nil {
				c.peer(peer)
			}
			_, e, err := w.serve(t, server, peer, nil)
			if e.session != nil || err == nil {
				t.Fatalf("accepted: %+v", e.session)
			}
			var failed *Error
			if !errors.As(err, &failed) || failed.Failure != c.failure || !strings.Contains(failed.Detail, c.detail) {
				t.Errorf("%v (%d), want %v with %q", err, failed.Failure, c.failure, c.detail)
			}
		})
	}
}

// issuedByLeaf returns a certificate that a workload has issued with its own certificate.
func issuedByLeaf(t *testing.T, w *world) *tls.Certificate {
	workload := &securetest.Authority{Certificate: w.client.Leaf, Key: w.client.PrivateKey.(crypto.Signer)}
	forged := workload.Leaf(t, idOfServer, nil)
	forged.Certificate = append(forged.Certificate, w.client.Certificate...)
	return forged
}

func names(t *testing.T, matchers ...mesh.NameMatcher) []Name {
	t.Helper()
	names, err := Names(matchers)
	if err != nil {
		t.Fatal(err)
	}
	return names
}

func TestAClientWithoutACertificateMayBeAccepted(t *testing.T) {
	w := newWorld(t)
	for optional, asked := range map[bool]bool{true: true, false: false} {
		server, peer := w.mutual(), w.peer()
		peer.Certificates = nil
		if server.Optional = optional; !asked {
			server.Clients = nil
		}
		if _, e, err := w.serve(t, server, peer, nil); err != nil || e.session.Peer != nil || e.session.SPIFFE != "" {
			t.Errorf("optional %v: %+v, %v", optional, e.session, err)
		}
	}
}

func TestABadCertificateIsRejectedWhereItIsOptional(t *testing.T) {
	w := newWorld(t)
	server, peer := w.mutual(), w.peer()
	server.Optional = true
	peer.Certificates = []tls.Certificate{*securetest.New(t, "another root").Leaf(t, idOfClient, nil)}
	peer.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &peer.Certificates[0], nil }
	var failed *Error
	if _, _, err := w.serve(t, server, peer, nil); !errors.As(err, &failed) || failed.Failure != UnknownRoot {
		t.Errorf("%v, want %v", err, UnknownRoot)
	}
}

// A handshake ends by its deadline, with the connection, and with the wait of its owner.
func TestAHandshakeEnds(t *testing.T) {
	w := newWorld(t)
	for name, c := range map[string]struct {
		act      func(far net.Conn, cancel func())
		deadline time.Duration
		failure  Failure
	}{
		"deadline":    {func(net.Conn, func()) {}, time.Millisecond, Deadline},
		"close":       {func(far net.Conn, _ func()) { far.Close() }, nettest.Patience, Ended},
		"cancel":      {func(_ net.Conn, cancel func()) { cancel() }, nettest.Patience, Ended},
		"other bytes": {func(far net.Conn, _ func()) { io.WriteString(far, "GET / HTTP/1.1\r\n\r\n") }, nettest.Patience, NotTLS},
		"a half":      {func(far net.Conn, _ func()) { far.Write([]byte{22, 3, 1, 2, 0, 1, 0, 1}) }, time.Millisecond, Deadline},
	} {
		far, near := w.pair(t)
		ctx, cancel := context.WithCancel(t.Context())
		waiter := tcp.NewWaiter(ctx)
		go c.act(far, func() { cancel(); w.poller.WakeAll() })
		_, err := Server(waiter, near, nil, NewServer(w.mutual()), Memory{}, time.Now().Add(c.deadline))
		var failed *Error
		if !errors.As(err, &failed) || failed.Failure != c.failure {
			t.Errorf("%s: %v, want %v", name, err, c.failure)
		}
		near.Close()
		waiter.Close()
		cancel()
	}
}

// Bytes that were read before the handshake, to detect TLS, belong to it.
func TestAHandshakeBeginsWithWhatWasReadBefore(t *testing.T) {
	w := newWorld(t)
	far, near := w.pair(t)
	peer := tls.Client(far, w.peer())
	go func() {
		io.WriteString(peer, "first data")
		peer.CloseWrite()
	}()
	e := &end{Conn: near, w: tcp.NewWaiter(t.Context())}
	defer e.w.Close()
	read := tcp.TakeBuffer()
	for read.Len() < 100 {
		if _, err := read.Fill(near); err == tcp.ErrAgain {
			err = e.w.Wait(time.Now().Add(nettest.Patience), near, nil)
			if err != nil {
				t.Fatal(err)
			}
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if _, err := Server(e.w, near, read, NewServer(w.mutual()), Memory{}, time.Now().Add(nettest.Patience)); err != nil {
		t.Fatal(err)
	}
	if got, err := e.readAll(100); err != nil || string(got) != "first data" {
		t.Errorf("read %q, %v", got, err)
	}
}

// Text that a peer chose is quoted and cut where it is shown.
func TestTextOfAPeerIsQuoted(t *testing.T) {
	leaf := &x509.Certificate{URIs: []*url.URL{{Scheme: "spiffe", Opaque: "a\"\nb" + strings.Repeat("c", 1000)}}}
	text := describe(leaf)
	if strings.ContainsAny(text, "\n") || len(text) > 300 || !strings.HasPrefix(text, `it claims to be "spiffe:a\"\nb`) {
		t.Errorf("shown as %s", text)
	}
}
