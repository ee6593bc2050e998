package tcp

import (
	"encoding/binary"
	"net"
	"net/netip"
	"strconv"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The system calls of an ordinary connection. They cannot block, as every socket is non-blocking, so they bypass the
// scheduler (syscall.RawSyscall). A call through syscall.Syscall announces to the scheduler that its thread may block.
// That wakes the runtime's monitor thread. It then polls every 20 µs until the process is idle: a tenth of the cost of
// a short connection. A single call through the scheduler is enough for that, so all of them must bypass it. A splice of 256 KiB
// takes some 25 µs, less than a turn that copies as much.

// read and write call recvfrom and sendto. On a socket these have the same effect as read(2) and write(2), with less work
// in the kernel.

func read(fd int, p []byte) (n uintptr, errno syscall.Errno) {
	n, _, errno = syscall.RawSyscall6(syscall.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), 0, 0, 0)
	return
}

func write(fd int, p []byte, flags uintptr) (n uintptr, errno syscall.Errno) {
	n, _, errno = syscall.RawSyscall6(syscall.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), unix.MSG_NOSIGNAL|flags, 0, 0)
	return
}

func writev(fd int, pieces []syscall.Iovec) (n uintptr, errno syscall.Errno) {
	n, _, errno = syscall.RawSyscall6(syscall.SYS_WRITEV, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(pieces))), uintptr(len(pieces)), 0, 0, 0)
	return
}

// peek reads one byte without consuming it.
func peek(fd int) (int, error) {
	var p [1]byte
	n, _, errno := syscall.RawSyscall6(syscall.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(&p)), 1, unix.MSG_PEEK|unix.MSG_DONTWAIT, 0, 0)
	return result(n, errno)
}

// discard consumes up to n bytes, which the kernel does not copy.
func discard(fd, n int) (int, error) {
	count, _, errno := syscall.RawSyscall6(syscall.SYS_RECVFROM, uintptr(fd), 0, uintptr(n), unix.MSG_TRUNC, 0, 0)
	return result(count, errno)
}

// splice moves up to n bytes between a socket and a pipe and never waits. EAGAIN does not distinguish between the two: it
// means the socket only if the pipe is empty before a move into it, or filled before a move out of it.
func splice(from, to, n int) (int, error) {
	moved, _, errno := syscall.RawSyscall6(syscall.SYS_SPLICE, uintptr(from), 0, uintptr(to), 0, uintptr(n), unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
	return result(moved, errno)
}

func socket(family int) (int, error) {
	fd, _, errno := syscall.RawSyscall(syscall.SYS_SOCKET, uintptr(family), unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	return result(fd, errno)
}

func bind(fd int, address *socketAddress) error {
	_, _, errno := syscall.RawSyscall(syscall.SYS_BIND, uintptr(fd), uintptr(unsafe.Pointer(&address.bytes)), uintptr(address.length))
	return asError(errno)
}

func connect(fd int, address *socketAddress) error {
	_, _, errno := syscall.RawSyscall(syscall.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&address.bytes)), uintptr(address.length))
	return asError(errno)
}

func accept(fd int) (int, netip.AddrPort, error) {
	var peer socketAddress
	peer.length = uint32(len(peer.bytes))
	conn, _, errno := syscall.RawSyscall6(syscall.SYS_ACCEPT4, uintptr(fd), uintptr(unsafe.Pointer(&peer.bytes)),
		uintptr(unsafe.Pointer(&peer.length)), unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0, 0)
	n, err := result(conn, errno)
	return n, peer.addrPort(), err
}

// queued reports whether a listener has a connection to accept. It costs much less than an accept that returns EAGAIN: the
// kernel allocates the new socket and its file before it looks into the queue.
func queued(fd int) bool {
	poll := unix.PollFd{Fd: int32(fd), Events: unix.POLLIN}
	var now unix.Timespec
	n, _, errno := syscall.RawSyscall6(syscall.SYS_PPOLL, uintptr(unsafe.Pointer(&poll)), 1, uintptr(unsafe.Pointer(&now)), 0, 0, 0)
	return n > 0 || errno != 0 // accept reports the error
}

