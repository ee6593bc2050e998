package tracing

import (
	"cmp"
	"strconv"
	"sync"

	"github.com/pillion-proxy/pillion/internal/export"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/wire"
)

// Numbers of fields of opentelemetry.proto.trace.v1.Span and of the messages around it.
const (
	spanTraceID    = 1
	spanID         = 2
	spanState      = 3
	spanParent     = 4
	spanName       = 5
	spanKind       = 6
	spanStart      = 7
	spanEnd        = 8
	spanAttributes = 9
	spanStatus     = 15

	statusText = 2
	statusCode = 3

	kindServer  = 2
	kindClient  = 3
	statusError = 2
)

var spanBuffers = sync.Pool{New: func() any { return new([]byte) }}

// Export implements flow.TraceExporter: it puts the span of a closed record into the queue.
func (p *Policy) Export(r *flow.Record) {
	if p.Exporter == nil {
		return
	}
	b := spanBuffers.Get().(*[]byte)
	*b = p.appendSpan((*b)[:0], r)
	p.Exporter.Add(*b)
	if cap(*b) <= export.MaxItem {
		spanBuffers.Put(b)
	}
}

// appendSpan appends the span of a record, a message without its length.
func (p *Policy) appendSpan(b []byte, r *flow.Record) []byte {
	t := r.HTTP.Trace
	b = wire.AppendBytes(b, spanTraceID, t.ID[:])
	b = wire.AppendBytes(b, spanID, t.Span[:])
	if len(t.State) > 0 {
		b = wire.AsText(wire.AppendBytes(b, spanState, t.State), len(t.State))
	}
	if t.Parent != [8]byte{} {
		b = wire.AppendBytes(b, spanParent, t.Parent[:])
	}
	b = appendName(b, r)
	kind := uint64(kindServer)
	if r.Direction == flow.Outbound {
		kind = kindClient
	}
	b = wire.AppendVarint(b, spanKind, kind)
	start := r.Opened.UnixNano()
	b = wire.AppendFixed64(b, spanStart, uint64(start))
	b = wire.AppendFixed64(b, spanEnd, uint64(start+int64(r.Duration)))
	b = append(b, t.Attributes...)
	b = p.appendDryRuns(b, r.HTTP.DryRun)
	b = p.appendRequest(b, r)
	return appendOutcome(b, r)
}

// appendName appends the name that Envoy gives: that of the route, or the direction, with the host of an outbound request.
func appendName(b []byte, r *flow.Record) []byte {
	switch name := r.HTTP.Trace.Operation; {
	case name != "":
		return wire.AppendString(b, spanName, name)
	case r.Direction == flow.Inbound:
		return wire.AppendString(b, spanName, "ingress")
	}
	const egress = "egress "
	host := r.HTTP.Authority
	b = wire.AppendTag(b, spanName, len(egress)+len(host))
	return wire.AsText(append(append(b, egress...), host...), len(host))
}

// appendRequest appends Envoy's attributes of a request.
func (p *Policy) appendRequest(b []byte, r *flow.Record) []byte {
	h := r.HTTP
	b = appendText(b, "component", "proxy")
	b = appendText(b, "http.method", h.Method)
	b = p.appendURL(b, r)
	b = appendText(b, "http.protocol", r.Protocol.String())
	if len(h.ID) > 0 {
		b = appendText(b, "guid:x-request-id", h.ID)
	}
	if len(h.UserAgent) > 0 {
		b = appendText(b, "user_agent", h.UserAgent)
	}
	if h.GRPC {
		b = appendText(b, "grpc.path", h.Path)
		b = appendText(b, "grpc.authority", h.Authority)
	}
	var scratch [64]byte
	if a := r.Downstream.Addr(); a.IsValid() {
		b = appendText(b, "peer.address", a.AppendTo(scratch[:0]))
	}
	if r.Cluster != "" {
		b = appendText(b, "upstream_cluster", r.Cluster)
		b = appendText(b, "upstream_cluster.name", r.Cluster)
	}
	if r.Upstream.IsValid() {
		b = appendText(b, "upstream_address", r.Upstream.AppendTo(scratch[:0]))
	}
	b = appendNumber(b, "request_size", r.Received.Load())
	return appendNumber(b, "response_size", r.Sent.Load())
}

