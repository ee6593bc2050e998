package mesh

import (
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/pillion-proxy/pillion/internal/wire"
)

// HTTPManager is how the requests of a connection are treated
// (envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager).
type HTTPManager struct {
	Codec HTTPCodec

	// One of these is set unless the chain is refused.
	RouteName string // of the routes, a resource of their own
	Routes    *Routes

	Filters []HTTPFilter // in the order in which a request passes them

	// The client's address.
	UseRemoteAddress bool   // the peer is the client or a trusted proxy; without it, X-Forwarded-For is trusted and kept
	TrustedHops      uint32 // number of trusted proxies before the peer
	SkipXFFAppend    bool
	Internal         []netip.Prefix // addresses of internal clients; empty: no client is one

	// The header X-Forwarded-Client-Cert.
	ClientCert        ClientCertAction
	ClientCertDetails ClientCertDetails

	// Requests are matched and forwarded with these changes.
	NormalizePath     bool
	MergeSlashes      bool
	EscapedSlashes    EscapedSlashes
	StripMatchingPort bool // from the host, if it is the listener's port
	StripPort         bool // from the host
	StripTrailingDot  bool // from the host
	AppendPort        bool // sets X-Forwarded-Port
	ServerName        string
	ServerHeader      ServerHeader
	GenerateRequestID bool // for requests without one
	KeepRequestID     bool // of external requests
	RequestIDInReply  bool
	Upgrades          []Upgrade
	MaxHeaderKiB      uint32 // of a request
	MaxHeaders        uint32
	Underscores       Underscores
	AcceptHTTP10      bool
	DefaultHostHTTP10 string        // of HTTP/1.0 requests without a host
	MaxStreams        uint32        // of an HTTP/2 connection at a time; 0: no limit
	MaxRequests       uint32        // of a connection; 0: no limit
	IdleTimeout       time.Duration // of a connection without requests; 0: no limit, as for the others
	MaxLifetime       time.Duration // of a connection
	MaxStreamDuration time.Duration
	StreamIdleTimeout time.Duration
	RequestTimeout    time.Duration // for the whole request to arrive
	HeadersTimeout    time.Duration // for the request's header to arrive
	DrainTimeout      time.Duration
	AccessLogs        []AccessLog
	Tracing           *Tracing // nil: requests are not traced, or by the agent's own configuration

	Compiled atomic.Value `json:"-"` // of package serve; it is set when the manager is first used
}

// HTTPCodec is the version of HTTP.
type HTTPCodec uint8

// The codecs, with Envoy's numbers.
const (
	AutoHTTP HTTPCodec = iota
	HTTP1
	HTTP2
)

// ClientCertAction is what becomes of the header X-Forwarded-Client-Cert.
type ClientCertAction uint8

// The actions, with Envoy's numbers.
const (
	RemoveClientCert ClientCertAction = iota
	ForwardClientCert
	AppendClientCert
	ReplaceClientCert
	AlwaysForwardClientCert
)

// ClientCertDetails are the parts of a client's certificate in the header X-Forwarded-Client-Cert.
type ClientCertDetails struct {
	Subject, Cert, Chain, DNS, URI bool
}

// EscapedSlashes is what becomes of %2F and %5C in a path.
type EscapedSlashes uint8

// The actions, with Envoy's numbers.
const (
	DefaultEscapedSlashes EscapedSlashes = iota
	KeepEscapedSlashes
	RejectEscapedSlashes
	RedirectEscapedSlashes
	UnescapeSlashes
)

// ServerHeader is what becomes of the header Server of a response.
type ServerHeader uint8

// The actions, with Envoy's numbers.
const (
	OverwriteServer ServerHeader = iota
	AppendServerIfAbsent
	PassServer
)

// Underscores is what becomes of header fields whose names have underscores.
type Underscores uint8

// The actions, with Envoy's numbers.
const (
	AllowUnderscores Underscores = iota
	RejectUnderscores
	DropUnderscores
)

// Upgrade is a protocol that a connection may be upgraded to.
type Upgrade struct {
	Protocol string
	Disabled bool
}

