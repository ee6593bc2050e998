package iptables

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/capture"
)

// Question is a packet as people describe it. What they leave out is asked of the routing table.
type Question struct {
	// From is the sender, if the packet comes in. Without it the packet is sent by a local process.
	From netip.Addr
	// UID and GID are those of the local process.
	UID, GID uint32
	// Src is the source address of a local process's packet; the kernel's choice when it is not valid.
	Src netip.Addr
	// Dst is the destination. Its address may be left out if From is set: it is the one by which From is answered.
	Dst netip.AddrPort
	// Interface is where the packet comes in or goes out; when empty, the one that leads to From or to Dst.
	Interface string
	Protocol  Protocol // TCP when empty
	Mark      uint32
	State     State
}

// Packet is the packet that the question is about. It asks the routing table of the calling thread's namespace.
func (q Question) Packet() (Packet, error) {
	p := Packet{Protocol: q.Protocol, UID: q.UID, GID: q.GID, Src: q.Src, Dst: q.Dst, Mark: q.Mark, State: q.State}
	if p.Protocol == "" {
		p.Protocol = TCP
	}
	peer := q.Dst.Addr().WithZone("")
	if q.From.IsValid() {
		peer = q.From
		p.Src, p.In, p.UID, p.GID = q.From, q.Interface, 0, 0
	} else {
		p.Out = q.Interface
	}
	if !peer.IsValid() {
		return p, errors.New("the destination has no address: write one such as 198.51.100.7:443; only where it is said from where the packet comes can it be left out")
	}
	if q.Interface == "" || !p.Src.IsValid() || !p.Dst.Addr().IsValid() {
		link, own, err := routeTo(peer, q.Src, q.Mark)
		if err != nil {
			return p, err
		}
		switch {
		case !q.From.IsValid():
			if q.Interface == "" {
				p.Out = link
			}
			if !p.Src.IsValid() {
				p.Src = own
			}
		case link == loopback && q.Interface == "":
			return p, fmt.Errorf("%s is an address of this machine: what comes from it is sent by a local process; leave the sender out and say whose it is", q.From)
		default:
			if q.Interface == "" {
				p.In = link
			}
			if !p.Dst.Addr().IsValid() {
				p.Dst = netip.AddrPortFrom(own, q.Dst.Port())
			}
		}
	}
	if p.Src.IsValid() && familyOf(p.Src) != familyOf(p.Dst.Addr()) {
		return p, fmt.Errorf("%s and %s are not of one family", p.Src, p.Dst.Addr())
	}
	return p, nil
}

// routeTo is the interface by which the address is reached, and the source address that the kernel chooses.
func routeTo(address, src netip.Addr, mark uint32) (link string, own netip.Addr, err error) {
	options := &netlink.RouteGetOptions{Mark: mark}
	if src.IsValid() {
		options.SrcAddr = src.AsSlice()
	}
	routes, err := netlink.RouteGetWithOptions(address.AsSlice(), options)
	if err == nil && len(routes) == 0 {
		err = unix.ENETUNREACH
	}
	if err != nil {
		return "", own, fmt.Errorf("looking for the route to %s: %w; name the interface and the addresses to do without", address, err)
	}
	own, _ = netip.AddrFromSlice(routes[0].Src)
	if routes[0].Type == unix.RTN_LOCAL {
		return loopback, own.Unmap(), nil
	}
	found, err := net.InterfaceByIndex(routes[0].LinkIndex)
	if err != nil {
		return "", own, fmt.Errorf("looking for the interface to %s: %w", address, err)
	}
	return found.Name, own.Unmap(), nil
}

// Explanation is a packet's way through the rules, for people and for programs.
type Explanation struct {
	Packet string `json:"packet"`
	// Met are the rules that matched, in order, and those of which nobody here knows whether they match.
	Met     []Shown `json:"met"`
	Action  Action  `json:"action,omitempty"`
	Port    uint16  `json:"port,omitempty"`
	Verdict string  `json:"verdict"`
	// Uncertain tells that an unknown rule may decide otherwise.
	Uncertain bool `json:"uncertain"`
}

// Explain walks the packet through the rules.
func Explain(p Packet, held []Held) Explanation {
	walk := Trace(p, held...)
	e := Explanation{Packet: p.String(), Met: []Shown{}, Action: walk.Verdict.Action, Port: walk.Verdict.Port, Verdict: walk.inWords(p)}
	for _, m := range walk.Met {
		family := Held{m.Flavour, Ruleset{Family: familyOf(p.Dst.Addr())}}
		e.Met = append(e.Met, m.Rule.shown(family, m.Place))
		e.Uncertain = e.Uncertain || m.Unknown()
	}
	return e
}

