package mesh

import (
	"time"

	"github.com/pillion-proxy/pillion/internal/wire"
)

// UpstreamHTTP is how HTTP is spoken with the hosts of a cluster.
type UpstreamHTTP struct {
	Protocol    UpstreamProtocol
	IdleTimeout time.Duration // of a connection without requests
	MaxLifetime time.Duration // of a connection; 0: no limit
	MaxRequests uint32        // of a connection; 0: no limit
	MaxStreams  uint32        // of an HTTP/2 connection at a time; 0: the peer's limit

	hostSNI, hostName bool // see UpstreamTLS
}

// UpstreamProtocol is the version of HTTP.
type UpstreamProtocol uint8

// The protocols.
const (
	UpstreamHTTP1 UpstreamProtocol = iota
	UpstreamHTTP2
	UpstreamAsDownstream
)

const (
	protocolOptionsKey  = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
	protocolOptionsType = typePrefix + protocolOptionsKey

	defaultIdleTimeout = time.Hour
)

// protocolOptions reads an entry of typed_extension_protocol_options.
func (d *decoder) protocolOptions(m wire.Message, c *Cluster) {
	key, value := d.entry(m)
	url, options := d.any(value)
	if key != protocolOptionsKey || url != protocolOptionsType {
		d.report(Traffic, "options of "+key+" are not supported")
		return
	}
	c.HTTP.IdleTimeout = defaultIdleTimeout
	for m := m.Nested(options); d.next(&m, &protocolOptionsFields); {
		switch m.Number {
		case 1:
			d.commonHTTP(m.Message(), &c.HTTP)
		case 2:
			d.hostOptions(m.Message(), &c.HTTP)
		case 3:
			d.explicitHTTP(m.Message(), &c.HTTP)
		case 4:
			c.HTTP.Protocol = UpstreamAsDownstream
			for m := m.Message(); d.next(&m, &downstreamHTTPFields); {
				d.http2(m.Message(), &c.HTTP)
			}
		}
	}
}

var protocolOptionsFields = message{"envoy.extensions.upstreams.http.v3.HttpProtocolOptions", Traffic, []field{
	1:  {"common_http_protocol_options", once},
	2:  {"upstream_http_protocol_options", once},
	3:  {"explicit_http_config", once},
	4:  {"use_downstream_protocol_config", once},
	5:  {"auto_config", traffic},
	6:  {"http_filters", traffic},
	7:  {"header_validation_config", traffic},
	8:  {"outlier_detection", traffic},
	9:  {"request_mirror_policies", traffic},
	10: {"hash_policy", traffic},
	11: {"retry_policy", traffic},
}}

var hostOptionsFields = message{"envoy.config.core.v3.UpstreamHttpProtocolOptions", Security, []field{
	1: {"auto_sni", decoded},
	2: {"auto_san_validation", decoded},
	3: {"override_auto_sni_header", security},
}}

func (d *decoder) hostOptions(m wire.Message, h *UpstreamHTTP) {
	for d.next(&m, &hostOptionsFields) {
		switch m.Number {
		case 1:
			h.hostSNI = m.Bool()
		case 2:
			h.hostName = m.Bool()
		}
	}
}

// useHost sets in the cluster's transports what its options say about the hosts of requests.
func (d *decoder) useHost(c *Cluster) {
	for i := range c.Transports {
		t := c.Transports[i].TLS
		if t == nil {
			continue
		}
		t.HostSNI, t.HostName = c.HTTP.hostSNI, c.HTTP.hostName
		if t.HostName && t.Roots == "" {
			d.report(Security, "the name of the endpoint is to be verified without roots")
		}
	}
}

var commonHTTPFields = message{"envoy.config.core.v3.HttpProtocolOptions", Traffic, []field{
	1: {"idle_timeout", once},
	2: {"max_headers_count", traffic},
	3: {"max_connection_duration", once},
	4: {"max_stream_duration", traffic},
	5: {"headers_with_underscores_action", traffic},
	6: {"max_requests_per_connection", once},
	7: {"max_response_headers_kb", traffic},
	8: {"max_connection_duration_jitter", ignored},
}}

