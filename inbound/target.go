package inbound

import (
	"net/netip"

	"github.com/pillion-proxy/pillion/internal/capture"
)

// target is where the workload is dialled: the original destination.
func target(dst netip.AddrPort) netip.AddrPort { return dst }

// source is the address that the workload sees, of the destination's family. The rules let connections from it pass.
func source(dst netip.AddrPort) netip.Addr {
	if dst.Addr().Is4() {
		return capture.InboundSource4
	}
	return capture.InboundSource6
}
