package main

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"net"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/certview"
	"github.com/pillion-proxy/pillion/internal/identity"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/secure/securetest"
)

// identified is the session of an agent with an identity.
type identified struct{ current *identity.Identity }

func (s identified) Identity() *identity.Identity { return s.current }
func (s identified) Certificates() certview.Status {
	return certview.Status{Source: "CA", Renewals: 1, Renewal: time.Now().Add(time.Hour)}
}

const (
	certsClient = "spiffe://cluster.local/ns/shop/sa/client"
	certsServer = "spiffe://cluster.local/ns/shop/sa/server"
)

// secureServer performs handshakes with clients of the authority.
func secureServer(t *testing.T, a *securetest.Authority) (address string) {
	t.Helper()
	config := &tls.Config{Certificates: []tls.Certificate{*a.Leaf(t, certsServer, nil)}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: a.Roots.Pool}
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			conn.SetDeadline(time.Now().Add(nettest.Patience))
			if secured := tls.Server(conn, config); secured.Handshake() == nil {
				secured.Read(make([]byte, 1))
			}
			conn.Close()
		}
	}()
	t.Cleanup(func() { listener.Close(); <-ended })
	return listener.Addr().String()
}

func adminOf(t *testing.T, source certview.Source) (address string) {
	t.Helper()
	server := httptest.NewServer(certview.Handler(source))
	t.Cleanup(server.Close)
	return server.Listener.Addr().String()
}

func TestCertsShowsTheWorkloadsCertificate(t *testing.T) {
	a := securetest.New(t, "root of the mesh")
	admin := adminOf(t, identified{a.Identity(t, certsClient)})
	out, _, err := lookAt(t.Context(), "certs", "--admin", admin)
	if err != nil || !strings.Contains(out, "  identity  "+certsClient+"\n") || !strings.Contains(out, "Roots of trust\n  CN=root of the mesh, ") {
		t.Errorf("%v\n%s", err, out)
	}
	out, _, err = lookAt(t.Context(), "certs", "-o", "json", "--admin", admin)
	var i certview.Identity
	if json.Unmarshal([]byte(out), &i) != nil || err != nil || i.SPIFFE != certsClient || len(i.Chain) != 1 {
		t.Errorf("%v\n%s", err, out)
	}
	old := a.Identity(t, certsClient)
	old.Certificate = *a.Leaf(t, certsClient, func(c *x509.Certificate) { c.NotAfter = c.NotBefore.Add(time.Minute) })
	for name, source := range map[string]certview.Source{"an expired one": identified{old}, "none yet": identified{}} {
		if out, _, err := lookAt(t.Context(), "certs", "--admin", adminOf(t, source)); !errors.Is(err, errFailed) || out == "" {
			t.Errorf("%s: %v\n%s", name, err, out)
		}
	}
	if _, _, err := lookAt(t.Context(), "certs", "--admin", adminOf(t, nil)); err == nil || !strings.Contains(err.Error(), "--control-plane") {
		t.Errorf("without a control plane: %v", err)
	}
}

func TestCertsShowsWhatAServerPresents(t *testing.T) {
	a, other := securetest.New(t, "root of the mesh"), securetest.New(t, "another root")
	server, admin := secureServer(t, a), adminOf(t, identified{a.Identity(t, certsClient)})
	out, _, err := lookAt(t.Context(), "certs", server, "--sni", "web.shop", "--alpn", "", "--admin", admin)
	for _, want := range []string{server + "\n", "SNI       web.shop\n", "identity  " + certsServer + "\n", "presented " + certsClient + "\n", "CAs       CN=root of the mesh\n", "verified  by the roots of trust\n"} {
		if err != nil || !strings.Contains(out, want) {
			t.Errorf("%v, want %q in\n%s", err, want, out)
		}
	}
	if out, _, err := lookAt(t.Context(), "certs", server, "--expect", certsClient, "--admin", admin); !errors.Is(err, errFailed) || !strings.Contains(out, "verified  no: ") {
		t.Errorf("another name: %v\n%s", err, out)
	}
	strange := adminOf(t, identified{other.Identity(t, certsClient)})
	out, _, err = lookAt(t.Context(), "certs", server, "-o", "json", "--admin", strange)
	var h certview.Handshake
	if json.Unmarshal([]byte(out), &h) != nil || !errors.Is(err, errFailed) || h.Rejected == "" || h.Refused == "" || h.ServerName != "" {
		t.Errorf("another mesh: %v\n%s", err, out)
	}
	if _, _, err := lookAt(t.Context(), "certs", "localhost:1", "--admin", "127.0.0.1:1"); err == nil || !strings.Contains(err.Error(), "pillion agent") {
		t.Errorf("without an agent: %v", err)
	}
}

func TestCertsWorksWithoutAnAgent(t *testing.T) {
	a := securetest.New(t, "root of the mesh")
	server, dir := secureServer(t, a), t.TempDir()
	client := a.Leaf(t, certsClient, nil)
	key, err := x509.MarshalPKCS8PrivateKey(client.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string][]byte{
		"roots.pem": a.Roots.PEM,
		"cert.pem":  pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: client.Certificate[0]}),
		"key.pem":   pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	at := func(name string) string { return filepath.Join(dir, name) }
	for name, c := range map[string]struct {
		args []string
		want string
		ok   bool
	}{
		"all":            {[]string{"--roots", at("roots.pem"), "--cert", at("cert.pem"), "--key", at("key.pem")}, "verified  by the roots of trust\n", true},
		"no certificate": {[]string{"--roots", at("roots.pem")}, "rejected  by the server: ", false},
		"no roots":       {[]string{"--cert", at("cert.pem"), "--key", at("key.pem")}, "verified  no: there are no roots", true},
		"system roots":   {[]string{"--roots", "system", "--cert", at("cert.pem"), "--key", at("key.pem")}, "verified  no: the peer's certificate is not issued", false},
	} {
		out, _, err := lookAt(t.Context(), append([]string{"certs", "--direct", "--alpn", "", server}, c.args...)...)
		if (err == nil) != c.ok || err != nil && !errors.Is(err, errFailed) || !strings.Contains(out, c.want) {
			t.Errorf("%s: %v, want %q in\n%s", name, err, c.want, out)
		}
	}
	for name, args := range map[string][]string{
		"a missing file": {"--direct", "--roots", at("none.pem"), server}, "no roots in a file": {"--direct", "--roots", at("key.pem"), server},
		"a key alone": {"--direct", "--key", at("key.pem"), server}, "flags of --direct": {"--roots", "system", server}, "no port": {"web.shop"},
		"two": {"a:1", "b:2"}, "a long time": {"--timeout", "1h", server},
	} {
		if out, _, err := lookAt(t.Context(), append([]string{"certs"}, args...)...); err == nil || errors.Is(err, errFailed) || out != "" {
			t.Errorf("%s: %v %s", name, err, out)
		}
	}
}
