package main

import (
	"context"
	"os"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/iptables"
)

// An image needs no program for the rules: without one they go to a table of our own.
func TestWithoutIPTablesTheRulesGoToNFTables(t *testing.T) {
	nettest.RequireRoot(t)
	ns := nettest.New(t, "pod")
	before := state(t, ns)
	without := []string{"PATH=" + t.TempDir()}
	expect := func(what string, got outcome, want string) {
		t.Helper()
		if got != (outcome{0, want, ""}) {
			t.Errorf("%s: got %+v, want %q", what, got, want)
		}
	}
	initialise := func(environment []string, more ...string) outcome {
		t.Helper()
		return pillion(t, ns, environment, nil, append(append([]string{"init"}, injectorArguments...), more...)...)
	}
	expect("first run", initialise(without), "ipv4 rules installed in nftables (18 changes), ipv6 rules installed in nftables (20 changes), ::6 added to lo\n")
	expect("second run", initialise(without), "nothing to change: the rules are installed\n")
	expect("a run with iptables at hand", initialise(nil), "nothing to change: the rules are installed\n")
	expect("a move", initialise(nil, "--force-iptables-binary=nft"),
		"ipv4 rules installed in nft (18 changes), ipv6 rules installed in nft (20 changes), ipv4 rules removed from nftables (23 changes), ipv6 rules removed from nftables (25 changes)\n")
	expect("a move back", initialise([]string{"NATIVE_NFTABLES=true"}),
		"ipv4 rules installed in nftables (18 changes), ipv6 rules installed in nftables (20 changes), ipv4 rules removed from nft (23 changes), ipv6 rules removed from nft (25 changes)\n")
	expect("cleanup", pillion(t, ns, without, nil, "cleanup"),
		"ipv4 rules removed from nftables (23 changes), ipv6 rules removed from nftables (25 changes), ::6 removed from lo\n")
	if after := state(t, ns); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
	if got := initialise(without, "--backend=iptables"); got.code != 1 || !strings.Contains(got.stderr, "no iptables of any flavour for ipv4") {
		t.Errorf("iptables, which is not there: got %+v", got)
	}
	got := initialise(nil, "--dry-run", "--backend=nftables")
	if got.code != 0 || !strings.Contains(got.stdout, "ipv4, nftables, nat table: 16 changes\n") {
		t.Errorf("dry run: got %+v", got)
	}
	if after := state(t, ns); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

// The kernel takes the rules of every set of flags, and shows them as they were meant: the commit itself compares.
func TestEverySetOfFlagsIsInstalledInNFTables(t *testing.T) {
	nettest.RequireRoot(t)
	text, err := os.ReadFile("testdata/verdicts")
	if err != nil {
		t.Fatal(err)
	}
	ns := nettest.New(t, "pod")
	for line := range strings.Lines(string(text)) {
		command, _, isSet := strings.Cut(line, " | ")
		if !isSet || strings.HasPrefix(line, "#") {
			continue
		}
		t.Run(command, func(t *testing.T) {
			spec := specOf(t, strings.TrimSpace(command))
			ns.Do(t, func() error {
				plan, err := iptables.PlanInit(context.Background(), spec, iptables.NFTables)
				if err != nil {
					return err
				}
				return plan.Commit(context.Background())
			})
		})
	}
}
