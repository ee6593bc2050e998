package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// threads lists the threads of this process in the order in which they were started.
const threads = "/proc/self/task"

// monitor is the thread of Go's runtime that takes processors from goroutines which block or compute for long. It wakes every
// 20 µs for some milliseconds after a collection of garbage, or when a goroutine enters a system call through the scheduler
// while it sleeps for long. On a processor that carries traffic, each time is two switches of threads. They had 5 % of the CPU
// time of a new connection of TLS, of which some 180 fill the heap, and 4 % of that of a routed request on a new connection.
//
// With the policy SCHED_BATCH (sched(7)), a thread that wakes does not interrupt another one of the usual policy. It runs when
// a processor is idle, or at the end of the other's slice, with the same share of the processor.
type monitor struct{ thread int }

// findMonitor returns the monitor. The runtime starts it before anything else (runtime.main), so only the main thread is older. With
// the race detector it is a thread of that, which does no harm.
func findMonitor() (monitor, error) {
	all, err := listThreads()
	switch {
	case err != nil:
		return monitor{}, err
	case len(all) < 2 || all[0] != os.Getpid(): // the second: /proc is that of other numbers
		return monitor{}, fmt.Errorf("%s has the threads %d of process %d", threads, all, os.Getpid())
	}
	return monitor{all[1]}, nil
}

// setPolicy gives the monitor a policy, SCHED_BATCH or SCHED_NORMAL, and the usual one to threads that have inherited SCHED_BATCH:
// those that the monitor has started, and those that these have started. It changes nothing, and fails, if somebody has chosen a
// policy for the process: that is seen by its main thread, which inherits from none of them.
func (m monitor) setPolicy(policy int) error {
	all, err := listThreads()
	if err != nil {
		return err
	}
	main, err := policyOf(all[0])
	if err != nil {
		return err
	}
	if main != unix.SCHED_NORMAL {
		return fmt.Errorf("the process has the scheduling policy %d", main)
	}
	for _, thread := range all[1:] {
		wanted := unix.SCHED_NORMAL
		if thread == m.thread {
			wanted = policy
		}
		err = errors.Join(err, replacePolicy(thread, wanted))
	}
	return err
}

// replacePolicy changes a policy to the other one of SCHED_NORMAL and SCHED_BATCH. A thread that has ended, or has any other policy,
// stays as it is.
func replacePolicy(thread, policy int) error {
	now, err := policyOf(thread)
	if err == nil && now != policy && (now == unix.SCHED_NORMAL || now == unix.SCHED_BATCH) {
		err = setPolicyOf(thread, policy)
	}
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	return err
}

func policyOf(thread int) (int, error) {
	attributes, err := unix.SchedGetAttr(thread, 0)
	if err != nil {
		return 0, os.NewSyscallError("sched_getattr", err)
	}
	return int(attributes.Policy), nil
}

// setPolicyOf changes the policy of a thread, which keeps its nice value.
func setPolicyOf(thread, policy int) error {
	attributes, err := unix.SchedGetAttr(thread, 0)
	if err != nil {
		return os.NewSyscallError("sched_getattr", err)
	}
	attributes.Policy = uint32(policy)
	attributes.Runtime = 0 // the length of its slice: it goes on to follow that of the system
	return os.NewSyscallError("sched_setattr", unix.SchedSetAttr(thread, attributes, 0))
}

// listThreads returns the threads of this process, oldest first.
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

// calmMonitor makes the runtime's monitor interrupt no other thread until ctx is done. After each collection of garbage it looks for
// threads that have inherited that. Where it is not possible, the agent runs as well.
func (a *Agent) calmMonitor(ctx context.Context) {
	m, err := findMonitor()
	if err == nil {
		err = m.setPolicy(unix.SCHED_BATCH)
	}
	if err != nil {
		a.log.Debug("the monitor thread of Go's runtime interrupts others", "err", err)
		return
	}
	defer func() { _ = m.setPolicy(unix.SCHED_NORMAL) }() // fails as before, and the process mostly ends
	for collected := collections(ctx); ; {
		select {
		case <-ctx.Done():
			return
		case <-collected:
			if err := m.setPolicy(unix.SCHED_BATCH); err != nil {
				a.log.Debug("cannot look for threads with the policy of the runtime's monitor", "err", err)
			}
		}
	}
}
