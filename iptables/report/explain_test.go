package report

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/iptables"
	"github.com/pillion-proxy/pillion/iptables/policy"
	"github.com/pillion-proxy/pillion/iptables/ruleset"
	"github.com/pillion-proxy/pillion/iptables/rulestest"
	"github.com/pillion-proxy/pillion/iptables/trace"
)

func TestRulesAreShownInTheOrderInWhichTheyRun(t *testing.T) {
	const text = `*nat
:OUTPUT ACCEPT [9:9]
:PREROUTING ACCEPT [9:9]
:THEIRS - [0:0]
:PILLION_REDIRECT - [0:0]
:PILLION_INBOUND - [0:0]
:PILLION_OUTPUT - [0:0]
:EMPTY - [0:0]
[1:60] -A OUTPUT -m ttl --ttl-eq 7 -j THEIRS
[3:180] -A OUTPUT -p tcp -m comment --comment "pillion:outbound/jump" -j PILLION_OUTPUT
[0:0] -A THEIRS -j RETURN
[2:120] -A PILLION_REDIRECT -p tcp -m comment --comment "pillion:outbound/redirect" -j REDIRECT --to-ports 15001
[0:0] -A PILLION_OUTPUT -o lo -m comment --comment "pillion:outbound/loopback" -j DROP
[2:120] -A PILLION_OUTPUT -m comment --comment "pillion:outbound/all" -j PILLION_REDIRECT
COMMIT
*filter
[0:0] -A INPUT -j DROP
COMMIT
*raw
:OUTPUT ACCEPT [0:0]
-A OUTPUT -j ACCEPT
COMMIT
`
	live := policy.WithReasons(ruleset.Parse(ruleset.IPv4, text))
	const want = `ipv4 nft raw OUTPUT
    -j ACCEPT  (0 packets, 0 bytes)
      # not ours
ipv4 nft nat OUTPUT
    -m ttl --ttl-eq 7 -j THEIRS  (1 packets, 60 bytes)
      # not ours
    -p tcp -j PILLION_OUTPUT  (3 packets, 180 bytes)
      # outbound/jump: our chain decides about outgoing packets
ipv4 nft nat PILLION_OUTPUT
    -o lo -j DROP  (0 packets, 0 bytes)
      # outbound/loopback: has our name, but we make no such rule
    -j PILLION_REDIRECT  (2 packets, 120 bytes)
      # outbound/all: every other address is captured
ipv4 nft nat PILLION_REDIRECT
    -p tcp -j REDIRECT --to-ports 15001  (2 packets, 120 bytes)
      # outbound/redirect: captured outbound connections go to the agent
ipv4 nft nat THEIRS
    -j RETURN  (0 packets, 0 bytes)
      # not ours
`
	if got := ShowText([]ruleset.Held{{Flavour: ruleset.NFT, Rules: live}}); got != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
	if got := ShowText([]ruleset.Held{{Flavour: "", Rules: live}}); strings.Contains(got, " packets, ") || !strings.HasPrefix(got, "ipv4 raw OUTPUT\n    -j ACCEPT\n      # not ours\n") {
		t.Errorf("planned:\n%s", got)
	}
}

