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
	for _, w := range want.Chains {
		h := have.find(w.Name)
		if h == nil {
			h = &Chain{Name: w.Name}
			if w.own() && len(w.Rules) == 0 {
				changes = append(changes, Change{Kind: Missing, Chain: w.Name})
			}
		}
		changes = append(changes, diffChain(w, *h)...)
	}
	for _, h := range have.Chains {
		if want.find(h.Name) != nil {
			continue
		}
		changes = append(changes, diffChain(Chain{Name: h.Name}, h)...)
		if h.own() {
			changes = append(changes, Change{Kind: Extra, Chain: h.Name})
		}
	}
	return changes
}

func diffChain(want, have Chain) []Change {
	wantLines, haveLines := want.lines(), have.lines()
	if slices.Equal(wantLines, haveLines) {
		return nil
	}
	var changes []Change
	rest := slices.Clone(haveLines)
	for i, line := range wantLines {
		change := Change{Chain: want.Name, ID: want.Rules[i].ID, Why: want.Rules[i].Why, Rule: line}
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
		changes = append(changes, Change{Kind: kind, Chain: want.Name, Found: line})
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
				Kind: Reordered, Chain: want.Name, ID: r.ID, Why: r.Why, Rule: line, Found: have[i],
			})
		}
	}
	return changes
}

// restoreInput is what `iptables-restore --noflush` needs to turn our part of have into want, in one atomic commit, and
// nothing when they are the same.
//
// Declaring a chain of ours empties it, so chains that differ are filled anew and the others are not mentioned. A rule
// in somebody else's chain has no such mercy: it is appended again on every run, and deleting one that is not there
// ends the whole commit. So jumps are deleted exactly as they stand and appended only where they are missing, after the
// chains they lead to are full.
func restoreInput(want, have Ruleset) string {
	have = have.Own()
	var declare, remove, fill, jump, drop []string
	for _, name := range chainNames(want, have) {
		w, h := want.chain(name), have.chain(name)
		wantLines, haveLines := w.lines(), h.lines()
		wanted, there := want.find(name) != nil, have.find(name) != nil
		switch own := (Chain{Name: name}).own(); {
		case own && (!slices.Equal(wantLines, haveLines) || wanted != there):
			declare = append(declare, ":"+name+" - [0:0]")
			fill = append(fill, wantLines...)
			if !wanted {
				drop = append(drop, "-X "+name)
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
	return "*nat\n" + strings.Join(lines, "\n") + "\nCOMMIT\n"
}

func chainNames(rulesets ...Ruleset) []string {
	var names []string
	for _, rs := range rulesets {
		for _, c := range rs.Chains {
			if !slices.Contains(names, c.Name) {
				names = append(names, c.Name)
			}
		}
	}
	return names
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
