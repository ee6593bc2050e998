package sandbox

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/datagram"
	"github.com/pillion-proxy/pillion/internal/sockopt"
)

var (
	listenConfig = func() *net.ListenConfig {
		config := &net.ListenConfig{Control: sockopt.ListenControl}
		config.SetMultipathTCP(false)
		return config
	}()
	background = context.Background()
)

// The addresses of the command. 192.0.0.8 is the IPv4 dummy address (RFC 7600 §4.8), and 100::/64 is discarded by routers
// (RFC 6666), so neither is a destination of the command. The IPv6 address counts as a global one in the choice between the
// families (RFC 6724), as the caller's own would.
var (
	Address4 = netip.MustParseAddr("192.0.0.8")
	Address6 = netip.MustParseAddr("100::8")
)

const linkName, peerName = "pillion0", "pillion1"

// makeLinks makes a link with an address and default routes. Its other end is in the same namespace, so packets that leave by
// it come back, and are discarded unless a packet socket takes them. Without a link, routes could not have a source address.
func (h *inside) makeLinks() error {
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		return failed("enabling the loopback", err)
	}
	// The settings are optional: a failure leaves the default.
	_ = os.WriteFile("/proc/sys/net/ipv6/conf/default/addr_gen_mode", []byte("1"), 0) // no link-local address
	_ = os.WriteFile("/proc/sys/net/ipv6/conf/default/accept_dad", []byte("0"), 0)
	if os.Getuid() == 0 {
		// The command cannot have CAP_NET_BIND_SERVICE, and could bind low ports outside.
		_ = os.WriteFile("/proc/sys/net/ipv4/ip_unprivileged_port_start", []byte("0"), 0)
	}
	// Packets leave one by one, also those of a program that lets the kernel segment its datagrams (UDP_SEGMENT).
	pair := &netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: linkName, MTU: 65535, HardwareAddr: datagram.HardwareAddress[:], GSOMaxSegs: 1}, PeerName: peerName,
	}
	if err := netlink.LinkAdd(pair); err != nil {
		return failed("adding a veth pair", err)
	}
	for _, name := range []string{peerName, linkName} {
		link, err := netlink.LinkByName(name)
		if err == nil {
			err = netlink.LinkSetARPOff(link)
		}
		if err == nil {
			err = netlink.LinkSetUp(link)
		}
		if err != nil {
			return failed("enabling link "+name, err)
		}
	}
	link, err := netlink.LinkByName(linkName)
	if err != nil {
		return failed("reading link "+linkName, err)
	}
	if err := addAddress(link, Address4); err != nil {
		return err
	}
	if !h.config.IPv6 {
		return nil
	}
	err = addAddress(link, Address6)
	if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EAFNOSUPPORT) {
		return nil // IPv6 is disabled
	}
	return err
}

// addAddress adds an address and the default route of its family.
func addAddress(link netlink.Link, address netip.Addr) error {
	whole := &net.IPNet{IP: address.AsSlice(), Mask: net.CIDRMask(address.BitLen(), address.BitLen())}
	entry := &netlink.Addr{IPNet: whole}
	everything := &net.IPNet{IP: make(net.IP, len(whole.IP)), Mask: net.CIDRMask(0, address.BitLen())}
	if address.Is6() {
		entry.Flags = unix.IFA_F_NODAD
	}
	if err := netlink.AddrAdd(link, entry); err != nil {
		return failed("adding the address "+address.String(), err)
	}
	route := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: everything, Src: whole.IP, Scope: netlink.SCOPE_LINK}
	if address.Is6() {
		route.Scope = netlink.SCOPE_UNIVERSE
	}
	return failed("adding a default route", netlink.RouteAdd(route))
}

// openPackets opens packet sockets at the end of the link where the command's packets arrive. They have room for a burst of
// datagrams if the kernel permits it.
func (s *sockets) openPackets() error {
	link, err := netlink.LinkByName(peerName)
	if err != nil {
		return failed("reading link "+peerName, err)
	}
	for _, protocol := range []uint16{unix.ETH_P_IP, unix.ETH_P_IPV6} {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return failed("opening a packet socket", err)
		}
		const room = 4 << 20
		if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, room) != nil {
			_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, room)
		}
		bigEndian := binary.NativeEndian.Uint16([]byte{byte(protocol >> 8), byte(protocol)})
		if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: bigEndian, Ifindex: link.Attrs().Index}); err != nil {
			unix.Close(fd)
			return failed("binding a packet socket", err)
		}
		s.files, s.kinds = append(s.files, fd), append(s.kinds, "packets")
	}
	return nil
}

// parseListening reads the listening sockets of a file such as /proc/net/tcp.
func parseListening(text string) []string {
	const listen = "0A"
	var all []string
	for i, line := range strings.Split(text, "\n") {
		fields := strings.Fields(line)
		if i == 0 || len(fields) < 4 || fields[3] != listen {
			continue
		}
		if address, err := parseHexAddress(fields[1]); err == nil {
			all = append(all, address.String())
		}
	}
	return all
}

// parseHexAddress reads ADDRESS:PORT in hexadecimal. The address is a list of 32-bit words in the machine's byte order.
func parseHexAddress(text string) (netip.AddrPort, error) {
	host, port, _ := strings.Cut(text, ":")
	raw, err := hex.DecodeString(host)
	if err != nil || len(raw)%4 != 0 {
		return netip.AddrPort{}, fmt.Errorf("%q is not an address", text)
	}
	if littleEndian {
		for word := range slices.Chunk(raw, 4) {
			slices.Reverse(word)
		}
	}
	address, ok := netip.AddrFromSlice(raw)
	number, err := strconv.ParseUint(port, 16, 16)
	if !ok || err != nil {
		return netip.AddrPort{}, fmt.Errorf("%q is not an address", text)
	}
	return netip.AddrPortFrom(address.Unmap(), uint16(number)), nil
}