// Envoy's defaults of fields that are absent.
const (
	defaultStreamIdleTimeout = 5 * time.Minute
	defaultDrainTimeout      = 5 * time.Second
	defaultMaxHeaderKiB      = 60
	defaultMaxHeaders        = 100
)

var httpManagerFields = message{"envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager", Security, []field{
	1:  {"codec_type", decoded},
	2:  {"stat_prefix", ignored},
	3:  {"rds", once},
	4:  {"route_config", once},
	5:  {"http_filters", decoded},
	6:  {"add_user_agent", traffic},
	7:  {"tracing", once},
	8:  {"http_protocol_options", once},
	9:  {"http2_protocol_options", once},
	10: {"server_name", decoded},
	12: {"drain_timeout", once},
	13: {"access_log", decoded},
	14: {"use_remote_address", once},
	15: {"generate_request_id", once},
	16: {"forward_client_cert_details", decoded},
	17: {"set_current_client_cert_details", once},
	18: {"proxy_100_continue", ignored}, // always
	19: {"xff_num_trusted_hops", decoded},
	20: {"represent_ipv4_remote_address_as_ipv4_mapped_ipv6", traffic},
	21: {"skip_xff_append", decoded},
	22: {"via", traffic},
	23: {"upgrade_configs", decoded},
	24: {"stream_idle_timeout", once},
	25: {"internal_address_config", once},
	26: {"delayed_close_timeout", ignored},
	28: {"request_timeout", once},
	29: {"max_request_headers_kb", once},
	30: {"normalize_path", once},
	31: {"scoped_routes", security},
	32: {"preserve_external_request_id", decoded},
	33: {"merge_slashes", decoded},
	34: {"server_header_transformation", decoded},
	35: {"common_http_protocol_options", once},
	36: {"request_id_extension", once},
	37: {"always_set_request_id_in_response", decoded},
	38: {"local_reply_config", traffic},
	39: {"strip_matching_host_port", decoded},
	40: {"stream_error_on_invalid_http_message", traffic},
	41: {"request_headers_timeout", once},
	42: {"strip_any_host_port", decoded},
	43: {"path_normalization_options", security},
	44: {"http3_protocol_options", traffic},
	45: {"path_with_escaped_slashes_action", decoded},
	46: {"original_ip_detection_extensions", security}, // decides what policies see as the client's address
	47: {"strip_trailing_host_dot", decoded},
	48: {"scheme_header_transformation", traffic},
	49: {"proxy_status_config", traffic},
	50: {"typed_header_validation_config", security},
	51: {"append_x_forwarded_port", decoded},
	52: {"early_header_mutation_extensions", security},
	53: {"add_proxy_protocol_connection_state", ignored},
	54: {"access_log_flush_interval", cosmetic},
	55: {"flush_access_log_on_new_request", cosmetic},
	56: {"access_log_options", cosmetic},
	57: {"append_local_overload", ignored},
	58: {"http1_safe_max_connection_duration", ignored}, // always
	59: {"stream_flush_timeout", ignored},
	60: {"forward_client_cert_matcher", security},
	61: {"forward_proto_config", traffic},
	62: {"drain_timeout_jitter", ignored},
	63: {"record_route_resolution_stats", ignored},
}}

// DefaultManager returns a manager without routes, with Envoy's defaults.
func DefaultManager() *HTTPManager {
	return &HTTPManager{
		GenerateRequestID: true, MaxHeaderKiB: defaultMaxHeaderKiB, MaxHeaders: defaultMaxHeaders,
		IdleTimeout: defaultIdleTimeout, StreamIdleTimeout: defaultStreamIdleTimeout, DrainTimeout: defaultDrainTimeout,
	}
}

