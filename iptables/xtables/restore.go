package xtables

import (
	"slices"
	"strings"

	"github.com/pillion-proxy/pillion/iptables/ruleset"
)

// RestoreInput is what `iptables-restore --noflush` needs to turn our part of have into want, in one atomic commit for each
// table, and nothing when they are the same.
//
// Declaring a chain of ours empties it, so chains that differ are filled anew and the others are not mentioned. A rule
// in somebody else's chain has no such mercy: it is appended again on every run, and deleting one that is not there
// ends the whole commit. So jumps are deleted exactly as they stand and appended only where they are missing, after the
// chains they lead to are full.
func RestoreInput(want, have ruleset.Ruleset) string {
	have = have.Own()
	var input strings.Builder
	for _, table := range commitOrder(want) {
		input.WriteString(restoreTable(table, want, have))
	}
	return input.String()
}

// commitOrder is the order in which tables are committed, so that in between no connection escapes that is captured
// before and after: what begins to capture inbound connections comes before what ceases to. Both at once are harmless, as
// the port is the same. Zones come first, before there is anything to be told apart, or last when they go.
func commitOrder(want ruleset.Ruleset) []ruleset.TableName {
	order := []ruleset.TableName{ruleset.Raw, ruleset.NAT, ruleset.Mangle}
	for _, c := range want.Chains(ruleset.Mangle) {
		if c.Name == ruleset.ChainTPROXY {
			order = []ruleset.TableName{ruleset.Raw, ruleset.Mangle, ruleset.NAT}
		}
	}
	if len(want.Chains(ruleset.Raw)) == 0 {
		order = append(order[1:], ruleset.Raw)
	}
	return order
}

func restoreTable(table ruleset.TableName, want, have ruleset.Ruleset) string {
	var declare, remove, fill, jump, drop []string
	for _, at := range ruleset.Places(want, have) {
		if at.Table != table {
			continue
		}
		wantLines, haveLines := want.Chain(at).Lines(), have.Chain(at).Lines()
		wanted, there := want.Find(at) != nil, have.Find(at) != nil
		switch own := strings.HasPrefix(at.Chain, ruleset.OwnPrefix); {
		case own && (!slices.Equal(wantLines, haveLines) || wanted != there):
			declare = append(declare, ":"+at.Chain+" - [0:0]")
			fill = append(fill, wantLines...)
			if !wanted {
				drop = append(drop, "-X "+at.Chain)
			}
		case !own:
			for _, line := range without(haveLines, wantLines) {
				remove = append(remove, "-D"+strings.TrimPrefix(line, "-A"))
			}
			jump = append(jump, without(wantLines, haveLines)...)
		}
	}
	lines := slices.Concat(declare, remove, fill, jump, drop)
	if len(lines) == 0 {
		return ""
	}
	return "*" + string(table) + "\n" + strings.Join(lines, "\n") + "\nCOMMIT\n"
}

// without is what is left of lines when each of others has taken one equal line away.
func without(lines, others []string) []string {
	rest := slices.Clone(lines)
	for _, other := range others {
		if at := slices.Index(rest, other); at >= 0 {
			rest = slices.Delete(rest, at, at+1)
		}
	}
	return rest
}

// Occupied tells whether the output of iptables-save holds a rule, a chain or a policy that is not ours.
func Occupied(text string) bool {
	for line := range strings.Lines(text) {
		_, line = ruleset.SplitCounters(line)
		fields := strings.Fields(line)
		switch {
		case strings.Contains(line, ruleset.OwnPrefix):
		case strings.HasPrefix(line, "-A "),
			strings.HasPrefix(line, ":") && len(fields) > 1 && fields[1] != ruleset.PolicyAccept:
			return true
		}
	}
	return false
}
