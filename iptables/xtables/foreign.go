package xtables

import (
	"slices"
	"strings"

	"github.com/pillion-proxy/pillion/iptables/ruleset"
)

// priorities are those of legacy tables. The nat table has another one at hooks where it translates sources.
var priorities = map[string]int{"raw": -300, "mangle": -150, "nat": ruleset.OwnNATPriority, "filter": 0, "security": 50}

// ForeignChains returns the base chains in the output of iptables-legacy-save that may decide about packets, except
// those that ruleset.Parse reads and trace follows: PREROUTING and OUTPUT of the tables raw, mangle and nat.
func ForeignChains(family ruleset.Family, text string) []ruleset.ForeignChain {
	var foreign []ruleset.ForeignChain
	for table := range strings.SplitSeq(text, "COMMIT\n") {
		var name string
		var base [][2]string // chain and policy
		rules := make(map[string][]ruleset.Rule)
		for line := range strings.Lines(table) {
			_, line = ruleset.SplitCounters(strings.TrimSpace(line))
			fields := strings.Fields(line)
			switch {
			case strings.HasPrefix(line, "*"):
				name = line[1:]
			case strings.HasPrefix(line, ":") && len(fields) > 1:
				chain := fields[0][1:]
				rules[chain] = nil
				if fields[1] != "-" {
					base = append(base, [2]string{chain, fields[1]})
				}
			case strings.HasPrefix(line, "-A ") && len(fields) > 1:
				rules[fields[1]] = append(rules[fields[1]], ruleset.Rule{Foreign: line})
			}
		}
		for _, c := range base {
			chain, policy := c[0], c[1]
			followed := chain == ruleset.ChainPrerouting || chain == ruleset.ChainBuiltOutput
			if followed && slices.Contains(ruleset.TableNames, ruleset.TableName(name)) {
				continue
			}
			does := effects(rules, chain, make(map[string]bool))
			if policy == ruleset.PolicyDrop {
				does = append(does, "policy drop")
			}
			if len(does) > 0 {
				kind := "filter"
				if name == string(ruleset.NAT) {
					kind = name
				}
				foreign = append(foreign, ruleset.ForeignChain{
					Flavour: ruleset.Legacy, Families: []ruleset.Family{family}, Table: family.String() + " " + name, Name: chain,
					Kind: kind, Hook: strings.ToLower(chain), Priority: priorities[name], Does: does,
				})
			}
		}
	}
	return foreign
}

// effects lists the targets of a chain's rules, and of the chains to which they jump, that end the way of a packet or
// change it. Chains that were seen before are not listed again: without that, the time would be exponential in the depth of
// jumps.
func effects(rules map[string][]ruleset.Rule, chain string, seen map[string]bool) []string {
	seen[chain] = true
	var all []string
	for _, r := range rules[chain] {
		target := r.TargetName()
		found := []string{strings.ToLower(target)}
		_, jumps := rules[target]
		switch {
		case jumps && !seen[target]:
			found = effects(rules, target, seen)
		case jumps, r.Continues(chain), slices.Contains([]string{ruleset.PolicyAccept, "RETURN", "SNAT", "MASQUERADE"}, target):
			continue
		}
		for _, effect := range found {
			if !slices.Contains(all, effect) {
				all = append(all, effect)
			}
		}
	}
	return all
}
