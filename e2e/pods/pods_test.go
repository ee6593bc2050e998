package pods

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// TestPods uses one node for all tests, because it takes seconds to make one.
func TestPods(t *testing.T) {
	n := newNode(t)
	for name, test := range map[string]func(*testing.T, *node){
		"two pods talk through both sidecars":                     talk,
		"a workload that restarts is reached again":               restartWorkload,
		"without its agent a pod is closed, and with it open":     restartAgent,
		"init containers are refused, and a job ends its sidecar": beEarlyAndEnd,
		"rules are made by the programs in the image":             useIPTables,
		"the pod of the document serves":                          playDocument,
		"a gateway's pod is replaced under load":                  replaceGateway,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, n)
		})
	}
	for _, order := range []string{"classic", "native"} {
		t.Run("nothing fails while a pod stops, in "+order+" order", func(t *testing.T) {
			t.Parallel()
			stopUnderLoad(t, n, order == "native")
		})
	}
}

// client returns an HTTP client whose connections are opened by dial.
func client(t testing.TB, http2 bool, dial func() (net.Conn, error)) *http.Client {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(!http2)
	protocols.SetUnencryptedHTTP2(http2)
	transport := &http.Transport{
		Protocols: protocols, MaxIdleConnsPerHost: 1,
		DialContext: func(context.Context, string, string) (net.Conn, error) { return dial() },
	}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: nettest.Patience}
}

// get sends one request and returns an error for any other response than nginx's.
func get(c *http.Client) error { return answered(c.Get("http://web.example/")) }

// post does the same with a request that no transport and no proxy may repeat.
func post(c *http.Client) error { return answered(c.Post("http://web.example/", "", nil)) }

func answered(response *http.Response, err error) error {
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if text, err := io.ReadAll(response.Body); err != nil || response.StatusCode != http.StatusOK || string(text) != "served\n" {
		return fmt.Errorf("%s: %q and %v", response.Status, text, err)
	}
	return nil
}

// echoOnce sends a line and waits for it.
func echoOnce(conn net.Conn, reader *bufio.Reader) error {
	conn.SetDeadline(time.Now().Add(nettest.Patience))
	if _, err := io.WriteString(conn, "a line\n"); err != nil {
		return err
	}
	if line, err := reader.ReadString('\n'); err != nil || line != "a line\n" {
		return fmt.Errorf("the echo is %q and %v", line, err)
	}
	return nil
}

// reach connects to a pod by each protocol, from a namespace.
func reach(t *testing.T, from *nettest.Namespace, to *pod) {
	t.Helper()
	for name, err := range map[string]error{
		"HTTP/1": get(client(t, false, dialer(from, to.at(8080)))),
		"h2c":    get(client(t, true, dialer(from, to.at(8081)))),
		"TCP":    echo(from, to),
	} {
		if err != nil {
			t.Errorf("%s from %s: %v", name, from.Name, err)
		}
	}
}

func echo(from *nettest.Namespace, to *pod) error {
	conn, err := from.Dial("tcp", to.at(7000), nettest.Patience)
	if err != nil {
		return err
	}
	defer conn.Close()
	return echoOnce(conn, bufio.NewReader(conn))
}

func talk(t *testing.T, n *node) {
	web, caller := n.playFile(t, "web.yaml", "talk-web"), n.playFile(t, "web.yaml", "talk-caller")
	reach(t, caller.Namespace, web)
	for p, cluster := range map[*pod]string{caller: "PassthroughCluster", web: "inbound|8080||"} {
		nettest.Eventually(t, p.name+" logs the request", func() bool {
			return strings.Contains(n.podman(t, "logs", p.container("istio-proxy")), cluster)
		})
	}
	checkConfinement(t, web)
}

