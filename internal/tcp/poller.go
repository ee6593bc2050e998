// Package tcp provides non-blocking TCP connections for a proxy. Unlike with package net, one goroutine can wait for
// several sockets at once, and connections avoid every system call that can be avoided.
//
// A Conn never blocks. Its owner, one goroutine, tries to read and write. When neither makes progress, it waits with its
// Waiter for any of its connections. So a proxied connection needs one goroutine for both its sides, detects a reset of
// either side while it waits for the other, and costs 4 KiB of stack where two blocked readers cost twice that.
//
// Each Poller has one edge-triggered epoll set. Go's runtime watches the descriptor of that set, so that no thread
// blocks in epoll_wait.
package tcp

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Poller watches connections and wakes the goroutines that wait for them. Make it with NewPoller.
type Poller struct {
	epfd   int
	file   *os.File // owns epfd
	done   chan struct{}
	serial atomic.Uint32
	rounds atomic.Uint32 // calls of WakeAll
	conns  table
	turns  turns
	ports  portRange                            // of the network namespace in which the poller was made
	socket func(family int) (fd int, err error) // opens the sockets of Dial

	arrivals arrivals

	life      context.Context // ends with the poller
	end       context.CancelFunc
	lingering sync.WaitGroup // of closed connections that still send
	sending   atomic.Int32   // their number
}

// NewPoller opens an epoll set (one descriptor) and starts the goroutine that reads it. Close ends both. The
// connections must belong to the network namespace of the calling thread.
func NewPoller() (*Poller, error) {
	epfd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("creating an epoll set: %w", err)
	}
	p, err := pollerOf(epfd)
	if err != nil {
		return nil, fmt.Errorf("preparing an epoll set: %w", err)
	}
	return p, nil
}

// NewPollerOf is like NewPoller for connections of another network namespace. socket opens a non-blocking TCP socket there;
// it is called by Dial.
func NewPollerOf(socket func(family int) (fd int, err error)) (*Poller, error) {
	p, err := NewPoller()
	if err == nil {
		p.socket = socket
	}
	return p, err
}

// pollerOf takes ownership of epfd, also when it fails.
func pollerOf(epfd int) (*Poller, error) {
	if err := unix.SetNonblock(epfd, true); err != nil { // makes os.NewFile register it with the runtime's poller
		unix.Close(epfd)
		return nil, err
	}
	p := &Poller{epfd: epfd, file: os.NewFile(uintptr(epfd), "epoll"), done: make(chan struct{}), ports: localPorts(), socket: socket}
	p.turns.limit = runtime.GOMAXPROCS(0)
	p.arrivals.init()
	// os.NewFile does not report that the runtime cannot watch a file, but such a file does not support deadlines.
	if err := p.file.SetReadDeadline(time.Time{}); err != nil {
		p.file.Close()
		return nil, fmt.Errorf("registering it with the runtime: %w", err)
	}
	raw, err := p.file.SyscallConn()
	if err != nil {
		p.file.Close()
		return nil, err
	}
	p.life, p.end = context.WithCancel(context.Background())
	go p.run(raw.Read)
	go p.admit()
	return p, nil
}

// Settle waits until closed connections with a Layer have sent their output, or until ctx is done. It returns the number of
// those that have not.
func (p *Poller) Settle(ctx context.Context) (left int) {
	done := make(chan struct{})
	go p.awaitLingering(done)
	select {
	case <-done:
	case <-ctx.Done():
	}
	return int(p.sending.Load())
}

func (p *Poller) awaitLingering(done chan<- struct{}) {
	p.lingering.Wait()
	close(done)
}

// Close ends the poller. All its connections must have been closed. Closed connections with a Layer that are still
// sending are reset.
func (p *Poller) Close() error {
	p.end()
	p.WakeAll()
	p.lingering.Wait()
	err := p.file.Close()
	<-p.done
	close(p.arrivals.stop)
	<-p.arrivals.stopped
	return err
}

