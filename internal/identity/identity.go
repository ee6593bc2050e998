// Package identity keeps the workload's certificate and the roots of trust: it gets them from the control plane's CA, from
// files, or from a SPIFFE workload socket, and renews them before they expire.
//
// The private key is made here and stays in memory. Readers take the current Identity from a Keeper's atomic pointer, so a
// renewal concerns new handshakes only.
package identity

import (
	"bytes"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"
)

// Identity is a workload certificate with its key and the roots that peers are verified with. It is not changed after it
// was made.
type Identity struct {
	Certificate tls.Certificate // leaf, intermediates, and the key; Leaf is set
	SPIFFE      string          // the leaf's only URI, such as "spiffe://cluster.local/ns/default/sa/web"
	Roots       *Roots
	Revocations *Revocations // nil: no certificate has been revoked
}

// NotAfter returns when the leaf expires.
func (i *Identity) NotAfter() time.Time { return i.Certificate.Leaf.NotAfter }

// Equal reports whether both have the same certificates, roots and revocation lists. other may be nil.
func (i *Identity) Equal(other *Identity) bool {
	return other != nil && slices.EqualFunc(i.Certificate.Certificate, other.Certificate.Certificate, bytes.Equal) &&
		i.Roots.Equal(other.Roots) && i.Revocations.Equal(other.Revocations)
}

// MarshalText returns the SPIFFE ID, so that no encoder reaches the key.
func (i Identity) MarshalText() ([]byte, error) { return []byte(i.SPIFFE), nil }

// Format writes the SPIFFE ID for every verb, so that the key is in no log and no dump.
func (i Identity) Format(f fmt.State, _ rune) { io.WriteString(f, i.SPIFFE) }

// Roots are the roots of trust.
type Roots struct {
	PEM  []byte // without duplicates, in the order in which they came
	Pool *x509.CertPool
}

// maxCertificates bounds a chain, and a set of roots.
const maxCertificates = 256

// ParseRoots returns the certificates in PEM text. Duplicates are dropped. Text without a certificate is an error.
func ParseRoots(text ...[]byte) (*Roots, error) {
	roots := &Roots{Pool: x509.NewCertPool()}
	seen := make(map[string]bool)
	for _, text := range text {
		certificates, err := parseCertificates(text)
		if err != nil {
			return nil, err
		}
		for _, certificate := range certificates {
			if seen[string(certificate.Raw)] {
				continue
			}
			seen[string(certificate.Raw)] = true
			roots.Pool.AddCert(certificate)
			roots.PEM = append(roots.PEM, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate.Raw})...)
		}
	}
	if len(seen) == 0 {
		return nil, errors.New("no certificate")
	}
	return roots, nil
}

// Equal reports whether both have the same certificates in the same order.
func (r *Roots) Equal(other *Roots) bool {
	return r == other || r != nil && other != nil && bytes.Equal(r.PEM, other.PEM)
}

// parseCertificates returns the certificates of PEM text. Other blocks, and text between blocks, are skipped.
func parseCertificates(text []byte) ([]*x509.Certificate, error) {
	var certificates []*x509.Certificate
	for {
		var block *pem.Block
		if block, text = pem.Decode(text); block == nil {
			return certificates, nil
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		certificate, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", len(certificates)+1, err)
		}
		if len(certificates) == maxCertificates {
			return nil, fmt.Errorf("more than %d certificates", maxCertificates)
		}
		certificates = append(certificates, certificate)
	}
}

// New checks that a chain is a workload's certificate for key, valid at now and issued under roots, and returns the
// identity. The chain begins with the leaf.
func New(chain []*x509.Certificate, key crypto.Signer, roots *Roots, now time.Time) (*Identity, error) {
	if len(chain) == 0 {
		return nil, errors.New("no certificate")
	}
	leaf := chain[0]
	if !isPublicKeyOf(leaf.PublicKey, key) {
		return nil, errors.New("the certificate is for another key")
	}
	if !hasSPIFFE(leaf) {
		return nil, fmt.Errorf("the certificate has the URIs %v, want one SPIFFE ID", leaf.URIs)
	}
	intermediates := x509.NewCertPool()
	for _, certificate := range chain[1:] {
		intermediates.AddCert(certificate)
	}
	options := x509.VerifyOptions{Roots: roots.Pool, Intermediates: intermediates, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	if _, err := leaf.Verify(options); err != nil {
		return nil, err
	}
	certificate := tls.Certificate{PrivateKey: key, Leaf: leaf}
	for _, c := range chain {
		certificate.Certificate = append(certificate.Certificate, c.Raw)
	}
	return &Identity{Certificate: certificate, SPIFFE: leaf.URIs[0].String(), Roots: roots}, nil
}

// hasSPIFFE reports whether a certificate has one SPIFFE ID.
func hasSPIFFE(leaf *x509.Certificate) bool {
	return len(leaf.URIs) == 1 && leaf.URIs[0].Scheme == "spiffe"
}

// parseIdentity returns the identity that three texts of PEM make. Errors have the name of the certificate or that of the
// roots.
func parseIdentity(chain, key, roots []byte, certificateName, rootsName string) (*Identity, error) {
	pair, err := tls.X509KeyPair(chain, key)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", certificateName, err)
	}
	trusted, err := ParseRoots(roots)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", rootsName, err)
	}
	certificates := make([]*x509.Certificate, len(pair.Certificate))
	for i, raw := range pair.Certificate {
		if certificates[i], err = x509.ParseCertificate(raw); err != nil {
			return nil, fmt.Errorf("%s: certificate %d: %w", certificateName, i+1, err)
		}
	}
	identity, err := New(certificates, signer(pair.PrivateKey), trusted, time.Now())
	if err != nil {
		return nil, fmt.Errorf("%s: %w", certificateName, err)
	}
	return identity, nil
}

// signer returns the key of a tls.Certificate. It is always a Signer, because tls.X509KeyPair accepts no other.
func signer(key any) crypto.Signer { return key.(crypto.Signer) }

// isPublicKeyOf reports whether public belongs to key. All public keys of the standard library have Equal.
func isPublicKeyOf(public any, key crypto.Signer) bool {
	comparable, ok := public.(interface{ Equal(crypto.PublicKey) bool })
	return ok && comparable.Equal(key.Public())
}
