package iptables

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/pillion-proxy/pillion/iptables/kernel"
	"github.com/pillion-proxy/pillion/iptables/nft"
	"github.com/pillion-proxy/pillion/iptables/ruleset"
	"github.com/pillion-proxy/pillion/iptables/xtables"
)

// survey is what the network namespace of the calling thread holds. Making one changes nothing, not even an empty table.
type survey struct {
	stores  []store
	ipv6    kernel.IPv6State
	routing []kernel.Installed
	table   nft.Table // our own of nftables
	verify  func(xtables.Program) error
}

// store is where one family's rules are kept in one flavour.
type store struct {
	family  ruleset.Family
	flavour ruleset.Flavour

	program xtables.Program
	missing error // why there is no program, or no kernel that it could talk to

	rules    ruleset.Ruleset
	unread   error               // why the rules could not be listed
	opaque   []ruleset.TableName // tables that hold what iptables cannot show
	hidden   bool                // there are tables, but no program to look into them
	ours     bool                // it holds a part of ours
	occupied bool                // this flavour holds rules of other people's
	chains   []nft.Chain         // the chains that nftables has in our tables; legacy always has its own
}

// storesUnread are the stores before anything is known of their content.
func storesUnread(ctx context.Context) []store {
	var stores []store
	for _, family := range ruleset.Families {
		for _, flavour := range []ruleset.Flavour{ruleset.NFT, ruleset.Legacy} {
			t := store{family: family, flavour: flavour, rules: ruleset.Ruleset{Family: family}}
			t.program, t.missing = xtables.Find(ctx, family, flavour)
			stores = append(stores, t)
		}
		stores = append(stores, store{family: family, flavour: ruleset.Native, rules: ruleset.Ruleset{Family: family, Whole: true}})
	}
	return stores
}

// look reads what is there. The kernel is asked first, and a program is run only for a table that exists: merely listing
// a legacy table would make it.
func look(ctx context.Context) (survey, error) {
	s := survey{stores: storesUnread(ctx)}
	var err error
	if s.ipv6, err = kernel.ReadIPv6(); err != nil {
		return s, err
	}
	if s.routing, err = kernel.ReadRoutes(); err != nil {
		return s, err
	}
	chains, nftErr := nft.Chains()
	if nftErr != nil && !errors.Is(nftErr, kernel.ErrNoKernelSupport) {
		return s, nftErr
	}
	if s.table, err = nft.Read(chains); err != nil {
		return s, err
	}
	listings := make([]*xtables.Process, len(s.stores))
	for i := range s.stores {
		t := &s.stores[i]
		switch t.flavour {
		case ruleset.NFT:
			t.setChains(chains)
			t.missing = cmp.Or(t.missing, nftErr)
		case ruleset.Native:
			t.missing = nftErr
			t.setTable(s.table)
			continue
		}
		listings[i], t.unread = t.list(ctx)
	}
	for i, listing := range listings {
		if listing != nil {
			s.stores[i].read(listing)
		}
	}
	return s, s.blindSpot()
}

// blindSpot is why legacy tables that exist could not be read. What is ours in nftables is known from the kernel, so
// that a table of nftables that no program can read matters only when we have to work on it.
func (s survey) blindSpot() error {
	for _, t := range s.stores {
		if t.flavour == ruleset.Legacy && t.unread != nil {
			return t.unread
		}
	}
	return nil
}

func (t *store) setChains(chains []nft.Chain) {
	for _, c := range chains {
		if c.Family == t.family && slices.Contains(ruleset.TableNames, ruleset.TableName(c.Table)) {
			t.chains = append(t.chains, c)
			t.ours = t.ours || strings.HasPrefix(c.Name, ruleset.OwnPrefix)
		}
	}
}

// setTable takes the family's share of our table. A table that is asleep is ours, too, and everything is missing from it.
func (t *store) setTable(table nft.Table) {
	if len(table.Chains) > 0 {
		t.rules = table.Of(t.family)
		t.ours = table.Dormant || len(ruleset.Diff(ruleset.Ruleset{}, t.rules)) > 0
	}
}