// run dispatches events until Close.
//
// It is a single call of RawConn.Read, whose function never returns true. Between two runs of that function the runtime
// keeps an edge that arrives. Separate calls of Read would lose such an edge, as each begins by clearing it.
func (p *Poller) run(read func(func(fd uintptr) bool) error) {
	defer close(p.done)
	events := make([]unix.EpollEvent, 256)
	_ = read(func(fd uintptr) bool { // returns an error when the file is closed
		for {
			n, err := epollReady(int(fd), events)
			if err == unix.EINTR {
				continue
			}
			p.dispatch(events[:max(n, 0)])
			if n < len(events) {
				return false
			}
		}
	})
}

// record records an event in its connection, and returns the waiter to wake. The serial rejects a late event of a closed
// connection that had the same descriptor.
func (p *Poller) record(event *unix.EpollEvent) *Waiter {
	if c := p.conns.get(int(event.Fd)); c != nil && c.serial == uint32(event.Pad) {
		c.ready.Or(event.Events)
		return c.waiter.Load()
	}
	return nil
}

// WakeAll ends all waits in progress, as an event would, and the yields of cancelled waiters, so that every owner rechecks state outside its connections, such
// as a cancelled context. If an owner checked just before the change, its next wait ends at once.
func (p *Poller) WakeAll() {
	p.rounds.Add(1)
	for i := range p.conns.chunks {
		chunk := p.conns.chunks[i].Load()
		if chunk == nil {
			continue
		}
		for j := range chunk {
			if c := chunk[j].Load(); c != nil {
				if w := c.waiter.Load(); w != nil {
					w.recheck()
				}
			}
		}
	}
}

// watch adds c to the epoll set and directs its events to w.
func (p *Poller) watch(c *Conn, w *Waiter) error {
	if c.fd>>10 >= len(p.conns.chunks) {
		return fmt.Errorf("watching descriptor %d: %w", c.fd, unix.EMFILE)
	}
	c.serial, c.watched = p.serial.Add(1), true
	c.waiter.Store(w)
	p.conns.set(c.fd, c)
	c.watchesWrites = c.ready.Load()&writable == 0
	event := c.interest()
	if err := epollControl(p.epfd, unix.EPOLL_CTL_ADD, c.fd, &event); err != nil {
		p.conns.set(c.fd, nil)
		c.waiter.Store(nil)
		c.watched, c.watchesWrites = false, false
		return os.NewSyscallError("epoll_ctl", err)
	}
	return nil
}

// forget removes c from the epoll set, so that its descriptor can be watched for another connection.
func (p *Poller) forget(c *Conn) {
	p.conns.set(c.fd, nil)
	event := c.interest()
	_ = epollControl(p.epfd, unix.EPOLL_CTL_DEL, c.fd, &event) // cannot fail for a descriptor that is watched
}

// watchWrites adds EPOLLOUT to the events of c. It is not watched from the start because most connections never fill their
// send buffer, and each would begin with an event that only reports the empty buffer.
func (p *Poller) watchWrites(c *Conn) error {
	c.watchesWrites = true
	event := c.interest()
	return os.NewSyscallError("epoll_ctl", epollControl(p.epfd, unix.EPOLL_CTL_MOD, c.fd, &event))
}

// interest returns the events of c to watch. Its serial distinguishes them from late events of an earlier connection with
// the same descriptor.
func (c *Conn) interest() unix.EpollEvent {
	events := uint32(readable | urgent | gone | unix.EPOLLET)
	if c.watchesWrites {
		events |= writable
	}
	return unix.EpollEvent{Events: events, Fd: int32(c.fd), Pad: int32(c.serial)}
}

// table maps descriptors below 1<<20 to connections. It grows in chunks that never move, so that reading needs no lock.
type table struct {
	mu     sync.Mutex // for growing
	chunks [1 << 10]atomic.Pointer[chunk]
}

type chunk [1 << 10]atomic.Pointer[Conn]

func (t *table) get(fd int) *Conn {
	if c := t.chunks[fd>>10].Load(); c != nil {
		return c[fd&1023].Load()
	}
	return nil
}

func (t *table) set(fd int, conn *Conn) {
	slot := &t.chunks[fd>>10]
	if slot.Load() == nil {
		t.mu.Lock()
		if slot.Load() == nil {
			slot.Store(new(chunk))
		}
		t.mu.Unlock()
	}
	slot.Load()[fd&1023].Store(conn)
}
