package tcp

import (
	"io"
	"net/netip"
	"os"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/sockopt"
)

// ErrAgain says that a connection can neither give nor take at the moment: wait for it.
var ErrAgain error = unix.EAGAIN

// errVanished stands for an error of the connection that a system call has already taken: the kernel tells it once.
var errVanished = os.NewSyscallError("read", unix.ECONNRESET)

// Events of a connection. The first two are remembered until a try finds them stale, the others for good.
const (
	readable = unix.EPOLLIN
	writable = unix.EPOLLOUT
	urgent   = unix.EPOLLPRI   // the peer has sent urgent data
	gone     = unix.EPOLLRDHUP // the peer will send no more
	failed   = unix.EPOLLERR
	hungUp   = unix.EPOLLHUP // closed both ways
	looped   = 1 << 27       // not an event: set by Set.MarkLooped
)

// Conn is a TCP connection that never blocks. All methods belong to the goroutine that owns it. It may be handed on to
// another owner: the next one that waits for it is the one that is woken.
type Conn struct {
	poller *Poller
	fd     int
	remote netip.AddrPort
	local  netip.AddrPort // invalid until it was asked for

	ready         atomic.Uint32          // events, set by the poller
	waiter        atomic.Pointer[Waiter] // who is woken by events; nil: nobody
	watched       bool                   // in the epoll set, which the first wait brings
	serial        uint32                 // set with watched
	watchesWrites bool                   // room in the send buffer is an event
	shut          bool                   // CloseWrite was called
	closed        bool
	open          *atomic.Int64 // counts this connection while it is open; nil: it is not tracked
	set           *Set          // contains this connection while it is open; may be nil
	layer         *layered      // nil: the connection is bare
}

// newConn takes fd over. ready is what it is assumed to be ready for until a try shows otherwise.
func newConn(p *Poller, fd int, remote netip.AddrPort, ready uint32) *Conn {
	c := &Conn{poller: p, fd: fd, remote: remote}
	c.ready.Store(ready)
	return c
}

// RemoteAddr is the peer's address. A link-local one has the interface's number as its zone.
func (c *Conn) RemoteAddr() netip.AddrPort { return c.remote }

// LocalAddr is our end's address. The kernel is asked once. It is invalid when the kernel does not say.
func (c *Conn) LocalAddr() netip.AddrPort {
	if !c.local.IsValid() {
		c.local, _ = getsockname(c.fd)
	}
	return c.local
}

// OriginalDst is where the connection was going before a rule redirected it; see package sockopt.
func (c *Conn) OriginalDst() (netip.AddrPort, error) {
	return sockopt.OriginalDst(c.fd, c.remote.Addr())
}

// ClearTransparent makes a connection that a transparent listener has accepted an ordinary one. A redirected one must be:
// when its client opens another connection from the same port, to another redirected port, the kernel gives that a port
// of its own to tell them apart. But it has looked for the socket before that, by then has found ours, and lets it have
// the other one's packets if it is transparent.
func (c *Conn) ClearTransparent() error {
	return os.NewSyscallError("setsockopt", sockopt.ClearTransparent(c.fd, c.remote.Addr().Is6()))
}

// Readable reports whether a read is worth trying.
func (c *Conn) Readable() bool {
	return c.ready.Load()&(readable|gone|failed|hungUp) != 0 || c.layer != nil && c.layer.more
}

// Writable reports whether a write is worth trying.
func (c *Conn) Writable() bool { return c.ready.Load()&(writable|failed|hungUp) != 0 }

// Ended reports, by what the poller knows, whether the peer sends nothing behind what it has sent: it has closed, or the
// connection is dead.
func (c *Conn) Ended() bool { return c.ready.Load()&(gone|failed|hungUp) != 0 }

// Urgent reports whether the peer has ever sent urgent data. SpliceTo stops in front of it, and cannot tell that from an
// empty connection or its end: read such a connection instead.
func (c *Conn) Urgent() bool { return c.ready.Load()&urgent != 0 }

// Failed returns an error when the connection is dead, without reading: it was reset, or the peer vanished. It returns
// nil for a connection that is open or was closed in order. It is what the poller knows: a connection that nobody waits
// for is never dead.
//
// The kernel shows a dead connection by a pending error (EPOLLERR). When a write has taken that error, what is left is
// a connection closed both ways (EPOLLHUP) although we did not close our half.
func (c *Conn) Failed() error {
	ready := c.ready.Load()
	if ready&failed == 0 && (ready&hungUp == 0 || c.shut) {
		return nil
	}
	if c.layer != nil && c.layer.writeErr != nil {
		return c.layer.writeErr // a flush has taken it
	}
	if code, err := unix.GetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_ERROR); err == nil && code != 0 {
		return os.NewSyscallError("read", syscall.Errno(code))
	}
	return errVanished
}

// Read returns bytes that have arrived. It returns ErrAgain if there are none, and io.EOF at the end. An empty p reads
// nothing and reports nothing.
func (c *Conn) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil // the kernel's 0 would be taken for the end
	}
	if c.layer != nil {
		return c.layer.read(p)
	}
	return c.readSocket(p)
}