// checkConfinement checks that the agent's process has no privilege.
func checkConfinement(t *testing.T, p *pod) {
	t.Helper()
	proc := filepath.Join(p.node.root, "proc", p.node.podman(t, "inspect", p.container("istio-proxy"), "--format", "{{.State.Pid}}"))
	status, err := os.ReadFile(filepath.Join(proc, "status"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"Uid:\t1337\t1337", "Gid:\t1337\t1337", "CapEff:\t0000000000000000\n", "CapBnd:\t0000000000000000\n", "NoNewPrivs:\t1\n"} {
		if !strings.Contains(string(status), want) {
			t.Errorf("/proc/PID/status has no %q:\n%s", want, status)
		}
	}
	mounts, err := os.ReadFile(filepath.Join(proc, "mounts"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); f[1] == "/" && !strings.HasPrefix(f[3], "ro,") {
			t.Errorf("its root can be written: %s", line)
		}
	}
}

func restartWorkload(t *testing.T, n *node) {
	p := n.playFile(t, "web.yaml", "restart-workload")
	c := client(t, false, dialer(n.Namespace, p.at(8080)))
	if err := get(c); err != nil {
		t.Error(err)
	}
	p.signal(t, "nginx", "KILL")
	p.ends(t, "nginx")
	// A reset, if the request arrives after the agent has dialled.
	if err := get(c); err == nil || !strings.Contains(err.Error(), "503") && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("without a workload: %v, want 503 or a reset", err)
	}
	n.podman(t, "start", p.container("nginx"))
	nettest.Eventually(t, "the workload is reached again", func() bool { return get(c) == nil })
}

func restartAgent(t *testing.T, n *node) {
	p := n.playFile(t, "web.yaml", "restart-agent")
	for range 3 {
		reach(t, n.Namespace, p)
		p.signal(t, "istio-proxy", "KILL")
		p.ends(t, "istio-proxy")
		// No connection bypasses the agent in either direction.
		for from, address := range map[*nettest.Namespace]string{n.Namespace: p.at(8080), p.Namespace: netip.AddrPortFrom(serving, 9).String()} {
			if conn, err := from.Dial("tcp", address, nettest.Patience); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("without an agent, from %s to %s: %v, %v, want it refused", from.Name, address, conn, err)
			}
		}
		started := make(chan struct{})
		go func() {
			defer close(started)
			n.podman(t, "start", p.container("istio-proxy"))
		}()
		n.awaitReadyAgain(t, p)
		<-started
	}
	reach(t, n.Namespace, p)
}

// awaitReadyAgain waits until the restarted agent of a pod is ready.
func (n *node) awaitReadyAgain(t *testing.T, p *pod) {
	t.Helper()
	c := client(t, false, dialer(p.Namespace, "127.0.0.1:15021"))
	nettest.Eventually(t, "the agent is ready again", func() bool {
		response, err := c.Get("http://127.0.0.1:15021/healthz/ready")
		if err != nil {
			return false
		}
		response.Body.Close()
		return response.StatusCode == http.StatusOK
	})
}

// beEarlyAndEnd runs a pod whose init containers run before the agent and whose main container ends the sidecar.
func beEarlyAndEnd(t *testing.T, n *node) {
	web := n.Listen(t, "tcp", netip.AddrPortFrom(serving, 0).String())
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {})}
	go server.Serve(web)
	t.Cleanup(func() { server.Close() })
	elsewhere := n.Listen(t, "tcp", netip.AddrPortFrom(outside, 0).String())
	reports := n.Listen(t, "tcp", netip.AddrPortFrom(serving, 0).String())
	_, port, _ := net.SplitHostPort(reports.Addr().String())
	reported := make(chan string, 8)
	go collect(reports, reported)

	p := n.start(t, manifest(t, "early.yaml"), "early", "TARGET", web.Addr().String(), "RANGE", elsewhere.Addr().String(),
		"REPORT_PORT", port, "REPORT", reports.Addr().String())
	for _, want := range []string{"captured: refused", "user: connected", "port: connected", "range: connected"} {
		if got := <-reported; got != want {
			t.Errorf("an init container reported %q, want %q", got, want)
		}
	}
	for _, container := range []string{"main", "istio-proxy"} {
		if code := p.ends(t, container); code != "0" {
			t.Errorf("%s ends with %s", container, code)
		}
	}
}

