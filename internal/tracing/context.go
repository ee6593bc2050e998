package tracing

import (
	"encoding/hex"
	"strings"

	"github.com/pillion-proxy/pillion/internal/flow"
)

// Forms is a set of forms in which a context is sent.
type Forms uint8

// The forms.
const (
	W3C     Forms = 1 << iota // traceparent (https://www.w3.org/TR/trace-context/)
	B3                        // b3 (https://github.com/openzipkin/b3-propagation)
	B3Multi                   // x-b3-traceid, x-b3-spanid, x-b3-parentspanid, x-b3-sampled, x-b3-flags
)

// Field is a header field of a context.
type Field uint8

// The fields. Those before fieldCount are written.
const (
	Traceparent Field = iota
	SingleB3
	B3TraceID
	B3SpanID
	B3Parent
	B3Sampled
	B3Flags
	fieldCount

	Tracestate
	unknownField
)

var fieldNames = [...]string{
	Traceparent: "traceparent", SingleB3: "b3", B3TraceID: "x-b3-traceid", B3SpanID: "x-b3-spanid", B3Parent: "x-b3-parentspanid",
	B3Sampled: "x-b3-sampled", B3Flags: "x-b3-flags", fieldCount: "", Tracestate: "tracestate",
}

// Name returns the name of a field, in lower case.
func (f Field) Name() string { return fieldNames[f] }

// fieldOf returns the field of a name, ignoring case.
func fieldOf[T string | []byte](name T) Field {
	var f Field
	switch len(name) {
	case len("b3"):
		f = SingleB3
	case len("traceparent"):
		if f = Traceparent; name[0]|0x20 == 'x' {
			f = B3SpanID
		}
	case len("tracestate"):
		if f = Tracestate; name[0]|0x20 == 'x' {
			f = B3Flags
		}
	case len("x-b3-traceid"):
		if f = B3TraceID; name[5]|0x20 == 's' {
			f = B3Sampled
		}
	case len("x-b3-parentspanid"):
		f = B3Parent
	default:
		return unknownField
	}
	if !equalFold(name, fieldNames[f]) {
		return unknownField
	}
	return f
}

// equalFold reports whether name is lower, which is in lower case.
func equalFold[T string | []byte](name T, lower string) bool {
	if len(name) != len(lower) {
		return false
	}
	for i := range len(name) {
		c := name[i]
		if 'A' <= c && c <= 'Z' {
			c += 'a' - 'A'
		}
		if c != lower[i] {
			return false
		}
	}
	return true
}

// Replaces reports whether a field of the request is not forwarded, because the trace has another value for it.
func Replaces[T string | []byte](t *flow.Trace, name T) bool {
	f := fieldOf(name)
	switch {
	case f == unknownField || t.Forms == 0:
		return false
	case f == Tracestate: // it belongs to a traceparent that is not valid
		return t.Restarted
	case f == Traceparent:
		return Forms(t.Forms)&W3C != 0
	case f == SingleB3:
		return Forms(t.Forms)&B3 != 0
	}
	return Forms(t.Forms)&B3Multi != 0
}

// Next returns the next field after f that a request gets. The first is after the negative one. It returns false after the
// last one.
func Next(t *flow.Trace, after int) (Field, bool) {
	for f := Field(after + 1); f < fieldCount; f++ {
		if writes(t, f) {
			return f, true
		}
	}
	return 0, false
}

func writes(t *flow.Trace, f Field) bool {
	forms := Forms(t.Forms)
	switch f {
	case Traceparent:
		return forms&W3C != 0
	case SingleB3:
		return forms&B3 != 0
	case B3Parent:
		return forms&B3Multi != 0 && t.Parent != [8]byte{}
	case B3Sampled:
		return forms&B3Multi != 0 && !t.Debug
	case B3Flags:
		return forms&B3Multi != 0 && t.Debug
	}
	return forms&B3Multi != 0
}

// AppendValue appends the value of a field.
func (f Field) AppendValue(dst []byte, t *flow.Trace) []byte {
	switch f {
	case Traceparent:
		dst = hex.AppendEncode(append(dst, "00-"...), t.ID[:])
		dst = hex.AppendEncode(append(dst, '-'), t.Span[:])
		if t.Sampled {
			return append(dst, "-01"...)
		}
		return append(dst, "-00"...)
	case SingleB3:
		dst = append(hex.AppendEncode(dst, t.ID[:]), '-')
		dst = append(hex.AppendEncode(dst, t.Span[:]), '-', sampledMark(t))
		if t.Parent != [8]byte{} {
			dst = hex.AppendEncode(append(dst, '-'), t.Parent[:])
		}
		return dst
	case B3TraceID:
		return hex.AppendEncode(dst, t.ID[:])
	case B3SpanID:
		return hex.AppendEncode(dst, t.Span[:])
	case B3Parent:
		return hex.AppendEncode(dst, t.Parent[:])
	case B3Sampled:
		return append(dst, sampledMark(t))
	case B3Flags:
		return append(dst, '1')
	}
	return dst
}

