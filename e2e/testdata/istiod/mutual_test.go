package istiod

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// Services whose only endpoints are the pods of the tests of mutual TLS. Their addresses are the pods' own, and their ports
// those of the pods, so that connections arrive whether the agent or the network chooses the endpoint.
const mutualServices = `
apiVersion: v1
kind: Service
metadata: {name: web, namespace: default}
spec:
  clusterIP: 198.51.100.210
  selector: {app: client}
  ports: [{name: http, port: 8080, targetPort: 8080}, {name: grpc, port: 8081, targetPort: 8081}, {name: tcp, port: 8082, targetPort: 8082}, {name: tcp-first, port: 8083, targetPort: 8083}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, namespace: default, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
endpoints:
- {addresses: [203.0.113.8], conditions: {ready: true, serving: true, terminating: false}, nodeName: node1, targetRef: {kind: Pod, name: client, namespace: default}}
ports: [{name: http, port: 8080, protocol: TCP}, {name: grpc, port: 8081, protocol: TCP}, {name: tcp, port: 8082, protocol: TCP}, {name: tcp-first, port: 8083, protocol: TCP}]
---
apiVersion: v1
kind: Service
metadata: {name: back, namespace: default}
spec:
  clusterIP: 198.51.100.211
  selector: {app: nginx}
  ports: [{name: http, port: 8080, targetPort: 8080}, {name: grpc, port: 8081, targetPort: 8081}, {name: tcp, port: 8082, targetPort: 8082}, {name: tcp-first, port: 8083, targetPort: 8083}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: back-1, namespace: default, labels: {kubernetes.io/service-name: back}}
addressType: IPv4
endpoints:
- {addresses: [203.0.113.4], conditions: {ready: true, serving: true, terminating: false}, nodeName: node1, targetRef: {kind: Pod, name: nginx-deployment-68d4d6fb8c-6gd8s, namespace: default}}
ports: [{name: http, port: 8080, protocol: TCP}, {name: grpc, port: 8081, protocol: TCP}, {name: tcp, port: 8082, protocol: TCP}, {name: tcp-first, port: 8083, protocol: TCP}]
`

// peerAuthentication sets the mode of the namespace.
func peerAuthentication(mode string) string {
	return "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: default, namespace: default}\nspec: {mtls: {mode: " + mode + "}}\n"
}

// seenFormat is a line of the access log with what each agent knows of the other side.
const seenFormat = "SEEN %TRAFFIC_DIRECTION% %PROTOCOL% %REQ(:PATH)% peer=%DOWNSTREAM_PEER_URI_SAN%%UPSTREAM_PEER_URI_SAN% tls=%DOWNSTREAM_TLS_VERSION%%UPSTREAM_TLS_VERSION%" +
	" workload=%FILTER_STATE(downstream_peer:FIELD:workload)%%FILTER_STATE(upstream_peer:FIELD:workload)%" +
	" namespace=%FILTER_STATE(downstream_peer:FIELD:namespace)%%FILTER_STATE(upstream_peer:FIELD:namespace)%" +
	" app=%FILTER_STATE(downstream_peer:FIELD:app)%%FILTER_STATE(upstream_peer:FIELD:app)%" +
	" cluster=%FILTER_STATE(downstream_peer:FIELD:cluster)%%FILTER_STATE(upstream_peer:FIELD:cluster)% port=%DOWNSTREAM_LOCAL_PORT% reason=%PILLION_REASON%"

// couple is two pods of the mesh, joined by a link, whose agents istiod configures.
type couple struct {
	plane *plane
	pods  [2]*pod
	vip   [2]string // addresses of the services that the pods serve
}

func newCouple(t *testing.T, mode string) *couple {
	t.Helper()
	return newCoupleWith(t, mode, "PILLION_ACCESS_LOG=/dev/stdout", "PILLION_ACCESS_LOG_FORMAT="+seenFormat)
}

// newCoupleWith is newCouple with variables of both agents.
func newCoupleWith(t *testing.T, mode string, variables ...string) *couple {
	t.Helper()
	a, b := newPodOf(t, nginx()), newPodOf(t, workload{pod: "client", ip: "203.0.113.8", account: "client", name: "client", app: "client"})
	c := &couple{pods: [2]*pod{a, b}, vip: [2]string{"198.51.100.211", "198.51.100.210"}}
	nettest.Join(t, a.Namespace, b.Namespace)
	for i, d := range c.pods {
		d.MustRun(t, "ip", "address", "add", c.vip[i]+"/32", "dev", "lo")
		d.MustRun(t, "ip", "address", "add", d.ip+"/32", "dev", "eth0") // connections are redirected to the interface's address
		for _, far := range []string{c.pods[1-i].ip, c.vip[1-i]} {
			d.MustRun(t, "ip", "route", "add", far+"/32", "dev", "eth0", "src", d.ip)
		}
		serveMutual(t, d)
	}
	c.plane = startPlaneOf(t, c.pods[:], peerAuthentication(mode), mutualServices)
	for _, d := range c.pods {
		d.launch(t, c.plane, append(variables, "ISTIO_DELTA_XDS=true",
			`ISTIO_METAJSON_LABELS={"LABELS":{"app":"`+d.app+`","version":"v1","service.istio.io/canonical-name":"`+d.app+`","service.istio.io/canonical-revision":"v1"}}`)...)
	}
	for _, d := range c.pods {
		d.awaitReady(t)
		d.awaitIdentity(t)
	}
	return c
}

