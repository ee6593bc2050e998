// Package ruleset models rules as data: tables, chains, rules, matches and targets. It renders them as iptables-save text,
// parses that text, and compares two rulesets.
//
// It does no I/O. The rendered text is the kernel's own spelling, so an installed rule can be compared with a wanted one
// byte by byte. Parse(f, rs.String()) returns rs without the reasons; a rule that does not render as it was read is
// foreign: kept verbatim and not interpreted.
//
// Ours are the chains whose names begin with OwnPrefix, and the rules that jump to them. All other rules are
// foreign: they are not compared and never changed.
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

// Final reports whether no matching packet continues with the next rule of the chain.
func (r Rule) Final() bool {
	switch r.Target.(type) {
	case Return, Accept, Drop, Redirect, ToSocket:
		return true
	}
	return false
}

// String is kind and number, such as uid/1337.
func (o Owner) String() string { return fmt.Sprintf("%s/%s", o.Kind, o.IDs) }

// TableName is a table of iptables. The kernel calls the tables of a hook in a fixed order.
type TableName string

// The tables in which we have rules.
const (
	Raw    TableName = "raw"    // before conntrack: zones
	Mangle TableName = "mangle" // before routing: marks, TPROXY, drops
	NAT    TableName = "nat"    // address translation, for the first packet of a connection only
)

// TableNames are the tables in the order in which a packet meets them.
var TableNames = []TableName{Raw, Mangle, NAT}

// Our chains. A table has only those that it needs, and one jump to them from a built-in chain.
const (
	OwnPrefix = "PILLION_"

	ChainArriving        = OwnPrefix + "PREROUTING"  // mangle: all incoming packets
	ChainInbound         = OwnPrefix + "INBOUND"     // selects captured inbound connections
	ChainInboundRedirect = OwnPrefix + "IN_REDIRECT" // nat: to the agent's inbound port
	ChainTPROXY          = OwnPrefix + "TPROXY"      // mangle: to the agent's inbound port, addresses unchanged
	ChainDivert          = OwnPrefix + "DIVERT"      // mangle: packets of connections that the agent has
	ChainOutput          = OwnPrefix + "OUTPUT"      // selects captured outbound traffic; raw: zones of queries
	ChainCaptured        = OwnPrefix + "GROUPS"      // nat: the same for captured groups, if a list is captured
	ChainDNSCaptured     = OwnPrefix + "DNS"         // raw: the zone of captured queries
	ChainRedirect        = OwnPrefix + "REDIRECT"    // nat: to the agent's outbound port

	ChainPrerouting  = "PREROUTING"
	ChainBuiltOutput = "OUTPUT"
)

// Ruleset holds the tables of one family: everything in them if they were read from the machine, our part if
// policy.Rules made them. Tables are in the order of TableNames; empty tables are left out.
type Ruleset struct {
	Family Family
	Tables []Table
	// Whole means that the tables were read from our own nftables table and contain only rules of ours.
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
	// Policy is what a built-in chain does with a packet that reaches its end, such as ACCEPT. It is empty for a
	// user-defined chain.
	Policy string
	Rules  []Rule
}

// Rule is a rule of ours or, if Foreign is set, a rule that we did not write and do not interpret.
type Rule struct {
	// ID identifies the rule for people and programs, such as outbound/self/uid/1337. It is unique in a ruleset. The
	// kernel keeps it as a comment with the prefix "pillion:".
	ID string
	// Why is the reason for the rule in one sentence. The kernel does not keep it.
	Why    string
	Match  Match
	Target Target
	// Before selects packets about which no foreign rule may decide before this one. It is set only in wanted rules.
	Before []Match
	// Foreign is the rule's text from iptables-save. All other fields except Counters are then zero.
	Foreign string
	// Counters are the kernel's. They are zero if they were not read.
	Counters Counters
}

// Counters are the packets and bytes that matched a rule.
type Counters struct{ Packets, Bytes uint64 }

