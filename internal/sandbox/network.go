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
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/datagram"
	"github.com/pillion-proxy/pillion/internal/sockopt"
	"github.com/pillion-proxy/pillion/iptables/kernel"
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

const (
	linkName, peerName = "pillion0", "pillion1"
	maxMTU             = 65535
)

// changeSettings changes the kernel's defaults for links and sockets, before there are any. The settings are optional: a failure
// leaves the default.
func changeSettings() {
	_ = os.WriteFile("/proc/sys/net/ipv6/conf/default/addr_gen_mode", []byte("1"), 0) // no link-local address
	_ = os.WriteFile("/proc/sys/net/ipv6/conf/default/accept_dad", []byte("0"), 0)
	// Packets stay in this kernel. BBR, the default of some machines, would delay them to find the rate of a path. Reno does
	// not pace, and is the algorithm that every namespace may have.
	_ = os.WriteFile("/proc/sys/net/ipv4/tcp_congestion_control", []byte("reno"), 0)
	if os.Getuid() == 0 {
		// The command cannot have CAP_NET_BIND_SERVICE, and could bind low ports outside.
		_ = os.WriteFile("/proc/sys/net/ipv4/ip_unprivileged_port_start", []byte("0"), 0)
	}
}

// makeLinks makes a link with an address and default routes. Its other end is in the same namespace, so packets that leave by
// it come back, and are discarded unless a packet socket takes them. Without a link, routes could not have a source address.
func (h *inside) makeLinks() error {
	if err := addPair(); err != nil {
		return failed("adding a veth pair", err)
	}
	if err := kernel.LinkUp(peerName); err != nil {
		return failed("enabling link "+peerName, err)
	}
	link, err := net.InterfaceByName(linkName)
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

// addPair adds a veth pair without ARP, with one end up: the other one can only be up when it has its peer. netlink.LinkAdd
// is not used, because it has the attributes of all kinds of links, which take 0.2 MB of the program.
func addPair() error {
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(nl.IFLA_INFO_KIND, nl.NonZeroTerminated("veth"))
	peer := info.AddRtAttr(nl.IFLA_INFO_DATA, nil).AddRtAttr(nl.VETH_INFO_PEER, nil)
	there := nl.NewIfInfomsgChild(peer, unix.AF_UNSPEC)
	there.Flags, there.Change = unix.IFF_NOARP, unix.IFF_NOARP
	peer.AddRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(peerName))
	peer.AddRtAttr(unix.IFLA_MTU, nl.Uint32Attr(maxMTU))

	here := nl.NewIfInfomsg(unix.AF_UNSPEC)
	here.Flags, here.Change = unix.IFF_UP|unix.IFF_NOARP, unix.IFF_UP|unix.IFF_NOARP
	request := nl.NewNetlinkRequest(unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL|unix.NLM_F_ACK)
	for _, data := range []nl.NetlinkRequestData{
		here, nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(linkName)), nl.NewRtAttr(unix.IFLA_MTU, nl.Uint32Attr(maxMTU)),
		nl.NewRtAttr(unix.IFLA_ADDRESS, datagram.HardwareAddress[:]),
		// Packets leave one by one, also those of a program that lets the kernel segment its datagrams (UDP_SEGMENT).
		nl.NewRtAttr(unix.IFLA_GSO_MAX_SEGS, nl.Uint32Attr(1)), info,
	} {
		request.AddData(data)
	}
	_, err := request.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

// addAddress adds an address and the default route of its family.
func addAddress(link *net.Interface, address netip.Addr) error {
	if err := kernel.AddAddress(link.Index, address); err != nil {
		return failed("adding the address "+address.String(), err)
	}
	return failed("adding a default route", kernel.AddDefaultRoute(link.Index, address))
}

// openPackets opens packet sockets at the end of the link where the command's packets arrive. They have room for a burst of
// datagrams if the kernel permits it.
func (s *sockets) openPackets() error {
	link, err := net.InterfaceByName(peerName)
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
		if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: bigEndian, Ifindex: link.Index}); err != nil {
			unix.Close(fd)
			return failed("binding a packet socket", err)
		}
		s.files, s.kinds = append(s.files, fd), append(s.kinds, "packets")
	}
	return nil
}

// awaitAddress6 waits until packets to the IPv6 address are delivered. The kernel adds the route to a new address some time
// later, from a work queue, also without duplicate address detection. Until then answers would be lost.
func awaitAddress6() {
	const pause, most = 100 * time.Microsecond, 5000
	for range most {
		if local, err := kernel.IsLocal(Address6); local || err != nil { // an error: there is no IPv6
			return
		}
		time.Sleep(pause)
	}
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
