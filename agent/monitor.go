package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// threads lists the threads of this process, oldest first.
const threads = "/proc/self/task"

// monitor is the thread of Go's runtime that takes processors from goroutines which block or compute for long. After each
// collection of garbage it wakes every 20 µs for some milliseconds. In a container whose processors are busy, it interrupts the
// threads that carry traffic: that has 6 % of the CPU time of new connections of TLS, of which 180 cause a collection, and 3 % of
// that of others.
//
// With the policy SCHED_BATCH (sched(7)), a thread that wakes does not interrupt another one. It runs when a processor is
// idle, or has run another thread for a few milliseconds.
type monitor struct{ thread int }

// findMonitor returns the monitor. The runtime starts it before anything else (runtime.main), so only the main thread is older. It
// fails if somebody has chosen a policy for this process.
func findMonitor() (monitor, error) {
	all, err := listThreads()
	if err != nil {
		return monitor{}, err
	}
	if len(all) < 2 {
		return monitor{}, fmt.Errorf("%s has %d threads", threads, len(all))
	}
	main, err := unix.SchedGetAttr(all[0], 0)
	if err != nil {
		return monitor{}, os.NewSyscallError("sched_getattr", err)
	}
	if main.Policy != unix.SCHED_NORMAL {
		return monitor{}, fmt.Errorf("the process has the scheduling policy %d", main.Policy)
	}
	return monitor{all[1]}, nil
}

// yield makes the monitor interrupt no other thread, and the others threads of the usual policy: one that the monitor has
// started since the last call inherited its policy.
func (m monitor) yield() error {
	all, err := listThreads()
	for _, thread := range all {
		policy := uint32(unix.SCHED_NORMAL)
		if thread == m.thread {
			policy = unix.SCHED_BATCH
		}
		err = errors.Join(err, replacePolicy(thread, policy))
	}
	return err
}

// replacePolicy changes the policy of a thread that has the other one of SCHED_NORMAL and SCHED_BATCH. A thread with any other
// policy, which was chosen from outside, keeps it.
func replacePolicy(thread int, policy uint32) error {
	attributes, err := unix.SchedGetAttr(thread, 0)
	if err == unix.ESRCH {
		return nil // it has ended
	} else if err != nil {
		return os.NewSyscallError("sched_getattr", err)
	}
	if attributes.Policy == policy || attributes.Policy != unix.SCHED_NORMAL && attributes.Policy != unix.SCHED_BATCH {
		return nil
	}
	attributes.Policy = policy
	return os.NewSyscallError("sched_setattr", unix.SchedSetAttr(thread, attributes, 0))
}

// listThreads returns the threads of this process in the order in which they were started, which is that of the directory.
func listThreads() ([]int, error) {
	directory, err := os.Open(threads)
	if err != nil {
		return nil, err
	}
	defer directory.Close()
	names, err := directory.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	ids := make([]int, len(names))
	for i, name := range names {
		if ids[i], err = strconv.Atoi(name); err != nil {
			return nil, err
		}
	}
	return ids, nil
}

// calmMonitor makes the runtime's monitor interrupt no other thread. Until ctx is done, it repeats that after each collection of
// garbage. Where it is not possible, the agent runs as well, and the log says why.
func (a *Agent) calmMonitor(ctx context.Context) {
	m, err := findMonitor()
	for collected := collections(ctx); err == nil; err = m.yield() {
		select {
		case <-ctx.Done():
			return
		case <-collected:
		}
	}
	a.log.Debug("the runtime's monitor thread interrupts others", "err", err)
}
