package hostility

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// memoryLimit is the memory of the agent's container, as the injector and README have it.
const memoryLimit = 128 << 20

const agentUser = "1337"

// customer is the address of the other client, in the peer's namespace.
const customer = "198.51.100.3"

// initArguments are what an Istio injector passes to the init container.
var initArguments = []string{
	"init", "-p", "15001", "-z", "15006", "-u", agentUser, "-m", "REDIRECT", "-i", "*", "-x", "", "-b", "*", "-d", "15090,15021,15020,8081,8082",
}

// world is a pod with its origin and its agent, and a peer from which attackers and another client connect.
type world struct {
	pod, peer *nettest.Namespace
	agent     *nettest.Process
	log       bytes.Buffer    // of the agent; to be read when it has ended
	cgroup    *nettest.Cgroup // nil if it cannot be made here
	pinned    bool            // the agent has a core for itself, as far as these processes go
	scheme    string          // of requests that the agent carries
}

// newWorld pins processes to cores if pinned is set.
func newWorld(t testing.TB, pinned bool, of kind) *world {
	t.Helper()
	nettest.RequireRoot(t)
	w := &world{pinned: pinned && runtime.NumCPU() > 1, scheme: "http"}
	w.pod, w.peer = nettest.PodAndPeer(t)
	w.peer.AddAddress(t, "eth0", netip.PrefixFrom(netip.MustParseAddr(customer), 24))
	if of == gateway {
		w.start(t, w.pod, nil, "origin", directAddress)
		w.start(t, w.pod, nil, "origin", bystanderAddress)
		w.startGateway(t)
		return w
	}
	if out, err := w.pod.Run(w.pod.Command(0, 0, pillion, initArguments...)); err != nil {
		t.Fatalf("pillion init: %v\n%s", err, out)
	}
	w.start(t, w.pod, nil, "origin", originAddress, directAddress)
	w.start(t, w.pod, nil, "origin", bystanderAddress, secondAddress)
	if of == inMesh {
		w.startAgent(t, w.startControlPlane(t), "agent", "--control-plane", "auto")
	} else {
		w.startAgent(t, nil, "agent")
	}
	return w
}

// startAgent starts an agent by a command of pillion, in a memory cgroup if one can be made, and waits until it is ready. before
// are words before it.
func (w *world) startAgent(t testing.TB, before []string, command string, flags ...string) {
	t.Helper()
	words := append(before,
		"setpriv", "--reuid", agentUser, "--regid", agentUser, "--clear-groups", "--bounding-set", "-all", "--inh-caps=-all", "--no-new-privs",
		pillion, command, "--memory-limit", strconv.Itoa(memoryLimit), "--access-log", "/dev/null", "--log-level", "error",
	)
	words = append(words, flags...)
	if w.cgroup = nettest.NewCgroup(t, memoryLimit); w.cgroup != nil {
		words = append([]string{"sh", "-c", `echo $$ > "$0" && exec "$@"`, w.cgroup.Procs()}, words...)
	}
	words = append(w.on(runtime.NumCPU()-1), words...)
	cmd := w.pod.Command(0, 0, words[0], words[1:]...)
	cmd.Stderr = &w.log
	w.agent = w.pod.Start(t, cmd)
	wait := w.pod.Command(1337, 1337, pillion, "wait", "--timeoutSeconds", "60", "--periodMillis", "20")
	if out, err := w.pod.Run(wait); err != nil {
		w.agent.Kill()
		t.Fatalf("the agent does not become ready: %v\n%s\n%s", err, out, &w.log)
	}
}

// on returns the words before a command that pin it to a core.
func (w *world) on(core int) []string {
	if !w.pinned {
		return nil
	}
	return []string{"taskset", "-c", strconv.Itoa(core)}
}

// pinSelf pins this process to the first core.
func pinSelf(t testing.TB) {
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	var first unix.CPUSet
	first.Set(0)
	for _, task := range tasks { // threads that are made later inherit it
		if tid, err := strconv.Atoi(task.Name()); err == nil {
			_ = unix.SchedSetaffinity(tid, &first) // fails for a thread that has ended
		}
	}
}

// helper is this program in another role.
type helper struct {
	*nettest.Process
	input io.Closer
	lines *bufio.Reader
}

// lowest are the words before a command that give all its threads the lowest priority.
var lowest = []string{"nice", "-n", "19"}

// start starts the helper. before are words before its command.
func (w *world) start(t testing.TB, ns *nettest.Namespace, before []string, role string, args ...string) *helper {
	t.Helper()
	words := slices.Concat(w.on(0), before, []string{os.Args[0]}, args)
	cmd := ns.Command(0, 0, words[0], words[1:]...)
	cmd.Env = append(os.Environ(), roleVariable+"="+role)
	input, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	output, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	h := &helper{ns.Start(t, cmd), input, bufio.NewReader(output)}
	t.Cleanup(func() { input.Close() })
	if role == "origin" {
		h.await(t, "ready")
	}
	return h
}

