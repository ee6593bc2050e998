// Package ruleset models rules as data: tables, chains, rules, matches and targets. It renders them as iptables-save text,
// parses that text, and compares two rulesets.
//
// It does no I/O. The rendered text is the kernel's own spelling, so an installed rule can be compared with a wanted one
// byte by byte. Parse(f, rs.String()) returns rs without the reasons; a rule that does not render as it was read is
// foreign: kept verbatim and not interpreted.
//
// Ours are the chains whose names begin with OwnPrefix, and the rules that jump to them. All other rules belong to
// somebody else: they are not compared and never changed.
package ruleset

import (
	"fmt"
	"iter"
	"net/netip"
	"slices"
	"strings"

	"github.com/pillion-proxy/pillion/internal/capture"
)

// BaseChains are the base chains of tables as iptables names them.
var BaseChains = []string{ChainPrerouting, "INPUT", "FORWARD", ChainBuiltOutput, "POSTROUTING"}

// Final tells whether no packet that matches goes on to the next rule of the chain.
func (r Rule) Final() bool {
	switch r.Target.(type) {
	case Return, Accept, Drop, Redirect, ToSocket:
		return true
	}
	return false
}

// String is kind and number, such as uid/1337.
func (o Owner) String() string { return fmt.Sprintf("%s/%s", o.Kind, o.IDs) }

// TableName is a table of iptables. For each hook the kernel asks the tables in a fixed order.
type TableName string

// The tables in which we have rules.
const (
	Raw    TableName = "raw"    // before connection tracking: which of its zones a packet belongs to
	Mangle TableName = "mangle" // before routing: marks, TPROXY, drops
	NAT    TableName = "nat"    // address translation, for the first packet of a connection only
)

// TableNames are the tables in the order in which a packet meets them.
var TableNames = []TableName{Raw, Mangle, NAT}

// The chains of ours. A table has those that it needs; one rule each jumps to them from the built-in ones.
const (
	OwnPrefix = "PILLION_"

	ChainArriving        = OwnPrefix + "PREROUTING"  // mangle: what arrives, of any kind
	ChainInbound         = OwnPrefix + "INBOUND"     // what of the incoming connections is captured; raw: zones of answers
	ChainInboundRedirect = OwnPrefix + "IN_REDIRECT" // nat: to the agent's inbound port
	ChainTPROXY          = OwnPrefix + "TPROXY"      // mangle: to the agent's inbound port, as they are
	ChainDivert          = OwnPrefix + "DIVERT"      // mangle: what belongs to a connection that the agent has
	ChainOutput          = OwnPrefix + "OUTPUT"      // what of the outgoing traffic is captured; raw: zones of queries
	ChainCaptured        = OwnPrefix + "GROUPS"      // nat: the same for the groups that are captured, if not all are
	ChainDNSCaptured     = OwnPrefix + "DNS"         // raw: the zone of queries that are captured
	ChainDNSPassed       = OwnPrefix + "DNS_PASSED"  // raw: the zone of those that are not
	ChainRedirect        = OwnPrefix + "REDIRECT"    // nat: to the agent's outbound port

	ChainPrerouting  = "PREROUTING"
	ChainBuiltOutput = "OUTPUT"
)

// Ruleset is the tables of one family: all that is in them when they were read from the machine, our part of it when it
// is made by Rules. Tables stand in the order of TableNames, and those in which there is nothing are left out.
type Ruleset struct {
	Family Family
	Tables []Table
	// Whole means that no part of it can be other people's: it was read from a table of our own.
	Whole bool
}

// Table is a table's chains.
type Table struct {
	Name   TableName
	Chains []Chain
}

// Chain is a named list of rules, tried in order.
type Chain struct {
	Name string
	// Policy is what a built-in chain does with a packet that no rule ended, such as ACCEPT. It is empty for a chain
	// that somebody made.
	Policy string
	Rules  []Rule
}

// Rule is one rule of ours, or, when Foreign is set, one that we did not write and do not interpret.
type Rule struct {
	// ID names the rule for people and programs, such as outbound/self/uid/1337. No two rules of a ruleset have the same.
	// The kernel keeps it as a comment, with "pillion:" in front.
	ID string
	// Why is the reason for the rule, one sentence. It is not kept by the kernel.
	Why    string
	Match  Match
	Target Target
	// Foreign is the rule's text as iptables-save gave it. All others but Counters are zero then.
	Foreign string
	// Counters are what the kernel counted at the rule, zero when nobody asked.
	Counters Counters
}

// Counters are the packets and bytes that matched a rule.
type Counters struct{ Packets, Bytes uint64 }

// Match says which packets a rule is for: those that satisfy every field that is set.
type Match struct {
	Src, Dst    netip.Prefix
	NotDst      bool   // Dst is what the destination must not be in
	In, Out     string // interface; a trailing + stands for any ending
	Protocol    Protocol
	SrcPorts    capture.PortRange // needs Protocol
	DstPorts    capture.PortRange // needs Protocol
	NotDstPorts bool              // DstPorts are what the port must not be
	Owner       Owner
	Mark        uint32 // the packet's mark; zero matches every packet
	NotMark     bool   // Mark is what the mark must not be
	State       State
	ConnMark    uint32 // the connection's mark; zero matches every connection
}

// Protocol is a transport protocol, spelled as iptables spells it. The zero value matches all of them.
type Protocol string

// The protocols that we capture.
const (
	TCP Protocol = "tcp"
	UDP Protocol = "udp"
)

