package mesh

import (
	"slices"

	"github.com/pillion-proxy/pillion/internal/wire"
)

// HTTPFilter is a filter of requests. At most one of its configurations is set. The other types that are supported do not
// need a configuration.
type HTTPFilter struct {
	Name, Type string // the type without its URL's prefix
	Disabled   bool   // unless a route has a configuration for it
	Optional   bool   // may be left out if it is not supported

	// OnItsOwn is set if the configuration is a resource with the filter's name. Until it comes, Type and the configuration
	// below are the default; without a default, requests are refused. See Snapshot.Filter.
	OnItsOwn     bool
	BeforePolicy bool // a policy comes after it

	// Refused is set if the filter is not understood or not carried out, and could refuse or prepare requests. Its filter
	// chain is refused as well, unless OnItsOwn is set and there is no default.
	Refused bool

	RBAC     *RBAC
	JWT      *JWT
	ExtAuthz *ExtAuthz
	Fault    *Fault // of routes without one
	ALPN     *ALPN
	Router   *Router
	Stats    *Stats `json:",omitzero"`

	Misdirected *Misdirected
}

// ExchangesMetadata reports whether proxies describe themselves to each other in requests and responses. h may be nil.
func (h *HTTPManager) ExchangesMetadata() bool {
	return h != nil && slices.ContainsFunc(h.Filters, func(f HTTPFilter) bool { return f.Type == peerMetadataType && !f.Disabled })
}

// Restricts reports whether f is a policy that can refuse a request. Filters of other types are judged when they are
// decoded.
func (f *HTTPFilter) Restricts() bool {
	switch {
	case f.Disabled:
		return false
	case f.RBAC != nil:
		return f.RBAC.Restricts()
	case f.JWT != nil:
		return f.JWT.Restricts()
	case f.ExtAuthz != nil:
		return f.ExtAuthz.Restricts()
	}
	return slices.Contains(policyFilters, f.Type)
}

// ALPN has the protocols that are offered to an endpoint in TLS, by the version of HTTP that a request is forwarded with
// (istio.envoy.config.filter.http.alpn.v2alpha1.FilterConfig). Empty: those of the cluster.
type ALPN struct {
	HTTP10, HTTP11, HTTP2 []string
}

// Router forwards requests (envoy.extensions.filters.http.router.v3.Router).
type Router struct {
	SuppressHeaders bool // no x-envoy- header fields are added
}

// Types of HTTP filters.
const (
	httpPrefix = "envoy.extensions.filters.http."

	jwtPackage      = httpPrefix + "jwt_authn.v3."
	extAuthzPackage = httpPrefix + "ext_authz.v3."

	routerType    = httpPrefix + "router.v3.Router"
	rbacType      = httpPrefix + "rbac.v3.RBAC"
	jwtType       = jwtPackage + "JwtAuthentication"
	extAuthzType  = extAuthzPackage + "ExtAuthz"
	httpFaultType = httpPrefix + "fault.v3.HTTPFault"
	httpCORSType  = httpPrefix + "cors.v3.Cors"
	grpcWebType   = httpPrefix + "grpc_web.v3.GrpcWeb"
	grpcStatsType = httpPrefix + "grpc_stats.v3.FilterConfig"
	sessionType   = httpPrefix + "stateful_session.v3.StatefulSession"
	luaType       = httpPrefix + "lua.v3.Lua"
	wasmType      = httpPrefix + "wasm.v3.Wasm"

	alpnType         = "istio.envoy.config.filter.http.alpn.v2alpha1.FilterConfig"
	peerMetadataType = "io.istio.http.peer_metadata.Config"
)

// policyFilters judge requests.
var policyFilters = []string{rbacType, jwtType, extAuthzType}

