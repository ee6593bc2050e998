package iptables

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/pillion-proxy/pillion/internal/capture"
)

// Plan is what would change in the network namespace of the calling thread, and how. Making a plan changes nothing.
// Plans are made and committed on the same thread: every program and every socket is started from it.
type Plan struct {
	// Steps are the changes of rules, in the order of their commits. A plan without steps, and without a change of the
	// address and of the routes, changes nothing.
	Steps []Step
	// Routes are the changes of policy routing.
	Routes []RouteChange
	// Address says what happens to capture.InboundSource6 on the loopback.
	Address AddressChange
	// Warnings are what the caller should tell the user.
	Warnings []string
	// Unread is why the live state could not be read. The plan is made as if there was nothing, and cannot be committed.
	Unread error

	cleanup bool
	spec    capture.Spec
	ipv6    ipv6
	backend Backend
	table   nftState // our table of nftables as it was
	verify  func(program) error
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
	Family  Family
	Flavour Flavour
	Changes []Change
	// Input is what iptables-restore is given, or what nft could be given to the same effect. Our table of nftables is one
	// for both families: the first step has it all.
	Input string

	want   Ruleset
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
	if err := plan.addFamily(s, rulesWith(spec, IPv4, mark)); err != nil {
		return nil, err
	}
	families := []Family{IPv4}
	wanted, err := s.ipv6.wanted(spec.IPv6)
	if err != nil {
		return nil, err
	}
	if wanted {
		err := plan.addFamily(s, rulesWith(spec, IPv6, mark))
		switch {
		case err == nil:
			families = Families
			if !s.ipv6.source {
				plan.Address = AddressAdded
			}
		case s.ipv6.global || !errors.Is(err, errNoFlavour):
			return nil, err
		default:
			if err := plan.giveUpIPv6(err); err != nil {
				return nil, err
			}
		}
	} else {
		if err := plan.addRemoval(s, IPv6, ""); err != nil {
			return nil, err
		}
		if s.ipv6.ours {
			plan.Address = AddressRemoved
		}
	}
	plan.Routes = diffRoutes(append(routesFor(spec, families), routesOf(mark, families, s.routing)...), s.routing)
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
	for _, family := range Families {
		if err := plan.addRemoval(s, family, ""); err != nil {
			return nil, err
		}
	}
	if s.ipv6.ours {
		plan.Address = AddressRemoved
	}
	plan.Routes = diffRoutes(nil, s.routing)
	plan.order()
	return plan, nil
}

// order puts what is new before what goes, so that there is no moment without rules when they move from one flavour to
// another. Both at once are harmless: they say the same. Our table of nftables changes once for both families, so that
// its place is in between.
func (p *Plan) order() {
	rank := func(s Step) int {
		switch {
		case s.Flavour == Native:
			return 1
		case len(s.want.Tables) == 0:
			return 2
		}
		return 0
	}
	slices.SortStableFunc(p.Steps, func(a, b Step) int { return rank(a) - rank(b) })
	if i := slices.IndexFunc(p.Steps, func(s Step) bool { return s.Flavour == Native }); i >= 0 {
		p.Steps[i].Input = nftScript(p.wantedNFTables())
	}
}

// wantedNFTables is what our table of nftables shall hold.
func (p *Plan) wantedNFTables() [2]Ruleset {
	wanted := p.table.rulesets
	for _, s := range p.Steps {
		if s.Flavour == Native {
			wanted[slices.Index(Families, s.Family)] = s.want
		}
	}
	return wanted
}

// look makes a survey. Without the right to make one, a plan can still be shown.
func (p *Plan) look(ctx context.Context) (survey, error) {
	var s survey
	err := missingCapability(false)
	if err == nil {
		s, err = look(ctx)
	}
	if errors.As(err, new(MissingCapabilityError)) {
		p.Unread = err
		s = survey{stores: storesUnread(ctx)}
		if s.ipv6, err = readIPv6(); err == nil {
			s.routing, err = readRoutes()
		}
	}
	s.verify = verifier()
	p.ipv6, p.table, p.verify, p.stores = s.ipv6, s.table, s.verify, s.stores
	p.Warnings = append(p.Warnings, s.hidden()...)
	return s, err
}

// addFamily plans the wanted rules of a family in one flavour, and the removal of what is ours in the others.
func (p *Plan) addFamily(s survey, want Ruleset) error {
	chosen, err := s.choose(want, p.backend)
	if err != nil {
		return err
	}
	p.addStep(chosen, want)
	return p.addRemoval(s, want.Family, chosen.flavour)
}

// addRemoval plans the removal of what is ours in every flavour but one. "" spares none.
func (p *Plan) addRemoval(s survey, family Family, spared Flavour) error {
	for _, t := range s.stores {
		if t.family == family && t.flavour != spared && t.ours {
			nothing := Ruleset{Family: family}
			if err := t.usable(nothing); err != nil {
				return err
			}
			p.addStep(t, nothing)
		}
	}
	return nil
}

func (p *Plan) addStep(t store, want Ruleset) {
	step := Step{Family: t.family, Flavour: t.flavour, Changes: Diff(want, t.rules), Input: restoreInput(want, t.rules), want: want, before: t}
	changed := step.Input != ""
	if t.flavour == Native {
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
	p.Routes = slices.DeleteFunc(p.Routes, func(c RouteChange) bool {
		given := c.Route.Family == IPv6 && c.Action == Add
		if given {
			failed = append(failed, removeRoute(c.Route))
		}
		return given
	})
	if p.Address == AddressAdded {
		p.Address = AddressKept
		failed = append(failed, removeSourceAddress())
	}
	return cmp.Or(failed...)
}
