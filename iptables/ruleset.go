// Package iptables makes, compares, traces and installs the rules that redirect a workload's traffic.
//
// Rules are data. Rules turns a capture.Spec into a Ruleset, the policy in order, each rule with a stable ID and the
// reason for it. A Ruleset renders as iptables-save text in the kernel's own spelling and is parsed back from it, so
// that what is there is compared with what is wanted line by line, whole chains in order. Trace walks a packet through
// it. Only host.go runs programs, and only host.go and nft.go change the machine.
//
// Own chains, whose names begin with PILLION_, and the rules that jump to them are ours. Everything else belongs to
// other people and is never touched.
package iptables

import (
	"net/netip"
	"strings"

	"github.com/pillion-proxy/pillion/internal/capture"
)

// Family is an address family. The two have rules of their own.
type Family int

// The families, by the version number of their protocol.
const (
	IPv4 Family = 4
	IPv6 Family = 6
)

// Families are both, in the order in which they are worked on.
var Families = []Family{IPv4, IPv6}

func (f Family) String() string {
	if f == IPv6 {
		return "ipv6"
	}
	return "ipv4"
}

// owns tells whether addresses of the prefix belong to the family.
func (f Family) owns(prefix netip.Prefix) bool { return prefix.Addr().Is4() == (f == IPv4) }

// The chains of ours, and the built-in ones from which one rule each jumps to them.
const (
	ownPrefix = "PILLION_"

	chainInbound         = ownPrefix + "INBOUND"     // what of the incoming connections is captured
	chainInboundRedirect = ownPrefix + "IN_REDIRECT" // to the agent's inbound port
	chainOutput          = ownPrefix + "OUTPUT"      // what of the outgoing connections is captured
	chainRedirect        = ownPrefix + "REDIRECT"    // to the agent's outbound port

	chainPrerouting  = "PREROUTING"
	chainBuiltOutput = "OUTPUT"
)

// Ruleset is the nat table of one family: all of it when it was read from the machine, our part of it when it is made
// by Rules.
type Ruleset struct {
	Family Family
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
	// ID names the rule for people and programs, such as outbound/self/uid/1337. The kernel keeps it as a comment, with
	// "pillion:" in front.
	ID string
	// Why is the reason for the rule, one sentence. It is not kept by the kernel.
	Why    string
	Match  Match
	Target Target
	// Foreign is the rule's text as iptables-save gave it. The other fields are zero then.
	Foreign string
}

// Match says which packets a rule is for: those that satisfy every field that is set. Connections are TCP or not
// captured, so there is no other protocol.
type Match struct {
	In, Out     string // interface; a trailing + stands for any ending
	Src, Dst    netip.Prefix
	NotDst      bool // Dst is what the destination must not be in
	TCP         bool
	DstPorts    capture.PortRange // needs TCP
	NotDstPorts bool              // DstPorts are what the port must not be
	Owner       Owner
}

// Owner is the user or the group whose process sent a packet. The zero value matches everybody.
type Owner struct {
	Kind OwnerKind
	ID   uint32
}

// OwnerKind says what Owner.ID is.
type OwnerKind string

// The kinds of owner, spelled as the owner match spells them.
const (
	Anybody OwnerKind = ""
	UID     OwnerKind = "uid"
	GID     OwnerKind = "gid"
)

// Target is what happens to a packet that matches: Return, Jump or Redirect.
type Target interface{ render() string }

// Return ends the chain and goes on behind the rule that jumped to it. In our chains that means: not captured.
type Return struct{}

// Jump goes on in our chain of that name, and comes back at its end.
type Jump string

// Redirect sends the connection to this port of the local machine: of 127.0.0.1 or ::1 when it was opened here, else of
// the address of the interface on which it came in.
type Redirect uint16

// chain returns the chain of that name, an empty one if there is none.
func (rs Ruleset) chain(name string) Chain {
	for _, c := range rs.Chains {
		if c.Name == name {
			return c
		}
	}
	return Chain{}
}

// Own is our part of a ruleset: our chains, and of the other chains the rules that jump to ours. Chains without such a
// rule are left out.
func (rs Ruleset) Own() Ruleset {
	own := Ruleset{Family: rs.Family}
	for _, c := range rs.Chains {
		if !c.own() {
			c.Rules = jumpsToOwn(c.Rules)
			if len(c.Rules) == 0 {
				continue
			}
		}
		own.Chains = append(own.Chains, c)
	}
	return own
}

func (c Chain) own() bool { return strings.HasPrefix(c.Name, ownPrefix) }

func jumpsToOwn(rules []Rule) []Rule {
	var jumps []Rule
	for _, r := range rules {
		if r.jumpsToOwn() {
			jumps = append(jumps, r)
		}
	}
	return jumps
}

// jumpsToOwn knows a jump to us even in a rule that we do not understand otherwise: such a rule would keep the kernel
// from removing our chain, and nobody but us has a reason to write one.
func (r Rule) jumpsToOwn() bool {
	if r.Foreign == "" {
		_, jumps := r.Target.(Jump)
		return jumps
	}
	words := splitWords(r.Foreign)
	for i, word := range words[:max(len(words)-1, 0)] {
		if (word == "-j" || word == "-g") && strings.HasPrefix(words[i+1], ownPrefix) {
			return true
		}
	}
	return false
}