// Match selects packets: those that satisfy every field that is set.
type Match struct {
	Src, Dst    netip.Prefix
	NotDst      bool   // inverts Dst
	In, Out     string // interface; a trailing + stands for any ending
	Protocol    Protocol
	SrcPorts    capture.PortRange // needs Protocol
	DstPorts    capture.PortRange // needs Protocol
	NotDstPorts bool              // inverts DstPorts
	Owner       Owner
	Mark        uint32 // the packet's mark; zero matches every packet
	NotMark     bool   // inverts Mark
	State       State
	ConnMark    uint32 // the connection's mark; zero matches every connection
}

// Protocol is a transport protocol in the spelling of iptables. The zero value matches every protocol.
type Protocol string

// The protocols that we capture.
const (
	TCP Protocol = "tcp"
	UDP Protocol = "udp"
)

// State is a packet's conntrack state in the spelling of iptables. The zero value matches every state; in a
// trace.Packet it is the first packet of a connection.
type State string

// The states that rules ask for.
const (
	Invalid     State = "INVALID"             // neither in a connection nor the first packet of one
	Established State = "RELATED,ESTABLISHED" // in a connection with packets in both directions, or related to one
)

// Owner matches the user or group of the process that sent a packet. The zero value matches every packet.
type Owner struct {
	Kind OwnerKind
	IDs  capture.IDRange
}

// OwnerKind is what Owner.IDs are.
type OwnerKind string

// The kinds of owner, spelled as the owner match spells them.
const (
	Anybody OwnerKind = ""
	UID     OwnerKind = "uid"
	GID     OwnerKind = "gid"
)

// Target is what happens to a matching packet: one of the types below. After SetMark, SetConnMark, SaveMark,
// RestoreMark and Zone the packet continues with the next rule.
type Target interface{ Render() string }

// Return ends the chain and continues after the rule that jumped to it. In our chains this means: not captured.
type Return struct{}

// Accept ends the table for this hook.
type Accept struct{}

// Drop discards the packet.
type Drop struct{}

// Jump continues in our chain of that name and returns at its end.
type Jump string

// Redirect sends the connection to this port of the local machine. The new address is 127.0.0.1 or ::1 for a local
// connection, and otherwise that of the interface on which it arrived. A match of the protocol is required.
type Redirect uint16

// ToSocket is the target TPROXY. The packet goes unchanged to the transparent socket that has its connection, or else
// to the one that listens at To; an unspecified address in To stands for any address. Mark makes routing deliver the
// packet locally. The table ends.
type ToSocket struct {
	To   netip.AddrPort
	Mark uint32
}

// SetMark marks the packet.
type SetMark uint32

// SetConnMark marks the connection.
type SetConnMark uint32

// SaveMark copies the packet's mark to the connection.
type SaveMark struct{}

// RestoreMark copies the connection's mark to the packet.
type RestoreMark struct{}

// Zone puts the packet into a conntrack zone unless it has one already.
type Zone uint16

// Chains returns the chains of a table, or nil if the ruleset has no such table.
func (rs Ruleset) Chains(table TableName) []Chain {
	for _, t := range rs.Tables {
		if t.Name == table {
			return t.Chains
		}
	}
	return nil
}

// All iterates over every rule with its table and chain, in the order in which they are written.
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

// Place is the table and chain of a rule.
type Place struct {
	Table TableName
	Chain string
}

// Find returns the chain, or nil. The pointer is valid until a chain is added to the ruleset.
func (rs Ruleset) Find(at Place) *Chain {
	chains := rs.Chains(at.Table)
	for i := range chains {
		if chains[i].Name == at.Chain {
			return &chains[i]
		}
	}
	return nil
}

// Chain returns the chain, or an empty one.
func (rs Ruleset) Chain(at Place) Chain {
	if c := rs.Find(at); c != nil {
		return *c
	}
	return Chain{Name: at.Chain}
}

// AddChain adds a chain to its table, and the table in its place.
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

// Own returns our part of a ruleset: our chains, and from other chains the rules that jump to ours. Chains without such
// a rule are left out.
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

// Own reports whether the chain is one of ours.
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

// JumpsToOwn also recognises a jump to our chains in a foreign rule: such a rule would make the kernel refuse to remove
// our chain, and other programs have no reason to write one.
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
