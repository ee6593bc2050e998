package httpforward

import (
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/http1"
	"github.com/pillion-proxy/pillion/internal/http2"
	"github.com/pillion-proxy/pillion/internal/tracing"
)

// The part of tracing that is the engines': the context of a request's trace is sent in the place of the one that arrived.

// policyOf returns the policy for the trace of a request; nil: it is not traced.
func policyOf(d *Decision, settings *Settings) *tracing.Policy {
	if d.Tracing != nil {
		return d.Tracing
	}
	return settings.Tracing
}

// operation returns the name of the span.
func (d *Decision) operation() string {
	if d.Plan != nil && d.Plan.Operation != "" {
		return d.Plan.Operation
	}
	return d.Operation
}

// newID returns the request ID that the exchange adds. It is made once.
func (x *exchange) newID() []byte {
	if x.http.ID == nil {
		x.http.ID = appendUUID(x.names.take(uuidLength))
	}
	return x.http.ID
}

// newID is as for exchanges.
func (s *stream) newID() []byte {
	if s.http.ID == nil {
		s.http.ID = appendUUID(s.names.take(uuidLength))
	}
	return s.http.ID
}

// trace begins the span of a request whose head is in b. It is not inlined, so that the frames of other requests stay small.
//
//go:noinline
func (x *exchange) trace(p *tracing.Policy, b []byte) {
	h := &x.requestHead
	x.fields = headFields{h, b}
	if x.settings.Fields.RequestID && !h.Has(http1.XRequestID) {
		x.newID()
	}
	x.http.Trace = p.Begin(&tracing.Request{Fields: &x.fields, ID: x.http.ID, Operation: x.decision.operation()})
	if i := h.Find(http1.XRequestID); i >= 0 && p.RequestIDs != nil {
		if value := h.Fields[i].Value.In(b); len(value) == len(x.http.ID) {
			copy(value, x.http.ID) // with the reason
		}
	}
}

// dropTraceLines marks the fields of a context that are not forwarded.
func dropTraceLines(h *http1.Head, b []byte, t *flow.Trace) {
	for i := range h.Fields {
		if f := &h.Fields[i]; tracing.Replaces(t, f.Name.In(b)) {
			f.Dropped = true
		}
	}
}

// appendTraceLines appends the fields of a context to a head of HTTP/1.
func appendTraceLines(dst []byte, t *flow.Trace) []byte {
	for f, more := tracing.Next(t, -1); more; f, more = tracing.Next(t, int(f)) {
		dst = append(append(dst, f.Name()...), ": "...)
		dst = append(f.AppendValue(dst, t), "\r\n"...)
	}
	return dst
}

// addTrace adds the fields of a context. t may be nil.
func (e *edited) addTrace(t *flow.Trace) {
	if t == nil {
		return
	}
	for f, more := tracing.Next(t, -1); more; f, more = tracing.Next(t, int(f)) {
		from := len(e.values)
		e.values = f.AppendValue(e.values, t)
		e.add(f.Name(), from)
	}
}

// trace begins the span of the request that was routed last.
func (m *heads) trace(s *stream, p *tracing.Policy, operation string) {
	generated := s.http.ID == nil
	if generated && s.settings.Fields.RequestID {
		s.newID()
	}
	s.http.Trace = p.Begin(&tracing.Request{Fields: &m.fields, ID: s.http.ID, Operation: operation})
	if generated || p.RequestIDs == nil {
		return
	}
	for i := range m.fields.list {
		if f := &m.fields.list[i]; f.Name == requestIDField && len(f.Value) == len(s.http.ID) && f.Value != string(s.http.ID) {
			f.Value = string(s.http.ID) // with the reason
		}
	}
}

const requestIDField = "x-request-id"

// appendTraced is appendFields for a request with a context of its own.
func (m *heads) appendTraced(block []byte, encoder *http2.Encoder, fields []http2.Field, t *flow.Trace) []byte {
	for i := range fields {
		if name := fields[i].Name; !m.Peers.drops(name) && !tracing.Replaces(t, name) {
			block = encoder.AppendField(block, fields[i])
		}
	}
	var scratch [80]byte
	for f, more := tracing.Next(t, -1); more; f, more = tracing.Next(t, int(f)) {
		block = encoder.AppendLiteral(block, f.Name(), f.AppendValue(scratch[:0], t))
	}
	return block
}
