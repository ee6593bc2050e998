package ruleset

import (
	"slices"
	"strings"
)

// Flavour is one of the places in the kernel in which our rules can be: the two in which iptables keeps its own, and our
// table of nftables. All are consulted for every packet, so rules left in one while we look only at another would stay
// active.
type Flavour string

// The flavours.
const (
	NFT    Flavour = "nft"
	Legacy Flavour = "legacy"
	Native Flavour = "nftables" // without a program
)

// Held is the rules of one family that one flavour holds. The flavour is empty for rules that are only planned.
type Held struct {
	Flavour Flavour
	Rules   Ruleset
}

// InOrder are the chains of a table that have rules, as packets come to them: each built-in chain, and behind it those to
// which its rules jump. What nothing of ours jumps to comes last.
func (rs Ruleset) InOrder(table TableName) []Chain {
	var order []Chain
	var visit func(name string)
	visit = func(name string) {
		c := rs.Chain(Place{table, name})
		if len(c.Rules) == 0 || slices.ContainsFunc(order, func(seen Chain) bool { return seen.Name == name }) {
			return
		}
		order = append(order, c)
		for _, r := range c.Rules {
			if next, ok := r.Target.(Jump); ok {
				visit(string(next))
			}
		}
	}
	for _, name := range BaseChains {
		visit(name)
	}
	for _, c := range rs.Chains(table) {
		visit(c.Name)
	}
	return order
}

// Body is the rule's line without the chain and the comment.
func (r Rule) Body(chain string) string {
	r.ID = ""
	return strings.TrimPrefix(r.Line(chain), "-A "+chain+" ")
}
