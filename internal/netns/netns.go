// Package netns runs functions inside a network namespace without ever leaving a thread in the wrong one.
//
// A Linux network namespace belongs to a thread, and the Go scheduler moves goroutines between threads. Do is the one
// safe shape: a goroutine of its own, locked to its thread, and a thread that is thrown away when it cannot be brought
// back. Sockets made and processes started inside keep the namespace after Do returns.
package netns

import (
	"fmt"
	"runtime"

	vns "github.com/vishvananda/netns"
)

// Handle is an open reference to a network namespace. It holds one descriptor, which Close gives back.
type Handle struct{ fd vns.NsHandle }

// New makes a namespace without a name and without any interface but a loopback that is down. It lives as long as the
// handle, a process or a socket refers to it, so nothing is left in the file system when the caller dies.
func New() (Handle, error) {
	h := Handle{fd: vns.None()}
	err := onOwnThread(func() error {
		fd, err := vns.New()
		h.fd = fd
		return err
	})
	if err != nil {
		return h, fmt.Errorf("making a network namespace: %w", err)
	}
	return h, nil
}

// Open refers to the namespace that path names, such as /run/netns/pod or /proc/4711/ns/net.
func Open(path string) (Handle, error) {
	fd, err := vns.GetFromPath(path)
	if err != nil {
		return Handle{fd: vns.None()}, fmt.Errorf("opening network namespace %s: %w", path, err)
	}
	return Handle{fd: fd}, nil
}

// Path is a name of the namespace that other programs of this process's user can open while the handle is open.
func (h Handle) Path(pid int) string { return fmt.Sprintf("/proc/%d/fd/%d", pid, int(h.fd)) }

// Close gives the descriptor back. Sockets and processes inside keep the namespace alive.
func (h Handle) Close() error { return h.fd.Close() }

// Do runs fn on a thread inside the namespace and returns its error when it is done. fn must not hand its work to other
// goroutines: those run outside. What fn makes there (sockets, child processes) stays there.
func (h Handle) Do(fn func() error) error {
	return onOwnThread(func() error {
		if err := vns.Set(h.fd); err != nil {
			return fmt.Errorf("entering network namespace: %w", err)
		}
		return fn()
	})
}

// onOwnThread runs fn, which may move its thread to another namespace, and brings the thread back afterwards.
//
// The goroutine is unlocked only when the thread is back where it was. In every other case, a panic included, it ends
// while locked, and the runtime destroys the thread with it.
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
