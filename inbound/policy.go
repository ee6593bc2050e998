package inbound

import (
	"slices"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// policy decides which original destinations are served.
type policy struct {
	ownPorts     []uint16
	ownAddresses Addresses
}

// allows returns the reason for which nothing is carried to a target, and whether there is none.
func (p policy) allows(to upstream.Target) (flow.Reason, bool) {
	dst := to.Address
	switch {
	case !p.ownAddresses.Contains(dst.Addr()):
		// Somebody routes through the pod, which TPROXY rules give us like everything else, or connection tracking gave us a
		// stranger's entry. The workload is not there.
		return flow.ForeignAddress, false
	case slices.Contains(p.ownPorts, dst.Port()):
		return flow.Loop, false
	case to.Source == capture.InboundSource6 && !p.ownAddresses.Contains(to.Source):
		// Dialled from any other address, the connection would come back to us.
		return flow.IPv6SourceMissing, false
	}
	return "", true
}
