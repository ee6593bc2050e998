package iptables

import (
	"errors"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/iptables/kernel"
	"github.com/pillion-proxy/pillion/iptables/policy"
	"github.com/pillion-proxy/pillion/iptables/ruleset"
	"github.com/pillion-proxy/pillion/iptables/rulestest"
	"github.com/pillion-proxy/pillion/iptables/xtables"
)

func TestChoiceOfTheFlavour(t *testing.T) {
	gone := errors.New("not there")
	for _, test := range []struct {
		name        string
		nft, legacy store
		want        ruleset.Flavour
		err         string
	}{
		{"nothing is there yet", store{}, store{}, ruleset.NFT, ""},
		{"ours are in nft", store{ours: true}, store{occupied: true}, ruleset.NFT, ""},
		{"ours are in legacy", store{occupied: true}, store{ours: true}, ruleset.Legacy, ""},
		{"ours are in both", store{ours: true}, store{ours: true}, ruleset.NFT, ""},
		{"ours are in both, others in legacy", store{ours: true}, store{ours: true, occupied: true}, ruleset.Legacy, ""},
		{"others are in legacy", store{}, store{occupied: true}, ruleset.Legacy, ""},
		{"others are in nft", store{occupied: true}, store{}, ruleset.NFT, ""},
		{"no nft, as under gVisor", store{missing: kernel.ErrNoKernelSupport}, store{}, ruleset.Legacy, ""},
		{"nft that iptables cannot show", store{opaque: []ruleset.TableName{ruleset.NAT}}, store{}, ruleset.Legacy, ""},
		{"the same without legacy", store{opaque: []ruleset.TableName{ruleset.NAT}}, store{missing: gone}, "", "the ipv4 nat table: " + xtables.ErrIncompatible.Error()},
		{"the same in a table that we do not need", store{opaque: []ruleset.TableName{ruleset.Raw, ruleset.Mangle}}, store{}, ruleset.NFT, ""},
		{"no legacy", store{}, store{missing: gone}, ruleset.NFT, ""},
		{"neither", store{missing: gone}, store{missing: gone}, "", "no iptables of any flavour for ipv4: not there; not there"},
		{"ours are out of reach", store{ours: true, missing: gone}, store{}, "", "nft has ipv4 rules of an earlier run"},
	} {
		test.nft.family, test.nft.flavour = ruleset.IPv4, ruleset.NFT
		test.legacy.family, test.legacy.flavour = ruleset.IPv4, ruleset.Legacy
		native := store{family: ruleset.IPv4, flavour: ruleset.Native, missing: kernel.ErrNoKernelSupport}
		got, err := survey{stores: []store{test.nft, test.legacy, native}}.choose(policy.Rules(rulestest.CaptureAll, ruleset.IPv4), IPTables)
		if test.err != "" {
			if err == nil || !strings.HasPrefix(err.Error(), test.err) {
				t.Errorf("%s: got error %v, want %q", test.name, err, test.err)
			}
		} else if err != nil || got.flavour != test.want {
			t.Errorf("%s: got %s, error %v, want %s", test.name, got.flavour, err, test.want)
		}
	}
}

func TestNFTablesAreChosenWhenIPTablesCannotBeUsed(t *testing.T) {
	gone, broken := errors.New("not there"), errors.New("broken")
	works := func(xtables.Program) error { return nil }
	for _, test := range []struct {
		name                string
		nft, legacy, native store
		verify              func(xtables.Program) error
		want                ruleset.Flavour
		err                 error
	}{
		{"iptables is there", store{}, store{}, store{}, works, ruleset.NFT, nil},
		{"it is not", store{missing: gone}, store{missing: gone}, store{}, works, ruleset.Native, nil},
		{"it does not work", store{}, store{}, store{}, func(xtables.Program) error { return broken }, ruleset.Native, nil},
		{"it does not work, but there is no choice", store{}, store{}, store{missing: gone}, func(xtables.Program) error { return broken }, ruleset.NFT, nil},
		{"it cannot show a table", store{opaque: []ruleset.TableName{ruleset.NAT}}, store{missing: gone}, store{}, works, ruleset.Native, nil},
		{"ours are in nftables", store{}, store{occupied: true}, store{ours: true}, works, ruleset.Native, nil},
		{"ours are in both, after a move that was cut off", store{ours: true}, store{}, store{ours: true}, works, ruleset.Native, nil},
		{"ours are out of reach", store{ours: true, missing: gone}, store{}, store{}, works, ruleset.NFT, gone},
		{"nothing at all", store{missing: gone}, store{missing: gone}, store{missing: gone}, works, ruleset.NFT, errNoFlavour},
	} {
		test.nft.family, test.nft.flavour = ruleset.IPv4, ruleset.NFT
		test.legacy.family, test.legacy.flavour = ruleset.IPv4, ruleset.Legacy
		test.native.family, test.native.flavour = ruleset.IPv4, ruleset.Native
		s := survey{stores: []store{test.nft, test.legacy, test.native}, verify: test.verify}
		got, err := s.choose(policy.Rules(rulestest.CaptureAll, ruleset.IPv4), Auto)
		if !errors.Is(err, test.err) || got.flavour != test.want {
			t.Errorf("%s: got %s, error %v, want %s, %v", test.name, got.flavour, err, test.want, test.err)
		}
	}
}
