package pods

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// Ports of a gateway's pod.
const (
	gatewayPort   = 8443
	readinessPort = 15021
)

// gatewayDrainDelay is how long the pod of deploy accepts connections after SIGTERM. A busy machine needs a part of it for the programs
// that send the signal and ask for readiness.
const gatewayDrainDelay = 10 * time.Second

// gatewayVolume has the root of the mesh, and the certificate of the gateway.
const gatewayVolume = "/var/run/secrets/istio"

// buildControlPlane builds the stand-in for istiod, which is in a separate module.
var buildControlPlane = sync.OnceValues(func() (path string, err error) {
	path = filepath.Join(built, "istiod")
	cmd := exec.Command("go", "build", "-buildvcs=false", "-o", path, "./istiod")
	cmd.Dir = "../testdata/controlplane"
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building testdata/controlplane (make modules fetches what it needs): %w\n%s", err, out)
	}
	return path, nil
})

// gatewayManifest returns the pod of the gateway in deploy as a kubelet would run it: with its image, the variables and the
// volumes that only a kubelet can fill, and istiod's address.
func gatewayManifest(t *testing.T, istiod netip.AddrPort, volumes string) string {
	t.Helper()
	file, err := os.Open("../../deploy/kustomize/gateway/gateway.yaml")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	var template map[string]any
	for decoder := yaml.NewDecoder(file); template == nil; {
		var object map[string]any
		if err := decoder.Decode(&object); err != nil {
			t.Fatal(err)
		}
		if object["kind"] == "Deployment" {
			template = object["spec"].(map[string]any)["template"].(map[string]any)
		}
	}
	spec := template["spec"].(map[string]any)
	container := spec["containers"].([]any)[0].(map[string]any)
	container["image"] = image
	delete(container, "ports") // podman would bind them on the node
	filled := map[string]string{
		"POD_NAME": "THIS-POD", "POD_NAMESPACE": "istio-ingress", "INSTANCE_IP": "198.51.100.1", "SERVICE_ACCOUNT": "istio-ingressgateway", "ISTIO_META_NODE_NAME": "node",
		"PILLION_MEMORY_LIMIT": "268435456", "PROXY_CONFIG": fmt.Sprintf(`{"discoveryAddress":"%v"}`, istiod),
	}
	for _, item := range container["env"].([]any) {
		variable := item.(map[string]any)
		if value, ok := filled[variable["name"].(string)]; ok {
			delete(variable, "valueFrom")
			variable["value"] = value
		} else if variable["valueFrom"] != nil {
			t.Errorf("the gateway has the variable %v, which the test does not fill", variable["name"])
		}
	}
	for _, item := range spec["volumes"].([]any) {
		volume := item.(map[string]any)
		name := volume["name"].(string)
		for kind := range volume {
			if kind != "name" && kind != "emptyDir" {
				delete(volume, kind)
				volume["hostPath"] = map[string]any{"path": filepath.Join(volumes, name)}
				if err := os.MkdirAll(filepath.Join(volumes, name), 0o755); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	spec["restartPolicy"] = "Never"
	text, err := yaml.Marshal(map[string]any{"apiVersion": "v1", "kind": "Pod", "metadata": map[string]any{"name": "THIS-POD"}, "spec": spec})
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// startControlPlane starts a control plane on the node whose gateways send all requests to a server, and returns the volumes of
// their pods and the root of their certificate.
func startControlPlane(t *testing.T, n *node, at netip.AddrPort, server netip.AddrPort) (volumes string, roots *x509.CertPool) {
	t.Helper()
	program, err := buildControlPlane()
	if err != nil {
		t.Fatal(err)
	}
	state := t.TempDir()
	if out, err := exec.Command(program, "-directory", state, "-port", "0").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	const cluster = "outbound|80||web.default.svc.cluster.local"
	services, err := json.Marshal(map[string]any{
		"Port": gatewayPort, "Host": "web.example", "Gateway": gatewayVolume + "/gateway.pem",
		"Clusters": []any{map[string]any{"Name": cluster, "Endpoints": []any{map[string]any{"Address": server}}}},
		"Routes":   []any{map[string]any{"Weights": map[string]int{cluster: 1}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(state, "gateway.json")
	write(t, file, string(services))
	process := n.Start(t, n.Command(0, 0, program, "-directory", state, "-address", at.Addr().String(), "-port", fmt.Sprint(at.Port()), "-services", file))
	t.Cleanup(func() { process.Cmd.Process.Kill() })

	volumes = t.TempDir()
	for name, from := range map[string]string{"istiod-ca-cert/root-cert.pem": "root-cert.pem", "istiod-ca-cert/gateway.pem": "workload.pem"} {
		content, err := os.ReadFile(filepath.Join(state, from))
		if err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(volumes, name), string(content))
		if from == "root-cert.pem" {
			roots = x509.NewCertPool()
			roots.AppendCertsFromPEM(content)
		}
	}
	write(t, filepath.Join(volumes, "istio-token/istio-token"), "secret")
	for dir := volumes; len(dir) > len(os.TempDir()); dir = filepath.Dir(dir) { // the gateway's user reads them
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return volumes, roots
}

// service is what kube-proxy makes of the endpoints of a Service: a new connection goes to one of the ready pods, an open one
// stays where it is.
type service struct {
	from  *nettest.Namespace
	roots *x509.CertPool
	ready atomic.Pointer[[]*pod]
	next  atomic.Uint32
}

func (s *service) endpoints(pods ...*pod) { s.ready.Store(&pods) }

// dial opens a connection with TLS to one of the ready pods.
func (s *service) dial(two bool) (*told, error) {
	ready := *s.ready.Load()
	to := ready[int(s.next.Add(1))%len(ready)]
	conn, err := s.from.Dial("tcp", to.at(gatewayPort), nettest.Patience)
	if err != nil {
		return nil, err
	}
	config := &tls.Config{
		ServerName: "web.example", NextProtos: []string{"http/1.1"},
		InsecureSkipVerify: true, // the certificate is that of a workload, which has no such name
		VerifyConnection: func(state tls.ConnectionState) error {
			_, err := state.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: s.roots})
			return err
		},
	}
	if two {
		config.NextProtos = []string{"h2"}
	}
	return &told{Conn: tls.Client(conn, config), to: to, two: two}, nil
}

// caller is a client that sends one request after the other, over a connection that it keeps, or over a new one each.
type caller struct {
	service *service
	two     bool // HTTP/2
	brief   bool // one request for each connection

	served atomic.Int64
	conn   atomic.Pointer[told] // the current one
	failed chan<- error
}

// told is a connection that notices when its server announces the end, by Connection: close or GOAWAY, and when it ends the
// connection.
type told struct {
	net.Conn
	to  *pod
	two bool
	end atomic.Bool  // it is announced
	cut atomic.Value // error of reading that the client has not caused; may be nil

	head []byte // of the frame that is being read
	rest int    // of its payload
}

// Read looks for GOAWAY among the frames of HTTP/2.
func (c *told) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if err != nil && !errors.Is(err, net.ErrClosed) {
		c.cut.Store(err.Error())
	}
	for seen := b[:n]; c.two && len(seen) > 0; {
		if c.rest > 0 {
			skip := min(c.rest, len(seen))
			c.rest, seen = c.rest-skip, seen[skip:]
			continue
		}
		take := min(9-len(c.head), len(seen))
		if c.head, seen = append(c.head, seen[:take]...), seen[take:]; len(c.head) == 9 {
			c.rest = int(c.head[0])<<16 | int(c.head[1])<<8 | int(c.head[2])
			if c.head[3] == 7 {
				c.end.Store(true)
			}
			c.head = c.head[:0]
		}
	}
	return n, err
}

// run sends requests until stop is closed. A connection that is kept and ends unannounced is a failure, as a lost request is.
func (c *caller) run(t testing.TB, stop <-chan struct{}) {
	client := client(t, c.two, func() (net.Conn, error) {
		conn, err := c.service.dial(c.two)
		if err != nil {
			return nil, err
		}
		// On a busy machine Go's client closes a connection itself: it waits 50 ms for its own writer.
		if before := c.conn.Swap(conn); before != nil && before.cut.Load() != nil && !before.end.Load() {
			c.failed <- fmt.Errorf("HTTP/2 %v: a connection to %s ends unannounced: %v", c.two, before.to.name, before.cut.Load())
		}
		return conn, nil
	})
	for {
		select {
		case <-stop:
			return
		default:
		}
		response, err := client.Post("http://web.example/", "", nil) // TLS is in the connection
		if err == nil && response.Close {
			c.conn.Load().end.Store(true)
		}
		if err := answered(response, err); err != nil {
			c.failed <- fmt.Errorf("HTTP/2 %v, a connection for each request %v: %w", c.two, c.brief, err)
		}
		c.served.Add(1)
		if c.brief {
			c.conn.Store(nil)
			client.CloseIdleConnections()
		}
	}
}

// replaceGateway replaces the pod of the gateway in deploy by another one under load, as a Deployment does it with its surge: the new
// pod is ready before SIGTERM reaches the old one, which leaves the Service some time after it stops being ready. No request is
// lost, and connections that are kept are told to end.
func replaceGateway(t *testing.T, n *node) {
	web := n.Listen(t, "tcp", netip.AddrPortFrom(serving, 0).String())
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "served\n") })}
	go server.Serve(web)
	t.Cleanup(func() { server.Close() })
	istiod := netip.AddrPortFrom(serving, 15012)
	volumes, roots := startControlPlane(t, n, istiod, netip.MustParseAddrPort(web.Addr().String()))
	manifest := gatewayManifest(t, istiod, volumes)

	old := n.play(t, manifest, "gateway-old")
	s := &service{from: n.Namespace, roots: roots}
	s.endpoints(old)
	failed := make(chan error, 1<<16)
	stop := make(chan struct{})
	var callers []*caller
	var running sync.WaitGroup
	for _, two := range []bool{false, true} {
		for _, brief := range []bool{false, false, true} {
			c := &caller{service: s, two: two, brief: brief, failed: failed}
			callers = append(callers, c)
			running.Go(func() { c.run(t, stop) })
		}
	}
	halt := sync.OnceFunc(func() { close(stop); running.Wait() })
	defer halt()
	served := func(each int64) func() bool { // by each caller, from now on
		before := make([]int64, len(callers))
		for i, c := range callers {
			before[i] = c.served.Load()
		}
		return func() bool {
			for i, c := range callers {
				if c.served.Load() < before[i]+each {
					return false
				}
			}
			return true
		}
	}
	more := func(what string, each int64) {
		t.Helper()
		nettest.Eventually(t, what, served(each))
	}
	more("requests to the old pod", 100)
	next := n.play(t, manifest, "gateway-new")
	s.endpoints(old, next)
	more("requests to both pods", 100)

	old.signal(t, "istio-proxy", "TERM")
	readiness := client(t, false, dialer(n.Namespace, old.at(readinessPort)))
	nettest.Eventually(t, "the old pod is not ready", func() bool {
		response, err := readiness.Get("http://old.example/healthz/ready")
		if err != nil {
			return true // as for a kubelet
		}
		response.Body.Close()
		return response.StatusCode == http.StatusServiceUnavailable
	})
	nettest.Within(gatewayDrainDelay/4, served(20)) // while the Service does not follow yet
	s.endpoints(next)
	if code := old.ends(t, "istio-proxy"); code != "0" {
		t.Errorf("the old pod ends with %s", code)
	}
	more("requests to the new pod", 100)
	total := func() (sum int64) {
		for _, c := range callers {
			sum += c.served.Load()
		}
		return sum
	}
	nettest.Eventually(t, "10,000 requests", func() bool { return total() >= wanted })
	halt()
	close(failed)
	for err := range failed {
		t.Error(err)
	}
	t.Logf("%d requests", total())
}
