package e2e

import (
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/nettest"
)

// send sends a request with additional fields from inside the namespace. The field Host sets the host.
func send(t testing.TB, from *nettest.Namespace, method, url string, fields map[string]string) (status int, body string) {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), method, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, value := range fields {
		request.Header.Set(name, value)
	}
	request.Host = fields["Host"]
	client := way{from: from}.client(t, false)
	client.Transport.(*http.Transport).DisableKeepAlives = true
	response, err := client.Do(request)
	if err != nil {
		t.Fatalf("%s %s: %v", method, url, err)
	}
	return response.StatusCode, text(t, response)
}

// probers are as the injector writes them.
const probers = `ISTIO_KUBE_APP_PROBERS={
	"/app-health/app/readyz":    {"httpGet":{"path":"/ready?deep=1","port":8080,"scheme":"HTTP","httpHeaders":[{"name":"X-Probe","value":"yes"}]},"timeoutSeconds":5},
	"/app-health/app/livez":     {"httpGet":{"path":"/sick","port":8080},"timeoutSeconds":5},
	"/app-health/app/startupz":  {"httpGet":{"path":"/moved","port":8080},"timeoutSeconds":5},
	"/app-lifecycle/app/prestopz": {"httpGet":{"path":"/elsewhere","port":8080},"timeoutSeconds":5},
	"/app-health/slow/readyz":   {"httpGet":{"path":"/slow","port":8080},"timeoutSeconds":1},
	"/app-health/dead/readyz":   {"httpGet":{"path":"/","port":9},"timeoutSeconds":5},
	"/app-health/db/livez":      {"tcpSocket":{"port":5432},"timeoutSeconds":5},
	"/app-health/db/readyz":     {"tcpSocket":{"port":9},"timeoutSeconds":5},
	"/app-health/rpc/livez":     {"grpc":{"port":50051,"service":""},"timeoutSeconds":5},
	"/app-health/rpc/readyz":    {"grpc":{"port":50051,"service":"up"},"timeoutSeconds":5},
	"/app-health/rpc/startupz":  {"grpc":{"port":50051,"service":"down"},"timeoutSeconds":5},
	"/app-health/none/startupz": {"grpc":{"port":50051,"service":"no.such"},"timeoutSeconds":5},
	"/app-health/dead/livez":    {"grpc":{"port":9},"timeoutSeconds":5}}`

