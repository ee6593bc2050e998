package inbound

import (
	"net/netip"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

// target is where the workload is dialled: the original destination. A link-local address also needs the interface,
// which the kernel tells only of the downstream's end.
func target(dst netip.AddrPort, down *tcp.Conn) netip.AddrPort {
	if dst.Addr().IsLinkLocalUnicast() && dst.Addr().Is6() {
		return netip.AddrPortFrom(dst.Addr().WithZone(down.RemoteAddr().Addr().Zone()), dst.Port())
	}
	return dst
}

// source is the address that the workload sees, of the destination's family. The rules let connections from it pass.
func source(dst netip.AddrPort) netip.Addr {
	if dst.Addr().Is4() {
		return capture.InboundSource4
	}
	return capture.InboundSource6
}
