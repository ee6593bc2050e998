package policy

import (
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/iptables/ruleset"
	"github.com/pillion-proxy/pillion/iptables/rulestest"
	"github.com/pillion-proxy/pillion/iptables/trace"
)

// The first judge: every story ends as it should, and every rule is there because some story needs it.
func TestStoriesHaveTheirVerdictsAndMeetEveryRule(t *testing.T) {
	rulestest.ForEach(t, func(t *testing.T, sc rulestest.Scenario, a rulestest.Addresses) {
		rules := Rules(sc.Spec, a.Family)
		met := make(map[string]bool)
		for _, s := range sc.AllStories(a) {
			walk := trace.Of(rules, s.Packet)
			if walk.Verdict != s.Want {
				t.Errorf("%s: %v, want %v; rules on the way: %s", s.Name, walk.Verdict, s.Want, strings.Join(walk.Path, " → "))
			}
			for _, id := range walk.Path {
				met[id] = true
			}
		}
		for at, r := range rules.All() {
			if !met[r.ID] {
				t.Errorf("no story meets rule %s in %v", r.ID, at)
			}
		}
	})
}

func TestEveryRuleHasAnIDOfItsOwnAndAReason(t *testing.T) {
	rulestest.ForEach(t, func(t *testing.T, sc rulestest.Scenario, a rulestest.Addresses) {
		seen := make(map[string]bool)
		for _, r := range Rules(sc.Spec, a.Family).All() {
			if r.ID == "" || r.Why == "" || seen[r.ID] {
				t.Errorf("rule %+v: it needs a reason and an ID of its own", r)
			}
			seen[r.ID] = true
		}
	})
}

// The second judge: the text.
func TestGoldenText(t *testing.T) {
	rulestest.ForEach(t, func(t *testing.T, sc rulestest.Scenario, a rulestest.Addresses) {
		rulestest.Golden(t, "golden/"+sc.Name+"."+a.Family.String(), Rules(sc.Spec, a.Family).String())
	})
}

// The third judge: what is written is read back as the same.
func TestRoundTrip(t *testing.T) {
	rulestest.ForEach(t, func(t *testing.T, sc rulestest.Scenario, a rulestest.Addresses) {
		rules := Rules(sc.Spec, a.Family)
		if got, want := ruleset.Parse(a.Family, rules.String()), rulestest.WithoutReasons(rules); !reflect.DeepEqual(got, want) {
			t.Errorf("got  %+v\nwant %+v", got, want)
		}
	})
}

func TestNetworksAreSpelledAsTheKernelSpellsThem(t *testing.T) {
	for given, want := range map[string]string{
		"203.0.113.77/25":     "-d 203.0.113.0/25 ",
		"10.0.0.1/32":         "-d 10.0.0.1/32 ",
		"0.0.0.0/0":           "",
		"2001:DB8::1/32":      "-d 2001:db8::/32 ",
		"2001:db8:0:0:1::/80": "-d 2001:db8:0:0:1::/80 ",
		"::/0":                "",
		"::192.0.2.0/120":     "-d ::192.0.2.0/120 ",
		"::ffff:10.0.0.0/104": "-d ::ffff:10.0.0.0/104 ",
	} {
		spec := rulestest.SpecOf(func(s *capture.Spec) { s.Outbound.List = rulestest.Networks(given) })
		family := ruleset.IPv4
		if strings.Contains(given, "::") {
			family = ruleset.IPv6
		}
		output := Rules(spec, family).Chain(ruleset.Place{Table: ruleset.NAT, Chain: ruleset.ChainOutput})
		line := output.Lines()[len(output.Rules)-1]
		if rest := strings.TrimPrefix(line, "-A PILLION_OUTPUT "); !strings.HasPrefix(rest, want+`-m comment --comment "pillion:outbound/network/`) {
			t.Errorf("%s: got %s", given, line)
		}
	}
}

// In an empty namespace each rule is missing, and each difference is a missing rule.
func TestAnEmptyNamespaceLacksEachRuleOnce(t *testing.T) {
	want := Rules(rulestest.CaptureAll, ruleset.IPv4)
	missing := make(map[string]int)
	for _, c := range ruleset.Diff(want, ruleset.Ruleset{Family: ruleset.IPv4}) {
		if c.Kind != ruleset.Missing || c.ID == "" {
			t.Errorf("unexpected change %+v", c)
		}
		missing[c.ID]++
	}
	for _, r := range want.All() {
		if missing[r.ID] != 1 {
			t.Errorf("%s is missing %d times", r.ID, missing[r.ID])
		}
	}
}

// Only a rule with the wanted ID is a changed version of the wanted rule.
func TestAForeignRuleInPlaceOfOursIsMissingAndExtra(t *testing.T) {
	want := Rules(rulestest.CaptureAll, ruleset.IPv4)
	text := want.String()
	line := `-A PILLION_IN_REDIRECT -p tcp -m comment --comment "pillion:inbound/redirect" -j REDIRECT --to-ports 15006`
	if !strings.Contains(text, line) {
		t.Fatal("no such rule")
	}
	have := ruleset.Parse(ruleset.IPv4, strings.Replace(text, line, "-A PILLION_IN_REDIRECT -p udp -j RETURN", 1))
	var kinds []ruleset.ChangeKind
	for _, c := range ruleset.Diff(want, have) {
		kinds = append(kinds, c.Kind)
	}
	if !slices.Equal(kinds, []ruleset.ChangeKind{ruleset.Missing, ruleset.Extra}) {
		t.Errorf("got %v", kinds)
	}
}