// For a probe of the kubelet at the status port, the agent runs the workload's own probe from an address that the rules do
// not capture, in both families.
func TestKubeletProbesReachTheWorkload(t *testing.T) {
	t.Parallel()
	nettest.RequireRoot(t)
	program := peer(t, "grpc")
	for _, family := range []struct{ own, source netip.Addr }{
		{nettest.PodIP4, capture.InboundSource4}, {nettest.PodIP6, capture.InboundSource6},
	} {
		t.Run(family.own.String(), func(t *testing.T) {
			t.Parallel()
			s := newInjectedStage(t, []string{probers, "INSTANCE_IP=" + family.own.String()})
			w := way{name: "probe", from: s.peer, to: s.pod, address: family.own, seenAs: family.source}
			listener := s.pod.Listen(t, "tcp", netip.AddrPortFrom(family.own, 8080).String())
			d := &dialogue{way: w, connections: new(atomic.Int64)}
			d.serve(t, listener, func(w http.ResponseWriter, r *http.Request) { // which checks who the workload sees
				switch r.URL.Path {
				case "/sick":
					http.Error(w, "the database is gone", http.StatusServiceUnavailable)
				case "/moved":
					http.Redirect(w, r, "/ready?from=moved", http.StatusFound)
				case "/elsewhere":
					http.Redirect(w, r, "http://other.example/", http.StatusMovedPermanently)
				case "/slow":
					<-r.Context().Done()
				default:
					fmt.Fprintf(w, "%s %s host=%s probe=%s agent=%s", r.Method, r.URL, r.Host, r.Header.Get("X-Probe"), r.UserAgent())
				}
			})
			database := s.pod.Listen(t, "tcp", netip.AddrPortFrom(family.own, 5432).String())
			seen := make(chan string, 10)
			go func() {
				for conn, err := database.Accept(); err == nil; conn, err = database.Accept() {
					seen <- conn.RemoteAddr().String()
					conn.Close()
				}
			}()
			w.startPeer(t, 50051, program, "serve", "ADDRESS")

			status := netip.AddrPortFrom(family.own, capture.StatusPort).String()
			itself := netip.AddrPortFrom(family.own, 8080).String()
			for _, c := range []struct {
				path   string
				fields map[string]string
				status int
				want   string // exactly, or with … at the end what it contains
			}{
				{"/app-health/app/readyz", map[string]string{"X-Probe": "yes", "User-Agent": "kube-probe/1.31"}, 200,
					"GET /ready?deep=1 host=" + itself + " probe=yes agent=kube-probe/1.31"},
				{"/app-health/app/readyz", map[string]string{"Host": "shop.example", "User-Agent": "k"}, 200, "GET /ready?deep=1 host=shop.example probe= agent=k"},
				{"/app-health/app/livez", nil, 503, "the database is gone\n"},
				{"/app-health/app/startupz", map[string]string{"User-Agent": "k"}, 200, "GET /ready?from=moved host=" + itself + " probe= agent=k"},
				{"/app-lifecycle/app/prestopz", nil, 200, "other.example…"},
				{"/app-health/slow/readyz", nil, 500, "no answer within 1s…"},
				{"/app-health/dead/readyz", nil, 500, "connection refused…"},
				{"/app-health/db/livez", nil, 200, ""},
				{"/app-health/db/readyz", nil, 500, "connection refused…"},
				{"/app-health/rpc/livez", nil, 200, ""},
				{"/app-health/rpc/readyz", nil, 200, ""},
				{"/app-health/rpc/startupz", nil, 500, "NOT_SERVING…"},
				{"/app-health/none/startupz", nil, 500, "no.such…"},
				{"/app-health/dead/livez", nil, 500, "connection refused…"},
				{"/app-health/app/preztopz", nil, 400, "app prober config does not exists for /app-health/app/preztopz\n"},
			} {
				code, body := send(t, s.peer, "GET", "http://"+status+c.path, c.fields)
				part, contains := strings.CutSuffix(c.want, "…")
				if code != c.status || contains && !strings.Contains(body, part) || !contains && body != c.want {
					t.Errorf("%s: %d %q, want %d %q", c.path, code, body, c.status, c.want)
				}
				if code == 500 && (!strings.HasPrefix(body, c.path+" (") || strings.Count(body, "\n") != 1) {
					t.Errorf("%s: the reason is not a single line with the path: %q", c.path, body)
				}
			}
			if from, err := netip.ParseAddrPort(<-seen); err != nil || from.Addr() != family.source {
				t.Errorf("a TCP probe comes from %v", from)
			}
			if lines := s.agent.access.lines(itself); len(lines) > 0 {
				t.Errorf("a probe went through the agent's own listeners:\n%s", lines)
			}
		})
	}
}

func TestInvalidInjectorVariablesAreReported(t *testing.T) {
	t.Parallel()
	nettest.RequireRoot(t)
	pod, _ := nettest.PodAndPeer(t)
	const probes, metrics = "ISTIO_KUBE_APP_PROBERS", "ISTIO_PROMETHEUS_ANNOTATIONS"
	for _, c := range []struct {
		variable, value string
		want            []string
	}{
		{probes, `{`, []string{"JSON object"}},
		{probes, `{"/app-health/app/healthz":{"tcpSocket":{"port":1}}}`, []string{`"/app-health/app/healthz"`, "livez, readyz or startupz"}},
		{probes, `{"/app-health/app/livez":{"tcpSocket":{"port":"http"}}}`, []string{`"/app-health/app/livez"`, `"http"`, "number"}},
		{probes, `{"/app-health/app/livez":{}}`, []string{`"/app-health/app/livez"`, "exactly one"}},
		{metrics, `{"port":"15020"}`, []string{"15020", "agent's own"}},
		{metrics, `port=8080`, []string{"JSON"}},
		{metrics, `{"port":"http"}`, []string{`"http"`, "1 to 65535"}},
	} {
		_, stderr, code := execute(t, pod, []string{"INSTANCE_IP=" + nettest.PodIP4.String(), c.variable + "=" + c.value}, "agent")
		last := stderr[strings.LastIndexByte(strings.TrimSuffix(stderr, "\n"), '\n')+1:]
		for _, want := range append(c.want, c.variable) {
			if code != 2 || !strings.Contains(last, want) {
				t.Errorf("%s=%s: exit code %d, want 2 and %q in: %s", c.variable, c.value, code, want, stderr)
			}
		}
	}
}