// patience is for helpers: under the race detector and on a busy machine, an attack needs a minute until it is at its worst.
const patience = 5 * nettest.Patience

// await waits until the helper prints the line.
func (h *helper) await(t testing.TB, line string) {
	t.Helper()
	defer time.AfterFunc(patience, h.Kill).Stop()
	if got, err := h.lines.ReadString('\n'); strings.TrimSpace(got) != line {
		t.Fatalf("the helper printed %q, and %v; want %q", got, err, line)
	}
}

// end ends the helper.
func (h *helper) end() {
	h.input.Close()
	<-h.Exited()
}

// checkAlive fails the test if the agent has ended.
func (w *world) checkAlive(t testing.TB) {
	t.Helper()
	select {
	case <-w.agent.Exited():
		t.Fatalf("the agent ended: %v\n%.3000s", w.agent.Cmd.ProcessState, &w.log)
	default:
	}
}

// peakResident is the largest resident memory of the agent so far, in bytes.
func (w *world) peakResident(t testing.TB) int {
	t.Helper()
	status, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(w.agent.Cmd.Process.Pid), "status"))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(status), "VmHWM:")
	kib, err := strconv.Atoi(strings.Fields(rest)[0])
	if err != nil {
		t.Fatal(err)
	}
	return kib << 10
}

// othersOnCore returns a time that grows by that for which other processes, or the hypervisor, have the agent's core. It is 0 if the
// agent has no core for itself. Interrupts are not counted, because they serve the agent's connections; the kernel may count a part
// of them as the agent's time, so that the result decreases.
func (w *world) othersOnCore(t testing.TB) time.Duration {
	t.Helper()
	if !w.pinned {
		return 0
	}
	core := cpuTimes(t, "/proc/stat", fmt.Sprintf("cpu%d ", runtime.NumCPU()-1))
	agent := cpuTimes(t, filepath.Join("/proc", strconv.Itoa(w.agent.Cmd.Process.Pid), "stat"), "")
	const user, nice, system, steal = 0, 1, 2, 7 // fields of a core's line
	const utime, stime = 13, 14                  // fields of a process's
	const tick = time.Second / 100               // USER_HZ
	busy := core[user] + core[nice] + core[system] + core[steal]
	return (busy - agent[utime] - agent[stime]) * tick
}

// cpuTimes returns the numbers of the line that begins with prefix; 0 for other words.
func cpuTimes(t testing.TB, file, prefix string) (fields []time.Duration) {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if rest, found := strings.CutPrefix(line, prefix); found {
			for _, word := range strings.Fields(rest) {
				n, _ := strconv.ParseInt(word, 10, 64)
				fields = append(fields, time.Duration(n))
			}
			return fields
		}
	}
	t.Fatalf("%s has no line %q", file, prefix)
	return nil
}

// client is the other client. Its connections stay open.
type client struct {
	*http.Client
	transport *http.Transport
	url       string
}

// newClient returns a client of the server that connects from an address of the peer's, over HTTP/2 or HTTP/1.
func (w *world) newClient(t testing.TB, server string, two bool) *client {
	dialer := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(customer), 0)), Timeout: nettest.Patience}
	transport := &http.Transport{
		MaxIdleConnsPerHost: 10,
		DialContext: func(ctx context.Context, network, address string) (conn net.Conn, err error) {
			err = w.peer.Try(func() error {
				conn, err = dialer.DialContext(ctx, network, address)
				return err
			})
			return conn, err
		},
		Protocols:       new(http.Protocols),
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, // of the gateway
	}
	transport.Protocols.SetUnencryptedHTTP2(two)
	transport.Protocols.SetHTTP2(two)
	transport.Protocols.SetHTTP1(!two)
	t.Cleanup(transport.CloseIdleConnections)
	url := "http://" + server + "/"
	if server == originAddress {
		url = w.scheme + "://" + server + "/"
	}
	return &client{&http.Client{Transport: transport, Timeout: nettest.Patience}, transport, url}
}

// ask sends a request, and returns an error unless it is served.
func (c *client) ask() error {
	response, err := c.Get(c.url)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err == nil && (response.StatusCode != 200 || string(body) != "hello") {
		err = fmt.Errorf("answered %s, %.100q", response.Status, body)
	}
	return err
}

// gauge reads a number from the agent's metrics.
func (w *world) gauge(t testing.TB, name string) float64 {
	t.Helper()
	conn, err := w.pod.Dial("tcp", "127.0.0.1:15090", nettest.Patience)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(nettest.Patience))
	fmt.Fprintf(conn, "GET /stats/prometheus HTTP/1.1\r\nHost: pod\r\nConnection: close\r\n\r\n")
	response, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	for lines := bufio.NewScanner(response.Body); lines.Scan(); {
		if value, found := strings.CutPrefix(lines.Text(), name+" "); found {
			n, err := strconv.ParseFloat(value, 64)
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("the agent has no metric %s", name)
	return 0
}
