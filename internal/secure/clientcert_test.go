package secure

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"net/url"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

// The element of a real session has the parts that the configuration selects, in Envoy's order.
func TestTheElementOfAClientHasTheSelectedParts(t *testing.T) {
	w := newWorld(t)
	w.client = w.Leaf(t, idOfClient, func(c *x509.Certificate) { c.DNSNames = []string{"a.example", "b.example"} })
	_, e, err := w.serve(t, w.mutual(), w.peer(), nil)
	if err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256(w.client.Certificate[0])
	base := "By=" + idOfServer + ";Hash=" + hex.EncodeToString(digest[:])
	block := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: w.client.Certificate[0]}))
	for want, details := range map[string]mesh.ClientCertDetails{
		base:                                   {},
		base + `;Subject="";URI=` + idOfClient: {Subject: true, URI: true}, // istiod's
		base + ";DNS=a.example;DNS=b.example":  {DNS: true},
	} {
		if got, err := ClientCertElement(e.session, details); err != nil || got != want {
			t.Errorf("%+v: %s, %v, want %s", details, got, err, want)
		}
	}
	got, err := ClientCertElement(e.session, mesh.ClientCertDetails{Cert: true, Chain: true})
	cert, chain, _ := strings.Cut(strings.TrimPrefix(got, base+";Cert="), ";Chain=")
	if text, bad := url.QueryUnescape(strings.Trim(cert, `"`)); err != nil || cert != chain || bad != nil || text != block {
		t.Errorf("with certificates: %s, %v", got, err)
	}
}

// Text of a client stays in the part that it is in, or is refused.
func TestNamesOfAClientCannotAddParts(t *testing.T) {
	w := newWorld(t)
	element := func(change func(*x509.Certificate)) (string, error) {
		s := &Session{Peer: w.Leaf(t, "", change).Leaf}
		got, err := ClientCertElement(s, mesh.ClientCertDetails{Subject: true, URI: true, DNS: true})
		_, got, _ = strings.Cut(got, ";")
		return got, err
	}
	for want, change := range map[string]func(*x509.Certificate){
		`Subject="";URI=;DNS="a;By=x,Hash=1"`:  func(c *x509.Certificate) { c.DNSNames = []string{"a;By=x,Hash=1"} },
		`Subject="";URI=;DNS="a\";By=x\\"`:     func(c *x509.Certificate) { c.DNSNames = []string{`a";By=x\`} },
		`Subject="CN=a\"\,O=b\;URI=x\\";URI=`:  func(c *x509.Certificate) { c.Subject = pkix.Name{CommonName: `a",O=b;URI=x\`} },
		`Subject="CN=a\0D\0Ab\C3\A4,O=c";URI=`: func(c *x509.Certificate) { c.Subject = pkix.Name{Organization: []string{"c"}, CommonName: "a\r\nbä"} },
		`Subject="";URI="spiffe://a/b,c;By=x";URI=spiffe://d`: func(c *x509.Certificate) {
			c.URIs = []*url.URL{{Scheme: "spiffe", Host: "a", Path: "/b,c;By=x"}, {Scheme: "spiffe", Host: "d"}}
		},
	} {
		if got, err := element(change); err != nil || got != want {
			t.Errorf("%s, %v, want %s", got, err, want)
		}
	}
	for _, name := range []string{"a\r\nx: y", "a\x00", "a\x7f"} {
		if got, err := element(func(c *x509.Certificate) { c.DNSNames = []string{name} }); err == nil {
			t.Errorf("%q is forwarded as %s", name, got)
		}
	}
}

// Names of versions and suites are those of OpenSSL.
func TestSessionsNameTheirVersionAndSuite(t *testing.T) {
	w := newWorld(t)
	for version, want := range map[uint16]string{
		tls.VersionTLS12: "TLSv1.2 ECDHE-ECDSA-AES128-GCM-SHA256", tls.VersionTLS13: "TLSv1.3 TLS_", // the suite depends on the processor
	} {
		peer := w.peer()
		peer.MaxVersion = version
		_, e, err := w.serve(t, w.mutual(), peer, nil)
		if err != nil {
			t.Fatal(err)
		}
		if got := e.session.VersionName() + " " + e.session.CipherName(); !strings.HasPrefix(got, want) {
			t.Errorf("%s, want %s", got, want)
		}
	}
}

// Each handshake names them for its record.
func TestNamesOfVersionAndSuiteAreNotAllocated(t *testing.T) {
	names := map[uint16]string{}
	for _, suite := range tls.CipherSuites() {
		names[suite.ID] = suite.Name
	}
	for _, suite := range mesh.Suites {
		names[suite.Number] = suite.Name
	}
	versions := map[uint16]string{tls.VersionTLS12: "TLSv1.2", tls.VersionTLS13: "TLSv1.3"}
	for suite, name := range names {
		for version, want := range versions {
			s := Session{Version: version, Suite: suite}
			var gotVersion, gotName string
			n := testing.AllocsPerRun(10, func() { gotVersion, gotName = s.VersionName(), s.CipherName() })
			if n > 0 || gotVersion != want || gotName != name {
				t.Errorf("%s with %s: %s and %s, with %v allocations", want, name, gotVersion, gotName, n)
			}
		}
	}
}
