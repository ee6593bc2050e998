package admin

import (
	"net/http"
	"net/netip"
	"time"

	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/ownport"
)

// typed returns a protobuf Any: a message with its type.
func typed(name string, message object) object {
	message["@type"] = "type.googleapis.com/" + name
	return message
}

func socketAddress(a netip.AddrPort) object {
	return object{"socket_address": object{"address": a.Addr().String(), "port_value": a.Port()}}
}

func (h *handler) configDump(w http.ResponseWriter, r *http.Request) {
	query := r.URL.Query()
	choice, err := parseChoice(query)
	if err != nil {
		refuse(w, "%v", err)
		return
	}
	if !h.begin(w, r) {
		return
	}
	defer h.end()
	d, err := h.newDump(r.Context())
	if err != nil {
		answer(w, http.StatusInternalServerError, err.Error()+"\n")
		return
	}
	sections := []section{d.bootstrap(), d.clusters()}
	if query.Has("include_eds") {
		sections = append(sections, d.endpoints())
	}
	sections = append(sections,
		d.listeners(),
		section{message: "envoy.admin.v3.ScopedRoutesConfigDump"},
		d.routes(),
		d.secrets(),
		d.extensions(),
	)
	if !choice.write(w, sections) {
		answer(w, http.StatusNotFound, choice.resource+" not found in config dump\n")
	}
}

// begin waits until no other request decodes or prints the control plane's resources, which takes memory. It returns false
// if the client left. The caller calls end.
func (h *handler) begin(w http.ResponseWriter, r *http.Request) bool {
	select {
	case h.dumping <- struct{}{}:
		ownport.Extend(w, writeTime) // waiting does not count
		return true
	case <-r.Context().Done():
		return false
	}
}

func (h *handler) end() { <-h.dumping }

func (d *dump) bootstrap() section {
	return section{message: "envoy.admin.v3.BootstrapConfigDump", fields: object{
		"bootstrap":    object{"node": d.node(), "admin": object{"address": socketAddress(d.Address)}},
		"last_updated": d.updated(),
	}}
}

// updated returns the time of the configuration. It never changes after the start.
func (h *handler) updated() string { return h.Started.UTC().Format(time.RFC3339Nano) }

func (h *handler) staticClusters() []object {
	inbound := h.originalDestinationCluster(envoy.InboundPassthroughCluster)
	if sources := h.Carrying.InboundSources; len(sources) > 0 && h.Carrying.TPROXYMark == 0 {
		bind := object{"source_address": socketAddress(netip.AddrPortFrom(sources[0], 0))["socket_address"]}
		var extra []object
		for _, source := range sources[1:] {
			extra = append(extra, object{"address": socketAddress(netip.AddrPortFrom(source, 0))["socket_address"]})
		}
		if extra != nil {
			bind["extra_source_addresses"] = extra
		}
		inbound["upstream_bind_config"] = bind
	}
	return []object{
		{"name": envoy.BlackHoleCluster, "type": "STATIC"}, // without endpoints, so connections to it are refused
		inbound,
		h.originalDestinationCluster(envoy.PassthroughCluster),
	}
}

func (h *handler) originalDestinationCluster(name string) object {
	protocols := object{"use_downstream_protocol_config": object{"http_protocol_options": object{}, "http2_protocol_options": object{}}}
	cluster := object{
		"name": name, "type": "ORIGINAL_DST", "lb_policy": "CLUSTER_PROVIDED",
		"typed_extension_protocol_options": object{"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": typed(
			"envoy.extensions.upstreams.http.v3.HttpProtocolOptions", protocols)},
	}
	if d := h.Carrying.UpstreamIdleTimeout; d > 0 {
		protocols["common_http_protocol_options"] = object{"idle_timeout": duration(d)}
	}
	if d := h.Carrying.ConnectTimeout; d > 0 { // zero: the kernel's, for which Envoy has no value
		cluster["connect_timeout"] = duration(d)
	}
	return cluster
}

