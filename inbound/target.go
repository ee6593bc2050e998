package inbound

import (
	"net/netip"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// target is the original destination, dialled from the address of its family that the rules let pass. It is one server, the
// workload, so it is not balanced: connections to it are shared, and a refused dial is not repeated. A client that learns
// of the refusal at once can turn to another pod.
func target(dst netip.AddrPort) upstream.Target {
	if dst.Addr().Is4() {
		return upstream.Target{Source: capture.InboundSource4, Address: dst}
	}
	return upstream.Target{Source: capture.InboundSource6, Address: dst}
}

// borrow dials the workload from its client's own address where the kernel allows that. At a loopback address it does
// not: the kernel drops packets from other addresses there as martians. A link-local address is ambiguous without an
// interface.
func borrow(to upstream.Target, client netip.Addr) upstream.Target {
	if !to.Address.Addr().IsLoopback() && !client.IsLinkLocalUnicast() {
		to.Source, to.Borrowed = client, true
	}
	return to
}