func (d *pod) awaitIdentity(t *testing.T) {
	t.Helper()
	await(t, func() error {
		expiry, err := d.metric("istio_agent_cert_expiry_seconds")
		if err == nil && expiry <= 0 {
			err = errors.New("no certificate")
		}
		return err
	})
}

// serveMutual runs the workload of a pod: HTTP/1 and HTTP/2, gRPC, an echo, and a server that speaks first.
func serveMutual(t *testing.T, d *pod) {
	t.Helper()
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	web := &http.Server{Protocols: &protocols, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for name := range r.Header {
			if strings.HasPrefix(strings.ToLower(name), "x-envoy-peer-") {
				http.Error(w, "the application receives "+name, http.StatusInternalServerError)
				return
			}
		}
		fmt.Fprintf(w, "%s %s", r.Proto, r.Header.Get("X-Forwarded-Client-Cert"))
	})}
	calls := grpc.NewServer()
	healthpb.RegisterHealthServer(calls, health.NewServer())
	d.records = newReceiver(calls)
	serve := map[string]func(net.Listener){
		"8080": func(l net.Listener) { web.Serve(l) }, "8081": func(l net.Listener) { calls.Serve(l) },
		"8082": func(l net.Listener) { acceptAll(l, func(c net.Conn) { io.Copy(c, c) }) },
		"8083": func(l net.Listener) {
			acceptAll(l, func(c net.Conn) { io.WriteString(c, "220 welcome\r\n"); io.Copy(c, c) })
		},
	}
	for port, run := range serve {
		listener, ended := d.Listen(t, "tcp", "0.0.0.0:"+port), make(chan struct{})
		go func() { defer close(ended); run(listener) }()
		t.Cleanup(func() { listener.Close(); <-ended })
	}
	t.Cleanup(func() { web.Close(); calls.Stop() })
}

func acceptAll(l net.Listener, serve func(net.Conn)) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		go func() { defer conn.Close(); serve(conn) }()
	}
}

// speak sends one request of each protocol from a pod to the other one's service.
func (c *couple) speak(from int) error {
	d, host, to := c.pods[from], map[int]string{0: "web", 1: "back"}[from]+".default.svc.cluster.local", c.vip[1-from]
	dial := func(context.Context, string, string) (net.Conn, error) { return d.Dial("tcp", to+":8080", patience) }
	identity := "URI=spiffe://cluster.local/ns/default/sa/" + d.account
	for proto, path := range map[string]string{"HTTP/1.1": "/one", "HTTP/2.0": "/two"} {
		var protocols http.Protocols
		protocols.SetHTTP1(proto == "HTTP/1.1")
		protocols.SetUnencryptedHTTP2(proto == "HTTP/2.0")
		transport := &http.Transport{DialContext: dial, Protocols: &protocols}
		client := &http.Client{Transport: transport, Timeout: patience}
		response, err := client.Get("http://" + host + ":8080" + path)
		if err != nil {
			return fmt.Errorf("%s: %w", proto, err)
		}
		body, err := io.ReadAll(response.Body)
		response.Body.Close()
		transport.CloseIdleConnections()
		if err != nil || response.StatusCode != http.StatusOK || response.Proto != proto ||
			!strings.HasPrefix(string(body), "HTTP/1.1 ") || !strings.Contains(string(body), identity) { // the port's name is http: its cluster has HTTP/1.1
			return fmt.Errorf("%s: %s %q, %v", proto, response.Status, body, err)
		}
		for name := range response.Header {
			if strings.HasPrefix(strings.ToLower(name), "x-envoy-peer-") {
				return fmt.Errorf("%s: the client receives %s", proto, name)
			}
		}
	}
	conn, err := grpc.NewClient("passthrough:///"+host+":8081", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return d.Dial("tcp", to+":8081", patience) }))
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if answer, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{}); err != nil || answer.Status != healthpb.HealthCheckResponse_SERVING {
		return fmt.Errorf("gRPC: %v, %w", answer, err)
	}
	for port, greeting := range map[string]string{"8082": "", "8083": "220 welcome\r\n"} {
		if err := c.echo(d, to+":"+port, greeting); err != nil {
			return fmt.Errorf("TCP %s: %w", port, err)
		}
	}
	return nil
}

// echo sends bytes to a server that returns them, after a greeting of it.
func (c *couple) echo(d *pod, address, greeting string) error {
	conn, err := d.Dial("tcp", address, patience)
	if err != nil {
		return err
	}
	defer conn.Close()
	in := bufio.NewReader(conn)
	if greeting != "" {
		if line, err := in.ReadString('\n'); err != nil || line != greeting {
			return fmt.Errorf("the greeting is %q, %w", line, err)
		}
	}
	if _, err := io.WriteString(conn, "\x00hello\n"); err != nil {
		return err
	}
	conn.(*net.TCPConn).CloseWrite()
	if rest, err := io.ReadAll(in); err != nil || string(rest) != "\x00hello\n" {
		return fmt.Errorf("the echo is %q, %w", rest, err)
	}
	return nil
}

