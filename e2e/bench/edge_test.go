package bench

import (
	"context"
	"crypto/tls"
	_ "embed"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// The contenders at the edge end TLS with clients outside of the pod, and send each request to one of three endpoints. pillion is
// `pillion gateway`, or with endpoints that require mutual TLS `pillion proxy router` with a control plane.

//go:embed testdata/haproxy-edge.cfg
var haproxyEdge string

// edgePort is where they listen.
const edgePort = 8443

// newEdge returns them, and the directory with the root of their certificate.
func newEdge(t testing.TB, k *kit, secured bool) (contenders []contender, certificates string) {
	t.Helper()
	p := newMeshPod(t, k, k.controlPrograms(t))
	dir := filepath.Dir(k.pillion) // the proxies' user can read it
	for _, file := range []string{"root-cert.pem", "workload.pem"} {
		content, err := os.ReadFile(filepath.Join(p.directory, file))
		if err != nil {
			t.Fatal(err)
		}
		writeConfig(t, dir, file, string(content))
	}
	certificate := filepath.Join(dir, "workload.pem")
	ports, options := http1Ports, ""
	if secured {
		ports = tlsPorts
		options = " ssl crt " + certificate + " ca-file " + filepath.Join(dir, "root-cert.pem") + " verify required alpn http/1.1"
	}
	var addresses, words []string
	for i, port := range ports {
		address := fmt.Sprintf("%v:%d", nettest.PodIP4, port)
		addresses = append(addresses, address)
		words = append(words, fmt.Sprint("SERVER-", i+1), address+options)
	}
	pillion := contender{name: namePillion, command: []string{k.pillion, "gateway", "--listen", fmt.Sprint(edgePort), "--cert", certificate,
		"--key", certificate, "--route", "*=" + strings.Join(addresses, ","), "--log-level", "warn"}}
	if secured {
		pillion = p.accepting(t, ports, certificate)
	}
	contenders = []contender{pillion}
	if len(k.opaque) > 2 {
		config := writeConfig(t, dir, "edge.cfg", strings.NewReplacer(append(words, "CERTIFICATE", certificate)...).Replace(haproxyEdge))
		contenders = append(contenders, contender{name: nameHAProxy, command: []string{"haproxy", "-q", "-db", "-f", config}})
	}
	for i := range contenders {
		contenders[i].edge = true
		if secured {
			contenders[i].certificates = p.directory
		}
	}
	return contenders, p.directory
}

// accepting returns pillion as a gateway of a control plane.
func (p *meshPod) accepting(t testing.TB, ports []int, certificate string) contender {
	t.Helper()
	const cluster = "outbound|443||workload.shop.svc.cluster.local"
	type endpoint struct{ Address netip.AddrPort }
	var endpoints []endpoint
	for _, port := range ports {
		endpoints = append(endpoints, endpoint{netip.AddrPortFrom(nettest.PodIP4, uint16(port))})
	}
	services, err := json.Marshal(map[string]any{
		"Port": edgePort, "Host": "workload.example", "Gateway": certificate,
		"Clusters": []any{map[string]any{"Name": cluster, "Endpoints": endpoints, "Mutual": true}},
		"Routes":   []any{map[string]any{"Weights": map[string]int{cluster: 1}, "Retries": 2}},
	})
	if err != nil {
		t.Fatal(err)
	}
	file := writeConfig(t, p.directory, "gateway.json", string(services))
	var command []string
	for _, word := range append(p.command(), "--access-log", "/dev/stdout") {
		if command = append(command, word); word == "agent" {
			command = append(command[:len(command)-1], "proxy", "router")
		}
	}
	return contender{name: namePillion, root: true, command: command, before: func(t testing.TB, ns *nettest.Namespace) {
		cmd := ns.Command(0, 0, p.programs.istiod, "-directory", p.directory, "-services", file, "-follow", "0")
		cmd.Stderr = os.Stderr
		ns.Start(t, cmd)
	}}
}

// takeEdge measures loads of the edge.
func takeEdge(t testing.TB, k *kit, figure string, secured bool, rounds int, rows []*row, measure func(t testing.TB, c contender, w *world, p *proxy)) {
	contenders, certificates := newEdge(t, k, secured)
	turns{figure, contenders, rounds}.take(t, k, rows, func(t testing.TB, c contender, w *world, p *proxy) {
		w.certificates = certificates
		measure(t, c, w, p)
	})
}

func measureEdge(t testing.TB, k *kit, s sizes) []*row {
	return edgeRequests(t, k, s, "edge", "", false)
}

func measureEdgeTLS(t testing.TB, k *kit, s sizes) []*row {
	return edgeRequests(t, k, s, "edge-tls", " with TLS", true)
}

func edgeRequests(t testing.TB, k *kit, s sizes, figure, kind string, secured bool) []*row {
	const connections = 8
	http1 := &row{title: "CPU per HTTP/1.1 request over HTTPS, 3 endpoints" + kind, unit: "µs", promises: []promise{{0.9, nameHAProxy}}}
	http2 := &row{
		title: fmt.Sprintf("CPU per HTTP/2 request over HTTPS, %d × %d streams, 3 endpoints%s", connections, streamsEach, kind), unit: "µs",
		promises: []promise{{1, nameHAProxy}},
	}
	rows := []*row{http1, http2}
	takeEdge(t, k, figure, secured, s.rounds, rows, func(t testing.TB, c contender, w *world, p *proxy) {
		http1.add(c.name, microseconds(cpuOf(t, p, w.startLoad(t, "edge-http1", s.requests, 32)))/float64(s.requests))
		http2.add(c.name, microseconds(cpuOf(t, p, w.startLoad(t, "edge-http2", s.requests, connections)))/float64(s.requests))
	})
	return rows
}

func measureEdgeConnections(t testing.TB, k *kit, s sizes) []*row {
	r := &row{title: "CPU per HTTP/1.1 request over HTTPS on a new connection", unit: "µs", promises: []promise{{0.8, nameHAProxy}}}
	takeEdge(t, k, "edge-connections", false, s.rounds, []*row{r}, func(t testing.TB, c contender, w *world, p *proxy) {
		cpu := cpuOf(t, p, w.startLoad(t, "edge-connections", s.handshakes, atATime))
		r.add(c.name, microseconds(cpu)/float64(s.handshakes))
	})
	return []*row{r}
}

// edgeLoad is the load of the edge.
func edgeLoad(certificates, kind string, workers int, count int64) (load, error) {
	config, err := clientConfig(certificates, kind == "edge-http2")
	if err != nil {
		return load{}, err
	}
	dialTLS := func(serial int64) (net.Conn, error) {
		conn, err := dial(serial, edgePort)
		if err != nil {
			return nil, err
		}
		return tls.Client(conn, config), nil
	}
	switch kind {
	case "edge-http2":
		return edgeHTTP2Load(workers, count, dialTLS), nil
	case "edge-connections":
		once := func(serial int64) error {
			conn, err := dialTLS(serial)
			if err != nil {
				return err
			}
			defer conn.Close()
			return request(conn)
		}
		return load{
			warm: func() error { return inParallel(workers, min(count, 200), once) },
			run:  func() error { return inParallel(workers, count, once) },
		}, nil
	}
	return requestsLoad(workers, count, dialTLS), nil
}

// edgeHTTP2Load sends requests over connections of net/http's client, streamsEach at a time on each.
func edgeHTTP2Load(connections int, requests int64, dial func(serial int64) (net.Conn, error)) load {
	clients := make([]*http.Client, connections)
	for i := range clients {
		transport := &http.Transport{Protocols: new(http.Protocols), DialTLSContext: func(context.Context, string, string) (net.Conn, error) {
			conn, err := dial(int64(i))
			if err == nil {
				err = conn.(*tls.Conn).Handshake()
			}
			return conn, err
		}}
		transport.Protocols.SetHTTP2(true)
		clients[i] = &http.Client{Transport: transport, Timeout: patience}
	}
	once := func(serial int64) error {
		response, err := clients[serial%int64(connections)].Get(fmt.Sprintf("https://workload.example:%d/", edgePort))
		if err != nil {
			return err
		}
		defer response.Body.Close()
		body, err := io.ReadAll(response.Body)
		if err == nil && (response.ProtoMajor != 2 || string(body) != smallBody) {
			err = fmt.Errorf("%s %s, %q", response.Proto, response.Status, body)
		}
		return err
	}
	workers := connections * streamsEach
	return load{
		warm: func() error {
			if err := inParallel(1, int64(connections), once); err != nil { // one connection for each client
				return err
			}
			return inParallel(workers, min(requests, 5000), once)
		},
		run: func() error { return inParallel(workers, requests, once) },
	}
}
