package secure

import (
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/secure/securetest"
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
