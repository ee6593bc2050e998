// Package sockopt reads and sets the socket options that a transparent proxy needs, with both families told apart and
// no descriptor taken from the Go runtime.
package sockopt

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"syscall"

	"golang.org/x/sys/unix"
)

// ip6tSOOriginalDst is IP6T_SO_ORIGINAL_DST of linux/netfilter_ipv6/ip6_tables.h: the same number as SO_ORIGINAL_DST,
// at level IPPROTO_IPV6.
const ip6tSOOriginalDst = 80

// OriginalDst returns where the connection was going before a REDIRECT rule sent it here, as connection tracking
// remembers it.
//
// With connection tracking on, a connection that no rule touched has an original destination too: our own listener. So
// a nil error does not say that a rule was at work; the caller compares the answer with its own ports. The error is
// ENOENT when connection tracking has no entry, and ENOPROTOOPT when the kernel has none at all.
func OriginalDst(conn *net.TCPConn) (netip.AddrPort, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return netip.AddrPort{}, err
	}
	// The option exists once for each family and answers only for the family of the packets, which on a dual-stack
	// socket is the family of the peer's unmapped address.
	read := originalDst6
	if remote, ok := conn.RemoteAddr().(*net.TCPAddr); ok && remote.IP.To4() != nil {
		read = originalDst4
	}
	var dst netip.AddrPort
	var sysErr error
	err = raw.Control(func(fd uintptr) { dst, sysErr = read(int(fd)) })
	if err == nil {
		err = sysErr
	}
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("reading the original destination of the connection from %v: %w", conn.RemoteAddr(), err)
	}
	return dst, nil
}

// originalDst4 borrows the 20-byte option buffer of IPv6Mreq for the 16-byte sockaddr_in that the kernel writes.
func originalDst4(fd int) (netip.AddrPort, error) {
	value, err := unix.GetsockoptIPv6Mreq(fd, unix.IPPROTO_IP, unix.SO_ORIGINAL_DST)
	if err != nil {
		return netip.AddrPort{}, err
	}
	sockaddr := value.Multiaddr // family 2, port 2, address 4, zero 8
	port := binary.BigEndian.Uint16(sockaddr[2:4])
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte(sockaddr[4:8])), port), nil
}

// originalDst6 borrows the buffer of IPv6MTUInfo, whose first field is the sockaddr_in6 that the kernel writes.
func originalDst6(fd int) (netip.AddrPort, error) {
	value, err := unix.GetsockoptIPv6MTUInfo(fd, unix.IPPROTO_IPV6, ip6tSOOriginalDst)
	if err != nil {
		return netip.AddrPort{}, err
	}
	var port [2]byte
	binary.NativeEndian.PutUint16(port[:], value.Addr.Port) // the field holds network order bytes
	return netip.AddrPortFrom(netip.AddrFrom16(value.Addr.Addr), binary.BigEndian.Uint16(port[:])), nil
}

// keepAliveSeconds is the idle time before the first keep-alive probe and the time between probes.
//
// Connection tracking forgets a half-closed flow after 60 silent seconds (nf_conntrack_tcp_timeout_close_wait), and its
// redirection with it. Twenty seconds leave room for two lost probes. The number of probes stays the kernel's.
const keepAliveSeconds = 20

// ListenControl prepares a listening socket, before it is bound. Accepted sockets inherit the options, so that no
// connection pays system calls for them. It fits net.ListenConfig.Control.
func ListenControl(_, _ string, raw syscall.RawConn) error {
	return control(raw, keepAlive)
}

// DialControl prepares a socket that will connect. It fits net.Dialer.Control.
//
// IP_BIND_ADDRESS_NO_PORT lets the kernel choose the port of a bound source address at connect time, when it knows the
// destination: 127.0.0.6 then has its range of ports for each destination and not once for all.
func DialControl(network, _ string, raw syscall.RawConn) error {
	return control(raw, func(fd int) error {
		if err := keepAlive(fd); err != nil {
			return err
		}
		return unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1)
	})
}

func keepAlive(fd int) error {
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1); err != nil {
		return err
	}
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, keepAliveSeconds); err != nil {
		return err
	}
	return unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, keepAliveSeconds)
}

func control(raw syscall.RawConn, set func(fd int) error) error {
	var sysErr error
	if err := raw.Control(func(fd uintptr) { sysErr = set(int(fd)) }); err != nil {
		return err
	}
	return sysErr
}

// Reset closes the connection with a reset, so that the peer learns that it did not end well. What was written and is
// not yet on the wire is lost.
func Reset(conn *net.TCPConn) {
	// SO_LINGER with a zero time makes close send RST instead of FIN. It cannot fail on an open TCP socket, and on a
	// closed one there is nothing to do.
	_ = conn.SetLinger(0)
	_ = conn.Close()
}
