package mesh

import (
	"fmt"
	"time"

	"github.com/pillion-proxy/pillion/internal/wire"
)

// ExtAuthz asks a server whether a connection or a request is allowed
// (envoy.extensions.filters.network.ext_authz.v3.ExtAuthz and envoy.extensions.filters.http.ext_authz.v3.ExtAuthz). Values
// are shared between the filter chains of a listener.
type ExtAuthz struct {
	// One of these is set, unless the filter is refused.
	GRPC *GRPCService
	HTTP *HTTPAuthz

	When    *MetadataMatcher // that is met if the server is asked; nil: always
	Enabled Fraction         // of what the server is asked about; the rest is allowed

	AllowFailure  bool // if the server cannot be asked, all is allowed
	MarkFailure   bool // in that case, the header field x-envoy-auth-failure-mode-allowed is added to the request
	StatusOnError int  // of requests that are refused since the server cannot be asked

	// Headers of a request that are sent to the server. Nil: all for gRPC; for HTTP, only those that are always sent.
	Headers    []StringMatcher
	NotHeaders []StringMatcher // that are not sent, even if Headers has them
	RawHeaders bool            // values are sent as bytes
	Body       *AuthzBody      // nil: the body is not sent
	PeerCert   bool            // the client's certificate is sent, by gRPC
	TLSSession bool            // the server name that the client has asked for is sent, by gRPC
	Validate   bool            // an answer with unknown actions for header fields is an error
	NoMetadata bool            // metadata of an answer is ignored

	Reroute bool // the route is chosen again afterwards
	Shadow  bool // the answer is not enforced
	Refused bool // a part is not understood, so all is denied
}

// Restricts reports whether e can deny anything.
func (e *ExtAuthz) Restricts() bool { return e.Refused || !e.Shadow }

// GRPCService is a server that is asked by gRPC (envoy.config.core.v3.GrpcService).
type GRPCService struct {
	Cluster   string
	Authority string // empty: the cluster's name
	Timeout   time.Duration
	Metadata  []NamedValue
}

// NamedValue is the name and the value of a header field.
type NamedValue struct{ Name, Value string }

// HTTPAuthz is a server that is asked by HTTP. It allows a request by the status 200.
type HTTPAuthz struct {
	Service    HTTPService
	PathPrefix string // before the request's path
	Add        []NamedValue

	// Fields of the server's answer that are added to the request, appended to its own, added to the answer of a request
	// that is refused, and to that of one that is allowed. Of an answer to a refused request, nil means all.
	Upstream, UpstreamAppend, Denied, Allowed []StringMatcher
}

// MaxAuthzBody bounds AuthzBody.MaxBytes: the part of a body that is kept until a server has answered.
const MaxAuthzBody = 16 << 20

// AuthzBody is the part of a request's body that is sent to the server.
type AuthzBody struct {
	MaxBytes     uint32
	AllowPartial bool // a longer body is cut; without it, the request is refused
	Raw          bool // the body is sent as bytes
}

// defaultAuthzTimeout is Envoy's for a gRPC service.
const defaultAuthzTimeout = 200 * time.Millisecond

var httpExtAuthzFields = message{extAuthzType, Security, []field{
	1:  {"grpc_service", choice},
	2:  {"failure_mode_allow", decoded},
	3:  {"http_service", choice},
	5:  {"with_request_body", once},
	6:  {"clear_route_cache", decoded},
	7:  {"status_on_error", once},
	8:  {"metadata_context_namespaces", security}, // the server's answer may depend on them
	9:  {"filter_enabled", once},
	10: {"include_peer_certificate", decoded},
	11: {"deny_at_disable", security},
	12: {"transport_api_version", decoded},
	13: {"stat_prefix", ignored},
	14: {"filter_enabled_metadata", once},
	15: {"bootstrap_metadata_labels_key", security},
	16: {"typed_metadata_context_namespaces", security},
	17: {"allowed_headers", once},
	18: {"include_tls_session", decoded},
	19: {"failure_mode_allow_header_add", decoded},
	20: {"charge_cluster_response_stats", ignored},
	21: {"route_metadata_context_namespaces", security},
	22: {"route_typed_metadata_context_namespaces", security},
	23: {"encode_raw_headers", decoded},
	24: {"validate_mutations", decoded},
	25: {"disallowed_headers", once},
	26: {"decoder_header_mutation_rules", security},
	27: {"enable_dynamic_metadata_ingestion", once},
	28: {"filter_metadata", ignored},
	29: {"emit_filter_state_stats", ignored},
	30: {"max_denied_response_body_bytes", traffic},
	31: {"enforce_response_header_limits", traffic},
	32: {"shadow_mode", decoded},
	33: {"emit_client_span", ignored},
	34: {"clear_route_cache_headers", traffic},
}}

