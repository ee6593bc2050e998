// Package trace walks a packet through rulesets and reports the verdict.
//
// It follows the kernel's order: raw, mangle, nat at a hook; then, for a packet that a local process sends to this machine,
// raw and mangle of PREROUTING on the loopback. It models no routing and not the filter table: the caller names the
// interfaces. Foreign rules are recorded and skipped, because their matches are not known here.
package trace

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/pillion-proxy/pillion/iptables/ruleset"
)

// Packet is a packet as the rules see it. With a zero State it is the first packet of a connection.
type Packet struct {
	// In is the interface on which the packet arrives; the packet then passes PREROUTING. It is empty for a packet of a
	// local process. That one passes OUTPUT and, if Out is the loopback, arrives there.
	In string
	// Out is the interface to which a local process's packet is routed.
	Out      string
	Protocol ruleset.Protocol // TCP when empty
	// UID and GID are those of the sending process's socket, when it is local.
	UID, GID uint32
	Src      netip.Addr
	SrcPort  uint16
	Dst      netip.AddrPort
	// Mark is the mark of the socket (SO_MARK), ConnMark the mark that an earlier packet has left on the connection.
	Mark, ConnMark uint32
	State          ruleset.State
}

// Action is what the rules do with a packet.
type Action string

// The actions.
const (
	LeftAlone  Action = ""                // it goes to its destination
	Redirected Action = "redirected"      // it goes to the agent by a changed destination
	Given      Action = "given by TPROXY" // it goes to the agent unchanged
	Dropped    Action = "dropped"
)

// Verdict is what the rules do with a packet. The zero Verdict leaves it alone.
type Verdict struct {
	Action Action
	// Port is the agent's port to which the packet goes, or zero.
	Port uint16
}

func (v Verdict) String() string {
	switch {
	case v == Verdict{}:
		return "left alone"
	case v.Port == 0:
		return string(v.Action)
	}
	return fmt.Sprintf("%s to %d", v.Action, v.Port)
}

// Walk is a packet's path through the rules and its effects.
type Walk struct {
	Verdict Verdict
	// Path lists the IDs of the rules that matched, in order.
	Path []string
	// Met lists the rules that matched, in order, and the foreign rules on the way: those may have matched as well.
	Met []Met
	// Mark and ConnMark are the marks of the packet and of its connection at the end.
	Mark, ConnMark uint32
	// Zone is the packet's conntrack zone.
	Zone uint16
}

// Met is a rule that a packet met, and its place.
type Met struct {
	Flavour ruleset.Flavour
	ruleset.Place
	Rule ruleset.Rule
}

// Unknown reports whether the rule is foreign: it is not known whether it matches or what it does.
func (m Met) Unknown() bool { return m.Rule.Foreign != "" }

// Of walks a packet through the rules of one ruleset.
func Of(rs ruleset.Ruleset, p Packet) Walk { return Trace(p, ruleset.Held{Rules: rs}) }

// Trace walks a packet through the rules of its family in all flavours, table by table like the kernel. Foreign rules
// are recorded and skipped. If two flavours have the same table, the kernel calls the one first that was created last
// (nf_hook_entries_grow). This order is not visible; here it is the order of held.
//
// The nat table applies only to the first packet of a connection. The others follow its verdict, and Trace does not
// repeat it for them.
func Trace(p Packet, held ...ruleset.Held) Walk {
	if p.Protocol == "" {
		p.Protocol = ruleset.TCP
	}
	w := walk{held: held, packet: p}
	w.Mark, w.ConnMark = p.Mark, p.ConnMark
	if p.In != "" {
		w.hook(ruleset.ChainPrerouting, ruleset.TableNames...)
		return w.Walk
	}
	w.hook(ruleset.ChainBuiltOutput, ruleset.TableNames...)
	if w.Verdict.Action == Dropped || p.Out != ruleset.Loopback && w.Verdict.Action != Redirected {
		return w.Walk
	}
	// A packet that stays on this machine arrives on the loopback, without an owner. Its zone and its translation are decided
	// already.
	if w.Verdict.Action == Redirected {
		w.packet.Dst = netip.AddrPortFrom(ruleset.AddressesOf(ruleset.FamilyOf(p.Dst.Addr())).Localhost.Addr(), w.Verdict.Port)
	}
	w.packet.In, w.packet.Out, w.zoned = ruleset.Loopback, "", true
	w.hook(ruleset.ChainPrerouting, ruleset.Raw, ruleset.Mangle)
	return w.Walk
}

type walk struct {
	Walk
	held   []ruleset.Held
	packet Packet
	zoned  bool // the zone is chosen
	table  ruleset.TableName
	at     ruleset.Held // the table's owner
	inside []string     // the chains to which the walk returns
}