func (c *Conn) readSocket(p []byte) (int, error) {
	n, err := c.try(readable, "read", func() (int, error) { return read(c.fd, p) })
	// A read that leaves room has taken everything, and whatever comes later is a new event: the try that would only
	// return ErrAgain is spared. Urgent data is the exception, as a read stops in front of it.
	if n == len(p) || c.Urgent() {
		c.ready.Or(readable)
	}
	return n, err
}

// Write gives the socket as much of p as it takes, and returns how much that is. It returns ErrAgain if that is nothing. A
// Layer takes bytes that the socket has not taken; they are sent by later writes, by Wait and by Close.
func (c *Conn) Write(p []byte) (int, error) {
	if c.layer != nil {
		return c.layer.write(c, p)
	}
	return c.writeSocket(p)
}

func (c *Conn) writeSocket(p []byte) (int, error) {
	n, err := c.try(writable, "write", func() (int, error) { return write(c.fd, p) })
	if n > 0 {
		c.ready.Or(writable)
	}
	return n, err
}

// errLayered refuses to splice past a Layer, which would put unencoded bytes on the wire.
var errLayered = os.NewSyscallError("splice", unix.EINVAL)

// SpliceTo moves up to n bytes from a bare connection into an empty pipe, with results like Read's. ErrAgain and io.EOF
// may be wrong where there is urgent data.
func (c *Conn) SpliceTo(pipe, n int) (int, error) {
	if c.layer != nil {
		return 0, errLayered
	}
	n, err := c.try(readable, "splice", func() (int, error) { return splice(c.fd, pipe, n) })
	if n > 0 {
		c.ready.Or(readable)
	}
	return n, err
}

// SpliceFrom moves up to n bytes, which the pipe holds, to a bare connection, with results like Write's.
func (c *Conn) SpliceFrom(pipe, n int) (int, error) {
	if c.layer != nil {
		return 0, errLayered
	}
	n, err := c.try(writable, "splice", func() (int, error) { return splice(pipe, c.fd, n) })
	if n > 0 {
		c.ready.Or(writable)
	}
	return n, err
}

// try makes one system call. The event that allows it is forgotten before the call, and remembered again by the caller
// if there may be more. So an event that comes during the call is kept, and the worst is a try for nothing; forgotten
// after the call, it could be lost, and the connection would hang.
func (c *Conn) try(event uint32, name string, call func() (int, error)) (int, error) {
	c.ready.And(^event)
	for {
		n, err := call()
		switch {
		case err == unix.EINTR:
			continue
		case err == ErrAgain:
			return 0, ErrAgain
		case err != nil:
			return 0, os.NewSyscallError(name, err)
		case n == 0 && event == readable:
			return 0, io.EOF
		}
		return n, nil
	}
}

// Quiet reports whether the connection is open, its peer has sent nothing that was not read, and nothing is unsent. It
// asks the kernel, which is ahead of the poller.
func (c *Conn) Quiet() bool {
	if c.layer != nil {
		return c.layer.quiet()
	}
	_, err := peek(c.fd)
	return err == ErrAgain
}

// Track increments n and returns its new value. It is decremented when the descriptor is closed. With a Layer, that may
// be after Close returns.
func (c *Conn) Track(n *atomic.Int64) int64 {
	c.open = n
	return n.Add(1)
}

// Rest stops events from waking the last waiter. The next wait, of any waiter, ends that.
func (c *Conn) Rest() { c.waiter.Store(nil) }

// CloseWrite closes the sending half: the peer reads the end. Calling it twice does nothing.
func (c *Conn) CloseWrite() error {
	if c.layer != nil {
		return c.layer.closeWrite(c)
	}
	if c.shut {
		return nil
	}
	c.shut = true
	return os.NewSyscallError("shutdown", shutdown(c.fd))
}

// Close closes the connection in order. Bytes that were written still go out. Closing twice does nothing. All calls on a
// closed connection fail with EBADF: its descriptor may belong to another connection by then.
func (c *Conn) Close() {
	switch {
	case c.closed:
	case c.layer != nil:
		c.closeLayered()
	default:
		c.finish()
	}
}

// Reset closes the connection with RST, so that the peer learns that it did not end well. Bytes that were written and
// are not on the wire yet are lost.
func (c *Conn) Reset() {
	if !c.closed {
		_ = sockopt.SetReset(c.fd) // cannot fail on an open TCP socket
		c.finish()
	}
}

// finish closes the descriptor, which takes it out of the epoll set, too.
func (c *Conn) finish() {
	c.closed = true
	if c.watched {
		c.poller.conns.set(c.fd, nil)
	}
	if c.set != nil {
		c.leave()
	}
	if c.open != nil {
		c.open.Add(-1)
	}
	closeSocket(c.fd)
	c.fd = -1
	if c.layer != nil {
		c.layer.release()
		c.layer = nil
	}
}