// State is what connection tracking says of a packet, spelled as iptables spells it. The zero value matches every one;
// on a Packet it is the first of a connection.
type State string

// The states that rules ask for.
const (
	Invalid     State = "INVALID"             // it belongs to no connection and begins none
	Established State = "RELATED,ESTABLISHED" // it belongs to a connection in which both sides have spoken, or to one about it
)

// Owner is the users or the groups whose process sent a packet. The zero value matches everybody.
type Owner struct {
	Kind OwnerKind
	IDs  capture.IDRange
}

// OwnerKind says what Owner.IDs are.
type OwnerKind string

// The kinds of owner, spelled as the owner match spells them.
const (
	Anybody OwnerKind = ""
	UID     OwnerKind = "uid"
	GID     OwnerKind = "gid"
)

// Target is what happens to a packet that matches: one of the types below. SetMark, SetConnMark, SaveMark, RestoreMark
// and Zone let the packet go on to the next rule.
type Target interface{ Render() string }

// Return ends the chain and goes on behind the rule that jumped to it. In our chains that means: not captured.
type Return struct{}

// Accept ends the table for this hook.
type Accept struct{}

// Drop makes the packet vanish.
type Drop struct{}

// Jump goes on in our chain of that name, and comes back at its end.
type Jump string

// Redirect sends the connection to this port of the local machine: of 127.0.0.1 or ::1 when it was opened here, else of
// the address of the interface on which it came in. It needs a protocol.
type Redirect uint16

// ToSocket is the target TPROXY: the packet goes, as it is, to the transparent socket that has its connection, or else
// to the one that listens at To, whose unspecified address stands for any. It gets the mark by which routing delivers it
// locally, and ends the table.
type ToSocket struct {
	To   netip.AddrPort
	Mark uint32
}

// SetMark marks the packet.
type SetMark uint32

// SetConnMark marks the connection.
type SetConnMark uint32

// SaveMark gives the packet's mark to the connection.
type SaveMark struct{}

// RestoreMark gives the connection's mark to the packet.
type RestoreMark struct{}

// Zone puts the packet into this zone of connection tracking, unless it is in one already.
type Zone uint16

// Chains are the chains of a table, none if the ruleset has no such table.
func (rs Ruleset) Chains(table TableName) []Chain {
	for _, t := range rs.Tables {
		if t.Name == table {
			return t.Chains
		}
	}
	return nil
}

// All walks over every rule, with its table and chain, in the order in which they are written.
func (rs Ruleset) All() iter.Seq2[Place, Rule] {
	return func(yield func(Place, Rule) bool) {
		for _, t := range rs.Tables {
			for _, c := range t.Chains {
				for _, r := range c.Rules {
					if !yield(Place{t.Name, c.Name}, r) {
						return
					}
				}
			}
		}
	}
}

// Place is where a rule stands.
type Place struct {
	Table TableName
	Chain string
}

// Find returns the chain, or nil if there is none. A pointer into the ruleset is good until a chain is added to it.
func (rs Ruleset) Find(at Place) *Chain {
	chains := rs.Chains(at.Table)
	for i := range chains {
		if chains[i].Name == at.Chain {
			return &chains[i]
		}
	}
	return nil
}

// Chain returns the chain, an empty one if there is none.
func (rs Ruleset) Chain(at Place) Chain {
	if c := rs.Find(at); c != nil {
		return *c
	}
	return Chain{Name: at.Chain}
}

// AddChain adds a chain to its table, and the table to the others in its place.
func (rs *Ruleset) AddChain(table TableName, c Chain) {
	order := func(t Table, name TableName) int {
		return slices.Index(TableNames, t.Name) - slices.Index(TableNames, name)
	}
	i, found := slices.BinarySearchFunc(rs.Tables, table, order)
	if !found {
		rs.Tables = slices.Insert(rs.Tables, i, Table{Name: table})
	}
	rs.Tables[i].Chains = append(rs.Tables[i].Chains, c)
}

// Own is our part of a ruleset: our chains, and of the other chains the rules that jump to ours. Chains without such a
// rule are left out.
func (rs Ruleset) Own() Ruleset {
	if rs.Whole {
		return rs
	}
	own := Ruleset{Family: rs.Family}
	for _, t := range rs.Tables {
		for _, c := range t.Chains {
			if !c.Own() {
				c.Rules = jumpsToOwn(c.Rules)
			}
			if c.Own() || len(c.Rules) > 0 {
				own.AddChain(t.Name, c)
			}
		}
	}
	return own
}

func (c Chain) Own() bool { return strings.HasPrefix(c.Name, OwnPrefix) }

func jumpsToOwn(rules []Rule) []Rule {
	var jumps []Rule
	for _, r := range rules {
		if r.JumpsToOwn() {
			jumps = append(jumps, r)
		}
	}
	return jumps
}

// JumpsToOwn knows a jump to us even in a rule that we do not understand otherwise: such a rule would keep the kernel
// from removing our chain, and nobody but us has a reason to write one.
func (r Rule) JumpsToOwn() bool {
	if r.Foreign == "" {
		_, jumps := r.Target.(Jump)
		return jumps
	}
	words := SplitWords(r.Foreign)
	for i, word := range words[:max(len(words)-1, 0)] {
		if (word == "-j" || word == "-g") && strings.HasPrefix(words[i+1], OwnPrefix) {
			return true
		}
	}
	return false
}
