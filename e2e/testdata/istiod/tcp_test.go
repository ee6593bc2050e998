package istiod

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/secure/securetest"
	pillionxds "github.com/pillion-proxy/pillion/internal/xds"
)

// carriedFormat is a line of the access log with what became of a connection.
const carriedFormat = "CARRIED %DOWNSTREAM_LOCAL_ADDRESS% %UPSTREAM_CLUSTER% %UPSTREAM_HOST% %RESPONSE_FLAGS% %PILLION_REASON% %REQUESTED_SERVER_NAME% %BYTES_SENT% ms=%DURATION%"

// unlisted is an address that no service has. It is far as well.
const unlisted = "203.0.113.66"

// reviewsRule is the destination rule of reviews, with a part of its traffic policy.
func reviewsRule(policy string) string {
	return `
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: reviews, namespace: default}
spec:
  host: reviews.default.svc.cluster.local
  trafficPolicy: {tls: {mode: DISABLE}` + policy + `}
  subsets:
  - {name: v1, labels: {version: v1}}
  - {name: v2, labels: {version: v2}}
`
}

// reviewsShares divides the connections to port 5432 of reviews by weight.
func reviewsShares(v1, v2 int) string {
	return fmt.Sprintf(`
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: reviews, namespace: default}
spec:
  hosts: [reviews.default.svc.cluster.local]
  tcp:
  - match: [{port: 5432}]
    route:
    - {destination: {host: reviews.default.svc.cluster.local, subset: v1, port: {number: 5432}}, weight: %d}
    - {destination: {host: reviews.default.svc.cluster.local, subset: v2, port: {number: 5432}}, weight: %d}
`, v1, v2)
}

// change applies objects that change listeners, and waits until the agent has what istiod pushes then.
func (d *pod) change(t *testing.T, p *plane, objects string) {
	t.Helper()
	sent := func() string {
		status, err := agentStatus(p)
		if err != nil {
			return ""
		}
		return status.Resources[pillionxds.Listeners.URL()].Sent
	}
	before := sent()
	p.apply(objects)
	await(t, func() error {
		if now := sent(); now == "" || now == before {
			return errors.New("no new listeners yet")
		}
		return nil
	})
	d.awaitConverged(t, p)
}

// registryOnly is the Sidecar of the namespace that lets connections go to known services only.
const registryOnly = `
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {name: default, namespace: default}
spec: {outboundTrafficPolicy: {mode: REGISTRY_ONLY}, egress: [{hosts: ["./*", "istio-system/*"]}]}
`

// newCaller returns a pod of the workload nginx. The pods of reviews, and the address unlisted, are in another namespace, where
// port 9090 sends back what it receives, preceded by its address.
func newCaller(t *testing.T, configs string) (d *pod, far *nettest.Namespace, p *plane) {
	t.Helper()
	d, far, p = newReaderWith(t, carriedFormat, configs)
	far.AddAddress(t, "lo", netip.MustParsePrefix(unlisted+"/32"))
	d.MustRun(t, "ip", "route", "add", unlisted+"/32", "dev", "eth0", "src", d.ip)
	serveNamed(t, far, "9090", nil)
	return d, far, p
}

// serveNamed sends back what it receives at a port, preceded by the address that was reached, over TLS if config is not nil.
func serveNamed(t *testing.T, ns *nettest.Namespace, port string, config *tls.Config) {
	t.Helper()
	listener, ended := ns.Listen(t, "tcp", "0.0.0.0:"+port), make(chan struct{})
	if config != nil {
		listener = tls.NewListener(listener, config)
	}
	go func() {
		defer close(ended)
		acceptAll(listener, func(c net.Conn) {
			address, _, _ := net.SplitHostPort(c.LocalAddr().String())
			io.WriteString(c, address+"\n")
			io.Copy(c, c)
		})
	}()
	t.Cleanup(func() { listener.Close(); <-ended })
}

