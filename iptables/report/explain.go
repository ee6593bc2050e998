package report

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/iptables/kernel"
	"github.com/pillion-proxy/pillion/iptables/ruleset"
	"github.com/pillion-proxy/pillion/iptables/trace"
)

// Question is a packet as people describe it. The routing table supplies what is missing.
type Question struct {
	// From is the sender of an incoming packet. Without it, a local process sends the packet.
	From netip.Addr
	// UID and GID are those of the local process.
	UID, GID uint32
	// Src is the source address of a local process's packet. If it is invalid, the kernel's choice is used.
	Src netip.Addr
	// Dst is the destination. With From, its address may be left out: it is then the local address from which From would
	// be answered.
	Dst netip.AddrPort
	// Interface is where the packet arrives or leaves. If it is empty, it is the one that leads to From or Dst.
	Interface string
	Protocol  ruleset.Protocol // TCP when empty
	Mark      uint32
	State     ruleset.State
}

// Packet returns the packet of the question. It reads the routing table of the calling thread's namespace.
func (q Question) Packet() (trace.Packet, error) {
	p := trace.Packet{Protocol: q.Protocol, UID: q.UID, GID: q.GID, Src: q.Src, Dst: q.Dst, Mark: q.Mark, State: q.State}
	if p.Protocol == "" {
		p.Protocol = ruleset.TCP
	}
	peer := q.Dst.Addr().WithZone("")
	if q.From.IsValid() {
		peer = q.From
		p.Src, p.In, p.UID, p.GID = q.From, q.Interface, 0, 0
	} else {
		p.Out = q.Interface
	}
	if !peer.IsValid() {
		return p, errors.New("the destination has no address: write one such as 198.51.100.7:443; it is optional only with a sender")
	}
	if q.Interface == "" || !p.Src.IsValid() || !p.Dst.Addr().IsValid() {
		link, own, err := kernel.RouteTo(peer, q.Src, q.Mark)
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
		case link == ruleset.Loopback && q.Interface == "":
			return p, fmt.Errorf("%s is an address of this machine, so a local process is the sender: leave the sender out and give its user", q.From)
		default:
			if q.Interface == "" {
				p.In = link
			}
			if !p.Dst.Addr().IsValid() {
				p.Dst = netip.AddrPortFrom(own, q.Dst.Port())
			}
		}
	}
	if p.Src.IsValid() && ruleset.FamilyOf(p.Src) != ruleset.FamilyOf(p.Dst.Addr()) {
		return p, fmt.Errorf("%s and %s are of different families", p.Src, p.Dst.Addr())
	}
	return p, nil
}

// Explanation is a packet's path through the rules, for people and programs.
type Explanation struct {
	Packet string `json:"packet"`
	// Met lists the rules that matched, in order, and the foreign rules on the way.
	Met     []Shown      `json:"met"`
	Action  trace.Action `json:"action,omitempty"`
	Port    uint16       `json:"port,omitempty"`
	Verdict string       `json:"verdict"`
	// Uncertain means that a foreign rule or chain on the way may change the verdict.
	Uncertain bool `json:"uncertain"`
	// Unless lists the foreign chains in the hooks that the packet passes, with what they may do to it.
	Unless []string `json:"unless,omitempty"`
}

// Explain walks the packet through the rules, and lists the foreign chains that it meets.
func Explain(p trace.Packet, held []ruleset.Held, foreign []ruleset.ForeignChain) Explanation {
	walk := trace.Trace(p, held...)
	e := Explanation{Packet: p.String(), Met: []Shown{}, Action: walk.Verdict.Action, Port: walk.Verdict.Port, Verdict: walk.InWords(p)}
	for _, m := range walk.Met {
		family := ruleset.Held{Flavour: m.Flavour, Rules: ruleset.Ruleset{Family: ruleset.FamilyOf(p.Dst.Addr())}}
		e.Met = append(e.Met, newShown(m.Rule, family, m.Place))
		e.Uncertain = e.Uncertain || m.Unknown()
	}
	// The order of tables with the same priority is not visible.
	others := slices.Clone(held)
	slices.Reverse(others)
	if other := trace.Trace(p, others...); other.Verdict != walk.Verdict {
		e.Unless = append(e.Unless, "the order of two back ends with rules in the same table, of which the kernel calls the newer first: then "+other.InWords(p))
		e.Uncertain = true
	}
	for _, c := range foreign {
		if slices.Contains(hooks(p, walk.Verdict), c.Hook) && c.Decides(ruleset.FamilyOf(p.Dst.Addr()), walk.Verdict.Port != 0) {
			e.Unless = append(e.Unless, fmt.Sprintf("%s: %s", c, c.Effects()))
			e.Uncertain = true
		}
	}
	return e
}

// hooks returns the hooks that a packet passes. One from another host is taken for a packet to this one.
func hooks(p trace.Packet, v trace.Verdict) []string {
	arriving := []string{ruleset.HookPrerouting, ruleset.HookInput}
	switch {
	case p.In != "":
		return append(arriving, ruleset.HookIngress)
	case p.Out == ruleset.Loopback || v.Port != 0:
		return append(arriving, ruleset.HookOutput, ruleset.HookPostrouting)
	}
	return []string{ruleset.HookOutput, ruleset.HookPostrouting, ruleset.HookEgress}
}

// String returns the path in the format of ShowText, and the verdict in its last line.
func (e Explanation) String() string {
	var text strings.Builder
	text.WriteString(e.Packet + "\n")
	for _, s := range e.Met {
		remark := s.remark()
		if s.Unknown {
			remark = "not ours: it is not known whether it matches and what it does"
		}
		fmt.Fprintf(&text, "    %s %s: %s\n      # %s\n", s.place(), s.Chain, s.Rule, remark)
	}
	text.WriteString(e.Verdict)
	if slices.ContainsFunc(e.Met, func(s Shown) bool { return s.Unknown }) {
		text.WriteString("; unless a rule on the way that is not interpreted decides otherwise")
	}
	text.WriteString("\n")
	for _, chain := range e.Unless {
		fmt.Fprintf(&text, "unless decided otherwise by %s\n", chain)
	}
	return text.String()
}

// ParseState reads the conntrack state of a packet: new, established or invalid.
func ParseState(text string) (ruleset.State, error) {
	switch text {
	case "new":
		return "", nil
	case "established":
		return ruleset.Established, nil
	case "invalid":
		return ruleset.Invalid, nil
	}
	return "", fmt.Errorf("%q is not a state: use new, established or invalid", text)
}

// ParseProtocol reads tcp or udp.
func ParseProtocol(text string) (ruleset.Protocol, error) {
	switch p := ruleset.Protocol(text); p {
	case ruleset.TCP, ruleset.UDP:
		return p, nil
	}
	return "", fmt.Errorf("%q is not a protocol: use tcp or udp", text)
}

// ParseDestination reads an address and port, or a port alone after a colon.
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
