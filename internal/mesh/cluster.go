package mesh

import (
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/pillion-proxy/pillion/internal/wire"
)

// Cluster is a set of interchangeable hosts and how they are connected to (envoy.config.cluster.v3.Cluster).
type Cluster struct {
	Name       string
	Assignment string      // name of the Assignment, if Discovery is ByEDS
	Hosts      *Assignment // the cluster's own hosts, if Discovery is Static, StrictDNS or LogicalDNS
	DNS        DNS
	Discovery  Discovery

	ConnectTimeout time.Duration
	Balancing      Balancing
	Breakers       Breakers
	Outliers       *Outliers // nil: hosts are not ejected

	// Transports are the ways to secure a connection. The first that matches an endpoint is used. Without a match the
	// connection is plain.
	Transports []Transport

	HTTP      UpstreamHTTP
	Keepalive *Keepalive   // nil: the kernel's
	Sources   []netip.Addr // that connections are made from, one of each family; empty: the kernel chooses

	Service         Service
	External        bool   // outside of the mesh: no metadata headers are sent
	KeepALPN        bool   // the ALPN of the transport is not replaced by that of the request's protocol
	Origin          string // resource of the configuration that the cluster stems from
	HasMetadataPeer bool   // istio.metadata_exchange is configured

	Compiled atomic.Value `json:"-"` // of package serve, which sets it when the cluster is first used

	// Refused is set if a part outside of Transports concerns security and is not understood. Connections are refused.
	Refused bool
}

// Service is the service that a cluster belongs to, for telemetry. Its fields are empty if they are not known.
type Service struct{ Host, Name, Namespace string }

// Discovery is how a cluster finds its hosts.
type Discovery uint8

// The kinds, with Envoy's numbers.
const (
	Static Discovery = iota
	StrictDNS
	LogicalDNS
	ByEDS
	OriginalDestination // the one host is where the connection was going
)

// DNS is how names of hosts are looked up.
type DNS struct {
	Refresh    time.Duration
	RespectTTL bool
	Family     DNSFamily
}

// DNSFamily is which addresses are looked up.
type DNSFamily uint8

// The families, with Envoy's numbers.
const (
	DNSAuto DNSFamily = iota // IPv6, or IPv4 for a name without IPv6
	DNSv4
	DNSv6
	DNSv4Preferred
	DNSAll
)

// Policy is a load balancing policy.
type Policy uint8

// The policies, with Envoy's numbers.
const (
	RoundRobin      Policy = 0
	LeastRequest    Policy = 1
	RingHash        Policy = 2
	Random          Policy = 3
	Maglev          Policy = 5
	ClusterProvided Policy = 6
)

// Balancing is how a host is chosen.
type Balancing struct {
	Policy           Policy
	LocalityWeighted bool
	Choices          uint32 // of LeastRequest
	MinRing, MaxRing uint64 // of RingHash
	Table            uint64 // of Maglev
	SlowStart        time.Duration
	SlowStartMin     float64 // percent of the weight with which slow start begins
	PanicBelow       float64 // percent of healthy hosts below which health is ignored; 0: never
}

// Breakers limit what a cluster carries at a time. Envoy's defaults are 1024, and 3 retries.
type Breakers struct {
	Connections, Pending, Requests, Retries uint32

	RetryBudget *RetryBudget // takes the place of Retries; nil: Retries counts
}

// RetryBudget limits retries to a share of the requests (envoy.config.cluster.v3.CircuitBreakers.Thresholds.RetryBudget).
type RetryBudget struct {
	Percent float64 // of the requests in progress
	AtLeast uint32  // that many at a time are allowed in any case
}

// Outliers is when hosts are ejected. A count of 0 never ejects.
type Outliers struct {
	Consecutive5xx, ConsecutiveGateway, ConsecutiveLocal uint32
	SplitLocal                                           bool
	Interval, Ejection, MaxEjection                      time.Duration
	MaxPercent                                           uint32
}