// reached returns the address of serveNamed that a connection reaches, and checks the bytes in both directions.
func reached(conn net.Conn) (string, error) {
	const sent = "\x00bytes that are not HTTP"
	if _, err := io.WriteString(conn, sent); err != nil {
		return "", err
	}
	var end error
	switch c := conn.(type) {
	case *net.TCPConn:
		end = c.CloseWrite()
	case *tls.Conn:
		end = c.CloseWrite()
	}
	text, err := io.ReadAll(conn)
	address, intact := strings.CutSuffix(string(text), sent)
	if err := errors.Join(err, end); err != nil || !intact {
		return "", fmt.Errorf("%q came back, error %v", text, err)
	}
	return strings.TrimSuffix(address, "\n"), nil
}

// reach makes a connection from the pod and returns the address that it reaches.
func (d *pod) reach(to string) (string, error) {
	conn, err := d.Dial("tcp", to, patience)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	return reached(conn)
}

// count makes connections, eight at a time, and returns how many reach each address.
func count(t *testing.T, connections int, reach func() (string, error)) map[string]int {
	t.Helper()
	const workers = 8
	var counting sync.WaitGroup
	var mu sync.Mutex
	to, failures := map[string]int{}, []error(nil)
	for range workers {
		counting.Go(func() {
			for range connections / workers {
				address, err := reach()
				mu.Lock()
				to[address]++
				if err != nil {
					failures = append(failures, err)
				}
				mu.Unlock()
			}
		})
	}
	counting.Wait()
	if len(failures) > 0 {
		t.Fatalf("%d of %d connections failed: %v", len(failures), connections, failures[0])
	}
	return to
}

// divided fails the test unless part of all connections is the share of a weight in percent, within six standard deviations.
func divided(t *testing.T, part, all int, percent float64) {
	t.Helper()
	want := float64(all) * percent / 100
	if tolerance := 6 * math.Sqrt(want*(1-percent/100)); math.Abs(float64(part)-want) > tolerance {
		t.Errorf("%d of %d connections, want %.0f ± %.0f", part, all, want, tolerance)
	}
}

// Connections are divided by the weights of a VirtualService among the subsets of a destination, and by its new weights after a
// push. The log has the cluster and the endpoint that each one reaches.
func TestTCPConnectionsAreDividedByWeight(t *testing.T) {
	const connections = 1200
	d, _, p := newCaller(t, reviewsRule("")+"---"+reviewsShares(90, 10))
	reach := func() (string, error) { return d.reach("198.51.100.200:5432") }
	first := count(t, connections, reach)
	divided(t, first["203.0.113.7"], connections, 10)
	d.change(t, p, reviewsShares(30, 70))
	second := count(t, connections, reach)
	divided(t, second["203.0.113.7"], connections, 70)
	d.change(t, p, reviewsShares(0, 100))
	third := count(t, 200, reach)
	divided(t, third["203.0.113.7"], 200, 100)
	for subset, address := range map[string]string{"v1": "203.0.113.6", "v2": "203.0.113.7"} {
		line := "CARRIED 198.51.100.200:5432 outbound|5432|" + subset + "|reviews.default.svc.cluster.local " + address + ":9090 - closed -"
		want := first[address] + second[address] + third[address]
		await(t, func() error {
			if n := strings.Count(d.log.String(), line); n != want {
				return fmt.Errorf("%d lines with %q, want %d", n, line, want)
			}
			return nil
		})
	}
}

