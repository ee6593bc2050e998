package ruleset

import (
	"net/netip"
	"testing"

	"github.com/pillion-proxy/pillion/internal/capture"
)

// A jump for DNS must precede rules that may decide about a query, and only those.
func TestRulesAheadOfAJumpAreThoseThatMayDecideAboutItsPackets(t *testing.T) {
	const jumpLine = `-A OUTPUT -m comment --comment "pillion:outbound/jump" -j PILLION_OUTPUT`
	at := Place{NAT, ChainBuiltOutput}
	queries := func(server string) []Match {
		var dst netip.Prefix
		if server != "" {
			dst = netip.MustParsePrefix(server)
		}
		return []Match{{Protocol: UDP, DstPorts: capture.PortRange{First: 53, Last: 53}, Dst: dst}}
	}
	for _, test := range []struct {
		before []Match
		rules  string
		ahead  bool
	}{
		{queries("127.0.0.11/32"), "-A OUTPUT -d 127.0.0.11/32 -j DOCKER_OUTPUT\n" + jumpLine, true},
		{queries("127.0.0.11/32"), "-A OUTPUT -d 127.0.0.11/32 -j DOCKER_OUTPUT", true},
		{queries("127.0.0.11/32"), jumpLine + "\n-A OUTPUT -d 127.0.0.11/32 -j DOCKER_OUTPUT", false},
		{nil, "-A OUTPUT -d 127.0.0.11/32 -j DOCKER_OUTPUT\n" + jumpLine, false},
		{queries("10.0.0.53/32"), "-A OUTPUT -d 127.0.0.11/32 -j DOCKER_OUTPUT\n" + jumpLine, false},
		{queries(""), "-A OUTPUT -d 127.0.0.11/32 -j DOCKER_OUTPUT\n" + jumpLine, true},
		{queries("10.0.0.53/32"), "-A OUTPUT -d 10.0.0.0/8 -j ACCEPT\n" + jumpLine, true},
		{queries("10.0.0.53/32"), "-A OUTPUT ! -d 10.0.0.0/8 -j ACCEPT\n" + jumpLine, false},
		{queries("10.0.0.53/32"), "-A OUTPUT ! -d 127.0.0.0/8 -j ACCEPT\n" + jumpLine, true},
		{queries("10.0.0.53/32"), "-A OUTPUT -p tcp -j ACCEPT\n" + jumpLine, false},
		{queries("10.0.0.53/32"), "-A OUTPUT ! -p tcp -j ACCEPT\n" + jumpLine, true},
		{queries("10.0.0.53/32"), "-A OUTPUT -p udp -m udp --dport 53 -j DNAT --to-destination 10.0.0.54\n" + jumpLine, true},
		{queries("10.0.0.53/32"), "-A OUTPUT -p udp -m udp --dport 50:60 -j RETURN\n" + jumpLine, true},
		{queries("10.0.0.53/32"), "-A OUTPUT -p udp -m udp --dport 123 -j RETURN\n" + jumpLine, false},
		{queries("10.0.0.53/32"), "-A OUTPUT -p udp -m udp ! --dport 53 -j RETURN\n" + jumpLine, false},
		{queries("10.0.0.53/32"), "-A OUTPUT -m ttl --ttl-eq 7 -j DROP\n" + jumpLine, true},
		{queries("10.0.0.53/32"), "-A OUTPUT -j LOG\n-A OUTPUT -j MARK --set-mark 1\n-A OUTPUT -p udp\n" + jumpLine, false},
		{queries("10.0.0.53/32"), "-A OUTPUT -p udp -j PILLION_OUTPUT\n" + jumpLine, false},
	} {
		jump := Rule{ID: "outbound/jump", Target: Jump(ChainOutput), Before: test.before}
		chain := Parse(IPv4, "*nat\n:OUTPUT ACCEPT [0:0]\n"+test.rules+"\nCOMMIT\n").Chain(at)
		if _, ahead := chain.Ahead(jump); ahead != test.ahead {
			t.Errorf("%v, %s: got %t", test.before, test.rules, ahead)
		}
	}
}