func (d *decoder) httpManager(m wire.Message) *HTTPManager {
	h := DefaultManager()
	var http2 UpstreamHTTP
	var ids traceIDs
	for d.next(&m, &httpManagerFields) {
		switch m.Number {
		case 1:
			h.Codec = HTTPCodec(d.enum(&m, uint64(HTTP2)))
		case 3: // a oneof with 4
			h.RouteName, h.Routes = d.routeName(m.Message()), nil
		case 4:
			before := d.refusals
			h.RouteName, h.Routes = "", d.routes(m.Message())
			d.narrow += d.refusals - before // they refuse routes or hosts
		case 5:
			add(d, &h.Filters, &m, d.httpFilter(m.Message()))
		case 7:
			h.Tracing = share(d, tracingFields.name, m.Bytes(), func() *Tracing { return d.tracing(m.Message()) })
		case 8:
			d.downstreamHTTP1(m.Message(), h)
		case 9:
			d.http2(m.Message(), &http2)
		case 10:
			h.ServerName = m.String()
		case 12:
			h.DrainTimeout = d.duration(m.Message())
		case 13:
			d.accessLogs(&m, &h.AccessLogs)
		case 14:
			h.UseRemoteAddress = d.boolValue(m.Message())
		case 15:
			h.GenerateRequestID = d.boolValue(m.Message())
		case 16:
			h.ClientCert = ClientCertAction(d.enum(&m, uint64(AlwaysForwardClientCert)))
		case 17:
			d.clientCertDetails(m.Message(), &h.ClientCertDetails)
		case 19:
			h.TrustedHops = uint32(m.Uint64())
		case 21:
			h.SkipXFFAppend = m.Bool()
		case 23:
			h.Upgrades = append(h.Upgrades, d.upgrade(m.Message()))
		case 24:
			h.StreamIdleTimeout = d.duration(m.Message())
		case 25:
			for m := m.Message(); d.next(&m, &internalFields); {
				d.cidrRange(m.Message(), &h.Internal)
			}
		case 28:
			h.RequestTimeout = d.duration(m.Message())
		case 29:
			h.MaxHeaderKiB = d.uint32Value(m.Message())
		case 30:
			h.NormalizePath = d.boolValue(m.Message())
		case 32:
			h.KeepRequestID = m.Bool()
		case 33:
			h.MergeSlashes = m.Bool()
		case 34:
			h.ServerHeader = ServerHeader(d.enum(&m, uint64(PassServer)))
		case 35:
			d.downstreamHTTP(m.Message(), h)
		case 36:
			d.requestID(m.Message(), &ids)
		case 37:
			h.RequestIDInReply = m.Bool()
		case 39:
			h.StripMatchingPort = m.Bool()
		case 41:
			h.HeadersTimeout = d.duration(m.Message())
		case 42:
			h.StripPort = m.Bool()
		case 45:
			h.EscapedSlashes = EscapedSlashes(d.enum(&m, uint64(UnescapeSlashes)))
		case 47:
			h.StripTrailingDot = m.Bool()
		case 51:
			h.AppendPort = m.Bool()
		}
	}
	h.Tracing = h.Tracing.with(ids)
	h.MaxStreams = http2.MaxStreams
	if h.Routes == nil && h.RouteName == "" {
		d.report(Security, "no routes")
	}
	if (h.StripPort || h.StripMatchingPort || h.StripTrailingDot) && !h.UseRemoteAddress {
		d.report(Security, "hosts are changed without use_remote_address: not supported") // policies would see others
	}
	d.judgeFilters(h.Filters)
	return h
}

var internalFields = message{"envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager.InternalAddressConfig", Security, []field{
	1: {"unix_sockets", ignored}, // not listened on
	2: {"cidr_ranges", decoded},
}}

var rdsFields = message{"envoy.extensions.filters.network.http_connection_manager.v3.Rds", Security, []field{
	1: {"config_source", ignored}, // the one stream to the control plane
	2: {"route_config_name", decoded},
}}

func (d *decoder) routeName(m wire.Message) (name string) {
	for d.next(&m, &rdsFields) {
		name = m.String()
	}
	return name
}

var clientCertFields = message{"envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager.SetCurrentClientCertDetails", Security, []field{
	1: {"subject", once},
	3: {"cert", decoded},
	4: {"dns", decoded},
	5: {"uri", decoded},
	6: {"chain", decoded},
	7: {"format", security},
	8: {"issuer", security},
}}

func (d *decoder) clientCertDetails(m wire.Message, c *ClientCertDetails) {
	for d.next(&m, &clientCertFields) {
		switch m.Number {
		case 1:
			c.Subject = d.boolValue(m.Message())
		case 3:
			c.Cert = m.Bool()
		case 4:
			c.DNS = m.Bool()
		case 5:
			c.URI = m.Bool()
		case 6:
			c.Chain = m.Bool()
		}
	}
}

