package iptables

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/pillion-proxy/pillion/iptables/kernel"
	"github.com/pillion-proxy/pillion/iptables/nft"
	"github.com/pillion-proxy/pillion/iptables/ruleset"
	"github.com/pillion-proxy/pillion/iptables/xtables"
)

// Commit carries the plan out and reads it back: it succeeds only when what is there is what was wanted. A failed init
// takes back what it has done; a failed cleanup goes on and takes away what it can. Where the back end was ours to choose
// and iptables turns out to lack something, nftables take its place, and the plan is then the one that was carried out.
func (p *Plan) Commit(ctx context.Context) error {
	if p.Unread != nil {
		return p.Unread
	}
	if p.Unchanged() {
		return nil
	}
	if err := p.verifyPrograms(); err != nil {
		return p.fallBack(ctx, err)
	}
	if p.cleanup {
		return p.remove(ctx)
	}
	if err := p.install(ctx); err != nil {
		if undoErr := p.undo(ctx); undoErr != nil {
			return fmt.Errorf("%w; and taking it back failed: %w; run pillion cleanup", err, undoErr)
		}
		return p.fallBack(ctx, fmt.Errorf("%w; everything is as it was", err))
	}
	return nil
}

// fallBack makes the rules in nftables after iptables has failed for the given reason, if that is of any use and nobody
// has said otherwise.
func (p *Plan) fallBack(ctx context.Context, reason error) error {
	if p.cleanup || p.backend != Auto || !xtables.Lacks(reason) {
		return reason
	}
	next, err := PlanInit(ctx, p.spec, NFTables)
	if err == nil {
		err = next.Commit(ctx)
	}
	if err != nil {
		return fmt.Errorf("%w; nor can nftables be used: %w", reason, err)
	}
	next.Warnings = append(next.Warnings, fmt.Sprintf("the rules were made in nftables, because iptables cannot be used: %v", reason))
	*p = *next
	return nil
}

// verifyPrograms runs each program once, before anything is touched.
func (p *Plan) verifyPrograms() error {
	for _, step := range p.Steps {
		if err := kernel.MissingCapability(step.Flavour == ruleset.Legacy); err != nil {
			return err
		}
		if step.Flavour == ruleset.Native {
			continue
		}
		if err := p.verify(step.before.program); err != nil {
			return err
		}
	}
	return nil
}

func (p *Plan) install(ctx context.Context) error {
	if p.Address == AddressAdded {
		if err := kernel.AddSourceAddress(); err != nil {
			return err
		}
	}
	if err := p.changeRoutes(kernel.Add); err != nil {
		return err
	}
	done := make([]Step, 0, len(p.Steps))
	for i, step := range p.Steps {
		err := p.apply(ctx, i)
		switch {
		case err == nil:
			done = append(done, step)
		case step.Family != ruleset.IPv6 || p.ipv6.Global || !errors.Is(err, kernel.ErrNoKernelSupport):
			return err
		default:
			if err := p.giveUpIPv6(err); err != nil {
				return err
			}
		}
	}
	p.Steps = done
	if err := p.readBack(ctx); err != nil {
		return err
	}
	if err := p.changeRoutes(kernel.Remove); err != nil {
		return err
	}
	if p.Address == AddressRemoved {
		if err := kernel.RemoveSourceAddress(); err != nil {
			return err
		}
	}
	for _, step := range p.Steps {
		if step.Flavour == ruleset.NFT {
			if err := nft.RemoveEmpty(step.Family, step.emptied(), nil); err != nil {
				return err
			}
		}
	}
	return nil
}

// apply carries out a step. The first of those that are about our table of nftables carries out both.
func (p *Plan) apply(ctx context.Context, i int) error {
	step := p.Steps[i]
	if step.Flavour != ruleset.Native {
		return step.before.program.Apply(ctx, step.Input)
	}
	if i > 0 && p.Steps[i-1].Flavour == ruleset.Native {
		return nil
	}
	return nft.Transition(p.wantedNFTables(), p.table).Apply()
}

// emptied are the tables in which there was a part of ours and is none any more.
func (s Step) emptied() []ruleset.TableName {
	own := s.before.rules.Own()
	return slices.DeleteFunc(slices.Clone(ruleset.TableNames), func(name ruleset.TableName) bool {
		return len(own.Chains(name)) == 0 || len(s.want.Chains(name)) > 0
	})
}

// changeRoutes makes one kind of the planned changes. Routes are there before a rule needs them, and go after it.
func (p *Plan) changeRoutes(action kernel.RouteAction) error {
	var failed []error
	for _, change := range p.Routes {
		if change.Action == action {
			failed = append(failed, change.Apply())
		}
	}
	return cmp.Or(failed...)
}