// Keepalive is TCP keep-alive. 0 means the kernel's.
type Keepalive struct {
	Probes         uint32
	Time, Interval time.Duration
}

var clusterFields = message{"envoy.config.cluster.v3.Cluster", Traffic, []field{
	1:  {"name", decoded},
	2:  {"type", decoded},
	3:  {"eds_cluster_config", once},
	4:  {"connect_timeout", once},
	5:  {"per_connection_buffer_limit_bytes", ignored}, // buffers are smaller
	6:  {"lb_policy", decoded},
	8:  {"health_checks", traffic},
	9:  {"max_requests_per_connection", traffic},
	10: {"circuit_breakers", once},
	13: {"http_protocol_options", traffic},
	14: {"http2_protocol_options", traffic},
	16: {"dns_refresh_rate", once},
	17: {"dns_lookup_family", decoded},
	18: {"dns_resolvers", traffic},
	19: {"outlier_detection", once},
	20: {"cleanup_interval", ignored},
	21: {"upstream_bind_config", once},
	22: {"lb_subset_config", traffic},
	23: {"ring_hash_lb_config", once},
	24: {"transport_socket", once},
	25: {"metadata", once},
	26: {"protocol_selection", traffic},
	27: {"common_lb_config", once},
	28: {"alt_stat_name", ignored},
	29: {"common_http_protocol_options", traffic},
	30: {"upstream_connection_options", once},
	31: {"close_connections_on_host_health_failure", traffic},
	32: {"ignore_health_on_host_removal", ignored}, // of active health checks
	33: {"load_assignment", once},
	34: {"original_dst_lb_config", traffic},
	36: {"typed_extension_protocol_options", decoded},
	37: {"least_request_lb_config", once},
	38: {"cluster_type", traffic},
	39: {"respect_dns_ttl", decoded},
	40: {"filters", decoded},
	41: {"load_balancing_policy", traffic},
	42: {"lrs_server", cosmetic},
	43: {"transport_socket_matches", decoded},
	44: {"dns_failure_refresh_rate", ignored},
	45: {"use_tcp_for_dns_lookups", ignored},
	46: {"upstream_http_protocol_options", security}, // decides the server name and what is verified
	47: {"track_timeout_budgets", cosmetic},
	48: {"upstream_config", traffic},
	49: {"track_cluster_stats", cosmetic},
	50: {"preconnect_policy", cosmetic},
	51: {"connection_pool_per_downstream_connection", traffic},
	52: {"maglev_lb_config", once},
	53: {"dns_resolution_config", traffic},
	54: {"wait_for_warm_on_init", ignored},
	55: {"typed_dns_resolver_config", ignored}, // istiod sends Envoy's default
	56: {"round_robin_lb_config", once},
	57: {"lrs_report_endpoint_metrics", cosmetic},
	58: {"dns_jitter", ignored},
	59: {"transport_socket_matcher", security},
	60: {"per_connection_buffer_high_watermark_timeout", ignored},
	61: {"stats_matcher", cosmetic},
	62: {"queuing_policies", traffic},
}}

// Envoy's defaults of fields that are absent.
const (
	defaultConnectTimeout = 5 * time.Second
	defaultDNSRefresh     = 5 * time.Second
	defaultPanic          = 50
	defaultBreaker        = 1024
	defaultRetries        = 3
)

