// Package tcp gives a proxy what package net does not: one goroutine that waits for several sockets at once, and
// connections that cost no system call more than they must.
//
// A Conn never blocks. Its owner, one goroutine, tries to read and write, and when nothing goes on it waits, with its
// Waiter, for any of its connections. So a proxied connection needs one goroutine for both its sides, sees a reset of
// either while it waits for the other, and costs 4 KiB of stack where two blocked readers cost twice that.
//
// Underneath is one edge-triggered epoll set for each Poller. The set's own descriptor is watched by Go's runtime, so
// that no thread is blocked in epoll_wait.
package tcp

import (
	"context"
	"fmt"
	"os"
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
	rounds atomic.Uint32 // of WakeAll
	conns  table
	ports  portRange // of the network namespace in which the poller was made

	life      context.Context // ends with the poller
	end       context.CancelFunc
	lingering sync.WaitGroup // of closed connections that still send
}

// NewPoller opens an epoll set, one descriptor, and starts the goroutine that reads it. Close ends both. It is for
// connections of the network namespace in which it is called.
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

// pollerOf takes epfd over.
func pollerOf(epfd int) (*Poller, error) {
	if err := unix.SetNonblock(epfd, true); err != nil { // asks os.NewFile to give it to the runtime's poller
		unix.Close(epfd)
		return nil, err
	}
	p := &Poller{epfd: epfd, file: os.NewFile(uintptr(epfd), "epoll"), done: make(chan struct{}), ports: localPorts()}
	// The runtime does not say that it cannot watch a file, but such a file has no deadlines.
	if err := p.file.SetReadDeadline(time.Time{}); err != nil {
		p.file.Close()
		return nil, fmt.Errorf("having it watched: %w", err)
	}
	raw, err := p.file.SyscallConn()
	if err != nil {
		p.file.Close()
		return nil, err
	}
	p.life, p.end = context.WithCancel(context.Background())
	go p.run(raw.Read)
	return p, nil
}

// Close ends the poller. All its connections must have been closed. Those with a Layer that still send are reset.
func (p *Poller) Close() error {
	p.end()
	p.WakeAll()
	p.lingering.Wait()
	err := p.file.Close()
	<-p.done
	return err
}

// run dispatches events until Close.
//
// The whole life is one call of RawConn.Read, whose function never says that it is done. Between two of its runs the
// runtime remembers an edge that comes in between; separate calls would each begin by forgetting it.
func (p *Poller) run(read func(func(fd uintptr) bool) error) {
	defer close(p.done)
	events := make([]unix.EpollEvent, 256)
	_ = read(func(fd uintptr) bool { // returns an error when the file is closed
		for {
			n, err := epollReady(int(fd), events)
			if err == unix.EINTR {
				continue
			}
			for i := range n {
				p.dispatch(&events[i])
			}
			if n < len(events) {
				return false
			}
		}
	})
}

// dispatch tells a connection's owner what happened to it.
func (p *Poller) dispatch(event *unix.EpollEvent) {
	if c := p.conns.get(int(event.Fd)); c != nil && c.serial == uint32(event.Pad) {
		c.ready.Or(event.Events)
		if w := c.waiter.Load(); w != nil {
			w.wake()
		}
	}
}

// WakeAll ends all waits that are under way, as if something had happened, so that every owner looks at what has changed
// beside its connections. The next wait of an owner that looked too early ends at once.
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
					w.wake()
				}
			}
		}
	}
}

// watch makes events of c wake w from now on.
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

// forget takes c out of the epoll set, so that its descriptor can be watched as another connection.
func (p *Poller) forget(c *Conn) {
	p.conns.set(c.fd, nil)
	event := c.interest()
	_ = epollControl(p.epfd, unix.EPOLL_CTL_DEL, c.fd, &event) // cannot fail for a descriptor that is watched
}

// watchWrites makes room in c's send buffer an event, too. Most connections never fill it; were it watched from the
// start, each connection would begin with an event that says nothing.
func (p *Poller) watchWrites(c *Conn) error {
	c.watchesWrites = true
	event := c.interest()
	return os.NewSyscallError("epoll_ctl", epollControl(p.epfd, unix.EPOLL_CTL_MOD, c.fd, &event))
}

// interest is what the kernel is told to watch. The serial tells events of this connection from late ones of another
// that had the same descriptor.
func (c *Conn) interest() unix.EpollEvent {
	events := uint32(readable | urgent | gone | unix.EPOLLET)
	if c.watchesWrites {
		events |= writable
	}
	return unix.EpollEvent{Events: events, Fd: int32(c.fd), Pad: int32(c.serial)}
}

// table finds connections by descriptor, up to a million. It grows by chunks, which never move, so that reading needs
// no lock.
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