func (d *decoder) commonHTTP(m wire.Message, h *UpstreamHTTP) {
	for d.next(&m, &commonHTTPFields) {
		switch m.Number {
		case 1:
			h.IdleTimeout = d.duration(m.Message())
		case 3:
			h.MaxLifetime = d.duration(m.Message())
		case 6:
			h.MaxRequests = d.uint32Value(m.Message())
		}
	}
}

var explicitHTTPFields = message{"envoy.extensions.upstreams.http.v3.HttpProtocolOptions.ExplicitHttpConfig", Traffic, []field{
	1: {"http_protocol_options", once},
	2: {"http2_protocol_options", once},
	3: {"http3_protocol_options", traffic},
}}

func (d *decoder) explicitHTTP(m wire.Message, h *UpstreamHTTP) {
	for d.next(&m, &explicitHTTPFields) {
		switch m.Number {
		case 1:
			h.Protocol = UpstreamHTTP1
			for m := m.Message(); d.next(&m, &http1Fields); {
			}
		case 2:
			h.Protocol = UpstreamHTTP2
			d.http2(m.Message(), h)
		}
	}
}

var downstreamHTTPFields = message{"envoy.extensions.upstreams.http.v3.HttpProtocolOptions.UseDownstreamHttpConfig", Traffic, []field{
	1: {"http_protocol_options", ignored},
	2: {"http2_protocol_options", once},
	3: {"http3_protocol_options", ignored},
}}

// http1Fields has no field that is decoded: absolute URLs, trailers and the case of field names pass as they are.
var http1Fields = message{"envoy.config.core.v3.Http1ProtocolOptions", Traffic, []field{
	1:  {"allow_absolute_url", ignored},
	2:  {"accept_http_10", ignored},
	3:  {"default_host_for_http_10", traffic},
	4:  {"header_key_format", ignored},
	5:  {"enable_trailers", ignored},
	6:  {"allow_chunked_length", ignored}, // never
	7:  {"override_stream_error_on_invalid_http_message", ignored},
	8:  {"send_fully_qualified_url", traffic},
	9:  {"use_balsa_parser", ignored},
	10: {"allow_custom_methods", ignored}, // always
	11: {"ignore_http_11_upgrade", ignored},
}}

var http2Fields = message{"envoy.config.core.v3.Http2ProtocolOptions", Traffic, []field{
	1:  {"hpack_table_size", ignored},
	2:  {"max_concurrent_streams", once},
	3:  {"initial_stream_window_size", ignored},
	4:  {"initial_connection_window_size", ignored},
	5:  {"allow_connect", ignored},
	6:  {"allow_metadata", ignored},
	7:  {"max_outbound_frames", ignored},
	8:  {"max_outbound_control_frames", ignored},
	9:  {"max_consecutive_inbound_frames_with_empty_payload", ignored},
	10: {"max_inbound_priority_frames_per_stream", ignored},
	11: {"max_inbound_window_update_frames_per_data_frame_sent", ignored},
	12: {"stream_error_on_invalid_http_messaging", ignored},
	13: {"custom_settings_parameters", traffic},
	14: {"override_stream_error_on_invalid_http_message", ignored},
	15: {"connection_keepalive", traffic},
	16: {"use_oghttp2_codec", ignored},
	17: {"max_metadata_size", ignored},
	18: {"enable_huffman_encoding", ignored},
	19: {"max_header_field_size_kb", ignored},
	20: {"disallow_obs_text", ignored},
	21: {"stream_reset_burst", ignored},
	22: {"stream_reset_rate", ignored},
}}

func (d *decoder) http2(m wire.Message, h *UpstreamHTTP) {
	for d.next(&m, &http2Fields) {
		if m.Number == 2 {
			h.MaxStreams = d.uint32Value(m.Message())
		}
	}
}