func TestVerdictsInWords(t *testing.T) {
	a := rulestest.Families[0]
	injector := rulestest.SpecOf(func(s *capture.Spec) {
		s.Inbound.All, s.Outbound.All, s.InboundExcluded = true, true, rulestest.Ports("15021")
	})
	tproxy, dns := injector, injector
	tproxy.Mode, tproxy.DropInvalid = capture.TPROXY, true
	dns.RedirectDNS, dns.CaptureAllDNS = true, true
	for _, test := range []struct {
		spec            capture.Spec
		packet          trace.Packet
		describes, says string
	}{
		{injector, rulestest.Sends(rulestest.Workload, 5, a.Elsewhere, 443), "tcp to 203.0.113.7:443 going out on eth0, sent by user 1000, group 5", "captured: goes to the agent's outbound port 15001"},
		{injector, rulestest.Sends(rulestest.Agent, rulestest.Agent, a.Elsewhere, 443), "tcp to 203.0.113.7:443 going out on eth0, sent by user 1337, group 1337", "not captured: the agent's own connections are not captured again"},
		{injector, rulestest.ToItself(rulestest.Agent, rulestest.Agent, a.Pod, 80), "tcp to 198.51.100.2:80 going out on lo, sent by user 1337, group 1337", "captured: goes to the agent's inbound port 15006"},
		{injector, rulestest.Arrives(a, 80), "tcp to 198.51.100.2:80 from 198.51.100.1 coming in on eth0", "captured: goes to the agent's inbound port 15006"},
		{injector, rulestest.Arrives(a, 15021), "tcp to 198.51.100.2:15021 from 198.51.100.1 coming in on eth0",
			"not captured: this port is excluded; probes and scrapes of the agent itself would break if they were captured"},
		{injector, rulestest.Established(0, rulestest.Arrives(a, 80)), "tcp to 198.51.100.2:80 from 198.51.100.1 coming in on eth0 of an established connection",
			"not captured by itself: the first packet of a connection decides about address translation, and the others follow"},
		{injector, rulestest.UDP(rulestest.Sends(rulestest.Workload, 5, a.Elsewhere, 53)), "udp to 203.0.113.7:53 going out on eth0, sent by user 1000, group 5", "not captured: no rule matches"},
		{dns, rulestest.UDP(rulestest.Sends(rulestest.Workload, 5, a.Elsewhere, 53)), "udp to 203.0.113.7:53 going out on eth0, sent by user 1000, group 5", "captured: goes to the agent's DNS port 15053"},
		{tproxy, rulestest.Arrives(a, 80), "tcp to 198.51.100.2:80 from 198.51.100.1 coming in on eth0", "captured: goes unchanged to the agent's inbound port 15006"},
		{tproxy, rulestest.Established(capture.LoopMark, rulestest.Arrives(a, 80)), "tcp to 198.51.100.2:80 from 198.51.100.1 coming in on eth0 of an established connection",
			"captured: the agent has its connection"},
		{tproxy, rulestest.Invalid(rulestest.Arrives(a, 80)), "tcp to 198.51.100.2:80 from 198.51.100.1 coming in on eth0 in state INVALID",
			"dropped: packets that conntrack calls INVALID would not be redirected, and the kernel would answer them with a reset"},
		{tproxy, rulestest.Marked(1337, rulestest.From(a.Peer, rulestest.ToItself(0, rulestest.Agent, a.Pod, 80))), "tcp to 198.51.100.2:80 from 198.51.100.1 going out on lo, sent by user 0, group 1337 with mark 0x539",
			"not captured: packets that the agent sends to the workload from its client's address are not captured again"},
	} {
		e := Explain(test.packet, []ruleset.Held{{Rules: policy.Rules(test.spec, ruleset.IPv4)}}, nil)
		if e.Packet != test.describes || e.Verdict != test.says {
			t.Errorf("got  %s: %s\nwant %s: %s", e.Packet, e.Verdict, test.describes, test.says)
		}
	}
}

