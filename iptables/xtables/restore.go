package xtables

import (
	"slices"
	"strings"

	"github.com/pillion-proxy/pillion/iptables/ruleset"
)

// RestoreInput returns the input for `iptables-restore --noflush` that turns our part of have into want, with one
// atomic commit for each table, or "" if they are equal.
//
// Declaring a chain of ours empties it, so chains that differ are filled again and equal ones are not mentioned. Rules
// in built-in chains are different: an append repeats on every run, and deleting a missing rule fails the whole commit.
// So jumps are deleted exactly as they were listed, and appended only where they are missing, after the chains they
// lead to are filled. A jump that must precede a foreign rule is inserted at the beginning of its chain.
func RestoreInput(want, have ruleset.Ruleset) string {
	var input strings.Builder
	for _, table := range commitOrder(want) {
		input.WriteString(restoreTable(table, want, have.Own(), have))
	}
	return input.String()
}

// commitOrder returns the order in which tables are committed. A connection that is captured before and after must be
// captured in between: the table that begins to capture inbound connections comes before the table that ceases to.
// Having both for a moment is harmless, since the port is the same. Zones are installed first, before queries need
// them, and removed last.
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

// restoreTable returns the part of one table. have is our part of all.
func restoreTable(table ruleset.TableName, want, have, all ruleset.Ruleset) string {
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
			var first []string // of wantLines, those that are inserted
			for _, r := range want.Chain(at).Rules {
				if _, found := all.Chain(at).Ahead(r); found {
					line := r.Line(at.Chain)
					first, wantLines = append(first, line), without(wantLines, []string{line})
				}
			}
			for _, line := range without(haveLines, wantLines) {
				remove = append(remove, "-D"+strings.TrimPrefix(line, "-A"))
			}
			for _, line := range slices.Backward(first) {
				jump = append(jump, "-I"+strings.TrimPrefix(line, "-A"))
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

// without returns lines after each of others has removed one equal line.
func without(lines, others []string) []string {
	rest := slices.Clone(lines)
	for _, other := range others {
		if at := slices.Index(rest, other); at >= 0 {
			rest = slices.Delete(rest, at, at+1)
		}
	}
	return rest
}

// Occupied reports whether the output of iptables-save has a rule, chain or policy that is not ours.
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