const (
	statusForbidden = 403
	apiVersionV2    = 1
)

// httpExtAuthz returns a policy of requests. Any finding in it refuses all requests.
func (d *decoder) httpExtAuthz(m wire.Message) *ExtAuthz {
	e := &ExtAuthz{Enabled: always, StatusOnError: statusForbidden}
	before := d.refusals
	for d.next(&m, &httpExtAuthzFields) {
		switch m.Number {
		case 1:
			e.GRPC, e.HTTP = d.grpcService(m.Message()), nil
		case 2:
			e.AllowFailure = m.Bool()
		case 3:
			e.GRPC, e.HTTP = nil, d.httpAuthz(m.Message(), e)
		case 5:
			e.Body = d.authzBody(m.Message())
		case 6:
			e.Reroute = m.Bool()
		case 7:
			e.StatusOnError = d.httpStatus(m.Message())
		case 9:
			e.Enabled = d.runtimeFraction(m.Message())
		case 10:
			e.PeerCert = m.Bool()
		case 12:
			d.apiVersion(&m)
		case 14:
			e.When = new(d.metadataMatcher(m.Message()))
		case 17:
			d.sentHeaders(m.Message(), e)
		case 19:
			e.MarkFailure = m.Bool()
		case 18:
			e.TLSSession = m.Bool()
		case 23:
			e.RawHeaders = m.Bool()
		case 24:
			e.Validate = m.Bool()
		case 25:
			e.NotHeaders = d.stringMatchers(m.Message())
		case 27:
			e.NoMetadata = !d.boolValue(m.Message())
		case 32:
			e.Shadow = m.Bool()
		}
	}
	d.authzService(e)
	e.Refused = d.refusals > before
	return e
}

// authzService reports a filter without a server.
func (d *decoder) authzService(e *ExtAuthz) {
	if (e.GRPC == nil || e.GRPC.Cluster == "") && (e.HTTP == nil || e.HTTP.Service.Cluster == "") {
		d.report(Security, "no server to ask")
	}
}

var networkExtAuthzFields = message{networkExtAuthzType, Security, []field{
	1:  {"stat_prefix", ignored},
	2:  {"grpc_service", once},
	3:  {"failure_mode_allow", decoded},
	4:  {"include_peer_certificate", decoded},
	5:  {"transport_api_version", decoded},
	6:  {"filter_enabled_metadata", once},
	7:  {"bootstrap_metadata_labels_key", security},
	8:  {"include_tls_session", decoded},
	9:  {"send_tls_alert_on_denial", traffic},
	10: {"metadata_context_namespaces", security},
	11: {"typed_metadata_context_namespaces", security},
	12: {"shadow_mode", decoded},
}}

// networkExtAuthz returns a policy of connections. Any finding in it refuses all of them.
func (d *decoder) networkExtAuthz(m wire.Message) *ExtAuthz {
	e := &ExtAuthz{Enabled: always, StatusOnError: statusForbidden}
	before := d.refusals
	for d.next(&m, &networkExtAuthzFields) {
		switch m.Number {
		case 2:
			e.GRPC = d.grpcService(m.Message())
		case 3:
			e.AllowFailure = m.Bool()
		case 4:
			e.PeerCert = m.Bool()
		case 5:
			d.apiVersion(&m)
		case 6:
			e.When = new(d.metadataMatcher(m.Message()))
		case 8:
			e.TLSSession = m.Bool()
		case 12:
			e.Shadow = m.Bool()
		}
	}
	d.authzService(e)
	e.Refused = d.refusals > before
	return e
}

// apiVersion reports another version of the server's API than the third.
func (d *decoder) apiVersion(m *wire.Message) {
	if version := d.enum(m, 2); version == apiVersionV2 {
		d.report(Security, "version 2 is not supported")
	}
}

var (
	grpcServiceFields = message{"envoy.config.core.v3.GrpcService", Security, []field{
		1: {"envoy_grpc", choice},
		2: {"google_grpc", security},
		3: {"timeout", once},
		5: {"initial_metadata", decoded},
		6: {"retry_policy", traffic},
	}}

	envoyGRPCFields = message{"envoy.config.core.v3.GrpcService.EnvoyGrpc", Security, []field{
		1: {"cluster_name", decoded},
		2: {"authority", decoded},
		3: {"retry_policy", traffic},
		4: {"max_receive_message_length", ignored},
		5: {"skip_envoy_headers", ignored},
	}}
)