func (h *handler) staticListeners() (listeners []object) {
	for _, l := range h.Listeners() {
		listener := object{"name": l.Name}
		for i, address := range l.Addresses {
			if i == 0 {
				listener["address"] = socketAddress(address)
			} else {
				others, _ := listener["additional_addresses"].([]object)
				listener["additional_addresses"] = append(others, object{"address": socketAddress(address)})
			}
		}
		switch l.Name {
		case VirtualOutbound:
			h.carries(listener, flow.Outbound, l.Addresses)
		case VirtualInbound:
			h.carries(listener, flow.Inbound, l.Addresses)
		default:
			listener["filter_chains"] = []object{{"filters": []object{connectionManager(l.Name, serves(l))}}}
		}
		listeners = append(listeners, listener)
	}
	return listeners
}

// carries adds the filter chains of a direction: first the policy, then one chain per detected protocol. An inbound
// connection to an address that is not the workload's matches no chain and is closed.
//
// Connections to a port of the agent at one of its addresses are refused. Envoy's match has one port, and istioctl prints a
// row for each match, so the chain for them matches the listener's own port, as in Istio's listener, and lists all ports in
// its metadata.
func (h *handler) carries(listener object, d flow.Direction, bound []netip.AddrPort) {
	name, all, cluster, own := VirtualOutbound, VirtualOutbound+"-catchall-tcp", envoy.PassthroughCluster, []object{}
	listener["traffic_direction"] = "OUTBOUND"
	listener["use_original_dst"] = true
	match := func(fields object) object { return fields }
	for _, address := range h.Carrying.OwnAddresses() {
		own = append(own, object{"address_prefix": address.String(), "prefix_len": address.BitLen()})
	}
	if d == flow.Inbound {
		name, all, cluster = VirtualInbound, VirtualInbound, envoy.InboundPassthroughCluster
		listener["traffic_direction"] = "INBOUND"
		match = func(fields object) object { fields["prefix_ranges"] = own; return fields }
	}
	var chains []object
	if len(h.Carrying.OwnPorts) > 0 && len(bound) > 0 {
		chains = append(chains, object{
			"name":               name + "-blackhole",
			"filter_chain_match": object{"destination_port": bound[0].Port(), "prefix_ranges": own},
			"filters":            []object{h.relay(envoy.BlackHoleCluster)},
			"metadata":           object{"filter_metadata": object{"pillion": object{"refused_ports": h.Carrying.OwnPorts}}},
		})
	}
	manager := connectionManager(cluster, h.route(d))
	config := manager["typed_config"].(object)
	config["request_headers_timeout"] = duration(h.Carrying.RequestHeadTimeout)
	config["stream_idle_timeout"] = duration(h.Carrying.IdleTimeout)
	config["http_protocol_options"] = object{"accept_http_10": true}
	config["upgrade_configs"] = []object{{"upgrade_type": "websocket"}}
	if kib := h.Carrying.MaxHeadBytes >> 10; kib > 0 {
		config["max_request_headers_kb"] = kib
	}
	if fields := h.Carrying.MaxHeadFields; fields > 0 {
		config["common_http_protocol_options"] = object{"max_headers_count": fields}
	}
	chains = append(chains, object{
		"name": name + "-catchall-http",
		"filter_chain_match": match(object{
			"transport_protocol": "raw_buffer", "application_protocols": []string{"http/1.0", "http/1.1", "h2c"},
		}),
		"filters": []object{manager},
	}, object{"name": all, "filter_chain_match": match(object{}), "filters": []object{h.relay(cluster)}})
	listener["filter_chains"] = chains
	listener["listener_filters"] = []object{
		h.listenerFilter("original_dst", "OriginalDst"),
		h.listenerFilter("tls_inspector", "TlsInspector"),
		h.listenerFilter("http_inspector", "HttpInspector"),
	}
	if mark := h.Carrying.TPROXYMark; d == flow.Inbound && mark != 0 {
		listener["transparent"] = true
		filter := h.listenerFilter("original_src", "OriginalSrc")
		filter["typed_config"].(object)["mark"] = mark
		listener["listener_filters"] = append([]object{filter}, listener["listener_filters"].([]object)...)
	}
}

