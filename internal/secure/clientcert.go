package secure

import (
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"strings"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

// ClientCertElement returns the element of x-forwarded-client-cert that describes the client of a session with a
// certificate, as Envoy builds it. details selects its optional parts.
//
// The text of names is the client's. A name that would end the part that it is in is quoted (CVE-2023-27493); control
// bytes, and bytes that are not ASCII, are an error.
func ClientCertElement(s *Session, details mesh.ClientCertDetails) (string, error) {
	var e element
	if s.Local != nil {
		for _, uri := range s.Local.URIs {
			e.add("By", uri.String())
		}
	}
	digest := sha256.Sum256(s.Peer.Raw)
	e.add("Hash", hex.EncodeToString(digest[:]))
	if details.Cert {
		e.addQuoted("Cert", urlEncodedPEM(s.Peer))
	}
	if details.Chain {
		e.addQuoted("Chain", urlEncodedPEM(s.Chain...))
	}
	if details.Subject {
		e.addQuoted("Subject", distinguishedName(s.Peer.RawSubject, &s.Peer.Subject))
	}
	if details.URI {
		for _, uri := range s.Peer.URIs {
			e.add("URI", uri.String())
		}
		if len(s.Peer.URIs) == 0 {
			e.add("URI", "")
		}
	}
	if details.DNS {
		for _, name := range s.Peer.DNSNames {
			e.add("DNS", name)
		}
	}
	if e.bad != "" {
		return "", fmt.Errorf("a name in the client's certificate has bytes that a header field cannot have: %q", cut(e.bad))
	}
	return strings.Join(e.parts, ";"), nil
}

// element collects the parts of an element.
type element struct {
	parts []string
	bad   string // a value that cannot be forwarded
}

// add adds a value that is quoted if it has to be.
func (e *element) add(key, value string) {
	for i := range len(value) {
		if value[i] < ' ' || value[i] > '~' {
			e.bad = value
			return
		}
	}
	if strings.ContainsAny(value, ",;=\" \\") {
		e.addQuoted(key, quoter.Replace(value))
		return
	}
	e.parts = append(e.parts, key+"="+value)
}

var quoter = strings.NewReplacer(`\`, `\\`, `"`, `\"`)

// addQuoted adds a value in which quotes are escaped.
func (e *element) addQuoted(key, value string) { e.parts = append(e.parts, key+`="`+value+`"`) }

// urlEncodedPEM returns certificates in PEM, with the bytes encoded that Envoy encodes.
func urlEncodedPEM(certificates ...*x509.Certificate) string {
	var text strings.Builder
	for _, c := range certificates {
		text.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}))
	}
	return pemEncoder.Replace(text.String())
}

var pemEncoder = strings.NewReplacer("\n", "%0A", " ", "%20", "+", "%2B", "/", "%2F", "=", "%3D")

// distinguishedName returns a name, given in DER and parsed, as text of RFC 2253, the last element first. Bytes that are not printable ASCII
// are escaped, as OpenSSL does. A quote is always escaped.
func distinguishedName(der []byte, parsed *pkix.Name) string {
	var name pkix.RDNSequence
	if _, err := asn1.Unmarshal(der, &name); err != nil {
		name = parsed.ToRDNSequence() // package x509 accepts more than asn1
	}
	text := name.String()
	var escaped []byte
	for i := range len(text) {
		if c := text[i]; c < ' ' || c > '~' {
			escaped = fmt.Appendf(escaped, `\%02X`, c)
		} else {
			escaped = append(escaped, c)
		}
	}
	return string(escaped)
}
