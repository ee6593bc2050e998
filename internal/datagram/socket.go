package datagram

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"syscall"

	"golang.org/x/sys/unix"
)

// socket is a UDP socket of the caller's network that is not connected.
type socket struct {
	conn *net.UDPConn
	raw  syscall.RawConn
	ipv6 bool
}

var errClosed = errors.New("the socket is closed")

func newSocket(ipv6 bool) (*socket, error) {
	network := "udp4"
	if ipv6 {
		network = "udp6"
	}
	conn, err := net.ListenUDP(network, nil)
	if err != nil {
		return nil, err
	}
	s := &socket{conn: conn, ipv6: ipv6}
	if s.raw, err = conn.SyscallConn(); err == nil {
		err = s.reportErrors()
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return s, nil
}

// reportErrors makes the kernel queue ICMP errors with the destinations that they are about.
func (s *socket) reportErrors() error {
	level, option := unix.SOL_IP, unix.IP_RECVERR
	if s.ipv6 {
		level, option = unix.SOL_IPV6, unix.IPV6_RECVERR
	}
	var failure error
	err := s.raw.Control(func(fd uintptr) { failure = unix.SetsockoptInt(int(fd), level, option, 1) })
	return errors.Join(err, failure)
}

func (s *socket) close() { s.conn.Close() }

// send sends without waiting. The error is a unix.Errno or errClosed.
func (s *socket) send(to netip.AddrPort, payload []byte) error {
	var address unix.Sockaddr
	if s.ipv6 {
		address = &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}
	} else {
		address = &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}
	}
	var failure error
	err := s.raw.Control(func(fd uintptr) {
		failure = unix.Sendto(int(fd), payload, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, address)
	})
	if err != nil {
		return errClosed
	}
	return failure
}

// wait returns when the socket has a datagram or an error. It returns errClosed when the socket is closed.
func (s *socket) wait() (failed bool, err error) {
	polled := []unix.PollFd{{Events: unix.POLLIN}}
	err = s.raw.Read(func(fd uintptr) bool {
		polled[0].Fd = int32(fd)
		n, _ := unix.Poll(polled, 0)
		return n > 0
	})
	if err != nil {
		return false, errClosed
	}
	return polled[0].Revents&unix.POLLERR != 0, nil
}

// receive returns the next datagram. The error is a unix.Errno or errClosed.
func (s *socket) receive(buffer []byte) (n int, from netip.AddrPort, err error) {
	var sender unix.Sockaddr
	controlErr := s.raw.Control(func(fd uintptr) { n, sender, err = unix.Recvfrom(int(fd), buffer, unix.MSG_DONTWAIT) })
	if controlErr != nil {
		return 0, from, errClosed
	}
	return n, addressOf(sender), err
}

// failure takes the next ICMP error from the socket's queue, with the destination of its datagram. cause is 0 for an error
// that is not ICMP's, or that a sender is not notified of.
func (s *socket) failure() (to netip.AddrPort, cause unix.Errno, err error) {
	var control [256]byte
	var n int
	var about unix.Sockaddr
	controlErr := s.raw.Control(func(fd uintptr) {
		_, n, _, about, err = unix.Recvmsg(int(fd), nil, control[:], unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
	})
	if controlErr != nil {
		return to, 0, errClosed
	}
	if err != nil {
		return to, 0, err
	}
	messages, err := unix.ParseSocketControlMessage(control[:n])
	if err != nil {
		return to, 0, err
	}
	for _, m := range messages {
		if len(m.Data) < 8 || m.Header.Type != unix.IP_RECVERR && m.Header.Type != unix.IPV6_RECVERR {
			continue
		}
		number, origin := unix.Errno(binary.NativeEndian.Uint32(m.Data)), m.Data[4] // struct sock_extended_err
		if (origin == unix.SO_EE_ORIGIN_ICMP || origin == unix.SO_EE_ORIGIN_ICMP6) && number != unix.EMSGSIZE {
			cause = number
		}
	}
	return addressOf(about), cause, nil
}

func addressOf(from unix.Sockaddr) netip.AddrPort {
	switch from := from.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(from.Addr), uint16(from.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(from.Addr), uint16(from.Port))
	}
	return netip.AddrPort{}
}
