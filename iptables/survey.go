package iptables

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/capture"
)

// survey is what the network namespace of the calling thread holds. Making one changes nothing, not even an empty table.
type survey struct {
	tables []table
	ipv6   ipv6
}

// table is the nat table of one family in one flavour.
type table struct {
	family  Family
	flavour Flavour

	program program
	missing error // why there is no program, or no kernel that it could talk to

	rules    Ruleset
	unread   error    // why the rules could not be listed
	hidden   bool     // there are tables, but no program to look into them
	ours     bool     // it holds a part of ours
	occupied bool     // this flavour holds rules of other people's
	chains   []string // the chains that nftables has; legacy always has its own
}

// tablesUnread are the four tables before anything is known of their content.
func tablesUnread(ctx context.Context) []table {
	var tables []table
	for _, family := range Families {
		for _, flavour := range []Flavour{NFT, Legacy} {
			t := table{family: family, flavour: flavour, rules: Ruleset{Family: family}}
			t.program, t.missing = findProgram(ctx, family, flavour)
			tables = append(tables, t)
		}
	}
	return tables
}

// look reads what is there. The kernel is asked first, and a program is run only for a table that exists: merely listing
// a legacy table would make it.
func look(ctx context.Context) (survey, error) {
	s := survey{tables: tablesUnread(ctx)}
	var err error
	if s.ipv6, err = readIPv6(); err != nil {
		return s, err
	}
	chains, nftErr := nftChains()
	if nftErr != nil && !errors.Is(nftErr, errNoKernelSupport) {
		return s, nftErr
	}
	listings := make([]*process, len(s.tables))
	for i := range s.tables {
		t := &s.tables[i]
		if t.flavour == NFT {
			t.setChains(chains)
			t.missing = cmp.Or(t.missing, nftErr)
		}
		listings[i], t.unread = t.list(ctx)
	}
	for i, listing := range listings {
		if listing != nil {
			s.tables[i].read(listing)
		}
	}
	return s, s.blindSpot()
}

// blindSpot is why legacy tables that exist could not be read. What is ours in nftables is known from the kernel, so
// that a table of nftables that no program can read matters only when we have to work on it.
func (s survey) blindSpot() error {
	for _, t := range s.tables {
		if t.flavour == Legacy && t.unread != nil {
			return t.unread
		}
	}
	return nil
}

func (t *table) setChains(chains []nftChain) {
	for _, c := range chains {
		if c.family == t.family && c.table == natTable {
			t.chains = append(t.chains, c.name)
			t.ours = t.ours || strings.HasPrefix(c.name, ownPrefix)
		}
	}
}

// list starts the program that lists a table, if the table exists and there is a program.
func (t *table) list(ctx context.Context) (*process, error) {
	if t.flavour == NFT {
		if len(t.chains) == 0 || t.missing != nil {
			return nil, nil
		}
		return start(ctx, "", t.program.save, "-t", natTable)
	}
	// The legacy flavour is somebody's if any of its tables is; without -t all that exist are listed.
	exists, err := legacyTablesExist(t.family)
	t.hidden = exists && t.missing != nil
	if !exists || t.hidden || err != nil {
		return nil, err
	}
	if err := missingCapability(true); err != nil {
		return nil, err
	}
	return start(ctx, "", t.program.save)
}

func (t *table) read(listing *process) {
	text, err := listing.wait()
	if err == nil {
		t.rules, err = t.interpret(text)
	}
	if err != nil {
		t.unread = fmt.Errorf("listing %s rules: %w", t.family, err)
		return
	}
	t.ours = len(t.rules.Own().Chains) > 0
	t.occupied = occupied(text)
}

// interpret parses a listing. Where somebody has used nft on a table of iptables, iptables-nft-save shows nothing of it,
// and calls that a success.
func (t *table) interpret(text string) (Ruleset, error) {
	rules := Parse(t.family, text)
	if t.flavour == NFT && len(rules.Chains) == 0 {
		return rules, errIncompatible
	}
	return rules, nil
}

var errIncompatible = errors.New("the nat table of nftables holds rules that were made with nft and that iptables cannot show; make them in a table of another name")

// occupied tells whether the output of iptables-save holds a rule, a chain or a policy that is not ours.
func occupied(text string) bool {
	for line := range strings.Lines(text) {
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

func (s survey) table(family Family, flavour Flavour) table {
	i := slices.IndexFunc(s.tables, func(t table) bool { return t.family == family && t.flavour == flavour })
	return s.tables[i]
}

// choose picks the table for our rules: the one that holds them already, so that a second run finds what the first one
// made; else the flavour that other people use here; else nft if it can be used.
func (s survey) choose(family Family) (table, error) {
	nft, legacy := s.table(family, NFT), s.table(family, Legacy)
	chosen := nft
	switch {
	case nft.ours && !legacy.ours:
	case legacy.ours && !nft.ours, legacy.occupied:
		chosen = legacy
	case nft.usable() != nil && legacy.missing == nil:
		chosen = legacy
	case nft.missing != nil:
		return nft, fmt.Errorf("%w for %s: %w; %w", errNoFlavour, family, nft.missing, legacy.missing)
	}
	return chosen, chosen.usable()
}

// errNoFlavour means that there is nothing to make rules with.
var errNoFlavour = errors.New("no iptables of any flavour")

// usable tells why a table that holds our rules, or shall hold them, cannot be worked on.
func (t table) usable() error {
	if t.missing != nil {
		return fmt.Errorf("%s holds %s rules of an earlier run, but there is no program to change them: %w", t.flavour, t.family, t.missing)
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
	status, err := os.ReadFile("/proc/thread-self/status")
	if err != nil {
		return fmt.Errorf("reading capabilities: %w", err)
	}
	var effective uint64
	for line := range strings.Lines(string(status)) {
		if mask, ok := strings.CutPrefix(line, "CapEff:"); ok {
			effective, _ = strconv.ParseUint(strings.TrimSpace(mask), 16, 64)
		}
	}
	needed := []capability{{unix.CAP_NET_ADMIN, "NET_ADMIN"}}
	if legacy {
		needed = append(needed, capability{unix.CAP_NET_RAW, "NET_RAW"})
	}
	for _, c := range needed {
		if effective&(1<<c.bit) == 0 {
			return MissingCapabilityError(c.name)
		}
	}
	return nil
}

type capability struct {
	bit  int
	name string
}

// MissingCapabilityError is the name of a capability that this process needs to read or change rules, without CAP_.
type MissingCapabilityError string

func (e MissingCapabilityError) Error() string {
	return fmt.Sprintf("capability CAP_%s is missing: run as root with capabilities.add: [NET_ADMIN, NET_RAW] in the container's securityContext", string(e))
}