// Rules of others take part in a trace.
func TestForeignRulesTakePartInATrace(t *testing.T) {
	ours := policy.Rules(rulestest.CaptureAll, ruleset.IPv4)
	packet := rulestest.Sends(rulestest.Workload, rulestest.Workload, nettest.Elsewhere4, 80)
	const before = "*nat\n:OUTPUT ACCEPT [0:0]\n%s\nCOMMIT\n"
	for _, test := range []struct {
		name      string
		held      []ruleset.Held
		verdict   string
		uncertain bool
	}{
		{"ours alone", []ruleset.Held{{Flavour: ruleset.NFT, Rules: ours}}, "captured: goes to the agent's outbound port 15001", false},
		{"nothing", nil, "not captured: no rule matches", false},
		{"of the other family", []ruleset.Held{{Flavour: ruleset.NFT, Rules: policy.Rules(rulestest.CaptureAll, ruleset.IPv6)}}, "not captured: no rule matches", false},
		{"an exception before our jump", []ruleset.Held{{Flavour: ruleset.NFT, Rules: ruleset.Parse(ruleset.IPv4, rulestest.Swap(rulestest.JumpOutLine, "-A OUTPUT -p tcp -m tcp --dport 80 -j ACCEPT\n"+rulestest.JumpOutLine)(ours.String()))}},
			"not captured: by a rule that is not ours", false},
		{"a match that we do not know", []ruleset.Held{{Flavour: ruleset.NFT, Rules: ruleset.Parse(ruleset.IPv4, rulestest.Swap(rulestest.JumpOutLine, "-A OUTPUT -m ttl --ttl-eq 7 -j ACCEPT\n"+rulestest.JumpOutLine)(ours.String()))}},
			"captured: goes to the agent's outbound port 15001", true},
		{"an exception in another flavour", []ruleset.Held{{Flavour: ruleset.NFT, Rules: ruleset.Parse(ruleset.IPv4, fmt.Sprintf(before, "-A OUTPUT -j ACCEPT"))}, {Flavour: ruleset.Legacy, Rules: ours}},
			"captured: goes to the agent's outbound port 15001", false},
		{"a redirection in another flavour", []ruleset.Held{{Flavour: ruleset.NFT, Rules: ruleset.Parse(ruleset.IPv4, fmt.Sprintf(before, "-A OUTPUT -p tcp -j REDIRECT --to-ports 8080"))}, {Flavour: ruleset.Legacy, Rules: ours}},
			"redirected to port 8080 by a rule that is not ours", true},
		{"a drop", []ruleset.Held{{Flavour: ruleset.NFT, Rules: ruleset.Parse(ruleset.IPv4, "*mangle\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT -j DROP\nCOMMIT\n")}, {Flavour: ruleset.Legacy, Rules: ours}},
			"dropped: by a rule that is not ours", false},
		{"a policy", []ruleset.Held{{Flavour: ruleset.NFT, Rules: ruleset.Parse(ruleset.IPv4, "*mangle\n:OUTPUT DROP [0:0]\nCOMMIT\n")}, {Flavour: ruleset.Legacy, Rules: ours}},
			"dropped: by the policy of a built-in chain", false},
	} {
		got := Explain(packet, test.held, nil)
		if got.Verdict != test.verdict || got.Uncertain != test.uncertain {
			t.Errorf("%s: got %+v, want %q, %t", test.name, got, test.verdict, test.uncertain)
		}
	}
}

// Chains that are not interpreted are listed if they are in a hook that the packet passes and may change its way.
func TestAnExplanationNamesChainsThatItCannotJudge(t *testing.T) {
	nettest.RequireRoot(t)
	for _, flavour := range []ruleset.Flavour{ruleset.NFT, ruleset.Legacy, ruleset.Native} {
		rulestest.UsePrograms(t, false, flavour)
		pod, _ := nettest.PodAndPeer(t)
		mustInstall(t, pod, rulestest.CaptureAll)
		pod.MustRun(t, "/usr/sbin/nft", `
			add table inet t
			add chain inet t in { type filter hook input priority 0; }
			add rule inet t in tcp dport 15006 drop
			add chain inet t out { type filter hook output priority 0; policy drop; }
			add chain inet t forward { type filter hook forward priority 0; policy drop; }
			add chain inet t before { type nat hook output priority -101; }
			add rule inet t before ip daddr 203.0.113.7 dnat to 203.0.113.9
			add chain inet t after { type nat hook output priority -50; }
			add rule inet t after redirect
			add table ip6 t
			add chain ip6 t in { type filter hook input priority 0; policy drop; }`)
		var live iptables.Live
		pod.Do(t, func() (err error) {
			live, err = iptables.Look(context.Background())
			return err
		})
		const in, out = "inet t in (nft, filter, hook input, priority 0): drop", "inet t out (nft, filter, hook output, priority 0): policy drop"
		const before, after = "inet t before (nft, nat, hook output, priority -101): dnat", "inet t after (nft, nat, hook output, priority -50): redirect"
		a := rulestest.Families[0]
		for _, test := range []struct {
			packet trace.Packet
			want   []string
		}{
			{rulestest.Arrives(a, 80), []string{in}},
			{rulestest.Sends(rulestest.Workload, rulestest.Workload, a.Elsewhere, 80), []string{in, out, before}},
			{rulestest.Sends(rulestest.Agent, rulestest.Agent, a.Elsewhere, 80), []string{out, before, after}},
			{rulestest.ToItself(rulestest.Workload, rulestest.Workload, a.Localhost, 80), []string{in, out, before, after}},
		} {
			e := Explain(test.packet, live.Held, live.Foreign)
			if !slices.Equal(e.Unless, test.want) || !e.Uncertain || !strings.HasSuffix(e.String(), "\nunless decided otherwise by "+test.want[len(test.want)-1]+"\n") {
				t.Errorf("%s: %s: got\n%s\nwant %q", flavour, e.Packet, e, test.want)
			}
		}
	}
}

