package e2e

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/secure/securetest"
)

// edge is a pod with `pillion gateway`, without rules, and a peer with its clients.
type edge struct {
	pod, peer *nettest.Namespace
	agent     *agent
	root      *securetest.Authority
	dir       string // of the certificates and the file of settings; the gateway's user can read it
}

func newEdge(t *testing.T) *edge {
	t.Helper()
	nettest.RequireRoot(t)
	e := &edge{root: securetest.New(t, "root"), dir: userDir(t, agentUID)}
	e.pod, e.peer = nettest.PodAndPeer(t)
	e.write(t, "root.crt", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: e.root.Certificate.Raw})))
	return e
}

// start starts the gateway with flags and waits until it is ready.
func (e *edge) start(t testing.TB, flags ...string) {
	t.Helper()
	e.agent = launchCommand(t, e.pod, append(append(unprivileged(agentUID), pillion, "gateway"), flags...))
	awaitReady(t, e.pod, e.agent)
}

func (e *edge) path(name string) string { return filepath.Join(e.dir, name) }

// write replaces a file by a rename.
func (e *edge) write(t testing.TB, name, text string) {
	t.Helper()
	if err := os.WriteFile(e.path(name+".new"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(e.path(name+".new"), e.path(name)); err != nil {
		t.Fatal(err)
	}
}

// certify writes NAME.pem, a certificate for hosts and its key, and returns its serial number.
func (e *edge) certify(t testing.TB, name string, hosts ...string) string {
	t.Helper()
	leaf := e.root.Leaf(t, "", func(c *x509.Certificate) {
		c.URIs, c.DNSNames = nil, hosts
		c.IPAddresses = []net.IP{nettest.PodIP4.AsSlice()} // for programs that verify the address that they connect to
	})
	key, err := x509.MarshalPKCS8PrivateKey(leaf.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	e.write(t, name+".pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: leaf.Certificate[0]}))+
		string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})))
	return string(leaf.Certificate[0])
}

// configure writes the file of settings.
func (e *edge) configure(t testing.TB, lines ...string) {
	t.Helper()
	e.write(t, "edge.yaml", strings.ReplaceAll(strings.Join(lines, "\n"), "DIR", e.dir)+"\n")
}

// serve answers requests at a port of the pod's loopback interface with name, the host and the path.
func (e *edge) serve(t testing.TB, port uint16, name string) {
	t.Helper()
	serveHTTP(t, e.pod.Listen(t, "tcp", netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port).String()), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Seen-Proto", r.Header.Get("X-Forwarded-Proto"))
		w.Header().Set("Seen-For", r.Header.Get("X-Forwarded-For"))
		io.Copy(w, r.Body)
		fmt.Fprintf(w, "%s %s%s", name, r.Host, r.URL)
	}))
}

// curl runs it in the peer, where the names of hosts lead to the pod, and returns its output.
func (e *edge) curl(t testing.TB, arguments ...string) string {
	t.Helper()
	words := []string{"--silent", "--show-error", "--noproxy", "*", "--max-time", "60", "--cacert", e.path("root.crt"), "--write-out", " %{http_code} %{http_version}",
		"--connect-to", "::" + nettest.PodIP4.String() + ":"}
	out, err := e.peer.Run(e.peer.Command(0, 0, "curl", append(words, arguments...)...))
	if err != nil {
		t.Fatalf("curl %q: %v\n%s\n%s", arguments, err, out, e.agent.log)
	}
	return string(out)
}

