package istiod

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/pillion-proxy/pillion/internal/secure/securetest"
)

// tlsConfig has a server of each mode. The gateway's service has port 443 at 8444.
const tlsConfig = `
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: web, namespace: default}
spec:
  selector: {istio: ingressgateway}
  servers:
  - port: {number: 443, name: simple, protocol: HTTPS}
    hosts: ["simple.ssoon.dev", "*.wild.ssoon.dev"]
    tls: {mode: SIMPLE, credentialName: simple}
  - port: {number: 443, name: two, protocol: HTTPS}
    hosts: ["two.ssoon.dev"]
    tls: {mode: SIMPLE, credentialNames: [rsa, ecdsa], minProtocolVersion: TLSV1_2, cipherSuites: [ECDHE-RSA-AES256-GCM-SHA384, ECDHE-ECDSA-AES256-GCM-SHA384]}
  - port: {number: 443, name: mutual, protocol: HTTPS}
    hosts: ["mutual.ssoon.dev"]
    tls: {mode: MUTUAL, credentialName: simple}
  - port: {number: 443, name: optional, protocol: HTTPS}
    hosts: ["optional.ssoon.dev"]
    tls: {mode: OPTIONAL_MUTUAL, credentialName: simple}
  - port: {number: 443, name: mesh, protocol: HTTPS}
    hosts: ["mesh.ssoon.dev"]
    tls: {mode: ISTIO_MUTUAL}
  - port: {number: 443, name: pass, protocol: TLS}
    hosts: ["pass.ssoon.dev"]
    tls: {mode: PASSTHROUGH}
  - port: {number: 15443, name: auto, protocol: TLS}
    hosts: ["svc-clusterip.default.svc.cluster.local"]
    tls: {mode: AUTO_PASSTHROUGH}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: web, namespace: default}
spec:
  hosts: ["*.ssoon.dev"]
  gateways: [web]
  http:
  - route: [{destination: {host: svc-clusterip.default.svc.cluster.local, port: {number: 80}}}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: pass, namespace: default}
spec:
  hosts: ["pass.ssoon.dev"]
  gateways: [web]
  tls:
  - match: [{port: 443, sniHosts: [pass.ssoon.dev]}]
    route: [{destination: {host: svc-clusterip.default.svc.cluster.local, port: {number: 9000}}}]
`

const tlsPort = 8444

// lateServer has a certificate that is missing at first.
const lateServer = `
  - port: {number: 443, name: late, protocol: HTTPS}
    hosts: ["late.ssoon.dev"]
    tls: {mode: SIMPLE, credentialName: late}
  - port: {number: 443, name: pass`

// kubernetesSecret is a certificate with roots as people write it.
func kubernetesSecret(t *testing.T, name string, c *tls.Certificate, roots []byte) *core.Secret {
	t.Helper()
	certificate, key := pemOf(t, c)
	return &core.Secret{
		TypeMeta: meta.TypeMeta{APIVersion: "v1", Kind: "Secret"}, ObjectMeta: meta.ObjectMeta{Name: name, Namespace: "default"},
		Type: core.SecretTypeTLS, Data: map[string][]byte{core.TLSCertKey: certificate, core.TLSPrivateKeyKey: key, "ca.crt": roots},
	}
}

func pemOf(t *testing.T, c *tls.Certificate) (certificate, key []byte) {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(c.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Certificate[0]}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

// tlsIngress is an ingress with the servers of tlsConfig, and the authority of their certificates and of clients'.
type tlsIngress struct {
	*ingress
	authority *securetest.Authority
	directory string // of files for curl
}

func newTLSIngress(t *testing.T, configs string) *tlsIngress {
	t.Helper()
	x := &tlsIngress{authority: securetest.New(t, "root of the web"), directory: t.TempDir()}
	names := []string{"simple.ssoon.dev", "*.ssoon.dev", "*.wild.ssoon.dev"}
	var secrets []string
	for name, c := range map[string]*tls.Certificate{"simple": x.authority.ECDSA(t, names...), "rsa": x.authority.RSA(t, names...), "ecdsa": x.authority.ECDSA(t, names...)} {
		text, err := yaml.Marshal(kubernetesSecret(t, name, c, x.authority.Roots.PEM))
		if err != nil {
			t.Fatal(err)
		}
		secrets = append(secrets, string(text))
	}
	x.write(t, "roots", x.authority.Roots.PEM)
	x.pair(t, "good", x.authority.ECDSA(t, "partner.example"))
	x.pair(t, "stranger", securetest.New(t, "root of strangers").ECDSA(t, "partner.example"))
	x.pair(t, "expired", x.authority.Leaf(t, "", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }))
	x.ingress = newIngress(t, configs, secrets...)
	return x
}