func (d *decoder) cluster(m wire.Message) *Cluster {
	c := &Cluster{
		ConnectTimeout: defaultConnectTimeout,
		DNS:            DNS{Refresh: defaultDNSRefresh},
		Balancing:      Balancing{MinRing: 1024, MaxRing: 8 << 20, Table: 65537, Choices: 2, SlowStartMin: 10, PanicBelow: defaultPanic},
		Breakers:       Breakers{Connections: defaultBreaker, Pending: defaultBreaker, Requests: defaultBreaker, Retries: defaultRetries},
	}
	var unconditional *Transport
	inTransports := 0 // findings of security that refuse a transport only
	for d.next(&m, &clusterFields) {
		switch m.Number {
		case 1:
			c.Name = m.String()
		case 2:
			c.Discovery = Discovery(d.enum(&m, uint64(OriginalDestination)))
		case 3:
			d.edsConfig(m.Message(), c)
		case 4:
			c.ConnectTimeout = d.duration(m.Message())
		case 6:
			c.Balancing.Policy = d.policy(&m)
		case 10:
			d.breakers(m.Message(), c)
		case 16:
			c.DNS.Refresh = d.duration(m.Message())
		case 17:
			c.DNS.Family = DNSFamily(d.enum(&m, uint64(DNSAll)))
		case 19:
			c.Outliers = share(d, outlierFields.name, m.Bytes(), func() *Outliers { return d.outliers(m.Message()) })
		case 21:
			d.bind(m.Message(), c)
		case 23:
			d.ringHash(m.Message(), &c.Balancing)
		case 24:
			before := d.refusals
			transport := d.transport(m.Message())
			unconditional = &transport
			inTransports += d.refusals - before
		case 25:
			d.clusterMetadata(m.Message(), c)
		case 27:
			d.commonBalancing(m.Message(), &c.Balancing)
		case 30:
			c.Keepalive = share(d, connectionFields.name, m.Bytes(), func() *Keepalive { return d.connectionOptions(m.Message()) })
		case 33:
			c.Hosts = d.assignment(m.Message())
		case 36:
			d.protocolOptions(m.Message(), c)
		case 37:
			d.leastRequest(m.Message(), &c.Balancing)
		case 39:
			c.DNS.RespectTTL = m.Bool()
		case 40:
			d.clusterFilter(m.Message(), c)
		case 43:
			before := d.refusals
			add(d, &c.Transports, &m, d.transportMatch(m.Message()))
			inTransports += d.refusals - before
		case 52:
			for m := m.Message(); d.next(&m, &maglevFields); {
				c.Balancing.Table = d.uint64Value(m.Message())
			}
		case 56:
			for m := m.Message(); d.next(&m, &roundRobinFields); {
				d.slowStart(m.Message(), &c.Balancing)
			}
		}
	}
	if unconditional != nil {
		c.Transports = append(c.Transports, *unconditional)
	}
	d.useHost(c)
	if c.Assignment == "" {
		c.Assignment = c.Name
	}
	c.Refused = d.refusals > inTransports
	d.attribute(0, c.Origin)
	return c
}

var edsFields = message{"envoy.config.cluster.v3.Cluster.EdsClusterConfig", Traffic, []field{1: {"eds_config", ignored}, 2: {"service_name", decoded}}}

func (d *decoder) edsConfig(m wire.Message, c *Cluster) {
	for d.next(&m, &edsFields) {
		c.Assignment = m.String()
	}
}

func (d *decoder) policy(m *wire.Message) Policy {
	switch policy := m.Uint64(); {
	case policy <= uint64(ClusterProvided) && policy != 4:
		return Policy(policy)
	default:
		d.report(Traffic, "unknown policy; round robin is used")
		return RoundRobin
	}
}

var breakersFields = message{"envoy.config.cluster.v3.CircuitBreakers", Traffic, []field{1: {"thresholds", decoded}, 2: {"per_host_thresholds", traffic}}}

var thresholdsFields = message{"envoy.config.cluster.v3.CircuitBreakers.Thresholds", Traffic, []field{
	1: {"priority", decoded},
	2: {"max_connections", once},
	3: {"max_pending_requests", once},
	4: {"max_requests", once},
	5: {"max_retries", once},
	6: {"track_remaining", ignored},
	7: {"max_connection_pools", traffic},
	8: {"retry_budget", once},
}}

