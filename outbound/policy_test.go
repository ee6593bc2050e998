package outbound

import (
	"net/netip"
	"testing"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/localaddr"
)

func TestPolicy(t *testing.T) {
	p := policy{capture.Default().OwnPorts(), localaddr.Of(netip.MustParseAddr("198.51.100.2"), netip.MustParseAddr("2001:db8::2"))}
	for dst, want := range map[string]flow.Reason{
		"203.0.113.7:443":      "",
		"[2001:db8:2::7]:443":  "",
		"198.51.100.2:80":      "", // the workload's own address alone is not a loop
		"198.51.100.3:15090":   "", // another pod's metrics
		"203.0.113.7:15006":    "",
		"198.51.100.2:15001":   flow.Loop,
		"198.51.100.2:15090":   flow.Loop,
		"127.0.0.1:15001":      flow.Loop,
		"127.0.0.2:15006":      flow.Loop,
		"[2001:db8::2]:15001":  flow.Loop,
		"[2001:db8::2]:15021":  flow.Loop,
		"[2001:db8:9::2]:1501": "",
	} {
		reason, ok := p.allows(netip.MustParseAddrPort(dst))
		if reason != want || ok != (want == "") {
			t.Errorf("%s: %q, %v; want %q", dst, reason, ok, want)
		}
	}
}