// tlsHosts are services outside of the mesh whose connections are routed to reviews by the server name that the client asks for.
const tlsHosts = `
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: outside, namespace: default}
spec:
  hosts: [one.tls.test, two.tls.test, both.tls.test, a.wild.tls.test, b.wild.tls.test]
  ports: [{number: 443, name: tls, protocol: TLS}]
  resolution: NONE
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: outside, namespace: default}
spec:
  hosts: [one.tls.test, two.tls.test, both.tls.test, "*.wild.tls.test"]
  tls:
  - match: [{port: 443, sniHosts: [one.tls.test]}]
    route: [{destination: {host: reviews.default.svc.cluster.local, subset: v1, port: {number: 443}}}]
  - match: [{port: 443, sniHosts: [two.tls.test, "*.wild.tls.test"]}]
    route: [{destination: {host: reviews.default.svc.cluster.local, subset: v2, port: {number: 443}}}]
  - match: [{port: 443, sniHosts: [both.tls.test]}]
    route:
    - {destination: {host: reviews.default.svc.cluster.local, subset: v1, port: {number: 443}}, weight: 80}
    - {destination: {host: reviews.default.svc.cluster.local, subset: v2, port: {number: 443}}, weight: 20}
`

// secured returns a function that makes connections of TLS and returns the address that each one reaches. The server's
// certificate is verified, so that TLS ends there and not in between.
func secured(authority *securetest.Authority, name string, dial func() (net.Conn, error)) func() (string, error) {
	return func() (string, error) {
		raw, err := dial()
		if err != nil {
			return "", err
		}
		conn := tls.Client(raw, &tls.Config{ServerName: name, RootCAs: authority.Roots.Pool})
		defer conn.Close()
		return reached(conn)
	}
}

// serveTLS serves reviews' port 443, and unlisted, with a certificate for the hosts.
func serveTLS(t *testing.T, far *nettest.Namespace, hosts ...string) *securetest.Authority {
	t.Helper()
	authority := securetest.New(t, "root of the web")
	config := &tls.Config{Certificates: []tls.Certificate{*authority.ECDSA(t, hosts...)}}
	serveNamed(t, far, "8443", config)
	serveNamed(t, far, "443", config)
	return authority
}

// TLS passes through the sidecar to the subset that is routed for its server name. Other names go where they were going, or
// nowhere if only known services may be reached.
func TestTLSIsRoutedByItsServerName(t *testing.T) {
	d, far, p := newCaller(t, reviewsRule("")+"---"+tlsHosts)
	authority := serveTLS(t, far, "*.tls.test", "*.wild.tls.test")
	to := func(name string) func() (string, error) {
		return secured(authority, name, func() (net.Conn, error) { return d.Dial("tcp", unlisted+":443", patience) })
	}
	for _, c := range []struct{ name, want string }{
		{"one.tls.test", "203.0.113.6"}, {"ONE.tls.test", "203.0.113.6"}, {"two.tls.test", "203.0.113.7"}, {"a.wild.tls.test", "203.0.113.7"},
		{"other.tls.test", unlisted},
	} {
		if address, err := to(c.name)(); err != nil || address != c.want {
			t.Errorf("%s reaches %q, error %v; want %s", c.name, address, err, c.want)
		}
	}
	const connections = 1000
	divided(t, count(t, connections, to("both.tls.test"))["203.0.113.7"], connections, 20)
	if address, err := d.reach(unlisted + ":443"); err == nil { // its server speaks TLS only
		t.Errorf("bytes that are not TLS reach %s", address)
	}
	d.awaitLines(t,
		"outbound|443|v1|reviews.default.svc.cluster.local 203.0.113.6:8443 - closed one.tls.test",
		"outbound|443|v2|reviews.default.svc.cluster.local 203.0.113.7:8443 - closed a.wild.tls.test",
		"PassthroughCluster "+unlisted+":443 - closed other.tls.test")

	d.change(t, p, registryOnly)
	for _, name := range []string{"other.tls.test", "tls.test"} {
		if address, err := to(name)(); err == nil {
			t.Errorf("%s reaches %q", name, address)
		}
	}
	if address, err := to("one.tls.test")(); err != nil || address != "203.0.113.6" {
		t.Errorf("one.tls.test reaches %q, error %v", address, err)
	}
	d.awaitLines(t, "BlackHoleCluster - UH upstream_unhealthy other.tls.test")
}