// listenerFilter returns a step before protocol detection. Steps that inspect bytes are disabled for opaque ports.
func (h *handler) listenerFilter(name, message string) object {
	filter := object{
		"name":         "envoy.filters.listener." + name,
		"typed_config": typed("envoy.extensions.filters.listener."+name+".v3."+message, object{}),
	}
	rules := []object{}
	for _, ports := range h.Carrying.OpaquePorts { // the end of Envoy's range is exclusive
		rules = append(rules, object{"destination_port_range": object{"start": ports[0], "end": int(ports[1]) + 1}})
	}
	switch {
	case name == "original_dst" || name == "original_src" || len(rules) == 0:
	case len(rules) == 1:
		filter["filter_disabled"] = rules[0]
	default:
		filter["filter_disabled"] = object{"or_match": object{"rules": rules}}
	}
	return filter
}

func (h *handler) relay(cluster string) object {
	return object{
		"name": "envoy.filters.network.tcp_proxy",
		"typed_config": typed("envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy", object{
			"stat_prefix": cluster, "cluster": cluster, "idle_timeout": duration(h.Carrying.IdleTimeout),
		}),
	}
}

func connectionManager(prefix string, routes object) object {
	return object{
		"name": "envoy.filters.network.http_connection_manager",
		"typed_config": typed("envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager", object{
			"stat_prefix":  prefix,
			"route_config": routes,
			"http_filters": []object{{
				"name":         "envoy.filters.http.router",
				"typed_config": typed("envoy.extensions.filters.http.router.v3.Router", object{}),
			}},
			"server_header_transformation": "PASS_THROUGH",
		}),
	}
}

// route returns the only route of a direction.
func (h *handler) route(d flow.Direction) object {
	name, host, route := VirtualOutbound, envoy.VirtualHostOutbound, envoy.RouteOutbound
	if d == flow.Inbound {
		name, host, route = VirtualInbound, envoy.VirtualHostInbound, envoy.RouteInbound
	}
	return routeConfig(name, host, []object{{
		"name":  route,
		"match": object{"prefix": "/"},
		"route": object{"cluster": d.Passthrough(), "timeout": duration(h.Carrying.RequestTimeout)},
	}})
}

// serves returns the routes of a listener whose paths the agent itself serves.
func serves(l Listener) object {
	routes := []object{}
	for _, path := range l.Serves {
		routes = append(routes, object{"match": object{"path": path}, "non_forwarding_action": object{}})
	}
	return routeConfig(l.Name, l.Name, routes)
}

func routeConfig(name, host string, routes []object) object {
	return object{"name": name, "virtual_hosts": []object{{"name": host, "domains": []string{"*"}, "routes": routes}}}
}

func (h *handler) staticRoutes(wanted func(Listener) bool) (routes []object) {
	for _, l := range h.Listeners() {
		switch {
		case !wanted(l):
		case l.Name == VirtualOutbound:
			routes = append(routes, h.route(flow.Outbound))
		case l.Name == VirtualInbound:
			routes = append(routes, h.route(flow.Inbound))
		default:
			routes = append(routes, serves(l))
		}
	}
	return routes
}

func (h *handler) staticEndpoints() (assignments []object) {
	hosts := h.hosts()
	for _, cluster := range []string{envoy.InboundPassthroughCluster, envoy.PassthroughCluster} {
		assigned := []object{}
		for _, host := range hosts {
			if host.cluster == cluster {
				assigned = append(assigned, object{"endpoint": object{"address": socketAddress(host.address)}, "health_status": "HEALTHY"})
			}
		}
		assignment := object{"cluster_name": cluster}
		if len(assigned) > 0 {
			assignment["endpoints"] = []object{{"lb_endpoints": assigned}}
		}
		assignments = append(assignments, assignment)
	}
	return assignments
}
