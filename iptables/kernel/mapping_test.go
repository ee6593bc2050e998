package kernel

import "testing"

func TestMappedUsersAreThoseOfTheMapping(t *testing.T) {
	const mapping = "         0       1000          1\n         1     100000      65536\n     70000 200000 10\n"
	for id, want := range map[uint32]bool{0: true, 1: true, 1337: true, 65536: true, 65537: false, 69999: false, 70000: true, 70009: true, 70010: false, 1<<32 - 2: false} {
		if got := mapped(mapping, id); got != want {
			t.Errorf("%d: got %t", id, got)
		}
	}
	if !mapped("         0          0 4294967295\n", 1<<32-2) || mapped("", 0) || mapped("what\n", 0) {
		t.Error("the first user namespace has every user; an empty mapping has none")
	}
}