func (x *tlsIngress) write(t *testing.T, name string, text []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(x.directory, name), text, 0o600); err != nil {
		t.Fatal(err)
	}
}

func (x *tlsIngress) pair(t *testing.T, name string, c *tls.Certificate) {
	t.Helper()
	certificate, key := pemOf(t, c)
	x.write(t, name, slices.Concat(certificate, key))
}

// https sends a request by curl. The output ends with the status and the version of HTTP.
func (x *tlsIngress) https(host string, arguments ...string) (string, error) {
	arguments = append([]string{
		"--cacert", filepath.Join(x.directory, "roots"), "--connect-to", fmt.Sprintf("::%s:%d", x.gateway.ip, tlsPort), "-w", " %{http_code} %{http_version}",
	}, arguments...)
	return x.curl(append(arguments, "https://"+host+":443/")...)
}

// Clients of each kind meet the servers of each mode, with the names, keys and versions of the configuration.
func TestAGatewayEndsTLSInEachMode(t *testing.T) {
	x := newTLSIngress(t, tlsConfig)
	with := func(name string) []string { return []string{"--cert", filepath.Join(x.directory, name)} }
	await(t, func() error { _, err := x.https("simple.ssoon.dev"); return err })
	for _, c := range []struct {
		host      string
		arguments []string
		want      string // end of curl's output; empty: curl fails
	}{
		{"simple.ssoon.dev", nil, " 200 2"},
		{"simple.ssoon.dev", []string{"--http1.1"}, " 200 1.1"},
		{"simple.ssoon.dev", []string{"--no-alpn"}, " 200 1.1"},
		{"simple.ssoon.dev", []string{"--tls-max", "1.2"}, " 200 2"},
		{"simple.ssoon.dev", []string{"-H", "Host: mutual.ssoon.dev"}, " 404 2"}, // of another server
		{"simple.ssoon.dev", []string{"--http1.1", "-H", "Host: optional.ssoon.dev"}, " 404 1.1"},
		{"a.wild.ssoon.dev", nil, " 200 2"},
		{"two.ssoon.dev", nil, " 200 2"},
		{"mutual.ssoon.dev", with("good"), " 200 2"},
		{"mutual.ssoon.dev", nil, ""},
		{"mutual.ssoon.dev", with("stranger"), ""},
		{"mutual.ssoon.dev", with("expired"), ""},
		{"optional.ssoon.dev", nil, " 200 2"},
		{"optional.ssoon.dev", with("good"), " 200 2"},
		{"optional.ssoon.dev", with("stranger"), ""},
		{"mesh.ssoon.dev", append(with("good"), "--insecure"), ""}, // not of the mesh
		{"unknown.ssoon.dev", nil, ""},
	} {
		if out, err := x.https(c.host, c.arguments...); (err == nil) != (c.want != "") || !strings.HasSuffix(out, c.want) {
			t.Errorf("%s %v: %q, error %v; want %q", c.host, c.arguments, out, err, c.want)
		}
	}
	for key, want := range map[string]string{"RSA": "Peer signature type: RSA", "ECDSA": "Peer signature type: ECDSA"} {
		out, err := x.openssl("two.ssoon.dev", "-tls1_2", "-cipher", "ECDHE-"+key+"-AES256-GCM-SHA384")
		if err != nil || !strings.Contains(out, want) || !strings.Contains(out, "ECDHE-"+key+"-AES256-GCM-SHA384") {
			t.Errorf("a client for %s: error %v\n%s", key, err, out)
		}
	}
	if out, err := x.openssl("two.ssoon.dev", "-tls1_2", "-cipher", "ECDHE-ECDSA-AES128-GCM-SHA256"); err == nil {
		t.Errorf("a cipher suite that the configuration does not have:\n%s", out)
	}
	for _, reason := range []string{"reason=tls_no_certificate", "reason=tls_unknown_root", "reason=tls_expired"} {
		if !strings.Contains(x.gateway.log.String(), reason) {
			t.Errorf("the log has no %s", reason)
		}
	}
	if strings.Contains(x.gateway.log.String(), "PRIVATE KEY") {
		t.Error("the log has a key")
	}
	dump, err := x.gateway.get(adminPort, "config_dump")
	if err != nil || !strings.Contains(dump, "kubernetes://simple") || strings.Contains(dump, "PRIVATE KEY") {
		t.Errorf("error %v, or the dump has no secret, or a key", err)
	}
}

