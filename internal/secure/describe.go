package secure

import (
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"strings"

	"github.com/pillion-proxy/pillion/internal/flow"
)

// Describe returns what access logs print of the first certificate of a chain; nil without one.
func Describe(chain []*x509.Certificate) *flow.Certificate {
	if len(chain) == 0 {
		return nil
	}
	leaf := chain[0]
	d := &flow.Certificate{
		DNS: strings.Join(leaf.DNSNames, ","), Emails: strings.Join(leaf.EmailAddresses, ","),
		Subject: distinguishedName(leaf.RawSubject, &leaf.Subject), Issuer: distinguishedName(leaf.RawIssuer, &leaf.Issuer),
		Serial: serial(leaf), SHA256: digest256(leaf), SHA1: digest1(leaf), PEM: urlEncodedPEM(leaf),
		ChainSerials: each(chain, serial), ChainSHA256: each(chain, digest256), ChainSHA1: each(chain, digest1),
		NotBefore: leaf.NotBefore.UTC(), NotAfter: leaf.NotAfter.UTC(),
	}
	var names []string
	for _, uri := range leaf.URIs {
		names = append(names, uri.String())
	}
	d.URIs, names = strings.Join(names, ","), nil
	for _, address := range leaf.IPAddresses {
		names = append(names, address.String())
	}
	d.IPs = strings.Join(names, ",")
	return d
}

func each(chain []*x509.Certificate, value func(*x509.Certificate) string) string {
	values := make([]string, len(chain))
	for i, certificate := range chain {
		values[i] = value(certificate)
	}
	return strings.Join(values, ",")
}

// serial returns a serial number as OpenSSL prints it: whole bytes.
func serial(c *x509.Certificate) string { return hex.EncodeToString(c.SerialNumber.Bytes()) }

func digest256(c *x509.Certificate) string {
	sum := sha256.Sum256(c.Raw)
	return hex.EncodeToString(sum[:])
}

func digest1(c *x509.Certificate) string {
	sum := sha1.Sum(c.Raw)
	return hex.EncodeToString(sum[:])
}
