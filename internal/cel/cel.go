// Package cel judges records by expressions of CEL, as Istio's users write them in Telemetry resources: the part of the
// language that the API's examples and documents use, over Envoy's attributes. An expression is parsed once. Anything that
// is not understood is an error of Parse, never a wrong result.
//
// Evaluation has CEL's third value besides true and false: the error of an attribute that a record lacks, or of operands
// whose types do not fit. "&&" and "||" are commutative over it, so "has(response.code) && response.code >= 400" and
// "response.code >= 400 || connection.mtls" have the results of CEL.
package cel

import (
	"fmt"
	"regexp"
	"sync"

	"github.com/pillion-proxy/pillion/internal/flow"
)

// Expression is a parsed expression. It is immutable.
type Expression struct {
	text    string
	nodes   []node
	root    int32
	headers []Header
}

// Header is a header field that an expression reads. Engines record it only if they are asked to.
type Header struct {
	Name     string // in lower case
	Response bool
}

// node is an operation. a, b and c are the indices of its operands.
type node struct {
	does    operation
	a, b, c int32
	value   value          // opLiteral
	of      *attribute     // opAttribute, opHas
	header  int32          // index of the field in the expression's headers; -1: not a field
	at      int32          // opAttribute, opList: index in the text
	list    []int32        // opList
	member  bool           // opList: it is the second operand of opIn
	matches *regexp.Regexp // opMatches
}

type operation uint8

const (
	opLiteral operation = iota
	opAttribute
	opHas
	opNot
	opNegate
	opAnd
	opOr
	opChoose // a ? b : c
	opEqual
	opUnequal
	opLess
	opLessEqual
	opGreater
	opGreaterEqual
	opIn
	opList
	opAdd
	opSubtract
	opMultiply
	opDivide
	opModulo
	opContains
	opStartsWith
	opEndsWith
	opMatches
	opSize
	opString
	opInt
	opDouble
)

// Limits of an expression.
const (
	maxText  = 4 << 10 // bytes
	maxNodes = 256
	maxDepth = 32
)

// String returns the text.
func (e *Expression) String() string { return e.text }

// Headers returns the header fields that the expression reads.
func (e *Expression) Headers() []Header { return e.headers }

// Program is an expression whose header fields have places in records.
type Program struct {
	*Expression
	places []int16 // of headers: the index in Record.HTTP.Fields or ResponseFields; negative: see special
}

// Bind returns a program. place returns the index in a record at which engines record a field; negative: they do not, and the
// field is missing in all records.
func (e *Expression) Bind(place func(Header) int) *Program {
	p := &Program{Expression: e}
	for _, h := range e.headers {
		p.places = append(p.places, int16(place(h)))
	}
	return p
}

// machines have the memory of evaluations. On the stack of a connection it would double that stack.
var machines = sync.Pool{New: func() any { return new(machine) }}

// Match reports whether the program is true for a closed record. An error is not true, as in Envoy.
func (p *Program) Match(r *flow.Record) bool {
	m := machines.Get().(*machine)
	m.program, m.record = p, r
	v := m.eval(p.root)
	m.release()
	return v.kind == kindBool && v.number != 0
}

// AppendText appends the text of the program's value for a record, and reports whether it has one: a text, a number or a
// truth value.
func (p *Program) AppendText(dst []byte, r *flow.Record) ([]byte, bool) {
	m := machines.Get().(*machine)
	defer m.release()
	m.program, m.record = p, r
	v := m.eval(p.root)
	if v.kind == kindText {
		return append(dst, v.text...), true
	}
	return v.appendTo(dst)
}

// release returns the machine without references to the record.
func (m *machine) release() {
	if cap(m.scratch) > maxScratch {
		m.scratch = nil
	}
	*m = machine{scratch: m.scratch[:0]}
	machines.Put(m)
}

// Error is an expression that is not understood.
type Error struct {
	Column  int // counted from 1, in bytes
	Problem string
}

func (e *Error) Error() string { return fmt.Sprintf("column %d: %s", e.Column, e.Problem) }