// hook walks the tables with rules at the hook until one decides the packet's fate.
func (w *walk) hook(chain string, tables ...ruleset.TableName) {
	for _, w.table = range tables {
		for _, w.at = range w.held {
			w.packet.Mark, w.packet.ConnMark = w.Mark, w.ConnMark
			if w.at.Rules.Family != ruleset.FamilyOf(w.packet.Dst.Addr()) || w.table == ruleset.NAT && (w.packet.State != "" || w.Verdict.Action == Redirected) {
				continue
			}
			ended := w.through(chain)
			if !ended && w.at.Rules.Chain(ruleset.Place{Table: w.table, Chain: chain}).Policy == ruleset.PolicyDrop {
				w.Verdict = Verdict{Action: Dropped}
			}
			if w.Verdict.Action == Dropped {
				return
			}
		}
	}
}

// through walks one chain and reports whether the table is done with the packet. A chain that is entered from within
// itself ends the walk: the kernel refuses such loops, but text can contain them.
func (w *walk) through(chain string) (ended bool) {
	if slices.Contains(w.inside, chain) {
		return true
	}
	w.inside = append(w.inside, chain)
	defer func() { w.inside = w.inside[:len(w.inside)-1] }()
	at := ruleset.Place{Table: w.table, Chain: chain}
	for _, r := range w.at.Rules.Chain(at).Rules {
		if r.Foreign == "" && !matches(r.Match, w.packet) {
			continue
		}
		w.Met = append(w.Met, Met{w.at.Flavour, at, r})
		if r.Foreign != "" {
			continue
		}
		w.Path = append(w.Path, r.ID)
		switch target := r.Target.(type) {
		case ruleset.Return:
			return false
		case ruleset.Jump:
			if w.through(string(target)) {
				return true
			}
		default:
			if w.apply(target) {
				return true
			}
			w.packet.Mark, w.packet.ConnMark = w.Mark, w.ConnMark
		}
	}
	return false
}

// apply performs a target other than Return and Jump, and reports whether the table is done with the packet.
func (w *walk) apply(target ruleset.Target) (ended bool) {
	switch target := target.(type) {
	case ruleset.Redirect:
		// A socket that TPROXY has assigned keeps the packet, even if nat changes its destination.
		if w.Verdict.Action != Given {
			w.Verdict = Verdict{Redirected, uint16(target)}
		}
		return true
	case ruleset.ToSocket:
		w.Verdict, w.Mark = Verdict{Given, target.To.Port()}, target.Mark
		return true
	case ruleset.Drop:
		w.Verdict = Verdict{Action: Dropped}
		return true
	case ruleset.Accept:
		return true
	case ruleset.SetMark:
		w.Mark = uint32(target)
	case ruleset.SetConnMark:
		w.ConnMark = uint32(target)
	case ruleset.SaveMark:
		w.ConnMark = w.Mark
	case ruleset.RestoreMark:
		w.Mark = w.ConnMark
	case ruleset.Zone:
		if !w.zoned {
			w.Zone, w.zoned = uint16(target), true
		}
	}
	return false
}

func matches(m ruleset.Match, p Packet) bool {
	return (m.In == "" || onInterface(m.In, p.In)) &&
		(m.Out == "" || onInterface(m.Out, p.Out)) &&
		(m.Protocol == "" || m.Protocol == p.Protocol) &&
		(!m.Src.IsValid() || m.Src.Contains(p.Src)) &&
		(!m.Dst.IsValid() || m.Dst.Contains(p.Dst.Addr().WithZone("")) != m.NotDst) &&
		(m.SrcPorts.First == 0 || m.SrcPorts.Contains(p.SrcPort)) &&
		(m.DstPorts.First == 0 || m.DstPorts.Contains(p.Dst.Port()) != m.NotDstPorts) &&
		(m.Mark == 0 || (m.Mark == p.Mark) != m.NotMark) &&
		(m.ConnMark == 0 || m.ConnMark == p.ConnMark) &&
		(m.State == "" || m.State == p.State) &&
		ownerMatches(m.Owner, p)
}

// onInterface reports whether name matches pattern.
func onInterface(pattern, name string) bool {
	if stem, wildcard := strings.CutSuffix(pattern, "+"); wildcard {
		return strings.HasPrefix(name, stem)
	}
	return pattern == name
}

// ownerMatches returns false for a packet that no local process has sent, because it has no owner.
func ownerMatches(o ruleset.Owner, p Packet) bool {
	switch o.Kind {
	case ruleset.UID:
		return p.In == "" && o.IDs.Contains(p.UID)
	case ruleset.GID:
		return p.In == "" && o.IDs.Contains(p.GID)
	}
	return true
}
