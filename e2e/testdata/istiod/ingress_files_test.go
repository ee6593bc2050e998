package istiod

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/secure/securetest"
)

// filesConfig has servers whose certificates, roots and revocation lists are files of the gateway's pod, in DIR.
const filesConfig = `
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: web, namespace: default}
spec:
  selector: {istio: ingressgateway}
  servers:
  - port: {number: 443, name: files, protocol: HTTPS}
    hosts: ["files.ssoon.dev"]
    tls: {mode: SIMPLE, serverCertificate: DIR/tls.crt, privateKey: DIR/tls.key}
  - port: {number: 443, name: two, protocol: HTTPS}
    hosts: ["two.ssoon.dev"]
    tls: {mode: SIMPLE, tlsCertificates: [{serverCertificate: DIR/rsa.crt, privateKey: DIR/rsa.key}, {serverCertificate: DIR/tls.crt, privateKey: DIR/tls.key}]}
  - port: {number: 443, name: partners, protocol: HTTPS}
    hosts: ["partners.ssoon.dev"]
    tls: {mode: MUTUAL, serverCertificate: DIR/tls.crt, privateKey: DIR/tls.key, caCertificates: DIR/ca.crt, caCrl: DIR/crl.pem}
  - port: {number: 443, name: missing, protocol: HTTPS}
    hosts: ["missing.ssoon.dev"]
    tls: {mode: SIMPLE, serverCertificate: DIR/missing.crt, privateKey: DIR/missing.key}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: web, namespace: default}
spec:
  hosts: ["*.ssoon.dev"]
  gateways: [web]
  http:
  - route: [{destination: {host: svc-clusterip.default.svc.cluster.local, port: {number: 80}}}]
`

// filesIngress is an ingress with the servers of filesConfig.
type filesIngress struct {
	*tlsIngress
	volume string // DIR
}

func newFilesIngress(t *testing.T) *filesIngress {
	t.Helper()
	volume, err := os.MkdirTemp(directory, "volume-")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(volume, 0o755); err != nil { // the agent has a user of its own
		t.Fatal(err)
	}
	x := &filesIngress{&tlsIngress{authority: securetest.New(t, "root of the web"), directory: t.TempDir()}, volume}
	x.tlsIngress.write(t, "roots", x.authority.Roots.PEM)
	x.put(t, "ca.crt", x.authority.Roots.PEM)
	x.serveWith(t, "tls", x.authority.ECDSA(t, "*.ssoon.dev"))
	x.serveWith(t, "rsa", x.authority.RSA(t, "*.ssoon.dev"))
	return x
}