// passingGateway passes connections of TLS and of bytes to the subsets of reviews.
const passingGateway = `
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: pass, namespace: default}
spec:
  selector: {istio: ingressgateway}
  servers:
  - port: {number: 443, name: tls, protocol: TLS}
    hosts: ["*.tls.test"]
    tls: {mode: PASSTHROUGH}
  - port: {number: 9000, name: tcp, protocol: TCP}
    hosts: ["*"]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: pass, namespace: default}
spec:
  hosts: ["*.tls.test"]
  gateways: [pass]
  tls:
  - match: [{port: 443, sniHosts: [two.tls.test]}]
    route: [{destination: {host: reviews.default.svc.cluster.local, subset: v2, port: {number: 443}}}]
  - match: [{port: 443, sniHosts: [both.tls.test]}]
    route:
    - {destination: {host: reviews.default.svc.cluster.local, subset: v1, port: {number: 443}}, weight: 80}
    - {destination: {host: reviews.default.svc.cluster.local, subset: v2, port: {number: 443}}, weight: 20}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: bytes, namespace: default}
spec:
  hosts: ["*"]
  gateways: [pass]
  tcp:
  - match: [{port: 9000}]
    route:
    - {destination: {host: reviews.default.svc.cluster.local, subset: v1, port: {number: 5432}}, weight: 10}
    - {destination: {host: reviews.default.svc.cluster.local, subset: v2, port: {number: 5432}}, weight: 90}
`

// A gateway passes TLS by its server name, and divides connections of TLS and of bytes by weight.
func TestAGatewayDividesConnectionsByWeight(t *testing.T) {
	const connections = 1000
	x := &ingress{gateway: newGatewayPod(t)}
	far := newFar(t, x.gateway)
	authority := serveTLS(t, far, "*.tls.test")
	serveNamed(t, far, "9090", nil)
	x.plane = startPlaneIn(t, x.gateway, reviewsRule("")+"---"+passingGateway)
	x.gateway.launch(t, x.plane, "PILLION_ACCESS_LOG=/dev/stdout", "PILLION_ACCESS_LOG_FORMAT="+carriedFormat,
		`ISTIO_METAJSON_LABELS={"LABELS":{"app":"istio-ingressgateway","istio":"ingressgateway"}}`)
	x.gateway.awaitReady(t)
	to := func(name string) func() (string, error) {
		return secured(authority, name, func() (net.Conn, error) { return x.dial(tlsPort) })
	}
	await(t, func() error { _, err := to("two.tls.test")(); return err })
	divided(t, count(t, connections, to("both.tls.test"))["203.0.113.7"], connections, 20)
	divided(t, count(t, connections, func() (string, error) {
		conn, err := x.dial(9000)
		if err != nil {
			return "", err
		}
		defer conn.Close()
		return reached(conn)
	})["203.0.113.7"], connections, 90)
	if address, err := to("two.tls.test")(); err != nil || address != "203.0.113.7" {
		t.Errorf("two.tls.test reaches %q, error %v", address, err)
	}
	for _, name := range []string{"other.tls.test", "tls.test"} {
		if address, err := to(name)(); err == nil {
			t.Errorf("%s reaches %s", name, address)
		}
	}
	x.gateway.awaitLines(t, "outbound|443|v2|reviews.default.svc.cluster.local 203.0.113.7:8443 - closed two.tls.test", "- - NR mesh_refused other.tls.test")
}

// awaitLines waits until each text is in a line of the access log.
func (d *pod) awaitLines(t *testing.T, texts ...string) {
	t.Helper()
	await(t, func() error {
		lines := slices.Collect(strings.Lines(d.log.String()))
		for _, text := range texts {
			if !slices.ContainsFunc(lines, func(line string) bool { return strings.HasPrefix(line, "CARRIED ") && strings.Contains(line, text) }) {
				return fmt.Errorf("the access log has no line with %q", text)
			}
		}
		return nil
	})
}

