package kernel

import (
	"strings"
	"testing"
)

func TestAddressesAreReadFromIfInet6(t *testing.T) {
	for line, want := range map[string]IPv6State{
		"00000000000000000000000000000001 01 80 10 80       lo": {},
		"00000000000000000000000000000006 01 80 80 a2       lo": {Source: true, Ours: true},
		"00000000000000000000000000000006 01 80 80 82       lo": {Source: true},
		"20010db8000100000000000000000002 02 40 00 82     eth0": {global: "2001:db8:1::2 on eth0", link: "eth0"},
		"fd000000000000000000000000000002 02 40 00 82     eth0": {global: "fd00::2 on eth0", link: "eth0"},
		"fe80000000000000a8bbccfffeddeeff 02 40 20 80     eth0": {link: "eth0"},
		"00000000000000000000000000000006 02 80 80 82     eth0": {link: "eth0"},
		"garbage": {},
	} {
		var got IPv6State
		got.addAddress(strings.Fields(line))
		if got != want {
			t.Errorf("%s: got %+v, want %+v", line, got, want)
		}
	}
}