// put replaces a file of the volume at once.
func (x *filesIngress) put(t *testing.T, name string, text []byte) {
	t.Helper()
	path := filepath.Join(x.volume, name)
	if err := os.WriteFile(path+".new", text, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

func (x *filesIngress) serveWith(t *testing.T, name string, c *tls.Certificate) {
	t.Helper()
	certificate, key := pemOf(t, c)
	x.put(t, name+".crt", certificate)
	x.put(t, name+".key", key)
}

// partner writes a client's certificate with a serial number for curl.
func (x *filesIngress) partner(t *testing.T, name string, serial int64) *tls.Certificate {
	t.Helper()
	c := x.authority.Leaf(t, "", func(c *x509.Certificate) {
		c.SerialNumber, c.DNSNames = big.NewInt(serial), []string{name + ".example"}
	})
	x.pair(t, name, c)
	return c
}

// A Gateway names files of its pod in the place of secrets. A client whose certificate a list of caCrl has is refused. A
// list and a certificate that are replaced on the disk are in force within seconds, and other clients are served meanwhile.
func TestAGatewayServesWithFilesOfItsPod(t *testing.T) {
	x := newFilesIngress(t)
	good, leaving, revoked := x.partner(t, "good", 11), x.partner(t, "leaving", 12), x.partner(t, "revoked", 13)
	x.pair(t, "stranger", securetest.New(t, "root of strangers").ECDSA(t, "good.example"))
	x.put(t, "crl.pem", x.authority.Revoke(t, revoked))
	x.ingress = newIngress(t, strings.ReplaceAll(filesConfig, "DIR", x.volume))
	await(t, func() error { _, err := x.https("files.ssoon.dev"); return err })
	by := func(name string) []string { return []string{"--cert", filepath.Join(x.directory, name)} }
	for _, c := range []struct {
		host      string
		arguments []string
		want      string // end of curl's output; empty: curl fails
	}{
		{"files.ssoon.dev", nil, " 200 2"},
		{"files.ssoon.dev", []string{"--http1.1"}, " 200 1.1"},
		{"two.ssoon.dev", []string{"--tls-max", "1.2", "--ciphers", "ECDHE-RSA-AES256-GCM-SHA384"}, " 200 2"},
		{"two.ssoon.dev", []string{"--tls-max", "1.2", "--ciphers", "ECDHE-ECDSA-AES256-GCM-SHA384"}, " 200 2"},
		{"partners.ssoon.dev", by("good"), " 200 2"},
		{"partners.ssoon.dev", by("leaving"), " 200 2"},
		{"partners.ssoon.dev", by("revoked"), ""},
		{"partners.ssoon.dev", by("stranger"), ""},
		{"partners.ssoon.dev", nil, ""},
		{"missing.ssoon.dev", nil, ""},
	} {
		if out, err := x.https(c.host, c.arguments...); (err == nil) != (c.want != "") || !strings.HasSuffix(out, c.want) {
			t.Errorf("%s %v: %q, error %v; want %q", c.host, c.arguments, out, err, c.want)
		}
	}
	x.put(t, "crl.pem", x.authority.Revoke(t, revoked, leaving))
	await(t, func() error {
		if out, err := x.https("partners.ssoon.dev", by("good")...); err != nil {
			return fmt.Errorf("the certificate that is not revoked: %q, %w", out, err)
		}
		if _, err := x.https("partners.ssoon.dev", by("leaving")...); err == nil {
			return errors.New("a certificate of the new list is accepted")
		}
		return nil
	})
	stop := x.loadTLS("files.ssoon.dev")
	renewed := x.authority.ECDSA(t, "*.ssoon.dev")
	x.serveWith(t, "tls", renewed)
	await(t, func() error {
		conn, err := x.handshake("files.ssoon.dev")
		if err != nil {
			return err
		}
		defer conn.Close()
		if !conn.ConnectionState().PeerCertificates[0].Equal(renewed.Leaf) {
			return errors.New("the certificate before is presented")
		}
		return nil
	})
	if requests, errs := stop(); len(errs) > 0 || requests < 10 {
		t.Errorf("%d of %d requests are lost: %v", len(errs), requests, errs)
	}
	x.checkFiles(t, good)
}

// checkFiles checks what the gateway shows of the files.
func (x *filesIngress) checkFiles(t *testing.T, good *tls.Certificate) {
	t.Helper()
	log := x.gateway.log.String()
	for _, part := range []string{"the certificate has been revoked", "reason=tls_unknown_root", "reason=tls_no_certificate", "reason=tls_no_identity", "missing.crt"} {
		if !strings.Contains(log, part) {
			t.Errorf("the log has no %s", part)
		}
	}
	dump, err := x.gateway.get(adminPort, "config_dump")
	if err != nil || !strings.Contains(dump, "file-cert:"+x.volume+"/tls.crt~"+x.volume+"/tls.key") || !strings.Contains(dump, "file-root:"+x.volume+"/ca.crt") {
		t.Errorf("the dump does not name the files, error %v", err)
	}
	if strings.Contains(log+dump, "PRIVATE KEY") {
		t.Error("the log or the dump has a key")
	}
	answer, err := x.https("partners.ssoon.dev", "--cert", filepath.Join(x.directory, "good"))
	if want := "DNS=" + good.Leaf.DNSNames[0]; err != nil || !strings.Contains(answer, want) {
		t.Errorf("the server sees %q, error %v, want %s", answer, err, want)
	}
}
