// Package tracing makes the spans of requests and exports them by OTLP, the protocol of OpenTelemetry.
//
// A Policy decides which requests are traced. Policy.Begin reads the context that a request carries, or begins a trace, and
// returns the request's span; the engines send its context on, in the place of the one that arrived. The span is encoded
// when the record of the request closes, and waits in the bounded queue of an Exporter. One goroutine of the exporter sends
// batches. A request never waits for it: spans that find the queue full are dropped and counted.
//
// The OpenTelemetry SDK with its two OTLP exporters is not used: it adds more to the binary than all of the mesh does. See
// docs/tracing.md for the figures.
package tracing

import (
	"encoding/binary"
	"log/slog"
	"math/rand/v2"
	"sync"

	"github.com/pillion-proxy/pillion/internal/export"
	"github.com/pillion-proxy/pillion/internal/flow"
)

// Policy is which requests are traced, and how. It is never modified after its first use.
type Policy struct {
	Sampler  Sampler
	Forms    Forms // in which contexts are sent; those in which a context arrives are kept in addition
	Exporter *export.Exporter

	// Local is set if contexts are neither replaced nor added: only spans are exported.
	Local bool

	// MaxPath is the length to which a path is cut in a span, in bytes; 0: DefaultMaxPath.
	MaxPath int

	// RequestIDs lets the request ID decide, as Envoy does; nil: Sampler decides.
	RequestIDs *RequestIDs

	Tags []Tag // of every span

	kept int64 // of its Exporters when it was made
}

// DefaultMaxPath is Envoy's.
const DefaultMaxPath = 256

// Tag is an attribute of spans. It has a value, or that of a header field of the request.
type Tag struct {
	Name  string
	Value string // of a request without the field; empty: such a span has no attribute of this name
	Field string // in lower case; empty: the value is Value

}

// Fields are header fields by index.
type Fields interface {
	Len() int
	At(i int) (name, value []byte)
}

// Request is the part of a request that decides about its trace.
type Request struct {
	Fields    Fields
	ID        []byte // x-request-id. With Policy.RequestIDs, a byte of it may be changed
	Operation string // name of the span; empty: that of the direction
}

// traces keeps the memory of traces.
var traces = sync.Pool{New: func() any { return new(flow.Trace) }}

// Begin returns the trace of a request. Its memory may be used again after Release.
func (p *Policy) Begin(r *Request) *flow.Trace {
	t := traces.Get().(*flow.Trace)
	var c carried
	c.read(r.Fields)
	forms := p.Forms | c.forms
	if p.Local {
		forms = 0
	}
	*t = flow.Trace{
		ID: c.trace, Parent: c.span, Forms: uint8(forms), Debug: c.debug, Operation: r.Operation, Exporter: p, Attributes: t.Attributes[:0],
		Restarted: c.forms&W3C != 0 && !c.w3c, State: t.State[:0],
	}
	if !c.valid {
		newTraceID(&t.ID)
	}
	binary.BigEndian.PutUint64(t.Span[:], newID())
	if p.RequestIDs == nil {
		t.Sampled = p.Sampler.sample(&t.ID, &c)
	} else if t.Sampled = p.RequestIDs.decide(r, &c); c.decided {
		t.Sampled = c.sampled // Envoy's tracer goes by the parent
	}
	if !t.Sampled {
		return t
	}
	if c.w3c && len(c.state) <= maxState {
		t.State = append(t.State, c.state...)
	}
	t.Attributes = p.appendTags(t.Attributes, r.Fields)
	return t
}

// maxState is how long a tracestate is in a span, in bytes (Trace Context §3.3.1.5).
const maxState = 512

// Release returns the memory of a trace. It may be nil.
func Release(t *flow.Trace) {
	if t != nil {
		t.Exporter = nil
		traces.Put(t)
	}
}

// newID returns a random number that is not zero: zero is not a valid ID.
func newID() uint64 {
	for {
		if id := rand.Uint64(); id != 0 {
			return id
		}
	}
}

func newTraceID(id *[16]byte) {
	binary.BigEndian.PutUint64(id[:8], newID())
	binary.BigEndian.PutUint64(id[8:], newID())
}

// Sink exports the spans of closed records.
type Sink struct{}

// Closed implements flow.Sink.
func (Sink) Closed(r *flow.Record) {
	if t := r.HTTP.Trace; t != nil && t.Sampled && t.Exporter != nil {
		t.Exporter.Export(r)
	}
}

const exportMethod = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"

// The queue of spans, with the bounds of OpenTelemetry's SDKs.
const (
	batch    = 512
	maxQueue = 2048
)

// newExporter starts an exporter of spans.
func newExporter(s export.Sender, target string, resource []export.Resource, counts *export.Counts, log *slog.Logger) *export.Exporter {
	return export.New(export.Config{
		Sender: s, Target: target, What: "spans", Counts: counts, Log: log,
		Levels: export.OTLP(resource, nil), Field: export.OTLPItem, Batch: batch, Most: maxQueue,
	})
}
