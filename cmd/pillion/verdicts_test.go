package main

import (
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/iptables/policy"
	"github.com/pillion-proxy/pillion/iptables/ruleset"
	"github.com/pillion-proxy/pillion/iptables/trace"
)

// The table of testdata/verdicts: flags and environment on one side, what becomes of whose connections on the other.
func TestFlagsMeanTheseVerdicts(t *testing.T) {
	text, err := os.ReadFile("testdata/verdicts")
	if err != nil {
		t.Fatal(err)
	}
	sets := 0
	for line := range strings.Lines(string(text)) {
		line = strings.TrimRight(line, "\n")
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		sets++
		command, flows, _ := strings.Cut(line, " | ")
		t.Run(command, func(t *testing.T) {
			spec := specOf(t, strings.TrimSuffix(command, " "))
			for _, family := range ruleset.Families {
				rules := policy.Rules(spec, family)
				for flow := range strings.FieldsSeq(flows) {
					if only, rest, found := strings.Cut(flow, ":"); found && len(only) == 1 {
						if only != strconv.Itoa(int(family)) {
							continue
						}
						flow = rest
					}
					packet, want := readFlow(t, spec, family, flow)
					if walk := trace.Of(rules, packet); walk.Verdict != want {
						t.Errorf("%s, %s: %v, want %v; rules on the way: %s", family, flow, walk.Verdict, want, strings.Join(walk.Path, " → "))
					}
				}
			}
		})
	}
	if sets < 100 {
		t.Errorf("only %d sets of flags", sets)
	}
}

// specOf turns a command line, with variables in front, into what it asks for. \x20 is a blank.
func specOf(t *testing.T, line string) capture.Spec {
	t.Helper()
	words := strings.Split(line, " ")
	for i := range words {
		words[i] = strings.ReplaceAll(words[i], `\x20`, " ")
	}
	for strings.Contains(words[0], "=") {
		variable, value, _ := strings.Cut(words[0], "=")
		t.Setenv(variable, value)
		words = words[1:]
	}
	options := newInitOptions(words[0] == "istio-iptables")
	cmd := &cobra.Command{Use: words[0]}
	options.bind(cmd)
	if err := cmd.ParseFlags(words[1:]); err != nil {
		t.Fatal(err)
	}
	if err := applyEnvironment(cmd.Flags()); err != nil {
		t.Fatal(err)
	}
	if err := options.complete(slog.New(slog.NewTextHandler(io.Discard, nil))); err != nil {
		t.Fatal(err)
	}
	options.spec.DNSServers = []netip.Addr{places["ns"][0], places["ns"][1]} // whatever this machine has
	if err := options.spec.Validate(); err != nil {
		t.Fatal(err)
	}
	return options.spec
}

// people are the users and groups of local processes.
var people = map[string][2]uint32{
	"app": {1000, 1000}, "root": {0, 0}, "proxy": {1337, 1337}, "uid": {1337, 3000}, "gid": {3000, 1337}, "tproxy": {0, 1337},
	"borrowed": {0, 1337}, "deliver": {1337, 1337}, "two": {1338, 1338}, "g2000": {1000, 2000}, "g2001": {1000, 2001},
}

// places are addresses of both families.
var places = map[string][2]netip.Addr{
	"svc": addressPair("203.0.113.7", "2001:db8:2::7"), "svc2": addressPair("203.0.113.70", "2001:db8:2::70"),
	"far": addressPair("192.0.2.200", "2001:db8:9::9"), "ns": addressPair("10.0.0.53", "2001:db8:53::53"),
	"pod": addressPair("198.51.100.2", "2001:db8:1::2"), "lo": addressPair("127.0.0.1", "::1"), "lo2": addressPair("127.0.0.2", "::"),
	"peer": addressPair("198.51.100.1", "2001:db8:1::1"), "vm": addressPair("192.0.2.2", "2001:db8:3::2"),
	"deliver": {capture.InboundSource4, capture.InboundSource6},
}

func addressPair(v4, v6 string) [2]netip.Addr {
	return [2]netip.Addr{netip.MustParseAddr(v4), netip.MustParseAddr(v6)}
}

// readFlow reads who>where:port[/udp][@interface]=verdict[@port].
func readFlow(t *testing.T, spec capture.Spec, family ruleset.Family, flow string) (trace.Packet, trace.Verdict) {
	t.Helper()
	at := func(place string) netip.Addr {
		pair, known := places[place]
		if !known {
			t.Fatalf("%s: unknown place %q", flow, place)
		}
		if family == ruleset.IPv6 {
			return pair[1]
		}
		return pair[0]
	}
	journey, outcome, _ := strings.Cut(flow, "=")
	journey, through, _ := strings.Cut(journey, "@")
	journey, overUDP := strings.CutSuffix(journey, "/udp")
	who, where, _ := strings.Cut(journey, ">")
	where, portText, _ := strings.Cut(where, ":")
	port, err := strconv.ParseUint(portText, 10, 16)
	if err != nil {
		t.Fatalf("%s: %v", flow, err)
	}
	p := trace.Packet{Dst: netip.AddrPortFrom(at(where), uint16(port)), Out: "eth0"}
	if overUDP {
		p.Protocol = ruleset.UDP
	}
	if where == "pod" || where == "lo" || where == "lo2" {
		p.Out = "lo"
	}
	ids, local := people[who]
	switch {
	case who == "peer":
		p.In, p.Out, p.Src = "eth0", "", at(who)
	case who == "vm":
		p.In, p.Out, p.Src = "vm0", "", at(who)
	case who == "borrowed":
		p.Src, p.Mark = at("peer"), spec.TPROXYMark
	case who == "deliver":
		p.Src = at(who)
	case !local:
		t.Fatalf("%s: unknown sender %q", flow, who)
	}
	p.UID, p.GID = ids[0], ids[1]
	if through != "" && p.In != "" {
		p.In = through
	} else if through != "" {
		p.Out = through
	}
	return p, readVerdict(t, outcome)
}

func readVerdict(t *testing.T, text string) trace.Verdict {
	t.Helper()
	verdicts := map[string]trace.Verdict{
		"-":     {},
		"out":   {Action: trace.Redirected, Port: capture.OutboundPort},
		"in":    {Action: trace.Redirected, Port: capture.InboundPort},
		"dns":   {Action: trace.Redirected, Port: capture.DNSPort},
		"given": {Action: trace.Given, Port: capture.InboundPort},
	}
	name, port, moved := strings.Cut(text, "@")
	verdict, known := verdicts[name]
	if moved {
		if _, err := fmt.Sscan(port, &verdict.Port); err != nil {
			t.Fatalf("%s: %v", text, err)
		}
	}
	if !known {
		t.Fatalf("%q is no verdict", text)
	}
	return verdict
}
