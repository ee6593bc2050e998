package iptables

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/capture"
)

// Plan is what would change in the network namespace of the calling thread, and how. Making a plan changes nothing.
// Plans are made and committed on the same thread: every program and every socket is started from it.
type Plan struct {
	// Steps are the tables that change, in the order of their commits. A plan without steps and without a change of the
	// address changes nothing.
	Steps []Step
	// Address says what happens to capture.InboundSource6 on the loopback.
	Address AddressChange
	// Warnings are what the caller should tell the user.
	Warnings []string
	// Unread is why the live state could not be read. The plan is made as if there was nothing, and cannot be committed.
	Unread error

	cleanup bool
	ipv6    ipv6
}

// AddressChange says what happens to the agent's source address.
type AddressChange string

// The changes of the address.
const (
	AddressKept    AddressChange = ""
	AddressAdded   AddressChange = "add"
	AddressRemoved AddressChange = "remove"
)

// Step is one table's share of a plan.
type Step struct {
	Family  Family
	Flavour Flavour
	Changes []Change
	// Input is what iptables-restore is given.
	Input string

	want   Ruleset
	before table
}

// Unchanged tells whether everything is already as it should be.
func (p *Plan) Unchanged() bool { return len(p.Steps) == 0 && p.Address == AddressKept }

// PlanInit compares what is there with the rules for spec, which must be valid.
func PlanInit(ctx context.Context, spec capture.Spec) (*Plan, error) {
	plan := &Plan{}
	s, err := plan.look(ctx)
	if err != nil {
		return nil, err
	}
	if err := plan.addFamily(s, Rules(spec, IPv4)); err != nil {
		return nil, err
	}
	if !s.ipv6.enabled {
		return plan, plan.addRemoval(s, IPv6)
	}
	if err := plan.addFamily(s, Rules(spec, IPv6)); err != nil {
		if s.ipv6.global || !errors.Is(err, errNoProgram) {
			return nil, err
		}
		return plan, plan.giveUpIPv6(err)
	}
	if !s.ipv6.source {
		plan.Address = AddressAdded
	}
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
		if err := plan.addRemoval(s, family); err != nil {
			return nil, err
		}
	}
	if s.ipv6.ours {
		plan.Address = AddressRemoved
	}
	return plan, nil
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
		s = survey{tables: tablesUnread(ctx)}
		s.ipv6, err = readIPv6()
	}
	p.ipv6 = s.ipv6
	return s, err
}

// addFamily plans the wanted rules of a family in one flavour, and the removal of what is ours in the other, in this
// order: in between both are there and say the same.
func (p *Plan) addFamily(s survey, want Ruleset) error {
	chosen, err := s.choose(want.Family)
	if err != nil {
		return err
	}
	p.addStep(chosen, want)
	for _, t := range s.tables {
		if t.family == want.Family && t.flavour != chosen.flavour && t.ours {
			if err := t.usable(); err != nil {
				return err
			}
			p.addStep(t, Ruleset{Family: t.family})
		}
	}
	return nil
}

func (p *Plan) addRemoval(s survey, family Family) error {
	for _, t := range s.tables {
		if t.family == family && t.ours {
			if err := t.usable(); err != nil {
				return err
			}
			p.addStep(t, Ruleset{Family: family})
		}
	}
	return nil
}

func (p *Plan) addStep(t table, want Ruleset) {
	input := restoreInput(want, t.rules)
	if input == "" {
		return
	}
	p.Steps = append(p.Steps, Step{
		Family: t.family, Flavour: t.flavour, Changes: Diff(want, t.rules), Input: input, want: want, before: t,
	})
}

// Commit carries the plan out and reads it back: it succeeds only when what is there is what was wanted. A failed init
// takes back what it has done; a failed cleanup goes on and takes away what it can.
func (p *Plan) Commit(ctx context.Context) error {
	if p.Unread != nil {
		return p.Unread
	}
	if p.Unchanged() {
		return nil
	}
	if err := p.verifyPrograms(); err != nil {
		return err
	}
	if p.cleanup {
		return p.remove(ctx)
	}
	if err := p.install(ctx); err != nil {
		if undoErr := p.undo(ctx); undoErr != nil {
			return fmt.Errorf("%w; and taking it back failed: %w; run pillion cleanup", err, undoErr)
		}
		return fmt.Errorf("%w; everything is as it was", err)
	}
	return nil
}

// verifyPrograms runs each program once, before anything is touched.
func (p *Plan) verifyPrograms() error {
	var verified []string
	for _, step := range p.Steps {
		if err := missingCapability(step.Flavour == Legacy); err != nil {
			return err
		}
		file, err := filepath.EvalSymlinks(step.before.program.main)
		if err == nil && slices.Contains(verified, file) {
			continue
		}
		if err := step.before.program.verify(); err != nil {
			return err
		}
		verified = append(verified, file)
	}
	return nil
}

