// Package netns runs functions inside a network namespace without ever leaving a thread in the wrong one.
//
// A Linux network namespace belongs to a thread, and the Go scheduler moves goroutines between threads. So Do uses a
// goroutine of its own that is locked to its thread, and the thread is destroyed if it cannot return to its own namespace.
// Sockets and processes that were created inside keep the namespace after Do returns.
package netns

import (
	"fmt"
	"runtime"

	vns "github.com/vishvananda/netns"
)

// Handle is an open reference to a network namespace. It holds one descriptor. Close releases it.
type Handle struct{ fd vns.NsHandle }

// New creates a namespace without a name, whose only interface is a loopback that is down. The namespace exists while the
// handle, a process or a socket refers to it, so a caller that dies leaves no trace in the file system.
func New() (Handle, error) {
	h := Handle{fd: vns.None()}
	err := onOwnThread(func() error {
		fd, err := vns.New()
		h.fd = fd
		return err
	})
	if err != nil {
		return h, fmt.Errorf("creating a network namespace: %w", err)
	}
	return h, nil
}

// Open opens the namespace at path, such as /run/netns/pod or /proc/4711/ns/net.
func Open(path string) (Handle, error) {
	fd, err := vns.GetFromPath(path)
	if err != nil {
		return Handle{fd: vns.None()}, fmt.Errorf("opening network namespace %s: %w", path, err)
	}
	return Handle{fd: fd}, nil
}

// Path returns a path of the namespace that other processes of the same user can open while process pid has h open.
func (h Handle) Path(pid int) string { return fmt.Sprintf("/proc/%d/fd/%d", pid, int(h.fd)) }

// Close closes the descriptor. Sockets and processes inside keep the namespace alive.
func (h Handle) Close() error { return h.fd.Close() }

// Do runs fn on a thread inside the namespace and returns its error. fn must not delegate work to other goroutines, as
// those run outside. Sockets and child processes that fn creates stay inside.
func (h Handle) Do(fn func() error) error {
	return onOwnThread(func() error {
		if err := vns.Set(h.fd); err != nil {
			return fmt.Errorf("entering network namespace: %w", err)
		}
		return fn()
	})
}

// onOwnThread runs fn on a thread of its own and restores the thread's namespace afterwards. fn may change that.
//
// The goroutine is unlocked only after the thread is back in its namespace. Otherwise it exits while locked, and the
// runtime destroys the thread.
func onOwnThread(fn func() error) error {
	done := make(chan error, 1)
	go namespaceThread(fn, done)
	return <-done
}

func namespaceThread(fn func() error, done chan<- error) {
	runtime.LockOSThread()
	home, err := vns.Get()
	if err != nil {
		done <- fmt.Errorf("reading this thread's network namespace: %w", err)
		return
	}
	defer home.Close()

	result := fmt.Errorf("the function ended its goroutine without returning")
	defer func() {
		if vns.Set(home) == nil {
			runtime.UnlockOSThread()
		}
		done <- result
	}()
	result = fn()
}
