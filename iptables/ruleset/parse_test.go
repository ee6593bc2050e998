package ruleset_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/iptables/ruleset"
	"github.com/pillion-proxy/pillion/iptables/rulestest"
)

func TestParseKeepsEveryRuleOfOurTablesToTheLetter(t *testing.T) {
	for name, text := range rulestest.Saves(t, "testdata/saves") {
		t.Run(name, func(t *testing.T) {
			rendered := ruleset.Parse(ruleset.IPv4, text).String()
			var tables string
			for _, name := range ruleset.TableNames {
				_, table, _ := strings.Cut(text, "*"+string(name)+"\n")
				table, _, _ = strings.Cut(table, "COMMIT\n")
				tables += table
			}
			for line := range strings.Lines(tables) {
				if strings.HasPrefix(line, ":") {
					line, _, _ = strings.Cut(line, " [")
				} else {
					line = bare(line)
				}
				if !strings.Contains(rendered, line) {
					t.Errorf("lost: %s", line)
				}
			}
			if got, want := strings.Count(rendered, "-A "), strings.Count(tables, "-A "); got != want {
				t.Errorf("%d rules, want %d", got, want)
			}
		})
	}
}

func TestParseInterpretsOnlyOurRules(t *testing.T) {
	for name, text := range rulestest.Saves(t, "testdata/saves") {
		ours := strings.HasPrefix(name, "pillion")
		for at, r := range ruleset.Parse(ruleset.IPv4, text).All() {
			simple := strings.HasSuffix(r.Line(at.Chain), "-j REDIRECT --to-ports 8080")
			if understood := r.Foreign == ""; understood != ours && !simple {
				t.Errorf("%s: %q understood: %t", name, r.Line(at.Chain), understood)
			}
		}
	}
}

func TestParseAcceptsMalformedInput(t *testing.T) {
	for _, text := range []string{
		"", "\n", "*", ":", ": ", "-A", "-A ", "-A OUTPUT", "*nat\n:OUTPUT", "*nat\n:OUTPUT ACCEPT\n-A OUTPUT", "*nat\n-A NOWHERE -j RETURN",
		"*nat\n:O - \n-A O -s", "*nat\n:O -\n-A O !", "*nat\n:O -\n-A O ! ! -d 1.2.3.4/32 -j RETURN", "*nat\n:O -\n-A O --comment \"", "COMMIT\nCOMMIT",
		"*nat\n:O - [0:0]\n:O - [0:0]\n-A O --to-ports 5 -j REDIRECT", "[", "[1:2]", "[1:2] -A",
	} {
		ruleset.Parse(ruleset.IPv6, text)
	}
}

func TestARuleThatIsAlmostOursIsNotOurs(t *testing.T) {
	for _, rule := range []string{
		`! -s 10.0.0.0/8 -j RETURN`,
		`-p udplite -j RETURN`,
		`-p tcp -m multiport --dports 80 -j RETURN`,
		`-p tcp -m tcp ! --sport 80 -j RETURN`,
		`-p tcp -m tcp --dport 80 --sport 80 -j RETURN`,
		`-p tcp -m tcp --dport ssh -j RETURN`,
		`-p tcp -m tcp --dport 80-90 -j RETURN`,
		`-m conntrack --ctstate NEW -j RETURN`,
		`-m connmark ! --mark 0x1 -j RETURN`,
		`-m mark --mark 0x1/0xff -j RETURN`,
		`-j MARK --set-xmark 0x1/0xff`,
		`-j CONNMARK --save-mark --nfmask 0xff --ctmask 0xff`,
		`-j CONNMARK --save-mark --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff`,
		`-j CT --notrack`,
		`-j CT --zone 1 --zone 2`,
		`-p tcp -j TPROXY --on-port 1 --on-ip 0.0.0.0 --tproxy-mark 0x0/0x0`,
		`-m owner ! --uid-owner 1337 -j RETURN`,
		`-m owner --uid-owner root -j RETURN`,
		`-m owner --uid-owner 1 --gid-owner 1 -j RETURN`,
		`-p tcp -m comment --comment "foreign" -j REDIRECT --to-ports 15001`,
		`-p tcp -j REDIRECT --to-ports 1-2`,
		`-p tcp -j REDIRECT --to-ports 15001 --random`,
		`-p tcp -g PILLION_REDIRECT`,
		`-j SNAT --to-source 10.0.0.1`,
		`-m comment --comment "pillion:outbound/all" -m mark --mark 0x1 -j RETURN`,
	} {
		line := "-A OUTPUT " + rule
		rs := ruleset.Parse(ruleset.IPv4, "*nat\n:OUTPUT ACCEPT [0:0]\n"+line+"\nCOMMIT\n")
		if got := rs.Tables[0].Chains[0].Rules; len(got) != 1 || got[0].Foreign != line {
			t.Errorf("%s: read as %+v", rule, got)
		}
	}
}

func bare(line string) string {
	_, line = ruleset.SplitCounters(line)
	return line
}

func TestWordsAreSplitAtBlanksOutsideQuotes(t *testing.T) {
	for line, want := range map[string][]string{
		``:                         nil,
		`  -A  OUTPUT `:            {"-A", "OUTPUT"},
		`--comment "two words" -j`: {"--comment", "two words", "-j"},
		`--comment "a \"quoted\" word" -j PILLION_OUTPUT`: {"--comment", `a "quoted" word`, "-j", "PILLION_OUTPUT"},
		`--comment "a \\" -j RETURN`:                      {"--comment", `a \`, "-j", "RETURN"},
		`a\ b`:                                            {`a\`, "b"},
		`--comment "" -j`:                                 {"--comment", "", "-j"},
	} {
		if got := ruleset.SplitWords(line); !slices.Equal(got, want) {
			t.Errorf("%s: got %q, want %q", line, got, want)
		}
	}
}

// A jump to our chain counts as ours behind any comment, and a comment that mentions one does not.
func TestAJumpToOursIsFoundBehindAQuotedComment(t *testing.T) {
	for line, want := range map[string]bool{
		`-A OUTPUT -m comment --comment "x \" y" -j PILLION_OUTPUT`:     true,
		`-A OUTPUT -m comment --comment "-j PILLION_OUTPUT" -j RETURN`:  false,
		`-A OUTPUT -m ttl --ttl-eq 7 -g PILLION_OUTPUT`:                 true,
		`-A OUTPUT -m comment --comment "x\" -j PILLION_A" -j DROP`:     false,
		`-A OUTPUT -m comment --comment PILLION_OUTPUT -j PILLION_NONE`: true,
	} {
		rs := ruleset.Parse(ruleset.IPv4, "*nat\n:OUTPUT ACCEPT [0:0]\n"+line+"\nCOMMIT\n")
		if got := len(rs.Own().Tables) == 1; got != want {
			t.Errorf("%s: ours: %t", line, got)
		}
	}
}
