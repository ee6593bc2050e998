package agent

import (
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

func policyOf(t *testing.T, thread int) uint32 {
	t.Helper()
	attributes, err := unix.SchedGetAttr(thread, 0)
	if err != nil {
		t.Fatal(err)
	}
	return attributes.Policy
}

func setPolicy(thread int, policy uint32) error {
	attributes, err := unix.SchedGetAttr(thread, 0)
	if err != nil {
		return err
	}
	attributes.Policy = policy
	return unix.SchedSetAttr(thread, attributes, 0)
}

// usual gives all threads the usual policy, and returns them. When the test has ended, they have the policy of the process again.
func usual(t *testing.T) []int {
	t.Helper()
	all, err := listThreads()
	if err != nil {
		t.Fatal(err)
	}
	before := policyOf(t, all[0])
	t.Cleanup(func() {
		for _, thread := range all {
			if err := setPolicy(thread, before); err != nil && err != unix.ESRCH {
				t.Error(err)
			}
		}
	})
	for _, thread := range all {
		if err := setPolicy(thread, unix.SCHED_NORMAL); err != nil {
			t.Fatalf("changing the policy %d of the tests: %v", before, err)
		}
	}
	return all
}

// calmed returns the monitor of this process, after a call of yield.
func calmed(t *testing.T) monitor {
	t.Helper()
	usual(t)
	m, err := findMonitor()
	if err != nil {
		t.Fatal(err)
	}
	if err := m.yield(); err != nil {
		t.Fatal(err)
	}
	return m
}

func TestOnlyTheMonitorYields(t *testing.T) {
	m := calmed(t)
	all, err := listThreads()
	if err != nil {
		t.Fatal(err)
	}
	for _, thread := range all {
		if policy := policyOf(t, thread); (policy == unix.SCHED_BATCH) != (thread == m.thread) {
			t.Errorf("thread %d of %d has policy %d, and the monitor is %d", thread, all, policy, m.thread)
		}
	}
}

// A thread that the monitor has started has its policy, and gets the usual one back. One that somebody has chosen stays.
func TestThreadsThatInheritDoNotYield(t *testing.T) {
	m := calmed(t)
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and ends the thread
		own := unix.Gettid()
		for _, policy := range []uint32{unix.SCHED_BATCH, unix.SCHED_IDLE} {
			if err := setPolicy(own, policy); err != nil {
				t.Error(err)
			}
			if err := m.yield(); err != nil {
				t.Error(err)
			}
			want := policy
			if policy == unix.SCHED_BATCH {
				want = unix.SCHED_NORMAL
			}
			if got := policyOf(t, own); got != want {
				t.Errorf("a thread of policy %d has %d, want %d", policy, got, want)
			}
		}
	}()
	<-done
}

// A process that somebody has given a policy keeps it for all of its threads.
func TestAChosenPolicyStays(t *testing.T) {
	main := usual(t)[0]
	if err := setPolicy(main, unix.SCHED_BATCH); err != nil {
		t.Fatal(err)
	}
	if m, err := findMonitor(); err == nil {
		t.Errorf("found %d in a process with a policy", m.thread)
	}
}
