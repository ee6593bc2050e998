package inbound

import (
	"net/netip"
	"slices"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// policy decides which original destinations are served.
type policy struct {
	ownPorts     []uint16
	ownAddresses Addresses
}

// allows reports whether connections to a target are served, and otherwise the reason why not.
func (p policy) allows(to upstream.Target) (flow.Reason, bool) {
	dst := to.Address
	switch {
	case !p.ownAddresses.Contains(dst.Addr()):
		// The workload is not at this address. Either a host routes through the pod and the TPROXY rules captured its
		// packets, or connection tracking returned the entry of another connection.
		return flow.ForeignAddress, false
	case slices.Contains(p.ownPorts, dst.Port()):
		return flow.Loop, false
	case to.Source == capture.InboundSource6 && !p.ownAddresses.Contains(to.Source):
		// A connection from any other address would be redirected back to the agent.
		return flow.IPv6SourceMissing, false
	}
	return "", true
}

// cluster returns the name of where a connection goes, given the reason for which it is refused, if it is.
func cluster(dst netip.AddrPort, refused flow.Reason) string {
	switch refused {
	case flow.Loop:
		return envoy.BlackHoleCluster
	case flow.ForeignAddress:
		return ""
	}
	return envoy.InboundCluster(dst.Port())
}
