package mesh

import (
	"sync/atomic"

	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/wire"
)

// Tracing is how the requests of a listener are traced, and where their spans go
// (envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager.Tracing with the tracer
// envoy.config.trace.v3.OpenTelemetryConfig).
type Tracing struct {
	Client, Random, Overall float64 // per cent of the requests; see tracing.RequestIDs
	MaxPath                 uint32  // bytes of a path in a span; 0: Envoy's default
	Tags                    []TraceTag
	NoPropagation           bool // contexts are neither replaced nor added

	IgnoresIDs bool // the IDs of requests do not decide
	KeepsIDs   bool // and are not changed to have the decision

	Receiver Receiver

	Compiled atomic.Value // of package tracing
}

// Receiver is where spans or records go. One of GRPC and HTTP is set.
type Receiver struct {
	Service string // of spans, the name of the process; may be empty
	GRPC    *GRPCService
	HTTP    *HTTPService
	Header  []NamedValue // of HTTP
}

// TraceTag is an attribute of spans: the value of a header field of the request, of a variable of this process or of a dry run,
// or a constant.
type TraceTag struct {
	Name     string
	Field    string // of the header; may be empty
	Variable string // may be empty
	DryRun   string // key of a verdict in the metadata of requests; may be empty
	Value    string // constant, or the default of the others; may be empty
}

// traceIDs is what the IDs of requests have to do with tracing.
type traceIDs struct{ ignored, kept bool }

// with returns t with these ids. t is shared by many listeners, and may be nil.
func (t *Tracing) with(ids traceIDs) *Tracing {
	if t == nil || ids == (traceIDs{}) {
		return t
	}
	return &Tracing{
		Client: t.Client, Random: t.Random, Overall: t.Overall, MaxPath: t.MaxPath, Tags: t.Tags, NoPropagation: t.NoPropagation,
		IgnoresIDs: ids.ignored, KeepsIDs: ids.kept, Receiver: t.Receiver,
	}
}

const otelType = typePrefix + "envoy.config.trace.v3.OpenTelemetryConfig"

var tracingFields = message{"envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager.Tracing", Traffic, []field{
	3:  {"client_sampling", once},
	4:  {"random_sampling", once},
	5:  {"overall_sampling", once},
	6:  {"verbose", ignored},
	7:  {"max_path_tag_length", once},
	8:  {"custom_tags", decoded},
	9:  {"provider", once},
	10: {"spawn_upstream_span", ignored}, // there is one span of a request
	11: {"operation", cosmetic},
	12: {"upstream_operation", cosmetic},
	13: {"no_context_propagation", decoded},
}}

// tracing returns how requests are traced; nil: they are not, or by a provider that is not supported. Its findings
// never concern security.
func (d *decoder) tracing(m wire.Message) *Tracing {
	refusals := d.refusals
	d.shadow = true
	defer func() { d.shadow, d.refusals = false, refusals }()
	t := &Tracing{Client: 100, Random: 100, Overall: 100}
	supported := false
	for d.next(&m, &tracingFields) {
		switch m.Number {
		case 3:
			t.Client = d.percent(m.Message())
		case 4:
			t.Random = d.percent(m.Message())
		case 5:
			t.Overall = d.percent(m.Message())
		case 7:
			t.MaxPath = d.uint32Value(m.Message())
		case 8:
			add(d, &t.Tags, &m, d.traceTag(m.Message()))
		case 9:
			supported = d.traceProvider(m.Message(), &t.Receiver)
		case 13:
			t.NoPropagation = m.Bool()
		}
	}
	if !supported {
		return nil
	}
	return t
}

var httpTracerFields = message{"envoy.config.trace.v3.Tracing.Http", Traffic, []field{
	1: {"name", ignored}, // the type counts
	3: {"typed_config", once},
}}

// traceProvider reports whether the provider is supported.
func (d *decoder) traceProvider(m wire.Message, to *Receiver) (supported bool) {
	for d.next(&m, &httpTracerFields) {
		if m.Number != 3 {
			continue
		}
		url, value := d.any(m.Message())
		if url != otelType {
			d.report(Traffic, "tracers of type "+shortType(url)+" are not supported; use a provider of OpenTelemetry")
			continue
		}
		d.openTelemetry(m.Nested(value), to)
		if supported = to.GRPC != nil && to.GRPC.Cluster != "" || to.HTTP != nil && to.HTTP.Cluster != ""; !supported {
			d.report(Traffic, "no cluster to send spans to")
		}
	}
	return supported
}

var openTelemetryFields = message{"envoy.config.trace.v3.OpenTelemetryConfig", Traffic, []field{
	1:  {"grpc_service", once},
	2:  {"service_name", decoded},
	3:  {"http_service", once},
	4:  {"resource_detectors", ignored}, // OTEL_RESOURCE_ATTRIBUTES is read in any case
	5:  {"sampler", traffic},
	6:  {"max_cache_size", ignored},
	7:  {"set_telemetry_sdk_resource_attributes", ignored},
	8:  {"set_service_name_resource_attribute", ignored},
	9:  {"set_instrumentation_scope", ignored},
	10: {"exporter", traffic},
}}