func sampledMark(t *flow.Trace) byte {
	switch {
	case t.Debug:
		return 'd'
	case t.Sampled:
		return '1'
	}
	return '0'
}

// carried is the context that a request carries.
type carried struct {
	forms Forms // that are there, valid or not
	valid bool  // trace and span are set
	w3c   bool  // they are those of traceparent
	trace [16]byte
	span  [8]byte

	decided, sampled, debug bool

	state []byte // tracestate

	client, forced bool // x-client-trace-id and x-envoy-force-trace are there
}

// read reads the fields of a context. A traceparent is preferred to the forms of B3. A second traceparent makes it invalid
// (Trace Context §3.2.2.5: a vendor must restart the trace).
func (c *carried) read(fields Fields) {
	var parent, single, id, span, sampled, flags []byte
	parents := 0
	for i := range fields.Len() {
		name, value := fields.At(i)
		switch fieldOf(name) {
		case Traceparent:
			parent, parents = value, parents+1
			c.forms |= W3C
		case SingleB3:
			single = value
			c.forms |= B3
		case B3TraceID:
			id = value
			c.forms |= B3Multi
		case B3SpanID:
			span = value
			c.forms |= B3Multi
		case B3Sampled:
			sampled = value
			c.forms |= B3Multi
		case B3Flags:
			flags = value
			c.forms |= B3Multi
		case Tracestate:
			c.state = value
		case unknownField:
			c.client = c.client || equalFold(name, "x-client-trace-id")
			c.forced = c.forced || equalFold(name, "x-envoy-force-trace")
		}
	}
	switch {
	case parents == 1 && c.parent(parent), single != nil && c.single(single):
	case c.forms&B3Multi != 0:
		c.multi(id, span, sampled, flags)
	}
}

// parent reads a traceparent.
func (c *carried) parent(v []byte) bool {
	const size = 55 // of version 00
	if len(v) < size || v[2] != '-' || v[35] != '-' || v[52] != '-' || len(v) > size && (string(v[:2]) == "00" || v[size] != '-') {
		return false
	}
	var version, flags [1]byte
	if !lowerHex(version[:], v[:2]) || version[0] == 0xff || !lowerHex(flags[:], v[53:55]) {
		return false
	}
	if !c.ids(v[3:35], v[36:52]) {
		return false
	}
	c.w3c, c.decided, c.sampled = true, true, flags[0]&1 != 0
	return true
}

// single reads a b3. It reports false if that has no IDs; its decision counts all the same.
func (c *carried) single(v []byte) bool {
	text := string(v)
	if len(text) == 1 {
		c.decision(text)
		return false
	}
	id, rest, _ := strings.Cut(text, "-")
	span, rest, more := strings.Cut(rest, "-")
	if !c.ids([]byte(id), []byte(span)) {
		return false
	}
	if more {
		state, _, _ := strings.Cut(rest, "-")
		c.decision(state)
	}
	return true
}

func (c *carried) multi(id, span, sampled, flags []byte) {
	c.ids(id, span)
	switch {
	case string(flags) == "1":
		c.decision("d")
	case sampled != nil:
		c.decision(string(sampled))
	}
}

// decision reads a state of sampling. Others leave the decision open.
func (c *carried) decision(state string) {
	switch state {
	case "1", "true", "d":
		c.decided, c.sampled, c.debug = true, true, state == "d"
	case "0", "false":
		c.decided = true
	}
}

// ids reads the IDs of a context. A trace ID of B3 may have 64 bits.
func (c *carried) ids(id, span []byte) bool {
	var trace [16]byte
	var parent [8]byte
	to := trace[:]
	if len(id) == 16 {
		to = trace[8:]
	}
	if !lowerHex(to, id) || !lowerHex(parent[:], span) || trace == [16]byte{} || parent == [8]byte{} {
		return false
	}
	c.valid, c.trace, c.span = true, trace, parent
	return true
}

// lowerHex decodes text into all of to. It reports false for text of another length, and for letters in upper case, which
// Trace Context does not allow.
func lowerHex(to, text []byte) bool {
	if len(text) != 2*len(to) {
		return false
	}
	for _, b := range text {
		if 'A' <= b && b <= 'F' {
			return false
		}
	}
	_, err := hex.Decode(to, text)
	return err == nil
}
