package xtables

import (
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/iptables/policy"
	"github.com/pillion-proxy/pillion/iptables/ruleset"
	"github.com/pillion-proxy/pillion/iptables/rulestest"
	"github.com/pillion-proxy/pillion/iptables/trace"
)

func TestDiffNamesEachDifferenceAndThePlanRepairsOnlyThat(t *testing.T) {
	want := policy.Rules(rulestest.CaptureAll, ruleset.IPv4)
	for _, m := range rulestest.Meddling {
		t.Run(m.Name, func(t *testing.T) {
			have := ruleset.Parse(ruleset.IPv4, m.Edit(want.String()))
			var got []string
			for _, c := range ruleset.Diff(want, have) {
				what := c.ID
				if what == "" {
					what = c.Found
				}
				got = append(got, strings.Join([]string{string(c.Kind), c.Chain, what}, " "))
			}
			if !slices.Equal(got, m.Want) {
				t.Errorf("differences:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(m.Want, "\n"))
			}
			plan := m.Plan
			if plan != "" {
				plan = "*nat\n" + plan + "COMMIT\n"
			}
			if got := RestoreInput(want, have); got != plan {
				t.Errorf("plan:\n%s\nwant:\n%s", got, plan)
			}
		})
	}
}

func TestAFreshTableGetsItsJumpsLast(t *testing.T) {
	input := RestoreInput(policy.Rules(rulestest.CaptureAll, ruleset.IPv4), ruleset.Ruleset{Family: ruleset.IPv4})
	lines := strings.Split(strings.TrimSpace(input), "\n")
	tail := lines[len(lines)-3:]
	if !strings.HasPrefix(tail[0], "-A PREROUTING ") || !strings.HasPrefix(tail[1], "-A OUTPUT ") || tail[2] != "COMMIT" {
		t.Errorf("the jumps are not at the end:\n%s", input)
	}
}

func TestRemovingOurRulesKeepsForeignRules(t *testing.T) {
	text := rulestest.Swap(rulestest.JumpOutLine, rulestest.StrangeLine+"\n"+rulestest.JumpOutLine)(policy.Rules(rulestest.CaptureAll, ruleset.IPv4).String())
	input := RestoreInput(ruleset.Ruleset{Family: ruleset.IPv4}, ruleset.Parse(ruleset.IPv4, text))
	for line := range strings.Lines(input) {
		if !strings.Contains(line, ruleset.OwnPrefix) && line != "*nat\n" && line != "COMMIT\n" {
			t.Errorf("the removal touches %q", line)
		}
	}
}

// FuzzParse holds Parse against anybody's text: it ends, what it read renders as what it read, and the plan, the
// difference and the trace made from it end, too.
func FuzzParse(f *testing.F) {
	for _, text := range rulestest.Saves(f, "../ruleset/testdata/saves") {
		f.Add(text)
	}
	for _, sc := range rulestest.Scenarios {
		f.Add(policy.Rules(sc.Spec, ruleset.IPv4).String())
	}
	f.Add("*nat\n:PILLION_A - [0:0]\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT -j PILLION_A\n-A PILLION_A -j PILLION_A\n-A PILLION_A -j PILLION_A\n")
	want := policy.Rules(rulestest.Scenarios[0].Spec, ruleset.IPv4)
	f.Fuzz(func(t *testing.T, text string) {
		rs := ruleset.Parse(ruleset.IPv4, text)
		if again := ruleset.Parse(ruleset.IPv4, rs.String()); !reflect.DeepEqual(again, rs) {
			t.Fatalf("read  %+v\nagain %+v", rs, again)
		}
		if same := len(ruleset.Diff(want, rs)) == 0; same != (RestoreInput(want, rs) == "") {
			t.Fatalf("Diff and the plan disagree whether anything is to be done: %v; %q", ruleset.Diff(want, rs), RestoreInput(want, rs))
		}
		for _, s := range rulestest.Scenarios[0].Stories(rulestest.Families[0])[:5] {
			trace.Of(rs, s.Packet)
		}
	})
}

func TestForeignRulesAreDistinguishedFromOurs(t *testing.T) {
	const tables = "*nat\n:PREROUTING ACCEPT [0:0]\n:PILLION_OUTPUT - [0:0]\n-A OUTPUT -j PILLION_OUTPUT\n-A PILLION_OUTPUT -j RETURN\nCOMMIT\n"
	for text, want := range map[string]bool{
		"":     false,
		tables: false,
		tables + "*filter\n:INPUT ACCEPT [3:4]\nCOMMIT\n": false,
		tables + "*filter\n:INPUT DROP [0:0]\nCOMMIT\n":   true,
		tables + "*filter\n:THEIRS - [0:0]\nCOMMIT\n":     true,
		tables + "*filter\n-A INPUT -j DROP\nCOMMIT\n":    true,
	} {
		if Occupied(text) != want {
			t.Errorf("occupied is %t for:\n%s", !want, text)
		}
	}
}

// Zones must exist before queries are captured, and as long as queries are.
func TestZonesAreCommittedFirstAndRemovedLast(t *testing.T) {
	dns := rulestest.SpecOf(func(s *capture.Spec) { s.Outbound.All, s.RedirectDNS, s.CaptureAllDNS = true, true, true })
	none := ruleset.Ruleset{Family: ruleset.IPv4}
	rules := policy.Rules(dns, ruleset.IPv4)
	for _, test := range []struct {
		name       string
		want, have ruleset.Ruleset
		first      bool
	}{{"installation", rules, none, true}, {"removal", none, rules, false}} {
		input := RestoreInput(test.want, test.have)
		if first := strings.Index(input, "*raw\n") < strings.Index(input, "*nat\n"); first != test.first {
			t.Errorf("%s: the raw table comes first: %t\n%s", test.name, first, input)
		}
	}
}

// TPROXY takes over from redirection, and gives way to it, without a moment in which neither captures.
func TestTheTableThatBeginsToCaptureComesFirst(t *testing.T) {
	redirect, tproxy := policy.Rules(rulestest.CaptureAll, ruleset.IPv4), policy.Rules(rulestest.TPROXYAll, ruleset.IPv4)
	for _, test := range []struct {
		name       string
		want, have ruleset.Ruleset
		first      string
	}{{"to TPROXY", tproxy, redirect, "*mangle\n"}, {"to redirection", redirect, tproxy, "*nat\n"}} {
		if input := RestoreInput(test.want, test.have); !strings.HasPrefix(input, test.first) {
			t.Errorf("%s: %q is not the first table:\n%s", test.name, test.first, input)
		}
	}
}
