package istiod

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// sign issues a certificate of a SPIFFE ID by an authority that the test has; nil: one of its own.
func sign(t *testing.T, authority *x509.Certificate, by crypto.PrivateKey, id string, from, until time.Duration) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	name, err := url.Parse(id)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(7), URIs: []*url.URL{name}, NotBefore: time.Now().Add(from), NotAfter: time.Now().Add(until),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	if authority == nil {
		authority, by = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, authority, key.Public(), by)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// Each way in which a client fails to speak mutual TLS has a reason of its own. It is in the log with the cause, in the
// access log, in the metrics and on the page.
func TestEachRefusalOfAClientHasItsReason(t *testing.T) {
	d := newPodOf(t, nginx())
	far := nettest.New(t, "far")
	nettest.Join(t, d.Namespace, far)
	far.AddAddress(t, "eth0", netip.MustParsePrefix("203.0.113.99/32"))
	far.MustRun(t, "ip", "route", "add", d.ip+"/32", "dev", "eth0", "src", "203.0.113.99")
	d.MustRun(t, "ip", "address", "add", d.ip+"/32", "dev", "eth0")
	d.MustRun(t, "ip", "route", "add", "203.0.113.99/32", "dev", "eth0", "src", d.ip)
	serveMutual(t, d)
	const modes = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: nginx, namespace: default}\n" +
		"spec:\n  selector: {matchLabels: {app: nginx}}\n  mtls: {mode: STRICT}\n  portLevelMtls: {8080: {mode: DISABLE}}\n"
	p := startPlaneOf(t, []*pod{d}, modes, mutualServices)
	d.launch(t, p, "PILLION_ACCESS_LOG=/dev/stdout", "PILLION_ACCESS_LOG_FORMAT=TOLD %PILLION_REASON% %DOWNSTREAM_TRANSPORT_FAILURE_REASON%")
	d.awaitReady(t)
	d.awaitIdentity(t)
	root, key, _, _ := p.ca.GetCAKeyCertBundle().GetAll()
	const hour, id = time.Hour, "spiffe://cluster.local/ns/default/sa/caller"
	own := func(id string, from, until time.Duration) []tls.Certificate {
		return []tls.Certificate{sign(t, root, *key, id, from, until)}
	}
	dial := func(port string) net.Conn {
		conn, err := far.Dial("tcp", d.ip+":"+port, patience)
		if err != nil {
			t.Fatal(err)
		}
		conn.SetDeadline(time.Now().Add(patience))
		t.Cleanup(func() { conn.Close() })
		return conn
	}
	whole := clientHello(t)
	dial("8082").Write(whole[:20])
	dial("8082").Write(whole)
	for reason, c := range map[string]struct {
		port   string
		config *tls.Config // nil: plaintext
		cause  string      // in the access log, with _ for spaces
	}{
		"tls_no_certificate": {"8082", &tls.Config{}, "TLS_error:_the_client_has_no_certificate"},
		"tls_expired":        {"8082", &tls.Config{Certificates: own(id, -2*hour, -hour)}, "TLS_error:_the_peer's_certificate_is_expired:_it_claims_to_be_\\x22" + id + "\\x22"},
		"tls_unknown_root":   {"8082", &tls.Config{Certificates: []tls.Certificate{sign(t, nil, nil, id, -hour, hour)}}, "TLS_error:_the_peer's_certificate_is_not_issued_under_a_trusted_root"},
		"tls_name_refused": {"8082", &tls.Config{Certificates: own("spiffe://other.example/ns/default/sa/caller", -hour, hour)},
			"it_claims_to_be_\\x22spiffe://other.example/ns/default/sa/caller\\x22,_want_\\x22spiffe://cluster.local/\\x22"},
		"tls_version":    {"8082", &tls.Config{MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11}, "TLS_error:_no_version"},
		"tls_required":   {"8082", nil, "-"},
		"tls_unexpected": {"8080", &tls.Config{Certificates: own(id, -hour, hour), NextProtos: []string{"istio"}}, "-"},
	} {
		conn := dial(c.port)
		if c.config == nil {
			io.WriteString(conn, "\x00plain")
		} else {
			c.config.InsecureSkipVerify = true
			secured := tls.Client(conn, c.config)
			if err := secured.Handshake(); err == nil {
				_, err = secured.Read(make([]byte, 1))
				if err == nil {
					t.Errorf("%s: the client is served", reason)
				}
			}
		}
		conn.Close()
		d.awaitRefusal(t, reason, c.cause)
	}
	d.awaitRefusal(t, "tls_timeout", "TLS_error:_the_ClientHello_did_not_end_in_time")
	d.awaitRefusal(t, "tls_timeout", "TLS_error:_the_peer_did_not_finish_the_handshake_in_time")
	d.checkRefusals(t)
}

