package ruleset

import (
	"fmt"
	"slices"
	"strings"
)

// ForeignChain is a base chain that is not ours and whose rules are not interpreted, with what they may do to a packet.
type ForeignChain struct {
	Flavour  Flavour // NFT for every chain of nftables, Legacy for one of legacy iptables
	Families []Family
	Table    string // such as "inet firewall", or "ipv4 filter" for a legacy table
	Name     string
	Kind     string // nat, filter or route
	Hook     string // ingress, prerouting, input, forward, output, postrouting or egress
	Priority int
	// Does lists effects, such as drop, dnat or "policy drop". It is never empty.
	Does []string
}

// The hooks of a ForeignChain.
const (
	HookPrerouting  = "prerouting"
	HookInput       = "input"
	HookForward     = "forward"
	HookOutput      = "output"
	HookPostrouting = "postrouting"
	HookIngress     = "ingress"
	HookEgress      = "egress"
)

// OwnNATPriority is the priority of the nat chains of iptables and of our table.
const OwnNATPriority = -100

// String identifies the chain.
func (c ForeignChain) String() string {
	return fmt.Sprintf("%s %s (%s, %s, hook %s, priority %d)", c.Table, c.Name, c.Flavour, c.Kind, c.Hook, c.Priority)
}

// Effects lists what the chain may do, in words.
func (c ForeignChain) Effects() string { return strings.Join(c.Does, ", ") }

// Decides reports whether the chain may change what becomes of a packet of the family. captured is set for a packet that
// our rules capture. An address translation after ours, and one of the source, changes nothing.
func (c ForeignChain) Decides(family Family, captured bool) bool {
	if !slices.Contains(c.Families, family) {
		return false
	}
	if c.Kind != "nat" {
		return true
	}
	return (c.Hook == HookPrerouting || c.Hook == HookOutput) && (!captured || c.Priority <= OwnNATPriority)
}
