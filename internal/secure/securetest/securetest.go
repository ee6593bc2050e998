// Package securetest issues certificates of a mesh for tests. Only tests import it.
package securetest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net/url"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/identity"
	"github.com/pillion-proxy/pillion/internal/wire"
)

// Authority issues certificates.
type Authority struct {
	Certificate *x509.Certificate
	Key         crypto.Signer
	Roots       *identity.Roots // its certificate
}

// New returns an authority with a name.
func New(t testing.TB, name string) *Authority {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	a := &Authority{}
	a.Certificate, a.Key = sign(t, template, nil, nil)
	var err error
	a.Roots, err = identity.ParseRoots(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.Certificate.Raw}))
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// sign makes a key and a certificate for it. Without a parent it signs itself.
func sign(t testing.TB, template, parent *x509.Certificate, by crypto.Signer) (*x509.Certificate, crypto.Signer) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return signKey(t, key, template, parent, by), key
}

// signKey makes a certificate for a key.
func signKey(t testing.TB, key crypto.Signer, template, parent *x509.Certificate, by crypto.Signer) *x509.Certificate {
	t.Helper()
	if parent == nil {
		parent, by = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), by)
	if err != nil {
		t.Fatal(err)
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return certificate
}

// Leaf issues the certificate of a workload with a SPIFFE ID that may be empty. change changes the template before; it may be nil.
func (a *Authority) Leaf(t testing.TB, id string, change func(*x509.Certificate)) *tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return a.leaf(t, key, id, change)
}

// RSA issues the certificate of a server with DNS names and an RSA key.
func (a *Authority) RSA(t testing.TB, names ...string) *tls.Certificate {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	return a.leaf(t, key, "", func(c *x509.Certificate) { c.DNSNames = names })
}

// ECDSA issues the certificate of a server with DNS names and an ECDSA key.
func (a *Authority) ECDSA(t testing.TB, names ...string) *tls.Certificate {
	t.Helper()
	return a.Leaf(t, "", func(c *x509.Certificate) { c.DNSNames = names })
}

func (a *Authority) leaf(t testing.TB, key crypto.Signer, id string, change func(*x509.Certificate)) *tls.Certificate {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	if id != "" {
		template.URIs = []*url.URL{URL(t, id)}
	}
	if change != nil {
		change(template)
	}
	certificate := signKey(t, key, template, a.Certificate, a.Key)
	return &tls.Certificate{Certificate: [][]byte{certificate.Raw}, PrivateKey: key, Leaf: certificate}
}

// Identity issues the identity of a workload.
func (a *Authority) Identity(t testing.TB, id string) *identity.Identity {
	t.Helper()
	return &identity.Identity{Certificate: *a.Leaf(t, id, nil), SPIFFE: id, Roots: a.Roots}
}

// Revoke returns a revocation list as PEM.
func (a *Authority) Revoke(t testing.TB, certificates ...*tls.Certificate) []byte {
	t.Helper()
	list := &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: time.Now().Add(-time.Hour), NextUpdate: time.Now().Add(time.Hour)}
	for _, c := range certificates {
		list.RevokedCertificateEntries = append(list.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: c.Leaf.SerialNumber, RevocationTime: time.Now().Add(-time.Minute)})
	}
	der, err := x509.CreateRevocationList(rand.Reader, list, a.Certificate, a.Key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der})
}

// Secret returns a certificate with its key as a secret of the control plane.
func Secret(t testing.TB, name string, c *tls.Certificate) []byte {
	t.Helper()
	var chain []byte
	for _, raw := range c.Certificate {
		chain = append(chain, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: raw})...)
	}
	key, err := x509.MarshalPKCS8PrivateKey(c.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	inline := func(number int, content []byte) []byte {
		return wire.AppendBytes(nil, number, wire.AppendBytes(nil, 2, content))
	}
	pair := append(inline(1, chain), inline(2, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}))...)
	return wire.AppendBytes(wire.AppendString(nil, 1, name), 2, pair)
}

// RootsSecret returns roots, with a revocation list that may be empty, as a secret of the control plane.
func RootsSecret(name string, roots *identity.Roots, revoked []byte) []byte {
	inline := func(number int, content []byte) []byte {
		return wire.AppendBytes(nil, number, wire.AppendBytes(nil, 2, content))
	}
	validation := inline(1, roots.PEM)
	if len(revoked) > 0 {
		validation = append(validation, inline(7, revoked)...)
	}
	return wire.AppendBytes(wire.AppendString(nil, 1, name), 4, validation)
}

// URL parses a URL.
func URL(t testing.TB, text string) *url.URL {
	t.Helper()
	u, err := url.Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	return u
}
