// Package certview shows certificates to people and programs: those of the workload, and those that a server presents to a
// client of the mesh. Keys are never shown.
package certview

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/identity"
	"github.com/pillion-proxy/pillion/internal/secure"
)

// Identity is the workload's certificate and the roots of trust that it verifies peers with.
type Identity struct {
	Source string        `json:"source"`           // CA, files or socket
	SPIFFE string        `json:"spiffe,omitempty"` // absent before the first certificate
	Chain  []Certificate `json:"chain"`            // the workload's first
	Roots  []Certificate `json:"roots"`

	Renewal  time.Time `json:"renewal,omitzero"` // when the next certificate is fetched, or after a failure the next attempt
	Renewals int64     `json:"renewals"`
	Failures int64     `json:"failures"`
	Why      string    `json:"why,omitempty"` // why the last fetch failed

	Revocations bool `json:"revocationLists,omitempty"` // revocation lists are in force
}

// Certificate describes a certificate.
type Certificate struct {
	URIs      string    `json:"uris,omitempty"` // several names are joined by commas
	DNS       string    `json:"dnsNames,omitempty"`
	IPs       string    `json:"ipAddresses,omitempty"`
	Subject   string    `json:"subject"` // as text of RFC 2253
	Issuer    string    `json:"issuer"`
	Serial    string    `json:"serial"`
	Key       string    `json:"key"` // such as "ECDSA P-256"
	CA        bool      `json:"ca,omitempty"`
	NotBefore time.Time `json:"notBefore"`
	NotAfter  time.Time `json:"notAfter"`
	SHA256    string    `json:"sha256"`
	PEM       string    `json:"pem"`
}

// Status is the state of the identity's source.
type Status struct {
	Source             string
	Renewal            time.Time // zero: not known
	Renewals, Failures int64
	LastError          error
}

// Describe returns the identity in force; current is nil before the first one.
func Describe(current *identity.Identity, s Status) Identity {
	i := Identity{Source: s.Source, Renewal: s.Renewal, Renewals: s.Renewals, Failures: s.Failures, Chain: []Certificate{}, Roots: []Certificate{}}
	if s.LastError != nil {
		i.Why = s.LastError.Error()
	}
	if current == nil {
		return i
	}
	i.SPIFFE, i.Revocations = current.SPIFFE, current.Revocations != nil
	for _, raw := range current.Certificate.Certificate {
		if certificate, err := x509.ParseCertificate(raw); err == nil {
			i.Chain = append(i.Chain, describe(certificate))
		}
	}
	for text := current.Roots.PEM; ; {
		block, rest := pem.Decode(text)
		if block == nil {
			return i
		}
		if certificate, err := x509.ParseCertificate(block.Bytes); err == nil {
			i.Roots = append(i.Roots, describe(certificate))
		}
		text = rest
	}
}

func describe(c *x509.Certificate) Certificate {
	var d *flow.Certificate = secure.Describe([]*x509.Certificate{c})
	return Certificate{
		URIs: d.URIs, DNS: d.DNS, IPs: d.IPs, Subject: d.Subject, Issuer: d.Issuer, Serial: d.Serial, Key: keyOf(c), CA: c.IsCA,
		NotBefore: d.NotBefore, NotAfter: d.NotAfter, SHA256: d.SHA256,
		PEM: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})),
	}
}

func keyOf(c *x509.Certificate) string {
	switch key := c.PublicKey.(type) {
	case *ecdsa.PublicKey:
		return "ECDSA " + key.Curve.Params().Name
	case *rsa.PublicKey:
		return fmt.Sprintf("RSA %d", key.N.BitLen())
	case ed25519.PublicKey:
		return "Ed25519"
	}
	return c.PublicKeyAlgorithm.String()
}
