package accesslog

import (
	"errors"
	"strings"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/wire"
)

// encoder makes the message of a record for a service. It uses l.buf, and appends to b.
type encoder interface {
	append(b []byte, l *line, r *flow.Record, lasted time.Duration) []byte
}

// otelRecord is the form of a record of OpenTelemetry's logs.
type otelRecord struct {
	body       anyValue
	attributes []anyValue
}

// Numbers of fields of opentelemetry.proto.logs.v1.LogRecord.
const (
	logTime       = 1
	logBody       = 5
	logAttributes = 6
	logTrace      = 9
	logSpan       = 10
)

func (o *otelRecord) append(b []byte, l *line, r *flow.Record, lasted time.Duration) []byte {
	b = wire.AppendFixed64(b, logTime, uint64(r.Opened.UnixNano()))
	if start := len(b); o.body.is != 0 {
		b = wire.Wrap(o.body.append(b, l, r, lasted), start, logBody)
	}
	b = appendMembers(b, logAttributes, o.attributes, l, r, lasted)
	if t := r.HTTP.Trace; t != nil {
		b = wire.AppendBytes(b, logTrace, t.ID[:])
		b = wire.AppendBytes(b, logSpan, t.Span[:])
	}
	return b
}

// anyValue is the form of an opentelemetry.proto.common.v1.AnyValue, whose texts have operators.
type anyValue struct {
	name   string // of a member of a list of keys and values
	is     int    // number of the field: isText, isList or isMembers; 0: there is no value
	format *Format
	of     []anyValue
}

const (
	isText    = 1
	isList    = 5
	isMembers = 6
)

// append appends the value, a message without its length.
func (v *anyValue) append(b []byte, l *line, r *flow.Record, lasted time.Duration) []byte {
	switch start := len(b); v.is {
	case isText:
		v.format.build(l, r, lasted)
		return wire.AppendBytes(b, isText, l.buf[:len(l.buf)-1]) // without the newline
	case isMembers:
		return wire.Wrap(appendMembers(b, 1, v.of, l, r, lasted), start, isMembers)
	case isList:
		for i := range v.of {
			one := len(b)
			b = wire.Wrap(v.of[i].append(b, l, r, lasted), one, 1)
		}
		return wire.Wrap(b, start, isList)
	}
	return b
}

// appendMembers appends keys and values, each as a field of the number.
func appendMembers(b []byte, number int, members []anyValue, l *line, r *flow.Record, lasted time.Duration) []byte {
	for i := range members {
		start := len(b)
		b = wire.AppendString(b, 1, members[i].name)
		value := len(b)
		b = wire.Wrap(members[i].append(b, l, r, lasted), value, 2)
		b = wire.Wrap(b, start, number)
	}
	return b
}

// anyValues compiles values. A text with an operator that is not understood has no value in its place.
type anyValues struct {
	*Sinks
	problems []error
}

var (
	errValueType = errors.New("a value that is neither a text, a list, nor keys and values")
	errDeep      = errors.New("values are nested too deeply")
)

// read reads an AnyValue.
func (c *anyValues) read(m wire.Message) (v anyValue) {
	if m.Depth() > 4*maxNested {
		c.problems = append(c.problems, errDeep)
		return v
	}
	for m.Next() {
		switch v.is = m.Number; m.Number {
		case isText:
			v.format = c.text(m.String())
		case isMembers:
			v.of = c.members(m.Message())
		case isList:
			for m := m.Message(); m.Next(); {
				v.of = append(v.of, c.read(m.Message()))
			}
		default:
			v.is = 0
			c.problems = append(c.problems, errValueType)
		}
	}
	return v
}

// members reads a KeyValueList.
func (c *anyValues) members(m wire.Message) (all []anyValue) {
	for m.Next() {
		var name string
		var value anyValue
		for m := m.Message(); m.Next(); {
			switch m.Number {
			case 1:
				name = m.String()
			case 2:
				value = c.read(m.Message())
			}
		}
		value.name = name
		all = append(all, value)
	}
	return all
}

// text compiles a text.
func (c *anyValues) text(text string) *Format {
	compiler := compiler{lenient: true}
	err := compiler.template(strings.ToValidUTF8(text, "?"), plain)
	var f *Format
	if err == nil {
		f, err = compiler.finish()
	}
	c.problems = append(c.problems, compiler.problems...)
	if err != nil {
		c.problems = append(c.problems, err)
		f = &Format{pieces: []piece{{}}}
	}
	c.problems = append(c.problems, c.note(f)...)
	return f
}
