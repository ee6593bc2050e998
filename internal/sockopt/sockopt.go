// Package sockopt reads and sets the socket options that a transparent proxy needs.
package sockopt

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"syscall"

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
	read := originalDst6
	if peer.Unmap().Is4() {
		read = originalDst4
	}
	dst, err := read(fd)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("reading the original destination of the connection from %v: %w", peer, err)
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
		if err := unix.SetsockoptInt(fd, option.level, option.name, option.value); err != nil {
			return err
		}
	}
	return nil
}

// SetBindNoPort lets the kernel choose the port of a bound source address at connect time, when it knows the
// destination (IP_BIND_ADDRESS_NO_PORT): 127.0.0.6 then has its range of ports for each destination and not once for
// all.
func SetBindNoPort(fd int) error {
	return unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1)
}

// SetReset makes the coming close send RST instead of FIN (SO_LINGER with a zero time).
func SetReset(fd int) error {
	return unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
}
