package istiod

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/secure/securetest"
)

// meshServers are for proxies of the mesh: any of them, one by its name, one of bytes, and one whose callers a policy names.
const meshServers = `
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: web, namespace: default}
spec:
  selector: {istio: ingressgateway}
  servers:
  - port: {number: 443, name: any, protocol: HTTPS}
    hosts: ["any.ssoon.dev"]
    tls: {mode: ISTIO_MUTUAL}
  - port: {number: 443, name: named, protocol: HTTPS}
    hosts: ["named.ssoon.dev"]
    tls: {mode: ISTIO_MUTUAL, subjectAltNames: ["spiffe://cluster.local/ns/default/sa/caller"]}
  - port: {number: 443, name: bytes, protocol: TLS}
    hosts: ["bytes.ssoon.dev"]
    tls: {mode: ISTIO_MUTUAL}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: web, namespace: default}
spec:
  hosts: ["any.ssoon.dev", "named.ssoon.dev"]
  gateways: [web]
  http:
  - route: [{destination: {host: svc-clusterip.default.svc.cluster.local, port: {number: 80}}}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: bytes, namespace: default}
spec:
  hosts: ["bytes.ssoon.dev"]
  gateways: [web]
  tcp:
  - match: [{port: 443}]
    route: [{destination: {host: svc-clusterip.default.svc.cluster.local, port: {number: 9000}}}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: callers, namespace: default}
spec:
  selector: {matchLabels: {istio: ingressgateway}}
  action: DENY
  rules:
  - from: [{source: {notPrincipals: ["cluster.local/ns/default/sa/caller"]}}]
    to: [{operation: {paths: ["/for-the-caller"]}}]
`

// seenByGateways is a line of the access log with what a gateway knows of its client.
const seenByGateways = "SEEN %REQ(:PATH)% %RESPONSE_CODE% peer=%DOWNSTREAM_PEER_URI_SAN% own=%DOWNSTREAM_LOCAL_URI_SAN% tls=%DOWNSTREAM_TLS_VERSION% reason=%PILLION_REASON%."

// caller is a client from outside of the pods, with a certificate.
type caller struct {
	*ingress
	certificate *tls.Certificate // nil: none
}

// config is how a sidecar of the mesh speaks TLS, but for the name of the server, which it does not verify.
func (c caller) config(server string, protocols ...string) *tls.Config {
	config := &tls.Config{ServerName: server, NextProtos: protocols, InsecureSkipVerify: true}
	if c.certificate != nil {
		config.Certificates = []tls.Certificate{*c.certificate}
	}
	return config
}

