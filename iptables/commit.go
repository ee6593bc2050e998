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

// Commit carries the plan out and reads the namespace back. It succeeds only if the namespace then holds what was
// planned. A failed init restores the former state; a failed cleanup continues and removes what it can. If the backend
// is Auto and iptables lacks something, Commit uses nftables instead, and p becomes the plan that was carried out.
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
			return fmt.Errorf("%w; and restoring the former state failed: %w; run pillion cleanup", err, undoErr)
		}
		return p.fallBack(ctx, fmt.Errorf("%w; the former state is restored", err))
	}
	return nil
}

// fallBack installs the rules in nftables after iptables failed for reason. It returns reason if the backend is fixed,
// or if nftables would not help.
func (p *Plan) fallBack(ctx context.Context, reason error) error {
	if p.cleanup || p.backend != Auto || !xtables.Lacks(reason) {
		return reason
	}
	next, err := PlanInit(ctx, p.spec, NFTables)
	if err == nil {
		err = next.Commit(ctx)
	}
	if err != nil {
		return fmt.Errorf("%w; and nftables failed: %w", reason, err)
	}
	next.Warnings = append(next.Warnings, fmt.Sprintf("using nftables because iptables is not usable: %v", reason))
	*p = *next
	return nil
}

// verifyPrograms runs each program once, before any change, so that a missing or old program changes nothing.
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
		case step.Family != ruleset.IPv6 || p.ipv6.Global() || !errors.Is(err, kernel.ErrNoKernelSupport):
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

// apply carries out a step. The first nftables step changes the table for both families; the second has no work left.
func (p *Plan) apply(ctx context.Context, i int) error {
	step := p.Steps[i]
	if step.Flavour != ruleset.Native {
		return step.before.program.Apply(ctx, step.input)
	}
	if i > 0 && p.Steps[i-1].Flavour == ruleset.Native {
		return nil
	}
	return nft.Transition(p.wantedNFTables(), p.table).Apply()
}

// emptied returns the tables in which we had rules before the step and have no rules after it.
func (s Step) emptied() []ruleset.TableName {
	own := s.before.rules.Own()
	return slices.DeleteFunc(slices.Clone(ruleset.TableNames), func(name ruleset.TableName) bool {
		return len(own.Chains(name)) == 0 || len(s.want.Chains(name)) > 0
	})
}

// changeRoutes applies the planned route changes of one kind. Routes are added before the rules that need them, and
// removed after them.
func (p *Plan) changeRoutes(action kernel.RouteAction) error {
	var failed []error
	for _, change := range p.Routes {
		if change.Action == action {
			failed = append(failed, change.Apply())
		}
	}
	return cmp.Or(failed...)
}

// readBack lists every changed table and compares it with what was planned. The programs run concurrently.
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

// startReading starts the program that lists a store. The caller must call the returned function to wait for it.
func (s Step) startReading(ctx context.Context) (func() (ruleset.Ruleset, error), error) {
	listing, err := xtables.Start(ctx, "", s.before.program.Save)
	return func() (ruleset.Ruleset, error) {
		text, err := listing.Wait()
		return ruleset.Parse(s.Family, text), err
	}, err
}

// compare returns an error if have differs from what the step wants.
func (s Step) compare(have ruleset.Ruleset) error {
	if changes := ruleset.Diff(s.want, have); len(changes) > 0 {
		first := changes[0]
		return fmt.Errorf("the rules differ after the commit (%s), first: %s in %s of the %s table: %s%s",
			count(len(changes)), first.Kind, first.Chain, first.Table, first.Rule, first.Found)
	}
	return nil
}

// undoTimeout limits undo. It is independent of the caller's context, since undo must also run after that has ended.
const undoTimeout = 30 * time.Second

// undo restores every table of the plan, whatever its state is now. An empty legacy table remains, because the kernel
// cannot remove one.
func (p *Plan) undo(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	now, err := look(ctx, p.backend)
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

// undo restores one store and verifies the result.
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

// undoNFTables restores our nftables table. The first of two steps restores it for both families.
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

// remove is a cleanup: first the rules, then the routes and the address that they need, then empty tables.
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
