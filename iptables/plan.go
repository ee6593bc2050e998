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
	"sort"
	"strings"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/iptables/kernel"
	"github.com/pillion-proxy/pillion/iptables/nft"
	"github.com/pillion-proxy/pillion/iptables/policy"
	"github.com/pillion-proxy/pillion/iptables/ruleset"
	"github.com/pillion-proxy/pillion/iptables/xtables"
)

// Plan is the difference between the network namespace of the calling thread and the wanted state. Planning changes
// nothing. Plan and commit on the same thread, because programs and sockets inherit its namespace.
type Plan struct {
	// Steps are the rule changes in commit order. A plan without steps, route changes and an address change does nothing.
	Steps []Step
	// Routes are the changes of policy routing.
	Routes []kernel.RouteChange
	// Address is the change of capture.InboundSource6 on the loopback.
	Address AddressChange
	// Warnings are for the user.
	Warnings []string
	// Unread is why the live state could not be read. The plan then assumes an empty namespace and cannot be committed.
	Unread error

	cleanup bool
	spec    capture.Spec
	ipv6    kernel.IPv6State
	backend Backend
	chains  []nft.Chain // all of nftables
	table   nft.Table   // our nftables table before the plan
	verify  func(xtables.Program) error
	stores  []store
}

// AddressChange is a change of the agent's source address.
type AddressChange string

// The changes of the address.
const (
	AddressKept    AddressChange = ""
	AddressAdded   AddressChange = "add"
	AddressRemoved AddressChange = "remove"
)

// Step changes the rules of one family in one flavour. Each of its tables is committed as a whole or not at all.
type Step struct {
	Family  ruleset.Family
	Flavour ruleset.Flavour
	Changes []ruleset.Change

	input  string // for iptables-restore; empty in nftables
	want   ruleset.Ruleset
	before store
}

// Unchanged reports whether the namespace is already in the wanted state.
func (p *Plan) Unchanged() bool {
	return len(p.Steps) == 0 && len(p.Routes) == 0 && p.Address == AddressKept
}

// PlanInit compares the namespace with the rules for a valid spec. backend selects where the rules go. While
// connections that an earlier TPROXY captured are open, the rules and routes they need stay, even if spec does not use
// TPROXY.
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

// Foreign returns the base chains of others that Live does not contain. It reads them now, on the thread of the plan.
func (p *Plan) Foreign() ([]ruleset.ForeignChain, error) {
	return foreignChains(p.stores, p.table, p.chains)
}

// planInit calls underWay for the mark of open TPROXY connections.
func planInit(ctx context.Context, spec capture.Spec, backend Backend, underWay func(*Plan, survey) uint32) (*Plan, error) {
	if err := kernel.Unmapped(spec); err != nil {
		return nil, err
	}
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
	if warning := s.ipv6.Warning(); warning != "" && spec.IPv6 == capture.IPv6Wherever {
		plan.Warnings = append(plan.Warnings, warning)
	}
	if wanted {
		err := plan.addFamily(s, policy.RulesWithMark(spec, ruleset.IPv6, mark))
		switch {
		case err == nil:
			families = ruleset.Families
			if !s.ipv6.Source {
				plan.Address = AddressAdded
			}
		case s.ipv6.Global() || !errors.Is(err, errNoFlavour):
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

// PlanCleanup plans the removal of everything that PlanInit has ever installed, in every flavour.
func PlanCleanup(ctx context.Context) (*Plan, error) {
	plan := &Plan{cleanup: true, backend: NFTables} // programs are needed only for tables that exist
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

// order puts installations before removals, so that rules that move between flavours are never absent. Having both for
// a moment is harmless: their verdicts are the same. The step of our nftables table changes both families at once and
// goes in between.
func (p *Plan) order() {
	rank := func(s *Step) int {
		switch {
		case s.Flavour == ruleset.Native:
			return 1
		case len(s.want.Tables) == 0:
			return 2
		}
		return 0
	}
	sort.SliceStable(p.Steps, func(i, j int) bool { return rank(&p.Steps[i]) < rank(&p.Steps[j]) })
	if p.firstNative() >= 0 && len(p.table.Others) > 0 {
		p.Warnings = append(p.Warnings, fmt.Sprintf("the nftables table inet %s is ours alone; init and cleanup remove from it: %s", nft.TableName, strings.Join(p.table.Others, ", ")))
	}
}

// firstNative returns the index of the step that changes our nftables table for both families, or -1.
func (p *Plan) firstNative() int {
	return slices.IndexFunc(p.Steps, func(s Step) bool { return s.Flavour == ruleset.Native })
}

// Input returns the input of a step for iptables-restore, or an equivalent nft script. Our nftables table serves both
// families, so the first of its steps has the whole script.
func (p *Plan) Input(step int) string {
	if step == p.firstNative() {
		return nft.Script(p.wantedNFTables())
	}
	return p.Steps[step].input
}

// wantedNFTables returns the wanted content of our nftables table.
func (p *Plan) wantedNFTables() [2]ruleset.Ruleset {
	wanted := p.table.Rulesets
	for _, s := range p.Steps {
		if s.Flavour == ruleset.Native {
			wanted[slices.Index(ruleset.Families, s.Family)] = s.want
		}
	}
	return wanted
}

// look makes a survey. Without permission for it, the plan can still be shown, but not committed.
func (p *Plan) look(ctx context.Context) (survey, error) {
	var s survey
	err := kernel.MissingCapability(false)
	if err == nil {
		s, err = look(ctx, p.backend)
	}
	if kernel.IsRefused(err) {
		p.Unread = err
		s = survey{stores: storesUnread(ctx, p.backend)}
		if s.ipv6, err = kernel.ReadIPv6(); err == nil {
			s.routing, err = kernel.ReadRoutes()
		}
	}
	s.verify = xtables.NewVerifier()
	p.ipv6, p.table, p.chains, p.verify, p.stores = s.ipv6, s.table, s.chains, s.verify, s.stores
	p.Warnings = append(p.Warnings, s.hidden()...)
	if s.table.Foreign {
		p.Warnings = append(p.Warnings, fmt.Sprintf("%v: it stays unchanged", foreignTableError(s.table)))
	}
	return s, err
}

// addFamily plans a family's rules in one flavour and the removal of ours from the others.
func (p *Plan) addFamily(s survey, want ruleset.Ruleset) error {
	chosen, err := s.choose(want, p.backend)
	if err != nil {
		return err
	}
	p.addStep(chosen, want)
	return p.addRemoval(s, want.Family, chosen.flavour)
}

// addRemoval plans the removal of our rules from every flavour except spared ("": from all).
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
	step := Step{Family: t.family, Flavour: t.flavour, Changes: ruleset.Diff(want, t.rules), want: want, before: t}
	// In nftables, an unused base chain is not a difference; removing the last rule removes the table.
	changed := len(step.Changes) > 0 || t.ours && len(want.Tables) == 0
	if t.flavour != ruleset.Native {
		step.input = xtables.RestoreInput(want, t.rules)
		changed = step.input != ""
	}
	if changed {
		p.Steps = append(p.Steps, step)
	}
}

// giveUpIPv6 drops IPv6 from the plan for the reason err. The pod has no IPv6 address at which others could reach it.
func (p *Plan) giveUpIPv6(err error) error {
	p.Warnings = append(p.Warnings, fmt.Sprintf("skipping IPv6: %v; the pod has no global IPv6 address", err))
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
