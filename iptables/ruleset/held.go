package ruleset

import (
	"slices"
	"strings"
)

// Flavour is one of the places in the kernel for our rules: the two of iptables, and our nftables table. The kernel
// consults all of them for every packet, so rules that are left in one stay active while we look at another.
type Flavour string

// The flavours.
const (
	NFT    Flavour = "nft"
	Legacy Flavour = "legacy"
	Native Flavour = "nftables" // without a program
)

// Held is one family's rules in one flavour. The flavour is empty for rules that are only planned.
type Held struct {
	Flavour Flavour
	Rules   Ruleset
}

// InOrder returns the chains of a table that have rules, in the order in which packets reach them: each built-in chain,
// followed by the chains to which its rules jump. Chains that our rules do not reach come last.
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

// Body returns the rule's line without the chain and the comment.
func (r Rule) Body(chain string) string {
	r.ID = ""
	return strings.TrimPrefix(r.Line(chain), "-A "+chain+" ")
}