// list starts the program that lists a table, if the table exists and there is a program.
func (t *store) list(ctx context.Context) (*xtables.Process, error) {
	if t.flavour == ruleset.NFT {
		if len(t.chains) == 0 || t.missing != nil {
			return nil, nil
		}
		return xtables.Start(ctx, "", t.program.Save, "-c")
	}
	// The legacy flavour is somebody's if any of its tables is; all that exist are listed.
	exists, err := xtables.LegacyTablesExist(t.family)
	t.hidden = exists && t.missing != nil
	if !exists || t.hidden || err != nil {
		return nil, err
	}
	if err := kernel.MissingCapability(true); err != nil {
		return nil, err
	}
	return xtables.Start(ctx, "", t.program.Save, "-c")
}

func (t *store) read(listing *xtables.Process) {
	text, err := listing.Wait()
	if err != nil {
		t.unread = fmt.Errorf("listing %s rules: %w", t.family, err)
		return
	}
	t.rules = ruleset.Parse(t.family, text)
	t.opaque = t.notShown(t.rules)
	t.ours = t.ours || len(t.rules.Own().Tables) > 0
	t.occupied = xtables.Occupied(text)
}

// notShown are the tables that a listing leaves out though they have chains. Where somebody has used nft on a table of
// iptables, iptables-nft-save shows nothing of it, and calls that a success.
func (t *store) notShown(listed ruleset.Ruleset) []ruleset.TableName {
	var missing []ruleset.TableName
	for _, c := range t.chains {
		if name := ruleset.TableName(c.Table); len(listed.Chains(name)) == 0 && !slices.Contains(missing, name) {
			missing = append(missing, name)
		}
	}
	return missing
}

func (s survey) store(family ruleset.Family, flavour ruleset.Flavour) store {
	i := slices.IndexFunc(s.stores, func(t store) bool { return t.family == family && t.flavour == flavour })
	return s.stores[i]
}

// choose picks the store for our rules.
func (s survey) choose(want ruleset.Ruleset, backend Backend) (store, error) {
	nft, legacy, native := s.store(want.Family, ruleset.NFT), s.store(want.Family, ruleset.Legacy), s.store(want.Family, ruleset.Native)
	if flavour := backend.flavour(); flavour != "" {
		forced := s.store(want.Family, flavour)
		return forced, forced.usable(want)
	}
	// The table is one for both families.
	if backend == Auto && slices.ContainsFunc(s.stores, func(t store) bool { return t.flavour == ruleset.Native && t.ours }) {
		return native, native.usable(want)
	}
	chosen, err := chooseIPTables(nft, legacy, want)
	if backend != Auto || nft.ours || legacy.ours || native.usable(want) != nil {
		return chosen, err
	}
	if err == nil {
		err = s.verify(chosen.program)
	}
	if err != nil {
		return native, nil
	}
	return chosen, nil
}

// chooseIPTables picks the flavour that holds our rules already, so that a second run finds what the first one made;
// else that which other people use here; else nft if it can be used.
func chooseIPTables(nft, legacy store, want ruleset.Ruleset) (store, error) {
	chosen := nft
	switch {
	case nft.ours && !legacy.ours:
	case legacy.ours && !nft.ours, legacy.occupied:
		chosen = legacy
	case nft.usable(want) != nil && legacy.missing == nil:
		chosen = legacy
	case nft.missing != nil:
		return nft, fmt.Errorf("%w of any flavour for %s: %w; %w", errNoFlavour, want.Family, nft.missing, legacy.missing)
	}
	return chosen, chosen.usable(want)
}

// errNoFlavour means that there is nothing to make rules with.
var errNoFlavour = errors.New("no iptables")

// usable tells why a store that holds our rules, or shall hold the wanted ones, cannot be worked on.
func (t store) usable(want ruleset.Ruleset) error {
	switch {
	case t.missing == nil:
	case t.flavour == ruleset.Native:
		return fmt.Errorf("%s rules: %w", t.family, t.missing)
	case t.ours:
		return fmt.Errorf("%s holds %s rules of an earlier run, but there is no program to change them: %w", t.flavour, t.family, t.missing)
	default:
		return fmt.Errorf("%w for %s: %w", errNoFlavour, t.family, t.missing)
	}
	for _, name := range t.opaque {
		ours := slices.ContainsFunc(t.chains, func(c nft.Chain) bool {
			return ruleset.TableName(c.Table) == name && strings.HasPrefix(c.Name, ruleset.OwnPrefix)
		})
		if ours || len(want.Chains(name)) > 0 {
			return fmt.Errorf("the %s %s table: %w", t.family, name, xtables.ErrIncompatible)
		}
	}
	return t.unread
}
