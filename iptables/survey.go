package iptables

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/capture"
)

// survey is what the network namespace of the calling thread holds. Making one changes nothing, not even an empty table.
type survey struct {
	stores  []store
	ipv6    ipv6
	routing []installed
	table   nftState // our own of nftables
	verify  func(program) error
}

// store is where one family's rules are kept in one flavour.
type store struct {
	family  Family
	flavour Flavour

	program program
	missing error // why there is no program, or no kernel that it could talk to

	rules    Ruleset
	unread   error       // why the rules could not be listed
	opaque   []TableName // tables that hold what iptables cannot show
	hidden   bool        // there are tables, but no program to look into them
	ours     bool        // it holds a part of ours
	occupied bool        // this flavour holds rules of other people's
	chains   []nftChain  // the chains that nftables has in our tables; legacy always has its own
}

// storesUnread are the stores before anything is known of their content.
func storesUnread(ctx context.Context) []store {
	var stores []store
	for _, family := range Families {
		for _, flavour := range []Flavour{NFT, Legacy} {
			t := store{family: family, flavour: flavour, rules: Ruleset{Family: family}}
			t.program, t.missing = findProgram(ctx, family, flavour)
			stores = append(stores, t)
		}
		stores = append(stores, store{family: family, flavour: Native, rules: Ruleset{Family: family, Whole: true}})
	}
	return stores
}

// look reads what is there. The kernel is asked first, and a program is run only for a table that exists: merely listing
// a legacy table would make it.
func look(ctx context.Context) (survey, error) {
	s := survey{stores: storesUnread(ctx)}
	var err error
	if s.ipv6, err = readIPv6(); err != nil {
		return s, err
	}
	if s.routing, err = readRoutes(); err != nil {
		return s, err
	}
	chains, nftErr := nftChains()
	if nftErr != nil && !errors.Is(nftErr, errNoKernelSupport) {
		return s, nftErr
	}
	if s.table, err = readNFTables(chains); err != nil {
		return s, err
	}
	listings := make([]*process, len(s.stores))
	for i := range s.stores {
		t := &s.stores[i]
		switch t.flavour {
		case NFT:
			t.setChains(chains)
			t.missing = cmp.Or(t.missing, nftErr)
		case Native:
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
		if t.flavour == Legacy && t.unread != nil {
			return t.unread
		}
	}
	return nil
}

func (t *store) setChains(chains []nftChain) {
	for _, c := range chains {
		if c.family == t.family && slices.Contains(TableNames, TableName(c.table)) {
			t.chains = append(t.chains, c)
			t.ours = t.ours || strings.HasPrefix(c.name, ownPrefix)
		}
	}
}

// setTable takes the family's share of our table. A table that is asleep is ours, too, and everything is missing from it.
func (t *store) setTable(table nftState) {
	if len(table.chains) > 0 {
		t.rules = table.ruleset(t.family)
		t.ours = table.dormant || len(Diff(Ruleset{}, t.rules)) > 0
	}
}

// list starts the program that lists a table, if the table exists and there is a program.
func (t *store) list(ctx context.Context) (*process, error) {
	if t.flavour == NFT {
		if len(t.chains) == 0 || t.missing != nil {
			return nil, nil
		}
		return start(ctx, "", t.program.save, "-c")
	}
	// The legacy flavour is somebody's if any of its tables is; all that exist are listed.
	exists, err := legacyTablesExist(t.family)
	t.hidden = exists && t.missing != nil
	if !exists || t.hidden || err != nil {
		return nil, err
	}
	if err := missingCapability(true); err != nil {
		return nil, err
	}
	return start(ctx, "", t.program.save, "-c")
}

func (t *store) read(listing *process) {
	text, err := listing.wait()
	if err != nil {
		t.unread = fmt.Errorf("listing %s rules: %w", t.family, err)
		return
	}
	t.rules = Parse(t.family, text)
	t.opaque = t.notShown(t.rules)
	t.ours = t.ours || len(t.rules.Own().Tables) > 0
	t.occupied = occupied(text)
}

// notShown are the tables that a listing leaves out though they have chains. Where somebody has used nft on a table of
// iptables, iptables-nft-save shows nothing of it, and calls that a success.
func (t *store) notShown(listed Ruleset) []TableName {
	var missing []TableName
	for _, c := range t.chains {
		if name := TableName(c.table); len(listed.Chains(name)) == 0 && !slices.Contains(missing, name) {
			missing = append(missing, name)
		}
	}
	return missing
}

var errIncompatible = errors.New("a table of nftables holds rules that were made with nft and that iptables cannot show; make them in a table of another name")

// occupied tells whether the output of iptables-save holds a rule, a chain or a policy that is not ours.
func occupied(text string) bool {
	for line := range strings.Lines(text) {
		_, line = splitCounters(line)
		fields := strings.Fields(line)
		switch {
		case strings.Contains(line, ownPrefix):
		case strings.HasPrefix(line, "-A "),
			strings.HasPrefix(line, ":") && len(fields) > 1 && fields[1] != policyAccept:
			return true
		}
	}
	return false
}

// legacyTablesExist tells whether the namespace has any legacy table of the family. They come into being when a program
// first asks for them, and stay.
func legacyTablesExist(family Family) (bool, error) {
	path := "/proc/thread-self/net/ip_tables_names"
	if family == IPv6 {
		path = "/proc/thread-self/net/ip6_tables_names"
	}
	names, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrPermission):
		return false, fmt.Errorf("looking for legacy tables: %w; run as user 0", err)
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return false, fmt.Errorf("looking for legacy tables: %w", err)
	}
	return len(names) > 0, nil
}

