package capture

import "net/netip"

// The ports that pillion uses in a workload's network namespace. They are the ones that Istio's sidecar uses, so that
// manifests, probes and dashboards keep working.
const (
	AdminPort     = 15000 // admin, loopback only
	OutboundPort  = 15001 // where the rules redirect what the workload opens
	InboundPort   = 15006 // where the rules redirect what others open to the workload
	TunnelPort    = 15008 // HBONE; never captured inbound
	StatusPort    = 15020 // merged metrics, application probes
	ReadinessPort = 15021 // readiness and liveness
	DNSPort       = 15053 // DNS capture
	MetricsPort   = 15090 // the agent's own metrics
)

// The agent dials the workload from these loopback addresses. The rules let traffic from them pass, so that it reaches
// the workload and does not come back to the agent. The last digit stands for the inbound port, 15006.
var (
	InboundSource4 = netip.MustParseAddr("127.0.0.6")
	InboundSource6 = netip.MustParseAddr("::6")
)
