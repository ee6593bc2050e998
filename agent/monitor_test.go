package agent

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// usual gives all threads the usual policy, and returns them. When the test has ended, they have the policy of the process again.
func usual(t *testing.T) []int {
	t.Helper()
	all, err := listThreads()
	if err != nil {
		t.Fatal(err)
	}
	before, err := policyOf(all[0])
	if err != nil {
		t.Fatal(err)
	}
	set := func(policy int) {
		for _, thread := range all {
			if err := setPolicyOf(thread, policy); err != nil && !errors.Is(err, unix.ESRCH) {
				t.Errorf("changing the policy %d of the tests: %v", before, err)
			}
		}
	}
	t.Cleanup(func() { set(before) })
	set(unix.SCHED_NORMAL)
	return all
}

// calmed returns the monitor of this process, with SCHED_BATCH.
func calmed(t *testing.T) monitor {
	t.Helper()
	usual(t)
	m, err := findMonitor()
	if err == nil {
		err = m.setPolicy(unix.SCHED_BATCH)
	}
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// yielding returns the threads with SCHED_BATCH.
func yielding(t *testing.T) (found []int) {
	t.Helper()
	all, err := listThreads()
	if err != nil {
		t.Fatal(err)
	}
	for _, thread := range all {
		if policy, err := policyOf(thread); err == nil && policy == unix.SCHED_BATCH {
			found = append(found, thread)
		}
	}
	return found
}

func TestOnlyTheMonitorYields(t *testing.T) {
	m := calmed(t)
	nettest.Eventually(t, "only the monitor yields", func() bool { // it may start a thread at any time
		if err := m.setPolicy(unix.SCHED_BATCH); err != nil {
			t.Fatal(err)
		}
		found := yielding(t)
		return len(found) == 1 && found[0] == m.thread
	})
	nettest.Eventually(t, "no thread yields", func() bool {
		if err := m.setPolicy(unix.SCHED_NORMAL); err != nil {
			t.Fatal(err)
		}
		return len(yielding(t)) == 0
	})
}

// onThread calls f on a thread of its own but the main one, which has a policy, and ends it.
func onThread(t *testing.T, policy int, f func(own int)) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and ends the thread
		own := unix.Gettid()
		if own == os.Getpid() {
			onThread(t, policy, f) // while this one has the main thread
			return
		}
		if err := setPolicyOf(own, policy); err != nil {
			t.Error(err)
			return
		}
		f(own)
	}()
	<-done
}

// A thread that the monitor has started has its policy, and gets the usual one back. One that somebody has chosen stays.
func TestThreadsThatInheritDoNotYield(t *testing.T) {
	m := calmed(t)
	for policy, want := range map[int]int{unix.SCHED_BATCH: unix.SCHED_NORMAL, unix.SCHED_IDLE: unix.SCHED_IDLE} {
		onThread(t, policy, func(own int) {
			if err := m.setPolicy(unix.SCHED_BATCH); err != nil {
				t.Error(err)
			}
			if got, err := policyOf(own); got != want {
				t.Errorf("a thread of policy %d has %d, want %d: %v", policy, got, want, err)
			}
		})
	}
}

// A process that somebody has given a policy keeps it.
func TestAChosenPolicyStays(t *testing.T) {
	all := usual(t)
	m, err := findMonitor()
	if err != nil {
		t.Fatal(err)
	}
	for _, thread := range all[:2] {
		if err := setPolicyOf(thread, unix.SCHED_BATCH); err != nil {
			t.Fatal(err)
		}
	}
	if m.setPolicy(unix.SCHED_NORMAL) == nil {
		t.Error("the policy of a process was changed")
	}
	for _, thread := range all[:2] {
		if policy, err := policyOf(thread); policy != unix.SCHED_BATCH {
			t.Errorf("thread %d has the policy %d: %v", thread, policy, err)
		}
	}
}

// While the agent runs, each collection of garbage ends with threads of the usual policy, and afterwards all have it.
func TestTheMonitorYieldsWhileTheAgentRuns(t *testing.T) {
	usual(t)
	m, err := findMonitor()
	if err != nil {
		t.Fatal(err)
	}
	yields := func() bool {
		policy, err := policyOf(m.thread)
		return err == nil && policy == unix.SCHED_BATCH
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		(&Agent{log: slog.New(slog.DiscardHandler)}).calmMonitor(ctx)
	}()
	nettest.Eventually(t, "the monitor yields", yields)
	for range 3 {
		onThread(t, unix.SCHED_BATCH, func(own int) {
			if !nettest.Within(nettest.Patience, func() bool {
				runtime.GC()
				policy, err := policyOf(own)
				return err == nil && policy == unix.SCHED_NORMAL
			}) {
				t.Error("a thread that has inherited the policy keeps it")
			}
		})
	}
	cancel()
	<-ended
	if yields() {
		t.Error("the monitor yields when the agent has ended")
	}
}