var upgradeFields = message{"envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager.UpgradeConfig", Security, []field{
	1: {"upgrade_type", decoded},
	2: {"filters", security}, // would be passed instead of the others
	3: {"enabled", once},
}}

func (d *decoder) upgrade(m wire.Message) (u Upgrade) {
	for d.next(&m, &upgradeFields) {
		switch m.Number {
		case 1:
			u.Protocol = m.String()
		case 3:
			u.Disabled = !d.boolValue(m.Message())
		}
	}
	return u
}

var requestIDFields = message{"envoy.extensions.filters.network.http_connection_manager.v3.RequestIDExtension", Traffic, []field{1: {"typed_config", once}}}

var uuidFields = message{"envoy.extensions.request_id.uuid.v3.UuidRequestIdConfig", Traffic, []field{
	1: {"pack_trace_reason", once},
	2: {"use_request_id_for_trace_sampling", once},
}}

const uuidType = typePrefix + "envoy.extensions.request_id.uuid.v3.UuidRequestIdConfig"

// requestID reads how request IDs are made, and what they have to do with tracing. Only UUIDs are.
func (d *decoder) requestID(m wire.Message, ids *traceIDs) {
	for d.next(&m, &requestIDFields) {
		url, value := d.any(m.Message())
		if url != uuidType {
			d.report(Traffic, "request IDs of type "+shortType(url)+" are not supported")
			continue
		}
		for m := m.Nested(value); d.next(&m, &uuidFields); {
			switch m.Number {
			case 1:
				ids.kept = !d.boolValue(m.Message())
			case 2:
				ids.ignored = !d.boolValue(m.Message())
			}
		}
	}
}

// downstreamHTTP1Fields has the fields of http1Fields as they are for clients.
var downstreamHTTP1Fields = message{http1Fields.name, Traffic, []field{
	1:  {"allow_absolute_url", ignored}, // always
	2:  {"accept_http_10", decoded},
	3:  {"default_host_for_http_10", decoded},
	4:  {"header_key_format", ignored}, // the case of field names passes as it is
	5:  {"enable_trailers", ignored},   // always
	6:  {"allow_chunked_length", ignored},
	7:  {"override_stream_error_on_invalid_http_message", ignored},
	8:  {"send_fully_qualified_url", traffic},
	9:  {"use_balsa_parser", ignored},
	10: {"allow_custom_methods", ignored}, // always
	11: {"ignore_http_11_upgrade", traffic},
}}

func (d *decoder) downstreamHTTP1(m wire.Message, h *HTTPManager) {
	for d.next(&m, &downstreamHTTP1Fields) {
		switch m.Number {
		case 2:
			h.AcceptHTTP10 = m.Bool()
		case 3:
			h.DefaultHostHTTP10 = m.String()
		}
	}
}

// downstreamCommonFields has the fields of commonHTTPFields as they are for clients.
var downstreamCommonFields = message{commonHTTPFields.name, Security, []field{
	1: {"idle_timeout", once},
	2: {"max_headers_count", once},
	3: {"max_connection_duration", once},
	4: {"max_stream_duration", once},
	5: {"headers_with_underscores_action", decoded},
	6: {"max_requests_per_connection", once},
	7: {"max_response_headers_kb", traffic},
	8: {"max_connection_duration_jitter", ignored},
}}

func (d *decoder) downstreamHTTP(m wire.Message, h *HTTPManager) {
	for d.next(&m, &downstreamCommonFields) {
		switch m.Number {
		case 1:
			h.IdleTimeout = d.duration(m.Message())
		case 2:
			h.MaxHeaders = d.uint32Value(m.Message())
		case 3:
			h.MaxLifetime = d.duration(m.Message())
		case 4:
			h.MaxStreamDuration = d.duration(m.Message())
		case 5:
			h.Underscores = Underscores(d.enum(&m, uint64(DropUnderscores)))
		case 6:
			h.MaxRequests = d.uint32Value(m.Message())
		}
	}
}
