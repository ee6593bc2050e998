package mesh

import (
	"net/netip"

	"github.com/pillion-proxy/pillion/internal/wire"
)

// Assignment is the endpoints of a cluster (envoy.config.endpoint.v3.ClusterLoadAssignment). An assignment without
// endpoints is valid: the cluster has no healthy host.
type Assignment struct {
	Name       string
	Localities []Locality
}

// At returns the endpoint with an address, or nil.
func (a *Assignment) At(address netip.AddrPort) *Endpoint {
	for i := range a.Localities {
		for k := range a.Localities[i].Endpoints {
			if e := &a.Localities[i].Endpoints[k]; e.Address == address {
				return e
			}
		}
	}
	return nil
}

// Locality is a group of endpoints.
type Locality struct {
	Region, Zone, SubZone string
	Priority              uint32 // 0 is the highest
	Weight                uint32 // used only when localities are weighted
	Endpoints             []Endpoint
}

// Endpoint is a host of a cluster.
type Endpoint struct {
	Address  netip.AddrPort   // invalid if Host is a name
	Host     string           // a name to look up, of a cluster with DNS; otherwise empty
	More     []netip.AddrPort // further addresses of a dual-stack host
	Weight   uint32           // at least 1
	Port     uint16           // of Host
	Health   Health
	TLSMode  string // "istio": the host ends mutual TLS of the mesh
	Workload string // istio.workload: name;namespace;canonical name;revision;cluster
}

// Health is a health status (envoy.config.core.v3.HealthStatus).
type Health uint8

// The statuses. An unknown health counts as healthy.
const (
	HealthUnknown Health = iota
	Healthy
	Unhealthy
	Draining
	TimedOut
	Degraded
)

// Usable reports whether an endpoint of this health gets requests.
func (h Health) Usable() bool { return h == HealthUnknown || h == Healthy || h == Degraded }

var assignmentFields = message{"envoy.config.endpoint.v3.ClusterLoadAssignment", Traffic, []field{
	1: {"cluster_name", decoded},
	2: {"endpoints", decoded},
	4: {"policy", traffic},
	5: {"named_endpoints", traffic},
}}

func (d *decoder) assignment(m wire.Message) *Assignment {
	a := &Assignment{}
	for d.next(&m, &assignmentFields) {
		switch m.Number {
		case 1:
			a.Name = m.String()
		case 2:
			add(d, &a.Localities, &m, d.locality(m.Message()))
		}
	}
	return a
}

var localityFields = message{"envoy.config.endpoint.v3.LocalityLbEndpoints", Traffic, []field{
	1: {"locality", once},
	2: {"lb_endpoints", decoded},
	3: {"load_balancing_weight", once},
	5: {"priority", decoded},
	6: {"proximity", ignored},
	7: {"load_balancer_endpoints", traffic},
	8: {"leds_cluster_locality_config", traffic},
	9: {"metadata", ignored},
}}

func (d *decoder) locality(m wire.Message) Locality {
	var l Locality
	for d.next(&m, &localityFields) {
		switch m.Number {
		case 1:
			d.place3(m.Message(), &l)
		case 2:
			if endpoint, ok := d.endpoint(m.Message()); ok {
				add(d, &l.Endpoints, &m, endpoint)
			}
		case 3:
			l.Weight = d.uint32Value(m.Message())
		case 5:
			l.Priority = uint32(m.Uint64())
		}
	}
	return l
}

var placeFields = message{"envoy.config.core.v3.Locality", Cosmetic, []field{1: {"region", decoded}, 2: {"zone", decoded}, 3: {"sub_zone", decoded}}}

func (d *decoder) place3(m wire.Message, l *Locality) {
	for d.next(&m, &placeFields) {
		switch m.Number {
		case 1:
			l.Region = m.String()
		case 2:
			l.Zone = m.String()
		case 3:
			l.SubZone = m.String()
		}
	}
}

var lbEndpointFields = message{"envoy.config.endpoint.v3.LbEndpoint", Traffic, []field{
	1: {"endpoint", once},
	2: {"health_status", decoded},
	3: {"metadata", once},
	4: {"load_balancing_weight", once},
	5: {"endpoint_name", traffic},
}}

// endpoint returns an endpoint, and false if its address cannot be used; that is reported.
func (d *decoder) endpoint(m wire.Message) (Endpoint, bool) {
	e := Endpoint{Weight: 1}
	usable := false
	for d.next(&m, &lbEndpointFields) {
		switch m.Number {
		case 1:
			usable = d.host(m.Message(), &e)
		case 2:
			e.Health = Health(min(m.Uint64(), 255))
			if e.Health > Degraded {
				d.report(Traffic, "unknown health status")
			}
		case 3:
			d.endpointMetadata(m.Message(), &e)
		case 4:
			e.Weight = max(d.uint32Value(m.Message()), 1)
		}
	}
	return e, usable
}

var hostFields = message{"envoy.config.endpoint.v3.Endpoint", Traffic, []field{
	1: {"address", once},
	2: {"health_check_config", ignored}, // active health checks are not made
	3: {"hostname", ignored},            // of active health checks and of auto_host_rewrite
	4: {"additional_addresses", decoded},
	5: {"observability_name", ignored},
}}

func (d *decoder) host(m wire.Message, e *Endpoint) (usable bool) {
	for d.next(&m, &hostFields) {
		switch m.Number {
		case 1:
			e.Address, e.Host, e.Port, usable = d.address(m.Message())
		case 4:
			for m := m.Message(); d.next(&m, &additionalFields); {
				if address, _, _, ok := d.address(m.Message()); ok && address.IsValid() {
					e.More = append(e.More, address)
				}
			}
		}
	}
	return usable
}

var additionalFields = message{"envoy.config.endpoint.v3.Endpoint.AdditionalAddress", Traffic, []field{1: {"address", once}}}

var addressFields = message{"envoy.config.core.v3.Address", Traffic, []field{
	1: {"socket_address", once},
	2: {"pipe", traffic},
	3: {"envoy_internal_address", traffic}, // HBONE
}}

// address returns an address, or a name with a port. It is not ok if it is of another kind or malformed; that is reported.
func (d *decoder) address(m wire.Message) (address netip.AddrPort, host string, port uint16, ok bool) {
	for d.next(&m, &addressFields) {
		address, host, port, ok = d.socketAddress(m.Message())
	}
	return address, host, port, ok
}

var socketAddressFields = message{"envoy.config.core.v3.SocketAddress", Traffic, []field{
	1: {"protocol", decoded},
	2: {"address", decoded},
	3: {"port_value", decoded},
	4: {"named_port", traffic},
	5: {"resolver_name", traffic},
	6: {"ipv4_compat", ignored},
	7: {"network_namespace_filepath", traffic},
}}

func (d *decoder) socketAddress(m wire.Message) (address netip.AddrPort, host string, port uint16, ok bool) {
	ok = true
	var number uint64
	for d.next(&m, &socketAddressFields) {
		switch m.Number {
		case 1:
			if m.Uint64() != 0 {
				d.report(Traffic, "not TCP")
				ok = false
			}
		case 2:
			host = m.String()
		case 3:
			if number = m.Uint64(); number > 65535 {
				d.report(Traffic, "not a port")
				ok = false
			}
		}
	}
	port = uint16(number)
	if ip, err := netip.ParseAddr(host); err == nil {
		return netip.AddrPortFrom(ip.Unmap(), port), "", 0, ok
	}
	if host == "" {
		d.report(Traffic, "no address")
		ok = false
	}
	return netip.AddrPort{}, host, port, ok
}
