package mesh

import (
	"strings"

	"github.com/pillion-proxy/pillion/internal/cel"
	"github.com/pillion-proxy/pillion/internal/wire"
)

// LogFilter selects the records of an access log (envoy.config.accesslog.v3.AccessLogFilter). A filter of the kind LogAll is
// one that is not supported: it is neither true nor false, and a record is written unless another filter decides.
type LogFilter struct {
	Kind    LogFilterKind
	Filters []LogFilter `json:",omitzero"` // LogAnd, LogOr

	Flags      []string        `json:",omitzero"` // LogFlags: the record has one of them; empty: it has any flag
	Expression *cel.Expression `json:",omitzero"` // LogExpression
	Compare    Comparison      `json:",omitzero"` // LogStatus, LogDuration
	Value      uint32          `json:",omitzero"` // of Compare; of LogDuration in milliseconds
	Statuses   []uint32        `json:",omitzero"` // LogGRPCStatus; LogType: the types
	Exclude    bool            `json:",omitzero"` // LogGRPCStatus, LogType: it is not one of Statuses
	Header     *HeaderMatcher  `json:",omitzero"` // LogHeader
	Sample     Fraction        `json:",omitzero"` // LogSample
}

// LogFilterKind is what a LogFilter looks at.
type LogFilterKind uint8

// The kinds.
const (
	LogAll LogFilterKind = iota
	LogAnd
	LogOr
	LogFlags
	LogExpression
	LogStatus
	LogDuration
	LogGRPCStatus
	LogTraced // the request's trace is sampled
	LogSample // at random
	LogHeader // a field of the request; of a repeated one, the first value
	LogType   // what the record is about
)

// Types of records (envoy.data.accesslog.v3.AccessLogType). There are no others.
const (
	TypeConnectionEnd = 3
	TypeRequestEnd    = 6
)

// Comparison is with a number.
type Comparison uint8

// The comparisons, with Envoy's numbers.
const (
	Equal Comparison = iota
	AtLeast
	AtMost
	Unequal
)

// logFilterFields are the fields of a oneof. not_health_check_filter lets all requests pass: those that Envoy answers itself
// as health checks do not exist here.
var logFilterFields = message{"envoy.config.accesslog.v3.AccessLogFilter", Cosmetic, []field{
	1:  {"status_code_filter", choice},
	2:  {"duration_filter", choice},
	3:  {"not_health_check_filter", ignored},
	4:  {"traceable_filter", choice},
	5:  {"runtime_filter", choice},
	6:  {"and_filter", choice},
	7:  {"or_filter", choice},
	8:  {"header_filter", choice},
	9:  {"response_flag_filter", choice},
	10: {"grpc_status_filter", choice},
	11: {"extension_filter", choice},
	12: {"metadata_filter", cosmetic},
	13: {"log_type_filter", choice},
}}

var (
	comparisonFilterFields = message{"envoy.config.accesslog.v3.StatusCodeFilter", Cosmetic, []field{1: {"comparison", once}}}
	durationFilterFields   = message{"envoy.config.accesslog.v3.DurationFilter", Cosmetic, []field{1: {"comparison", once}}}
	comparisonFields       = message{"envoy.config.accesslog.v3.ComparisonFilter", Cosmetic, []field{1: {"op", decoded}, 2: {"value", once}}}
	runtimeNumberFields    = message{"envoy.config.core.v3.RuntimeUInt32", Cosmetic, []field{2: {"default_value", decoded}, 3: {"runtime_key", ignored}}}
	traceableFields        = message{"envoy.config.accesslog.v3.TraceableFilter", Cosmetic, nil}
	runtimeFilterFields    = message{"envoy.config.accesslog.v3.RuntimeFilter", Cosmetic, []field{
		1: {"runtime_key", ignored},
		2: {"percent_sampled", once},
		3: {"use_independent_randomness", ignored}, // always
	}}
	andFilterFields    = message{"envoy.config.accesslog.v3.AndFilter", Cosmetic, []field{1: {"filters", decoded}}}
	orFilterFields     = message{"envoy.config.accesslog.v3.OrFilter", Cosmetic, []field{2: {"filters", decoded}}}
	responseFlagFields = message{"envoy.config.accesslog.v3.ResponseFlagFilter", Cosmetic, []field{1: {"flags", decoded}}}
	grpcStatusFields   = message{"envoy.config.accesslog.v3.GrpcStatusFilter", Cosmetic, []field{1: {"statuses", decoded}, 2: {"exclude", decoded}}}
	headerFilterFields = message{"envoy.config.accesslog.v3.HeaderFilter", Cosmetic, []field{1: {"header", once}}}
	logTypeFields      = message{"envoy.config.accesslog.v3.LogTypeFilter", Cosmetic, []field{1: {"types", decoded}, 2: {"exclude", decoded}}}
	filterTypeFields   = message{"envoy.config.accesslog.v3.ExtensionFilter", Cosmetic, []field{
		1: {"name", ignored}, // the type counts
		3: {"typed_config", once},
	}}
	expressionFields = message{"envoy.extensions.access_loggers.filters.cel.v3.ExpressionFilter", Cosmetic, []field{1: {"expression", decoded}, 2: {"cel_config", cosmetic}}}
)

