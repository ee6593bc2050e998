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

// initArguments are what an Istio injector passes to the init container.
var initArguments = []string{
	"init", "-p", "15001", "-z", "15006", "-u", "1337", "-m", "REDIRECT", "-i", "*", "-x", "", "-b", "*",
	"-d", "15090,15021,15020", "--log_output_level=default:info",
}

// proxyUser is the user that the rules leave alone; every proxy runs as it.
const proxyUser = 1337

// scope ends what a helper registers with Cleanup before the test or benchmark is over: each measurement has
// namespaces and processes of its own, and a benchmark without sub-benchmarks prints no lines of its own in between.
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

// world is a pod with a workload and a peer from which the load comes. Pillion's rules are in force unless the contender
// is the direct connection.
type world struct {
	pod, peer *nettest.Namespace
	cores     cores
}

func newWorld(t testing.TB, k *kit, c contender) *world {
	t.Helper()
	w := &world{cores: k.cores}
	w.pod, w.peer = nettest.PodAndPeer(t)
	for _, address := range loadSources {
		w.peer.AddAddress(t, "eth0", netip.PrefixFrom(netip.MustParseAddr(address), 24))
	}
	// One congestion control everywhere, and one that does not pace by timers: figures of different machines, and of
	// one machine's rounds, are then nearer to each other.
	for _, ns := range []*nettest.Namespace{w.pod, w.peer} {
		ns.Do(t, func() error {
			return os.WriteFile("/proc/sys/net/ipv4/tcp_congestion_control", []byte("reno"), 0)
		})
	}
	if !c.direct() {
		if out, err := w.pod.Run(w.pod.Command(0, 0, k.pillion, initArguments...)); err != nil {
			t.Fatalf("pillion init: %v\n%s", err, out)
		}
	}
	startHelper(t, w.pod, w.cores.load, "workload", fmt.Sprintf("-direct=%v", c.direct())).await(t, "warm")
	return w
}

// cores says where things run.
type cores struct{ proxy, load int }

// chooseCores takes the last core that this process may use for the proxy and the first for everything else. On a
// machine with one core both are the same, and the figures are worth less.
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

// pinned prepares a program as one that runs on one core, and with one worker thread if it is written in Go. The
// program dies with the test process, even with one that is killed.
func pinned(ns *nettest.Namespace, core int, uid uint32, name string, args ...string) *exec.Cmd {
	cmd := ns.Command(uid, uid, "taskset", append([]string{"-c", fmt.Sprint(core), name}, args...)...)
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	cmd.Env = append(os.Environ(), "GOMAXPROCS=1")
	cmd.Stderr = os.Stderr
	return cmd
}

// helper is the test binary in another role. It speaks lines: see runLoad.
type helper struct {
	process *nettest.Process
	in      *os.File
	lines   chan string // what it says; closed when its output ends
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
	t.Cleanup(func() { <-read }) // runs after the process is killed, which ends its output
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

// await waits for the helper's next line, which has to begin with word, and returns the rest of it.
func (h *helper) await(t testing.TB, word string) string {
	t.Helper()
	select {
	case line, ok := <-h.lines:
		if !ok {
			t.Fatalf("%v ended before it said %q", h.process.Cmd.Args, word)
		}
		said, rest, _ := strings.Cut(line, " ")
		if said != word {
			t.Fatalf("%v said %q, not %q", h.process.Cmd.Args, line, word)
		}
		return rest
	case <-time.After(90 * time.Second):
		t.Fatalf("%v did not say %q", h.process.Cmd.Args, word)
	}
	return ""
}

func (h *helper) say(t testing.TB, line string) {
	t.Helper()
	if _, err := h.in.WriteString(line + "\n"); err != nil {
		t.Fatal(err)
	}
}

// startLoad starts a load and waits until it is warm.
func (w *world) startLoad(t testing.TB, kind string, count int64, workers int) *helper {
	t.Helper()
	h := startHelper(t, w.peer, w.cores.load, "load",
		"-kind", kind, "-count", fmt.Sprint(count), "-workers", fmt.Sprint(workers))
	h.await(t, "warm")
	return h
}

// finish runs what the load is for and returns what it reports.
func (h *helper) finish(t testing.TB) string {
	t.Helper()
	h.say(t, "go")
	return h.await(t, "done")
}
