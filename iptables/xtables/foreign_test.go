package xtables

import (
	"fmt"
	"slices"
	"testing"

	"github.com/pillion-proxy/pillion/iptables/ruleset"
)

// Chains that jump to each other in many ways are read once each. With each path of its own, this test would not end.
func TestEffectsOfManyPathsAreFoundInTime(t *testing.T) {
	const levels, jumps = 40, 8
	rules := make(map[string][]ruleset.Rule)
	for level := range levels {
		name := fmt.Sprint("level", level)
		for range jumps {
			rules[name] = append(rules[name], ruleset.Rule{Foreign: fmt.Sprintf("-A %s -j level%d", name, level+1)})
		}
	}
	last := fmt.Sprint("level", levels)
	rules[last] = []ruleset.Rule{{Foreign: "-A " + last + " -j level0"}, {Foreign: "-A " + last + " -j DROP"}, {Foreign: "-A " + last + " -j REJECT"}}
	if got := effects(rules, "level0", make(map[string]bool)); !slices.Equal(got, []string{"drop", "reject"}) {
		t.Errorf("effects %q", got)
	}
}
