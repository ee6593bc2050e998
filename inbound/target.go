package inbound

import (
	"net/netip"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// target is where the workload is dialled, the original destination, from an address of that family which the rules let
// pass.
func target(dst netip.AddrPort) upstream.Target {
	if dst.Addr().Is4() {
		return upstream.Target{Source: capture.InboundSource4, Address: dst}
	}
	return upstream.Target{Source: capture.InboundSource6, Address: dst}
}

// borrow lets the workload see its client's own address. It cannot at a loopback address, where the kernel takes packets
// from other addresses for forged ones, and not from a link-local address, which says nothing without an interface.
func borrow(to upstream.Target, client netip.Addr) upstream.Target {
	if !to.Address.Addr().IsLoopback() && !client.IsLinkLocalUnicast() {
		to.Source, to.Borrowed = client, true
	}
	return to
}
