package inbound

import (
	"net/netip"
	"testing"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/localaddr"
	"github.com/pillion-proxy/pillion/internal/relay"
)

func TestPolicy(t *testing.T) {
	own4, own6 := netip.MustParseAddr("198.51.100.2"), netip.MustParseAddr("2001:db8::2")
	with := localaddr.Of(own4, own6, capture.InboundSource6)
	without := localaddr.Of(own4, own6)
	ports := capture.Default().OwnPorts()
	for _, c := range []struct {
		dst       string
		addresses *localaddr.Set
		want      flow.Reason // empty: allowed
	}{
		{"198.51.100.2:80", with, ""},
		{"198.51.100.2:80", without, ""},
		{"127.0.0.1:80", with, ""},
		{"[2001:db8::2]:80", with, ""},
		{"[2001:db8::2]:80", without, flow.IPv6SourceMissing},
		{"198.51.100.3:80", with, flow.ForeignAddress},
		{"[2001:db8::3]:80", with, flow.ForeignAddress},
		{"198.51.100.3:15006", with, flow.ForeignAddress},
		{"198.51.100.2:15006", with, flow.Loop},
		{"198.51.100.2:15001", with, flow.Loop},
		{"198.51.100.2:15000", with, flow.Loop},
		{"198.51.100.2:15020", with, flow.Loop},
		{"198.51.100.2:15021", with, flow.Loop},
		{"198.51.100.2:15053", with, flow.Loop},
		{"198.51.100.2:15090", with, flow.Loop},
		{"127.0.0.1:15006", with, flow.Loop},
		{"[2001:db8::2]:15006", without, flow.Loop},
	} {
		reason, ok := policy{ports, c.addresses}.allows(target(netip.MustParseAddrPort(c.dst)))
		if reason != c.want || ok != (c.want == "") {
			t.Errorf("%s: %q, %v; want %q", c.dst, reason, ok, c.want)
		}
	}
}

// A client's own address is borrowed wherever the kernel lets it be, and then ::6 is not needed.
func TestSource(t *testing.T) {
	own4, own6 := netip.MustParseAddr("198.51.100.2"), netip.MustParseAddr("2001:db8::2")
	p := policy{capture.Default().OwnPorts(), localaddr.Of(own4, own6)} // without ::6
	for _, c := range []struct {
		dst, client, source string
		borrowed            bool
		refused             flow.Reason
	}{
		{"198.51.100.2:80", "203.0.113.7", "203.0.113.7", true, ""},
		{"[2001:db8::2]:80", "2001:db8:2::7", "2001:db8:2::7", true, ""},
		{"198.51.100.2:80", "198.51.100.2", "198.51.100.2", true, ""},
		{"127.0.0.1:80", "203.0.113.7", "127.0.0.6", false, ""},
		{"[2001:db8::2]:80", "fe80::1%2", "::6", false, flow.IPv6SourceMissing},
		{"203.0.113.9:80", "203.0.113.7", "203.0.113.7", true, flow.ForeignAddress},
		{"198.51.100.2:15006", "203.0.113.7", "203.0.113.7", true, flow.Loop},
	} {
		dst := netip.MustParseAddrPort(c.dst)
		to := borrow(target(dst), netip.MustParseAddr(c.client))
		if to.Address != dst || to.Source.String() != c.source || to.Borrowed != c.borrowed {
			t.Errorf("%s from %s: dialled as %+v", c.dst, c.client, to)
		}
		if reason, _ := p.allows(to); reason != c.refused {
			t.Errorf("%s from %s: %q, want %q", c.dst, c.client, reason, c.refused)
		}
		want := map[flow.Reason]string{flow.Loop: envoy.BlackHoleCluster, flow.ForeignAddress: ""}
		named, refused := want[c.refused]
		if !refused {
			named = envoy.InboundCluster(dst.Port())
		}
		if got := cluster(dst, c.refused); got != named {
			t.Errorf("%s, refused as %q: cluster %q, want %q", c.dst, c.refused, got, named)
		}
	}
}

// TestEndsOfARelayAreReasons checks that each relay.End is a flow.Reason, because ServeConn converts one into the other.
func TestEndsOfARelayAreReasons(t *testing.T) {
	known := map[flow.Reason]bool{}
	for _, e := range flow.Explanations {
		known[e.Reason] = true
	}
	for _, end := range []relay.End{relay.Closed, relay.DownReset, relay.UpReset, relay.IdleTimeout, relay.HalfCloseTimeout, relay.Canceled, relay.Unwatched} {
		if !known[flow.Reason(end)] {
			t.Errorf("%q is no reason", end)
		}
	}
}
