package iptables

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/pillion-proxy/pillion/internal/capture"
)

// Held is the rules of one family that one flavour holds. The flavour is empty for rules that are only planned.
type Held struct {
	Flavour Flavour
	Rules   Ruleset
}

// Live is what there is in the network namespace of the calling thread: in our tables, everybody's rules.
type Live struct {
	// Held are the families and flavours that have any rule.
	Held []Held
	// Warnings say what could not be looked into.
	Warnings []string
}

// Look reads the rules in force, with their counters and reasons. It changes nothing.
func Look(ctx context.Context) (Live, error) {
	if err := missingCapability(false); err != nil {
		return Live{}, err
	}
	s, err := look(ctx)
	if err != nil {
		return Live{}, err
	}
	live := Live{Warnings: s.hidden()}
	for _, t := range s.stores {
		if t.unread != nil {
			return Live{}, t.unread
		}
		for _, name := range t.opaque {
			live.Warnings = append(live.Warnings, fmt.Sprintf("the %s %s table was not looked into: %v", t.family, name, errIncompatible))
		}
		for range t.rules.All() {
			live.Held = append(live.Held, Held{t.flavour, t.rules.withReasons()})
			break
		}
	}
	return live, nil
}

// Planned are the rules for spec, in the families that would get them in the network namespace of the calling thread.
func Planned(spec capture.Spec) ([]Held, error) {
	state, err := readIPv6()
	if err != nil {
		return nil, err
	}
	wanted, err := state.wanted(spec.IPv6)
	if err != nil {
		return nil, err
	}
	planned := []Held{{Rules: Rules(spec, IPv4)}}
	if wanted {
		planned = append(planned, Held{Rules: Rules(spec, IPv6)})
	}
	return planned, nil
}

// hidden warns of legacy tables for which there is no program.
func (s survey) hidden() []string {
	var warnings []string
	for _, t := range s.stores {
		if t.hidden {
			warnings = append(warnings, fmt.Sprintf("%s has legacy tables that were not looked into: %v", t.family, t.missing))
		}
	}
	return warnings
}

// inOrder are the chains of a table that have rules, as packets come to them: each built-in chain, and behind it those to
// which its rules jump. What nothing of ours jumps to comes last.
func (rs Ruleset) inOrder(table TableName) []Chain {
	var order []Chain
	var visit func(name string)
	visit = func(name string) {
		c := rs.chain(Place{table, name})
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
	for _, name := range baseChains {
		visit(name)
	}
	for _, c := range rs.Chains(table) {
		visit(c.Name)
	}
	return order
}

// body is the rule's line without the chain and the comment.
func (r Rule) body(chain string) string {
	r.ID = ""
	return strings.TrimPrefix(r.line(chain), "-A "+chain+" ")
}
