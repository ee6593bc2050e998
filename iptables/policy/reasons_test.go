package policy

import (
	"testing"

	"github.com/pillion-proxy/pillion/iptables/ruleset"
	"github.com/pillion-proxy/pillion/iptables/rulestest"
)

func TestTheReasonOfEveryRuleIsFoundByItsID(t *testing.T) {
	rulestest.ForEach(t, func(t *testing.T, sc rulestest.Scenario, a rulestest.Addresses) {
		want := Rules(sc.Spec, a.Family)
		got := WithReasons(ruleset.Parse(a.Family, want.String()))
		for at, r := range want.All() {
			for _, found := range got.Chain(at).Rules {
				if found.ID == r.ID && found.Why != r.Why {
					t.Errorf("%s %s: got reason %q, want %q", at, r.ID, found.Why, r.Why)
				}
			}
		}
	})
}