func (d *decoder) openTelemetry(m wire.Message, to *Receiver) {
	for d.next(&m, &openTelemetryFields) {
		switch m.Number {
		case 1:
			to.GRPC = d.receiverService(m.Message())
		case 2:
			to.Service = m.String()
		case 3:
			to.HTTP, to.Header = d.spanService(m.Message())
		}
	}
}

var spanServiceFields = message{"envoy.config.core.v3.HttpService", Traffic, []field{
	1: {"http_uri", once},
	2: {"request_headers_to_add", decoded},
	3: {"formatters", traffic},
}}

func (d *decoder) spanService(m wire.Message) (to *HTTPService, header []NamedValue) {
	for d.next(&m, &spanServiceFields) {
		switch m.Number {
		case 1:
			s := d.httpService(m.Message())
			to = &s
		case 2:
			for m := m.Message(); d.next(&m, &headerOptionFields); {
				if m.Number == 1 {
					header = append(header, d.namedValue(m.Message()))
				}
			}
		}
	}
	return to, header
}

var (
	traceTagFields = message{"envoy.type.tracing.v3.CustomTag", Cosmetic, []field{
		1: {"tag", decoded},
		2: {"literal", choice},
		3: {"environment", choice},
		4: {"request_header", choice},
		5: {"metadata", choice},
		6: {"value", cosmetic},
		7: {"value_type", ignored}, // attributes are text
	}}
	tagLiteralFields  = message{"envoy.type.tracing.v3.CustomTag.Literal", Cosmetic, []field{1: {"value", decoded}}}
	tagVariableFields = message{"envoy.type.tracing.v3.CustomTag.Environment", Cosmetic, []field{1: {"name", decoded}, 2: {"default_value", decoded}}}
	tagHeaderFields   = message{"envoy.type.tracing.v3.CustomTag.Header", Cosmetic, []field{1: {"name", decoded}, 2: {"default_value", decoded}}}
	tagMetadataFields = message{"envoy.type.tracing.v3.CustomTag.Metadata", Cosmetic, []field{
		1: {"kind", once},
		2: {"metadata_key", once},
		3: {"default_value", decoded},
	}}
	metadataKindFields = message{"envoy.type.metadata.v3.MetadataKind", Cosmetic, []field{
		1: {"request", choice}, 2: {"route", choice}, 3: {"cluster", choice}, 4: {"host", choice},
	}}
	metadataKeyFields     = message{"envoy.type.metadata.v3.MetadataKey", Cosmetic, []field{1: {"key", decoded}, 2: {"path", decoded}}}
	metadataSegmentFields = message{"envoy.type.metadata.v3.MetadataKey.PathSegment", Cosmetic, []field{1: {"key", choice}}}
)

func (d *decoder) traceTag(m wire.Message) (t TraceTag) {
	for d.next(&m, &traceTagFields) {
		switch m.Number {
		case 1:
			t.Name = m.String()
		case 2:
			for m := m.Message(); d.next(&m, &tagLiteralFields); {
				t.Value = m.String()
			}
		case 3:
			d.tagSource(m.Message(), &tagVariableFields, &t.Variable, &t.Value)
		case 4:
			d.tagSource(m.Message(), &tagHeaderFields, &t.Field, &t.Value)
		case 5:
			if t.DryRun, t.Value = d.tagMetadata(m.Message()); t.DryRun == "" {
				d.report(Cosmetic, "the tag "+t.Name+" has its default: metadata other than results of dry runs is not supported")
			}
		}
	}
	return t
}

// tagMetadata returns the key of a verdict in the metadata of requests, and the default. istiod asks for verdicts with
// enableIstioTags. The key is empty for other metadata.
func (d *decoder) tagMetadata(m wire.Message) (key, otherwise string) {
	ofRequest, steps, filter := false, 0, ""
	for d.next(&m, &tagMetadataFields) {
		switch m.Number {
		case 1:
			for m := m.Message(); d.next(&m, &metadataKindFields); {
				ofRequest = m.Number == 1
			}
		case 2:
			for m := m.Message(); d.next(&m, &metadataKeyFields); {
				if m.Number == 1 {
					filter = m.String()
					continue
				}
				steps++
				for m := m.Message(); d.next(&m, &metadataSegmentFields); {
					key = m.String()
				}
			}
		case 3:
			otherwise = m.String()
		}
	}
	if !ofRequest || steps != 1 || filter != "envoy.filters.http.rbac" || !envoy.IsDryRunKey(key) {
		key = ""
	}
	return key, otherwise
}

// tagSource reads the name of a source and the default.
func (d *decoder) tagSource(m wire.Message, table *message, name, otherwise *string) {
	for d.next(&m, table) {
		switch m.Number {
		case 1:
			*name = m.String()
		case 2:
			*otherwise = m.String()
		}
	}
}
