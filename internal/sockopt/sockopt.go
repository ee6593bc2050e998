// Package sockopt reads and sets the socket options that a transparent proxy needs.
package sockopt

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ip6tSOOriginalDst is IP6T_SO_ORIGINAL_DST of linux/netfilter_ipv6/ip6_tables.h: the same number as SO_ORIGINAL_DST,
// at level IPPROTO_IPV6.
const ip6tSOOriginalDst = 80

// OriginalDst returns where the connection from peer was going before a REDIRECT rule sent it to this socket, as
// connection tracking remembers it.
//
// With connection tracking on, a connection that no rule touched has an original destination too: our own listener. So
// a nil error does not say that a rule was at work; the caller compares the answer with its own ports. The error is
// ENOENT when connection tracking has no entry, and ENOPROTOOPT when the kernel has none at all.
func OriginalDst(fd int, peer netip.Addr) (netip.AddrPort, error) {
	// The option exists once for each family and answers only for the family of the packets, which on a dual-stack
	// socket is the family of the peer's unmapped address.
	level, name := unix.IPPROTO_IPV6, ip6tSOOriginalDst
	if peer.Unmap().Is4() {
		level, name = unix.IPPROTO_IP, unix.SO_ORIGINAL_DST
	}
	var address unix.RawSockaddrInet6 // the larger of the two
	size := uint32(unsafe.Sizeof(address))
	_, _, errno := syscall.RawSyscall6(syscall.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(name),
		uintptr(unsafe.Pointer(&address)), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return netip.AddrPort{}, fmt.Errorf("reading the original destination of the connection from %v: %w", peer, errno)
	}
	port := networkOrder(address.Port)
	if level == unix.IPPROTO_IP {
		v4 := (*unix.RawSockaddrInet4)(unsafe.Pointer(&address))
		return netip.AddrPortFrom(netip.AddrFrom4(v4.Addr), port), nil
	}
	return netip.AddrPortFrom(netip.AddrFrom16(address.Addr), port), nil
}

// networkOrder reads a port that the kernel wrote in network byte order.
func networkOrder(port uint16) uint16 {
	var octets [2]byte
	binary.NativeEndian.PutUint16(octets[:], port)
	return binary.BigEndian.Uint16(octets[:])
}

// keepAliveSeconds is the idle time before the first keep-alive probe and the time between probes.
//
// Connection tracking forgets a half-closed flow after 60 silent seconds (nf_conntrack_tcp_timeout_close_wait), and its
// redirection with it. Twenty seconds leave room for two lost probes. The number of probes stays the kernel's.
const keepAliveSeconds = 20

// ListenControl gives a listening socket, before it is bound, the options of SetConn. Accepted sockets inherit them, so
// that no connection pays system calls for them. It fits net.ListenConfig.Control.
func ListenControl(_, _ string, raw syscall.RawConn) error {
	var sysErr error
	if err := raw.Control(func(fd uintptr) { sysErr = SetConn(int(fd)) }); err != nil {
		return err
	}
	return sysErr
}

// SetConn sets what every connection has: no delay of small segments, since whoever sent them has decided about that
// already; keep-alive; and urgent data in line, as the byte would otherwise be lost on the way through.
func SetConn(fd int) error {
	for _, option := range [...]struct{ level, name, value int }{
		{unix.IPPROTO_TCP, unix.TCP_NODELAY, 1},
		{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
		{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, keepAliveSeconds},
		{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, keepAliveSeconds},
		{unix.SOL_SOCKET, unix.SO_OOBINLINE, 1},
	} {
		if err := setInt(fd, option.level, option.name, option.value); err != nil {
			return err
		}
	}
	return nil
}

// SetBindNoPort lets the kernel choose the port of a bound source address at connect time, when it knows the
// destination (IP_BIND_ADDRESS_NO_PORT): 127.0.0.6 then has its range of ports for each destination and not once for
// all.
func SetBindNoPort(fd int) error {
	return setInt(fd, unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1)
}

// setInt goes past the scheduler, as no option can block and each connection sets several.
func setInt(fd, level, name, value int) error {
	option := int32(value)
	_, _, errno := syscall.RawSyscall6(syscall.SYS_SETSOCKOPT, uintptr(fd), uintptr(level), uintptr(name),
		uintptr(unsafe.Pointer(&option)), unsafe.Sizeof(option), 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// SetTransparent lets a socket have an address that is not this host's, of the family that it has (IP_TRANSPARENT,
// IPV6_TRANSPARENT). TPROXY rules give packets to such listeners alone, and what these accept is such a socket, too. A
// socket that connects is bound to the address of another host before. The error is EPERM with neither of the capabilities
// NET_ADMIN and NET_RAW.
func SetTransparent(fd int, ipv6 bool) error { return setTransparent(fd, ipv6, 1) }

// ClearTransparent takes back what a socket has from SetTransparent, or inherited from its listener.
func ClearTransparent(fd int, ipv6 bool) error { return setTransparent(fd, ipv6, 0) }

func setTransparent(fd int, ipv6 bool, value int) error {
	if ipv6 {
		return setInt(fd, unix.IPPROTO_IPV6, unix.IPV6_TRANSPARENT, value)
	}
	return setInt(fd, unix.IPPROTO_IP, unix.IP_TRANSPARENT, value)
}

// SetMark puts a mark on what the socket sends, for rules and routing to see (SO_MARK). The error is EPERM without the
// capability NET_ADMIN; since Linux 5.17, NET_RAW does as well.
func SetMark(fd int, mark uint32) error {
	return setInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(mark))
}

// SetReuseAddress lets a socket be bound to an address and port that other sockets are bound to, if they allow it, too;
// connections are told apart by their other end.
func SetReuseAddress(fd int) error { return setInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) }

// SetReset makes the coming close send RST instead of FIN (SO_LINGER with a zero time).
func SetReset(fd int) error {
	return unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
}
