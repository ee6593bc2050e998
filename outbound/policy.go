package outbound

import (
	"net/netip"
	"slices"

	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/flow"
)

// policy decides which original destinations are served.
type policy struct {
	ownPorts     []uint16
	ownAddresses Addresses
}

// allows reports whether dst is served, and otherwise the reason why not. The agent's ports on other hosts are served:
// Prometheus in a pod scrapes port 15090 of every other pod.
func (p policy) allows(dst netip.AddrPort) (flow.Reason, bool) {
	if slices.Contains(p.ownPorts, dst.Port()) && p.ownAddresses.Contains(dst.Addr()) {
		return flow.Loop, false
	}
	return "", true
}

// cluster returns the name of where a connection goes, given the reason for which it is refused, if it is.
func cluster(refused flow.Reason) string {
	if refused == flow.Loop {
		return envoy.BlackHoleCluster
	}
	return envoy.PassthroughCluster
}
