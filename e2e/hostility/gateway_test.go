package hostility

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/pillion-proxy/pillion/internal/secure/securetest"
)

// startGateway starts a gateway in the place of the agent. It ends TLS at originAddress and sends requests to directAddress.
func (w *world) startGateway(t testing.TB) {
	t.Helper()
	w.scheme = "https"
	leaf := securetest.New(t, "root").Leaf(t, "", func(c *x509.Certificate) { c.URIs, c.DNSNames = nil, []string{"a"} })
	key, err := x509.MarshalPKCS8PrivateKey(leaf.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	text := append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: leaf.Certificate[0]}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})...)
	directory, err := os.MkdirTemp("", "pillion-hostility-") // the gateway's user can read it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(directory) })
	path := filepath.Join(directory, "gateway.pem")
	if err := os.Chmod(directory, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, text, 0o644); err != nil {
		t.Fatal(err)
	}
	w.startAgent(t, nil, "gateway", "--listen", originAddress, "--cert", path, "--key", path, "--route", "*="+directAddress)
}

// secured carries an attack inside TLS, with protocols for ALPN. A gateway routes the streams of HTTP/2 one by one.
func secured(carry func(net.Conn, func()), protocols ...string) func(net.Conn, func()) {
	return func(conn net.Conn, begun func()) {
		carry(tls.Client(conn, &tls.Config{InsecureSkipVerify: true, NextProtos: protocols}), begun)
	}
}
