package mesh

import (
	"net/netip"

	"github.com/pillion-proxy/pillion/internal/wire"
)

// Names is the hosts that are answered for by the agent's DNS (istio.networking.nds.v1.NameTable).
type Names struct {
	Hosts map[string]Name
}

// Name is what a host resolves to.
type Name struct {
	Addresses            []netip.Addr
	Registry             string // "Kubernetes" or "External"
	ShortName, Namespace string // of a service of Kubernetes
}

var namesFields = message{"istio.networking.nds.v1.NameTable", Traffic, []field{1: {"table", decoded}}}

// names returns a table. Of a host that occurs twice the last entry counts.
func (d *decoder) names(m wire.Message) *Names {
	n := &Names{Hosts: map[string]Name{}}
	for d.next(&m, &namesFields) {
		host, value := d.entry(m.Message())
		n.Hosts[host] = d.name(value)
	}
	return n
}

var nameFields = message{"istio.networking.nds.v1.NameTable.NameInfo", Traffic, []field{
	1: {"ips", decoded},
	2: {"registry", decoded},
	3: {"shortname", decoded},
	4: {"namespace", decoded},
	5: {"alt_hosts", ignored}, // istiod does not set it any more
}}

// name returns what a host resolves to. Addresses that cannot be parsed are reported and left out.
func (d *decoder) name(m wire.Message) (n Name) {
	for d.next(&m, &nameFields) {
		switch m.Number {
		case 1:
			text := m.String()
			address, err := netip.ParseAddr(text)
			if err != nil || address.Zone() != "" {
				d.report(Traffic, "not an address")
				continue
			}
			add(d, &n.Addresses, &m, address.Unmap())
		case 2:
			n.Registry = m.String()
		case 3:
			n.ShortName = m.String()
		case 4:
			n.Namespace = m.String()
		}
	}
	return n
}

// The table has the fields of istio.io/api. istiod sends the roots of trust in this message, and no other field of it.
var proxyConfigFields = message{"istio.mesh.v1alpha1.ProxyConfig", Cosmetic, []field{
	1:  {"config_path", ignored},
	2:  {"binary_path", ignored},
	3:  {"service_cluster", ignored},
	4:  {"drain_duration", ignored},
	6:  {"discovery_address", ignored},
	7:  {"discovery_refresh_delay", ignored},
	8:  {"zipkin_address", ignored},
	10: {"statsd_udp_address", ignored},
	11: {"proxy_admin_port", ignored},
	12: {"availability_zone", ignored},
	13: {"control_plane_auth_policy", ignored},
	14: {"custom_config_file", ignored},
	15: {"stat_name_length", ignored},
	16: {"concurrency", ignored},
	17: {"proxy_bootstrap_template_path", ignored},
	18: {"interception_mode", ignored},
	19: {"tracing", ignored},
	20: {"envoy_metrics_service_address", ignored},
	21: {"sds", ignored},
	22: {"envoy_access_log_service", ignored},
	23: {"envoy_metrics_service", ignored},
	24: {"proxy_metadata", ignored},
	26: {"status_port", ignored},
	27: {"extra_stat_tags", ignored},
	28: {"gateway_topology", ignored},
	29: {"termination_drain_duration", ignored},
	30: {"mesh_id", ignored},
	31: {"readiness_probe", ignored},
	32: {"proxy_stats_matcher", ignored},
	33: {"hold_application_until_proxy_starts", ignored},
	34: {"ca_certificates_pem", decoded},
	35: {"image", ignored},
	36: {"tracing_service_name", ignored},
	37: {"runtime_values", ignored},
	38: {"private_key_provider", ignored},
	39: {"proxy_headers", ignored},
	40: {"file_flush_interval", ignored},
	41: {"file_flush_min_size_kb", ignored},
	42: {"stats_compression", ignored},
	43: {"connection_settings", ignored},
}}

// trustBundle returns roots of trust, each as PEM.
func (d *decoder) trustBundle(m wire.Message) (roots []string) {
	for d.next(&m, &proxyConfigFields) {
		roots = append(roots, m.String())
	}
	return roots
}