// clientHello returns the first record of a client.
func clientHello(t *testing.T) []byte {
	t.Helper()
	ours, theirs := net.Pipe()
	defer ours.Close()
	go tls.Client(theirs, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"istio"}}).Handshake() // until ours is closed
	head := make([]byte, 5)
	if _, err := io.ReadFull(ours, head); err != nil {
		t.Fatal(err)
	}
	body := make([]byte, int(head[3])<<8|int(head[4]))
	if _, err := io.ReadFull(ours, body); err != nil {
		t.Fatal(err)
	}
	return append(head, body...)
}

func (d *pod) awaitRefusal(t *testing.T, reason, cause string) {
	t.Helper()
	await(t, func() error {
		for line := range strings.Lines(d.log.String()) {
			if strings.HasPrefix(line, "TOLD "+reason+" ") && strings.Contains(line, cause) {
				return nil
			}
		}
		return fmt.Errorf("the access log has no %s because of %s", reason, cause)
	})
}

// checkRefusals checks that the metrics and the page have the reasons, and the log their causes.
func (d *pod) checkRefusals(t *testing.T) {
	t.Helper()
	text, err := d.get(15090, "stats/prometheus")
	if err != nil {
		t.Fatal(err)
	}
	page, err := d.get(adminPort, "live")
	if err != nil {
		t.Fatal(err)
	}
	for _, reason := range []string{"tls_no_certificate", "tls_expired", "tls_unknown_root", "tls_name_refused", "tls_version", "tls_required", "tls_unexpected", "tls_timeout"} {
		count := map[bool]string{true: " 2", false: " 1"}[reason == "tls_timeout"]
		if !hasSample(text, "pillion_flows_total", []string{`direction="inbound"`, `reason="` + reason + `"}` + count + "\n"}) {
			t.Errorf("the metrics do not count%s %s:\n%s", count, reason, linesOf(text, "pillion_flows_total"))
		}
		if !strings.Contains(page, reason) {
			t.Errorf("the page has no %s", reason)
		}
		if log := d.log.String(); !strings.Contains(log, "reason="+reason) {
			t.Errorf("the log has no %s", reason)
		}
	}
	for _, cause := range []string{"it requires mutual TLS", "the client speaks TLS"} {
		if !strings.Contains(d.log.String(), cause) {
			t.Errorf("the log does not say that %s", cause)
		}
	}
}

// What the built program prints of its certificate, and of a server of the mesh as the agent sees it.
func TestTheCertificatesOfAPod(t *testing.T) {
	c := newCouple(t, "STRICT")
	d, far := c.pods[0], c.pods[1]
	certs := func(arguments ...string) (string, error) {
		return d.Run(d.Command(0, 0, d.program, append([]string{"certs"}, arguments...)...))
	}
	out, err := certs()
	for _, want := range []string{"identity  spiffe://cluster.local/ns/default/sa/nginx\n", "issuer    O=cluster.local\n", "renewal   ", "Roots of trust\n  O=cluster.local, serial "} {
		if err != nil || !strings.Contains(out, want) {
			t.Errorf("%v, want %q in\n%s", err, want, out)
		}
	}
	for _, port := range []string{"8080", "8082"} {
		out, err := certs(far.ip+":"+port, "--expect", "spiffe://cluster.local/ns/default/sa/client")
		for _, want := range []string{"identity  spiffe://cluster.local/ns/default/sa/client\n", "presented spiffe://cluster.local/ns/default/sa/nginx\n", "verified  by the roots of trust\n"} {
			if err != nil || !strings.Contains(out, want) {
				t.Errorf("port %s: %v, want %q in\n%s", port, err, want, out)
			}
		}
	}
	if out, err := certs(far.ip+":8080", "--direct"); err == nil || !strings.Contains(out, "rejected  by the server: ") {
		t.Errorf("without a certificate: %v\n%s", err, out)
	}
}