// TLS passes to the service whose name the client asks for, as a host or as istiod names its clusters. Other names, also those of
// services that exist, meet no server.
func TestAGatewayPassesTLS(t *testing.T) {
	x := newTLSIngress(t, tlsConfig)
	const service = "_.svc-clusterip.default.svc.cluster.local"
	for _, c := range []struct {
		port     int
		name     string
		protocol string
		passes   bool
	}{
		{15443, "outbound_.80_." + service, "istio-http/1.1", true},
		{15443, "outbound_.80_." + service, "http/1.1", false}, // of the mesh only
		{15443, "outbound_.81_." + service, "istio", false},
		{15443, "outbound_.80_._.nginx-service.default.svc.cluster.local", "istio", false},
		{15443, "simple.ssoon.dev", "istio", false},
		{15443, "", "istio", false},
	} {
		config := &tls.Config{ServerName: c.name, NextProtos: []string{c.protocol}, InsecureSkipVerify: true}
		var presented []*x509.Certificate
		config.VerifyConnection = func(s tls.ConnectionState) error {
			presented = s.PeerCertificates
			return nil
		}
		try := func() error {
			raw, err := x.dial(c.port)
			if err != nil {
				return err
			}
			defer raw.Close()
			raw.SetDeadline(time.Now().Add(patience))
			return tls.Client(raw, config).Handshake()
		}
		if c.passes {
			await(t, try)
		} else if err := try(); err == nil {
			t.Errorf("%s at %d passes", c.name, c.port)
		}
		if reached := len(presented) > 0 && slices.ContainsFunc(presented[0].URIs, func(u *url.URL) bool { return strings.HasSuffix(u.Path, "/sa/nginx") }); reached != c.passes {
			t.Errorf("%s at %d: the pod is reached: %v", c.name, c.port, reached)
		}
	}
	hello := helloFor(t, "pass.ssoon.dev")
	conn, err := x.dial(tlsPort)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	echo := make([]byte, len(hello))
	if _, err := conn.Write(hello); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(conn, echo); err != nil || !bytes.Equal(echo, hello) {
		t.Errorf("the echo is %q, error %v", echo, err)
	}
}

// helloFor returns what a client of TLS sends first that asks for a name.
func helloFor(t *testing.T, name string) []byte {
	t.Helper()
	client, server := net.Pipe()
	defer server.Close()
	go tls.Client(client, &tls.Config{ServerName: name}).Handshake()
	b := make([]byte, 1<<14)
	n, err := server.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	return b[:n]
}

// openssl performs a handshake and returns what it prints. An error means that the handshake has failed.
func (x *tlsIngress) openssl(name string, arguments ...string) (string, error) {
	var out []byte
	err := x.gateway.Try(func() (err error) {
		cmd := x.gateway.Command(0, 0, "openssl", append([]string{"s_client", "-connect", fmt.Sprintf("%s:%d", x.gateway.ip, tlsPort), "-servername", name}, arguments...)...)
		out, err = cmd.CombinedOutput()
		return err
	})
	return string(out), err
}

