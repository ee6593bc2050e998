package run

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
	"net"
	"sync"
	"time"
)

// authority issues certificates for this run. Its key and those of the certificates exist in memory only.
type authority struct {
	certificate *x509.Certificate
	pem         []byte
	key         crypto.Signer
	leafKey     crypto.Signer

	mu     sync.Mutex
	issued map[string]*tls.Certificate
}

const (
	// authorityLife bounds a run whose connections are decrypted.
	authorityLife = 30 * 24 * time.Hour
	maxIssued     = 10_000 // hosts that are remembered
)

// makeRoom lets a map of hosts take another one. It forgets one at random if the map is full.
func makeRoom[V any](hosts map[string]V) {
	if len(hosts) < maxIssued {
		return
	}
	for host := range hosts {
		delete(hosts, host)
		return
	}
}

func newAuthority() (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	leafKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template, err := certificate("pillion run, until it ends", authorityLife)
	if err != nil {
		return nil, err
	}
	template.IsCA, template.BasicConstraintsValid, template.KeyUsage = true, true, x509.KeyUsageCertSign|x509.KeyUsageDigitalSignature
	template.MaxPathLenZero = true
	raw, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	parsed, err := x509.ParseCertificate(raw)
	if err != nil {
		return nil, err
	}
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: raw})
	return &authority{certificate: parsed, pem: text, key: key, leafKey: leafKey, issued: make(map[string]*tls.Certificate)}, nil
}

// certificate returns a template that is valid from a day ago, because clocks differ.
func certificate(name string, life time.Duration) (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	return &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-24 * time.Hour), NotAfter: time.Now().Add(life),
	}, err
}

// issue returns a certificate for a host name or an address.
func (a *authority) issue(host string) (*tls.Certificate, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if have := a.issued[host]; have != nil {
		return have, nil
	}
	short := host
	if len(short) > 64 { // the longest common name (RFC 5280 appendix A.1)
		short = short[:64]
	}
	template, err := certificate(short, authorityLife)
	if err != nil {
		return nil, err
	}
	template.KeyUsage, template.ExtKeyUsage = x509.KeyUsageDigitalSignature, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	if ip := net.ParseIP(host); ip != nil {
		template.IPAddresses = []net.IP{ip}
	} else {
		template.DNSNames = []string{host}
	}
	raw, err := x509.CreateCertificate(rand.Reader, template, a.certificate, a.leafKey.Public(), a.key)
	if err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(raw)
	if err != nil {
		return nil, err
	}
	makeRoom(a.issued)
	a.issued[host] = &tls.Certificate{Certificate: [][]byte{raw, a.certificate.Raw}, PrivateKey: a.leafKey, Leaf: leaf}
	return a.issued[host], nil
}
