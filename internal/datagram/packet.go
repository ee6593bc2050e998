package datagram

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"
)

// HardwareAddress is that of the link at which answers arrive. The other end of the pair has any other address.
var HardwareAddress = [6]byte{0x02, 0, 0, 0, 0, 0x08}

const (
	frameHeader = 14 // of Ethernet
	header4     = 20
	header6     = 40
	headerUDP   = 8
	maxPacket   = 65535 // also the MTU of the link
	maxFrame    = frameHeader + maxPacket
	headroom    = frameHeader + header6 + headerUDP

	protocolUDP, protocolICMP, protocolICMP6 = 17, 1, 58
)

// packet is a datagram with its addresses. The payload belongs to the frame that it was parsed from.
type packet struct {
	source, destination netip.AddrPort
	payload             []byte
}

// parse returns the datagram of a frame. It refuses fragments, options of IPv6 and everything that is not whole.
func parse(frame []byte) (p packet, ok bool) {
	if len(frame) < frameHeader+header4 {
		return p, false
	}
	var source, destination netip.Addr
	ip := frame[frameHeader:]
	switch kind := binary.BigEndian.Uint16(frame[12:]); {
	case kind == unix.ETH_P_IP && ip[0]>>4 == 4:
		size, length := int(ip[0]&0xf)*4, int(binary.BigEndian.Uint16(ip[2:]))
		fragment := binary.BigEndian.Uint16(ip[6:]) & 0x3fff // more fragments, and the offset
		if size < header4 || length < size || length > len(ip) || ip[9] != protocolUDP || fragment != 0 {
			return p, false
		}
		source, destination = netip.AddrFrom4([4]byte(ip[12:16])), netip.AddrFrom4([4]byte(ip[16:20]))
		ip = ip[size:length]
	case kind == unix.ETH_P_IPV6 && ip[0]>>4 == 6 && len(ip) >= header6:
		length := header6 + int(binary.BigEndian.Uint16(ip[4:]))
		if length > len(ip) || ip[6] != protocolUDP {
			return p, false
		}
		source, destination = netip.AddrFrom16([16]byte(ip[8:24])), netip.AddrFrom16([16]byte(ip[24:40]))
		ip = ip[header6:length]
	default:
		return p, false
	}
	if len(ip) < headerUDP {
		return p, false
	}
	length := int(binary.BigEndian.Uint16(ip[4:]))
	if length < headerUDP || length > len(ip) {
		return p, false
	}
	p.source = netip.AddrPortFrom(source, binary.BigEndian.Uint16(ip))
	p.destination = netip.AddrPortFrom(destination, binary.BigEndian.Uint16(ip[2:]))
	p.payload = ip[headerUDP:length]
	return p, true
}

// answer writes headers before a payload that begins at buffer[headroom], and returns the frame. It returns nil if the
// datagram does not fit into a packet.
func answer(buffer []byte, size int, from, to netip.AddrPort) []byte {
	header := header4
	if to.Addr().Is6() {
		header = header6
	}
	if header+headerUDP+size > maxPacket {
		return nil
	}
	frame := buffer[headroom-headerUDP-header-frameHeader : headroom+size]
	datagram := frame[frameHeader+header:]
	binary.BigEndian.PutUint16(datagram, from.Port())
	binary.BigEndian.PutUint16(datagram[2:], to.Port())
	binary.BigEndian.PutUint16(datagram[4:], uint16(len(datagram)))
	datagram[6], datagram[7] = 0, 0
	sum := checksum(pseudo(from.Addr(), to.Addr(), protocolUDP, len(datagram)), datagram)
	if sum == 0 {
		sum = 0xffff // 0 means that there is none (RFC 768)
	}
	binary.BigEndian.PutUint16(datagram[6:], sum)
	address(frame, from.Addr(), to.Addr(), protocolUDP)
	return frame
}

