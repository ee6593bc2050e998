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

// ErrAgain means that a read or write would block: wait for the connection.
var ErrAgain error = unix.EAGAIN

// errVanished replaces a socket error that an earlier system call has consumed; the kernel reports it only once.
var errVanished = os.NewSyscallError("read", unix.ECONNRESET)

// Events of a connection. The first two are kept until a system call returns EAGAIN, the others forever.
const (
	readable = unix.EPOLLIN
	writable = unix.EPOLLOUT
	urgent   = unix.EPOLLPRI   // the peer has sent urgent data
	gone     = unix.EPOLLRDHUP // the peer has closed its sending half
	failed   = unix.EPOLLERR
	hungUp   = unix.EPOLLHUP // both halves are closed
	looped   = 1 << 27       // not an event: set by Set.Returned
	retired  = 1 << 26       // likewise, by Set.Retire
)

// Conn is a TCP connection that never blocks. Only the goroutine that owns it may call its methods. It may be passed to
// another owner: events wake the goroutine that waited for it last.
//
// Every proxied connection has two. The order of the fields leaves no gaps, and addresses are kept apart from their ports
// because a netip.AddrPort has one: 128 bytes are a size of the allocator, and the next is 144.
type Conn struct {
	poller        *Poller
	fd            int
	remote, local netip.Addr             // local is invalid until LocalAddr is called
	waiter        atomic.Pointer[Waiter] // woken by events; may be nil
	open          *atomic.Int64          // counts this connection while it is open; nil: it is not tracked
	set           *Set                   // contains this connection until it is closed; may be nil
	returned      *Conn                  // see Join
	layer         *layered               // nil: the connection is bare

	ready                 atomic.Uint32 // events, set by the poller
	joined                uint32        // uptime when it joined set
	serial                uint32        // set with watched
	remotePort, localPort uint16
	watched               bool // in the epoll set; set by the first wait
	watchesWrites         bool // room in the send buffer is an event
	shut                  bool // CloseWrite was called
	closed                bool
}

// newConn takes ownership of fd. ready is the assumed state until a system call shows otherwise.
func newConn(p *Poller, fd int, remote netip.AddrPort, ready uint32) *Conn {
	c := &Conn{poller: p, fd: fd, remote: remote.Addr(), remotePort: remote.Port()}
	c.ready.Store(ready)
	return c
}

// RemoteAddr returns the peer's address. A link-local one has the interface's index as its zone.
func (c *Conn) RemoteAddr() netip.AddrPort { return netip.AddrPortFrom(c.remote, c.remotePort) }

// LocalAddr returns the address of our end. It is invalid if the system call fails. The result is kept.
func (c *Conn) LocalAddr() netip.AddrPort {
	if !c.local.IsValid() {
		local, _ := getsockname(c.fd)
		c.local, c.localPort = local.Addr(), local.Port()
	}
	return netip.AddrPortFrom(c.local, c.localPort)
}

// OriginalDst returns the destination of the connection before a rule redirected it; see package sockopt.
func (c *Conn) OriginalDst() (netip.AddrPort, error) {
	return sockopt.OriginalDst(c.fd, c.remote)
}

// KeepAlive sets how many probes are sent before the peer counts as vanished, and the seconds before the first and between
// two. Zero leaves the setting. A value that the kernel refuses has no effect.
func (c *Conn) KeepAlive(probes, idle, gap int) { sockopt.KeepAlive(c.fd, probes, idle, gap) }

// ClearTransparent makes a connection that a transparent listener has accepted an ordinary one. This is required for a
// redirected connection. When its client opens another connection from the same port to another redirected port, the kernel
// changes that connection's source port to distinguish the two. It looks up the socket before that change, finds ours, and
// delivers the other connection's packets to it if it is transparent.
func (c *Conn) ClearTransparent() error {
	return os.NewSyscallError("setsockopt", sockopt.ClearTransparent(c.fd, c.remote.Is6()))
}

// Readable reports whether a read may return something other than ErrAgain.
func (c *Conn) Readable() bool {
	return c.ready.Load()&(readable|gone|failed|hungUp) != 0 || c.layer != nil && c.layer.more
}

// Writable reports whether a write may return something other than ErrAgain.
func (c *Conn) Writable() bool { return c.ready.Load()&(writable|failed|hungUp) != 0 }

// Ended reports whether the poller has seen the end of the peer's data: the peer has closed, or the connection is dead.
func (c *Conn) Ended() bool { return c.ready.Load()&(gone|failed|hungUp) != 0 }

// hadUrgent reports whether the peer has ever sent urgent data. SpliceTo stops before urgent data and cannot
// distinguish that from an empty or ended connection: read such a connection instead.
func (c *Conn) hadUrgent() bool { return c.ready.Load()&urgent != 0 }

// Failed returns an error if the connection is dead because it was reset or the peer vanished. It does not read. It returns
// nil for a connection that is open or was closed in order. It depends on events, so it detects a dead connection only after
// the first Wait for it.
//
// The kernel reports a dead connection by a pending error (EPOLLERR). After a write has consumed that error, the connection
// is closed both ways (EPOLLHUP) although we did not close our half.
func (c *Conn) Failed() error {
	ready := c.ready.Load()
	if ready&failed == 0 && (ready&hungUp == 0 || c.shut) {
		return nil
	}
	if c.layer != nil {
		if c.layer.checkEvicted(); c.layer.writeErr != nil {
			return c.layer.writeErr // a flush consumed the socket's error, or the connection is evicted
		}
	}
	if code, err := unix.GetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_ERROR); err == nil && code != 0 {
		return os.NewSyscallError("read", syscall.Errno(code))
	}
	return errVanished
}

