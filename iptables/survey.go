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

// survey is the state of the network namespace of the calling thread. Making one changes nothing: not even an empty
// table is created.
type survey struct {
	stores  []store
	ipv6    kernel.IPv6State
	routing []kernel.Installed
	chains  []nft.Chain // all of nftables
	table   nft.Table   // ours in nftables
	verify  func(xtables.Program) error
}

// store is the place for the rules of one family in one flavour.
type store struct {
	family  ruleset.Family
	flavour ruleset.Flavour

	program xtables.Program
	sought  bool  // program was looked for
	missing error // why there is no program, or no kernel support

	rules    ruleset.Ruleset
	unread   error                  // why the rules could not be listed
	opaque   []ruleset.TableName    // tables with rules that iptables cannot show
	hidden   error                  // why tables that exist, or may exist, were not read
	ours     bool                   // it holds rules of ours
	occupied bool                   // it holds rules that are not ours
	chains   []nft.Chain            // nftables chains in the tables that we use; empty for legacy
	foreign  []ruleset.ForeignChain // of legacy tables
	taken    error                  // our nftables table's name is in use by others
}

// storesUnread returns the stores before their content is read. If the back end may be iptables, they have their programs.
func storesUnread(ctx context.Context, backend Backend) []store {
	var stores []store
	for _, family := range ruleset.Families {
		for _, flavour := range []ruleset.Flavour{ruleset.NFT, ruleset.Legacy} {
			t := store{family: family, flavour: flavour, rules: ruleset.Ruleset{Family: family}}
			if backend != NFTables {
				t.find(ctx)
			}
			stores = append(stores, t)
		}
		stores = append(stores, store{family: family, flavour: ruleset.Native, rules: ruleset.Ruleset{Family: family, Whole: true}})
	}
	return stores
}

// find looks for the program in PATH, once.
func (t *store) find(ctx context.Context) {
	if !t.sought {
		t.program, t.missing = xtables.Find(ctx, t.family, t.flavour)
		t.sought = true
	}
}

// look reads the namespace. The kernel is asked first, and a program runs only for a table that exists: listing a
// legacy table would create it. With the back end NFTables, programs are looked for only if there are tables of iptables.
func look(ctx context.Context, backend Backend) (survey, error) {
	s := survey{stores: storesUnread(ctx, backend)}
	var err error
	if s.ipv6, err = kernel.ReadIPv6(); err != nil {
		return s, err
	}
	if s.routing, err = kernel.ReadRoutes(); err != nil {
		return s, err
	}
	chains, nftErr := nft.Chains()
	switch {
	case nftErr == nil:
		if s.table, err = nft.Read(chains); err != nil {
			return s, err
		}
	case !errors.Is(nftErr, kernel.ErrNoKernelSupport):
		return s, nftErr
	}
	s.chains = chains
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

// blindSpot returns why existing legacy tables could not be read. Our chains in nftables are known from the kernel, so
// an nftables table that no program can read matters only if we have to change it.
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

// setTable takes the family's part of our table. A dormant table is ours as well; all its rules count as missing.
func (t *store) setTable(table nft.Table) {
	if table.Foreign {
		t.taken = foreignTableError(table)
	}
	if len(table.Chains) > 0 {
		t.rules = table.Of(t.family)
		t.ours = table.Dormant || len(ruleset.Diff(ruleset.Ruleset{}, t.rules)) > 0
	}
}

// list starts the program that lists the store, if there is a program and a table.
func (t *store) list(ctx context.Context) (*xtables.Process, error) {
	if t.flavour == ruleset.NFT {
		if len(t.chains) == 0 || t.missing != nil {
			return nil, nil
		}
		if t.find(ctx); t.missing != nil {
			return nil, nil
		}
		return xtables.Start(ctx, "", t.program.Save, "-c")
	}
	// All existing tables are listed: rules of others in any of them make the flavour occupied.
	exists, err := xtables.LegacyTablesExist(t.family)
	switch {
	case errors.Is(err, xtables.ErrHiddenTables):
		t.hidden = err
		return nil, nil
	case exists:
		t.find(ctx)
		t.hidden = t.missing
	}
	if !exists || t.hidden != nil || err != nil {
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
	if t.flavour == ruleset.Legacy {
		t.foreign = xtables.ForeignChains(t.family, text)
	}
}

// foreignTableError is why our nftables table cannot be used.
func foreignTableError(table nft.Table) error {
	return fmt.Errorf("nftables has a table inet %s that is not ours (%s)", nft.TableName, strings.Join(table.Others, ", "))
}

// foreignChains returns the base chains that are not ours and that the rulesets of the stores do not contain. It reads the
// rules of all nftables tables.
func foreignChains(stores []store, table nft.Table, chains []nft.Chain) ([]ruleset.ForeignChain, error) {
	var foreign []ruleset.ForeignChain
	for _, t := range stores {
		foreign = append(foreign, t.foreign...)
	}
	byNFT, err := nft.Foreign(chains, func(c nft.Chain) bool {
		if c.IsInet() && c.Table == nft.TableName {
			return !table.Foreign
		}
		name := ruleset.TableName(c.Table)
		i := slices.IndexFunc(stores, func(t store) bool { return t.flavour == ruleset.NFT && t.family == c.Family })
		followed := c.Name == ruleset.ChainPrerouting || c.Name == ruleset.ChainBuiltOutput
		return followed && i >= 0 && len(stores[i].rules.Chains(name)) > 0
	})
	return append(foreign, byNFT...), err
}

// notShown returns the tables that have chains but are missing from a listing. If rules in a table of iptables were
// made with nft, iptables-nft-save omits the table and still reports success.
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
	// Our nftables table serves both families: if one family has rules there, the other uses it as well.
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

// chooseIPTables picks the flavour that holds our rules, so that a second run finds those of the first; else the
// flavour that others use; else nft if it is usable.
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

// errNoFlavour means that neither flavour of iptables has a program and kernel support.
var errNoFlavour = errors.New("no iptables")

// usable returns why the store cannot be changed, if it holds our rules or is to hold the wanted ones.
func (t store) usable(want ruleset.Ruleset) error {
	switch {
	case t.taken != nil:
		return fmt.Errorf("%w: rename or remove it, or use iptables", t.taken)
	case t.missing == nil && t.hidden != nil:
		return fmt.Errorf("%s %s rules: %w", t.flavour, t.family, t.hidden)
	case t.missing == nil:
	case t.flavour == ruleset.Native:
		return fmt.Errorf("%s rules: %w", t.family, t.missing)
	case t.ours:
		return fmt.Errorf("%s has %s rules of an earlier run, but there is no program to change them: %w", t.flavour, t.family, t.missing)
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