// address writes the headers of Ethernet and IP of a whole frame.
func address(frame []byte, from, to netip.Addr, protocol byte) {
	copy(frame, HardwareAddress[:])
	copy(frame[6:12], []byte{0x02, 0, 0, 0, 0, 0x09})
	ip := frame[frameHeader:]
	if to.Is6() {
		binary.BigEndian.PutUint16(frame[12:], unix.ETH_P_IPV6)
		clear(ip[:8])
		ip[0] = 6 << 4
		binary.BigEndian.PutUint16(ip[4:], uint16(len(ip)-header6))
		ip[6], ip[7] = protocol, 64
		copy(ip[8:], from.AsSlice())
		copy(ip[24:], to.AsSlice())
		return
	}
	binary.BigEndian.PutUint16(frame[12:], unix.ETH_P_IP)
	clear(ip[:header4])
	ip[0] = 4<<4 | header4/4
	binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)))
	ip[6] = 0x40 // do not fragment, so an identification is not needed (RFC 6864 §4.1)
	ip[8], ip[9] = 64, protocol
	copy(ip[12:], from.AsSlice())
	copy(ip[16:], to.AsSlice())
	binary.BigEndian.PutUint16(ip[10:], checksum(0, ip[:header4]))
}

// unreachable returns a frame with an ICMP error about a datagram of client. The kernel finds the socket by the addresses
// and ports of the quoted headers.
func unreachable(client, destination netip.AddrPort, cause unix.Errno) []byte {
	header, protocol := header4, byte(protocolICMP)
	if client.Addr().Is6() {
		header, protocol = header6, protocolICMP6
	}
	frame := make([]byte, frameHeader+header+8+header+headerUDP)
	message := frame[frameHeader+header:]
	message[0], message[1] = codeOf(cause, client.Addr().Is6())
	quoted := message[8:]
	// A quoted packet has no Ethernet header; address writes one in front of it, which is overwritten here.
	scratch := make([]byte, frameHeader+len(quoted))
	address(scratch, client.Addr(), destination.Addr(), protocolUDP)
	copy(quoted, scratch[frameHeader:])
	binary.BigEndian.PutUint16(quoted[header:], client.Port())
	binary.BigEndian.PutUint16(quoted[header+2:], destination.Port())
	binary.BigEndian.PutUint16(quoted[header+4:], headerUDP)
	begin := uint32(0)
	if protocol == protocolICMP6 {
		begin = pseudo(destination.Addr(), client.Addr(), protocol, len(message))
	}
	binary.BigEndian.PutUint16(message[2:], checksum(begin, message))
	address(frame, destination.Addr(), client.Addr(), protocol)
	return frame
}

// codeOf returns type and code of "destination unreachable" for an error (RFC 792, RFC 4443 §3.1).
func codeOf(cause unix.Errno, ipv6 bool) (kind, code byte) {
	if ipv6 {
		switch cause {
		case unix.ECONNREFUSED:
			return 1, 4
		case unix.EACCES, unix.EPERM:
			return 1, 1
		case unix.ENETUNREACH:
			return 1, 0
		}
		return 1, 3
	}
	switch cause {
	case unix.ECONNREFUSED:
		return 3, 3
	case unix.EACCES, unix.EPERM:
		return 3, 13
	case unix.ENETUNREACH:
		return 3, 0
	}
	return 3, 1
}

// pseudo is the sum of the pseudo-header of UDP and ICMPv6.
func pseudo(from, to netip.Addr, protocol byte, length int) uint32 {
	return sum(sum(uint32(protocol)+uint32(length), from.AsSlice()), to.AsSlice())
}

// sum adds 16-bit words (RFC 1071). A packet is too short for it to overflow.
func sum(total uint32, bytes []byte) uint32 {
	for ; len(bytes) >= 2; bytes = bytes[2:] {
		total += uint32(bytes[0])<<8 | uint32(bytes[1])
	}
	if len(bytes) == 1 {
		total += uint32(bytes[0]) << 8
	}
	return total
}

func checksum(begin uint32, bytes []byte) uint16 {
	total := sum(begin, bytes)
	for total > 0xffff {
		total = total>>16 + total&0xffff
	}
	return ^uint16(total)
}