func (s survey) store(family Family, flavour Flavour) store {
	i := slices.IndexFunc(s.stores, func(t store) bool { return t.family == family && t.flavour == flavour })
	return s.stores[i]
}

// choose picks the store for our rules.
func (s survey) choose(want Ruleset, backend Backend) (store, error) {
	nft, legacy, native := s.store(want.Family, NFT), s.store(want.Family, Legacy), s.store(want.Family, Native)
	if flavour := backend.flavour(); flavour != "" {
		forced := s.store(want.Family, flavour)
		return forced, forced.usable(want)
	}
	// The table is one for both families.
	if backend == Auto && slices.ContainsFunc(s.stores, func(t store) bool { return t.flavour == Native && t.ours }) {
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
func chooseIPTables(nft, legacy store, want Ruleset) (store, error) {
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
func (t store) usable(want Ruleset) error {
	switch {
	case t.missing == nil:
	case t.flavour == Native:
		return fmt.Errorf("%s rules: %w", t.family, t.missing)
	case t.ours:
		return fmt.Errorf("%s holds %s rules of an earlier run, but there is no program to change them: %w", t.flavour, t.family, t.missing)
	default:
		return fmt.Errorf("%w for %s: %w", errNoFlavour, t.family, t.missing)
	}
	for _, name := range t.opaque {
		ours := slices.ContainsFunc(t.chains, func(c nftChain) bool {
			return TableName(c.table) == name && strings.HasPrefix(c.name, ownPrefix)
		})
		if ours || len(want.Chains(name)) > 0 {
			return fmt.Errorf("the %s %s table: %w", t.family, name, errIncompatible)
		}
	}
	return t.unread
}

// ipv6 is what the namespace has of IPv6.
type ipv6 struct {
	enabled bool // loopback can have addresses
	global  bool // the pod has an address that others may reach it at
	source  bool // capture.InboundSource6 is on the loopback
	ours    bool // and it was us who put it there
}

// readIPv6 reads /proc, whose files show the namespace of the calling thread. There is no file when the kernel has no
// IPv6 or it is switched off at boot.
func readIPv6() (ipv6, error) {
	var state ipv6
	addresses, err := os.ReadFile("/proc/thread-self/net/if_inet6")
	if errors.Is(err, fs.ErrNotExist) {
		return state, nil
	}
	if err != nil {
		return state, fmt.Errorf("reading IPv6 addresses: %w", err)
	}
	state.enabled = true
	for _, name := range []string{"all", loopback} {
		disabled, err := os.ReadFile("/proc/sys/net/ipv6/conf/" + name + "/disable_ipv6")
		if err == nil && strings.TrimSpace(string(disabled)) != "0" {
			state.enabled = false
		}
	}
	for line := range strings.Lines(string(addresses)) {
		state.addAddress(strings.Fields(line))
	}
	return state, nil
}

// firstIsIPv6 judges as istio-iptables does, but passes over the address that an earlier run put on the loopback.
func firstIsIPv6() (bool, error) {
	addresses, err := net.InterfaceAddrs()
	if err != nil {
		return false, fmt.Errorf("listing addresses: %w", err)
	}
	for _, a := range addresses {
		prefix, err := netip.ParsePrefix(a.String())
		address := prefix.Addr().Unmap()
		if err == nil && !address.IsLoopback() && !address.IsLinkLocalUnicast() && address != capture.InboundSource6 {
			return address.Is6(), nil
		}
	}
	return false, nil
}

// wanted tells whether there shall be rules for IPv6. Addresses are asked for only where they matter.
func (state ipv6) wanted(choice capture.IPv6Choice) (bool, error) {
	if !state.enabled || choice == capture.IPv6Wherever {
		return state.enabled, nil
	}
	return firstIsIPv6()
}

// addAddress takes a line of if_inet6: address, interface number, prefix length, scope and flags, all in hexadecimal,
// and the interface's name.
func (state *ipv6) addAddress(fields []string) {
	if len(fields) != 6 {
		return
	}
	const scopeGlobal = "00"
	if fields[5] != loopback {
		state.global = state.global || fields[3] == scopeGlobal
		return
	}
	if fields[0] == fmt.Sprintf("%x", capture.InboundSource6.AsSlice()) {
		flags, err := strconv.ParseUint(fields[4], 16, 32)
		state.source = true
		state.ours = err == nil && flags&unix.IFA_F_DEPRECATED != 0
	}
}

// missingCapability names what this process would need and does not have. legacy needs a raw socket, nft does not.
func missingCapability(legacy bool) error {
	effective, err := effectiveCapabilities()
	if err != nil {
		return err
	}
	needed := []capability{{unix.CAP_NET_ADMIN, "NET_ADMIN"}}
	if legacy {
		needed = append(needed, capability{unix.CAP_NET_RAW, needsNETRAW})
	}
	for _, c := range needed {
		if effective&(1<<c.bit) == 0 {
			return c.name
		}
	}
	return nil
}

// effectiveCapabilities are those of the calling thread, as bits.
func effectiveCapabilities() (uint64, error) {
	status, err := os.ReadFile("/proc/thread-self/status")
	if err != nil {
		return 0, fmt.Errorf("reading capabilities: %w", err)
	}
	var effective uint64
	for line := range strings.Lines(string(status)) {
		if mask, ok := strings.CutPrefix(line, "CapEff:"); ok {
			effective, _ = strconv.ParseUint(strings.TrimSpace(mask), 16, 64)
		}
	}
	return effective, nil
}

type capability struct {
	bit  int
	name MissingCapabilityError
}

const needsNETRAW = MissingCapabilityError("NET_RAW")

// MissingCapabilityError is the name of a capability that this process needs to read or change rules, without CAP_.
type MissingCapabilityError string

func (e MissingCapabilityError) Error() string {
	return fmt.Sprintf("capability CAP_%s is missing: run as root with capabilities.add: [NET_ADMIN, NET_RAW] in the container's securityContext", string(e))
}
