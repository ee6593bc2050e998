package iptables

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Packet is the first packet of a TCP connection, as the nat table sees it. Only it is looked up there; the rest of the
// connection follows its verdict.
type Packet struct {
	// In is the interface on which the packet came in. It is empty for a packet that a local process sends, which goes
	// through OUTPUT; others go through PREROUTING.
	In string
	// Out is the interface to which a local process's packet is routed.
	Out string
	// UID and GID are those of the sending process's socket, when it is local.
	UID, GID uint32
	Src      netip.Addr
	Dst      netip.AddrPort
}

// Verdict is what the rules do with a packet. The zero value leaves it alone.
type Verdict struct {
	// Redirect is the port of the agent to which the packet goes instead, or zero.
	Redirect uint16
}

func (v Verdict) String() string {
	if v.Redirect == 0 {
		return "left alone"
	}
	return fmt.Sprintf("redirected to %d", v.Redirect)
}

// Trace walks a packet through our rules, in order, and returns the verdict and the IDs of the rules that matched on the
// way. Foreign rules are passed over.
func (rs Ruleset) Trace(p Packet) (Verdict, []string) {
	walk := walk{rules: rs, packet: p}
	hook := chainBuiltOutput
	if p.In != "" {
		hook = chainPrerouting
	}
	walk.through(hook)
	return walk.verdict, walk.path
}

type walk struct {
	rules   Ruleset
	packet  Packet
	verdict Verdict
	path    []string
	inside  []string // the chains that the walk will come back to
}

// through walks one chain and tells whether the packet's fate is sealed. Coming to a chain from within itself ends the
// walk: the kernel refuses loops, but text can hold them.
func (w *walk) through(chain string) (ended bool) {
	if slices.Contains(w.inside, chain) {
		return true
	}
	w.inside = append(w.inside, chain)
	defer func() { w.inside = w.inside[:len(w.inside)-1] }()
	for _, r := range w.rules.chain(chain).Rules {
		if r.Foreign != "" || !r.Match.matches(w.packet) {
			continue
		}
		w.path = append(w.path, r.ID)
		switch target := r.Target.(type) {
		case Return:
			return false
		case Redirect:
			w.verdict.Redirect = uint16(target)
			return true
		case Jump:
			if w.through(string(target)) {
				return true
			}
		}
	}
	return false
}

func (m Match) matches(p Packet) bool {
	return (m.In == "" || onInterface(m.In, p.In)) &&
		(m.Out == "" || onInterface(m.Out, p.Out)) &&
		(!m.Src.IsValid() || m.Src.Contains(p.Src)) &&
		(!m.Dst.IsValid() || m.Dst.Contains(p.Dst.Addr().WithZone("")) != m.NotDst) &&
		(m.DstPorts.First == 0 || m.DstPorts.Contains(p.Dst.Port()) != m.NotDstPorts) &&
		m.Owner.matches(p)
}

// onInterface tells whether name is what pattern means.
func onInterface(pattern, name string) bool {
	if stem, wildcard := strings.CutSuffix(pattern, "+"); wildcard {
		return strings.HasPrefix(name, stem)
	}
	return pattern == name
}

// matches is false for a packet that no local process sent: it has no owner.
func (o Owner) matches(p Packet) bool {
	switch o.Kind {
	case UID:
		return p.In == "" && o.ID == p.UID
	case GID:
		return p.In == "" && o.ID == p.GID
	}
	return true
}
