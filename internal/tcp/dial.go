package tcp

import (
	"fmt"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/sockopt"
)

// Dial connects to remote, and waits for that with w until the deadline, which may be zero for none. A valid local is
// the source address; its port is the kernel's choice. The errors are the kernel's, ErrDeadline and ErrCanceled.
func (p *Poller) Dial(w *Waiter, local netip.Addr, remote netip.AddrPort, deadline time.Time) (*Conn, error) {
	c, err := p.dial(w, local, remote, deadline)
	if err != nil {
		return nil, fmt.Errorf("connecting to %v: %w", remote, err)
	}
	return c, nil
}

func (p *Poller) dial(w *Waiter, local netip.Addr, remote netip.AddrPort, deadline time.Time) (*Conn, error) {
	family := unix.AF_INET
	if remote.Addr().Is6() {
		family = unix.AF_INET6
	}
	destination, err := newSocketAddress(remote)
	if err != nil {
		return nil, err
	}
	fd, err := socket(family)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	c := newConn(p, fd, remote, writable)
	if err := c.connect(w, local, destination, deadline); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

func (c *Conn) connect(w *Waiter, local netip.Addr, destination *socketAddress, deadline time.Time) error {
	if err := sockopt.SetConn(c.fd); err != nil {
		return os.NewSyscallError("setsockopt", err)
	}
	if local.IsValid() {
		if err := sockopt.SetBindNoPort(c.fd); err != nil {
			return os.NewSyscallError("setsockopt", err)
		}
		source, err := newSocketAddress(netip.AddrPortFrom(local, 0))
		if err != nil {
			return err
		}
		if err := bind(c.fd, source); err != nil {
			return os.NewSyscallError("bind", err)
		}
	}
	// A connection within this host is made while connect runs, but connect never says so. Asking again does, and spares
	// the way through the poller. Elsewhere the second answer is EALREADY, and the third comes after an event.
	for asked := 0; ; asked++ {
		switch err := connect(c.fd, destination); err {
		case nil, unix.EISCONN:
			return nil
		case unix.EINPROGRESS, unix.EALREADY, unix.EINTR:
			if asked == 0 {
				continue
			}
		default:
			return os.NewSyscallError("connect", err)
		}
		if err := w.Wait(deadline, c, nil); err != nil {
			return err
		}
	}
}
