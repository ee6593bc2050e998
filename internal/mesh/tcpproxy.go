package mesh

import (
	"time"

	"github.com/pillion-proxy/pillion/internal/wire"
)

// TCPProxy forwards connections (envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy).
type TCPProxy struct {
	Clusters        []TCPCluster
	IdleTimeout     time.Duration // 0: no limit
	MaxDuration     time.Duration // of a connection; 0: no limit
	ConnectAttempts uint32
	HashSource      bool // endpoints are chosen by the client's address
	AccessLogs      []AccessLog
}

// TCPCluster is a cluster and its share of connections, relative to the weights of the others.
type TCPCluster struct {
	Name   string
	Weight uint32
}

// defaultTCPIdleTimeout is Envoy's.
const defaultTCPIdleTimeout = time.Hour

var tcpProxyFields = message{"envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy", Security, []field{
	1:  {"stat_prefix", ignored},
	2:  {"cluster", decoded},
	3:  {"downstream_idle_timeout", traffic},
	4:  {"upstream_idle_timeout", traffic},
	5:  {"access_log", decoded},
	7:  {"max_connect_attempts", once},
	8:  {"idle_timeout", once},
	9:  {"metadata_match", traffic},
	10: {"weighted_clusters", once},
	11: {"hash_policy", decoded},
	12: {"tunneling_config", security}, // bytes would leave outside of the tunnel
	13: {"max_downstream_connection_duration", once},
	14: {"on_demand", traffic},
	15: {"access_log_flush_interval", cosmetic},
	16: {"flush_access_log_on_connected", cosmetic},
	17: {"access_log_options", cosmetic},
	18: {"backoff_options", traffic},
	19: {"proxy_protocol_tlvs", traffic},
	20: {"max_downstream_connection_duration_jitter_percentage", ignored},
	21: {"upstream_connect_mode", traffic},
	22: {"max_early_data_bytes", traffic},
	23: {"proxy_protocol_tlv_merge_policy", traffic},
	24: {"check_drain_close", ignored},
}}

func (d *decoder) tcpProxy(m wire.Message) *TCPProxy {
	p := &TCPProxy{IdleTimeout: defaultTCPIdleTimeout, ConnectAttempts: 1}
	for d.next(&m, &tcpProxyFields) {
		switch m.Number {
		case 2: // a oneof with 10
			p.Clusters = []TCPCluster{{m.String(), 1}}
		case 5:
			d.accessLogs(&m, &p.AccessLogs)
		case 7:
			p.ConnectAttempts = d.uint32Value(m.Message())
		case 8:
			p.IdleTimeout = d.duration(m.Message())
		case 10:
			p.Clusters = nil
			for m := m.Message(); d.next(&m, &weightedFields); {
				p.Clusters = append(p.Clusters, d.tcpCluster(m.Message()))
			}
		case 11:
			p.HashSource = d.tcpHash(m.Message()) || p.HashSource
		case 13:
			p.MaxDuration = d.duration(m.Message())
		}
	}
	if len(p.Clusters) == 0 {
		d.report(Security, "no cluster to forward to")
	}
	return p
}

var (
	weightedFields  = message{"envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy.WeightedCluster", Security, []field{1: {"clusters", decoded}}}
	tcpWeightFields = message{"envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy.WeightedCluster.ClusterWeight", Security, []field{
		1: {"name", decoded},
		2: {"weight", decoded},
		3: {"metadata_match", traffic},
	}}
)

func (d *decoder) tcpCluster(m wire.Message) (c TCPCluster) {
	for d.next(&m, &tcpWeightFields) {
		switch m.Number {
		case 1:
			c.Name = m.String()
		case 2:
			c.Weight = uint32(m.Uint64())
		}
	}
	if c.Name == "" || c.Weight == 0 {
		d.report(Traffic, "a cluster without a name or a weight")
	}
	return c
}

var (
	tcpHashFields  = message{"envoy.type.v3.HashPolicy", Traffic, []field{1: {"source_ip", once}, 2: {"filter_state", traffic}}}
	sourceIPFields = message{"envoy.type.v3.HashPolicy.SourceIp", Traffic, nil}
)

// tcpHash reports whether connections of the same client address go to the same endpoint.
func (d *decoder) tcpHash(m wire.Message) (bySource bool) {
	for d.next(&m, &tcpHashFields) {
		for m := m.Message(); d.next(&m, &sourceIPFields); {
		}
		bySource = true
	}
	return bySource
}
