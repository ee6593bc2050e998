package bench

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// initArguments are the arguments that Istio's injector gives the init container.
var initArguments = []string{
	"init", "-p", "15001", "-z", "15006", "-u", "1337", "-m", "REDIRECT", "-i", "*", "-x", "", "-b", "*",
	"-d", "15090,15021,15020", "--log_output_level=default:info",
}

// proxyUser is the user whose traffic the rules do not capture. Every proxy runs as this user.
const proxyUser = 1337

// scope runs the cleanups registered in it before the test or benchmark ends. Each measurement needs its own namespaces and
// processes, and sub-benchmarks would print lines into the table.
type scope struct {
	testing.TB
	undo []func()
}

func (s *scope) Cleanup(fn func()) { s.undo = append(s.undo, fn) }

func inScope(t testing.TB, fn func(t testing.TB)) {
	s := &scope{TB: t}
	defer func() {
		for i := len(s.undo) - 1; i >= 0; i-- {
			s.undo[i]()
		}
	}()
	fn(s)
}

// world is a pod with the workload and a peer with the load. Pillion's rules are installed, except for the direct
// connection.
type world struct {
	pod, peer    *nettest.Namespace
	cores        cores
	certificates string // directory with those of a mesh; empty: there are none

	// Of the load, which then is in the pod, and the workload in the peer: the proxy carries what the pod opens. Invalid: the
	// workload is in the pod.
	destination netip.AddrPort
}

func newWorld(t testing.TB, k *kit, c contender) *world {
	t.Helper()
	w := newNamespaces(t, k, c)
	if c.edge {
		startHelper(t, w.pod, w.cores.load, "workload", "-direct=true", "-certificates", c.certificates).await(t, "warm")
	} else if w.destination = c.to; w.destination.IsValid() {
		startHelper(t, w.peer, w.cores.load, "workload", "-direct=true", "-certificates", c.certificates).await(t, "warm")
	} else {
		startHelper(t, w.pod, w.cores.load, "workload", fmt.Sprintf("-direct=%v", c.direct())).await(t, "warm")
	}
	return w
}

func newNamespaces(t testing.TB, k *kit, c contender) *world {
	t.Helper()
	w := &world{cores: k.cores}
	w.pod, w.peer = nettest.PodAndPeer(t)
	for _, address := range loadSources {
		w.peer.AddAddress(t, "eth0", netip.PrefixFrom(netip.MustParseAddr(address), 24))
	}
	// The same congestion control on all machines, one without timer-based pacing: this reduces the variation between
	// machines and between rounds.
	for _, ns := range []*nettest.Namespace{w.pod, w.peer} {
		ns.Do(t, func() error {
			return os.WriteFile("/proc/sys/net/ipv4/tcp_congestion_control", []byte("reno"), 0)
		})
	}
	if !c.direct() && !c.edge {
		if out, err := w.pod.Run(w.pod.Command(0, 0, k.pillion, initArguments...)); err != nil {
			t.Fatalf("pillion init: %v\n%s", err, out)
		}
	}
	return w
}

// cores are the cores of the proxy and of the load.
type cores struct{ proxy, load int }

// chooseCores chooses the last core that this process may use for the proxy and the first for everything else. On a machine
// with one core both are the same, and the figures are less meaningful.
func chooseCores() (cores, error) {
	var allowed unix.CPUSet
	if err := unix.SchedGetaffinity(0, &allowed); err != nil {
		return cores{}, fmt.Errorf("reading which cores may be used: %w", err)
	}
	first, last := -1, -1
	for core := range 1024 {
		if !allowed.IsSet(core) {
			continue
		}
		if first < 0 {
			first = core
		}
		last = core
	}
	return cores{proxy: last, load: first}, nil
}

// pinned returns the command for a program that runs on one core, with GOMAXPROCS=1. The program is killed when the test
// process ends, even by a signal.
func pinned(ns *nettest.Namespace, core int, uid uint32, name string, args ...string) *exec.Cmd {
	cmd := ns.Command(uid, uid, "taskset", append([]string{"-c", fmt.Sprint(core), name}, args...)...)
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	cmd.Env = append(os.Environ(), "GOMAXPROCS=1")
	cmd.Stderr = os.Stderr
	return cmd
}

// helper is the test binary in another role. It exchanges lines with the test: see runLoad.
type helper struct {
	process *nettest.Process
	in      *os.File
	lines   chan string // its output; closed when that ends
}

func startHelper(t testing.TB, ns *nettest.Namespace, core int, role string, args ...string) *helper {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := pinned(ns, core, 0, self, args...)
	cmd.Env = append(cmd.Env, roleVariable+"="+role)
	theirIn, in, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer theirIn.Close()
	t.Cleanup(func() { in.Close() })
	out, theirOut, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer theirOut.Close()
	h := &helper{in: in, lines: make(chan string)}
	cmd.Stdin, cmd.Stdout = theirIn, theirOut
	read := make(chan struct{})
	t.Cleanup(func() { <-read }) // runs after the process was killed, so its output has ended
	go h.readLines(out, read)
	h.process = ns.Start(t, cmd)
	return h
}

func (h *helper) readLines(out *os.File, done chan<- struct{}) {
	defer close(done)
	defer out.Close()
	defer close(h.lines)
	buf := make([]byte, 256)
	for {
		n, err := out.Read(buf)
		if err != nil {
			return
		}
		for line := range strings.Lines(string(buf[:n])) {
			h.lines <- strings.TrimSpace(line)
		}
	}
}

// await returns the rest of the helper's next line. The line must begin with word.
func (h *helper) await(t testing.TB, word string) string {
	t.Helper()
	select {
	case line, ok := <-h.lines:
		if !ok {
			t.Fatalf("%v exited before it printed %q", h.process.Cmd.Args, word)
		}
		first, rest, _ := strings.Cut(line, " ")
		if first != word {
			t.Fatalf("%v printed %q, want %q", h.process.Cmd.Args, line, word)
		}
		return rest
	case <-time.After(90 * time.Second):
		t.Fatalf("%v did not print %q", h.process.Cmd.Args, word)
	}
	return ""
}

func (h *helper) send(t testing.TB, line string) {
	t.Helper()
	if _, err := h.in.WriteString(line + "\n"); err != nil {
		t.Fatal(err)
	}
}

// startLoad starts a load and waits until it is warm.
func (w *world) startLoad(t testing.TB, kind string, count int64, workers int) *helper {
	t.Helper()
	from, to := w.peer, ""
	if w.destination.IsValid() {
		from, to = w.pod, w.destination.String()
	}
	h := startHelper(t, from, w.cores.load, "load",
		"-kind", kind, "-count", fmt.Sprint(count), "-workers", fmt.Sprint(workers), "-certificates", w.certificates, "-to", to)
	h.await(t, "warm")
	return h
}

// finish runs the load and returns its report.
func (h *helper) finish(t testing.TB) string {
	t.Helper()
	h.send(t, "go")
	return h.await(t, "done")
}