// A certificate is missing and comes later. Another one changes under load, and is followed by one that cannot be used: no request
// is lost.
func TestCertificatesOfAGatewayComeAndChangeUnderLoad(t *testing.T) {
	x := newTLSIngress(t, strings.Replace(tlsConfig, "\n  - port: {number: 443, name: pass", lateServer, 1))
	secrets := x.plane.KubeClient().Kube().CoreV1().Secrets("default")
	await(t, func() error { _, err := x.https("simple.ssoon.dev"); return err })
	if out, err := x.https("late.ssoon.dev"); err == nil {
		t.Errorf("a server without a certificate answers %q", out)
	}
	if log := x.gateway.log.String(); !strings.Contains(log, "reason=tls_no_identity") || !strings.Contains(log, "kubernetes://late") {
		t.Error("the log does not name the secret")
	}
	stop := x.loadTLS("simple.ssoon.dev")
	late := kubernetesSecret(t, "late", x.authority.ECDSA(t, "late.ssoon.dev"), x.authority.Roots.PEM)
	if _, err := secrets.Create(t.Context(), late, meta.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	x.awaitSecret(t, "late", func() error {
		_, err := x.https("late.ssoon.dev")
		return err
	})
	presented := func() *x509.Certificate {
		conn, err := x.handshake("simple.ssoon.dev")
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		return conn.ConnectionState().PeerCertificates[0]
	}
	change := func(secret *core.Secret) {
		if _, err := secrets.Update(t.Context(), secret, meta.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	var last *tls.Certificate
	for range 5 {
		last = x.authority.ECDSA(t, "simple.ssoon.dev")
		change(kubernetesSecret(t, "simple", last, x.authority.Roots.PEM))
		x.awaitSecret(t, "simple", func() error {
			if !presented().Equal(last.Leaf) {
				return errors.New("the certificate before is presented")
			}
			return nil
		})
	}
	broken := kubernetesSecret(t, "simple", x.authority.ECDSA(t, "simple.ssoon.dev"), x.authority.Roots.PEM)
	broken.Data[core.TLSPrivateKeyKey] = []byte("not a key")
	change(broken)
	x.awaitSecret(t, "simple", func() error {
		if log := x.gateway.log.String(); !strings.Contains(log, "kubernetes://simple") || !strings.Contains(log, "failed to find any PEM data in key input") {
			return errors.New("the secret is not rejected")
		}
		return nil
	})
	if !presented().Equal(last.Leaf) {
		t.Error("another certificate than the last good one is presented")
	}
	if requests, errs := stop(); len(errs) > 0 || requests < 100 {
		t.Errorf("%d of %d requests are lost: %v", len(errs), requests, errs)
	}
}

// awaitSecret waits for the effect of a secret that has changed. istiod reads the change from a cache that may be late,
// and puts off a push while changes come.
func (x *tlsIngress) awaitSecret(t *testing.T, name string, condition func() error) {
	t.Helper()
	var pushed time.Time
	await(t, func() error {
		if time.Since(pushed) > time.Second {
			x.plane.secretChanged("default", name)
			pushed = time.Now()
		}
		return condition()
	})
}

func (x *tlsIngress) handshake(name string) (*tls.Conn, error) {
	raw, err := x.dial(tlsPort)
	if err != nil {
		return nil, err
	}
	conn := tls.Client(raw, &tls.Config{ServerName: name, RootCAs: x.authority.Roots.Pool})
	raw.SetDeadline(time.Now().Add(patience))
	if err := conn.Handshake(); err != nil {
		raw.Close()
		return nil, err
	}
	return conn, nil
}

// loadTLS is load over TLS, to a server by its name.
func (x *tlsIngress) loadTLS(name string) (stop func() (requests int64, errs []error)) {
	return x.loadBy(func(keepAlive bool) *http.Client {
		client := x.outsider(tlsPort, keepAlive)
		client.Transport.(*http.Transport).TLSClientConfig = &tls.Config{ServerName: name, RootCAs: x.authority.Roots.Pool}
		return client
	}, "https://"+name+"/")
}
