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

// handshake performs a handshake, after which the connection carries bytes without TLS. Nil: it has failed.
func handshake(conn net.Conn) net.Conn {
	if tls.Client(conn, &tls.Config{InsecureSkipVerify: true}).Handshake() != nil {
		return nil
	}
	return conn
}

// unfinishedRecord sends the beginning of a record of 16 KiB after its handshake.
func unfinishedRecord(conn net.Conn, begun func()) {
	if handshake(conn) == nil {
		return
	}
	if _, err := conn.Write(append([]byte{23, 3, 3, 0x40, 0}, make([]byte, 16_000)...)); err == nil {
		begun()
		drain(conn)
	}
}

// unfinishedHello sends the beginning of a ClientHello of 16 KiB.
func unfinishedHello(conn net.Conn, begun func()) {
	if _, err := conn.Write(append([]byte{22, 3, 1, 0x3f, 0xf0, 1, 0, 0x3f, 0xec, 3, 3}, make([]byte, 15_000)...)); err == nil {
		begun()
		drain(conn)
	}
}

// garbageRecord sends a record after its handshake that cannot be decrypted.
func garbageRecord(conn net.Conn, begun func()) {
	if handshake(conn) == nil {
		return
	}
	if _, err := conn.Write(append([]byte{23, 3, 3, 0x40, 0}, make([]byte, 0x4000)...)); err == nil {
		begun()
		drain(conn)
	}
}

// garbage sends bytes of no protocol.
func garbage(conn net.Conn, begun func()) {
	if _, err := conn.Write(make([]byte, 16<<10)); err == nil {
		begun()
		drain(conn)
	}
}
