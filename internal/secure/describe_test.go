package secure

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"encoding/pem"

	"github.com/pillion-proxy/pillion/internal/secure/securetest"
)

// OpenSSL prints the same of a certificate, in its own spelling.
func TestACertificateIsDescribedAsByOpenSSL(t *testing.T) {
	a := securetest.New(t, "root of the mesh")
	certificate := a.Leaf(t, idOfClient, func(c *x509.Certificate) {
		c.URIs = append(c.URIs, securetest.URL(t, "https://a.example/x"))
		c.DNSNames, c.EmailAddresses = []string{"a.example", "b.example"}, []string{"a@b.example"}
		c.IPAddresses = []net.IP{net.IPv4(192, 0, 2, 1), net.ParseIP("2001:db8::1")}
		c.Subject.CommonName, c.Subject.Organization = `a, "b"`, []string{"shop"}
		c.SerialNumber.SetBytes([]byte{0x0a, 0x00, 0xff})
	})
	chain := parse(t, certificate)
	d := Describe(chain)
	file := filepath.Join(t.TempDir(), "leaf.pem")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate.Certificate[0]}), 0o600); err != nil {
		t.Fatal(err)
	}
	openssl := func(words ...string) string {
		out, err := exec.Command("openssl", append([]string{"x509", "-noout", "-in", file}, words...)...).Output()
		if err != nil {
			t.Fatal(err)
		}
		_, value, _ := strings.Cut(strings.TrimSpace(string(out)), "=")
		return value
	}
	for name, c := range map[string]struct{ got, want string }{
		"subject":     {d.Subject, openssl("-subject", "-nameopt", "RFC2253")},
		"issuer":      {d.Issuer, openssl("-issuer", "-nameopt", "RFC2253")},
		"serial":      {d.Serial, strings.ToLower(openssl("-serial"))},
		"SHA-256":     {d.SHA256, strings.ToLower(strings.ReplaceAll(openssl("-fingerprint", "-sha256"), ":", ""))},
		"SHA-1":       {d.SHA1, strings.ToLower(strings.ReplaceAll(openssl("-fingerprint", "-sha1"), ":", ""))},
		"not before":  {d.NotBefore.Format("Jan _2 15:04:05 2006 MST"), strings.Replace(openssl("-startdate"), "GMT", "UTC", 1)},
		"not after":   {d.NotAfter.Format("Jan _2 15:04:05 2006 MST"), strings.Replace(openssl("-enddate"), "GMT", "UTC", 1)},
		"URIs":        {d.URIs, idOfClient + ",https://a.example/x"},
		"DNS":         {d.DNS, "a.example,b.example"},
		"IPs":         {d.IPs, "192.0.2.1,2001:db8::1"},
		"emails":      {d.Emails, "a@b.example"},
		"serials":     {d.ChainSerials, d.Serial},
		"chain":       {d.ChainSHA256, d.SHA256},
		"chain SHA-1": {d.ChainSHA1, d.SHA1},
	} {
		if c.got != c.want {
			t.Errorf("%s: %q, want %q", name, c.got, c.want)
		}
	}
	text := strings.NewReplacer("%0A", "\n", "%20", " ", "%2B", "+", "%2F", "/", "%3D", "=").Replace(d.PEM)
	if block, _ := pem.Decode([]byte(text)); block == nil || !bytes.Equal(block.Bytes, certificate.Certificate[0]) {
		t.Errorf("the PEM is %q", d.PEM)
	}
	if Describe(nil) != nil {
		t.Error("no certificate is described")
	}
	if twice := Describe(append(chain, chain[0])); twice.ChainSerials != d.Serial+","+d.Serial {
		t.Errorf("the serials of a chain are %q", twice.ChainSerials)
	}
}

func parse(t *testing.T, certificate *tls.Certificate) (chain []*x509.Certificate) {
	t.Helper()
	for _, der := range certificate.Certificate {
		parsed, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		chain = append(chain, parsed)
	}
	return chain[:1:1]
}
