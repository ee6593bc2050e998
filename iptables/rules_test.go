package iptables

import (
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/capture"
)

var update = flag.Bool("update", false, "write the golden files anew")

// The first judge: every story ends as it should, and every rule is there because some story needs it.
func TestStoriesEndAsToldAndMeetEveryRule(t *testing.T) {
	forEach(t, func(t *testing.T, sc scenario, a addresses) {
		rules := Rules(sc.spec, a.family)
		met := make(map[string]bool)
		for _, s := range sc.allStories(a) {
			walk := rules.Trace(s.packet)
			if walk.Verdict != s.want {
				t.Errorf("%s: %v, want %v; rules on the way: %s", s.name, walk.Verdict, s.want, strings.Join(walk.Path, " → "))
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
	forEach(t, func(t *testing.T, sc scenario, a addresses) {
		seen := make(map[string]bool)
		for _, r := range Rules(sc.spec, a.family).All() {
			if r.ID == "" || r.Why == "" || seen[r.ID] {
				t.Errorf("rule %+v: it needs a reason and an ID of its own", r)
			}
			seen[r.ID] = true
		}
	})
}

// The second judge: the text.
func TestGoldenText(t *testing.T) {
	forEach(t, func(t *testing.T, sc scenario, a addresses) {
		got := Rules(sc.spec, a.family).String()
		file := filepath.Join("testdata", "golden", sc.name+"."+a.family.String())
		if *update {
			if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if got != string(want) {
			t.Errorf("rules changed; if that is meant, run the test with -update\ngot:\n%s\nwant:\n%s", got, want)
		}
	})
}

// The third judge: what is written is read back as the same.
func TestRoundTrip(t *testing.T) {
	forEach(t, func(t *testing.T, sc scenario, a addresses) {
		rules := Rules(sc.spec, a.family)
		if got, want := Parse(a.family, rules.String()), withoutReasons(rules); !reflect.DeepEqual(got, want) {
			t.Errorf("got  %+v\nwant %+v", got, want)
		}
	})
}

func withoutReasons(rs Ruleset) Ruleset {
	bare := Ruleset{Family: rs.Family}
	for _, table := range rs.Tables {
		for _, c := range table.Chains {
			copied := Chain{Name: c.Name, Policy: c.Policy}
			for _, r := range c.Rules {
				r.Why = ""
				copied.Rules = append(copied.Rules, r)
			}
			bare.addChain(table.Name, copied)
		}
	}
	return bare
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
		spec := specOf(func(s *capture.Spec) { s.Outbound.List = networks(given) })
		family := IPv4
		if strings.Contains(given, "::") {
			family = IPv6
		}
		output := Rules(spec, family).chain(Place{NAT, chainOutput})
		line := output.lines()[len(output.Rules)-1]
		if rest := strings.TrimPrefix(line, "-A PILLION_OUTPUT "); !strings.HasPrefix(rest, want+`-m comment --comment "pillion:outbound/network/`) {
			t.Errorf("%s: got %s", given, line)
		}
	}
}