func (d *decoder) breakers(m wire.Message, c *Cluster) {
	for d.next(&m, &breakersFields) {
		for m := m.Message(); d.next(&m, &thresholdsFields); {
			switch m.Number {
			case 1:
				if m.Uint64() != 0 {
					d.report(Traffic, "routing priorities are not supported")
				}
			case 2:
				c.Breakers.Connections = d.uint32Value(m.Message())
			case 3:
				c.Breakers.Pending = d.uint32Value(m.Message())
			case 4:
				c.Breakers.Requests = d.uint32Value(m.Message())
			case 5:
				c.Breakers.Retries = d.uint32Value(m.Message())
			case 8:
				c.Breakers.RetryBudget = d.retryBudget(m.Message())
			}
		}
	}
}

var retryBudgetFields = message{"envoy.config.cluster.v3.CircuitBreakers.Thresholds.RetryBudget", Traffic, []field{
	1: {"budget_percent", once},
	2: {"min_retry_concurrency", once},
}}

func (d *decoder) retryBudget(m wire.Message) *RetryBudget {
	b := &RetryBudget{Percent: 20, AtLeast: 3}
	for d.next(&m, &retryBudgetFields) {
		switch m.Number {
		case 1:
			b.Percent = d.percent(m.Message())
		case 2:
			b.AtLeast = d.uint32Value(m.Message())
		}
	}
	return b
}

var outlierFields = message{"envoy.config.cluster.v3.OutlierDetection", Traffic, []field{
	1:  {"consecutive_5xx", once},
	2:  {"interval", once},
	3:  {"base_ejection_time", once},
	4:  {"max_ejection_percent", once},
	5:  {"enforcing_consecutive_5xx", once},
	6:  {"enforcing_success_rate", once},
	7:  {"success_rate_minimum_hosts", ignored},
	8:  {"success_rate_request_volume", ignored},
	9:  {"success_rate_stdev_factor", ignored},
	10: {"consecutive_gateway_failure", once},
	11: {"enforcing_consecutive_gateway_failure", once},
	12: {"split_external_local_origin_errors", decoded},
	13: {"consecutive_local_origin_failure", once},
	14: {"enforcing_consecutive_local_origin_failure", once},
	15: {"enforcing_local_origin_success_rate", ignored},
	16: {"failure_percentage_threshold", ignored},
	17: {"enforcing_failure_percentage", traffic},
	18: {"enforcing_failure_percentage_local_origin", ignored},
	19: {"failure_percentage_minimum_hosts", ignored},
	20: {"failure_percentage_request_volume", ignored},
	21: {"max_ejection_time", once},
	22: {"max_ejection_time_jitter", ignored},
	23: {"successful_active_health_check_uneject_host", ignored},
	24: {"monitors", traffic},
	25: {"always_eject_one_host", traffic},
	26: {"detect_degraded_hosts", traffic},
}}

// outliers returns when hosts are ejected. A count that is enforced for less than 100 % of the cases is enforced for all
// or, if that is 0 %, never; the rest is reported.
func (d *decoder) outliers(m wire.Message) *Outliers {
	o := &Outliers{Consecutive5xx: 5, ConsecutiveGateway: 5, ConsecutiveLocal: 5, Interval: 10 * time.Second, Ejection: 30 * time.Second, MaxPercent: 10}
	enforced5xx, enforcedGateway, enforcedLocal := uint32(100), uint32(0), uint32(100)
	for d.next(&m, &outlierFields) {
		switch m.Number {
		case 1:
			o.Consecutive5xx = d.uint32Value(m.Message())
		case 2:
			o.Interval = d.duration(m.Message())
		case 3:
			o.Ejection = d.duration(m.Message())
		case 4:
			o.MaxPercent = d.uint32Value(m.Message())
		case 5:
			enforced5xx = d.enforced(&m)
		case 6:
			if d.uint32Value(m.Message()) != 0 {
				d.report(Traffic, "ejection by success rate is not supported")
			}
		case 10:
			o.ConsecutiveGateway = d.uint32Value(m.Message())
		case 11:
			enforcedGateway = d.enforced(&m)
		case 12:
			o.SplitLocal = m.Bool()
		case 13:
			o.ConsecutiveLocal = d.uint32Value(m.Message())
		case 14:
			enforcedLocal = d.enforced(&m)
		case 21:
			o.MaxEjection = d.duration(m.Message())
		}
	}
	for _, count := range []struct {
		n        *uint32
		enforced uint32
	}{{&o.Consecutive5xx, enforced5xx}, {&o.ConsecutiveGateway, enforcedGateway}, {&o.ConsecutiveLocal, enforcedLocal}} {
		if count.enforced == 0 {
			*count.n = 0
		}
	}
	if o.MaxEjection == 0 {
		o.MaxEjection = max(300*time.Second, o.Ejection)
	}
	return o
}