// A real curl over both versions of HTTP reaches the servers by host and path, and gets the certificate for its host.
func TestGatewayServesCurl(t *testing.T) {
	t.Parallel()
	e := newEdge(t)
	e.serve(t, 9001, "shop")
	e.serve(t, 9002, "api")
	e.serve(t, 9003, "rest")
	e.certify(t, "shop", "shop.example")
	e.certify(t, "others", "*.other.example", "api.example")
	e.configure(t, "listen: 8443", "redirect-http: 8080", "cert:", "- DIR/shop.pem", "- DIR/others.pem", "key:", "- DIR/shop.pem", "- DIR/others.pem",
		"route:", "- shop.example=127.0.0.1:9001", "- shop.example/api=127.0.0.1:9002", `- "*=127.0.0.1:9003"`)
	e.start(t, "--config", e.path("edge.yaml"))
	for _, version := range []struct{ flag, answer string }{{"--http1.1", "1.1"}, {"--http2", "2"}} {
		for url, want := range map[string]string{
			"https://shop.example:8443/a?b":       "shop shop.example:8443/a?b 200 ",
			"https://shop.example:8443/api/x":     "api shop.example:8443/api/x 200 ",
			"https://api.example:8443/":           "rest api.example:8443/ 200 ",
			"https://any.other.example:8443/apis": "rest any.other.example:8443/apis 200 ",
		} {
			if got := e.curl(t, version.flag, url); got != want+version.answer {
				t.Errorf("%s %s: %q, want %q", version.flag, url, got, want+version.answer)
			}
		}
	}
	if got, want := e.curl(t, "--write-out", "%{http_code} %{redirect_url}", "http://shop.example:8080/a?b"), "301 https://shop.example:8443/a?b"; got != want {
		t.Errorf("the redirect is %q, want %q", got, want)
	}
	if got := e.curl(t, "--header", "Host;", "http://shop.example:8080/a"); got != " 400 1.1" {
		t.Errorf("an empty Host is answered %q", got)
	}
	if got, want := e.curl(t, "--location", "http://shop.example:8080/a"), "shop shop.example:8443/a 200 1.1"; got != want && got != strings.TrimSuffix(want, "1.1")+"2" {
		t.Errorf("behind the redirect is %q, want %q", got, want)
	}
	line := e.agent.access.await(t, "GET /api/x HTTP/2", `"shop.example:8443" "127.0.0.1:9002"`)
	if !strings.Contains(line, " 200 - via_upstream ") || !strings.Contains(line, "shop.example/api") {
		t.Errorf("the access log has %s", line)
	}
	if _, metrics := get(t, e.pod, "http://127.0.0.1:15090/stats/prometheus"); !strings.Contains(metrics, "\ngo_gc_gogc_percent 200\n") {
		t.Errorf("the collector is not a gateway's:\n%s", metrics)
	}
}

// get sends a request over a new connection and returns the response with its body.
func (e *edge) get(t testing.TB, url string, change func(*http.Request)) (*http.Response, string) {
	t.Helper()
	client := e.client(true)
	defer client.CloseIdleConnections()
	request, err := http.NewRequest("GET", url, nil)
	if err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(request)
	}
	response, err := client.Do(request)
	if err != nil {
		t.Fatalf("%v\n%s", err, e.agent.log)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response, string(body)
}

