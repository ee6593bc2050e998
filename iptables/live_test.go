package iptables

import "testing"

func TestTheReasonOfEveryRuleIsFoundByWhatTheKernelKeeps(t *testing.T) {
	forEach(t, func(t *testing.T, sc scenario, a addresses) {
		want := Rules(sc.spec, a.family)
		got := Parse(a.family, want.String()).withReasons()
		for at, r := range want.All() {
			for _, found := range got.chain(at).Rules {
				if found.ID == r.ID && found.Why != r.Why {
					t.Errorf("%s %s: got reason %q, want %q", at, r.ID, found.Why, r.Why)
				}
			}
		}
	})
}
