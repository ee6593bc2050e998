package bench

import (
	"crypto/tls"
	"crypto/x509"
	_ "embed"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// The contenders of mutual TLS are sidecars of one mesh. A control plane at the agent's loopback interface configures it:
// STRICT inbound, and mutual TLS outbound to the workload's HTTP port.

//go:embed testdata/haproxy-tls.cfg
var haproxyTLS string

// secured are pillion and HAProxy with the certificates of a mesh.
type secured struct {
	contenders   []contender
	certificates string
}

func newSecured(t testing.TB, k *kit) *secured {
	t.Helper()
	programs := k.controlPrograms(t)
	p := newMeshPod(t, k, programs)
	pillion := contender{
		name: namePillion, root: true,
		command: p.carrying(),
		before: func(t testing.TB, ns *nettest.Namespace) {
			cmd := ns.Command(0, 0, programs.istiod, "-directory", p.directory, "-mtls", "STRICT",
				"-outbound", fmt.Sprintf("%v:%d", nettest.PodIP4, http1Port))
			cmd.Stderr = os.Stderr
			ns.Start(t, cmd)
		},
	}
	s := &secured{[]contender{pillion}, p.directory}
	if len(k.opaque) == 2 {
		return s // without HAProxy
	}
	dir := filepath.Dir(k.pillion) // HAProxy's user can read it
	for _, file := range []string{"root-cert.pem", "workload.pem"} {
		content, err := os.ReadFile(filepath.Join(p.directory, file))
		if err != nil {
			t.Fatal(err)
		}
		writeConfig(t, dir, file, string(content))
	}
	config := strings.NewReplacer("CERTIFICATE", filepath.Join(dir, "workload.pem"), "ROOT", filepath.Join(dir, "root-cert.pem")).Replace(haproxyTLS)
	command := []string{"haproxy", "-q", "-db", "-f", writeConfig(t, dir, "tls.cfg", config)}
	s.contenders = append(s.contenders, contender{name: nameHAProxy, command: command})
	return s
}

// take measures the contenders with a load that begins TLS itself.
func (s *secured) take(t testing.TB, k *kit, figure string, rounds int, rows []*row, measure func(t testing.TB, c contender, w *world, p *proxy)) {
	turns{figure, s.contenders, rounds}.take(t, k, rows, func(t testing.TB, c contender, w *world, p *proxy) {
		w.certificates = s.certificates
		measure(t, c, w, p)
	})
}

func measureTLS(t testing.TB, k *kit, s sizes) []*row {
	r := &row{title: "CPU per HTTP/1.1 request inside inbound TLS", unit: "µs", promises: []promise{{0.9, nameHAProxy}}}
	newSecured(t, k).take(t, k, "tls", s.connectionRounds, []*row{r}, func(t testing.TB, c contender, w *world, p *proxy) {
		cpu := cpuOf(t, p, w.startLoad(t, "tls-http1", s.requests, 32))
		r.add(c.name, microseconds(cpu)/float64(s.requests))
	})
	return []*row{r}
}

// measureTLSBothSides has a sidecar on each side: the load is a workload in the peer, whose connections the rules capture.
// The figure is the sum of both.
func measureTLSBothSides(t testing.TB, k *kit, s sizes) []*row {
	r := &row{title: "CPU per HTTP/1.1 request, sidecars on both sides", unit: "µs", promises: []promise{{0.9, nameHAProxy}}}
	turns := turns{"tls-both", newSecured(t, k).contenders, s.rounds}
	turns.take(t, k, []*row{r}, func(t testing.TB, c contender, w *world, p *proxy) {
		p.far = c.startIn(t, w.peer, w.cores.proxy)
		if out, err := w.peer.Run(w.peer.Command(0, 0, k.pillion, initArguments...)); err != nil {
			t.Fatalf("pillion init: %v\n%s", err, out)
		}
		cpu := cpuOf(t, p, w.startLoad(t, "http1", s.requests, 32))
		r.add(c.name, microseconds(cpu)/float64(s.requests))
	})
	return []*row{r}
}

func measureTLSConnections(t testing.TB, k *kit, s sizes) []*row {
	r := &row{title: "CPU per HTTP/1.1 request on a new TLS connection", unit: "µs", promises: []promise{{0.75, nameHAProxy}}}
	newSecured(t, k).take(t, k, "tls-connections", s.rounds, []*row{r}, func(t testing.TB, c contender, w *world, p *proxy) {
		cpu := cpuOf(t, p, w.startLoad(t, "tls-connections", s.handshakes, atATime))
		r.add(c.name, microseconds(cpu)/float64(s.handshakes))
	})
	return []*row{r}
}

func measureTLSBulk(t testing.TB, k *kit, s sizes) []*row {
	down := &row{title: "CPU per GiB of a response's body inside inbound TLS", unit: "s", promises: []promise{{1.1, nameHAProxy}}}
	up := &row{title: "CPU per GiB of a request's body inside inbound TLS", unit: "s", promises: []promise{{1.1, nameHAProxy}}}
	rows := []*row{down, up}
	newSecured(t, k).take(t, k, "tls-bulk", s.rounds, rows, func(t testing.TB, c contender, w *world, p *proxy) {
		gib := float64(s.bulk) / (1 << 30)
		down.add(c.name, cpuOf(t, p, w.startLoad(t, "tls-download", s.bulk, 1)).Seconds()/gib)
		up.add(c.name, cpuOf(t, p, w.startLoad(t, "tls-upload", s.bulk, 1)).Seconds()/gib)
	})
	return rows
}

func measureTLSIdle(t testing.TB, k *kit, s sizes) []*row {
	memory := &row{title: "memory per idle TLS connection", unit: "KiB", promises: []promise{{atMost: 16}}}
	descriptors := &row{title: "descriptors per idle TLS connection", promises: []promise{{atMost: 2}}}
	secured := newSecured(t, k)
	turns := turns{"tls-idle", secured.contenders, 1}
	turns.take(t, k, []*row{memory, descriptors}, func(t testing.TB, c contender, w *world, p *proxy) {
		w.certificates = secured.certificates
		rest(t, s, c, w, p, "tls-idle", memory, descriptors)
	})
	return []*row{memory, descriptors}
}

// securedLoad is the load that begins TLS itself, as a sidecar of the mesh.
func securedLoad(certificates, kind string, workers int, count int64) (load, error) {
	config, err := clientConfig(certificates, false)
	if err != nil {
		return load{}, err
	}
	dialTLS := func(serial int64) (net.Conn, error) {
		conn, err := dial(serial, http1Port)
		if err != nil {
			return nil, err
		}
		return tls.Client(conn, config), nil // the first write begins the handshake
	}
	once := func(use func(net.Conn) error) func(int64) error {
		return func(serial int64) error {
			conn, err := dialTLS(serial)
			if err != nil {
				return err
			}
			defer conn.Close()
			return use(conn)
		}
	}
	requestOnce := once(request)
	several := func(n int64) func() error { return func() error { return inParallel(workers, n, requestOnce) } }
	move := func(use func(net.Conn, int64) error, n int64) func() error {
		return func() error { return once(func(conn net.Conn) error { return use(conn, n) })(0) }
	}
	switch kind {
	case "tls-connections":
		return load{warm: several(min(count, 200)), run: several(count)}, nil
	case "tls-download":
		return load{warm: move(httpDownload, min(count, 64<<20)), run: move(httpDownload, count)}, nil
	case "tls-upload":
		return load{warm: move(httpUpload, min(count, 64<<20)), run: move(httpUpload, count)}, nil
	case "tls-idle":
		return load{warm: several(32), run: func() error { return keepIdle(workers, count, request, dialTLS) }}, nil
	}
	return requestsLoad(workers, count, dialTLS), nil
}

// requestsLoad sends requests on long connections, one worker for each.
func requestsLoad(connections int, requests int64, dial func(serial int64) (net.Conn, error)) load {
	conns := make([]net.Conn, connections)
	each := func(n int64) error {
		return inParallel(connections, int64(connections), func(serial int64) error {
			for range n / int64(connections) {
				if err := request(conns[serial-1]); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return load{
		warm: func() (err error) {
			for i := range conns {
				if conns[i], err = dial(int64(i)); err != nil {
					return err
				}
			}
			return each(min(requests, 5000))
		},
		run: func() error { return each(requests) },
	}
}

// clientConfig is TLS as HAProxy's configuration has it, for HTTP/1.1 or HTTP/2. Which workload the server is does not matter to the load.
func clientConfig(certificates string, http2 bool) (*tls.Config, error) {
	protocol := "http/1.1"
	if http2 {
		protocol = "h2"
	}
	file := filepath.Join(certificates, "workload.pem")
	certificate, err := tls.LoadX509KeyPair(file, file)
	if err != nil {
		return nil, err
	}
	pem, err := os.ReadFile(filepath.Join(certificates, "root-cert.pem"))
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("no certificate in %q", pem)
	}
	return &tls.Config{
		Certificates: []tls.Certificate{certificate}, MinVersion: tls.VersionTLS13, NextProtos: []string{protocol},
		CurvePreferences: []tls.CurveID{tls.X25519}, DynamicRecordSizingDisabled: true,
		InsecureSkipVerify: true, // instead of the names, which are no hosts
		VerifyConnection: func(state tls.ConnectionState) error {
			if state.Version != tls.VersionTLS13 || state.CipherSuite != tls.TLS_AES_128_GCM_SHA256 || state.NegotiatedProtocol != protocol {
				return fmt.Errorf("negotiated %x, %x, %q", state.Version, state.CipherSuite, state.NegotiatedProtocol)
			}
			_, err := state.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: roots, CurrentTime: time.Now()})
			return err
		},
	}, nil
}