func (d *decoder) grpcService(m wire.Message) *GRPCService {
	s := &GRPCService{Timeout: defaultAuthzTimeout}
	for d.next(&m, &grpcServiceFields) {
		switch m.Number {
		case 1:
			for m := m.Message(); d.next(&m, &envoyGRPCFields); {
				switch m.Number {
				case 1:
					s.Cluster = m.String()
				case 2:
					s.Authority = m.String()
				}
			}
		case 3:
			s.Timeout = d.duration(m.Message())
		case 5:
			s.Metadata = append(s.Metadata, d.namedValue(m.Message()))
		}
	}
	return s
}

// namedValue returns a header field. One that cannot be sent is reported.
func (d *decoder) namedValue(m wire.Message) NamedValue {
	var e HeaderEdit
	d.headerValue(m, &e)
	if !Editable(e.Name) || !FieldValue(e.Value) {
		d.report(Security, "not a header field that can be sent")
		return NamedValue{}
	}
	return NamedValue{e.Name, e.Value}
}

var (
	httpAuthzFields = message{extAuthzPackage + "HttpService", Security, []field{
		1:  {"server_uri", once},
		2:  {"path_prefix", decoded},
		7:  {"authorization_request", once},
		8:  {"authorization_response", once},
		9:  {"retry_policy", traffic},
		10: {"path_override", security},
	}}

	authzRequestFields = message{extAuthzPackage + "AuthorizationRequest", Security, []field{1: {"allowed_headers", once}, 2: {"headers_to_add", decoded}}}

	authzResponseFields = message{extAuthzPackage + "AuthorizationResponse", Security, []field{
		1: {"allowed_upstream_headers", once},
		2: {"allowed_client_headers", once},
		3: {"allowed_upstream_headers_to_append", once},
		4: {"allowed_client_headers_on_success", once},
		5: {"dynamic_metadata_from_headers", security}, // a policy may match it
	}}
)

// httpAuthz returns a server that is asked by HTTP. Older configuration has the headers that are sent here.
func (d *decoder) httpAuthz(m wire.Message, e *ExtAuthz) *HTTPAuthz {
	h := &HTTPAuthz{}
	for d.next(&m, &httpAuthzFields) {
		switch m.Number {
		case 1:
			h.Service = d.httpService(m.Message())
		case 2:
			h.PathPrefix = m.String()
		case 7:
			for m := m.Message(); d.next(&m, &authzRequestFields); {
				switch m.Number {
				case 1:
					d.sentHeaders(m.Message(), e)
				case 2:
					h.Add = append(h.Add, d.namedValue(m.Message()))
				}
			}
		case 8:
			for m := m.Message(); d.next(&m, &authzResponseFields); {
				lists := [...]*[]StringMatcher{1: &h.Upstream, 2: &h.Denied, 3: &h.UpstreamAppend, 4: &h.Allowed}
				*lists[m.Number] = d.stringMatchers(m.Message())
			}
		}
	}
	return h
}

// sentHeaders reads the headers that are sent to the server. They may be in one of two places; Envoy rejects both.
func (d *decoder) sentHeaders(m wire.Message, e *ExtAuthz) {
	if e.Headers != nil {
		d.report(Security, "two lists of headers that are sent")
	}
	e.Headers = d.stringMatchers(m)
}

var (
	stringMatchersFields = message{"envoy.type.matcher.v3.ListStringMatcher", Security, []field{1: {"patterns", decoded}}}
	authzBodyFields      = message{extAuthzPackage + "BufferSettings", Security, []field{
		1: {"max_request_bytes", decoded},
		2: {"allow_partial_message", decoded},
		3: {"pack_as_bytes", decoded},
	}}

	httpStatusFields = message{"envoy.type.v3.HttpStatus", Security, []field{1: {"code", decoded}}}
)

// stringMatchers returns a list. An empty one is not nil.
func (d *decoder) stringMatchers(m wire.Message) []StringMatcher {
	list := []StringMatcher{}
	for d.next(&m, &stringMatchersFields) {
		list = append(list, d.stringMatcher(m.Message()))
	}
	return list
}

func (d *decoder) authzBody(m wire.Message) *AuthzBody {
	b := &AuthzBody{}
	for d.next(&m, &authzBodyFields) {
		switch m.Number {
		case 1:
			b.MaxBytes = uint32(m.Uint64())
		case 2:
			b.AllowPartial = m.Bool()
		case 3:
			b.Raw = m.Bool()
		}
	}
	if b.MaxBytes == 0 || b.MaxBytes > MaxAuthzBody {
		d.report(Security, fmt.Sprintf("not a size between 1 and %d bytes", MaxAuthzBody))
	}
	return b
}

func (d *decoder) httpStatus(m wire.Message) (status int) {
	for d.next(&m, &httpStatusFields) {
		status = int(int32(m.Uint64()))
	}
	if status < 200 || status > 599 {
		d.report(Security, "not the status of a response")
		return statusForbidden
	}
	return status
}
