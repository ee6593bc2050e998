package ruleset

import (
	"slices"
	"strings"
)

// ChangeKind is how an installed rule differs from the wanted one.
type ChangeKind string

// The kinds of difference.
const (
	Missing   ChangeKind = "missing"   // wanted, not there
	Extra     ChangeKind = "extra"     // there, not wanted
	Duplicate ChangeKind = "duplicate" // there more than once
	Tampered  ChangeKind = "tampered"  // there under its ID with another content
	Reordered ChangeKind = "reordered" // there, but not where it has to be
)

// Change is one difference: of a rule, or of a whole chain if Rule and Found are empty.
type Change struct {
	Kind  ChangeKind `json:"kind"`
	Table TableName  `json:"table"`
	Chain string     `json:"chain"`
	// ID and Why are those of the wanted rule.
	ID  string `json:"id,omitempty"`
	Why string `json:"why,omitempty"`
	// Rule is the wanted rule, empty for an extra or duplicate one.
	Rule string `json:"rule,omitempty"`
	// Found is the installed rule, if it is not the wanted one.
	Found string `json:"found,omitempty"`
}

// Diff compares our part of have with want, chain by chain and in order. It ignores foreign rules and the position of
// our jumps among them, unless a foreign rule decides about packets of Before: other decisions of others that precede ours
// are theirs. Equal rulesets have no changes.
func Diff(want, have Ruleset) []Change {
	all := have
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
			if found = diffChain(*w, *h); !own {
				found = append(found, behind(*w, all.Chain(at))...)
			}
		}
		for i := range found {
			found[i].Table, found[i].Chain = at.Table, at.Chain
		}
		changes = append(changes, found...)
	}
	return changes
}

// Places returns the chains of all the rulesets, each once, table by table.
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

// behind returns the wanted rules that are there, but behind a foreign rule which they must precede.
func behind(want, have Chain) []Change {
	var changes []Change
	lines := have.Lines()
	for _, r := range want.Rules {
		if foreign, found := have.Ahead(r); found && slices.Contains(lines, r.Line(want.Name)) {
			changes = append(changes, Change{Kind: Reordered, ID: r.ID, Why: r.Why, Rule: r.Line(want.Name), Found: foreign.Line(want.Name)})
		}
	}
	return changes
}

// sameID reports whether an installed rule has the ID of a wanted one as its comment.
func sameID(line, id string) bool {
	return id != "" && strings.Contains(line, `--comment "`+CommentPrefix+id+`"`)
}

// reordered returns the rules that are in another's place. Both sides have the same rules.
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
