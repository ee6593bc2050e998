// Package wire reads and writes protobuf messages field by field, without generated types. The messages of a control
// plane are read once and compiled, so generated types would be garbage at once. They cost an agent that has not decoded
// anything yet 16 MB of binary and 12 MB of resident memory, and decoding takes five times as long.
//
// The caller switches over field numbers, and so its reading is strict: the switch's default is a field that the caller
// does not know.
package wire

import (
	"errors"
	"fmt"
	"iter"
	"math"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
)

// MaxDepth bounds how deep messages may be nested, as Envoy does.
const MaxDepth = 100

// Errors of malformed messages. They are wrapped with the field's number.
var (
	ErrTruncated = errors.New("truncated")
	ErrWireType  = errors.New("unexpected wire type")
	ErrTag       = errors.New("malformed tag")
	ErrUTF8      = errors.New("string is not UTF-8")
	ErrDepth     = fmt.Errorf("messages are nested more than %d deep", MaxDepth)
)

// Message reads the fields of one message in the order of their bytes. Make it with Read.
//
//	var err error
//	m := wire.Read(b, &err)
//	for m.Next() {
//		switch m.Number {
//		case 1:
//			name = m.String()
//		case 2:
//			decode(m.Message())
//		default:
//			unknown(m.Number)
//		}
//	}
//
// A field that occurs again replaces or extends the earlier one, as its declaration requires; that is the caller's part.
// Groups are one field without a value.
type Message struct {
	Number int // of the current field

	// Texts has the strings that were read before: String returns one of them if it is equal, and adds others. Messages
	// within this one share it. nil: each string is a copy of its own.
	Texts Texts

	rest  []byte
	bytes []byte // value of a length-delimited field
	bits  uint64 // value of a varint or of a field of 64 bits
	err   *error
	depth int32
	typ   protowire.Type
}

// Texts is a set of strings, each the value of its own key.
type Texts map[string]string

// maxShared bounds the strings that are shared, in bytes: longer ones are unlikely to occur again.
const maxShared = 4 << 10

// Get returns the string in t that is equal to b, or else adds one.
func (t Texts) Get(b []byte) string {
	text, ok := t[string(b)]
	if !ok {
		text = string(b)
		t[text] = text
	}
	return text
}

// Read returns a reader of the message b. Its results share b's memory. The first error of the message and of those
// nested in it is stored in err, and ends all of them.
func Read(b []byte, err *error) Message { return Message{rest: b, err: err} }

// Next moves to the next field. It returns false at the end of the message and after an error.
func (m *Message) Next() bool {
	if len(m.rest) == 0 || *m.err != nil {
		return false
	}
	number, typ, n := protowire.ConsumeTag(m.rest)
	if n < 0 || number > protowire.MaxValidNumber {
		m.Number = 0
		return m.fail(ErrTag)
	}
	m.Number, m.typ, m.bytes, m.bits, m.rest = int(number), typ, nil, 0, m.rest[n:]
	switch typ {
	case protowire.VarintType:
		m.bits, n = protowire.ConsumeVarint(m.rest)
	case protowire.Fixed32Type:
		_, n = protowire.ConsumeFixed32(m.rest) // no method reads such a field
	case protowire.Fixed64Type:
		m.bits, n = protowire.ConsumeFixed64(m.rest)
	case protowire.BytesType:
		m.bytes, n = protowire.ConsumeBytes(m.rest)
	default: // a group; a lone end of a group is an error
		n = protowire.ConsumeFieldValue(number, typ, m.rest)
	}
	if n < 0 {
		return m.fail(ErrTruncated)
	}
	m.rest = m.rest[n:]
	return true
}

// Depth returns how many messages the message is nested in.
func (m *Message) Depth() int { return int(m.depth) }

// fail stores the message's first error. It returns false.
func (m *Message) fail(err error) bool {
	if *m.err == nil {
		*m.err = fmt.Errorf("field %d: %w", m.Number, err)
	}
	return false
}

func (m *Message) is(typ protowire.Type) bool { return m.typ == typ || m.fail(ErrWireType) }

// Message returns a reader of the current field, a message.
func (m *Message) Message() Message { return m.Nested(m.Bytes()) }

// Nested returns a reader of b, a message within the current field, such as the content of a google.protobuf.Any.
func (m *Message) Nested(b []byte) Message {
	inner := Message{Texts: m.Texts, rest: b, err: m.err, depth: m.depth + 1}
	if inner.depth >= MaxDepth {
		m.fail(ErrDepth)
	}
	return inner
}

