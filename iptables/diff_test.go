package iptables

import (
	"slices"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/capture"
)

// edit changes the text of a ruleset as a meddler would.
type edit func(text string) string

func swap(old, new string) edit {
	return func(text string) string {
		if !strings.Contains(text, old) {
			panic("nothing to edit: " + old)
		}
		return strings.Replace(text, old, new, 1)
	}
}

const (
	tunnelLine  = `-A PILLION_INBOUND -p tcp -m tcp --dport 15008 -m comment --comment "pillion:inbound/tunnel" -j RETURN`
	allInLine   = `-A PILLION_INBOUND -p tcp -m comment --comment "pillion:inbound/all" -j PILLION_IN_REDIRECT`
	jumpOutLine = `-A OUTPUT -p tcp -m comment --comment "pillion:outbound/jump" -j PILLION_OUTPUT`
	strangeLine = `-A OUTPUT -d 203.0.113.9/32 -j ACCEPT`
)

// captureAll has no exceptions, so that its rules fit into the eye.
var captureAll = specOf(func(s *capture.Spec) { s.Inbound.All, s.Outbound.All = true, true })

// meddling is what can happen to installed rules, what Diff calls it, and what a plan does about it. The namespace tests
// do the same to the kernel.
var meddling = []struct {
	name string
	edit edit
	want []string // kind, chain and ID or text
	plan string   // without *nat and COMMIT
}{
	{"nothing", swap("", ""), nil, ""},
	{"a stranger's rule", swap(jumpOutLine, strangeLine+"\n"+jumpOutLine), nil, ""},
	{"a stranger's chain", swap("COMMIT", ":THEIRS - [0:0]\n-A THEIRS -j RETURN\nCOMMIT"), nil, ""},
	{"a rule tampered with", swap("--to-ports 15006", "--to-ports 15007"),
		[]string{"tampered PILLION_IN_REDIRECT inbound/redirect"},
		":PILLION_IN_REDIRECT - [0:0]\n-A PILLION_IN_REDIRECT -p tcp -m comment --comment \"pillion:inbound/redirect\" -j REDIRECT --to-ports 15006\n"},
	{"a rule missing", swap("-A PILLION_IN_REDIRECT -p tcp -m comment --comment \"pillion:inbound/redirect\" -j REDIRECT --to-ports 15006\n", ""),
		[]string{"missing PILLION_IN_REDIRECT inbound/redirect"},
		":PILLION_IN_REDIRECT - [0:0]\n-A PILLION_IN_REDIRECT -p tcp -m comment --comment \"pillion:inbound/redirect\" -j REDIRECT --to-ports 15006\n"},
	{"two rules swapped", func(text string) string {
		return swap("TUNNEL", allInLine)(swap(allInLine, tunnelLine)(swap(tunnelLine, "TUNNEL")(text)))
	}, []string{"reordered PILLION_INBOUND inbound/tunnel", "reordered PILLION_INBOUND inbound/all"},
		":PILLION_INBOUND - [0:0]\n" + tunnelLine + "\n" + allInLine + "\n"},
	{"a rule in front", swap(tunnelLine, "-A PILLION_INBOUND -j ACCEPT\n"+tunnelLine),
		[]string{"extra PILLION_INBOUND -A PILLION_INBOUND -j ACCEPT"},
		":PILLION_INBOUND - [0:0]\n" + tunnelLine + "\n" + allInLine + "\n"},
	{"a rule twice", swap(tunnelLine, tunnelLine+"\n"+tunnelLine),
		[]string{"duplicate PILLION_INBOUND " + tunnelLine},
		":PILLION_INBOUND - [0:0]\n" + tunnelLine + "\n" + allInLine + "\n"},
	{"the jump gone", swap(jumpOutLine+"\n", ""),
		[]string{"missing OUTPUT outbound/jump"}, jumpOutLine + "\n"},
	{"the jump twice", swap(jumpOutLine, jumpOutLine+"\n"+strangeLine+"\n"+jumpOutLine),
		[]string{"duplicate OUTPUT " + jumpOutLine}, "-D" + jumpOutLine[2:] + "\n"},
	{"a jump that we do not understand", swap(jumpOutLine, jumpOutLine+"\n-A OUTPUT -p udp -m mark --mark 0x1/0x1 -j PILLION_REDIRECT"),
		[]string{"extra OUTPUT -A OUTPUT -p udp -m mark --mark 0x1/0x1 -j PILLION_REDIRECT"},
		"-D OUTPUT -p udp -m mark --mark 0x1/0x1 -j PILLION_REDIRECT\n"},
	{"a stranger's chain jumps to ours", swap("COMMIT", ":THEIRS - [0:0]\n-A THEIRS -j PILLION_OUTPUT\n-A THEIRS -j RETURN\nCOMMIT"),
		[]string{"extra THEIRS -A THEIRS -j PILLION_OUTPUT"}, "-D THEIRS -j PILLION_OUTPUT\n"},
	{"a chain of an earlier version", swap("COMMIT", ":PILLION_OLD - [0:0]\n-A PILLION_OLD -j RETURN\nCOMMIT"),
		[]string{"extra PILLION_OLD -A PILLION_OLD -j RETURN", "extra PILLION_OLD "},
		":PILLION_OLD - [0:0]\n-X PILLION_OLD\n"},
}

func TestDiffNamesWhatIsWrongAndThePlanMendsThatAlone(t *testing.T) {
	want := Rules(captureAll, IPv4)
	for _, m := range meddling {
		t.Run(m.name, func(t *testing.T) {
			have := Parse(IPv4, m.edit(want.String()))
			var got []string
			for _, c := range Diff(want, have) {
				what := c.ID
				if what == "" {
					what = c.Found
				}
				got = append(got, strings.Join([]string{string(c.Kind), c.Chain, what}, " "))
			}
			if !slices.Equal(got, m.want) {
				t.Errorf("differences:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(m.want, "\n"))
			}
			plan := m.plan
			if plan != "" {
				plan = "*nat\n" + plan + "COMMIT\n"
			}
			if got := restoreInput(want, have); got != plan {
				t.Errorf("plan:\n%s\nwant:\n%s", got, plan)
			}
		})
	}
}

func TestAFreshTableGetsItsJumpsLast(t *testing.T) {
	input := restoreInput(Rules(captureAll, IPv4), Ruleset{Family: IPv4})
	lines := strings.Split(strings.TrimSpace(input), "\n")
	tail := lines[len(lines)-3:]
	if !strings.HasPrefix(tail[0], "-A PREROUTING ") || !strings.HasPrefix(tail[1], "-A OUTPUT ") || tail[2] != "COMMIT" {
		t.Errorf("the jumps are not at the end:\n%s", input)
	}
}

func TestRemovingOursLeavesOthers(t *testing.T) {
	text := swap(jumpOutLine, strangeLine+"\n"+jumpOutLine)(Rules(captureAll, IPv4).String())
	input := restoreInput(Ruleset{Family: IPv4}, Parse(IPv4, text))
	for line := range strings.Lines(input) {
		if !strings.Contains(line, ownPrefix) && line != "*nat\n" && line != "COMMIT\n" {
			t.Errorf("the removal touches %q", line)
		}
	}
}