// enforced returns for how many percent of the cases a count is enforced.
func (d *decoder) enforced(m *wire.Message) uint32 {
	percent := d.uint32Value(m.Message())
	if percent != 0 && percent < 100 {
		d.report(Traffic, "enforced in part; all cases are enforced")
	}
	return percent
}

var bindFields = message{"envoy.config.core.v3.BindConfig", Traffic, []field{
	1: {"source_address", once},
	2: {"freebind", ignored},
	3: {"socket_options", traffic},
	4: {"additional_source_addresses", traffic},
	5: {"extra_source_addresses", decoded},
	6: {"local_address_selector", traffic},
	7: {"validate_network_namespaces", ignored},
}}

var extraSourceFields = message{"envoy.config.core.v3.ExtraSourceAddress", Traffic, []field{1: {"address", once}, 2: {"socket_options", traffic}}}

func (d *decoder) bind(m wire.Message, c *Cluster) {
	for d.next(&m, &bindFields) {
		switch m.Number {
		case 1:
			d.source(m.Message(), c)
		case 5:
			for m := m.Message(); d.next(&m, &extraSourceFields); {
				d.source(m.Message(), c)
			}
		}
	}
}

func (d *decoder) source(m wire.Message, c *Cluster) {
	if address, _, _, ok := d.socketAddress(m); ok && address.IsValid() {
		c.Sources = append(c.Sources, address.Addr())
	}
}

var ringFields = message{"envoy.config.cluster.v3.Cluster.RingHashLbConfig", Traffic, []field{1: {"minimum_ring_size", once}, 3: {"hash_function", decoded}, 4: {"maximum_ring_size", once}}}

func (d *decoder) ringHash(m wire.Message, b *Balancing) {
	for d.next(&m, &ringFields) {
		switch m.Number {
		case 1:
			b.MinRing = d.uint64Value(m.Message())
		case 3:
			if m.Uint64() != 0 {
				d.report(Traffic, "only XX_HASH is supported")
			}
		case 4:
			b.MaxRing = d.uint64Value(m.Message())
		}
	}
}

var maglevFields = message{"envoy.config.cluster.v3.Cluster.MaglevLbConfig", Traffic, []field{1: {"table_size", once}}}

var leastRequestFields = message{"envoy.config.cluster.v3.Cluster.LeastRequestLbConfig", Traffic, []field{
	1: {"choice_count", once},
	2: {"active_request_bias", traffic},
	3: {"slow_start_config", once},
}}

func (d *decoder) leastRequest(m wire.Message, b *Balancing) {
	for d.next(&m, &leastRequestFields) {
		switch m.Number {
		case 1:
			b.Choices = d.uint32Value(m.Message())
		case 3:
			d.slowStart(m.Message(), b)
		}
	}
}

var roundRobinFields = message{"envoy.config.cluster.v3.Cluster.RoundRobinLbConfig", Traffic, []field{1: {"slow_start_config", once}}}

var slowStartFields = message{"envoy.config.cluster.v3.Cluster.SlowStartConfig", Traffic, []field{1: {"slow_start_window", once}, 2: {"aggression", traffic}, 3: {"min_weight_percent", once}}}

func (d *decoder) slowStart(m wire.Message, b *Balancing) {
	for d.next(&m, &slowStartFields) {
		switch m.Number {
		case 1:
			b.SlowStart = d.duration(m.Message())
		case 3:
			b.SlowStartMin = d.percent(m.Message())
		}
	}
}

