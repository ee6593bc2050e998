package tcp

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/sockopt"
)

// Listener accepts connections for a Poller. Unlike the methods of a Conn, Accept blocks, as that of a net.Listener does.
// Calls of Accept and TryAccept must not be concurrent.
type Listener struct {
	poller *Poller
	addr   netip.AddrPort
	file   *os.File // owns the socket
	raw    syscall.RawConn

	// The results of the functions below, which are values made once: a closure for each call would be allocated.
	woken          bool // try has waited
	fd             int
	peer           netip.AddrPort
	err            error
	try            func(listening uintptr) (done bool)
	tryWithoutWait func(listening uintptr)
}

// Listen binds address for its own family only. Accepted connections inherit the options of sockopt.SetConn.
//
// Multipath TCP is off: the listener would offer a protocol that the workload does not, and its connections have no
// original destination.
func (p *Poller) Listen(address netip.AddrPort) (*Listener, error) {
	return p.listen(address, sockopt.ListenControl)
}

// ListenTransparent is like Listen, for connections from TPROXY rules. LocalAddr of an accepted connection is its original
// destination, unless a rule redirected it. The error is EPERM with neither CAP_NET_ADMIN nor CAP_NET_RAW.
func (p *Poller) ListenTransparent(address netip.AddrPort) (*Listener, error) {
	return p.listen(address, func(network, bound string, raw syscall.RawConn) error {
		var sysErr error
		if err := raw.Control(func(fd uintptr) { sysErr = sockopt.SetTransparent(int(fd), address.Addr().Is6()) }); err != nil {
			return err
		}
		if sysErr != nil {
			return os.NewSyscallError("setsockopt", sysErr)
		}
		return sockopt.ListenControl(network, bound, raw)
	})
}

func (p *Poller) listen(address netip.AddrPort, control func(string, string, syscall.RawConn) error) (*Listener, error) {
	network := "tcp4"
	if address.Addr().Is6() {
		network = "tcp6"
	}
	config := net.ListenConfig{Control: control}
	config.SetMultipathTCP(false)
	listener, err := config.Listen(context.Background(), network, address.String())
	if err != nil {
		return nil, err
	}
	return p.Adopt(listener.(*net.TCPListener))
}

// LacksIPv6 recognises the errors of bind when IPv6 is disabled in the kernel or in this namespace.
func LacksIPv6(err error) bool {
	return errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.EAFNOSUPPORT)
}

// Adopt returns a Listener with the socket of bound, and closes bound. The socket may belong to another network namespace.
// It should have the options of sockopt.ListenControl.
func (p *Poller) Adopt(bound *net.TCPListener) (*Listener, error) {
	defer bound.Close()
	address := bound.Addr()
	file, err := bound.File() // the same socket; the RawConn of a net.TCPListener does not support Read
	if err != nil {
		return nil, fmt.Errorf("listening on %v: %w", address, err)
	}
	raw, err := file.SyscallConn()
	if err != nil {
		file.Close()
		return nil, fmt.Errorf("listening on %v: %w", address, err)
	}
	l := &Listener{poller: p, addr: bound.Addr().(*net.TCPAddr).AddrPort(), file: file, raw: raw}
	l.try = func(listening uintptr) bool {
		if !l.woken && !queued(int(listening)) {
			l.woken = true // the next run follows an event
			return false
		}
		l.tryWithoutWait(listening)
		return l.err != ErrAgain
	}
	l.tryWithoutWait = func(listening uintptr) { l.fd, l.peer, l.err = acceptNext(int(listening)) }
	return l, nil
}

// Addr returns the bound address. Port 0 is replaced by the port that the kernel chose.
func (l *Listener) Addr() netip.AddrPort { return l.addr }

// WakeAll calls WakeAll of the listener's poller.
func (l *Listener) WakeAll() { l.poller.WakeAll() }

// SetDeadline makes Accept fail with os.ErrDeadlineExceeded from t on.
func (l *Listener) SetDeadline(t time.Time) error { return l.file.SetReadDeadline(t) }

// Yield lets goroutines run: those whose connections have events, and those of connections that Accept has returned.
func (l *Listener) Yield() {
	l.poller.poll()
	runtime.Gosched()
}

// Close closes the listener. The kernel resets connections in its queue.
func (l *Listener) Close() error { return l.file.Close() }

// Accept waits for a connection. The error is os.ErrDeadlineExceeded after the deadline, os.ErrClosed after Close, and
// the kernel's otherwise; after an error of the kernel, a later call may succeed.
func (l *Listener) Accept() (*Conn, error) {
	l.woken = false
	switch err := l.raw.Read(l.try); {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil, os.ErrDeadlineExceeded
	case err != nil:
		return nil, os.ErrClosed
	case l.err != nil:
		return nil, os.NewSyscallError("accept4", l.err)
	}
	return newConn(l.poller, l.fd, l.peer, readable|writable), nil
}

// Listens reports whether a socket of this network namespace listens at an address; see package sockopt.
func Listens(at netip.AddrPort) bool { return sockopt.Listens(at) }

// TryAccept is like Accept, but does not wait and ignores the deadline. It returns ErrAgain if the queue is empty.
func (l *Listener) TryAccept() (*Conn, error) {
	if l.raw.Control(l.tryWithoutWait) != nil {
		return nil, os.ErrClosed
	}
	if l.err == ErrAgain {
		return nil, ErrAgain
	}
	if l.err != nil {
		return nil, os.NewSyscallError("accept4", l.err)
	}
	return newConn(l.poller, l.fd, l.peer, readable|writable), nil
}

// acceptNext accepts one connection. It skips connections that were aborted in the queue.
func acceptNext(listening int) (int, netip.AddrPort, error) {
	for {
		fd, peer, err := accept(listening)
		if err != unix.EINTR && err != unix.ECONNABORTED {
			return fd, peer, err
		}
	}
}