// A job can stop its sidecar. Clients outside the pod cannot.
func TestQuitIsLocalAndImmediate(t *testing.T) {
	t.Parallel()
	s := newStage(t, endless...)
	for _, path := range []string{"/quitquitquit", "/drain"} {
		for url, from := range map[string]*nettest.Namespace{
			podURL(capture.StatusPort, path):                                    s.peer,
			"http://[" + nettest.PodIP6.String() + "]:15020" + path:             s.peer,
			podURL(capture.StatusPort, path) + "?by=the+pod+at+its+own+address": s.pod,
		} {
			if status, body := send(t, from, "POST", url, map[string]string{"Host": "localhost:15020"}); status != 403 || body != "Only requests from localhost are allowed\n" {
				t.Errorf("%s from %s: %d %q, want 403", url, from.Name, status, body)
			}
		}
		if status, body := send(t, s.pod, "GET", "http://127.0.0.1:15020"+path, nil); status != 405 || body != "Method Not Allowed\n" {
			t.Errorf("GET %s: %d %q, want 405", path, status, body)
		}
		if status, _ := send(t, s.pod, "POST", "http://127.0.0.1:15020"+path, map[string]string{"Host": "evil.example"}); status != 403 {
			t.Errorf("%s by a name that came to mean 127.0.0.1: %d, want 403", path, status)
		}
	}
	if status, _ := ask(t, s, "/healthz/ready"); status != 200 {
		t.Fatalf("readiness = %d", status)
	}
	downstream, upstream := s.inbound().connect(t)
	converse(t, downstream, upstream)
	stdout, stderr, code := execute(t, s.pod, nil, "request", "--debug-port", "15020", "POST", "quitquitquit")
	if stdout != "OK\n" || code != 0 {
		t.Errorf("pillion request: %d %q %s", code, stdout, stderr)
	}
	if code := s.agent.ends(t, nettest.Patience); code != 0 {
		t.Errorf("exit code %d, want 0; log:\n%s", code, s.agent.log)
	}
	if _, err := downstream.Read(make([]byte, 1)); !isReset(err) {
		t.Errorf("downstream sees %v, want a reset", err)
	}
	s.agent.access.await(t, " "+downstream.LocalAddr().String()+" ") // the log was written to its end
}

// The preStop hook of a native sidecar starts its drain. Endpoints are removed from then on; requests that still arrive are
// served, and a later signal waits only for the rest of the delay.
func TestDrainByRequestKeepsServing(t *testing.T) {
	t.Parallel()
	const requests = 20
	s := newStage(t, endless...) // so that what happens here happens during the delay
	d := newDialogue(t, s.inbound(), false, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "served") })
	if status, body := send(t, s.pod, "POST", "http://127.0.0.1:15020/drain", nil); status != 200 || body != "OK" {
		t.Fatalf("%d %q", status, body)
	}
	nettest.Eventually(t, "readiness is 503", func() bool { status, _ := ask(t, s, "/healthz/ready"); return status == 503 })
	if status, _ := send(t, s.peer, "GET", podURL(capture.StatusPort, "/healthz/ready"), nil); status != 503 {
		t.Errorf("readiness at the status port = %d", status)
	}
	for range requests {
		response := d.do(t, d.request(t, "GET", "/", nil))
		if text(t, response) != "served" || !response.Close {
			t.Errorf("%d, and the connection stays: %v", response.StatusCode, !response.Close)
		}
	}
	if status, _ := ask(t, s, "/healthz/live"); status != 200 {
		t.Errorf("liveness = %d", status)
	}
	d.client.CloseIdleConnections()
	s.agent.Signal(syscall.SIGTERM)
	s.agent.log.await(t, "msg=draining", "elapsed=") // the signal waits for the rest of the delay: here nearly all of it
	s.agent.Signal(syscall.SIGTERM)
	if code := s.agent.ends(t, nettest.Patience); code != 0 {
		t.Errorf("exit code %d, want 0: no connection was left to cut; log:\n%s", code, s.agent.log)
	}
}

func TestProfilesAreLocal(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	for _, path := range []string{"/debug/pprof/", "/debug/pprof/goroutine?debug=1", "/debug/pprof/cmdline", "/debug/pprof/profile?seconds=1"} {
		if status, body := send(t, s.pod, "GET", "http://127.0.0.1:15020"+path, nil); status != 200 || body == "" {
			t.Errorf("%s from loopback: %d and %d bytes", path, status, len(body))
		}
		for _, host := range []string{"", "localhost:15020"} {
			if status, body := send(t, s.peer, "GET", podURL(capture.StatusPort, path), map[string]string{"Host": host}); status != 403 {
				t.Errorf("%s from the peer: %d %.100q, want 403", path, status, body)
			}
		}
	}
}
