// Package report describes rules to people and programs: it lists them (Show), compares them with the wanted ones and
// states the effect of each difference (Check), and explains the path of one packet (Explain).
//
// Each value has two forms, JSON and String. Nothing here changes the machine.
package report

import (
	"fmt"
	"strings"

	"github.com/pillion-proxy/pillion/iptables/ruleset"
)

// Shown is a rule for programs.
type Shown struct {
	Family  string            `json:"family"`
	Flavour ruleset.Flavour   `json:"flavour,omitempty"`
	Table   ruleset.TableName `json:"table"`
	Chain   string            `json:"chain"`
	// ID and Why are set for rules of ours.
	ID  string `json:"id,omitempty"`
	Why string `json:"why,omitempty"`
	// Rule is the matches and the target in the spelling of iptables.
	Rule    string `json:"rule"`
	Packets uint64 `json:"packets"`
	Bytes   uint64 `json:"bytes"`
	// Unknown means that the rule is not ours and not interpreted.
	Unknown bool `json:"unknown,omitempty"`
}

func newShown(r ruleset.Rule, held ruleset.Held, at ruleset.Place) Shown {
	return Shown{
		Family: held.Rules.Family.String(), Flavour: held.Flavour, Table: at.Table, Chain: at.Chain, ID: r.ID, Why: r.Why,
		Rule: r.Body(at.Chain), Packets: r.Counters.Packets, Bytes: r.Counters.Bytes, Unknown: r.Foreign != "",
	}
}

// Show lists rules in the order in which packets reach them.
func Show(held []ruleset.Held) []Shown {
	shown := []Shown{}
	for _, h := range held {
		for _, table := range ruleset.TableNames {
			for _, c := range h.Rules.InOrder(table) {
				for _, r := range c.Rules {
					shown = append(shown, newShown(r, h, ruleset.Place{Table: table, Chain: c.Name}))
				}
			}
		}
	}
	return shown
}

// ShowText is Show for people. A line without indentation is a heading; a line that begins with "#" is a remark.
func ShowText(held []ruleset.Held) string {
	var text strings.Builder
	heading := ""
	for _, s := range Show(held) {
		if h := fmt.Sprintf("%s %s\n", s.place(), s.Chain); h != heading {
			heading = h
			text.WriteString(h)
		}
		fmt.Fprintf(&text, "    %s", s.Rule)
		if s.Flavour != "" {
			fmt.Fprintf(&text, "  (%d packets, %d bytes)", s.Packets, s.Bytes)
		}
		fmt.Fprintf(&text, "\n      # %s\n", s.remark())
	}
	return text.String()
}

// place is the rule's family, flavour and table.
func (s Shown) place() string {
	if s.Flavour == "" {
		return fmt.Sprintf("%s %s", s.Family, s.Table)
	}
	return fmt.Sprintf("%s %s %s", s.Family, s.Flavour, s.Table)
}

// remark is the ID and reason of a rule of ours, or states that it is not ours.
func (s Shown) remark() string {
	switch {
	case s.Why != "":
		return s.ID + ": " + s.Why
	case s.ID != "":
		return s.ID + ": has our name, but we make no such rule"
	}
	return "not ours"
}