func TestRoutesSupplyWhatAQuestionLeavesOut(t *testing.T) {
	nettest.RequireRoot(t)
	pod, _ := nettest.PodAndPeer(t)
	address, at := netip.MustParseAddr, netip.MustParseAddrPort
	for _, test := range []struct {
		question Question
		want     trace.Packet
		err      string
	}{
		{Question{UID: 7, Dst: at("203.0.113.7:80")}, trace.Packet{UID: 7, Out: "eth0", Src: nettest.PodIP4}, ""},
		{Question{UID: 7, GID: 8, Dst: at("[2001:db8:2::7]:80"), Mark: 5, State: ruleset.Invalid}, trace.Packet{UID: 7, GID: 8, Out: "eth0", Src: nettest.PodIP6, Mark: 5, State: ruleset.Invalid}, ""},
		{Question{Dst: netip.AddrPortFrom(nettest.PodIP4, 80)}, trace.Packet{Out: "lo", Src: nettest.PodIP4}, ""},
		{Question{Dst: at("127.0.0.1:80"), Src: address("127.0.0.6"), Interface: "lo"}, trace.Packet{Out: "lo", Src: address("127.0.0.6")}, ""},
		{Question{Dst: at("203.0.113.7:80"), Interface: "tun0"}, trace.Packet{Out: "tun0", Src: nettest.PodIP4}, ""},
		{Question{From: address("203.0.113.9"), Dst: netip.AddrPortFrom(netip.Addr{}, 80)}, trace.Packet{In: "eth0", Src: address("203.0.113.9"), Dst: netip.AddrPortFrom(nettest.PodIP4, 80)}, ""},
		{Question{From: address("2001:db8::9"), Dst: at("[2001:db8:1::2]:80"), Interface: "tun0"}, trace.Packet{In: "tun0", Src: address("2001:db8::9")}, ""},
		{Question{Dst: netip.AddrPortFrom(netip.Addr{}, 80)}, trace.Packet{}, "the destination has no address"},
		{Question{From: nettest.PodIP4, Dst: netip.AddrPortFrom(netip.Addr{}, 80)}, trace.Packet{}, "198.51.100.2 is an address of this machine"},
		{Question{From: address("203.0.113.9"), Dst: at("[::1]:80")}, trace.Packet{}, "203.0.113.9 and ::1 are of different families"},
	} {
		var got trace.Packet
		err := pod.Try(func() (err error) {
			got, err = test.question.Packet()
			return err
		})
		if test.err != "" {
			if err == nil || !strings.HasPrefix(err.Error(), test.err) {
				t.Errorf("%+v: error %v, want %s", test.question, err, test.err)
			}
			continue
		}
		want := test.want
		want.Protocol = ruleset.TCP
		if !want.Dst.IsValid() {
			want.Dst = test.question.Dst
		}
		if err != nil || got != want {
			t.Errorf("%+v:\ngot  %+v, %v\nwant %+v", test.question, got, err, want)
		}
	}
	alone := nettest.New(t, "alone")
	if err := alone.Try(func() error {
		_, err := Question{Dst: at("203.0.113.7:80")}.Packet()
		return err
	}); err == nil || !strings.Contains(err.Error(), "looking for the route to 203.0.113.7: network is unreachable") {
		t.Errorf("without a route: %v", err)
	}
}

// A rule with our prefix but without a known reason is named by its ID.
func TestARuleWithoutAReasonIsNamedByItsID(t *testing.T) {
	rules := ruleset.Parse(ruleset.IPv4, "*nat\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT -p tcp -m comment --comment \"pillion:novel\" -j RETURN\nCOMMIT\n")
	packet := rulestest.Sends(rulestest.Workload, rulestest.Workload, nettest.Elsewhere4, 80)
	if got := Explain(packet, []ruleset.Held{{Rules: rules}}, nil).Verdict; got != "not captured: by novel" {
		t.Errorf("got %q", got)
	}
}
