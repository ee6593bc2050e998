package nettest

import (
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"
)

// Main runs a package's tests and fails the package when something of them is left: a goroutine, a descriptor or a
// child process. Call it from TestMain: os.Exit(nettest.Main(m)).
func Main(m *testing.M) int {
	before := descriptors()
	code := m.Run()
	if code != 0 {
		return code
	}
	if left := settle(before); left != "" {
		fmt.Fprintf(os.Stderr, "left over after all tests passed:\n%s\n", left)
		return 1
	}
	return 0
}

// settle waits until what is still closing has closed, and names what is left after half a minute.
func settle(before map[string]string) string {
	var left string
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if left = leftovers(before); left == "" || time.Now().After(deadline) {
			return left
		}
	}
}

func leftovers(before map[string]string) string {
	var left []string
	buf := make([]byte, 1<<20)
	for _, stack := range strings.Split(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
		if !harmless(stack) {
			left = append(left, stack)
		}
	}
	for fd, target := range descriptors() {
		if before[fd] != target && !strings.Contains(target, "anon_inode:[event") {
			left = append(left, "descriptor "+fd+" → "+target)
		}
	}
	// A child, running or not yet waited for, is in this list of the main thread's or of another thread's.
	tasks, _ := os.ReadDir("/proc/self/task")
	for _, task := range tasks {
		children, _ := os.ReadFile("/proc/self/task/" + task.Name() + "/children")
		if len(children) > 0 {
			left = append(left, "child processes "+string(children))
		}
	}
	return strings.Join(left, "\n\n")
}

// harmless reports whether a goroutine belongs to the runtime or to package testing, and not to a test.
func harmless(stack string) bool {
	for _, of := range []string{
		"nettest.leftovers", "testing.Main(", "testing.(*M).", "runtime.goexit0", "os/signal.signal_recv", "os/signal.loop",
		"runtime.ensureSigM", "runtime/pprof.",
	} {
		if strings.Contains(stack, of) {
			return true
		}
	}
	return false
}

func descriptors() map[string]string {
	open := make(map[string]string)
	entries, _ := os.ReadDir("/proc/self/fd")
	for _, entry := range entries {
		if target, err := os.Readlink("/proc/self/fd/" + entry.Name()); err == nil {
			open[entry.Name()] = target
		}
	}
	return open
}
