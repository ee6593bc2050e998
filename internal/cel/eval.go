package cel

import (
	"bytes"
	"cmp"
	"math"
	"strconv"
	"time"
	"unicode/utf8"

	"github.com/pillion-proxy/pillion/internal/flow"
)

// value is a value of CEL. The zero value is an error.
type value struct {
	kind   kind
	number int64   // kindBool: 0 or 1; kindInt; kindDuration: nanoseconds
	real   float64 // kindDouble
	text   []byte  // kindText
}

type kind uint8

const (
	kindError kind = iota
	kindNull
	kindBool
	kindInt
	kindDouble
	kindText
	kindDuration
)

func truth(b bool) value {
	if b {
		return value{kind: kindBool, number: 1}
	}
	return value{kind: kindBool}
}

func number(n int64) value { return value{kind: kindInt, number: n} }

// machine evaluates one program over one record.
type machine struct {
	program *Program
	record  *flow.Record
	scratch []byte // of texts that are made
}

const maxScratch = 4 << 10 // that is kept for the next evaluation

func (v value) isTrue() bool  { return v.kind == kindBool && v.number != 0 }
func (v value) isFalse() bool { return v.kind == kindBool && v.number == 0 }

func (m *machine) eval(i int32) value {
	n := &m.program.nodes[i]
	switch n.does {
	case opLiteral:
		return n.value
	case opAttribute:
		return m.attribute(n)
	case opHas:
		v := m.attribute(n)
		if v.kind == kindError && n.of.nested {
			return v
		}
		return truth(v.kind != kindError)
	case opAnd, opOr:
		return m.logic(n)
	case opChoose:
		switch condition := m.eval(n.a); {
		case condition.isTrue():
			return m.eval(n.b)
		case condition.isFalse():
			return m.eval(n.c)
		}
		return value{}
	case opIn:
		return m.in(n)
	case opList:
		return value{} // lists are for "in"
	}
	a := m.eval(n.a)
	if a.kind == kindError {
		return a
	}
	switch n.does {
	case opNot, opNegate, opSize, opString, opInt, opDouble:
		return m.convert(n.does, a)
	case opMatches:
		return ofText(a, a, func(a, _ []byte) bool { return n.matches.Match(a) })
	}
	b := m.eval(n.b)
	if b.kind == kindError {
		return b
	}
	switch n.does {
	case opEqual:
		return truth(equal(a, b))
	case opUnequal:
		return truth(!equal(a, b))
	case opContains:
		return ofText(a, b, bytes.Contains)
	case opStartsWith:
		return ofText(a, b, bytes.HasPrefix)
	case opEndsWith:
		return ofText(a, b, bytes.HasSuffix)
	case opLess, opLessEqual, opGreater, opGreaterEqual:
		return compared(n.does, a, b)
	}
	return m.arithmetic(n.does, a, b)
}

// attribute returns the value of an attribute or header field in the record.
func (m *machine) attribute(n *node) value {
	if n.of.header == notHeader {
		return n.of.of(m, m.record)
	}
	if n.header < 0 {
		return value{} // the whole header
	}
	return m.field(n.header)
}

// field returns a header field.
func (m *machine) field(i int32) value {
	h := m.record.HTTP
	fields := h.Fields
	if m.program.headers[i].Response {
		fields = h.ResponseFields
	}
	switch place := m.program.places[i]; {
	case place < 0 || int(place) >= len(fields):
		return value{}
	default:
		return present(fields[place])
	}
}

// present returns a text; nil is missing.
func present(text []byte) value {
	if text == nil {
		return value{}
	}
	return value{kind: kindText, text: text}
}

// literally returns a text.
func (m *machine) literally(text string) value {
	from := len(m.scratch)
	m.scratch = append(m.scratch, text...)
	return m.made(from)
}

// nonEmpty returns a text; an empty one is missing.
func (m *machine) nonEmpty(text string) value {
	if text == "" {
		return value{}
	}
	return m.literally(text)
}

// made returns the text that was appended to the scratch memory.
func (m *machine) made(from int) value {
	return value{kind: kindText, text: m.scratch[from:len(m.scratch):len(m.scratch)]}
}

// logic evaluates && and ||: the value that decides wins over an error of the other side.
func (m *machine) logic(n *node) value {
	decides := value.isFalse
	if n.does == opOr {
		decides = value.isTrue
	}
	a := m.eval(n.a)
	if decides(a) {
		return a
	}
	switch b := m.eval(n.b); {
	case decides(b):
		return b
	case a.kind != kindBool || b.kind != kindBool:
		return value{}
	default:
		return b
	}
}

// in evaluates the membership in a list.
func (m *machine) in(n *node) value {
	a := m.eval(n.a)
	if a.kind == kindError {
		return a
	}
	found := false
	for _, i := range m.program.nodes[n.b].list {
		b := m.eval(i)
		if b.kind == kindError {
			return b
		}
		found = found || equal(a, b)
	}
	return truth(found)
}

func ofText(a, b value, holds func(a, b []byte) bool) value {
	if a.kind != kindText || b.kind != kindText {
		return value{}
	}
	return truth(holds(a.text, b.text))
}

// equal compares values of any types. Those of different types differ, except for equal numbers.
func equal(a, b value) bool {
	switch {
	case a.isNumber() && b.isNumber():
		order, ok := order(a, b)
		return ok && order == 0
	case a.kind != b.kind:
		return false
	case a.kind == kindText:
		return bytes.Equal(a.text, b.text)
	}
	return a.number == b.number
}

func (v value) isNumber() bool { return v.kind == kindInt || v.kind == kindDouble }