// Read returns bytes that have arrived. It returns ErrAgain if no bytes are available, and io.EOF at the end. With an empty
// p it returns 0, nil.
func (c *Conn) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil // the kernel's 0 would mean the end
	}
	if c.layer != nil {
		return c.layer.read(p)
	}
	return c.readSocket(p)
}

func (c *Conn) readSocket(p []byte) (int, error) {
	c.ready.And(^uint32(readable)) // see try
	count, errno := uintptr(0), unix.EINTR
	for errno == unix.EINTR {
		count, errno = read(c.fd, p)
	}
	n := int(count) // -1 after an error
	// A read that leaves room has drained the socket, and later bytes cause a new event. This saves the system call that
	// would return EAGAIN. Urgent data is the exception, because a read stops before it.
	if n == len(p) || c.hadUrgent() {
		c.ready.Or(readable)
	}
	if errno == 0 && n > 0 {
		return n, nil
	}
	return 0, readError(errno)
}

// Discard discards what the socket has received, at most maxDiscarded bytes, without copying it. With a Layer these are encoded
// bytes: the connection cannot be read afterwards, and bytes that wait to be sent are lost. The results are those of Read.
func (c *Conn) Discard() (int, error) {
	if c.layer != nil {
		c.layer.drop()
	}
	n, err := c.try(readable, "read", func() (int, error) { return discard(c.fd, maxDiscarded) })
	if n == maxDiscarded || c.hadUrgent() {
		c.ready.Or(readable)
	}
	return n, err
}

const maxDiscarded = 1 << 20

// readError returns the error of a read of no bytes.
func readError(errno syscall.Errno) error {
	if errno == 0 {
		return io.EOF
	}
	return callError("read", errno)
}

// callError returns the error of a system call.
func callError(name string, errno syscall.Errno) error {
	if errno == unix.EAGAIN {
		return ErrAgain
	}
	return os.NewSyscallError(name, errno)
}

// Write writes as much of p as the socket takes and returns that number. It returns ErrAgain if the socket is full. A Layer
// may accept bytes that the socket has not taken; later writes, Wait and Close send them.
func (c *Conn) Write(p []byte) (int, error) {
	if c.layer != nil {
		return c.layer.write(c, p)
	}
	return c.writeSocket(p)
}

func (c *Conn) writeSocket(p []byte) (int, error) { return c.sendSocket(p, 0) }

// sendSocket writes with flags of send(2).
func (c *Conn) sendSocket(p []byte, flags uintptr) (int, error) {
	c.ready.And(^uint32(writable)) // see try
	n, errno := uintptr(0), unix.EINTR
	for errno == unix.EINTR {
		n, errno = write(c.fd, p, flags)
	}
	if errno != 0 {
		return 0, callError("write", errno)
	}
	if n > 0 {
		c.ready.Or(writable)
	}
	return int(n), nil
}

// errLayered is the error for splicing a connection with a Layer: unencoded bytes would reach the wire.
var errLayered = os.NewSyscallError("splice", unix.EINVAL)

// SpliceTo moves up to n bytes from a bare connection into an empty pipe, with results like Read's. ErrAgain and io.EOF
// may be wrong if there is urgent data.
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

// SpliceFrom moves up to n bytes from the pipe to a bare connection, with results like Write's. The pipe must hold n bytes.
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

// try makes one system call. It clears the event before the call; the caller sets it again if there may be more. An event
// that arrives during the call is therefore kept, at the price of a possibly useless call. If it were cleared after the
// call, an event could be lost and the connection would hang.
//
// Reads and writes do the same without a function value. The processor predicts returns from a stack that the kernel
// clears, so each function that is open during a system call costs a mispredicted return. The functions that make these
// calls are inlined for the same reason.
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

// Quiet reports whether the connection is open and has neither unread nor unsent bytes. It makes a system call, because the
// poller may not have seen the latest events.
func (c *Conn) Quiet() bool {
	if c.layer != nil {
		return c.layer.quiet()
	}
	_, err := peek(c.fd)
	return err == ErrAgain
}

// SeemsQuiet is Quiet by the events of the poller so far: the peer may have closed at this moment, or sent something. It costs
// no system call.
func (c *Conn) SeemsQuiet() bool { return c.watched && !c.Readable() }

// Track increments n and returns its new value. It is decremented when the descriptor is closed. With a Layer, that may
// be after Close returns.
func (c *Conn) Track(n *atomic.Int64) int64 {
	c.open = n
	return n.Add(1)
}

// Rest detaches the connection from its waiter, until the next wait.
func (c *Conn) Rest() { c.waiter.Store(nil) }

// CloseWrite closes the sending half: the peer reads the end. A second call has no effect.
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

// Close closes the connection in order. Written bytes are still sent. A second call has no effect. All calls on a closed
// connection fail with EBADF, because its descriptor may already belong to another connection.
func (c *Conn) Close() {
	switch {
	case c.closed:
	case c.layer != nil:
		c.closeLayered()
	default:
		c.finish()
	}
}

// Reset closes the connection with RST, to signal an abnormal end to the peer. Written bytes that are not yet on the wire
// are lost.
func (c *Conn) Reset() {
	if !c.closed {
		_ = sockopt.SetReset(c.fd) // cannot fail on an open TCP socket
		c.finish()
	}
}

// finish closes the descriptor. That removes it from the epoll set as well.
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