// Bytes returns the current field: bytes, or a message that is read later.
func (m *Message) Bytes() []byte {
	m.is(protowire.BytesType)
	return m.bytes
}

// String returns the current field, a string. It does not share memory with the message.
func (m *Message) String() string {
	if m.is(protowire.BytesType) && !utf8.Valid(m.bytes) {
		m.fail(ErrUTF8)
	}
	if m.Texts == nil || len(m.bytes) > maxShared {
		return string(m.bytes)
	}
	return m.Texts.Get(m.bytes)
}

// Count returns how often a field occurs in the rest of the message.
func (m *Message) Count(number int) (n int) {
	for rest := m.rest; len(rest) > 0; {
		found, _, size := protowire.ConsumeField(rest)
		if size < 0 {
			break // Next reports it
		}
		if int(found) == number {
			n++
		}
		rest = rest[size:]
	}
	return n
}

// Bool returns the current field, a bool.
func (m *Message) Bool() bool { return m.Uint64() != 0 }

// Uint64 returns the current field: an int32, int64, uint32, uint64 or enum. Convert it to the declared type:
// protobuf requires that the bits of a wider type are dropped.
func (m *Message) Uint64() uint64 {
	m.is(protowire.VarintType)
	return m.bits
}

// Double returns the current field, a double.
func (m *Message) Double() float64 {
	m.is(protowire.Fixed64Type)
	return math.Float64frombits(m.bits)
}

// Varints returns the values of the current field, a repeated integer or enum: one value, or several that are packed.
// A reader must accept both forms, and a field may come in several parts.
func (m *Message) Varints() iter.Seq[uint64] {
	return func(yield func(uint64) bool) {
		if m.typ != protowire.BytesType {
			if m.is(protowire.VarintType) {
				yield(m.bits)
			}
			return
		}
		for rest := m.bytes; len(rest) > 0; {
			v, n := protowire.ConsumeVarint(rest)
			if n < 0 {
				m.fail(ErrTruncated)
				return
			}
			if !yield(v) {
				return
			}
			rest = rest[n:]
		}
	}
}

// The functions below append one field to b. They write the value also if it is the zero value.

// AppendBytes appends a bytes field or a message.
func AppendBytes(b []byte, number int, value []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(b, protowire.Number(number), protowire.BytesType), value)
}

// AppendString appends a string field.
func AppendString(b []byte, number int, value string) []byte {
	return protowire.AppendString(protowire.AppendTag(b, protowire.Number(number), protowire.BytesType), value)
}

// AppendVarint appends an integer, enum or bool field.
func AppendVarint(b []byte, number int, value uint64) []byte {
	return protowire.AppendVarint(protowire.AppendTag(b, protowire.Number(number), protowire.VarintType), value)
}

// AppendTag appends the beginning of a bytes field or a message of a length. The caller appends that many bytes.
func AppendTag(b []byte, number, length int) []byte {
	return protowire.AppendVarint(protowire.AppendTag(b, protowire.Number(number), protowire.BytesType), uint64(length))
}

// AppendFixed64 appends a fixed64 field.
func AppendFixed64(b []byte, number int, value uint64) []byte {
	return protowire.AppendFixed64(protowire.AppendTag(b, protowire.Number(number), protowire.Fixed64Type), value)
}

// AppendDouble appends a double field.
func AppendDouble(b []byte, number int, value float64) []byte {
	return protowire.AppendFixed64(protowire.AppendTag(b, protowire.Number(number), protowire.Fixed64Type), math.Float64bits(value))
}

// AsText replaces the bytes of the last n of b that are not UTF-8 by question marks. Strings of protobuf must be UTF-8: a
// receiver that checks rejects the whole batch, with the spans of other requests.
func AsText(b []byte, n int) []byte {
	text := b[len(b)-n:]
	if utf8.Valid(text) {
		return b
	}
	for len(text) > 0 {
		r, size := utf8.DecodeRune(text)
		if r == utf8.RuneError && size == 1 {
			text[0] = '?'
		}
		text = text[size:]
	}
	return b
}

// Wrap makes the bytes of b from start on the field of a number: a message.
func Wrap(b []byte, start, number int) []byte {
	var scratch [16]byte
	head := AppendTag(scratch[:0], number, len(b)-start)
	b = append(b, head...)
	copy(b[start+len(head):], b[start:])
	copy(b[start:], head)
	return b
}
