package outbound

import "net/netip"

// target is where the connection goes: the original destination.
func target(dst netip.AddrPort) netip.AddrPort { return dst }

// source leaves our end of the upstream connection to the kernel, as it would be without us. The rules let it pass
// because of the agent's user.
func source() netip.Addr { return netip.Addr{} }
