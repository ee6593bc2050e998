package relay

import (
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// pipeSize is how much one splice moves at most. The kernel charges a user for the pages of its pipes and stops at
	// fs.pipe-user-pages-soft (64 MiB by default): later pipes get two pages and are slower than copying.
	pipeSize = 256 << 10

	// maxPipes keeps this process at half of that limit. Further flows copy. Agents of the same user on the same host share
	// the limit, so the kernel may refuse earlier.
	maxPipes = 128

	// refusalRest is how long to wait after the kernel refused a pipe before asking again. Asking costs more than copying.
	refusalRest = time.Second

	// pipeRest is how long to keep an unused pipe.
	pipeRest = time.Second
)

// pipe is a kernel buffer. It is empty while it is in the pool.
type pipe struct{ r, w int }

func (p *pipe) close() {
	_ = unix.Close(p.r)
	_ = unix.Close(p.w)
}

// pipePool keeps pipes, and closes unused ones after pipeRest, so that idle relays hold no descriptors. The zero value is
// ready to use.
type pipePool struct {
	mu    sync.Mutex
	idle  []*pipe // in the order of last use
	fresh int     // of idle, the ones at the end that were used since the last sweep began
	open  int     // pipes that exist, idle or in use
	sweep *time.Timer

	refused time.Time // when the kernel last refused a pipe
}

// pipes is shared by all relays, because its limits are the process's.
var pipes pipePool

// Pipes returns the number of open pipes, in use or kept for reuse.
func Pipes() int {
	pipes.mu.Lock()
	defer pipes.mu.Unlock()
	return pipes.open
}

// take returns an empty pipe, or nil if there are too many or the kernel refuses another.
func (pool *pipePool) take() *pipe {
	pool.mu.Lock()
	defer pool.mu.Unlock()
	if last := len(pool.idle) - 1; last >= 0 {
		p := pool.idle[last]
		pool.idle = pool.idle[:last]
		pool.fresh = max(pool.fresh-1, 0)
		return p
	}
	if pool.open >= maxPipes || !pool.refused.IsZero() && time.Since(pool.refused) < refusalRest {
		return nil
	}
	p := newPipe()
	if p == nil {
		pool.refused = time.Now()
		return nil
	}
	pool.open++
	return p
}

// give takes a pipe back. One that is not empty is closed.
func (pool *pipePool) give(p *pipe, empty bool) {
	pool.mu.Lock()
	defer pool.mu.Unlock()
	if !empty {
		pool.open--
		p.close()
		return
	}
	pool.idle = append(pool.idle, p)
	pool.fresh++
	if pool.sweep == nil {
		pool.sweep = time.AfterFunc(pipeRest, pool.closeUnused)
	}
}

// closeUnused closes the pipes that were not used since the last sweep, and runs again while others are left.
func (pool *pipePool) closeUnused() {
	pool.mu.Lock()
	defer pool.mu.Unlock()
	unused := len(pool.idle) - pool.fresh
	for _, p := range pool.idle[:unused] {
		p.close()
	}
	pool.idle = append(pool.idle[:0], pool.idle[unused:]...)
	pool.open -= unused
	pool.fresh = 0
	if len(pool.idle) == 0 {
		pool.sweep = nil
		return
	}
	pool.sweep.Reset(pipeRest)
}

// newPipe makes a pipe of pipeSize. It returns nil if the kernel refuses that; a smaller pipe is not worth its system calls.
func newPipe() *pipe {
	var fds [2]int
	if unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK) != nil {
		return nil
	}
	p := &pipe{fds[0], fds[1]}
	if _, err := unix.FcntlInt(uintptr(p.w), unix.F_SETPIPE_SZ, pipeSize); err != nil {
		p.close()
		return nil
	}
	return p
}
