//go:build !race

package dns

import (
	"testing"

	"github.com/miekg/dns"
)

// The message is the only allocation.
func TestAnAnswerFromATableIsOneAllocation(t *testing.T) {
	table := mesh(t)
	for name, want := range map[string]float64{"cart.": 1, "a.b.wild.example.shop.svc.cluster.local.": 1, "unknown.example.": 0} {
		q, err := parse(pack(t, question(name, dns.TypeA).SetEdns0(1232, true)))
		if err != nil {
			t.Fatal(err)
		}
		if n := testing.AllocsPerRun(100, func() { table.answer(&q) }); n != want {
			t.Errorf("%s: %v allocations, want %v", name, n, want)
		}
	}
}