func (p *Plan) install(ctx context.Context) error {
	if p.Address == AddressAdded {
		if err := addSourceAddress(); err != nil {
			return err
		}
	}
	done := make([]Step, 0, len(p.Steps))
	for _, step := range p.Steps {
		err := step.before.program.apply(ctx, step.Input)
		switch {
		case err == nil:
			done = append(done, step)
		case step.Family != IPv6 || p.ipv6.global || !errors.Is(err, errNoKernelSupport):
			return err
		default:
			if err := p.giveUpIPv6(err); err != nil {
				return err
			}
		}
	}
	p.Steps = done
	return p.readBack(ctx)
}

// giveUpIPv6 leaves IPv6 alone for the reason err, in a pod that has no address at which it could be reached.
func (p *Plan) giveUpIPv6(err error) error {
	p.Warnings = append(p.Warnings, fmt.Sprintf("IPv6 is left alone: %v; the pod has no global IPv6 address", err))
	if p.Address != AddressAdded {
		return nil
	}
	p.Address = AddressKept
	return removeSourceAddress()
}

// readBack lists every table that was changed, at the same time, and compares.
func (p *Plan) readBack(ctx context.Context) error {
	listings := make([]*process, 0, len(p.Steps))
	var failed []error
	for _, step := range p.Steps {
		listing, err := start(ctx, "", step.before.program.save, "-t", natTable)
		if err != nil {
			failed = append(failed, err)
			break
		}
		listings = append(listings, listing)
	}
	for i, listing := range listings {
		step := p.Steps[i]
		text, err := listing.wait()
		if err == nil {
			err = step.compare(text)
		}
		if err != nil {
			failed = append(failed, fmt.Errorf("reading %s rules back: %w", step.Family, err))
		}
	}
	return firstOf(failed)
}

// compare holds a listing against what the step wanted.
func (s Step) compare(listing string) error {
	rules, err := s.before.interpret(listing)
	if err != nil {
		return err
	}
	if changes := Diff(s.want, rules); len(changes) > 0 {
		return mismatchError(changes)
	}
	return nil
}

// mismatchError is the differences found after a commit that reported success.
type mismatchError []Change

func (e mismatchError) Error() string {
	first := e[0]
	return fmt.Sprintf("%s would still be needed, the first: %s in %s: %s%s", count(len(e)), first.Kind, first.Chain, first.Rule, first.Found)
}

// undoTimeout is for taking back, which happens even when the caller's own time is over.
const undoTimeout = 30 * time.Second

// undo brings every table of the plan from whatever it is now to what it was before.
func (p *Plan) undo(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	now, err := look(ctx)
	if err != nil {
		return err
	}
	var failed []error
	for _, step := range slices.Backward(p.Steps) {
		failed = append(failed, step.undo(ctx, now.table(step.Family, step.Flavour)))
	}
	if p.Address == AddressAdded {
		failed = append(failed, removeSourceAddress())
	}
	return firstOf(failed)
}

// undo brings one table from what it is now to what it was before, and makes sure of it.
func (s Step) undo(ctx context.Context, now table) error {
	if now.unread != nil {
		return now.unread
	}
	s.want = s.before.rules.Own()
	if input := restoreInput(s.want, now.rules); input != "" {
		if err := s.before.program.apply(ctx, input); err != nil {
			return err
		}
		listing, err := run(ctx, "", s.before.program.save, "-t", natTable)
		if err != nil {
			return err
		}
		if err := s.compare(listing); err != nil {
			return err
		}
	}
	if s.Flavour == NFT {
		return removeEmptyNFT(s.Family, s.before.chains)
	}
	return nil
}

// remove is a cleanup: rules first, then the address that they let pass, then the empty tables.
func (p *Plan) remove(ctx context.Context) error {
	var failed []error
	for _, step := range p.Steps {
		failed = append(failed, step.before.program.apply(ctx, step.Input))
	}
	failed = append(failed, p.readBack(ctx))
	if p.Address == AddressRemoved {
		failed = append(failed, removeSourceAddress())
	}
	for _, step := range p.Steps {
		if step.Flavour == NFT {
			failed = append(failed, removeEmptyNFT(step.Family, nil))
		}
	}
	return firstOf(failed)
}

// removeEmptyNFT removes the base chains of the nat table that are not among keep and that nobody uses, and the table
// when nothing is left in it. iptables makes them with its first rule and leaves them behind with the last; it makes
// them again whenever they are needed, so nobody misses them. Chains that bear other names, rules, references or another
// policy are somebody's, and so is a table that was there before.
func removeEmptyNFT(family Family, keep []string) error {
	chains, err := nftChains()
	if err != nil {
		return err
	}
	var empty []string
	inUse := false
	for _, c := range chains {
		if c.family != family || c.table != natTable {
			continue
		}
		if c.untouched && slices.Contains(natChains, c.name) && !slices.Contains(keep, c.name) {
			empty = append(empty, c.name)
		} else {
			inUse = true
		}
	}
	if len(empty) == 0 {
		return nil
	}
	if err := removeNFT(family, empty, !inUse); err != nil && !errors.Is(err, unix.EBUSY) {
		return err
	}
	return nil
}

// natChains are the base chains of the nat table as iptables names them.
var natChains = []string{chainPrerouting, "INPUT", chainBuiltOutput, "POSTROUTING"}

func firstOf(errs []error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}