// client is one whose connections lead from the peer to the pod, whatever the host is.
func (e *edge) client(two bool) *http.Client {
	roots := x509.NewCertPool()
	roots.AddCert(e.root.Certificate)
	transport := &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: roots}, ForceAttemptHTTP2: two, MaxIdleConnsPerHost: 100,
		DialContext: func(_ context.Context, _, address string) (net.Conn, error) {
			_, port, err := net.SplitHostPort(address)
			if err != nil {
				return nil, err
			}
			return e.peer.Dial("tcp", net.JoinHostPort(nettest.PodIP4.String(), port), nettest.Patience)
		},
		Protocols: new(http.Protocols),
	}
	transport.Protocols.SetHTTP1(!two)
	transport.Protocols.SetHTTP2(two)
	return &http.Client{Transport: transport, Timeout: nettest.Patience, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

// load sends requests until stop is called, and counts those that were served. Half of the workers keep a connection for a
// hundred requests, and the others for one. A request that is not served fails the test.
func (e *edge) load(t *testing.T, url string) (served *atomic.Uint64, stop func()) {
	t.Helper()
	var workers sync.WaitGroup
	served = new(atomic.Uint64)
	over := make(chan struct{})
	for i := range 8 {
		workers.Go(func() {
			client := e.client(i%2 == 0)
			defer client.CloseIdleConnections()
			for n := 1; ; n++ {
				select {
				case <-over:
					return
				default:
				}
				response, err := client.Post(url, "text/plain", strings.NewReader("body "))
				if err != nil {
					t.Errorf("worker %d, request %d: %v", i, n, err)
					return
				}
				body, err := io.ReadAll(response.Body)
				response.Body.Close()
				if err != nil || response.StatusCode != 200 || !strings.HasPrefix(string(body), "body ") {
					t.Errorf("worker %d, request %d: %s, %q, %v", i, n, response.Status, body, err)
					return
				}
				if served.Add(1); n%100 == 0 || i >= 4 {
					client.CloseIdleConnections()
				}
			}
		})
	}
	return served, func() {
		close(over)
		workers.Wait()
	}
}

// Two gateways behind a service, as kube-proxy implements it, are replaced one after the other as a Deployment does it: the
// next one is ready before one ends, and leaves the service only after its readiness has failed. No request is lost, over
// connections that are kept and new ones, of HTTP/1 and HTTP/2. The gateways are processes in one namespace, told apart by
// ports. The test stands for a kubelet, which sends SIGTERM and SIGKILL, and for kube-proxy, whose rules it writes.
func TestGatewaysAreReplacedWithoutLosingARequest(t *testing.T) {
	t.Parallel()
	e := newEdge(t)
	e.serve(t, 9001, "shop")
	e.certify(t, "shop", "shop.example")
	e.peer.MustRun(t, "iptables", "-t", "nat", "-N", "SERVICE")
	e.peer.MustRun(t, "iptables", "-t", "nat", "-A", "OUTPUT", "-p", "tcp", "-d", nettest.PodIP4.String(), "--dport", "443", "-j", "SERVICE")
	ready := func(i int) bool {
		conn, err := e.pod.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", 15100+i), nettest.Patience)
		if err != nil {
			return false
		}
		defer conn.Close()
		fmt.Fprintf(conn, "GET /healthz/ready HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
		status, _ := bufio.NewReader(conn).ReadString('\n')
		return strings.HasPrefix(status, "HTTP/1.1 200 ")
	}
	const drainDelay = 10 * time.Second // a busy machine needs a part of it for the rules of the service
	gateways := map[int]*agent{}
	start := func(i int) {
		port := func(base int) string { return fmt.Sprint(base + i) }
		gateways[i] = launchCommand(t, e.pod, append(unprivileged(agentUID), pillion, "gateway", "--listen", port(8440), "--route", "*=127.0.0.1:9001",
			"--cert", e.path("shop.pem"), "--key", e.path("shop.pem"), "--readiness-port", port(15100), "--status-port", "0", "--metrics-port", "0",
			"--admin-port", "0", "--drain-delay", drainDelay.String()))
		e.agent = gateways[i]
		nettest.Eventually(t, "the gateway to be ready", func() bool { return ready(i) })
	}
	route := func(one, other int) {
		rule := "-A SERVICE -p tcp -j DNAT --to-destination %v:%d"
		cmd := e.peer.Command(0, 0, "iptables-restore", "--noflush")
		cmd.Stdin = strings.NewReader(fmt.Sprintf("*nat\n:SERVICE - [0:0]\n"+rule+" -m statistic --mode nth --every 2 --packet 0\n"+rule+"\nCOMMIT\n",
			nettest.PodIP4, 8440+one, nettest.PodIP4, 8440+other))
		if out, err := e.peer.Run(cmd); err != nil {
			t.Fatal(err, out)
		}
	}
	start(0)
	start(1)
	route(0, 1)
	served, stop := e.load(t, "https://shop.example/")
	for i := range 2 {
		start(i + 2)
		gateways[i].Signal(syscall.SIGTERM)
		nettest.Eventually(t, "readiness to fail", func() bool { return !ready(i) })
		before := served.Load()
		nettest.Within(drainDelay/5, func() bool { return served.Load() >= before+100 }) // while the service does not follow yet
		route(i+1, i+2)
		if code := gateways[i].ends(t, nettest.Patience); code != 0 {
			t.Errorf("%v\n%s", gateways[i].Cmd.ProcessState, gateways[i].log)
		}
	}
	wanted := uint64(10_000)
	if raceDetector {
		wanted = 1000
	}
	nettest.Eventually(t, "enough requests", func() bool { return served.Load() >= wanted || t.Failed() })
	stop()
	t.Logf("%d requests", served.Load())
}

// Routes, ports and certificates change under load, and files that cannot be used change nothing. No request is lost.
func TestGatewayIsReloadedWithoutLosingARequest(t *testing.T) {
	t.Parallel()
	e := newEdge(t)
	e.serve(t, 9001, "one")
	e.serve(t, 9002, "two")
	presented := e.certify(t, "shop", "shop.example")
	settings := func(listen, route string) {
		e.configure(t, "listen: "+listen, "cert: DIR/shop.pem", "key: DIR/shop.pem", "route: "+route)
	}
	settings("8443", "shop.example=127.0.0.1:9001")
	e.start(t, "--config", e.path("edge.yaml"))
	served, stop := e.load(t, "https://shop.example:8443/")
	const url = "https://shop.example:8443/"
	wanted := uint64(10_000)
	if raceDetector {
		wanted = 1000
	}
	rounds := 0
	for ; rounds < 2 || served.Load() < wanted && !t.Failed(); rounds++ {
		settings("8443,8444", "shop.example=127.0.0.1:9002")
		nettest.Eventually(t, "the new route", func() bool {
			_, body := e.get(t, url, nil)
			return strings.HasPrefix(body, "two")
		})
		logged := func(line string) {
			t.Helper()
			nettest.Eventually(t, line, func() bool { return len(e.agent.log.lines(line, ":8444")) == 2*(rounds+1) }) // IPv4 and IPv6
		}
		logged("listener added")
		if _, body := e.get(t, "https://shop.example:8444/", nil); !strings.HasPrefix(body, "two") {
			t.Errorf("the new port answers %q", body)
		}
		old := presented
		presented = e.certify(t, "shop", "shop.example")
		nettest.Eventually(t, "the new certificate", func() bool {
			response, _ := e.get(t, url, nil)
			got := string(response.TLS.PeerCertificates[0].Raw)
			if got != old && got != presented {
				t.Fatal("another certificate is presented")
			}
			return got == presented
		})
		settings("8443", "shop.example=127.0.0.1:9001")
		nettest.Eventually(t, "the route before", func() bool {
			_, body := e.get(t, url, nil)
			return strings.HasPrefix(body, "one")
		})
		logged("listener removed")
	}
	e.write(t, "shop.pem", "no certificate")
	e.agent.log.await(t, "keeping the one in force", "shop.pem")
	settings("8443", "shop.example=127.0.0.1")
	e.agent.log.await(t, "keeping the one in force", `line 4: route`)
	if n := strings.Count(e.agent.log.String(), "keeping the one in force"); n != 2 {
		t.Errorf("two damaged files are logged %d times", n)
	}
	if response, body := e.get(t, url, nil); !strings.HasPrefix(body, "one") || string(response.TLS.PeerCertificates[0].Raw) != presented {
		t.Error("files that cannot be used have changed the gateway")
	}
	stop()
	t.Logf("%d requests during %d rounds of changes", served.Load(), rounds)
	if conn, err := e.peer.Dial("tcp", net.JoinHostPort(nettest.PodIP4.String(), "8444"), nettest.Patience); err == nil {
		conn.Close()
		t.Error("a removed port accepts connections")
	}
}

// Requests that are malformed, or too large for the edge, are rejected, plain and inside TLS, and their servers see nothing.
func TestGatewayRejectsHostileHeads(t *testing.T) {
	t.Parallel()
	for _, secured := range []bool{false, true} {
		t.Run(fmt.Sprintf("TLS %v", secured), func(t *testing.T) {
			t.Parallel()
			e := newEdge(t)
			var received atomic.Int64
			serveEach(t, e.pod.Listen(t, "tcp", "127.0.0.1:9001"), func(conn net.Conn) {
				if n, _ := conn.Read(make([]byte, 1)); n > 0 {
					received.Add(1)
				}
			})
			flags := []string{"--listen", "8443", "--route", "*=127.0.0.1:9001"}
			if secured {
				e.certify(t, "a", "a")
				flags = append(flags, "--cert", e.path("a.pem"), "--key", e.path("a.pem"))
			}
			e.start(t, flags...)
			edgeOnly := []struct{ name, request, status string }{
				{"above 60 KiB", "GET / HTTP/1.1\r\nHost: a\r\n" + fields(2, 31_000) + "\r\n", "431"},
				{"101 fields", "GET / HTTP/1.1\r\nHost: a\r\n" + fields(100, 1) + "\r\n", "431"},
			}
			for _, c := range slices.Concat(hostile, edgeOnly) {
				conn, err := e.peer.Dial("tcp", net.JoinHostPort(nettest.PodIP4.String(), "8443"), nettest.Patience)
				if err != nil {
					t.Fatal(err)
				}
				prepare(t, conn.(*net.TCPConn))
				if secured {
					config := e.client(false).Transport.(*http.Transport).TLSClientConfig
					config.ServerName = "a"
					conn = tls.Client(conn, config)
				}
				written := make(chan struct{})
				go func() {
					defer close(written)
					io.WriteString(conn, c.request)
				}()
				if status, _ := readAnswer(t, bufio.NewReader(conn)); status != c.status {
					t.Errorf("%s: status %s, want %s", c.name, status, c.status)
				}
				conn.Close()
				<-written
			}
			if n := received.Load(); n > 0 {
				t.Errorf("the server received %d of them", n)
			}
		})
	}
}

// Fields by which a proxy would be believed are replaced.
func TestGatewayDoesNotTrustItsClients(t *testing.T) {
	t.Parallel()
	e := newEdge(t)
	e.serve(t, 9001, "one")
	e.start(t, "--listen", "8080", "--route", "*=127.0.0.1:9001")
	response, _ := e.get(t, "http://shop.example:8080/", func(r *http.Request) {
		r.Header.Set("X-Forwarded-For", "203.0.113.9")
		r.Header.Set("X-Forwarded-Proto", "https")
	})
	if got, want := response.Header.Get("Seen-For"), "203.0.113.9,"+nettest.PeerIP4.String(); got != want {
		t.Errorf("the server sees x-forwarded-for %q, want %q", got, want)
	}
	if got := response.Header.Get("Seen-Proto"); got != "http" {
		t.Errorf("the server sees x-forwarded-proto %q", got)
	}
}

// The client is the one that the PROXY protocol names, behind curl's header as well. A connection without a header is reset.
func TestGatewayTakesClientsFromTheProxyProtocol(t *testing.T) {
	t.Parallel()
	e := newEdge(t)
	e.serve(t, 9001, "shop")
	e.certify(t, "shop", "shop.example")
	e.start(t, "--proxy-protocol", "--listen", "8443", "--redirect-http", "8080", "--route", "*=127.0.0.1:9001", "--cert", e.path("shop.pem"), "--key", e.path("shop.pem"))
	const url = "https://shop.example:8443/"
	for _, two := range []bool{false, true} {
		client := e.client(two)
		dial := client.Transport.(*http.Transport).DialContext
		client.Transport.(*http.Transport).DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := dial(ctx, network, address)
			if err == nil {
				_, err = io.WriteString(conn, "PROXY TCP4 203.0.113.7 198.51.100.2 4660 8443\r\n")
			}
			return conn, err
		}
		response, err := client.Get(url)
		if err != nil {
			t.Fatalf("%v\n%s", err, e.agent.log)
		}
		response.Body.Close()
		client.CloseIdleConnections()
		if got := response.Header.Get("Seen-For"); got != "203.0.113.7" {
			t.Errorf("HTTP/2 %v: the server sees the client %q", two, got)
		}
		e.agent.access.await(t, fmt.Sprintf("GET / HTTP/%s", map[bool]string{false: "1.1", true: "2"}[two]), " 203.0.113.7:4660 ")
	}
	if got := e.curl(t, "--haproxy-protocol", "--http2", url); got != "shop shop.example:8443/ 200 2" {
		t.Errorf("curl: %q", got)
	}
	if got := e.curl(t, "--haproxy-protocol", "http://shop.example:8080/"); got != " 301 1.1" {
		t.Errorf("curl without TLS: %q", got)
	}
	client := e.client(true)
	defer client.CloseIdleConnections()
	if response, err := client.Get(url); err == nil {
		response.Body.Close()
		t.Errorf("without a header: %s", response.Status)
	}
	e.agent.access.await(t, "DPE", nettest.PeerIP4.String())
}

// The flags set the limits of requests, below Envoy's and above.
func TestGatewayHasTheLimitsOfItsFlags(t *testing.T) {
	t.Parallel()
	e := newEdge(t)
	e.serve(t, 9001, "one")
	e.start(t, "--listen", "8080", "--route", "*=127.0.0.1:9001", "--max-head-fields", "200", "--max-head-bytes", "8192")
	for _, request := range []struct{ fields, size, want int }{{150, 1, 200}, {250, 1, 431}, {1, 10_000, 431}} {
		response, _ := e.get(t, "http://shop.example:8080/", func(r *http.Request) {
			for i := range request.fields {
				r.Header.Set(fmt.Sprintf("X-%d", i), strings.Repeat("a", request.size))
			}
		})
		if response.StatusCode != request.want {
			t.Errorf("%d fields of %d bytes: %d, want %d", request.fields, request.size, response.StatusCode, request.want)
		}
	}
}

// Ports below 1024 are bound without a capability where the network permits it, as that of a pod may.
func TestGatewayListensBelow1024WhereItMay(t *testing.T) {
	t.Parallel()
	e := newEdge(t)
	e.serve(t, 9001, "shop")
	e.pod.MustRun(t, "sysctl", "-qw", "net.ipv4.ip_unprivileged_port_start=80")
	e.certify(t, "shop", "shop.example")
	e.start(t, "--listen", "443", "--redirect-http", "80", "--route", "*=127.0.0.1:9001", "--cert", e.path("shop.pem"), "--key", e.path("shop.pem"))
	if _, body := e.get(t, "https://shop.example/", nil); body != "shop shop.example/" {
		t.Errorf("port 443 answers %q", body)
	}
	if response, _ := e.get(t, "http://shop.example/a", nil); response.StatusCode != 301 || response.Header.Get("Location") != "https://shop.example/a" {
		t.Errorf("port 80 answers %s with %v", response.Status, response.Header)
	}
}

// A request in progress finishes after SIGTERM, and new connections are refused.
func TestGatewayDrains(t *testing.T) {
	t.Parallel()
	e := newEdge(t)
	arrived, answer := make(chan struct{}), make(chan struct{})
	serveHTTP(t, e.pod.Listen(t, "tcp", "127.0.0.1:9001"), http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		close(arrived)
		<-answer
		io.WriteString(w, "done")
	}))
	e.start(t, "--listen", "8080", "--route", "*=127.0.0.1:9001")
	got := make(chan string, 1)
	go func() {
		response, err := e.client(false).Get("http://a:8080/")
		if err != nil {
			got <- err.Error()
			return
		}
		defer response.Body.Close()
		body, _ := io.ReadAll(response.Body)
		got <- string(body)
	}()
	<-arrived
	e.agent.Signal(syscall.SIGTERM)
	nettest.Eventually(t, "the listener to close", func() bool {
		conn, err := e.peer.Dial("tcp", net.JoinHostPort(nettest.PodIP4.String(), "8080"), nettest.Patience)
		if err == nil {
			conn.Close()
		}
		return err != nil
	})
	close(answer)
	if body := <-got; body != "done" {
		t.Errorf("the request in progress ended with %q", body)
	}
	if code := e.agent.ends(t, nettest.Patience); code != 0 {
		t.Errorf("exit code %d\n%s", code, e.agent.log)
	}
}