// Connections to addresses that are not of services are carried, or are closed if only known services may be reached. Those to
// services are carried in both cases.
func TestTCPReachesKnownServicesOnly(t *testing.T) {
	d, _, p := newCaller(t, reviewsRule("")+"---"+strings.NewReplacer("name: reviews", "name: headless", "host: reviews", "host: headless").Replace(reviewsRule("")))
	for _, to := range []string{unlisted + ":9090", "198.51.100.200:5432"} {
		if _, err := d.reach(to); err != nil {
			t.Errorf("%s: %v", to, err)
		}
	}
	open, err := d.Dial("tcp", unlisted+":9090", patience)
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	if _, err := io.ReadFull(open, make([]byte, len(unlisted)+1)); err != nil {
		t.Fatal(err)
	}
	d.change(t, p, registryOnly)
	if address, err := d.reach(unlisted + ":9090"); err == nil {
		t.Errorf("%s is reached", address)
	}
	if _, err := d.reach("198.51.100.200:5432"); err != nil {
		t.Error(err)
	}
	if address, err := d.reach("203.0.113.7:9090"); err != nil || address != "203.0.113.7" { // a pod of a headless service
		t.Errorf("%q, %v", address, err)
	}
	d.awaitLines(t, unlisted+":9090 PassthroughCluster "+unlisted+":9090 - closed", unlisted+":9090 BlackHoleCluster - UH upstream_unhealthy",
		"198.51.100.200:5432 outbound|5432||reviews.default.svc.cluster.local")
	if address, err := reached(open); err != nil || address != "" { // a push cuts nothing
		t.Errorf("a connection that was open before: %q, %v", address, err)
	}
}

// Connections to a service have the time limits and the keep-alive of its DestinationRule. A push applies to new connections.
func TestTCPConnectionsHaveTheLimitsOfTheirDestination(t *testing.T) {
	d, _, p := newCaller(t, reviewsRule(", connectionPool: {tcp: {tcpKeepalive: {probes: 5, time: 600s, interval: 60s}}}"))
	dial := func() (conn net.Conn) {
		await(t, func() error { // on a busy machine the limit may pass before the first bytes
			c, err := d.Dial("tcp", "198.51.100.200:5432", patience)
			if err != nil {
				return err
			}
			t.Cleanup(func() { c.Close() })
			conn = c
			_, err = io.ReadFull(c, make([]byte, len("203.0.113.6\n")))
			return err
		})
		return conn
	}
	unlimited := dial()
	await(t, func() error { // the timer counts from 10 minutes
		if out := d.MustRun(t, "ss", "-Htno", "dst", "203.0.113.6/31", "dport", "=", "9090"); !strings.Contains(out, "timer:(keepalive,9min") {
			return fmt.Errorf("the connections to the endpoints are\n%s", out)
		}
		return nil
	})
	d.change(t, p, reviewsRule(", connectionPool: {tcp: {idleTimeout: 1s}}"))
	io.Copy(io.Discard, dial())
	d.change(t, p, reviewsRule(", connectionPool: {tcp: {maxConnectionDuration: 1s, idleTimeout: 0s}}"))
	busy := dial()
	for err := error(nil); err == nil; {
		if _, err = io.WriteString(busy, "x"); err == nil {
			_, err = io.ReadFull(busy, make([]byte, 1))
		}
	}
	d.awaitLines(t, "SI idle_timeout", "DT max_duration")
	for line := range strings.Lines(d.log.String()) {
		var ms int
		if _, after, found := strings.Cut(line, " ms="); found && (strings.Contains(line, "idle_timeout") || strings.Contains(line, "max_duration")) {
			if _, err := fmt.Sscan(after, &ms); err != nil || ms < 1000 {
				t.Errorf("error %v, or before a second: %s", err, line)
			}
		}
	}
	if address, err := reached(unlimited); err != nil || address != "" {
		t.Errorf("the connection from before the limits: %q, %v", address, err)
	}
}
