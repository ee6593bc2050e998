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

// Dial connects to remote and uses w to wait for the connection until the deadline; zero means no deadline. A valid local
// is the source address; the kernel chooses the port. The error is the kernel's, ErrDeadline or ErrCanceled. A
// connection that would connect to itself fails with ECONNREFUSED.
func (p *Poller) Dial(w *Waiter, local netip.Addr, remote netip.AddrPort, deadline time.Time) (*Conn, error) {
	return p.dial(w, origin{address: netip.AddrPortFrom(local, 0)}, remote, deadline)
}

// DialAs is like Dial from an address and port that may belong to another host. Its packets carry a mark, by which rules
// let them pass and routing delivers the replies. The error is EADDRINUSE if another socket has the port exclusively,
// EADDRNOTAVAIL if a connection between the two addresses and ports exists, and EPERM without CAP_NET_ADMIN; since
// Linux 5.17, CAP_NET_RAW suffices.
func (p *Poller) DialAs(w *Waiter, local netip.AddrPort, mark uint32, remote netip.AddrPort, deadline time.Time) (*Conn, error) {
	return p.dial(w, origin{local, true, mark}, remote, deadline)
}

// origin is the local end of a dialled connection. If address is invalid, the kernel chooses it.
type origin struct {
	address  netip.AddrPort // port zero: the kernel's choice
	borrowed bool           // the address may belong to another host
	mark     uint32         // SO_MARK of a borrowed origin
}

func (p *Poller) dial(w *Waiter, from origin, remote netip.AddrPort, deadline time.Time) (*Conn, error) {
	c, err := p.open(w, from, remote, deadline)
	if err != nil {
		return nil, fmt.Errorf("connecting to %v: %w", remote, err)
	}
	return c, nil
}

func (p *Poller) open(w *Waiter, from origin, remote netip.AddrPort, deadline time.Time) (*Conn, error) {
	c, err := p.Socket(remote)
	if err != nil {
		return nil, err
	}
	if err := c.start(w, from, deadline); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// Socket returns a connection to remote on which Connect is to be called. A socket belongs to the network namespace of the
// thread that makes it: a goroutine that may be in another namespace gets one that was made for it.
func (p *Poller) Socket(remote netip.AddrPort) (*Conn, error) {
	family := unix.AF_INET
	if remote.Addr().Is6() {
		family = unix.AF_INET6
	}
	fd, err := p.socket(family)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	return newConn(p, fd, remote, writable), nil
}

// Connect is Dial for a connection from Socket. After an error, the connection is to be closed.
func (c *Conn) Connect(w *Waiter, local netip.Addr, deadline time.Time) error {
	if err := c.start(w, origin{address: netip.AddrPortFrom(local, 0)}, deadline); err != nil {
		return fmt.Errorf("connecting to %v: %w", c.RemoteAddr(), err)
	}
	return nil
}

func (c *Conn) start(w *Waiter, from origin, deadline time.Time) error {
	destination, err := newSocketAddress(c.RemoteAddr())
	if err != nil {
		return err
	}
	return c.connect(w, from, &destination, deadline)
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
		if err := bind(c.fd, &source); err != nil {
			return os.NewSyscallError("bind", err)
		}
	}
	// A connection within this host is established before the first connect returns, although it returns EINPROGRESS. A
	// second call reports that without a wait. For other hosts the second call returns EALREADY, and the third follows an
	// event.
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
			c.ready.And(^uint32(writable)) // until the connection is established or has failed
		default:
			return os.NewSyscallError("connect", err)
		}
		if err := w.Wait(deadline, c, nil); err != nil {
			return err
		}
	}
}

// setOptions sets the socket options that must precede bind.
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

// connectedToItself reports whether both ends of the connection are this one socket. A dial to a port of this host that
// has no listener ends like that when the kernel happens to choose the same port as the source: the SYN meets its own
// socket (RFC 9293 §3.5, simultaneous open). The conditions before LocalAddr save a system call where that is impossible.
func (c *Conn) connectedToItself(local netip.Addr) bool {
	return c.poller.ports.contain(c.remotePort) && (!local.IsValid() || local == c.remote) &&
		c.LocalAddr() == c.RemoteAddr()
}

// portRange is the inclusive range from which the kernel chooses source ports.
type portRange struct{ low, high uint16 }

func (r portRange) contain(port uint16) bool { return r.low <= port && port <= r.high }

// localPorts reads the range of this network namespace. It is the same for both families. If that fails, it returns the
// range of all ports.
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
