package istiod

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// outside is the address of clients of the gateway.
const outside = "203.0.113.77"

// ingressService is a service with one pod, behind a sidecar.
const ingressService = `
apiVersion: v1
kind: Service
metadata: {name: svc-clusterip, namespace: default}
spec:
  clusterIP: 198.51.100.211
  selector: {app: nginx}
  ports: [{name: http, port: 80, targetPort: 8080}, {name: tcp, port: 9000, targetPort: 8082}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: svc-clusterip-1, namespace: default, labels: {kubernetes.io/service-name: svc-clusterip}}
addressType: IPv4
endpoints:
- {addresses: [203.0.113.4], conditions: {ready: true, serving: true, terminating: false}, nodeName: node1, targetRef: {kind: Pod, name: nginx-deployment-68d4d6fb8c-6gd8s, namespace: default}}
ports: [{name: http, port: 8080, protocol: TCP}, {name: tcp, port: 8082, protocol: TCP}]
`

const ingressConfig = `
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: web, namespace: default}
spec:
  selector: {istio: ingressgateway}
  servers:
  - port: {number: 80, name: http, protocol: HTTP}
    hosts: ["www.ssoon.dev"]
  - port: {number: 80, name: http-secure, protocol: HTTP}
    hosts: ["secure.ssoon.dev"]
    tls: {httpsRedirect: true}
  - port: {number: 9000, name: tcp, protocol: TCP}
    hosts: ["*"]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: web, namespace: default}
spec:
  hosts: ["www.ssoon.dev", "secure.ssoon.dev"]
  gateways: [web]
  http:
  - route: [{destination: {host: svc-clusterip.default.svc.cluster.local, port: {number: 80}}}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: tcp, namespace: default}
spec:
  hosts: ["*"]
  gateways: [web]
  tcp:
  - match: [{port: 9000}]
    route: [{destination: {host: svc-clusterip.default.svc.cluster.local, port: {number: 9000}}}]
`

// anotherListener is a further listener of the gateway.
const anotherListener = `
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: more, namespace: default}
spec:
  selector: {istio: ingressgateway}
  servers:
  - port: {number: 9081, name: http-more, protocol: HTTP}
    hosts: ["www.ssoon.dev"]
`

// ingress is a gateway in front of a pod with a sidecar, both configured by istiod.
type ingress struct {
	plane         *plane
	gateway, back *pod
	agent         *nettest.Process // of the gateway
}

// newGatewayPod returns the gateway's pod. Clients from outside are in its namespace.
func newGatewayPod(t *testing.T) *pod {
	t.Helper()
	g := newPodWithoutRules(t, workload{pod: gatewayPod, ip: "203.0.113.250", account: "ingress", name: "istio-ingressgateway", app: "istio-ingressgateway"})
	g.command = []string{"proxy", "router", "--domain", "default.svc.cluster.local", "--proxyLogLevel=warning", "--log_output_level=default:info"}
	g.AddAddress(t, "lo", netip.MustParsePrefix(outside+"/32"))
	return g
}

func newIngress(t *testing.T, configs string, objects ...string) *ingress {
	t.Helper()
	return newIngressOf(t, "{}", nil, configs, objects...)
}

// newIngressOf is newIngress with gatewayTopology of the gateway's ProxyConfig, and with variables of both agents.
func newIngressOf(t *testing.T, topology string, variables []string, configs string, objects ...string) *ingress {
	t.Helper()
	g := newGatewayPod(t)
	b := newPodOf(t, nginx())
	nettest.Join(t, g.Namespace, b.Namespace)
	for d, far := range map[*pod]string{g: b.ip, b: g.ip} {
		d.MustRun(t, "ip", "address", "add", d.ip+"/32", "dev", "eth0")
		d.MustRun(t, "ip", "route", "add", far+"/32", "dev", "eth0", "src", d.ip)
	}
	serveMutual(t, b)
	x := &ingress{gateway: g, back: b, plane: startPlaneOf(t, []*pod{g, b}, configs, append(objects, ingressService)...)}
	for _, d := range []*pod{b, g} {
		x.agent = d.launch(t, x.plane, append(variables, "PILLION_ACCESS_LOG=/dev/stdout", `PROXY_CONFIG={"discoveryAddress":"127.0.0.1:15012","gatewayTopology":`+topology+`}`,
			`ISTIO_METAJSON_LABELS={"LABELS":{"app":"`+d.app+`","istio":"ingressgateway","service.istio.io/canonical-name":"`+d.app+`"}}`)...)
	}
	for _, d := range []*pod{b, g} {
		d.awaitReady(t)
		d.awaitIdentity(t)
	}
	return x
}

