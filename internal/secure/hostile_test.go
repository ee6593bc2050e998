package secure

import (
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/secure/securetest"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

// byByte writes each byte on its own.
type byByte struct{ net.Conn }

func (b byByte) Write(p []byte) (int, error) {
	for i := range p {
		if _, err := b.Conn.Write(p[i : i+1]); err != nil {
			return i, err
		}
	}
	return len(p), nil
}

// A handshake in single bytes, and one whose hello takes more than one record, succeed.
func TestUnusualHandshakesSucceed(t *testing.T) {
	w := newWorld(t)
	large := []string{"h2"}
	for i := range 80 {
		large = append(large, fmt.Sprintf("%03d%s", i, strings.Repeat("x", 250)))
	}
	for name, c := range map[string]struct {
		protocols []string
		wrap      func(net.Conn) net.Conn
	}{
		"single bytes":      {[]string{"h2"}, func(c net.Conn) net.Conn { return byByte{c} }},
		"a hello of 20 KiB": {large, nil},
	} {
		_, e, err := w.serve(t, w.mutual("h2"), w.peer(c.protocols...), c.wrap)
		if err != nil || e.session.SPIFFE != idOfClient || e.session.Protocol != "h2" {
			t.Errorf("%s: %+v, %v", name, e.session, err)
		}
	}
}

// observedSigner calls observe before each signature.
type observedSigner struct {
	crypto.Signer
	observe func()
}

func (s observedSigner) Sign(random io.Reader, digest []byte, options crypto.SignerOpts) ([]byte, error) {
	s.observe()
	return s.Signer.Sign(random, digest, options)
}

// Others run in the middle of the server's computation, between the agreement on keys and the signature.
func TestOthersRunBeforeTheSignature(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	const handshakes = 10
	w := newWorld(t)
	config := w.mutual()
	ran := 0
	config.Certificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
		var other atomic.Bool
		go other.Store(true)
		certificate := *w.server
		certificate.PrivateKey = observedSigner{w.server.PrivateKey.(crypto.Signer), func() {
			if other.Load() {
				ran++
			}
		}}
		return &certificate, nil
	}
	for range handshakes {
		if _, _, err := w.serve(t, config, w.peer(), nil); err != nil {
			t.Fatal(err)
		}
	}
	if ran < handshakes/2 { // Go's scheduler resumes one of 61 goroutines that yield at once
		t.Errorf("others ran before the signature in %d handshakes of %d", ran, handshakes)
	}
}

// A record whose rest does not come occupies memory of the budget, and no other.
func TestAnUnfinishedRecordIsNotPassedOn(t *testing.T) {
	for name, c := range map[string]struct {
		bytes  []byte
		waits  bool
		passes int // to crypto/tls at the end of the connection
	}{
		"nothing":                    {nil, true, 0},
		"a part of a header":         {[]byte{22, 3, 1}, true, 3},
		"a header":                   {[]byte{22, 3, 1, 0x40, 0}, true, 5},
		"a part of a record":         {[]byte{22, 3, 1, 0, 3, 1, 2}, true, 5},
		"a record":                   {[]byte{22, 3, 1, 0, 3, 1, 2, 3}, false, 5},
		"a record of TLS 1.2":        {[]byte{23, 3, 3, 0x48, 0}, true, 5},
		"one that is too large":      {[]byte{23, 3, 3, 0x48, 1}, false, 5},
		"another protocol":           {[]byte("SSH-2.0"), false, 5},
		"a record and the next part": {[]byte{22, 3, 1, 0, 1, 9, 22}, false, 5},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			far, near := w.pair(t)
			if _, err := far.Write(c.bytes); err != nil {
				t.Fatal(err)
			}
			waiter := tcp.NewWaiter(t.Context())
			defer waiter.Close()
			s, waited := &socket{}, false
			near.SetLayer(nil, func(raw *tcp.Socket) tcp.Layer {
				s.raw = raw
				return &layer{conn: tls.Server(s, &tls.Config{})}
			})
			s.wait = func() error {
				if len(s.bytes) < len(c.bytes) { // the network has not delivered them
					return waiter.Wait(time.Now().Add(nettest.Patience), near, nil)
				}
				if !waited {
					far.Close()
				}
				waited = true
				return waiter.Wait(time.Now().Add(nettest.Patience), near, nil)
			}
			var p [100]byte
			n, err := s.Read(p[:])
			if waited != c.waits || n != c.passes || (err == io.EOF) != (n == 0) {
				t.Errorf("waited: %v; %d bytes, %v; want %v, %d", waited, n, err, c.waits, c.passes)
			}
			s.drop()
			if s.size() != 0 || len(s.bytes) != 0 {
				t.Error("memory is left")
			}
		})
	}
}

// issuer is an intermediate authority under the root of the mesh.
func (w *world) issuer(t *testing.T, change func(*x509.Certificate)) *securetest.Authority {
	certificate := w.Leaf(t, "", func(c *x509.Certificate) {
		c.IsCA, c.BasicConstraintsValid, c.KeyUsage = true, true, x509.KeyUsageCertSign
		change(c)
	})
	return &securetest.Authority{Certificate: certificate.Leaf, Key: certificate.PrivateKey.(crypto.Signer)}
}

// Constraints on an intermediate authority apply to the certificates that it issues.
func TestConstraintsOfAuthoritiesApply(t *testing.T) {
	w := newWorld(t)
	for name, c := range map[string]struct {
		change   func(*x509.Certificate)
		accepted bool
	}{
		"none":                        {func(*x509.Certificate) {}, true},
		"names of this mesh":          {func(c *x509.Certificate) { c.PermittedURIDomains = []string{"cluster.local"} }, true},
		"names of another mesh":       {func(c *x509.Certificate) { c.PermittedURIDomains = []string{"other.example"} }, false},
		"excluded names":              {func(c *x509.Certificate) { c.ExcludedURIDomains = []string{"cluster.local"} }, false},
		"no authority":                {func(c *x509.Certificate) { c.IsCA = false }, false},
		"no signature of others":      {func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageDigitalSignature }, false},
		"servers only":                {func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[:1] }, false},
		"no authority under this one": {func(c *x509.Certificate) { c.MaxPathLenZero = true }, true},
	} {
		issuer := w.issuer(t, c.change)
		leaf := issuer.Leaf(t, idOfClient, nil)
		leaf.Certificate = append(leaf.Certificate, issuer.Certificate.Raw)
		peer := w.peer()
		peer.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return leaf, nil }
		_, e, err := w.serve(t, w.mutual(), peer, nil)
		var failed *Error
		switch {
		case c.accepted && err != nil:
			t.Errorf("%s: %v", name, err)
		case !c.accepted && (e.session != nil || !errors.As(err, &failed)):
			t.Errorf("%s: accepted: %+v, %v", name, e.session, err)
		}
	}
}