// knownFilters has the HTTP filters that istiod configures, and how their configurations are read.
var knownFilters = map[string]func(d *decoder, m wire.Message, config []byte, f *HTTPFilter){
	rbacType: func(d *decoder, m wire.Message, config []byte, f *HTTPFilter) {
		f.RBAC = share(d, f.Type, config, func() *RBAC { return d.httpRBAC(m) })
	},
	jwtType: func(d *decoder, m wire.Message, config []byte, f *HTTPFilter) {
		f.JWT = share(d, f.Type, config, func() *JWT { return d.jwt(m) })
	},
	extAuthzType: func(d *decoder, m wire.Message, config []byte, f *HTTPFilter) {
		f.ExtAuthz = share(d, f.Type, config, func() *ExtAuthz { return d.httpExtAuthz(m) })
	},
	httpFaultType: func(d *decoder, m wire.Message, config []byte, f *HTTPFilter) {
		f.Fault = share(d, f.Type, config, func() *Fault { return d.fault(m) })
	},
	alpnType: func(d *decoder, m wire.Message, config []byte, f *HTTPFilter) {
		f.ALPN = share(d, f.Type, config, func() *ALPN { return d.alpn(m) })
	},
	routerType: func(d *decoder, m wire.Message, config []byte, f *HTTPFilter) {
		f.Router = share(d, f.Type, config, func() *Router { return d.router(m) })
	},
	// The policy is that of a route.
	httpCORSType: func(d *decoder, m wire.Message, _ []byte, _ *HTTPFilter) { d.fields(m, &corsFilterFields) },
	// Without a way to keep sessions, routes have it.
	sessionType: func(d *decoder, m wire.Message, _ []byte, _ *HTTPFilter) { d.fields(m, &sessionFields) },
	// Requests of gRPC-Web are forwarded as they are.
	grpcWebType: func(d *decoder, m wire.Message, _ []byte, _ *HTTPFilter) {
		d.fields(m, &grpcWebFields)
		d.report(Traffic, "gRPC-Web is not translated to gRPC")
	},
	grpcStatsType: func(d *decoder, m wire.Message, _ []byte, _ *HTTPFilter) { d.fields(m, &grpcStatsFields) },
	// It measures only.
	statsType: func(d *decoder, m wire.Message, config []byte, f *HTTPFilter) {
		f.Stats = share(d, f.Type, config, func() *Stats { return d.stats(m, config) })
	},
	misdirectedType: func(d *decoder, m wire.Message, _ []byte, f *HTTPFilter) { d.misdirected(m, f) },
	// It exchanges labels for telemetry with the peer.
	peerMetadataType: func(*decoder, wire.Message, []byte, *HTTPFilter) {},
}

// plainFilters have types that are not supported, and neither decide whether a request may pass nor change it.
var plainFilters = []string{
	httpPrefix + "compressor.v3.Compressor",
	httpPrefix + "decompressor.v3.Decompressor",
	httpPrefix + "local_ratelimit.v3.LocalRateLimit",
	httpPrefix + "ratelimit.v3.RateLimit",
	httpPrefix + "buffer.v3.Buffer",
	httpPrefix + "tap.v3.Tap",
	httpPrefix + "grpc_http1_bridge.v3.Config",
	httpPrefix + "dynamic_forward_proxy.v3.FilterConfig",
}

// preparingFilters have types that are not supported, and may change requests. One before a policy may prepare them for it.
var preparingFilters = []string{
	httpPrefix + "ext_proc.v3.ExternalProcessor",
	luaType,
	wasmType,
	httpPrefix + "header_mutation.v3.HeaderMutation",
	httpPrefix + "header_to_metadata.v3.Config",
	httpPrefix + "json_to_metadata.v3.JsonToMetadata",
	httpPrefix + "set_filter_state.v3.Config",
	httpPrefix + "set_metadata.v3.Config",
}

var httpFilterFields = message{"envoy.extensions.filters.network.http_connection_manager.v3.HttpFilter", Security, []field{
	1: {"name", decoded},
	4: {"typed_config", choice},
	5: {"config_discovery", choice},
	6: {"is_optional", decoded},
	7: {"disabled", decoded},
}}

// httpFilter returns a filter of an HTTPManager.
func (d *decoder) httpFilter(m wire.Message) (f HTTPFilter) {
	before := d.refusals
	for d.next(&m, &httpFilterFields) {
		switch m.Number {
		case 1:
			f.Name = m.String()
		case 4:
			d.httpFilterConfig(m.Message(), &f)
		case 5:
			d.configSource(m.Message(), &f)
		case 6:
			f.Optional = m.Bool()
		case 7:
			f.Disabled = m.Bool()
		}
	}
	d.carry(f.Type, f.Restricts())
	f.Refused = d.refusals > before
	return f
}

// httpFilterConfig reads the configuration of a filter, if its type is known.
func (d *decoder) httpFilterConfig(m wire.Message, f *HTTPFilter) {
	var config []byte
	f.Type, config = d.extension(m)
	if read := knownFilters[f.Type]; read != nil {
		read(d, m.Nested(config), config, f)
	}
}

var configSourceFields = message{"envoy.config.core.v3.ExtensionConfigSource", Security, []field{
	1: {"config_source", ignored}, // the one stream to the control plane
	2: {"default_config", once},
	3: {"apply_default_config_without_warming", ignored}, // the default is applied
	4: {"type_urls", ignored},                            // the type that comes counts
}}

// configSource reads the default of a filter whose configuration is a resource of its own. Envoy answers with 500 if there
// is neither.
func (d *decoder) configSource(m wire.Message, f *HTTPFilter) {
	f.OnItsOwn = true
	for d.next(&m, &configSourceFields) {
		d.httpFilterConfig(m.Message(), f)
	}
}