// ask sends a request and returns the status and the body.
func (c caller) ask(server, path string, two bool) (status int, body string, err error) {
	client := c.outsider(tlsPort, false)
	transport := client.Transport.(*http.Transport)
	defer transport.CloseIdleConnections()
	protocols := []string{"istio-http/1.1", "istio", "http/1.1"}
	if two {
		protocols = []string{"istio-h2", "istio", "h2"}
	}
	transport.TLSClientConfig = c.config(server, protocols...)
	transport.Protocols = new(http.Protocols)
	transport.Protocols.SetHTTP1(!two)
	transport.Protocols.SetHTTP2(two)
	request, err := http.NewRequest(http.MethodGet, "https://"+server+path, nil)
	if err != nil {
		return 0, "", err
	}
	request.Header.Set("X-Forwarded-Client-Cert", "URI=spiffe://cluster.local/ns/default/sa/forged")
	response, err := client.Do(request)
	if err != nil {
		return 0, "", err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	return response.StatusCode, string(text), err
}

// echo sends a line to the server of bytes, which returns it.
func (c caller) echo() error {
	raw, err := c.dial(tlsPort)
	if err != nil {
		return err
	}
	defer raw.Close()
	raw.SetDeadline(time.Now().Add(patience))
	conn := tls.Client(raw, c.config("bytes.ssoon.dev", "istio-peer-exchange", "istio"))
	if _, err := io.WriteString(conn, "\x00hello\n"); err != nil {
		return err
	}
	conn.CloseWrite()
	if text, err := io.ReadAll(conn); err != nil || string(text) != "\x00hello\n" {
		return fmt.Errorf("the echo is %q, error %v", text, err)
	}
	return nil
}

// ISTIO_MUTUAL accepts the proxies of the mesh with the gateway's own certificate, and no one else: their names decide in
// subjectAltNames and in policies, and go on in x-forwarded-client-cert and into the log. As in Istio, the trust domain is not
// compared: a root that the mesh trusts is.
func TestAGatewayAcceptsProxiesOfTheMesh(t *testing.T) {
	x := newIngressOf(t, "{}", []string{"PILLION_ACCESS_LOG_FORMAT=" + seenByGateways}, meshServers)
	root, key, _, _ := x.plane.ca.GetCAKeyCertBundle().GetAll()
	const hour, id = time.Hour, "spiffe://cluster.local/ns/default/sa/caller"
	signed := func(id string, from, until time.Duration) caller {
		c := sign(t, root, *key, id, from, until)
		return caller{x, &c}
	}
	known := signed(id, -hour, hour)
	await(t, func() error { _, _, err := known.ask("any.ssoon.dev", "/", false); return err })
	const foreign, other = "spiffe://other.example/ns/default/sa/caller", "spiffe://cluster.local/ns/default/sa/other"
	for name, c := range map[string]struct {
		by           caller
		uri          string
		any, named   int // status; 0: the handshake fails
		forTheCaller int
	}{
		"the caller":                  {known, id, 200, 200, 200},
		"another account":             {signed(other, -hour, hour), other, 200, 0, 403},
		"another trust domain":        {signed(foreign, -hour, hour), foreign, 200, 0, 403},
		"another root":                {caller{x, securetest.New(t, "root of other.example").Leaf(t, id, nil)}, "", 0, 0, 0},
		"a certificate for itself":    {caller{x, ptr(sign(t, nil, nil, id, -hour, hour))}, "", 0, 0, 0},
		"an expired certificate":      {signed(id, -2*hour, -hour), "", 0, 0, 0},
		"a certificate without an ID": {signed("https://caller.example/", -hour, hour), "", 0, 0, 0},
		"no certificate":              {caller{x, nil}, "", 0, 0, 0},
	} {
		for _, two := range []bool{false, true} {
			for _, q := range []struct {
				server, path string
				status       int
			}{{"any.ssoon.dev", "/any", c.any}, {"named.ssoon.dev", "/named", c.named}, {"any.ssoon.dev", "/for-the-caller", c.forTheCaller}} {
				status, body, err := c.by.ask(q.server, q.path, two)
				if status != q.status || (err == nil) != (q.status != 0) {
					t.Errorf("%s asks %s%s, HTTP/2 %v: status %d, error %v, want %d", name, q.server, q.path, two, status, err, q.status)
				}
				if _, seen, _ := strings.Cut(body, " "); status == 200 && !ofGateway(seen, c.uri) {
					t.Errorf("%s: the server sees %q", name, seen)
				}
			}
		}
		if err := c.by.echo(); (err == nil) != (c.forTheCaller == http.StatusOK) { // bytes have no path, so a denial that names one applies
			t.Errorf("%s sends bytes: %v", name, err)
		}
	}
	if _, err := x.handshakeWith(known.config("any.ssoon.dev", "h2")); err != nil {
		t.Error(err)
	}
	const own = " own=spiffe://cluster.local/ns/default/sa/ingress tls=TLSv1.3 reason="
	x.awaitSeen(t, "/any 200 peer="+id+own+"completed", "/any 200 peer="+foreign+own+"completed", "- 0 peer="+id+own+"closed",
		"/for-the-caller 200 peer="+id+own+"completed", "/for-the-caller 403 peer="+foreign+own+"policy_denied", "/for-the-caller 403 peer="+other+own+"policy_denied")
	for _, reason := range []string{"unknown_root", "expired", "name_refused", "peer_refused", "no_certificate"} {
		x.awaitSeen(t, "- 0 peer=- own=- tls=- reason=tls_"+reason+".")
	}
}

func ptr(c tls.Certificate) *tls.Certificate { return &c }

// ofGateway reports whether x-forwarded-client-cert, as the workload sees it, has the gateway's client and then the gateway.
func ofGateway(seen, uri string) bool {
	client, gateway, found := strings.Cut(seen, ",By=")
	return found && strings.Contains(client, "URI="+uri) && !strings.Contains(seen, "sa/forged") &&
		strings.Contains(gateway, "URI=spiffe://cluster.local/ns/default/sa/ingress")
}

// handshakeWith performs a handshake, and checks that the gateway presents its own certificate of the mesh.
func (x *ingress) handshakeWith(config *tls.Config) (*x509.Certificate, error) {
	raw, err := x.dial(tlsPort)
	if err != nil {
		return nil, err
	}
	defer raw.Close()
	raw.SetDeadline(time.Now().Add(patience))
	conn := tls.Client(raw, config)
	if err := conn.Handshake(); err != nil {
		return nil, err
	}
	leaf := conn.ConnectionState().PeerCertificates[0]
	if len(leaf.URIs) != 1 || leaf.URIs[0].String() != "spiffe://cluster.local/ns/default/sa/ingress" {
		return leaf, fmt.Errorf("the gateway presents %v", leaf.URIs)
	}
	return leaf, nil
}

// awaitSeen waits for lines of seenByGateways that begin so.
func (x *ingress) awaitSeen(t *testing.T, lines ...string) {
	t.Helper()
	await(t, func() error {
		log := x.gateway.log.String()
		for _, line := range lines {
			if !strings.Contains(log, "SEEN "+line) {
				return errors.New("the log has no line with " + line)
			}
		}
		return nil
	})
}
