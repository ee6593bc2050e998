package iptables

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

// saves are outputs of real iptables-save, of both flavours and families, with rules of many people in them.
func saves(t testing.TB) map[string]string {
	files, err := filepath.Glob(filepath.Join("testdata", "saves", "*"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no saves: %v", err)
	}
	texts := make(map[string]string)
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		texts[filepath.Base(file)] = string(text)
	}
	return texts
}

func TestParseKeepsEveryRuleOfOurTablesToTheLetter(t *testing.T) {
	for name, text := range saves(t) {
		t.Run(name, func(t *testing.T) {
			rendered := Parse(IPv4, text).String()
			var tables string
			for _, name := range TableNames {
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

func TestParseUnderstandsOursAndNothingElse(t *testing.T) {
	for name, text := range saves(t) {
		ours := strings.HasPrefix(name, "pillion")
		for at, r := range Parse(IPv4, text).All() {
			simple := strings.HasSuffix(r.line(at.Chain), "-j REDIRECT --to-ports 8080")
			if understood := r.Foreign == ""; understood != ours && !simple {
				t.Errorf("%s: %q understood: %t", name, r.line(at.Chain), understood)
			}
		}
	}
}

func TestParseTakesWhatMakesNoSense(t *testing.T) {
	for _, text := range []string{
		"", "\n", "*", ":", ": ", "-A", "-A ", "-A OUTPUT", "*nat\n:OUTPUT", "*nat\n:OUTPUT ACCEPT\n-A OUTPUT", "*nat\n-A NOWHERE -j RETURN",
		"*nat\n:O - \n-A O -s", "*nat\n:O -\n-A O !", "*nat\n:O -\n-A O ! ! -d 1.2.3.4/32 -j RETURN", "*nat\n:O -\n-A O --comment \"", "COMMIT\nCOMMIT",
		"*nat\n:O - [0:0]\n:O - [0:0]\n-A O --to-ports 5 -j REDIRECT", "[", "[1:2]", "[1:2] -A",
	} {
		Parse(IPv6, text)
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
		`-p tcp -m comment --comment "somebody's" -j REDIRECT --to-ports 15001`,
		`-p tcp -j REDIRECT --to-ports 1-2`,
		`-p tcp -j REDIRECT --to-ports 15001 --random`,
		`-p tcp -g PILLION_REDIRECT`,
		`-j SNAT --to-source 10.0.0.1`,
		`-m comment --comment "pillion:outbound/all" -m mark --mark 0x1 -j RETURN`,
	} {
		line := "-A OUTPUT " + rule
		rs := Parse(IPv4, "*nat\n:OUTPUT ACCEPT [0:0]\n"+line+"\nCOMMIT\n")
		if got := rs.Tables[0].Chains[0].Rules; len(got) != 1 || got[0].Foreign != line {
			t.Errorf("%s: read as %+v", rule, got)
		}
	}
}

// FuzzParse holds Parse against anybody's text: it ends, what it read renders as what it read, and the plan, the
// difference and the trace made from it end, too.
func FuzzParse(f *testing.F) {
	for _, text := range saves(f) {
		f.Add(text)
	}
	for _, sc := range scenarios {
		f.Add(Rules(sc.spec, IPv4).String())
	}
	f.Add("*nat\n:PILLION_A - [0:0]\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT -j PILLION_A\n-A PILLION_A -j PILLION_A\n-A PILLION_A -j PILLION_A\n")
	want := Rules(scenarios[0].spec, IPv4)
	f.Fuzz(func(t *testing.T, text string) {
		rs := Parse(IPv4, text)
		if again := Parse(IPv4, rs.String()); !reflect.DeepEqual(again, rs) {
			t.Fatalf("read  %+v\nagain %+v", rs, again)
		}
		if same := len(Diff(want, rs)) == 0; same != (restoreInput(want, rs) == "") {
			t.Fatalf("Diff and the plan disagree whether anything is to be done: %v; %q", Diff(want, rs), restoreInput(want, rs))
		}
		for _, s := range scenarios[0].stories(families[0])[:5] {
			rs.Trace(s.packet)
		}
	})
}

func bare(line string) string {
	_, line = splitCounters(line)
	return line
}