var commonBalancingFields = message{"envoy.config.cluster.v3.Cluster.CommonLbConfig", Traffic, []field{
	1: {"healthy_panic_threshold", once},
	2: {"zone_aware_lb_config", ignored}, // Envoy uses it only with a local cluster, which istiod never configures
	3: {"locality_weighted_lb_config", once},
	4: {"update_merge_window", ignored},
	5: {"ignore_new_hosts_until_first_hc", ignored},
	6: {"close_connections_on_host_set_change", traffic},
	7: {"consistent_hashing_lb_config", traffic},
	8: {"override_host_status", ignored},
}}

func (d *decoder) commonBalancing(m wire.Message, b *Balancing) {
	for d.next(&m, &commonBalancingFields) {
		switch m.Number {
		case 1: // present and empty means 0: never
			b.PanicBelow = d.percent(m.Message())
		case 3:
			b.LocalityWeighted = true
		}
	}
}

var connectionFields = message{"envoy.config.cluster.v3.UpstreamConnectionOptions", Traffic, []field{
	1: {"tcp_keepalive", once},
	2: {"set_local_interface_name_on_upstream_connections", ignored},
	3: {"happy_eyeballs_config", ignored},
}}

var keepaliveFields = message{"envoy.config.core.v3.TcpKeepalive", Traffic, []field{1: {"keepalive_probes", once}, 2: {"keepalive_time", once}, 3: {"keepalive_interval", once}}}

func (d *decoder) connectionOptions(m wire.Message) (k *Keepalive) {
	for d.next(&m, &connectionFields) {
		k = &Keepalive{}
		for m := m.Message(); d.next(&m, &keepaliveFields); {
			value := d.uint32Value(m.Message())
			switch m.Number {
			case 1:
				k.Probes = value
			case 2:
				k.Time = time.Duration(value) * time.Second
			case 3:
				k.Interval = time.Duration(value) * time.Second
			}
		}
	}
	return k
}

// clusterMetadata reads the metadata that istiod adds to a cluster.
func (d *decoder) clusterMetadata(m wire.Message, c *Cluster) {
	for d.next(&m, &metadataFields) {
		key, value := d.entry(m.Message())
		if key != istioMetadata {
			continue
		}
		for value.Next() {
			if value.Number != 1 {
				continue
			}
			name, field := d.entry(value.Message())
			for field.Next() {
				switch {
				case name == "services" && field.Number == 6:
					d.service(field.Message(), &c.Service)
				case name == "config" && field.Number == 3:
					c.Origin = field.String()
				case name == "external" && field.Number == 4:
					c.External = field.Bool()
				case name == "alpn_override" && field.Number == 3:
					c.KeepALPN = field.String() == "false"
				}
			}
		}
	}
}

// service reads the first service in a list.
func (d *decoder) service(list wire.Message, s *Service) {
	for read := false; list.Next(); {
		if read || list.Number != 1 {
			continue
		}
		value := list.Message()
		read = true
		for value.Next() {
			if value.Number != 5 {
				continue
			}
			d.strings(value.Message(), func(name, text string) {
				if to := map[string]*string{"host": &s.Host, "name": &s.Name, "namespace": &s.Namespace}[name]; to != nil {
					*to = text
				}
			})
		}
	}
}

var filterFields = message{"envoy.config.cluster.v3.Filter", Traffic, []field{1: {"name", decoded}, 2: {"typed_config", ignored}, 3: {"config_discovery", traffic}}}

// clusterFilter reads a network filter of upstream connections. Only Istio's metadata exchange is one that may be left out.
func (d *decoder) clusterFilter(m wire.Message, c *Cluster) {
	for d.next(&m, &filterFields) {
		if name := m.String(); name == "istio.metadata_exchange" {
			c.HasMetadataPeer = true
		} else {
			d.report(Traffic, "the filter "+name+" is not supported")
		}
	}
}
