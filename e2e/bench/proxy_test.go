package bench

import (
	"bufio"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// proxy is a running contender.
type proxy struct {
	pid int
	far *proxy // the same one in the peer, whose CPU time is added; may be nil
}

// cpu returns the user and system time of the process, including ended threads. It reads the process's CPU clock, in
// nanoseconds; /proc/PID/stat has only clock ticks.
func (p *proxy) cpu(t testing.TB) time.Duration {
	t.Helper()
	if p == nil {
		return 0
	}
	const cpuClockSched = 2 // the kernel's CPUCLOCK_SCHED: run time as the scheduler accounts it
	var now unix.Timespec
	if err := unix.ClockGettime(int32(^p.pid<<3|cpuClockSched), &now); err != nil {
		t.Fatalf("reading the CPU clock of process %d: %v", p.pid, err)
	}
	return time.Duration(now.Nano()) + p.far.cpu(t)
}

// resident returns the process's resident memory in bytes, including pages of its program file.
func (p *proxy) resident(t testing.TB) int64 {
	t.Helper()
	file, err := os.Open(fmt.Sprintf("/proc/%d/smaps_rollup", p.pid))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for lines := bufio.NewScanner(file); lines.Scan(); {
		if fields := strings.Fields(lines.Text()); fields[0] == "Rss:" {
			kib, err := strconv.ParseInt(fields[1], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return kib << 10
		}
	}
	t.Fatalf("no Rss in %s", file.Name())
	return 0
}

func (p *proxy) descriptors(t testing.TB) int {
	t.Helper()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// traceCalls returns the number of system calls that the process makes during fn, by name, and their sum under "total".
func (p *proxy) traceCalls(t testing.TB, pod *nettest.Namespace, fn func()) map[string]int {
	t.Helper()
	out, err := os.CreateTemp("", "pillion-bench-strace-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.Remove(out.Name())
	defer out.Close()
	strace := pod.Start(t, pod.Command(0, 0, "strace", "-q", "-f", "-c", "-U", "calls,name", "-o", out.Name(), "-p", fmt.Sprint(p.pid)))
	p.awaitTracer(t)
	fn()
	strace.Signal(syscall.SIGINT) // strace detaches and prints its counts
	if _, err := strace.Wait(nettest.Patience); err != nil {
		t.Fatal(err)
	}
	calls := make(map[string]int)
	for lines := bufio.NewScanner(out); lines.Scan(); {
		fields := strings.Fields(lines.Text())
		if len(fields) != 2 {
			continue
		}
		if n, err := strconv.Atoi(fields[0]); err == nil {
			calls[fields[1]] = n
		}
	}
	return calls
}

// awaitTracer waits until every thread of the process is traced.
func (p *proxy) awaitTracer(t testing.TB) {
	t.Helper()
	for deadline := time.Now().Add(nettest.Patience); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", p.pid))
		if err != nil {
			t.Fatal(err)
		}
		traced := 0
		for _, task := range tasks {
			status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%s/status", p.pid, task.Name()))
			if !strings.Contains(string(status), "TracerPid:\t0\n") {
				traced++
			}
		}
		if traced == len(tasks) {
			return
		}
	}
	t.Fatalf("strace does not attach to process %d", p.pid)
}
