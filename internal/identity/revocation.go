package identity

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
)

// CRLFile is where the injector mounts the revocation lists of a plugged-in CA, below the root directory. It is optional.
const CRLFile = "var/run/secrets/istio/crl/ca-crl.pem"

// Errors of Revocations.Check.
var (
	ErrRevoked     = errors.New("the certificate has been revoked")
	ErrNoList      = errors.New("there is no revocation list of its issuer")
	ErrUnreadable  = errors.New("the file of revocation lists cannot be read")
	ErrListExpired = errors.New("the revocation list of its issuer is not valid at this time")
)

// Revocations are certificate revocation lists (RFC 5280 §5). They are not changed after they were made, and used by any
// number of goroutines.
type Revocations struct {
	PEM   []byte // as in the file; nil: not kept
	lists []revocationList
}

// unreadable are lists that could not be read. They have no list of any issuer, so that each certificate is refused.
var unreadable Revocations

// revocationList is one list. The parsed entries are 100 bytes each, so only their serial numbers are kept.
type revocationList struct {
	signed  *x509.RevocationList // what Check reads
	serials map[string]struct{}
	signers *signers
}

// signers remembers which certificates are those that a list is signed with. A verification hashes the whole list.
type signers struct {
	mu    sync.Mutex
	known map[string]bool // by the certificate in DER
}

// maxSigners bounds the certificates that are remembered for a list: a mesh has some, and intermediate certificates
// with the name of a list's issuer come from peers.
const maxSigners = 16

// signedBy reports whether the list is signed with the key of issuer.
func (l *revocationList) signedBy(issuer *x509.Certificate) bool {
	s := l.signers
	s.mu.Lock()
	signed, ok := s.known[string(issuer.Raw)]
	s.mu.Unlock()
	if ok {
		return signed
	}
	signed = l.signed.CheckSignatureFrom(issuer) == nil
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.known) >= maxSigners {
		clear(s.known)
	}
	s.known[string(issuer.Raw)] = signed
	return signed
}

// ParseRevocations returns the lists in PEM text. Text without a list is an error, as are lists of changes and lists that
// cover a part of their issuer's certificates: they have critical extensions.
func ParseRevocations(text []byte) (*Revocations, error) {
	r := &Revocations{PEM: bytes.Clone(text)}
	for {
		var block *pem.Block
		if block, text = pem.Decode(text); block == nil {
			break
		}
		if block.Type != "X509 CRL" {
			continue
		}
		if len(r.lists) == maxCertificates {
			return nil, fmt.Errorf("more than %d revocation lists", maxCertificates)
		}
		list, err := parseList(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("revocation list %d: %w", len(r.lists)+1, err)
		}
		r.lists = append(r.lists, list)
	}
	if len(r.lists) == 0 {
		return nil, errors.New("no revocation list")
	}
	return r, nil
}

func parseList(raw []byte) (revocationList, error) {
	parsed, err := x509.ParseRevocationList(raw)
	if err != nil {
		return revocationList{}, err
	}
	for _, extension := range parsed.Extensions {
		if extension.Critical {
			return revocationList{}, fmt.Errorf("critical extension %v is not supported", extension.Id)
		}
	}
	signed := &x509.RevocationList{
		RawIssuer: parsed.RawIssuer, RawTBSRevocationList: parsed.RawTBSRevocationList, Signature: parsed.Signature,
		SignatureAlgorithm: parsed.SignatureAlgorithm, ThisUpdate: parsed.ThisUpdate, NextUpdate: parsed.NextUpdate,
	}
	list := revocationList{
		signed, make(map[string]struct{}, len(parsed.RevokedCertificateEntries)), &signers{known: map[string]bool{}},
	}
	for _, entry := range parsed.RevokedCertificateEntries {
		for _, extension := range entry.Extensions {
			if extension.Critical {
				return revocationList{}, fmt.Errorf("critical extension %v of an entry is not supported", extension.Id)
			}
		}
		list.serials[string(entry.SerialNumber.Bytes())] = struct{}{}
	}
	return list, nil
}

// Equal reports whether both come from the same text. Lists whose text was not kept are equal to themselves only.
func (r *Revocations) Equal(other *Revocations) bool {
	return r == other || r != nil && other != nil && r.PEM != nil && bytes.Equal(r.PEM, other.PEM)
}

// And returns the lists of both, without their texts: it is called in each handshake, and texts are large. Either may be nil.
func (r *Revocations) And(other *Revocations) *Revocations {
	switch {
	case r == nil, other == &unreadable:
		return other
	case other == nil, r == &unreadable:
		return r
	}
	return &Revocations{lists: slices.Concat(r.lists, other.lists)}
}

// Check returns an error if a certificate of a verified chain, from the leaf to the root, has been revoked at now, or if
// there is no valid list by which that could be known. Envoy requires a list of each issuer as well. Nil Revocations know
// no revoked certificate.
func (r *Revocations) Check(chain []*x509.Certificate, now time.Time) error {
	if r == nil {
		return nil
	}
	for i, certificate := range chain {
		issuer := chain[min(i+1, len(chain)-1)] // a root is its own issuer
		if err := r.check(certificate, issuer, now); err != nil {
			return fmt.Errorf("certificate %x of %q: %w", certificate.SerialNumber, certificate.Issuer, err)
		}
	}
	return nil
}

// CheckLeaf is Check for the first certificate of a chain only.
func (r *Revocations) CheckLeaf(chain []*x509.Certificate, now time.Time) error {
	if r == nil {
		return nil
	}
	if err := r.check(chain[0], chain[min(1, len(chain)-1)], now); err != nil {
		return fmt.Errorf("certificate %x of %q: %w", chain[0].SerialNumber, chain[0].Issuer, err)
	}
	return nil
}

func (r *Revocations) check(certificate, issuer *x509.Certificate, now time.Time) error {
	result := ErrNoList
	if r == &unreadable {
		result = ErrUnreadable
	}
	for i := range r.lists {
		list := &r.lists[i]
		if !bytes.Equal(list.signed.RawIssuer, issuer.RawSubject) || !list.signedBy(issuer) {
			continue
		}
		if _, revoked := list.serials[string(certificate.SerialNumber.Bytes())]; revoked {
			return ErrRevoked
		}
		switch next := list.signed.NextUpdate; {
		case now.Before(list.signed.ThisUpdate), !next.IsZero() && now.After(next):
			if result == ErrNoList {
				result = ErrListExpired
			}
		default:
			result = nil
		}
	}
	return result
}
