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
		nft, legacy table
		want        Flavour
		err         string
	}{
		{"nothing is there yet", table{}, table{}, NFT, ""},
		{"ours are in nft", table{ours: true}, table{occupied: true}, NFT, ""},
		{"ours are in legacy", table{occupied: true}, table{ours: true}, Legacy, ""},
		{"ours are in both", table{ours: true}, table{ours: true}, NFT, ""},
		{"ours are in both, others in legacy", table{ours: true}, table{ours: true, occupied: true}, Legacy, ""},
		{"others are in legacy", table{}, table{occupied: true}, Legacy, ""},
		{"others are in nft", table{occupied: true}, table{}, NFT, ""},
		{"no nft, as under gVisor", table{missing: errNoKernelSupport}, table{}, Legacy, ""},
		{"nft that iptables cannot show", table{unread: errIncompatible}, table{}, Legacy, ""},
		{"the same without legacy", table{unread: errIncompatible}, table{missing: gone}, "", errIncompatible.Error()},
		{"no legacy", table{}, table{missing: gone}, NFT, ""},
		{"neither", table{missing: gone}, table{missing: gone}, "", "no iptables of any flavour for ipv4: not there; not there"},
		{"ours are out of reach", table{ours: true, missing: gone}, table{}, "", "nft holds ipv4 rules of an earlier run"},
	} {
		test.nft.family, test.nft.flavour = IPv4, NFT
		test.legacy.family, test.legacy.flavour = IPv4, Legacy
		got, err := survey{tables: []table{test.nft, test.legacy}}.choose(IPv4)
		if test.err != "" {
			if err == nil || !strings.HasPrefix(err.Error(), test.err) {
				t.Errorf("%s: got error %v, want %q", test.name, err, test.err)
			}
		} else if err != nil || got.flavour != test.want {
			t.Errorf("%s: got %s, error %v, want %s", test.name, got.flavour, err, test.want)
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