// Settings that cannot be used end the program with one line, and --check finds them without a port.
func TestGatewayNamesWhatItCannotUse(t *testing.T) {
	t.Parallel()
	e := newEdge(t)
	e.certify(t, "a", "a")
	e.certify(t, "b", "b")
	e.configure(t, "listen: 8443", "cert: DIR/a.pem", "key: DIR/b.pem", "route: a=b:80")
	e.pod.Listen(t, "tcp", ":8081")
	for _, c := range []struct {
		arguments string
		code      int
		want      string
	}{
		{"--listen 8080", 2, "--route: is required: HOST=ADDRESS:PORT, such as *=10.0.0.1:8080"},
		{"--listen x --route a=b:80", 2, `invalid argument "x" for "--listen" flag: `},
		{"--listen 8080 --route a=b", 2, `invalid argument "a=b" for "--route" flag: "b" is not an address with a port: use ADDRESS:PORT or NAME:PORT, such as 10.0.0.1:8080`},
		{"--listen 8080 --route a=b:80 --cert DIR/a.pem", 2, "--key: 0 keys for 1 certificates"},
		{"--listen 8080 --route a=b:80 --cert DIR/a.pem --key DIR/none", 2, "--key: open DIR/none: no such file or directory"},
		{"--config DIR/none", 2, "DIR/none: no such file or directory"},
		{"--config DIR/edge.yaml", 2, "DIR/edge.yaml: cert: DIR/a.pem with the key DIR/b.pem: tls: private key does not match public key"},
		{"--config DIR/edge.yaml --listen 80", 2, "--listen has no effect with --config: write it into DIR/edge.yaml"},
		{"--listen 8081 --route a=b:80", 1, "8081"},
		{"--listen 8081 --route a=b:80 --cert DIR/a.pem --key DIR/a.pem --check", 0, ""},
	} {
		arguments := strings.Fields(strings.ReplaceAll("gateway "+c.arguments, "DIR", e.dir))
		stdout, stderr, code := execute(t, e.pod, nil, arguments...)
		lines := strings.Split(strings.TrimSpace(stderr), "\n")
		if last := lines[len(lines)-1]; code != c.code || stdout != "" || !strings.Contains(last, strings.ReplaceAll(c.want, "DIR", e.dir)) || code == 2 && len(lines) != 1 {
			t.Errorf("%s: exit code %d, %q, want %d, %q", c.arguments, code, stderr, c.code, c.want)
		}
	}
}

