package capture

// Mode is how inbound connections reach the agent.
type Mode string

// The modes, as istio-iptables spells them. Outbound connections are redirected in both.
const (
	Redirect Mode = "REDIRECT" // by network address translation
	TPROXY   Mode = "TPROXY"   // by giving the packet to the agent's socket as it is; both addresses stay
)

// LoopMark marks what the agent sends to the workload's own service in TPROXY mode, and the connections that were given
// to the agent. It cannot be the mark of TPROXY.
const LoopMark = 1338
