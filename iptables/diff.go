package iptables

import (
	"slices"
	"strings"
)

// ChangeKind says how what is there differs from what is wanted.
type ChangeKind string

// The kinds of difference.
const (
	Missing   ChangeKind = "missing"   // wanted, not there
	Extra     ChangeKind = "extra"     // there, not wanted
	Duplicate ChangeKind = "duplicate" // there more than once
	Tampered  ChangeKind = "tampered"  // there under its ID, but with another content
	Reordered ChangeKind = "reordered" // there, but not where it has to be
)

// Change is one difference, in one rule, or in a whole chain when there is no rule.
type Change struct {
	Kind  ChangeKind `json:"kind"`
	Table TableName  `json:"table"`
	Chain string     `json:"chain"`
	// ID and Why are those of the wanted rule.
	ID  string `json:"id,omitempty"`
	Why string `json:"why,omitempty"`
	// Rule is the wanted rule, empty for an extra or duplicate one.
	Rule string `json:"rule,omitempty"`
	// Found is the rule that is there, when it is not the wanted one.
	Found string `json:"found,omitempty"`
}

// Diff compares our part of have with want, whole chains in order. Rules and chains of other people are not looked at,
// and neither is where among them our jumps stand: what they decide before us is theirs to decide. It returns nothing
// when the two are the same.
func Diff(want, have Ruleset) []Change {
	have = have.Own()
	var changes []Change
	for _, at := range places(want, have) {
		w, h := want.find(at), have.find(at)
		var found []Change
		switch own := strings.HasPrefix(at.Chain, ownPrefix); {
		case w == nil:
			found = diffChain(Chain{Name: at.Chain}, *h)
			if own {
				found = append(found, Change{Kind: Extra})
			}
		case h == nil:
			found = diffChain(*w, Chain{Name: at.Chain})
			if own && len(w.Rules) == 0 {
				found = append(found, Change{Kind: Missing})
			}
		default:
			found = diffChain(*w, *h)
		}
		for i := range found {
			found[i].Table, found[i].Chain = at.Table, at.Chain
		}
		changes = append(changes, found...)
	}
	return changes
}

// places are the chains of all the rulesets, table by table, each once.
func places(rulesets ...Ruleset) []Place {
	var all []Place
	for _, table := range TableNames {
		for _, rs := range rulesets {
			for _, c := range rs.Chains(table) {
				if at := (Place{table, c.Name}); !slices.Contains(all, at) {
					all = append(all, at)
				}
			}
		}
	}
	return all
}

func diffChain(want, have Chain) []Change {
	wantLines, haveLines := want.lines(), have.lines()
	if slices.Equal(wantLines, haveLines) {
		return nil
	}
	var changes []Change
	rest := slices.Clone(haveLines)
	for i, line := range wantLines {
		change := Change{ID: want.Rules[i].ID, Why: want.Rules[i].Why, Rule: line}
		if at := slices.Index(rest, line); at >= 0 {
			rest = slices.Delete(rest, at, at+1)
			continue
		}
		change.Kind = Missing
		if at := slices.IndexFunc(rest, func(found string) bool { return sameID(found, want.Rules[i].ID) }); at >= 0 {
			change.Kind, change.Found = Tampered, rest[at]
			rest = slices.Delete(rest, at, at+1)
		}
		changes = append(changes, change)
	}
	for _, line := range rest {
		kind := Extra
		if slices.Contains(wantLines, line) {
			kind = Duplicate
		}
		changes = append(changes, Change{Kind: kind, Found: line})
	}
	if len(changes) == 0 {
		changes = reordered(want, haveLines)
	}
	return changes
}

// sameID tells whether a rule that is there carries the ID of a wanted one as its comment.
func sameID(line, id string) bool {
	return id != "" && strings.Contains(line, `--comment "`+commentPrefix+id+`"`)
}

// reordered names the rules that stand in another's place. Both sides hold the same rules.
func reordered(want Chain, have []string) []Change {
	var changes []Change
	for i, r := range want.Rules {
		if line := r.line(want.Name); line != have[i] {
			changes = append(changes, Change{
				Kind: Reordered, ID: r.ID, Why: r.Why, Rule: line, Found: have[i],
			})
		}
	}
	return changes
}

// restoreInput is what `iptables-restore --noflush` needs to turn our part of have into want, in one atomic commit for each
// table, and nothing when they are the same.
//
// Declaring a chain of ours empties it, so chains that differ are filled anew and the others are not mentioned. A rule
// in somebody else's chain has no such mercy: it is appended again on every run, and deleting one that is not there
// ends the whole commit. So jumps are deleted exactly as they stand and appended only where they are missing, after the
// chains they lead to are full.
func restoreInput(want, have Ruleset) string {
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
func commitOrder(want Ruleset) []TableName {
	order := []TableName{Raw, NAT, Mangle}
	for _, c := range want.Chains(Mangle) {
		if c.Name == chainTPROXY {
			order = []TableName{Raw, Mangle, NAT}
		}
	}
	if len(want.Chains(Raw)) == 0 {
		order = append(order[1:], Raw)
	}
	return order
}

func restoreTable(table TableName, want, have Ruleset) string {
	var declare, remove, fill, jump, drop []string
	for _, at := range places(want, have) {
		if at.Table != table {
			continue
		}
		wantLines, haveLines := want.chain(at).lines(), have.chain(at).lines()
		wanted, there := want.find(at) != nil, have.find(at) != nil
		switch own := strings.HasPrefix(at.Chain, ownPrefix); {
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
