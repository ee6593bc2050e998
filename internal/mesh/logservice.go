package mesh

import (
	"bytes"
	"slices"
	"strings"
	"time"

	"github.com/pillion-proxy/pillion/internal/wire"
)

// LogService is a service that records are sent to (envoy.extensions.access_loggers.grpc.v3.HttpGrpcAccessLogConfig and
// TcpGrpcAccessLogConfig, envoy.extensions.access_loggers.open_telemetry.v3.OpenTelemetryAccessLogConfig).
type LogService struct {
	Kind  LogServiceKind
	To    Receiver
	Name  string        // of the log
	Delay time.Duration // after which a record is sent; 0: Envoy's default
	Bytes uint32        // of records that are sent without waiting for others; 0: Envoy's default

	Request, Response []string `json:",omitzero"` // HTTPLogs: names of header fields to be sent, in lower case
	Peers             []string `json:",omitzero"` // HTTPLogs, TCPLogs: PeerStates to be sent

	// OpenTelemetryLogs: a message opentelemetry.proto.common.v1.AnyValue and two of type KeyValueList, whose texts have
	// operators, except for those of Resource.
	Body, Attributes, Resource []byte `json:",omitzero"`
	NoLabels                   bool   // without attributes that name the log and the node
}

// LogServiceKind is the protocol of a LogService.
type LogServiceKind uint8

// The kinds. The first two are those of Envoy's access log service.
const (
	HTTPLogs LogServiceKind = iota
	TCPLogs
	OpenTelemetryLogs
)

// PeerStates are the names under which Envoy keeps the workload of the other side: of the one that has connected, and of the
// one that was connected to.
var PeerStates = [...]string{"downstream_peer", "upstream_peer"}

const (
	httpServiceType   = typePrefix + "envoy.extensions.access_loggers.grpc.v3.HttpGrpcAccessLogConfig"
	tcpServiceType    = typePrefix + "envoy.extensions.access_loggers.grpc.v3.TcpGrpcAccessLogConfig"
	openTelemetryType = typePrefix + "envoy.extensions.access_loggers.open_telemetry.v3.OpenTelemetryAccessLogConfig"
)

var streamedLogFields = message{"envoy.extensions.access_loggers.grpc.v3.HttpGrpcAccessLogConfig", Cosmetic, []field{
	1: {"common_config", once},
	2: {"additional_request_headers_to_log", decoded},
	3: {"additional_response_headers_to_log", decoded},
	4: {"additional_response_trailers_to_log", cosmetic},
}}

// streamedLog reads a service of either kind: that of TCP has the first field only.
func (d *decoder) streamedLog(m wire.Message, s *LogService) {
	for d.next(&m, &streamedLogFields) {
		switch m.Number {
		case 1:
			d.commonLog(m.Message(), s)
		case 2:
			add(d, &s.Request, &m, strings.ToLower(m.String()))
		case 3:
			add(d, &s.Response, &m, strings.ToLower(m.String()))
		}
	}
}

var commonLogFields = message{"envoy.extensions.access_loggers.grpc.v3.CommonGrpcAccessLogConfig", Cosmetic, []field{
	1: {"log_name", decoded},
	2: {"grpc_service", once},
	3: {"buffer_flush_interval", once},
	4: {"buffer_size_bytes", once},
	5: {"filter_state_objects_to_log", decoded},
	6: {"transport_api_version", ignored},    // there is one
	7: {"grpc_stream_retry_policy", ignored}, // streams are opened again in any case
	8: {"custom_tags", cosmetic},
}}

func (d *decoder) commonLog(m wire.Message, s *LogService) {
	for d.next(&m, &commonLogFields) {
		switch m.Number {
		case 1:
			s.Name = m.String()
		case 2:
			s.To.GRPC = d.receiverService(m.Message())
		case 3:
			s.Delay = d.duration(m.Message())
		case 4:
			s.Bytes = d.uint32Value(m.Message())
		case 5:
			d.filterState(m.String(), s)
		}
	}
}

// filterState adds a state to be sent. Only older proxies of Istio have those with the prefix
// "wasm.". Envoy sends no state with OpenTelemetry's logs.
func (d *decoder) filterState(name string, s *LogService) {
	switch {
	case strings.HasPrefix(name, "wasm."):
	case !slices.Contains(PeerStates[:], name):
		d.report(Cosmetic, "the filter state "+name+" is not sent")
	case s.Kind != OpenTelemetryLogs && !slices.Contains(s.Peers, name):
		s.Peers = append(s.Peers, name)
	}
}

// receiverService returns a service whose time limit is 0 without a configured one.
func (d *decoder) receiverService(m wire.Message) *GRPCService {
	s := d.grpcService(m)
	if s.Timeout == defaultAuthzTimeout {
		s.Timeout = 0
	}
	return s
}

var openTelemetryLogFields = message{"envoy.extensions.access_loggers.open_telemetry.v3.OpenTelemetryAccessLogConfig", Cosmetic, []field{
	1:  {"common_config", once},
	2:  {"body", once},
	3:  {"attributes", once},
	4:  {"resource_attributes", once},
	5:  {"disable_builtin_labels", decoded},
	6:  {"stat_prefix", ignored}, // of Envoy's own statistics
	7:  {"formatters", ignored},  // all operators are known without them
	8:  {"http_service", once},
	9:  {"grpc_service", once},
	10: {"log_name", decoded},
	11: {"buffer_flush_interval", once},
	12: {"buffer_size_bytes", once},
	13: {"filter_state_objects_to_log", cosmetic},
	14: {"custom_tags", cosmetic},
	15: {"resource_detectors", ignored}, // OTEL_RESOURCE_ATTRIBUTES is read in any case
}}

func (d *decoder) openTelemetryLog(m wire.Message, s *LogService) {
	for d.next(&m, &openTelemetryLogFields) {
		switch m.Number {
		case 1:
			d.commonLog(m.Message(), s)
		case 2:
			s.Body = bytes.Clone(m.Bytes())
		case 3:
			s.Attributes = bytes.Clone(m.Bytes())
		case 4:
			s.Resource = bytes.Clone(m.Bytes())
		case 5:
			s.NoLabels = m.Bool()
		case 8:
			s.To.HTTP, s.To.Header = d.spanService(m.Message())
		case 9:
			s.To.GRPC = d.receiverService(m.Message())
		case 10:
			s.Name = m.String()
		case 11:
			s.Delay = d.duration(m.Message())
		case 12:
			s.Bytes = d.uint32Value(m.Message())
		}
	}
}
