package iptables

import (
	"errors"
	"strings"
	"testing"
)

func TestChoiceOfTheFlavour(t *testing.T) {
	gone := errors.New("not there")
	for _, test := range []struct {
		name        string
		nft, legacy store
		want        Flavour
		err         string
	}{
		{"nothing is there yet", store{}, store{}, NFT, ""},
		{"ours are in nft", store{ours: true}, store{occupied: true}, NFT, ""},
		{"ours are in legacy", store{occupied: true}, store{ours: true}, Legacy, ""},
		{"ours are in both", store{ours: true}, store{ours: true}, NFT, ""},
		{"ours are in both, others in legacy", store{ours: true}, store{ours: true, occupied: true}, Legacy, ""},
		{"others are in legacy", store{}, store{occupied: true}, Legacy, ""},
		{"others are in nft", store{occupied: true}, store{}, NFT, ""},
		{"no nft, as under gVisor", store{missing: errNoKernelSupport}, store{}, Legacy, ""},
		{"nft that iptables cannot show", store{opaque: []TableName{NAT}}, store{}, Legacy, ""},
		{"the same without legacy", store{opaque: []TableName{NAT}}, store{missing: gone}, "", "the ipv4 nat table: " + errIncompatible.Error()},
		{"the same in a table that we do not need", store{opaque: []TableName{Raw, Mangle}}, store{}, NFT, ""},
		{"no legacy", store{}, store{missing: gone}, NFT, ""},
		{"neither", store{missing: gone}, store{missing: gone}, "", "no iptables of any flavour for ipv4: not there; not there"},
		{"ours are out of reach", store{ours: true, missing: gone}, store{}, "", "nft holds ipv4 rules of an earlier run"},
	} {
		test.nft.family, test.nft.flavour = IPv4, NFT
		test.legacy.family, test.legacy.flavour = IPv4, Legacy
		native := store{family: IPv4, flavour: Native, missing: errNoKernelSupport}
		got, err := survey{stores: []store{test.nft, test.legacy, native}}.choose(Rules(captureAll, IPv4), IPTables)
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
	works := func(program) error { return nil }
	for _, test := range []struct {
		name                string
		nft, legacy, native store
		verify              func(program) error
		want                Flavour
		err                 error
	}{
		{"iptables is there", store{}, store{}, store{}, works, NFT, nil},
		{"it is not", store{missing: gone}, store{missing: gone}, store{}, works, Native, nil},
		{"it does not work", store{}, store{}, store{}, func(program) error { return broken }, Native, nil},
		{"it does not work, but there is no choice", store{}, store{}, store{missing: gone}, func(program) error { return broken }, NFT, nil},
		{"it cannot show a table", store{opaque: []TableName{NAT}}, store{missing: gone}, store{}, works, Native, nil},
		{"ours are in nftables", store{}, store{occupied: true}, store{ours: true}, works, Native, nil},
		{"ours are in both, after a move that was cut off", store{ours: true}, store{}, store{ours: true}, works, Native, nil},
		{"ours are out of reach", store{ours: true, missing: gone}, store{}, store{}, works, NFT, gone},
		{"nothing at all", store{missing: gone}, store{missing: gone}, store{missing: gone}, works, NFT, errNoFlavour},
	} {
		test.nft.family, test.nft.flavour = IPv4, NFT
		test.legacy.family, test.legacy.flavour = IPv4, Legacy
		test.native.family, test.native.flavour = IPv4, Native
		s := survey{stores: []store{test.nft, test.legacy, test.native}, verify: test.verify}
		got, err := s.choose(Rules(captureAll, IPv4), Auto)
		if !errors.Is(err, test.err) || got.flavour != test.want {
			t.Errorf("%s: got %s, error %v, want %s, %v", test.name, got.flavour, err, test.want, test.err)
		}
	}
}

func TestOtherPeoplesRulesAreToldFromOurs(t *testing.T) {
	const tables = "*nat\n:PREROUTING ACCEPT [0:0]\n:PILLION_OUTPUT - [0:0]\n-A OUTPUT -j PILLION_OUTPUT\n-A PILLION_OUTPUT -j RETURN\nCOMMIT\n"
	for text, want := range map[string]bool{
		"":     false,
		tables: false,
		tables + "*filter\n:INPUT ACCEPT [3:4]\nCOMMIT\n": false,
		tables + "*filter\n:INPUT DROP [0:0]\nCOMMIT\n":   true,
		tables + "*filter\n:THEIRS - [0:0]\nCOMMIT\n":     true,
		tables + "*filter\n-A INPUT -j DROP\nCOMMIT\n":    true,
	} {
		if occupied(text) != want {
			t.Errorf("occupied is %t for:\n%s", !want, text)
		}
	}
}

func TestAddressesAreReadFromTheKernelsTable(t *testing.T) {
	for line, want := range map[string]ipv6{
		"00000000000000000000000000000001 01 80 10 80       lo": {},
		"00000000000000000000000000000006 01 80 80 a2       lo": {source: true, ours: true},
		"00000000000000000000000000000006 01 80 80 82       lo": {source: true},
		"20010db8000100000000000000000002 02 40 00 82     eth0": {global: true},
		"fd000000000000000000000000000002 02 40 00 82     eth0": {global: true},
		"fe80000000000000a8bbccfffeddeeff 02 40 20 80     eth0": {},
		"00000000000000000000000000000006 02 80 80 82     eth0": {},
		"garbage": {},
	} {
		var got ipv6
		got.addAddress(strings.Fields(line))
		if got != want {
			t.Errorf("%s: got %+v, want %+v", line, got, want)
		}
	}
}
