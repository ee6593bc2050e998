//go:build !race

package agent

import (
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The thread that findMonitor returns is the one that sleeps for 20 µs at a time. The race detector has a thread that is older.
func TestTheMonitorIsFound(t *testing.T) {
	m := calmed(t)
	sleeps := map[int]int{}
	sleep := fmt.Sprint(unix.SYS_NANOSLEEP, " ")
	for end := time.Now().Add(20 * time.Second); sleeps[m.thread] < 50 && time.Now().Before(end); {
		runtime.GC() // wakes the monitor
		all, err := listThreads()
		if err != nil {
			t.Fatal(err)
		}
		for _, thread := range all {
			call, err := os.ReadFile(fmt.Sprintf("%s/%d/syscall", threads, thread))
			if err == nil && strings.HasPrefix(string(call), sleep) {
				sleeps[thread]++
			}
		}
	}
	for thread, count := range sleeps {
		if thread != m.thread && count > sleeps[m.thread]/2 {
			t.Errorf("thread %d sleeps as well: %v", thread, sleeps)
		}
	}
	if sleeps[m.thread] < 50 {
		t.Errorf("thread %d does not sleep: %v", m.thread, sleeps)
	}
}