// The commands and the file of the document are accepted.
func TestGatewayDocumentHasValidExamples(t *testing.T) {
	t.Parallel()
	e := newEdge(t)
	e.certify(t, "shop", "shop.example")
	e.certify(t, "api", "api.example")
	document, err := os.ReadFile("../docs/gateway.md")
	if err != nil {
		t.Fatal(err)
	}
	paths := strings.NewReplacer("/etc/tls/", "", "shop.crt", e.path("shop.pem"), "shop.key", e.path("shop.pem"), "api.crt", e.path("api.pem"), "api.key", e.path("api.pem"), "'", "")
	_, file, _ := strings.Cut(string(document), "```yaml\n")
	file, _, _ = strings.Cut(file, "```")
	e.write(t, "edge.yaml", paths.Replace(file))
	commands := []string{"pillion gateway --config " + e.path("edge.yaml")}
	for line := range strings.Lines(string(document)) {
		if command, ok := strings.CutPrefix(line, "    pillion gateway "); ok {
			commands = append(commands, "pillion gateway "+paths.Replace(command))
		}
	}
	if len(commands) < 3 || !strings.HasPrefix(file, "listen: ") {
		t.Errorf("the document has the commands %q and the file\n%s", commands, file)
	}
	for _, command := range commands {
		if _, stderr, code := execute(t, e.pod, nil, append(strings.Fields(command)[1:], "--check")...); code != 0 {
			t.Errorf("%s: exit code %d, %s", command, code, stderr)
		}
	}
}
