//go:build !race

package nft

import (
	"runtime"
	"testing"

	"github.com/pillion-proxy/pillion/iptables/policy"
	"github.com/pillion-proxy/pillion/iptables/ruleset"
	"github.com/pillion-proxy/pillion/iptables/rulestest"
)

// init ends before the first collection, so each page that it allocates costs a page fault. These are bytes for each rule.
func TestARuleTakesLittleMemory(t *testing.T) {
	wanted := [2]ruleset.Ruleset{policy.Rules(rulestest.CaptureAll, ruleset.IPv4), policy.Rules(rulestest.CaptureAll, ruleset.IPv6)}
	rules := 0
	var places []ruleset.Place
	var encoded [][]kernelRule
	for _, rs := range wanted {
		for at, r := range rs.All() {
			rules++
			places, encoded = append(places, at), append(encoded, encode(rs.Family, at, r))
		}
	}
	for what, test := range map[string]struct {
		most uint64
		run  func()
	}{
		"write": {6_500, func() { Transition(wanted, Table{}) }},
		"read": {5_000, func() {
			for i, at := range places {
				decode(0, at, encoded[i])
			}
		}},
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		for range 10 {
			test.run()
		}
		runtime.ReadMemStats(&after)
		if got := (after.TotalAlloc - before.TotalAlloc) / 10 / uint64(rules); got > test.most {
			t.Errorf("%s: %d bytes for a rule, may be %d", what, got, test.most)
		} else {
			t.Logf("%s: %d bytes for a rule", what, got)
		}
	}
}
