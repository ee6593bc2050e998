package bench

import (
	"bytes"
	"crypto/tls"
	_ "embed"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// The contenders of routes carry what the pod opens. The load connects to a service that no server listens for, and each
// request goes to one of three endpoints, which are the workload in the peer. pillion's control plane has the policies of
// retries that istiod gives every route.

//go:embed testdata/haproxy-routes.cfg
var haproxyRoutes string

// servicePort is the port of the service, at nettest.Elsewhere4.
const servicePort = 7080

// routed are pillion and HAProxy with the routes of a service, and pillion without a control plane, which carries requests to
// the destination of their connection.
type routed struct{ pillion, haproxy, unrouted contender }

func (r *routed) all() []contender {
	all := []contender{r.pillion, r.unrouted}
	if r.haproxy.name != "" {
		all = append(all, r.haproxy)
	}
	return all
}

// newRouted makes them, with endpoints at these ports of the workload. secured endpoints require mutual TLS.
func newRouted(t testing.TB, k *kit, ports []int, secured bool) *routed {
	t.Helper()
	p := newMeshPod(t, k, k.controlPrograms(t))
	r := &routed{pillion: p.routing(t, ports, secured), unrouted: k.opaque[0]}
	r.unrouted.name, r.unrouted.to = nameUnrouted, netip.AddrPortFrom(nettest.Elsewhere4, uint16(ports[0]))
	if len(k.opaque) == 2 {
		return r // without HAProxy
	}
	options := ""
	if ports[0] == http2Port {
		options = " proto h2"
	}
	if secured {
		dir := filepath.Dir(k.pillion) // HAProxy's user can read it
		for _, file := range []string{"root-cert.pem", "workload.pem"} {
			content, err := os.ReadFile(filepath.Join(p.directory, file))
			if err != nil {
				t.Fatal(err)
			}
			writeConfig(t, dir, file, string(content))
		}
		options = " ssl crt " + filepath.Join(dir, "workload.pem") + " ca-file " + filepath.Join(dir, "root-cert.pem") + " verify required alpn http/1.1"
	}
	var words []string
	for i, port := range ports {
		words = append(words, fmt.Sprint("SERVER-", i+1), fmt.Sprintf("%v:%d%s", nettest.Elsewhere4, port, options))
	}
	config := writeConfig(t, filepath.Dir(k.pillion), "routes.cfg", strings.NewReplacer(words...).Replace(haproxyRoutes))
	r.haproxy = contender{name: nameHAProxy, command: []string{"haproxy", "-q", "-db", "-f", config}, to: r.pillion.to, certificates: r.pillion.certificates}
	return r
}

// routing returns pillion as a client of a control plane that names the endpoints.
func (p *meshPod) routing(t testing.TB, ports []int, secured bool) contender {
	t.Helper()
	type endpoint struct{ Address netip.AddrPort }
	const cluster = "outbound|7080||workload.shop.svc.cluster.local"
	var endpoints []endpoint
	for _, port := range ports {
		endpoints = append(endpoints, endpoint{netip.AddrPortFrom(nettest.Elsewhere4, uint16(port))})
	}
	services, err := json.Marshal(map[string]any{
		"Port": servicePort, "Host": "workload.example",
		"Clusters": []any{map[string]any{"Name": cluster, "Endpoints": endpoints, "Mutual": secured, "HTTP2": ports[0] == http2Port}},
		"Routes":   []any{map[string]any{"Weights": map[string]int{cluster: 1}, "Retries": 2}},
	})
	if err != nil {
		t.Fatal(err)
	}
	file := writeConfig(t, p.directory, "services.json", string(services))
	c := contender{
		name: namePillion, root: true,
		command: p.carrying(),
		before: func(t testing.TB, ns *nettest.Namespace) {
			cmd := ns.Command(0, 0, p.programs.istiod, "-directory", p.directory, "-services", file, "-follow", "0")
			cmd.Stderr = os.Stderr
			ns.Start(t, cmd)
		},
		to: netip.AddrPortFrom(nettest.Elsewhere4, servicePort),
	}
	if secured {
		c.certificates = p.directory
	}
	return c
}

func measureRoutes(t testing.TB, k *kit, s sizes) []*row {
	r := &row{title: "CPU per routed HTTP/1.1 request, 3 endpoints", unit: "µs", promises: []promise{{0.9, nameHAProxy}, {1.05, nameUnrouted}}}
	turns{"routes", newRouted(t, k, http1Ports, false).all(), s.connectionRounds}.take(t, k, []*row{r}, func(t testing.TB, c contender, w *world, p *proxy) {
		cpu := cpuOf(t, p, w.startLoad(t, "http1", s.requests, 32))
		r.add(c.name, microseconds(cpu)/float64(s.requests))
	})
	return []*row{r}
}

func measureRoutesHTTP2(t testing.TB, k *kit, s sizes) []*row {
	const connections = 8
	r := &row{
		title: fmt.Sprintf("CPU per routed HTTP/2 request, %d × %d streams, 3 endpoints", connections, streamsEach), unit: "µs",
		promises: []promise{{1, nameHAProxy}},
	}
	turns{"routes-http2", newRouted(t, k, http2Ports, false).all(), s.connectionRounds}.take(t, k, []*row{r}, func(t testing.TB, c contender, w *world, p *proxy) {
		cpu := cpuOf(t, p, w.startLoad(t, "http2", s.requests, connections))
		r.add(c.name, microseconds(cpu)/float64(s.requests))
	})
	return []*row{r}
}

func measureRoutesTLS(t testing.TB, k *kit, s sizes) []*row {
	r := &row{title: "CPU per routed HTTP/1.1 request, 3 endpoints with TLS", unit: "µs", promises: []promise{{0.9, nameHAProxy}}}
	contenders := newRouted(t, k, tlsPorts, true)
	turns := turns{"routes-tls", slices.DeleteFunc(contenders.all(), func(c contender) bool { return c.name == nameUnrouted }), s.connectionRounds}
	turns.take(t, k, []*row{r}, func(t testing.TB, c contender, w *world, p *proxy) {
		cpu := cpuOf(t, p, w.startLoad(t, "http1", s.requests, 32))
		r.add(c.name, microseconds(cpu)/float64(s.requests))
	})
	return []*row{r}
}

func measureRoutesConnections(t testing.TB, k *kit, s sizes) []*row {
	r := &row{title: "CPU per routed HTTP/1.1 request on a new connection", unit: "µs", promises: []promise{{1, nameHAProxy}}}
	turns := turns{"routes-connections", newRouted(t, k, http1Ports, false).all(), s.connectionRounds}
	turns.take(t, k, []*row{r}, func(t testing.TB, c contender, w *world, p *proxy) {
		cpu := cpuOf(t, p, w.startLoad(t, "http-connections", s.connections, atATime))
		r.add(c.name, microseconds(cpu)/float64(s.connections))
	})
	return []*row{r}
}

// serveSecured serves tlsPorts, inside mutual TLS as the mesh's.
func serveSecured(certificates string, failed chan<- error) error {
	config, err := clientConfig(certificates, false)
	if err != nil {
		return err
	}
	config.ClientAuth, config.SessionTicketsDisabled = tls.RequireAnyClientCert, true
	for _, port := range tlsPorts {
		listener, err := net.Listen("tcp4", fmt.Sprintf(":%d", port))
		if err != nil {
			return err
		}
		go func() {
			for {
				conn, err := listener.Accept()
				if err != nil {
					failed <- err
					return
				}
				go answerSecured(tls.Server(conn, config))
			}
		}()
	}
	return nil
}

// answerSecured answers small requests until the connection ends.
func answerSecured(conn net.Conn) {
	defer conn.Close()
	var head []byte
	for buf := make([]byte, 2048); ; {
		n, err := conn.Read(buf)
		if err != nil {
			return
		}
		if head = append(head, buf[:n]...); !bytes.HasSuffix(head, []byte("\r\n\r\n")) {
			continue
		}
		head = head[:0]
		if _, err := conn.Write(smallAnswer1); err != nil {
			return
		}
	}
}