// order compares values that have an order.
func order(a, b value) (order int, ok bool) {
	switch {
	case a.kind == kindText && b.kind == kindText:
		return bytes.Compare(a.text, b.text), true
	case a.kind == b.kind && (a.kind == kindBool || a.kind == kindInt || a.kind == kindDuration):
		return cmp.Compare(a.number, b.number), true
	case !a.isNumber() || !b.isNumber():
		return 0, false
	case a.kind == kindInt:
		return orderMixed(a.number, b.real)
	case b.kind == kindInt:
		order, ok = orderMixed(b.number, a.real)
		return -order, ok
	}
	return cmp.Compare(a.real, b.real), !math.IsNaN(a.real) && !math.IsNaN(b.real)
}

func orderMixed(a int64, b float64) (order int, ok bool) {
	switch {
	case b < math.MinInt64:
		return 1, true
	case b > math.MaxInt64:
		return -1, true
	}
	return cmp.Compare(float64(a), b), !math.IsNaN(b)
}

func compared(does operation, a, b value) value {
	order, ok := order(a, b) // not ok if one is NaN
	if !ok {
		return value{}
	}
	switch does {
	case opLess:
		return truth(order < 0)
	case opLessEqual:
		return truth(order <= 0)
	case opGreater:
		return truth(order > 0)
	}
	return truth(order >= 0)
}

// convert evaluates operations with one operand.
func (m *machine) convert(does operation, a value) value {
	switch {
	case does == opNot && a.kind == kindBool:
		return truth(a.number == 0)
	case does == opNegate && (a.kind == kindInt || a.kind == kindDuration) && a.number != math.MinInt64:
		return value{kind: a.kind, number: -a.number}
	case does == opNegate && a.kind == kindDouble:
		return value{kind: kindDouble, real: -a.real}
	case does == opSize && a.kind == kindText:
		return number(int64(utf8.RuneCount(a.text)))
	case does == opString:
		return m.toText(a)
	case does == opInt:
		return toInt(a)
	case does == opDouble:
		return toDouble(a)
	}
	return value{}
}

func (m *machine) toText(a value) value {
	if a.kind == kindText {
		return a
	}
	from := len(m.scratch)
	var ok bool
	if m.scratch, ok = a.appendTo(m.scratch); !ok {
		return value{}
	}
	return m.made(from)
}

// appendTo appends the text of a value that is not a text, and reports whether it has one.
func (v value) appendTo(dst []byte) ([]byte, bool) {
	switch v.kind {
	case kindBool:
		return strconv.AppendBool(dst, v.number != 0), true
	case kindInt:
		return strconv.AppendInt(dst, v.number, 10), true
	case kindDouble:
		return strconv.AppendFloat(dst, v.real, 'g', -1, 64), true
	case kindDuration:
		return append(strconv.AppendFloat(dst, time.Duration(v.number).Seconds(), 'f', -1, 64), 's'), true
	}
	return dst, false
}

func toInt(a value) value {
	switch a.kind {
	case kindInt, kindDuration:
		return number(a.number)
	case kindDouble:
		if a.real > math.MinInt64 && a.real < math.MaxInt64 {
			return number(int64(a.real))
		}
	case kindText:
		if n, err := strconv.ParseInt(string(a.text), 10, 64); err == nil {
			return number(n)
		}
	}
	return value{}
}

func toDouble(a value) value {
	switch a.kind {
	case kindDouble:
		return a
	case kindInt:
		return value{kind: kindDouble, real: float64(a.number)}
	case kindText:
		if f, err := strconv.ParseFloat(string(a.text), 64); err == nil {
			return value{kind: kindDouble, real: f}
		}
	}
	return value{}
}

// arithmetic evaluates operations whose operands have the same type. Overflow is an error.
func (m *machine) arithmetic(does operation, a, b value) value {
	switch {
	case a.kind == kindInt && b.kind == kindInt:
		return ofInts(does, a.number, b.number)
	case a.kind == kindDouble && b.kind == kindDouble:
		return ofDoubles(does, a.real, b.real)
	case a.kind == kindText && b.kind == kindText && does == opAdd:
		from := len(m.scratch)
		m.scratch = append(append(m.scratch, a.text...), b.text...)
		return m.made(from)
	case a.kind == kindDuration && b.kind == kindDuration && (does == opAdd || does == opSubtract):
		v := ofInts(does, a.number, b.number)
		if v.kind == kindInt {
			v.kind = kindDuration
		}
		return v
	}
	return value{}
}

func ofInts(does operation, a, b int64) value {
	switch does {
	case opAdd:
		if sum := a + b; (sum > a) == (b > 0) {
			return number(sum)
		}
	case opSubtract:
		if difference := a - b; (difference < a) == (b > 0) {
			return number(difference)
		}
	case opMultiply:
		if a == 0 || b == 0 {
			return number(0)
		}
		if product := a * b; product/b == a && !(a == -1 && b == math.MinInt64) && !(b == -1 && a == math.MinInt64) {
			return number(product)
		}
	case opDivide:
		if b != 0 && !(a == math.MinInt64 && b == -1) {
			return number(a / b)
		}
	case opModulo:
		if b != 0 && !(a == math.MinInt64 && b == -1) {
			return number(a % b)
		}
	}
	return value{}
}

func ofDoubles(does operation, a, b float64) value {
	v := value{kind: kindDouble}
	switch does {
	case opAdd:
		v.real = a + b
	case opSubtract:
		v.real = a - b
	case opMultiply:
		v.real = a * b
	case opDivide:
		v.real = a / b
	default:
		return value{}
	}
	return v
}