const celFilterType = typePrefix + "envoy.extensions.access_loggers.filters.cel.v3.ExpressionFilter"

// logFilter returns a filter; nil: it selects all records. Its findings never concern security.
func (d *decoder) logFilter(m wire.Message) *LogFilter {
	refusals, shadow := d.refusals, d.shadow
	d.shadow = true
	defer func() { d.shadow, d.refusals = shadow, refusals }()
	return d.logFilterWithin(m, 0)
}

// maxLogFilters is how deep filters of filters may be.
const maxLogFilters = 8

func (d *decoder) logFilterWithin(m wire.Message, depth int) *LogFilter {
	f := &LogFilter{}
	for d.next(&m, &logFilterFields) {
		switch inner := m.Message(); m.Number {
		case 1:
			f.Kind = LogStatus
			d.comparison(inner, &comparisonFilterFields, f)
		case 2:
			f.Kind = LogDuration
			d.comparison(inner, &durationFilterFields, f)
		case 4:
			f.Kind = LogTraced
			d.fields(inner, &traceableFields)
		case 5:
			f.Kind, f.Sample = LogSample, never
			for d.next(&inner, &runtimeFilterFields) {
				f.Sample = d.fraction(inner.Message())
			}
		case 6:
			f.Kind = LogAnd
			d.logFilters(inner, &andFilterFields, f, depth)
		case 7:
			f.Kind = LogOr
			d.logFilters(inner, &orFilterFields, f, depth)
		case 8:
			d.headerFilter(inner, f)
		case 9:
			f.Kind = LogFlags
			for d.next(&inner, &responseFlagFields) {
				f.Flags = append(f.Flags, inner.String())
			}
		case 10:
			f.Kind = LogGRPCStatus
			d.oneOf(inner, &grpcStatusFields, f)
		case 11:
			d.filterExtension(inner, f)
		case 13:
			f.Kind = LogType
			d.oneOf(inner, &logTypeFields, f)
		}
	}
	return f
}

// logFilters reads the filters of a filter.
func (d *decoder) logFilters(m wire.Message, table *message, f *LogFilter, depth int) {
	for d.next(&m, table) {
		if depth == maxLogFilters {
			d.report(Cosmetic, "filters are nested too deeply")
			f.Filters = append(f.Filters, LogFilter{})
			continue
		}
		add(d, &f.Filters, &m, *d.logFilterWithin(m.Message(), depth+1))
	}
}

func (d *decoder) comparison(m wire.Message, table *message, f *LogFilter) {
	for d.next(&m, table) {
		for m := m.Message(); d.next(&m, &comparisonFields); {
			switch m.Number {
			case 1:
				f.Compare = Comparison(d.enum(&m, uint64(Unequal)))
			case 2:
				for m := m.Message(); d.next(&m, &runtimeNumberFields); {
					f.Value = uint32(m.Uint64())
				}
			}
		}
	}
}

// headerFilter reads a matcher. One that is not understood selects all records.
func (d *decoder) headerFilter(m wire.Message, f *LogFilter) {
	for d.next(&m, &headerFilterFields) {
		before := d.refusals
		h := d.headerMatcher(m.Message())
		switch h.Name = strings.ToLower(h.Name); {
		case d.refusals > before:
		case strings.HasPrefix(h.Name, ":") && h.Name != ":method" && h.Name != ":path" && h.Name != ":authority":
			d.report(Cosmetic, "the field "+h.Name+" is not recorded; all records are written")
		default:
			f.Kind, f.Header = LogHeader, &h
		}
	}
}

// oneOf reads a list of numbers, and whether they are excluded.
func (d *decoder) oneOf(m wire.Message, table *message, f *LogFilter) {
	for d.next(&m, table) {
		switch m.Number {
		case 1:
			for status := range m.Varints() {
				f.Statuses = append(f.Statuses, uint32(status))
			}
		case 2:
			f.Exclude = m.Bool()
		}
	}
}

// filterExtension reads an expression of CEL. One that is not understood selects all records.
func (d *decoder) filterExtension(m wire.Message, f *LogFilter) {
	for d.next(&m, &filterTypeFields) {
		url, value := d.any(m.Message())
		if url != celFilterType {
			d.report(Cosmetic, "filters of type "+shortType(url)+" are not supported; all records are written")
			continue
		}
		text := ""
		for m := m.Nested(value); d.next(&m, &expressionFields); {
			text = m.String()
		}
		expression, err := cel.Parse(text)
		if err != nil {
			d.report(Cosmetic, "the expression "+text+" is not understood, and all records are written: "+err.Error())
			continue
		}
		f.Kind, f.Expression = LogExpression, expression
	}
}