// collect takes a line from each connection that has one, until the listener is closed.
func collect(listener net.Listener, lines chan<- string) {
	for {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		conn.SetDeadline(time.Now().Add(nettest.Patience))
		if line, err := bufio.NewReader(conn).ReadString('\n'); err == nil {
			lines <- strings.TrimSpace(line)
		}
		conn.Close()
	}
}

// useIPTables installs the rules with the programs in the larger image, in both flavours.
func useIPTables(t *testing.T, n *node) {
	for backend, program := range map[string]string{"iptables-legacy": "iptables-legacy-save", "iptables-nft": "iptables-nft-save"} {
		p := n.playFile(t, "web.yaml", "by-"+backend, "args: [istio-iptables,", "args: [istio-iptables, --backend, "+backend+",",
			"name: init\n    image: "+image, "name: init\n    image: "+imageIPTables,
			"runAsGroup: 0\n      readOnlyRootFilesystem: true", "runAsGroup: 0\n      readOnlyRootFilesystem: false") // for the lock in /run
		reach(t, n.Namespace, p)
		if rules := p.MustRun(t, program, "-t", "nat"); !strings.Contains(rules, "-A PILLION_INBOUND") {
			t.Errorf("%s made none:\n%s", backend, rules)
		}
	}
}

// withoutDownwardAPI removes the volumes and variables that only a kubelet can fill.
func withoutDownwardAPI(spec, sidecar map[string]any) {
	of := func(name string) func(any) bool {
		return func(item any) bool { return item.(map[string]any)[name] != nil }
	}
	spec["volumes"] = slices.DeleteFunc(spec["volumes"].([]any), of("downwardAPI"))
	sidecar["env"] = slices.DeleteFunc(sidecar["env"].([]any), of("valueFrom"))
	delete(sidecar, "volumeMounts")
}

// playDocument plays the injected pod of docs/inject.md with our images. podman has no native sidecars, so the agent moves
// to the containers.
func playDocument(t *testing.T, n *node) {
	document, err := os.ReadFile("../../docs/inject.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(document), "\nbecomes\n")
	_, block, _ := strings.Cut(section, "```yaml\n")
	block, _, found := strings.Cut(block, "```\n")
	if !found {
		t.Fatal("docs/inject.md shows no injected pod")
	}
	var object map[string]any
	if err := yaml.Unmarshal([]byte(block), &object); err != nil {
		t.Fatal(err)
	}
	spec := object["spec"].(map[string]any)
	inits, containers := spec["initContainers"].([]any), spec["containers"].([]any)
	sidecar := inits[len(inits)-1].(map[string]any)
	if sidecar["restartPolicy"] != "Always" || sidecar["startupProbe"] == nil {
		t.Errorf("the last init container is no native sidecar with a startup probe: %v", sidecar)
	}
	delete(sidecar, "restartPolicy")
	withoutDownwardAPI(spec, sidecar)
	spec["initContainers"], spec["containers"] = inits[:len(inits)-1], append([]any{sidecar}, containers...)
	spec["restartPolicy"] = "Never"
	object["metadata"] = map[string]any{"name": "document"}
	text, err := yaml.Marshal(object)
	if err != nil {
		t.Fatal(err)
	}
	p := n.play(t, string(text), "document", "image: pillion\n", "image: "+image+"\n", "image: nginx\n", "image: "+imageWorkload+"\n")
	if err := get(client(t, false, dialer(n.Namespace, p.at(8080)))); err != nil {
		t.Error(err)
	}
	for _, h := range []string{"postStart", "preStop"} {
		if hook, has := sidecar["lifecycle"].(map[string]any)[h]; has {
			var words []string
			for _, word := range hook.(map[string]any)["exec"].(map[string]any)["command"].([]any) {
				words = append(words, word.(string))
			}
			p.exec(t, words...)
		}
	}
}
