package rulestest

import (
	"strings"

	"github.com/pillion-proxy/pillion/internal/capture"
)

// edit changes the text of a ruleset.
type edit func(text string) string

// Swap returns an edit that replaces old by new.
func Swap(old, new string) edit {
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
	JumpOutLine = `-A OUTPUT -p tcp -m comment --comment "pillion:outbound/jump" -j PILLION_OUTPUT`
	StrangeLine = `-A OUTPUT -d 203.0.113.9/32 -j ACCEPT`
)

// CaptureAll has no exceptions, so its rules are few.
var CaptureAll = SpecOf(func(s *capture.Spec) { s.Inbound.All, s.Outbound.All = true, true })

// Meddling lists changes that can happen to installed rules, with what Diff reports and what a plan does. Namespace
// tests make the same changes in the kernel.
var Meddling = []struct {
	Name string
	Edit func(text string) string
	Want []string // kind, chain and ID or text
	Plan string   // without *nat and COMMIT
}{
	{"nothing", Swap("", ""), nil, ""},
	{"a foreign rule", Swap(JumpOutLine, StrangeLine+"\n"+JumpOutLine), nil, ""},
	{"a foreign chain", Swap("COMMIT", ":THEIRS - [0:0]\n-A THEIRS -j RETURN\nCOMMIT"), nil, ""},
	{"a rule tampered with", Swap("--to-ports 15006", "--to-ports 15007"),
		[]string{"tampered PILLION_IN_REDIRECT inbound/redirect"},
		":PILLION_IN_REDIRECT - [0:0]\n-A PILLION_IN_REDIRECT -p tcp -m comment --comment \"pillion:inbound/redirect\" -j REDIRECT --to-ports 15006\n"},
	{"a rule missing", Swap("-A PILLION_IN_REDIRECT -p tcp -m comment --comment \"pillion:inbound/redirect\" -j REDIRECT --to-ports 15006\n", ""),
		[]string{"missing PILLION_IN_REDIRECT inbound/redirect"},
		":PILLION_IN_REDIRECT - [0:0]\n-A PILLION_IN_REDIRECT -p tcp -m comment --comment \"pillion:inbound/redirect\" -j REDIRECT --to-ports 15006\n"},
	{"two rules swapped", func(text string) string {
		return Swap("TUNNEL", allInLine)(Swap(allInLine, tunnelLine)(Swap(tunnelLine, "TUNNEL")(text)))
	}, []string{"reordered PILLION_INBOUND inbound/tunnel", "reordered PILLION_INBOUND inbound/all"},
		":PILLION_INBOUND - [0:0]\n" + tunnelLine + "\n" + allInLine + "\n"},
	{"a rule in front", Swap(tunnelLine, "-A PILLION_INBOUND -j ACCEPT\n"+tunnelLine),
		[]string{"extra PILLION_INBOUND -A PILLION_INBOUND -j ACCEPT"},
		":PILLION_INBOUND - [0:0]\n" + tunnelLine + "\n" + allInLine + "\n"},
	{"a rule twice", Swap(tunnelLine, tunnelLine+"\n"+tunnelLine),
		[]string{"duplicate PILLION_INBOUND " + tunnelLine},
		":PILLION_INBOUND - [0:0]\n" + tunnelLine + "\n" + allInLine + "\n"},
	{"the jump gone", Swap(JumpOutLine+"\n", ""),
		[]string{"missing OUTPUT outbound/jump"}, JumpOutLine + "\n"},
	{"the jump twice", Swap(JumpOutLine, JumpOutLine+"\n"+StrangeLine+"\n"+JumpOutLine),
		[]string{"duplicate OUTPUT " + JumpOutLine}, "-D" + JumpOutLine[2:] + "\n"},
	{"a jump that we do not understand", Swap(JumpOutLine, JumpOutLine+"\n-A OUTPUT -p udp -m mark --mark 0x1/0x1 -j PILLION_REDIRECT"),
		[]string{"extra OUTPUT -A OUTPUT -p udp -m mark --mark 0x1/0x1 -j PILLION_REDIRECT"},
		"-D OUTPUT -p udp -m mark --mark 0x1/0x1 -j PILLION_REDIRECT\n"},
	{"a foreign chain jumps to ours", Swap("COMMIT", ":THEIRS - [0:0]\n-A THEIRS -j PILLION_OUTPUT\n-A THEIRS -j RETURN\nCOMMIT"),
		[]string{"extra THEIRS -A THEIRS -j PILLION_OUTPUT"}, "-D THEIRS -j PILLION_OUTPUT\n"},
	{"a chain of an earlier version", Swap("COMMIT", ":PILLION_OLD - [0:0]\n-A PILLION_OLD -j RETURN\nCOMMIT"),
		[]string{"extra PILLION_OLD -A PILLION_OLD -j RETURN", "extra PILLION_OLD "},
		":PILLION_OLD - [0:0]\n-X PILLION_OLD\n"},
}