// appendURL appends http.url.
func (p *Policy) appendURL(b []byte, r *flow.Record) []byte {
	h := r.HTTP
	scheme, most := "http://", p.MaxPath
	if r.Direction == flow.Inbound && r.Security != nil {
		scheme = "https://"
	}
	if most == 0 {
		most = DefaultMaxPath
	}
	path := h.Path
	if len(path) > most {
		path = path[:most]
	}
	const key = "http.url"
	size := len(scheme) + len(h.Authority) + len(path)
	b = appendKey(b, key, size)
	return wire.AsText(append(append(append(b, scheme...), h.Authority...), path...), size)
}

// appendOutcome appends what became of a request. A request without a response, or with one of the server's errors, is an
// error, as for Envoy.
func appendOutcome(b []byte, r *flow.Record) []byte {
	h := r.HTTP
	b = appendNumber(b, "http.status_code", uint64(h.Status))
	flags := r.Flags()
	if flags == "" {
		flags = "-"
	}
	b = appendText(b, "response_flags", flags)
	if len(h.GRPCStatus) > 0 {
		b = appendText(b, "grpc.status_code", h.GRPCStatus)
	}
	if r.Reason != flow.Completed {
		b = appendText(b, "pillion.reason", string(r.Reason))
	}
	if h.Status != 0 && h.Status < 500 {
		return b
	}
	b = appendText(b, "error", "true")
	details := r.Details()
	size := export.SizeOfField(len(details)) + 2
	b = wire.AppendTag(b, spanStatus, size)
	b = wire.AsText(wire.AppendString(b, statusText, details), len(details))
	return wire.AppendVarint(b, statusCode, statusError)
}

// appendKey appends the beginning of an attribute whose text has n bytes. The caller appends the text.
func appendKey(b []byte, key string, n int) []byte {
	value := export.SizeOfField(n)
	b = wire.AppendTag(b, spanAttributes, export.SizeOfField(len(key))+export.SizeOfField(value))
	b = wire.AppendString(b, 1, key)
	b = wire.AppendTag(b, 2, value)
	return wire.AppendTag(b, 1, n)
}

func appendText[T string | []byte](b []byte, key string, value T) []byte {
	return wire.AsText(append(appendKey(b, key, len(value)), value...), len(value))
}

// appendNumber appends a number as text, as Envoy does.
func appendNumber(b []byte, key string, n uint64) []byte {
	var scratch [20]byte
	return appendText(b, key, strconv.AppendUint(scratch[:0], n, 10))
}

// appendTags appends the attributes of the policy's tags. The values of header fields are cut as in other records.
func (p *Policy) appendTags(b []byte, fields Fields) []byte {
	for i := range p.Tags {
		tag := &p.Tags[i]
		if tag.DryRun != "" {
			continue
		}
		if tag.Field == "" {
			b = appendText(b, tag.Name, tag.Value)
			continue
		}
		if value, ok := find(fields, tag.Field); ok {
			b = appendText(b, tag.Name, value[:min(len(value), maxTag)])
		} else if tag.Value != "" {
			b = appendText(b, tag.Name, tag.Value)
		}
	}
	return b
}

// appendDryRuns appends the attributes of the policy's tags that have verdicts: these are known when a request has been judged.
func (p *Policy) appendDryRuns(b []byte, d *flow.DryRun) []byte {
	for i := range p.Tags {
		tag := &p.Tags[i]
		if tag.DryRun == "" {
			continue
		}
		if value := cmp.Or(d.Value(tag.DryRun), tag.Value); value != "" {
			b = appendText(b, tag.Name, value)
		}
	}
	return b
}

// maxTag bounds the value of a header field in a span, in bytes.
const maxTag = 1 << 10

func find(fields Fields, name string) ([]byte, bool) {
	for i := range fields.Len() {
		if n, value := fields.At(i); equalFold(n, name) {
			return value, true
		}
	}
	return nil, false
}
