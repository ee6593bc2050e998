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

// OriginalDst returns the destination of the connection from peer before a REDIRECT rule sent it to this socket, as
// recorded by connection tracking.
//
// With connection tracking on, an unredirected connection has an original destination too: our own listener. So a nil error
// does not prove that a rule matched, and the caller must compare the result with its own ports. The error is ENOENT if
// connection tracking has no entry, and ENOPROTOOPT if the kernel has no connection tracking.
func OriginalDst(fd int, peer netip.Addr) (netip.AddrPort, error) {
	// Each family has its own option, and it must match the family of the packets. On a dual-stack socket that is the
	// family of the peer's unmapped address.
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

// networkOrder converts a port from network byte order.
func networkOrder(port uint16) uint16 {
	var octets [2]byte
	binary.NativeEndian.PutUint16(octets[:], port)
	return binary.BigEndian.Uint16(octets[:])
}

// keepAliveSeconds is the idle time before the first keep-alive probe and the interval between probes.
//
// Connection tracking drops a half-closed flow, and its redirection, after 60 seconds without a packet
// (nf_conntrack_tcp_timeout_close_wait). Twenty seconds allow for two lost probes. The number of probes is the kernel's
// default.
const keepAliveSeconds = 20

// ListenControl sets the options of SetConn on a listening socket before bind. Accepted sockets inherit them without a
// system call each. Its signature is that of net.ListenConfig.Control.
func ListenControl(_, _ string, raw syscall.RawConn) error {
	var sysErr error
	if err := raw.Control(func(fd uintptr) { sysErr = SetConn(int(fd)) }); err != nil {
		return err
	}
	return sysErr
}

// SetConn sets the options of every connection: TCP_NODELAY, since the sender's own Nagle setting has already shaped the
// segments; keep-alive; and SO_OOBINLINE, as the urgent byte would otherwise be lost in the proxy.
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

// KeepAlive sets the parameters of TCP keep-alive that are not zero. A value that the kernel refuses has no effect.
func KeepAlive(fd, probes, idle, gap int) {
	for name, value := range map[int]int{unix.TCP_KEEPCNT: probes, unix.TCP_KEEPIDLE: idle, unix.TCP_KEEPINTVL: gap} {
		if value > 0 {
			_ = setInt(fd, unix.IPPROTO_TCP, name, value)
		}
	}
}

// SetBindNoPort defers the choice of the source port from bind to connect (IP_BIND_ADDRESS_NO_PORT). The kernel then has
// the destination, so that 127.0.0.6 can use its whole port range for each destination instead of once for all.
func SetBindNoPort(fd int) error {
	return setInt(fd, unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1)
}

// setInt bypasses the scheduler, as the options set here do not block and each connection sets several.
func setInt(fd, level, name, value int) error {
	option := int32(value)
	_, _, errno := syscall.RawSyscall6(syscall.SYS_SETSOCKOPT, uintptr(fd), uintptr(level), uintptr(name),
		uintptr(unsafe.Pointer(&option)), unsafe.Sizeof(option), 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// SetTransparent allows a socket to be bound to an address of another host (IP_TRANSPARENT, or IPV6_TRANSPARENT for an
// IPv6 socket). TPROXY rules deliver packets only to listeners with this option, and accepted sockets inherit it. Before a
// connect, bind the socket to the foreign address. The error is EPERM with neither CAP_NET_ADMIN nor CAP_NET_RAW.
func SetTransparent(fd int, ipv6 bool) error { return setTransparent(fd, ipv6, 1) }

// ClearTransparent clears the option of SetTransparent, whether it was set or inherited from the listener.
func ClearTransparent(fd int, ipv6 bool) error { return setTransparent(fd, ipv6, 0) }

func setTransparent(fd int, ipv6 bool, value int) error {
	if ipv6 {
		return setInt(fd, unix.IPPROTO_IPV6, unix.IPV6_TRANSPARENT, value)
	}
	return setInt(fd, unix.IPPROTO_IP, unix.IP_TRANSPARENT, value)
}

// SetMark sets the mark of the socket's packets (SO_MARK), by which rules and routing select them. The error is EPERM
// without CAP_NET_ADMIN; since Linux 5.17, CAP_NET_RAW suffices.
func SetMark(fd int, mark uint32) error {
	return setInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(mark))
}

// SetReuseAddress allows a socket to be bound to an address and port that other sockets with this option are bound to
// (SO_REUSEADDR). The remote end distinguishes their connections.
func SetReuseAddress(fd int) error { return setInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) }

// skMemInfoDrops is SK_MEMINFO_DROPS of linux/sock_diag.h, an index into the values of SO_MEMINFO.
const skMemInfoDrops = 8

// Drops returns how many packets the kernel has dropped at a datagram socket since it was opened, nearly all of them because
// the receive buffer was full (SO_MEMINFO, since Linux 4.12). The counter has 32 bits and wraps around.
func Drops(fd int) (uint32, error) {
	var values [skMemInfoDrops + 1]uint32
	size := uint32(unsafe.Sizeof(values))
	_, _, errno := syscall.RawSyscall6(syscall.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_MEMINFO,
		uintptr(unsafe.Pointer(&values)), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return 0, errno
	}
	return values[skMemInfoDrops], nil
}

// SetReset makes close send RST instead of FIN (SO_LINGER with a zero time).
func SetReset(fd int) error {
	return unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
}
