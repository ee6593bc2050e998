package iptables

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Packet is a packet as the rules see it. The zero values of Protocol and State make it the first of a TCP connection.
type Packet struct {
	// In is the interface on which the packet came in. It is empty for a packet that a local process sends, which goes
	// through OUTPUT, and then, if Out is the loopback, comes in there; others go through PREROUTING.
	In string
	// Out is the interface to which a local process's packet is routed.
	Out      string
	Protocol Protocol // TCP when empty
	// UID and GID are those of the sending process's socket, when it is local.
	UID, GID uint32
	Src      netip.Addr
	SrcPort  uint16
	Dst      netip.AddrPort
	// Mark is what the socket gave the packet, ConnMark what an earlier packet left on the connection.
	Mark, ConnMark uint32
	State          State
}

// Action is what the rules do with a packet.
type Action string

// The actions.
const (
	LeftAlone  Action = ""                // it goes where it was going
	Redirected Action = "redirected"      // it goes to the agent, and its destination is changed
	Given      Action = "given by TPROXY" // it goes to the agent as it is
	Dropped    Action = "dropped"
)

// Verdict is what the rules do with a packet. The zero value leaves it alone.
type Verdict struct {
	Action Action
	// Port is the port of the agent to which the packet goes, or zero.
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

// Walk is a packet's way through the rules, and what it left there.
type Walk struct {
	Verdict Verdict
	// Path are the IDs of the rules that matched, in order.
	Path []string
	// Met are the rules that matched, in order, and among them those that may have: foreign ones.
	Met []Met
	// Mark and ConnMark are the marks of the packet and of its connection at the end.
	Mark, ConnMark uint32
	// Zone is the packet's zone of connection tracking.
	Zone uint16
}

// Met is a rule that a packet met, and where it stands.
type Met struct {
	Flavour Flavour
	Place
	Rule Rule
}

// Unknown tells that nobody here can say whether the rule matches or what it does: it is foreign.
func (m Met) Unknown() bool { return m.Rule.Foreign != "" }

// Trace walks a packet through the rules.
func (rs Ruleset) Trace(p Packet) Walk { return Trace(p, Held{Rules: rs}) }

// Trace walks a packet through the rules of its family that all flavours hold, table by table as the kernel does it.
// Foreign rules are met and passed over. Of two flavours the kernel asks the one first whose table was made first, which
// nobody can see; here it is the one that is named first.
//
// Address translation is looked up for the first packet of a connection only; the rest of the connection follows its
// verdict, which is not repeated here.
func Trace(p Packet, held ...Held) Walk {
	if p.Protocol == "" {
		p.Protocol = TCP
	}
	w := walk{held: held, packet: p}
	w.Mark, w.ConnMark = p.Mark, p.ConnMark
	if p.In != "" {
		w.hook(chainPrerouting, TableNames...)
		return w.Walk
	}
	w.hook(chainBuiltOutput, TableNames...)
	if w.Verdict.Action == Dropped || p.Out != loopback && w.Verdict.Action != Redirected {
		return w.Walk
	}
	// What stays here comes in on the loopback, without an owner. Its connection and its zone are known by then, and so is
	// its translation.
	if w.Verdict.Action == Redirected {
		w.packet.Dst = netip.AddrPortFrom(factsOf(familyOf(p.Dst.Addr())).localhost.Addr(), w.Verdict.Port)
	}
	w.packet.In, w.packet.Out, w.zoned = loopback, "", true
	w.hook(chainPrerouting, Raw, Mangle)
	return w.Walk
}

type walk struct {
	Walk
	held   []Held
	packet Packet
	zoned  bool // the zone is chosen
	table  TableName
	at     Held     // the table's owner
	inside []string // the chains that the walk will come back to
}

// hook walks the tables that have rules there, until one of them seals the packet's fate.
func (w *walk) hook(chain string, tables ...TableName) {
	for _, w.table = range tables {
		for _, w.at = range w.held {
			w.packet.Mark, w.packet.ConnMark = w.Mark, w.ConnMark
			if w.at.Rules.Family != familyOf(w.packet.Dst.Addr()) || w.table == NAT && (w.packet.State != "" || w.Verdict.Action == Redirected) {
				continue
			}
			ended := w.through(chain)
			if !ended && w.at.Rules.chain(Place{w.table, chain}).Policy == policyDrop {
				w.Verdict = Verdict{Action: Dropped}
			}
			if w.Verdict.Action == Dropped {
				return
			}
		}
	}
}

// through walks one chain and tells whether the table is done with the packet. Coming to a chain from within itself ends
// the walk: the kernel refuses loops, but text can hold them.
func (w *walk) through(chain string) (ended bool) {
	if slices.Contains(w.inside, chain) {
		return true
	}
	w.inside = append(w.inside, chain)
	defer func() { w.inside = w.inside[:len(w.inside)-1] }()
	at := Place{w.table, chain}
	for _, r := range w.at.Rules.chain(at).Rules {
		if r.Foreign == "" && !r.Match.matches(w.packet) {
			continue
		}
		w.Met = append(w.Met, Met{w.at.Flavour, at, r})
		if r.Foreign != "" {
			continue
		}
		w.Path = append(w.Path, r.ID)
		switch target := r.Target.(type) {
		case Return:
			return false
		case Jump:
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

// apply does what a target that is not about chains does, and tells whether the table is done with the packet.
func (w *walk) apply(target Target) (ended bool) {
	switch target := target.(type) {
	case Redirect:
		// A socket that TPROXY has chosen already keeps the packet, whatever its address is changed to.
		if w.Verdict.Action != Given {
			w.Verdict = Verdict{Redirected, uint16(target)}
		}
		return true
	case ToSocket:
		w.Verdict, w.Mark = Verdict{Given, target.To.Port()}, target.Mark
		return true
	case Drop:
		w.Verdict = Verdict{Action: Dropped}
		return true
	case Accept:
		return true
	case SetMark:
		w.Mark = uint32(target)
	case SetConnMark:
		w.ConnMark = uint32(target)
	case SaveMark:
		w.ConnMark = w.Mark
	case RestoreMark:
		w.Mark = w.ConnMark
	case Zone:
		if !w.zoned {
			w.Zone, w.zoned = uint16(target), true
		}
	}
	return false
}

func (m Match) matches(p Packet) bool {
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
		return p.In == "" && o.IDs.Contains(p.UID)
	case GID:
		return p.In == "" && o.IDs.Contains(p.GID)
	}
	return true
}