// readBack lists every table that was changed, at the same time, and compares.
func (p *Plan) readBack(ctx context.Context) error {
	readers := make([]func() (ruleset.Ruleset, error), 0, len(p.Steps))
	readTable := sync.OnceValues(nft.ReadNow) // for both families
	var failed []error
	for _, step := range p.Steps {
		if step.Flavour == ruleset.Native {
			readers = append(readers, func() (ruleset.Ruleset, error) {
				table, err := readTable()
				return table.Of(step.Family), err
			})
			continue
		}
		reader, err := step.startReading(ctx)
		if err != nil {
			failed = append(failed, err)
			break
		}
		readers = append(readers, reader)
	}
	for i, read := range readers {
		step := p.Steps[i]
		have, err := read()
		if err == nil {
			err = step.compare(have)
		}
		if err != nil {
			failed = append(failed, fmt.Errorf("reading %s rules back: %w", step.Family, err))
		}
	}
	return cmp.Or(failed...)
}

// startReading starts the program that lists a store. The function that it returns must be called.
func (s Step) startReading(ctx context.Context) (func() (ruleset.Ruleset, error), error) {
	listing, err := xtables.Start(ctx, "", s.before.program.Save)
	return func() (ruleset.Ruleset, error) {
		text, err := listing.Wait()
		return ruleset.Parse(s.Family, text), err
	}, err
}

// compare holds what is there against what the step wanted.
func (s Step) compare(have ruleset.Ruleset) error {
	if changes := ruleset.Diff(s.want, have); len(changes) > 0 {
		first := changes[0]
		return fmt.Errorf("%s would still be needed, the first: %s in %s of the %s table: %s%s",
			count(len(changes)), first.Kind, first.Chain, first.Table, first.Rule, first.Found)
	}
	return nil
}

// undoTimeout is for taking back, which happens even when the caller's own time is over.
const undoTimeout = 30 * time.Second

// undo brings every table of the plan from whatever it is now to what it was before. Only an empty legacy table stays:
// the kernel has no way to unmake it.
func (p *Plan) undo(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	now, err := look(ctx)
	if err != nil {
		return err
	}
	var failed []error
	for _, step := range slices.Backward(p.Steps) {
		if step.Flavour == ruleset.Native {
			failed = append(failed, step.undoNFTables(p.table))
		} else {
			failed = append(failed, step.undo(ctx, now.store(step.Family, step.Flavour)))
		}
	}
	for _, change := range slices.Backward(p.Routes) {
		failed = append(failed, change.Undo(now.routing))
	}
	switch p.Address {
	case AddressAdded:
		failed = append(failed, kernel.RemoveSourceAddress())
	case AddressRemoved:
		failed = append(failed, kernel.AddSourceAddress())
	}
	return cmp.Or(failed...)
}

// undo brings one store from what it is now to what it was before, and makes sure of it.
func (s Step) undo(ctx context.Context, now store) error {
	if now.unread != nil {
		return now.unread
	}
	s.want = s.before.rules.Own()
	if input := xtables.RestoreInput(s.want, now.rules); input != "" {
		if err := s.before.program.Apply(ctx, input); err != nil {
			return err
		}
		read, err := s.startReading(ctx)
		if err != nil {
			return err
		}
		rules, err := read()
		if err != nil {
			return err
		}
		if err := s.compare(rules); err != nil {
			return err
		}
	}
	if s.Flavour == ruleset.NFT {
		return nft.RemoveEmpty(s.Family, ruleset.TableNames, s.before.chains)
	}
	return nil
}

// undoNFTables is undo for our table of nftables. The first of two steps undoes it for both families.
func (s Step) undoNFTables(before nft.Table) error {
	s.want = before.Of(s.Family)
	now, err := nft.ReadNow()
	if err != nil {
		return err
	}
	if len(ruleset.Diff(s.want, now.Of(s.Family))) > 0 {
		if err := nft.Transition(before.Rulesets, now).Apply(); err != nil {
			return err
		}
		if now, err = nft.ReadNow(); err != nil {
			return err
		}
	}
	return s.compare(now.Of(s.Family))
}

// remove is a cleanup: rules first, then the routes and the address that they need, then the empty tables.
func (p *Plan) remove(ctx context.Context) error {
	var failed []error
	for i := range p.Steps {
		failed = append(failed, p.apply(ctx, i))
	}
	failed = append(failed, p.readBack(ctx), p.changeRoutes(kernel.Remove))
	if p.Address == AddressRemoved {
		failed = append(failed, kernel.RemoveSourceAddress())
	}
	for _, step := range p.Steps {
		if step.Flavour == ruleset.NFT {
			failed = append(failed, nft.RemoveEmpty(step.Family, ruleset.TableNames, nil))
		}
	}
	return cmp.Or(failed...)
}
