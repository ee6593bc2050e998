package ruleset

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
	for _, at := range Places(want, have) {
		w, h := want.Find(at), have.Find(at)
		var found []Change
		switch own := strings.HasPrefix(at.Chain, OwnPrefix); {
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

// Places are the chains of all the rulesets, table by table, each once.
func Places(rulesets ...Ruleset) []Place {
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
	wantLines, haveLines := want.Lines(), have.Lines()
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
	return id != "" && strings.Contains(line, `--comment "`+CommentPrefix+id+`"`)
}

// reordered names the rules that stand in another's place. Both sides hold the same rules.
func reordered(want Chain, have []string) []Change {
	var changes []Change
	for i, r := range want.Rules {
		if line := r.Line(want.Name); line != have[i] {
			changes = append(changes, Change{
				Kind: Reordered, ID: r.ID, Why: r.Why, Rule: line, Found: have[i],
			})
		}
	}
	return changes
}