// Two pods of the mesh speak by mutual TLS in each protocol, and each agent knows who the other side is.
func TestTwoPodsSpeakByMutualTLS(t *testing.T) {
	for _, mode := range []string{"STRICT", "PERMISSIVE"} {
		t.Run(mode, func(t *testing.T) {
			c := newCouple(t, mode)
			for from := range c.pods {
				await(t, func() error { return c.speak(from) })
			}
			for i, d := range c.pods {
				far := c.pods[1-i]
				known := "peer=spiffe://cluster.local/ns/default/sa/" + far.account + "- tls=TLSv1.3- workload=" + far.name + "- namespace=default- app=" + far.app + "- cluster=" + clusterID + "-"
				mirrored := "peer=-spiffe://cluster.local/ns/default/sa/" + far.account + " tls=-TLSv1.3 workload=-" + far.name + " namespace=-default app=-" + far.app + " cluster=-" + clusterID
				for _, want := range []string{
					"SEEN INBOUND HTTP/1.1 /one " + known, "SEEN INBOUND HTTP/1.1 /two " + known, "SEEN INBOUND HTTP/2 /grpc.health.v1.Health/Check " + known,
					"SEEN INBOUND - - " + known + " port=8082 reason=closed", "SEEN INBOUND - - " + known + " port=8083 reason=closed",
					"SEEN OUTBOUND HTTP/1.1 /one " + mirrored, "SEEN OUTBOUND HTTP/2 /two " + mirrored, "SEEN OUTBOUND HTTP/2 /grpc.health.v1.Health/Check " + mirrored,
					"SEEN OUTBOUND - - " + mirrored + " port=8082 reason=closed", "SEEN OUTBOUND - - " + mirrored + " port=8083 reason=closed",
				} {
					await(t, func() error {
						if !strings.Contains(d.log.String(), want) {
							return fmt.Errorf("the access log of %s has no line with %q", d.workload.pod, want)
						}
						return nil
					})
				}
				d.checkPeers(t, far)
			}
		})
	}
}

// checkPeers checks the labels of Istio's metrics for traffic with the other pod, of both directions.
func (d *pod) checkPeers(t *testing.T, far *pod) {
	t.Helper()
	text, err := d.get(15090, "stats/prometheus")
	if err != nil {
		t.Fatal(err)
	}
	id := func(d *pod) string { return "spiffe://cluster.local/ns/default/sa/" + d.account }
	labels := func(side string, d *pod) []string {
		return []string{side + `_workload="` + d.name + `"`, side + `_workload_namespace="default"`, side + `_principal="` + id(d) + `"`, side + `_app="` + d.app + `"`,
			side + `_version="v1"`, side + `_canonical_service="` + d.app + `"`, side + `_canonical_revision="v1"`, side + `_cluster="` + clusterID + `"`}
	}
	for _, metric := range []string{"istio_requests_total", "istio_tcp_connections_opened_total", "istio_tcp_sent_bytes_total", "istio_tcp_connections_closed_total"} {
		inbound := append(labels("source", far), `reporter="destination"`, `connection_security_policy="mutual_tls"`)
		outbound := append(labels("destination", far), `reporter="source"`)
		for _, want := range [][]string{inbound, outbound} {
			if !hasSample(text, metric, want) {
				t.Errorf("%s has no sample of %s with %q:\n%s", d.workload.pod, metric, want, linesOf(text, metric))
			}
		}
	}
}

func hasSample(text, metric string, labels []string) bool {
	for line := range strings.Lines(text) {
		all := strings.HasPrefix(line, metric+"{")
		for _, label := range labels {
			all = all && strings.Contains(line, label)
		}
		if all {
			return true
		}
	}
	return false
}

func linesOf(text, metric string) (lines string) {
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, metric+"{") {
			lines += line
		}
	}
	return lines
}

// A client without a sidecar reaches a PERMISSIVE pod and not a STRICT one.
func TestPlaintextIsRefusedAsConfigured(t *testing.T) {
	c := newCouple(t, "STRICT")
	d := c.pods[1]
	ask := func() error { // from a user whose connections are not captured
		out, err := d.Run(c.pods[0].Command(agentUID, agentUID, "curl", "-sS", "--max-time", "60", "http://"+d.ip+":8080/plain"))
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	}
	if err := ask(); err == nil {
		t.Error("a STRICT pod answers plaintext")
	}
	await(t, func() error {
		if !strings.Contains(d.log.String(), "reason=tls_required") {
			return errors.New("the refusal is not in the access log")
		}
		return nil
	})
	c.plane.apply(peerAuthentication("PERMISSIVE"))
	await(t, ask)
	if err := c.speak(0); err != nil {
		t.Error(err)
	}
}
