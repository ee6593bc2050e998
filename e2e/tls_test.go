package e2e

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"io"
	"math/big"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TLS passes unchanged: both sides negotiate the same as without the agent. The server name and the protocols that the
// client sends unencrypted are in the record.
func TestTLSPassesAndItsServerNameIsRecorded(t *testing.T) {
	t.Parallel()
	certificate := selfSigned(t, "some.example")
	s := newStage(t)
	s.everyWay(t, func(t *testing.T, w way) {
		listener := w.to.Listen(t, "tcp", netip.AddrPortFrom(w.address, 0).String())
		serveEach(t, tls.NewListener(listener, &tls.Config{
			Certificates: []tls.Certificate{certificate}, NextProtos: []string{"h2", "http/1.1"},
		}), func(conn net.Conn) { io.Copy(conn, conn) })
		raw := w.dial(t, listener.Addr().String())
		conn := tls.Client(raw, &tls.Config{
			ServerName: "some.example", NextProtos: []string{"other", "http/1.1"}, InsecureSkipVerify: true,
		})
		writes(t, conn, everyByte())
		reads(t, conn, everyByte())
		state := conn.ConnectionState()
		if state.NegotiatedProtocol != "http/1.1" || state.PeerCertificates[0].Subject.CommonName == "" ||
			string(state.PeerCertificates[0].Raw) != string(certificate.Certificate[0]) {
			t.Errorf("agreed on %q and a certificate for %v", state.NegotiatedProtocol, state.PeerCertificates[0].DNSNames)
		}
		conn.Close()
		line := s.agent.log.await(t, "downstream="+raw.LocalAddr().String(), "protocol=TLS")
		if name, alpn := attribute(t, line, "server_name"), attribute(t, line, "alpn"); name != "some.example" || alpn != "other,http/1.1" {
			t.Errorf("the record names %q and %q: %s", name, alpn, line)
		}
	})
}

// A real openssl at both ends, with each version of TLS that it supports.
func TestOpenSSLTalksToOpenSSL(t *testing.T) {
	t.Parallel()
	program := requireProgram(t, "openssl")
	s := newStage(t)
	s.eachDirection(t, func(t *testing.T, w way) {
		dir := userDir(t, workloadUID)
		writePEM(t, dir, selfSigned(t, "some.example"))
		address := w.startPeer(t, 8443, program, "s_server", "-accept", "8443", "-quiet", "-rev",
			"-cert", filepath.Join(dir, "certificate"), "-key", filepath.Join(dir, "key"))
		for _, version := range []string{"-tls1_2", "-tls1_3"} {
			cmd := w.from.Command(workloadUID, workloadUID, program, "s_client", "-connect", net.JoinHostPort(w.address.String(), "8443"),
				"-servername", "some.example", "-quiet", version)
			cmd.Stdin = strings.NewReader("hello\nCLOSE\n") // the word at which the server ends the connection
			out, err := w.from.Run(cmd)
			if err != nil || !strings.Contains(out, "olleh") {
				t.Errorf("%s: openssl reports %q, %v", version, out, err)
			}
		}
		s.agent.log.await(t, "original_destination="+address, "server_name=some.example")
	})
}

// selfSigned makes a certificate for name.
func selfSigned(t testing.TB, name string) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	template.Subject.CommonName = name
	raw, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{raw}, PrivateKey: key}
}

// writePEM writes the files certificate and key.
func writePEM(t *testing.T, dir string, certificate tls.Certificate) {
	t.Helper()
	key, err := x509.MarshalPKCS8PrivateKey(certificate.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	for name, block := range map[string]*pem.Block{
		"certificate": {Type: "CERTIFICATE", Bytes: certificate.Certificate[0]},
		"key":         {Type: "PRIVATE KEY", Bytes: key},
	} {
		writeFile(t, filepath.Join(dir, name), string(pem.EncodeToMemory(block)))
	}
}
