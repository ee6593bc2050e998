package bench

import (
	"fmt"
	"io"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// loop serves many sockets from one goroutine, with epoll. The load and the HTTP origin share a core and must saturate a
// proxy that has a core for itself. Goroutines and the runtime's poller would cost too much.
type loop struct {
	epoll   int
	readers map[int]reader // by descriptor
	buf     []byte         // for one read; readers must not keep it
}

// reader is called when its descriptor is readable. An error ends the loop.
type reader interface {
	readable() error
}

func newLoop() (*loop, error) {
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	return &loop{epoll: epoll, readers: make(map[int]reader), buf: make([]byte, bulkBuffer)}, nil
}

func (l *loop) add(fd int, r reader) error {
	l.readers[fd] = r
	event := unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)}
	return os.NewSyscallError("epoll_ctl", unix.EpollCtl(l.epoll, unix.EPOLL_CTL_ADD, fd, &event))
}

// patience is the time after which a load without events fails.
const patience = time.Minute

// run calls readers until done returns true. It fails when no event arrives for patience; 0 means no limit.
func (l *loop) run(patience time.Duration, done func() bool) error {
	timeout := -1
	if patience > 0 {
		timeout = int(patience.Milliseconds())
	}
	events := make([]unix.EpollEvent, 512)
	for !done() {
		n, err := unix.EpollWait(l.epoll, events, timeout)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return os.NewSyscallError("epoll_wait", err)
		case n == 0:
			return fmt.Errorf("no event for %v", patience)
		}
		for _, event := range events[:n] {
			r, ok := l.readers[int(event.Fd)]
			if !ok {
				continue // closed by an earlier event
			}
			if err := r.readable(); err != nil {
				return err
			}
		}
	}
	return nil
}

// socket is a connection in a loop.
type socket struct {
	loop *loop
	fd   int
}

// read returns the bytes that have arrived, and io.EOF at the end. It returns an empty slice if it would block. The bytes
// are valid until the next read of any socket of the loop.
func (s *socket) read() ([]byte, error) {
	n, err := unix.Read(s.fd, s.loop.buf)
	switch {
	case err == unix.EAGAIN || err == unix.EINTR:
		return nil, nil
	case err != nil:
		return nil, os.NewSyscallError("read", err)
	case n == 0:
		return nil, io.EOF
	}
	return s.loop.buf[:n], nil
}

// write writes all of b. It may block the loop; only bulk data does.
func (s *socket) write(b []byte) error {
	for len(b) > 0 {
		n, err := unix.Write(s.fd, b)
		switch {
		case err == unix.EAGAIN:
			unix.Poll([]unix.PollFd{{Fd: int32(s.fd), Events: unix.POLLOUT}}, -1)
		case err == unix.EINTR:
		case err != nil:
			return os.NewSyscallError("write", err)
		default:
			b = b[n:]
		}
	}
	return nil
}

func (s *socket) close() {
	delete(s.loop.readers, s.fd)
	unix.Close(s.fd)
}

// listen serves a port from the loop. Connections from unexpected addresses are closed.
func (l *loop) listen(port int, expected func(netip.Addr) bool, serve func(*socket) reader) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Port: port}); err != nil {
		return os.NewSyscallError("bind", err)
	}
	if err := unix.Listen(fd, 4096); err != nil {
		return os.NewSyscallError("listen", err)
	}
	return l.add(fd, &acceptor{l, fd, expected, serve})
}

type acceptor struct {
	loop     *loop
	fd       int
	expected func(netip.Addr) bool
	serve    func(*socket) reader
}

func (a *acceptor) readable() error {
	fd, from, err := unix.Accept4(a.fd, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
	switch {
	case err == unix.EAGAIN || err == unix.ECONNABORTED || err == unix.EINTR:
		return nil
	case err != nil:
		return os.NewSyscallError("accept4", err)
	}
	if peer, ok := from.(*unix.SockaddrInet4); !ok || !a.expected(netip.AddrFrom4(peer.Addr)) {
		return os.NewSyscallError("close", unix.Close(fd))
	}
	unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	return a.loop.add(fd, a.serve(&socket{a.loop, fd}))
}

// dial opens a connection of the load for the loop. The caller must add it.
func (l *loop) dial(serial int64, port int) (*socket, error) {
	conn, err := dial(serial, port)
	if err != nil {
		return nil, err
	}
	defer conn.Close() // the duplicate stays, without the runtime's poller
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	var fd int
	var failed error
	err = raw.Control(func(own uintptr) { fd, failed = unix.FcntlInt(own, unix.F_DUPFD_CLOEXEC, 0) })
	if err == nil {
		err = os.NewSyscallError("fcntl", failed)
	}
	return &socket{l, fd}, err // non-blocking, like the original
}
