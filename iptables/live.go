package iptables

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/iptables/kernel"
	"github.com/pillion-proxy/pillion/iptables/policy"
	"github.com/pillion-proxy/pillion/iptables/ruleset"
	"github.com/pillion-proxy/pillion/iptables/xtables"
)

// Live holds the rules in the network namespace of the calling thread: those of every origin, in the tables that we
// use.
type Live struct {
	// Held has one entry for each family and flavour with at least one rule.
	Held []ruleset.Held
	// Foreign are the base chains of others that Held does not contain.
	Foreign []ruleset.ForeignChain
	// Warnings name what could not be read.
	Warnings []string
}

// Look reads the rules in force, with counters and reasons. It changes nothing.
func Look(ctx context.Context) (Live, error) {
	if err := kernel.MissingCapability(false); err != nil {
		return Live{}, err
	}
	s, err := look(ctx, NFTables)
	if err != nil {
		return Live{}, err
	}
	live := Live{Warnings: s.hidden()}
	for _, t := range s.stores {
		if t.unread != nil {
			return Live{}, t.unread
		}
		for _, name := range t.opaque {
			live.Warnings = append(live.Warnings, fmt.Sprintf("the %s %s table was not read: %v", t.family, name, xtables.ErrIncompatible))
		}
		for range t.rules.All() {
			live.Held = append(live.Held, ruleset.Held{Flavour: t.flavour, Rules: policy.WithReasons(t.rules)})
			break
		}
	}
	live.Foreign, err = foreignChains(s.stores, s.table, s.chains)
	return live, err
}

// Planned returns the rules for spec, in the families that init would choose in the network namespace of the calling
// thread.
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

// hidden returns warnings about legacy tables that were not read.
func (s survey) hidden() []string {
	var warnings []string
	for _, t := range s.stores {
		warning := fmt.Sprintf("%s has legacy tables that were not read: %v", t.family, t.hidden)
		if errors.Is(t.hidden, xtables.ErrHiddenTables) {
			warning = fmt.Sprintf("rules in legacy tables would not be seen: %v", t.hidden)
		}
		if t.hidden != nil && !slices.Contains(warnings, warning) {
			warnings = append(warnings, warning)
		}
	}
	return warnings
}