func getsockname(fd int) (netip.AddrPort, error) {
	var local socketAddress
	local.length = uint32(len(local.bytes))
	_, _, errno := syscall.RawSyscall(syscall.SYS_GETSOCKNAME, uintptr(fd), uintptr(unsafe.Pointer(&local.bytes)),
		uintptr(unsafe.Pointer(&local.length)))
	return local.addrPort(), asError(errno)
}

func shutdown(fd int) error {
	_, _, errno := syscall.RawSyscall(syscall.SYS_SHUTDOWN, uintptr(fd), unix.SHUT_WR, 0)
	return asError(errno)
}

func closeSocket(fd int) {
	_, _, _ = syscall.RawSyscall(syscall.SYS_CLOSE, uintptr(fd), 0, 0)
}

func epollControl(epfd, operation, fd int, event *unix.EpollEvent) error {
	_, _, errno := syscall.RawSyscall6(syscall.SYS_EPOLL_CTL, uintptr(epfd), uintptr(operation), uintptr(fd),
		uintptr(unsafe.Pointer(event)), 0, 0)
	return asError(errno)
}

// epollReady is epoll_wait without waiting.
func epollReady(epfd int, events []unix.EpollEvent) (int, error) {
	n, _, errno := syscall.RawSyscall6(syscall.SYS_EPOLL_PWAIT, uintptr(epfd), uintptr(unsafe.Pointer(unsafe.SliceData(events))),
		uintptr(len(events)), 0, 0, 0)
	return result(n, errno)
}

func result(n uintptr, errno syscall.Errno) (int, error) {
	if errno != 0 {
		return 0, asError(errno)
	}
	return int(n), nil
}

// asError returns the frequent errors as preallocated values, because converting a syscall.Errno to an interface allocates.
func asError(errno syscall.Errno) error {
	switch errno {
	case 0:
		return nil
	case unix.EAGAIN:
		return ErrAgain
	case unix.EINPROGRESS:
		return errInProgress
	}
	return errno
}

var errInProgress error = unix.EINPROGRESS

// socketAddress is a sockaddr_in or sockaddr_in6 in the kernel's layout: the family in native byte order, the port in
// network byte order, then the address. For IPv6 a flow label precedes the address, and the interface index follows it.
type socketAddress struct {
	bytes  [28]byte
	length uint32
}

func newSocketAddress(address netip.AddrPort) (s socketAddress, err error) {
	binary.BigEndian.PutUint16(s.bytes[2:], address.Port())
	ip := address.Addr()
	if ip.Is4() {
		binary.NativeEndian.PutUint16(s.bytes[:], unix.AF_INET)
		octets := ip.As4()
		copy(s.bytes[4:], octets[:])
		s.length = 16
		return s, nil
	}
	binary.NativeEndian.PutUint16(s.bytes[:], unix.AF_INET6)
	octets := ip.As16()
	copy(s.bytes[8:], octets[:])
	if zone := ip.Zone(); zone != "" {
		index, err := strconv.ParseUint(zone, 10, 32)
		if err != nil {
			return s, &net.AddrError{Err: "zone is not an interface index", Addr: address.String()}
		}
		binary.NativeEndian.PutUint32(s.bytes[24:], uint32(index))
	}
	s.length = 28
	return s, nil
}

// addrPort returns the zero AddrPort if the family is neither IPv4 nor IPv6.
func (s *socketAddress) addrPort() netip.AddrPort {
	port := binary.BigEndian.Uint16(s.bytes[2:])
	switch binary.NativeEndian.Uint16(s.bytes[:]) {
	case unix.AF_INET:
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(s.bytes[4:8])), port)
	case unix.AF_INET6:
		ip := netip.AddrFrom16([16]byte(s.bytes[8:24]))
		if index := binary.NativeEndian.Uint32(s.bytes[24:]); index != 0 {
			ip = ip.WithZone(strconv.FormatUint(uint64(index), 10))
		}
		return netip.AddrPortFrom(ip, port)
	}
	return netip.AddrPort{}
}
