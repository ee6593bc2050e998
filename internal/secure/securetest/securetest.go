// Package securetest issues certificates of a mesh for tests. Only tests import it.
package securetest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net/url"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/identity"
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
	return certificate, key
}

// Leaf issues the certificate of a workload with a SPIFFE ID, which may be empty. change changes the template before; it
// may be nil.
func (a *Authority) Leaf(t testing.TB, id string, change func(*x509.Certificate)) *tls.Certificate {
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
	certificate, key := sign(t, template, a.Certificate, a.Key)
	return &tls.Certificate{Certificate: [][]byte{certificate.Raw}, PrivateKey: key, Leaf: certificate}
}

// Identity issues the identity of a workload.
func (a *Authority) Identity(t testing.TB, id string) *identity.Identity {
	t.Helper()
	return &identity.Identity{Certificate: *a.Leaf(t, id, nil), SPIFFE: id, Roots: a.Roots}
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
