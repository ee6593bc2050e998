// Package iptables installs, repairs and removes the rules that redirect a workload's traffic to the agent.
//
// A run surveys the network namespace (survey.go), plans the difference (plan.go) and commits it (commit.go). Look reads
// the rules in force. Surveys and plans change nothing. A commit reads everything back and succeeds only if the namespace
// holds what was planned; a failed init restores the former state.
//
// The parts have packages of their own. Below this one: ruleset (rules as data), policy (which rules a spec needs), trace
// (a packet's path), xtables and nft (the two back ends) and kernel (addresses, routes, capabilities). Above it: report
// (show, check, explain) and validate (prove the rules by connections).
//
// Every function works in the network namespace of the calling thread and must stay on that thread: programs and sockets
// inherit its namespace.
package iptables

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/iptables/kernel"
	"github.com/pillion-proxy/pillion/iptables/nft"
	"github.com/pillion-proxy/pillion/iptables/policy"
	"github.com/pillion-proxy/pillion/iptables/ruleset"
	"github.com/pillion-proxy/pillion/iptables/xtables"
)

// Plan is what would change in the network namespace of the calling thread, and how. Making a plan changes nothing.
// Plans are made and committed on the same thread: every program and every socket is started from it.
type Plan struct {
	// Steps are the changes of rules, in the order of their commits. A plan without steps, and without a change of the
	// address and of the routes, changes nothing.
	Steps []Step
	// Routes are the changes of policy routing.
	Routes []kernel.RouteChange
	// Address says what happens to capture.InboundSource6 on the loopback.
	Address AddressChange
	// Warnings are what the caller should tell the user.
	Warnings []string
	// Unread is why the live state could not be read. The plan is made as if there was nothing, and cannot be committed.
	Unread error

	cleanup bool
	spec    capture.Spec
	ipv6    kernel.IPv6State
	backend Backend
	table   nft.Table // our table of nftables as it was
	verify  func(xtables.Program) error
	stores  []store
}

// AddressChange says what happens to the agent's source address.
type AddressChange string

// The changes of the address.
const (
	AddressKept    AddressChange = ""
	AddressAdded   AddressChange = "add"
	AddressRemoved AddressChange = "remove"
)

// Step is the share that one family's rules of one flavour have in a plan. Each table is committed whole or not at all.
type Step struct {
	Family  ruleset.Family
	Flavour ruleset.Flavour
	Changes []ruleset.Change
	// Input is what iptables-restore is given, or what nft could be given to the same effect. Our table of nftables is one
	// for both families: the first step has it all.
	Input string

	want   ruleset.Ruleset
	before store
}

// Unchanged tells whether everything is already as it should be.
func (p *Plan) Unchanged() bool {
	return len(p.Steps) == 0 && len(p.Routes) == 0 && p.Address == AddressKept
}

// PlanInit compares what is there with the rules for spec, which must be valid. The backend says where they go. What
// TPROXY needs stays while its connections are under way, though spec may not want it.
func PlanInit(ctx context.Context, spec capture.Spec, backend Backend) (*Plan, error) {
	return planInit(ctx, spec, backend, (*Plan).underWay)
}

// PlanCheck is PlanInit for a comparison: rules that an earlier init left for connections in progress are wanted, even if
// those connections have ended since.
func PlanCheck(ctx context.Context, spec capture.Spec, backend Backend) (*Plan, error) {
	return planInit(ctx, spec, backend, (*Plan).leftUnderWay)
}

// Live returns the rules that each flavour held in each family when the plan was made.
func (p *Plan) Live() []ruleset.Held {
	held := make([]ruleset.Held, 0, len(p.stores))
	for _, t := range p.stores {
		held = append(held, ruleset.Held{Flavour: t.flavour, Rules: t.rules})
	}
	return held
}

// planInit asks underWay for the mark of TPROXY's connections under way.
func planInit(ctx context.Context, spec capture.Spec, backend Backend, underWay func(*Plan, survey) uint32) (*Plan, error) {
	plan := &Plan{spec: spec, backend: backend}
	s, err := plan.look(ctx)
	if err != nil {
		return nil, err
	}
	var mark uint32
	if !spec.CapturesInboundByTPROXY() {
		mark = underWay(plan, s)
	}
	if err := plan.addFamily(s, policy.RulesWithMark(spec, ruleset.IPv4, mark)); err != nil {
		return nil, err
	}
	families := []ruleset.Family{ruleset.IPv4}
	wanted, err := s.ipv6.Wanted(spec.IPv6)
	if err != nil {
		return nil, err
	}
	if wanted {
		err := plan.addFamily(s, policy.RulesWithMark(spec, ruleset.IPv6, mark))
		switch {
		case err == nil:
			families = ruleset.Families
			if !s.ipv6.Source {
				plan.Address = AddressAdded
			}
		case s.ipv6.Global || !errors.Is(err, errNoFlavour):
			return nil, err
		default:
			if err := plan.giveUpIPv6(err); err != nil {
				return nil, err
			}
		}
	} else {
		if err := plan.addRemoval(s, ruleset.IPv6, ""); err != nil {
			return nil, err
		}
		if s.ipv6.Ours {
			plan.Address = AddressRemoved
		}
	}
	plan.Routes = kernel.DiffRoutes(append(kernel.RoutesFor(spec, families), kernel.RoutesByMark(mark, families, s.routing)...), s.routing)
	plan.order()
	return plan, nil
}