// judgeFilters reports the filters that are not supported.
func (d *decoder) judgeFilters(filters []HTTPFilter) {
	lastPolicy := -1
	for i, f := range filters {
		if slices.Contains(policyFilters, f.Type) {
			lastPolicy = i
		}
	}
	for i := range filters {
		f := &filters[i]
		before := d.refusals
		if (f.Type == routerType) != (i == len(filters)-1) {
			d.report(Security, "the router is not the last HTTP filter")
		} else {
			f.BeforePolicy = i < lastPolicy
			d.judgeFilter(f)
		}
		f.Refused = f.Refused || d.refusals > before
	}
	if len(filters) == 0 {
		d.report(Security, "no router")
	}
}

// judgeFilter reports f if it is not supported. It may be left out without loss of security if it is optional, is turned
// off, or has no influence on a policy.
func (d *decoder) judgeFilter(f *HTTPFilter) {
	known := knownFilters[f.Type] != nil
	if known && !f.OnItsOwn {
		return
	}
	what := "the HTTP filter " + f.Name + " of type " + f.Type + " is not supported"
	switch {
	case known:
		d.report(Traffic, "the configuration of the HTTP filter "+f.Name+" comes on its own; its default is used until then")
	case f.Disabled:
		d.report(Cosmetic, what+"; it is turned off")
	case f.Optional:
		d.report(Cosmetic, what+"; it is optional")
	case f.Type == "" && f.OnItsOwn:
		d.report(Unenforced, "the configuration of the HTTP filter "+f.Name+" comes on its own; requests are refused until then")
		d.narrow++
	case slices.Contains(plainFilters, f.Type), slices.Contains(preparingFilters, f.Type) && !f.BeforePolicy:
		d.report(Traffic, what)
	default:
		d.report(Security, what)
	}
}

// namedExtensionFields has the fields of extensionFields as they are for a resource.
var namedExtensionFields = message{extensionFields.name, Security, []field{1: {"name", decoded}, 2: {"typed_config", once}}}

func (d *decoder) extensionConfig(m wire.Message) *HTTPFilter {
	f := &HTTPFilter{}
	before := d.refusals
	for d.next(&m, &namedExtensionFields) {
		switch m.Number {
		case 1:
			f.Name = m.String()
		case 2:
			d.httpFilterConfig(m.Message(), f)
		}
	}
	d.carry(f.Type, f.Restricts())
	d.judgeFilter(f)
	f.Refused = d.refusals > before
	return f
}

// fields reads a message of which no field is decoded.
func (d *decoder) fields(m wire.Message, table *message) {
	for d.next(&m, table) {
	}
}

var (
	corsFilterFields = message{httpCORSType, Security, nil}
	grpcWebFields    = message{grpcWebType, Security, nil}

	sessionFields = message{sessionType, Traffic, []field{
		1: {"session_state", traffic},
		2: {"strict", ignored}, // of the state
		3: {"stat_prefix", ignored},
		4: {"status_on_strict_destination_not_found", ignored},
	}}

	// It measures only.
	grpcStatsFields = message{grpcStatsType, Cosmetic, []field{
		1: {"emit_filter_state", ignored},
		2: {"individual_method_stats_allowlist", ignored},
		3: {"stats_for_all_methods", ignored},
		4: {"enable_upstream_stats", ignored},
		5: {"replace_dots_in_grpc_service_name", ignored},
	}}

	routerFields = message{routerType, Security, []field{
		1:  {"dynamic_stats", ignored},
		2:  {"start_child_span", ignored}, // of tracing
		3:  {"upstream_log", cosmetic},
		4:  {"suppress_envoy_headers", decoded},
		5:  {"strict_check_headers", traffic},
		6:  {"respect_expected_rq_timeout", traffic},
		7:  {"suppress_grpc_request_failure_code_stats", ignored},
		8:  {"upstream_http_filters", security}, // they may change what is forwarded
		9:  {"upstream_log_options", cosmetic},
		10: {"reject_connect_request_early_data", traffic},
	}}
)

func (d *decoder) router(m wire.Message) *Router {
	r := &Router{}
	for d.next(&m, &routerFields) {
		r.SuppressHeaders = m.Bool()
	}
	return r
}

var (
	alpnFields         = message{alpnType, Traffic, []field{1: {"alpn_override", decoded}}}
	alpnOverrideFields = message{alpnType + ".AlpnOverride", Traffic, []field{1: {"upstream_protocol", decoded}, 2: {"alpn_override", decoded}}}
)

// alpn returns the protocols that are offered. Of a version that occurs twice the last ones count.
func (d *decoder) alpn(m wire.Message) *ALPN {
	a := &ALPN{}
	for d.next(&m, &alpnFields) {
		version := 0
		var protocols []string
		for m := m.Message(); d.next(&m, &alpnOverrideFields); {
			switch m.Number {
			case 1:
				version = int(d.enum(&m, 2))
			case 2:
				protocols = append(protocols, m.String())
			}
		}
		*[...]*[]string{&a.HTTP10, &a.HTTP11, &a.HTTP2}[version] = protocols
	}
	return a
}
