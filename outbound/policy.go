package outbound

import (
	"net/netip"
	"slices"

	"github.com/pillion-proxy/pillion/internal/flow"
)

// policy decides which original destinations are served.
type policy struct {
	ownPorts     []uint16
	ownAddresses Addresses
}

// allows returns the reason for which dst is refused, and whether it is not. The agent's ports at other hosts are
// nobody's loop: Prometheus in a pod scrapes 15090 of every other pod.
func (p policy) allows(dst netip.AddrPort) (flow.Reason, bool) {
	if slices.Contains(p.ownPorts, dst.Port()) && p.ownAddresses.Contains(dst.Addr()) {
		return flow.Loop, false
	}
	return "", true
}