// PlanCleanup finds everything that PlanInit ever made, in whichever flavour.
func PlanCleanup(ctx context.Context) (*Plan, error) {
	plan := &Plan{cleanup: true}
	s, err := plan.look(ctx)
	if err != nil {
		return nil, err
	}
	if plan.Unread != nil {
		return nil, plan.Unread
	}
	for _, family := range ruleset.Families {
		if err := plan.addRemoval(s, family, ""); err != nil {
			return nil, err
		}
	}
	if s.ipv6.Ours {
		plan.Address = AddressRemoved
	}
	plan.Routes = kernel.DiffRoutes(nil, s.routing)
	plan.order()
	return plan, nil
}

// order puts what is new before what goes, so that there is no moment without rules when they move from one flavour to
// another. Both at once are harmless: they say the same. Our table of nftables changes once for both families, so that
// its place is in between.
func (p *Plan) order() {
	rank := func(s Step) int {
		switch {
		case s.Flavour == ruleset.Native:
			return 1
		case len(s.want.Tables) == 0:
			return 2
		}
		return 0
	}
	slices.SortStableFunc(p.Steps, func(a, b Step) int { return rank(a) - rank(b) })
	if i := slices.IndexFunc(p.Steps, func(s Step) bool { return s.Flavour == ruleset.Native }); i >= 0 {
		p.Steps[i].Input = nft.Script(p.wantedNFTables())
	}
}

// wantedNFTables is what our table of nftables shall hold.
func (p *Plan) wantedNFTables() [2]ruleset.Ruleset {
	wanted := p.table.Rulesets
	for _, s := range p.Steps {
		if s.Flavour == ruleset.Native {
			wanted[slices.Index(ruleset.Families, s.Family)] = s.want
		}
	}
	return wanted
}

// look makes a survey. Without the right to make one, a plan can still be shown.
func (p *Plan) look(ctx context.Context) (survey, error) {
	var s survey
	err := kernel.MissingCapability(false)
	if err == nil {
		s, err = look(ctx)
	}
	if errors.As(err, new(kernel.MissingCapabilityError)) {
		p.Unread = err
		s = survey{stores: storesUnread(ctx)}
		if s.ipv6, err = kernel.ReadIPv6(); err == nil {
			s.routing, err = kernel.ReadRoutes()
		}
	}
	s.verify = xtables.NewVerifier()
	p.ipv6, p.table, p.verify, p.stores = s.ipv6, s.table, s.verify, s.stores
	p.Warnings = append(p.Warnings, s.hidden()...)
	return s, err
}

// addFamily plans the wanted rules of a family in one flavour, and the removal of what is ours in the others.
func (p *Plan) addFamily(s survey, want ruleset.Ruleset) error {
	chosen, err := s.choose(want, p.backend)
	if err != nil {
		return err
	}
	p.addStep(chosen, want)
	return p.addRemoval(s, want.Family, chosen.flavour)
}

// addRemoval plans the removal of what is ours in every flavour but one. "" spares none.
func (p *Plan) addRemoval(s survey, family ruleset.Family, spared ruleset.Flavour) error {
	for _, t := range s.stores {
		if t.family == family && t.flavour != spared && t.ours {
			nothing := ruleset.Ruleset{Family: family}
			if err := t.usable(nothing); err != nil {
				return err
			}
			p.addStep(t, nothing)
		}
	}
	return nil
}

func (p *Plan) addStep(t store, want ruleset.Ruleset) {
	step := Step{Family: t.family, Flavour: t.flavour, Changes: ruleset.Diff(want, t.rules), Input: xtables.RestoreInput(want, t.rules), want: want, before: t}
	changed := step.Input != ""
	if t.flavour == ruleset.Native {
		// A base chain that nobody needs any more is no difference between rules, but the last rule takes the table along.
		changed = len(step.Changes) > 0 || t.ours && len(want.Tables) == 0
		step.Input = ""
	}
	if changed {
		p.Steps = append(p.Steps, step)
	}
}

// giveUpIPv6 leaves IPv6 alone for the reason err, in a pod that has no address at which it could be reached.
func (p *Plan) giveUpIPv6(err error) error {
	p.Warnings = append(p.Warnings, fmt.Sprintf("IPv6 is left alone: %v; the pod has no global IPv6 address", err))
	var failed []error
	p.Routes = slices.DeleteFunc(p.Routes, func(c kernel.RouteChange) bool {
		given := c.Route.Family == ruleset.IPv6 && c.Action == kernel.Add
		if given {
			failed = append(failed, kernel.RemoveRoute(c.Route))
		}
		return given
	})
	if p.Address == AddressAdded {
		p.Address = AddressKept
		failed = append(failed, kernel.RemoveSourceAddress())
	}
	return cmp.Or(failed...)
}