// String tells the way, in the manner of ShowText, and the verdict in its last line.
func (e Explanation) String() string {
	var text strings.Builder
	text.WriteString(e.Packet + "\n")
	for _, s := range e.Met {
		remark := s.remark()
		if s.Unknown {
			remark = "not ours: whether it matches, and what then, is not known here"
		}
		fmt.Fprintf(&text, "    %s %s: %s\n      # %s\n", s.place(), s.Chain, s.Rule, remark)
	}
	text.WriteString(e.Verdict)
	if e.Uncertain {
		text.WriteString("; unless a rule on the way that is not known here decides otherwise")
	}
	return text.String() + "\n"
}

// String describes the packet.
func (p Packet) String() string {
	words := []string{string(cmp.Or(p.Protocol, TCP)), "to", p.Dst.String()}
	if p.Src.IsValid() {
		words = append(words, "from", p.Src.String())
	}
	if p.In != "" {
		words = append(words, "coming in on", p.In)
	} else {
		words = append(words, fmt.Sprintf("going out on %s, sent by user %d, group %d", p.Out, p.UID, p.GID))
	}
	if p.Mark != 0 {
		words = append(words, fmt.Sprintf("with mark %#x", p.Mark))
	}
	switch p.State {
	case Invalid:
		words = append(words, "which belongs to no connection")
	case Established:
		words = append(words, "of a connection under way")
	}
	return strings.Join(words, " ")
}

// inWords is the verdict, and the reason for it.
func (w Walk) inWords(p Packet) string {
	var last, spared Rule
	for _, m := range w.Met {
		if m.Unknown() {
			continue
		}
		last = m.Rule
		switch last.Target.(type) {
		case Return, Accept:
			if m.Table != Raw {
				spared = last
			}
		}
	}
	switch w.Verdict.Action {
	case Dropped:
		if _, byRule := last.Target.(Drop); byRule {
			return "dropped: " + because(last)
		}
		return "dropped: by the policy of a built-in chain"
	case Given:
		return fmt.Sprintf("captured: goes, as it is, to the agent's inbound port %d", w.Verdict.Port)
	case Redirected:
		for _, m := range w.Met { // what comes behind it on the loopback does not change it
			if _, ok := m.Rule.Target.(Redirect); ok {
				last = m.Rule
			}
		}
		direction, _, _ := strings.Cut(last.ID, "/")
		switch direction {
		case "inbound", "outbound":
			return fmt.Sprintf("captured: goes to the agent's %s port %d", direction, w.Verdict.Port)
		case "dns":
			return fmt.Sprintf("captured: goes to the agent's DNS port %d", w.Verdict.Port)
		}
		return fmt.Sprintf("redirected to port %d by a rule that is not ours", w.Verdict.Port)
	}
	switch {
	case spared.Target == Accept{} && spared.ID == "inbound/divert":
		return "captured: its connection was given to the agent, and it goes there, too"
	case spared.Target != nil:
		return "left alone: " + because(spared)
	case p.State == Established:
		return "left alone: address translation is decided by the first packet of a connection, and the others follow it"
	}
	return "left alone: no rule captures it"
}

func because(r Rule) string {
	switch {
	case r.Why != "":
		return r.Why
	case r.ID != "":
		return "by " + r.ID
	}
	return "by a rule that is not ours"
}

// ParseState reads what connection tracking says of a packet.
func ParseState(text string) (State, error) {
	switch text {
	case "new":
		return "", nil
	case "established":
		return Established, nil
	case "invalid":
		return Invalid, nil
	}
	return "", fmt.Errorf("%q is not a state: use new, established or invalid", text)
}

// ParseProtocol reads tcp or udp.
func ParseProtocol(text string) (Protocol, error) {
	switch p := Protocol(text); p {
	case TCP, UDP:
		return p, nil
	}
	return "", fmt.Errorf("%q is not a protocol: use tcp or udp", text)
}

// ParseDestination reads address and port, or a port alone behind a colon.
func ParseDestination(text string) (netip.AddrPort, error) {
	if port, alone := strings.CutPrefix(text, ":"); alone && !strings.Contains(port, ":") {
		number, err := capture.ParsePort(port)
		return netip.AddrPortFrom(netip.Addr{}, number), err
	}
	dst, err := netip.ParseAddrPort(text)
	if err != nil || dst.Port() == 0 {
		return dst, fmt.Errorf("%q is not a destination: write address and port, such as 198.51.100.7:443 or [2001:db8::7]:443, or a port alone, such as :8080", text)
	}
	return netip.AddrPortFrom(dst.Addr().Unmap(), dst.Port()), nil
}

// ParseAddress reads an address without a port.
func ParseAddress(text string) (netip.Addr, error) {
	address, err := netip.ParseAddr(text)
	if err != nil {
		return address, fmt.Errorf("%q is not an address: write one such as 203.0.113.9 or 2001:db8::9", text)
	}
	return address.Unmap(), nil
}
