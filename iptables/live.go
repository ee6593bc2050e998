package iptables

import (
	"context"
	"fmt"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/iptables/kernel"
	"github.com/pillion-proxy/pillion/iptables/policy"
	"github.com/pillion-proxy/pillion/iptables/ruleset"
	"github.com/pillion-proxy/pillion/iptables/xtables"
)

// Live is what there is in the network namespace of the calling thread: in our tables, everybody's rules.
type Live struct {
	// Held are the families and flavours that have any rule.
	Held []ruleset.Held
	// Warnings say what could not be looked into.
	Warnings []string
}

// Look reads the rules in force, with their counters and reasons. It changes nothing.
func Look(ctx context.Context) (Live, error) {
	if err := kernel.MissingCapability(false); err != nil {
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
			live.Warnings = append(live.Warnings, fmt.Sprintf("the %s %s table was not looked into: %v", t.family, name, xtables.ErrIncompatible))
		}
		for range t.rules.All() {
			live.Held = append(live.Held, ruleset.Held{Flavour: t.flavour, Rules: policy.WithReasons(t.rules)})
			break
		}
	}
	return live, nil
}

// Planned are the rules for spec, in the families that would get them in the network namespace of the calling thread.
func Planned(spec capture.Spec) ([]ruleset.Held, error) {
	state, err := kernel.ReadIPv6()
	if err != nil {
		return nil, err
	}
	wanted, err := state.Wanted(spec.IPv6)
	if err != nil {
		return nil, err
	}
	planned := []ruleset.Held{{Rules: policy.Rules(spec, ruleset.IPv4)}}
	if wanted {
		planned = append(planned, ruleset.Held{Rules: policy.Rules(spec, ruleset.IPv6)})
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
