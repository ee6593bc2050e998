package tcp

import (
	"fmt"
	"math"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/sockopt"
)

// Dial connects to remote, and waits for that with w until the deadline, which may be zero for none. A valid local is
// the source address; its port is the kernel's choice. The errors are the kernel's, ErrDeadline and ErrCanceled; a
// connection to itself is refused.
func (p *Poller) Dial(w *Waiter, local netip.Addr, remote netip.AddrPort, deadline time.Time) (*Conn, error) {
	return p.dial(w, origin{address: netip.AddrPortFrom(local, 0)}, remote, deadline)
}

// DialAs is Dial from an address and port that need not be this host's. What it sends has a mark, by which rules and
// routing let it pass and bring the answers back. The error is EADDRINUSE when another socket keeps the port for itself,
// EADDRNOTAVAIL when there is a connection between the two addresses and ports already, and EPERM without the capability
// NET_ADMIN; since Linux 5.17, NET_RAW does as well.
func (p *Poller) DialAs(w *Waiter, local netip.AddrPort, mark uint32, remote netip.AddrPort, deadline time.Time) (*Conn, error) {
	return p.dial(w, origin{local, true, mark}, remote, deadline)
}

// origin is our end of a connection that is dialled. An invalid address leaves it to the kernel.
type origin struct {
	address  netip.AddrPort // port zero: the kernel's choice
	borrowed bool           // it is another host's
	mark     uint32         // of what is sent from a borrowed one
}

func (p *Poller) dial(w *Waiter, from origin, remote netip.AddrPort, deadline time.Time) (*Conn, error) {
	c, err := p.open(w, from, remote, deadline)
	if err != nil {
		return nil, fmt.Errorf("connecting to %v: %w", remote, err)
	}
	return c, nil
}

func (p *Poller) open(w *Waiter, from origin, remote netip.AddrPort, deadline time.Time) (*Conn, error) {
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
	if err := c.connect(w, from, destination, deadline); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

func (c *Conn) connect(w *Waiter, from origin, destination *socketAddress, deadline time.Time) error {
	if err := sockopt.SetConn(c.fd); err != nil {
		return os.NewSyscallError("setsockopt", err)
	}
	local := from.address.Addr()
	if local.IsValid() {
		if err := from.setOptions(c.fd); err != nil {
			return os.NewSyscallError("setsockopt", err)
		}
		source, err := newSocketAddress(from.address)
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
			if c.connectedToItself(local) {
				c.Reset() // an orderly close would keep the port from the workload for a minute
				return os.NewSyscallError("connect", unix.ECONNREFUSED)
			}
			c.ready.Or(writable)
			return nil
		case unix.EINPROGRESS, unix.EALREADY, unix.EINTR:
			if asked == 0 {
				continue
			}
			c.ready.And(^uint32(writable)) // which it is when it is connected
		default:
			return os.NewSyscallError("connect", err)
		}
		if err := w.Wait(deadline, c, nil); err != nil {
			return err
		}
	}
}

// setOptions prepares a socket for being bound.
func (o origin) setOptions(fd int) error {
	if !o.borrowed {
		return sockopt.SetBindNoPort(fd)
	}
	if err := sockopt.SetTransparent(fd, o.address.Addr().Is6()); err != nil {
		return err
	}
	if err := sockopt.SetMark(fd, o.mark); err != nil {
		return err
	}
	return sockopt.SetReuseAddress(fd)
}

// connectedToItself reports whether both ends of the connection are this one socket. That is what becomes of a dial to
// this host when nothing listens there and the kernel happens to choose the dialled port for our end: its SYN meets
// itself (RFC 9293 §3.5, simultaneous open). Only where that can be is the kernel asked.
func (c *Conn) connectedToItself(local netip.Addr) bool {
	return c.poller.ports.contain(c.remote.Port()) && (!local.IsValid() || local == c.remote.Addr()) &&
		c.LocalAddr() == c.remote
}

// portRange is where the kernel chooses the ports of our ends from, both ends included.
type portRange struct{ low, high uint16 }

func (r portRange) contain(port uint16) bool { return r.low <= port && port <= r.high }

// localPorts reads the range of this network namespace, for both families. It is every port when it cannot be read.
func localPorts() (r portRange) {
	text, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range")
	if err == nil {
		_, err = fmt.Sscan(string(text), &r.low, &r.high)
	}
	if err != nil {
		return portRange{0, math.MaxUint16}
	}
	return r
}
