package outbound

import (
	"net/netip"

	"github.com/pillion-proxy/pillion/internal/upstream"
)

// target is the original destination. The source address and port are the kernel's choice, as they would be without the
// agent; the rules let the connection pass because of the agent's user. The destination may be a Service's address, or
// another address behind which the network balances: the agent cannot tell.
func target(dst netip.AddrPort) upstream.Target { return upstream.Target{Address: dst, Balanced: true} }
