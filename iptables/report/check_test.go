package report

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/iptables/policy"
	"github.com/pillion-proxy/pillion/iptables/ruleset"
	"github.com/pillion-proxy/pillion/iptables/rulestest"
)

func TestCheckReportsEachChangeInOneLineWithItsEffect(t *testing.T) {
	want := policy.Rules(rulestest.CaptureAll, ruleset.IPv4)
	var text strings.Builder
	for _, m := range rulestest.Meddling {
		fmt.Fprintf(&text, "%s\n", m.Name)
		for _, change := range ruleset.Diff(want, ruleset.Parse(ruleset.IPv4, m.Edit(want.String()))) {
			fmt.Fprintf(&text, "    %s\n", Difference{"ipv4", ruleset.NFT, change, meaning(change)})
		}
	}
	rulestest.Golden(t, "check", text.String())
}

func TestCheckNamesChangesOfTheNamespace(t *testing.T) {
	nettest.RequireRoot(t)
	rulestest.UsePrograms(t, false, ruleset.NFT, ruleset.Legacy)
	ns := nettest.New(t, "pod")
	spec := rulestest.SpecOf(func(s *capture.Spec) {
		s.Mode, s.Inbound.All, s.Outbound.All, s.DropInvalid = capture.TPROXY, true, true, true
		s.RedirectDNS, s.DNSServers = true, []netip.Addr{nettest.Elsewhere4}
	})
	check := func() Findings {
		t.Helper()
		var found Findings
		ns.Do(t, func() (err error) {
			found, err = Check(context.Background(), spec, "")
			return err
		})
		return found
	}
	if found := check(); found.Equal || found.Installed || len(found.Differences) < 60 || found.String() != "no rules of pillion are installed: nothing is captured\n" {
		t.Errorf("nothing is there: got\n%s", found)
	}
	for _, test := range []struct {
		name, commands string
		equal          bool
		want           string // a beginning of a line for each of these lines
	}{
		{"nothing", "", true, "the rules match"},
		{"a jump removed", "iptables-nft -t mangle -D OUTPUT 1", false,
			"missing: ipv4 nft mangle OUTPUT: leaving/jump, -p tcp -j PILLION_OUTPUT: outgoing packets lack the marks of TPROXY"},
		{"two jumps removed", "iptables-nft -t raw -D OUTPUT 1; iptables-nft -t nat -D OUTPUT 1", false,
			"missing: ipv4 nft raw OUTPUT: zone/leaving/jump, -p udp -j PILLION_OUTPUT: captured and other DNS queries share\n" +
				"missing: ipv4 nft nat OUTPUT: outbound/jump, -j PILLION_OUTPUT: no outbound connection is captured"},
		{"the redirection leads elsewhere", "ip6tables-nft -t nat -R PILLION_REDIRECT 1 -p tcp -m comment --comment pillion:outbound/redirect -j REDIRECT --to-ports 9", false,
			"tampered: ipv6 nft nat PILLION_REDIRECT: outbound/redirect, found -p tcp -j REDIRECT --to-ports 9: matching packets do not reach port 15001; instead, matching packets go to port 9"},
		{"the agent captured", "iptables-nft -t nat -D PILLION_OUTPUT -m owner --uid-owner 1337 -m comment --comment pillion:outbound/agent/uid/1337 -j RETURN", false,
			"missing: ipv4 nft nat PILLION_OUTPUT: outbound/agent/uid/1337, -m owner --uid-owner 1337 -j RETURN: an exception is missing, and matching packets may be captured"},
		{"an exception in our chain", "iptables-nft -t nat -I PILLION_OUTPUT -d 203.0.113.0/24 -j RETURN", false,
			"extra: ipv4 nft nat PILLION_OUTPUT: -d 203.0.113.0/24 -j RETURN: matching packets are not captured"},
		{"a rule with a match that we do not know", "iptables-nft -t nat -I PILLION_OUTPUT -m ttl --ttl-eq 7 -j RETURN", false,
			"extra: ipv4 nft nat PILLION_OUTPUT: -m ttl --ttl-eq 7 -j RETURN: its effect is not known"},
		{"a mark gone", "iptables-nft -t mangle -D PILLION_DIVERT 1", false,
			"missing: ipv4 nft mangle PILLION_DIVERT: inbound/divert/mark, -j MARK --set-xmark 0x539/0xffffffff: matching packets do not get their mark"},
		{"the routing rule gone", "ip rule del fwmark 1337 lookup 133", false,
			"missing: ipv4: fwmark 0x539 lookup 133: packets with TPROXY's mark are not delivered locally"},
		{"the route gone", "ip -6 route del local default dev lo table 133", false,
			"missing: ipv6: local default dev lo table 133: packets with TPROXY's mark"},
		{"the source address gone", "ip addr del ::6/128 dev lo", false,
			"missing: ipv6: ::6 on lo: the agent cannot dial the workload"},
		{"rules in the other flavour", "iptables-legacy -t nat -N PILLION_OLD; iptables-legacy -t nat -A PILLION_OLD -j RETURN", false,
			"extra: ipv4 legacy nat PILLION_OLD: -j RETURN: matching packets are not captured\nextra: ipv4 legacy nat PILLION_OLD: the chain is not needed"},
		{"an exception ahead of our jump", "iptables-nft -t nat -I OUTPUT -p tcp -m tcp --dport 443 -j ACCEPT", true,
			"warning: ipv4 nft nat OUTPUT: -p tcp -m tcp --dport 443 -j ACCEPT precedes our jump: our rules do not see matching packets"},
		{"a drop ahead of it, with a match that we do not know", "iptables-nft -t mangle -I PREROUTING -m ttl --ttl-eq 7 -j DROP", true,
			"warning: ipv4 nft mangle PREROUTING: -m ttl --ttl-eq 7 -j DROP precedes our jump: matching packets are dropped before our rules see them"},
		{"a jump ahead of it", "iptables-nft -t nat -N THEIRS; iptables-nft -t nat -I OUTPUT -p tcp -j THEIRS -m tcp --dport 80", true,
			"warning: ipv4 nft nat OUTPUT: -p tcp -m tcp --dport 80 -j THEIRS precedes our jump: matching packets go to THEIRS, and may not reach our rules"},
		{"a jump for DNS ahead of it", "iptables-nft -t nat -N THEIRS; iptables-nft -t nat -I OUTPUT -d 203.0.113.0/24 -j THEIRS", false,
			"reordered: ipv4 nft nat OUTPUT: outbound/jump, found -d 203.0.113.0/24 -j THEIRS: it is not ours and precedes our jump: DNS queries may be lost"},
		{"a chain of nftables that translates before ours", "nft 'add table ip t; add chain ip t c { type nat hook output priority -101; }; add rule ip t c tcp dport 80 dnat to 203.0.113.9'", true,
			"warning: ip t c (nft, nat, hook output, priority -101) precedes our rules or has their priority, and may decide about packets first: dnat"},
		{"one that translates after ours", "nft 'add table ip t; add chain ip t c { type nat hook output priority -99; }; add rule ip t c tcp dport 80 dnat to 203.0.113.9'", true,
			"the rules match"},
		{"one that drops, by way of another chain", "nft 'add table inet t; add chain inet t d; add rule inet t d drop; add chain inet t c { type filter hook input priority 0; }; add rule inet t c tcp dport 80 jump d; add rule inet t c reject'", true,
			"warning: inet t c (nft, filter, hook input, priority 0) may decide about captured packets: drop, reject"},
		{"one that drops by its policy", "nft 'add table ip6 t; add chain ip6 t c { type filter hook output priority 5; policy drop; }'", true,
			"warning: ip6 t c (nft, filter, hook output, priority 5) may decide about captured packets: policy drop"},
		{"one with a verdict map", "nft 'add table inet t; add chain inet t c { type filter hook prerouting priority -300; }; add rule inet t c tcp dport vmap { 80 : drop }; add rule inet t c notrack'", true,
			"warning: inet t c (nft, filter, hook prerouting, priority -300) may decide about captured packets: verdict map, notrack"},
		{"one that only counts, accepts and masquerades", "nft 'add table ip t; add chain ip t c { type filter hook output priority 0; }; add rule ip t c counter accept; add chain ip t p { type nat hook postrouting priority 100; }; add rule ip t p masquerade'", true,
			"the rules match"},
		{"one at a device", "nft 'add table netdev t; add chain netdev t in { type filter hook ingress device lo priority 0; }; add rule netdev t in tcp dport 80 drop'", true,
			"warning: netdev t in (nft, filter, hook ingress, priority 0) may decide about captured packets: drop"},
		{"one that passes to another proxy", "nft 'add table ip t; add chain ip t c { type filter hook prerouting priority 0; }; add rule ip t c tcp dport 81 tproxy to :82'", true,
			"warning: ip t c (nft, filter, hook prerouting, priority 0) may decide about captured packets: tproxy"},
		{"a drop in the filter table of iptables", "iptables-nft -A INPUT -p tcp --dport 80 -j DROP", true,
			"warning: ip filter INPUT (nft, filter, hook input, priority 0) may decide about captured packets: drop"},
		{"the same in the legacy one", "iptables-legacy -N THEIRS; iptables-legacy -A THEIRS -j REJECT; iptables-legacy -A INPUT -p tcp -j THEIRS; iptables-legacy -P OUTPUT DROP", true,
			"warning: ipv4 filter INPUT (legacy, filter, hook input, priority 0) may decide about captured packets: reject\n" +
				"warning: ipv4 filter OUTPUT (legacy, filter, hook output, priority 0) may decide about captured packets: policy drop"},
		{"what decides nothing ahead of it", "iptables-nft -t mangle -I OUTPUT -j MARK --set-mark 7", true, "the rules match"},
		{"an exception behind it", "iptables-nft -t nat -A OUTPUT -j ACCEPT", true, "the rules match"},
	} {
		t.Run(test.name, func(t *testing.T) {
			mustInstall(t, ns, spec)
			ns.MustRun(t, "/bin/sh", "-c", "PATH=/usr/sbin:/usr/bin:/sbin:/bin; set -e; "+test.commands)
			found := check()
			for line := range strings.SplitSeq(test.want, "\n") {
				if !strings.Contains("\n"+found.String(), "\n"+line) {
					t.Errorf("got\n%s\nwant %s", found, line)
				}
			}
			if found.Equal != test.equal || !test.equal && len(found.Differences) != strings.Count(test.want, "\n")+1 {
				t.Errorf("equal: %t, got\n%s", found.Equal, found)
			}
			ns.MustRun(t, "/bin/sh", "-c", "PATH=/usr/sbin:/usr/bin:/sbin:/bin; for t in raw mangle nat; do iptables-nft -t $t -F; iptables-nft -t $t -X; done; iptables-legacy -t nat -F; iptables-legacy -t nat -X; iptables-legacy -F; iptables-legacy -X; iptables-legacy -P OUTPUT ACCEPT; iptables-nft -F; nft delete table inet t; nft delete table ip t; nft delete table ip6 t; nft delete table netdev t; true")
		})
	}
}