// outsider is an HTTP client that connects from outside to a port of the gateway, whatever the URL is.
func (x *ingress) outsider(port int, keepAlive bool) *http.Client {
	return &http.Client{Timeout: patience, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{DisableKeepAlives: !keepAlive, Dial: func(string, string) (net.Conn, error) { return x.dial(port) }}}
}

func (x *ingress) dial(port int) (conn net.Conn, err error) {
	err = x.gateway.Try(func() error {
		d := net.Dialer{Timeout: patience, LocalAddr: &net.TCPAddr{IP: net.ParseIP(outside)}}
		conn, err = d.Dial("tcp", net.JoinHostPort(x.gateway.ip, strconv.Itoa(port)))
		return err
	})
	return conn, err
}

func (x *ingress) get(client *http.Client, url string) (*http.Response, string, error) {
	response, err := client.Get(url)
	if err != nil {
		return nil, "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	return response, string(body), err
}

// A client outside of the mesh reaches the pod through the gateway, and both agents write the lines that Istio's proxies
// write.
func TestAnIngressGatewayServesClientsFromOutside(t *testing.T) {
	x := newIngress(t, ingressConfig)
	await(t, func() error {
		out, err := x.curl("-H", "Host: www.ssoon.dev:30293", "http://203.0.113.250:8080/")
		if err == nil && !strings.HasPrefix(out, "HTTP/1.1 ") {
			err = fmt.Errorf("curl prints %q", out)
		}
		return err
	})
	const stamp, id = `\[[0-9T:.Z-]+\]`, `"[0-9a-f-]{36}"`
	for d, line := range map[*pod]string{
		x.gateway: stamp + ` "GET / HTTP/1\.1" 200 - via_upstream - "-" 0 \d+ \d+ \d+ "203\.0\.113\.77" "curl/[^"]+" ` + id +
			` "www\.ssoon\.dev:30293" "203\.0\.113\.4:8080" outbound\|80\|\|svc-clusterip\.default\.svc\.cluster\.local ` +
			`203\.0\.113\.250:\d+ 203\.0\.113\.250:8080 203\.0\.113\.77:\d+ - -\n`,
		x.back: stamp + ` "GET / HTTP/1\.1" 200 - via_upstream - "-" 0 \d+ \d+ \d+ "203\.0\.113\.77" "curl/[^"]+" ` + id +
			` "www\.ssoon\.dev:30293" "203\.0\.113\.4:8080" inbound\|8080\|\| 127\.0\.0\.6:\d+ 203\.0\.113\.4:8080 203\.0\.113\.77:0 ` +
			`outbound_\.80_\._\.svc-clusterip\.default\.svc\.cluster\.local default\n`,
	} {
		await(t, func() error {
			if !regexp.MustCompile(line).MatchString(d.log.String()) {
				return fmt.Errorf("%s has no such line", d.workload.pod)
			}
			return nil
		})
	}
	client := x.outsider(8080, true)
	defer client.CloseIdleConnections()
	for _, c := range []struct {
		url, location string
		status        int
	}{
		{"http://www.ssoon.dev/", "", 200},
		{"http://other.ssoon.dev/", "", 404},
		{"http://secure.ssoon.dev:8080/path?q", "https://secure.ssoon.dev:8080/path?q", 301},
	} {
		response, body, err := x.get(client, c.url)
		if err != nil || response.StatusCode != c.status || response.Header.Get("Location") != c.location {
			t.Errorf("%s: %v, %q, error %v", c.url, response, body, err)
		}
	}
	if text, err := x.gateway.get(adminPort, "explain?url=http://www.ssoon.dev:8080/"); err != nil || !strings.Contains(text, `"result":"sent to outbound|80||svc-clusterip`) {
		t.Errorf("explain: %s, error %v", text, err)
	}
	conn, err := x.dial(9000)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	io.WriteString(conn, "GET / HTTP/1.1 is a line of bytes\n")
	if line, err := bufio.NewReader(conn).ReadString('\n'); err != nil || line != "GET / HTTP/1.1 is a line of bytes\n" {
		t.Errorf("the echo is %q, error %v", line, err)
	}
	if text, err := x.gateway.get(15090, "stats/prometheus"); err != nil || !hasSample(text, "istio_requests_total", []string{
		`reporter="source"`, `source_workload="istio-ingressgateway"`, `destination_workload="nginx-deployment"`, `response_code="200"`}) {
		t.Errorf("metrics, error %v:\n%s", err, linesOf(text, "istio_requests_total"))
	} else if !strings.Contains(text, "\ngo_gc_gogc_percent 200\n") {
		t.Errorf("the collector is not a gateway's: %s", linesOf(text, "go_gc_gogc"))
	}
	if status, err := x.plane.status(gatewayPod + ".default"); err != nil || status.ProxyType != "router" {
		t.Errorf("istiod shows %+v, error %v", status, err)
	}
}

func (x *ingress) curl(arguments ...string) (string, error) {
	var out []byte
	err := x.gateway.Try(func() (err error) {
		cmd := x.gateway.Command(0, 0, "curl", append([]string{"-sS", "--max-time", "60", "--interface", outside}, arguments...)...)
		out, err = cmd.Output()
		return err
	})
	return string(out), err
}

// load sends requests on connections that are kept and on new ones, until stop is called.
func (x *ingress) load(port int) (stop func() (requests int64, errs []error)) {
	return x.loadBy(func(keepAlive bool) *http.Client { return x.outsider(port, keepAlive) }, "http://www.ssoon.dev/")
}

// loadBy is load with other clients, to a URL.
func (x *ingress) loadBy(outsider func(keepAlive bool) *http.Client, url string) (stop func() (requests int64, errs []error)) {
	var count atomic.Int64
	var mu sync.Mutex
	var errs []error
	var senders sync.WaitGroup
	done := make(chan struct{})
	for i := range 4 {
		senders.Go(func() {
			client := outsider(i%2 == 0)
			defer client.CloseIdleConnections()
			for {
				select {
				case <-done:
					return
				default:
				}
				response, _, err := x.get(client, url)
				if err == nil && response.StatusCode != 200 {
					err = errors.New(response.Status)
				}
				if count.Add(1); err != nil {
					mu.Lock()
					errs = append(errs, err)
					mu.Unlock()
				}
			}
		})
	}
	return func() (int64, []error) {
		close(done)
		senders.Wait()
		return count.Load(), errs
	}
}

// Listeners come and go by pushes, and a route changes, while another listener loses no request.
func TestListenersComeAndGoUnderLoad(t *testing.T) {
	x := newIngress(t, ingressConfig)
	refused := func() error {
		conn, err := x.dial(9081)
		if err == nil {
			conn.Close()
		}
		if !errors.Is(err, syscall.ECONNREFUSED) {
			return fmt.Errorf("port 9081 answers %v", err)
		}
		return nil
	}
	if err := refused(); err != nil {
		t.Error(err)
	}
	more := strings.Replace(ingressConfig, "gateways: [web]\n  http", "gateways: [web, more]\n  http", 1)
	stop := x.load(8080)
	for range 3 {
		x.plane.apply(anotherListener)
		x.plane.apply(more)
		client := x.outsider(9081, true)
		await(t, func() error {
			response, _, err := x.get(client, "http://www.ssoon.dev/")
			if err == nil && response.StatusCode != 200 {
				err = errors.New(response.Status)
			}
			return err
		})
		x.plane.remove(anotherListener)
		x.plane.apply(ingressConfig)
		await(t, refused)
		client.CloseIdleConnections()
	}
	if requests, errs := stop(); len(errs) > 0 || requests < 10 {
		t.Errorf("%d of %d requests are lost: %v", len(errs), requests, errs)
	}
}

// gatewayAPI is a gateway of Kubernetes' own kind, which istiod compiles for the same pod.
const gatewayAPI = `
apiVersion: gateway.networking.k8s.io/v1
kind: GatewayClass
metadata: {name: istio}
spec: {controllerName: istio.io/gateway-controller}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: web, namespace: default}
spec:
  addresses: [{value: istio-ingressgateway, type: Hostname}]
  gatewayClassName: istio
  listeners: [{name: http, hostname: "*.ssoon.dev", port: 80, protocol: HTTP}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: web, namespace: default}
spec:
  parentRefs: [{name: web}]
  hostnames: [www.ssoon.dev]
  rules:
  - matches: [{path: {type: PathPrefix, value: /old}}]
    filters: [{type: RequestRedirect, requestRedirect: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /new}, statusCode: 302}}]
  - backendRefs: [{name: svc-clusterip, port: 80}]
`

func TestRoutesOfTheGatewayAPIAreFollowed(t *testing.T) {
	x := newIngress(t, "", gatewayAPI)
	client := x.outsider(8080, true)
	defer client.CloseIdleConnections()
	for _, c := range []struct {
		url, location string
		status        int
	}{
		{"http://www.ssoon.dev/path", "", 200},
		{"http://www.ssoon.dev/old/path", "http://www.ssoon.dev/new/path", 302},
		{"http://other.ssoon.dev/", "", 404},
	} {
		await(t, func() error {
			response, body, err := x.get(client, c.url)
			if err == nil && (response.StatusCode != c.status || response.Header.Get("Location") != c.location) {
				err = fmt.Errorf("%s: %v, %q", c.url, response, body)
			}
			return err
		})
	}
}

// A port that cannot be bound is reported by name, and the other listeners serve.
func TestAPortThatIsTakenIsReported(t *testing.T) {
	x := newIngress(t, ingressConfig)
	taken := x.gateway.Listen(t, "tcp4", "0.0.0.0:9081")
	x.plane.apply(anotherListener)
	await(t, func() error {
		dump, err := x.gateway.get(adminPort, "config_dump")
		if err == nil && !strings.Contains(dump, "another process or listener has this port") {
			err = errors.New("the listener has no error state")
		}
		return err
	})
	if log := x.gateway.log.String(); !strings.Contains(log, "cannot bind a listener") || !strings.Contains(log, "listener=0.0.0.0_9081") {
		t.Error("the log does not name the listener")
	}
	x.gateway.awaitReady(t)
	if out, err := x.curl("-H", "Host: www.ssoon.dev", "http://203.0.113.250:8080/"); err != nil {
		t.Errorf("curl: %q, %v", out, err)
	}
	taken.Close()
	await(t, func() error {
		conn, err := x.dial(9081)
		if err == nil {
			conn.Close()
		}
		return err
	})
}

// With gatewayTopology.proxyProtocol istiod has the listeners of a gateway take the client's address from the header.
func TestAGatewayTakesClientsFromTheProxyProtocol(t *testing.T) {
	x := newIngressOf(t, `{"proxyProtocol":{}}`, nil, ingressConfig)
	await(t, func() error {
		conn, err := x.dial(8080)
		if err != nil {
			return err
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(patience))
		io.WriteString(conn, "PROXY TCP4 192.0.2.9 203.0.113.250 4660 80\r\nGET /named HTTP/1.1\r\nHost: www.ssoon.dev\r\nConnection: close\r\n\r\n")
		response, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err == nil && response.StatusCode != 200 {
			err = errors.New(response.Status)
		}
		return err
	})
	await(t, func() error {
		for line := range strings.Lines(x.gateway.log.String()) {
			if strings.Contains(line, "GET /named") && strings.Contains(line, " 192.0.2.9:4660 ") {
				return nil
			}
		}
		return fmt.Errorf("the log has\n%s", x.gateway.log.String())
	})
	dump, err := x.gateway.get(adminPort, "config_dump")
	if err != nil || !strings.Contains(dump, "listener.proxy_protocol.v3.ProxyProtocol") {
		t.Fatalf("no listener has the filter, error %v", err)
	}
	optional := strings.Contains(dump, `"allow_requests_without_proxy_protocol": true`)
	if out, err := x.curl("-H", "Host: www.ssoon.dev", "http://203.0.113.250:8080/"); (err == nil) != optional {
		t.Errorf("without a header, which is optional %v: %q, %v", optional, out, err)
	}
}

// deniedClient is denied by the gateway. It is known by the address that the gateway takes for the client's.
const deniedClient = `
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: client, namespace: default}
spec:
  selector: {matchLabels: {istio: ingressgateway}}
  action: DENY
  rules: [{from: [{source: {remoteIpBlocks: ["192.0.2.7/32"]}}]}]
`

// The client of a request is the peer, whatever that says of itself, or with gatewayTopology.numTrustedProxies the one that as many
// proxies name. Policies and the log have the same client.
func TestAGatewayTrustsAsManyProxiesAsItHas(t *testing.T) {
	for proxies, tests := range map[int][]struct {
		forwarded, client string // client: in the log, with a port unless it is the peer
		status            int
	}{
		0: {{"", outside, 200}, {"192.0.2.7", outside, 200}, {"192.0.2.7, 192.0.2.8", outside, 200}},
		2: {
			{"192.0.2.7, 192.0.2.8", "192.0.2.7:0", 403}, {"192.0.2.8, 192.0.2.7", "192.0.2.8:0", 200},
			{"192.0.2.7, 192.0.2.9, 192.0.2.8", "192.0.2.9:0", 200}, {"192.0.2.9, 192.0.2.7, 192.0.2.8", "192.0.2.7:0", 403},
			{"192.0.2.7", outside, 200}, {"", outside, 200},
		},
	} {
		t.Run(fmt.Sprintf("%d proxies", proxies), func(t *testing.T) {
			x := newIngressOf(t, fmt.Sprintf(`{"numTrustedProxies":%d}`, proxies), nil, ingressConfig+deniedClient)
			client := x.outsider(8080, true)
			defer client.CloseIdleConnections()
			await(t, func() error {
				response, _, err := x.get(client, "http://www.ssoon.dev/")
				if err == nil && response.StatusCode != 200 {
					err = errors.New(response.Status)
				}
				return err
			})
			for i, c := range tests {
				request, err := http.NewRequest("GET", fmt.Sprintf("http://www.ssoon.dev/forwarded-%d", i), nil)
				if err != nil {
					t.Fatal(err)
				}
				if c.forwarded != "" {
					request.Header.Set("X-Forwarded-For", c.forwarded)
				}
				response, err := client.Do(request)
				if err != nil {
					t.Fatal(err)
				}
				io.Copy(io.Discard, response.Body)
				response.Body.Close()
				if response.StatusCode != c.status {
					t.Errorf("forwarded for %q: status %d, want %d", c.forwarded, response.StatusCode, c.status)
				}
				address := c.client
				if address == outside {
					address += ":" // of the connection
				}
				await(t, func() error {
					for line := range strings.Lines(x.gateway.log.String()) {
						if strings.Contains(line, request.URL.Path+" ") && strings.Contains(line, " "+address) {
							return nil
						}
					}
					return fmt.Errorf("forwarded for %q: the log has no request of %s", c.forwarded, address)
				})
			}
		})
	}
}

// On SIGTERM the requests of a gateway's connections end in order.
func TestAGatewayDrains(t *testing.T) {
	x := newIngress(t, ingressConfig)
	conn, err := x.dial(8080)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	in := bufio.NewReader(conn)
	io.WriteString(conn, "POST / HTTP/1.1\r\nHost: www.ssoon.dev\r\nContent-Length: 2\r\n\r\na")
	await(t, func() error {
		if v, err := x.back.metric("envoy_http_downstream_cx_active"); err != nil || v < 1 {
			return fmt.Errorf("%v connections, error %v", v, err)
		}
		return nil
	})
	x.agent.Signal(syscall.SIGTERM)
	await(t, func() error {
		if other, err := x.dial(8080); err == nil {
			other.Close()
			return errors.New("the gateway still accepts")
		}
		return nil
	})
	io.WriteString(conn, "b")
	response, err := http.ReadResponse(in, nil)
	if err != nil || response.StatusCode != 200 || !response.Close {
		t.Fatalf("%v, %v", response, err)
	}
	io.Copy(io.Discard, response.Body)
	if code, err := x.agent.Wait(patience); code != 0 || err != nil {
		t.Errorf("the agent ended with %d, error %v", code, err)
	}
}
