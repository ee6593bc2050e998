package kernel

import (
	"encoding/binary"
	"net/netip"
	"syscall"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Messages of rtnetlink. The types that package netlink has for addresses, routes and rules are not used: they bring the
// attributes of all kinds of links and encapsulations, which take 0.27 MB of the program.

// change asks the kernel for a change and returns its refusal.
func change(message, flags int, header nl.NetlinkRequestData, attributes ...*nl.RtAttr) error {
	_, err := newRequest(message, flags|unix.NLM_F_ACK, header, attributes).Execute(unix.NETLINK_ROUTE, 0)
	return err
}

func newRequest(message, flags int, header nl.NetlinkRequestData, attributes []*nl.RtAttr) *nl.NetlinkRequest {
	request := nl.NewNetlinkRequest(message, flags)
	request.AddData(header)
	for _, attribute := range attributes {
		request.AddData(attribute)
	}
	return request
}

func number(attribute int, value uint32) *nl.RtAttr {
	return nl.NewRtAttr(attribute, nl.Uint32Attr(value))
}

// entry is a route or a rule of the kernel. A rule's header has the form of a route's.
type entry struct {
	*nl.RtMsg
	attributes map[uint16]syscall.NetlinkRouteAttr
}

// entries asks for routes or rules. Of a dump that was interrupted it returns an error alone.
func entries(message, flags int, answer uint16, header *nl.RtMsg, attributes ...*nl.RtAttr) ([]entry, error) {
	messages, err := newRequest(message, flags, header, attributes).Execute(unix.NETLINK_ROUTE, answer)
	if err != nil {
		return nil, err
	}
	var list []entry
	for _, m := range messages {
		if len(m) < unix.SizeofRtMsg {
			return nil, unix.EINVAL
		}
		e := entry{RtMsg: nl.DeserializeRtMsg(m)}
		if e.attributes, err = nl.ParseRouteAttrAsMap(m[unix.SizeofRtMsg:]); err != nil {
			return nil, err
		}
		list = append(list, e)
	}
	return list, nil
}

func (e entry) has(attribute uint16) bool {
	_, ok := e.attributes[attribute]
	return ok
}

// number is 0 if the attribute is missing.
func (e entry) number(attribute uint16) uint32 {
	if value := e.attributes[attribute].Value; len(value) >= 4 {
		return binary.NativeEndian.Uint32(value)
	}
	return 0
}

// addressChange changes a single address of a link. Nodes with the same IPv6 address are not looked for.
func addressChange(message, flags, link int, address netip.Addr, attributes ...*nl.RtAttr) error {
	header := nl.NewIfAddrmsg(unix.AF_INET)
	if address.Is6() {
		header.Family, header.Flags = unix.AF_INET6, unix.IFA_F_NODAD
	}
	header.Index, header.Prefixlen = uint32(link), uint8(address.BitLen())
	own := []*nl.RtAttr{nl.NewRtAttr(unix.IFA_LOCAL, address.AsSlice()), nl.NewRtAttr(unix.IFA_ADDRESS, address.AsSlice())}
	return change(message, flags, header, append(own, attributes...)...)
}

// AddAddress adds an address to a link, without a network around it.
func AddAddress(link int, address netip.Addr) error {
	return addressChange(unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_EXCL, link, address)
}

// AddDefaultRoute adds a route to everywhere by a link. source is an address of the link, and packets have it by default.
func AddDefaultRoute(link int, source netip.Addr) error {
	header := nl.NewRtMsg()
	header.Family, header.Scope = unix.AF_INET, unix.RT_SCOPE_LINK
	if source.Is6() {
		header.Family, header.Scope = unix.AF_INET6, unix.RT_SCOPE_UNIVERSE
	}
	return change(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_EXCL, header,
		nl.NewRtAttr(unix.RTA_PREFSRC, source.AsSlice()), number(unix.RTA_OIF, uint32(link)))
}
