package inbound

import (
	"net/netip"
	"slices"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/flow"
)

// policy decides which original destinations are served.
type policy struct {
	ownPorts     []uint16
	ownAddresses Addresses
}

// allows returns the reason for which dst is refused, and whether it is not.
func (p policy) allows(dst netip.AddrPort) (flow.Reason, bool) {
	switch {
	case !p.ownAddresses.Contains(dst.Addr()):
		// Somebody routes through the pod, or connection tracking gave us a stranger's entry. The workload is not there.
		return flow.ForeignAddress, false
	case slices.Contains(p.ownPorts, dst.Port()):
		return flow.Loop, false
	case dst.Addr().Is6() && !p.ownAddresses.Contains(capture.InboundSource6):
		// Dialled from any other address, the connection would come back to us.
		return flow.IPv6SourceMissing, false
	}
	return "", true
}
