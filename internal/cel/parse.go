package cel

import (
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

// parser reads an expression. After the first error it goes on without effect, and the error stands.
type parser struct {
	text  string
	at    int
	token token
	depth int
	err   *Error

	nodes   []node
	headers []Header
}

// Parse parses an expression. The error names the first thing that is not understood, and its place.
func Parse(text string) (*Expression, error) {
	if len(text) > maxText {
		return nil, &Error{1, "the expression is longer than 4096 bytes"}
	}
	if !utf8.ValidString(text) {
		return nil, &Error{1, "the expression is not UTF-8"}
	}
	p := parser{text: text}
	p.next()
	root := p.choice()
	if p.err == nil && p.token.kind != "end" {
		p.unexpected()
	}
	p.wholes()
	if p.err != nil {
		return nil, p.err
	}
	return &Expression{text: text, nodes: slices.Clip(p.nodes), root: root, headers: p.headers}, nil
}

// wholes rejects lists and headers as values.
func (p *parser) wholes() {
	for i := range p.nodes {
		n := &p.nodes[i]
		switch {
		case n.does == opList && !n.member:
			p.fail(int(n.at), `lists are supported behind "in" only`)
		case (n.does == opAttribute || n.does == opHas) && n.of.header != notHeader && n.header < 0:
			p.fail(int(n.at), `headers are supported behind "in" and with the name of a field only`)
		}
	}
}

func (p *parser) fail(at int, problem string) {
	if p.err == nil {
		p.err = &Error{at + 1, problem}
	}
	p.at, p.token = len(p.text), token{kind: "end", at: len(p.text)}
}

func (p *parser) unexpected() {
	if p.token.kind == "end" {
		p.fail(p.token.at, "the expression is incomplete")
		return
	}
	p.fail(p.token.at, "unexpected "+p.text[p.token.at:p.at])
}

// take reports whether the token is of a kind, and reads the next one then.
func (p *parser) take(kind string) bool {
	if p.err != nil || p.token.kind != kind {
		return false
	}
	p.next()
	return true
}

func (p *parser) expect(kind string) {
	if !p.take(kind) {
		p.unexpected()
	}
}

func (p *parser) add(n node) int32 {
	if len(p.nodes) == maxNodes {
		p.fail(p.token.at, "the expression is too long")
		return 0
	}
	p.nodes = append(p.nodes, n)
	return int32(len(p.nodes) - 1)
}

// deeper counts nested expressions. Its result is to be called at their end.
func (p *parser) deeper() bool {
	if p.depth++; p.depth > maxDepth {
		p.fail(p.token.at, "the expression is nested too deeply")
		return false
	}
	return true
}

// choice reads an expression.
func (p *parser) choice() int32 {
	if !p.deeper() {
		return 0
	}
	defer func() { p.depth-- }()
	condition := p.binary(0)
	if !p.take("?") {
		return condition
	}
	yes := p.binary(0)
	p.expect(":")
	return p.add(node{does: opChoose, a: condition, b: yes, c: p.choice()})
}

// operators are those with two operands by their precedence, the lowest first. All associate to the left.
var operators = [...]map[string]operation{
	{or: opOr},
	{"&&": opAnd},
	{"==": opEqual, "!=": opUnequal, "<": opLess, "<=": opLessEqual, ">": opGreater, ">=": opGreaterEqual, "in": opIn},
	{"+": opAdd, "-": opSubtract},
	{"*": opMultiply, "/": opDivide, "%": opModulo},
}

// binary reads operators of a precedence and of higher ones.
func (p *parser) binary(level int) int32 {
	if level == len(operators) {
		return p.unary()
	}
	left := p.binary(level + 1)
	for p.err == nil {
		does, ok := operators[level][p.token.kind]
		if !ok {
			break
		}
		p.next()
		right := p.binary(level + 1)
		if p.err != nil {
			break
		}
		if does == opIn {
			left = p.in(left, right)
		} else {
			left = p.add(node{does: does, a: left, b: right})
		}
	}
	return left
}

// in makes a membership. That of a constant in the header is the presence of a field.
func (p *parser) in(left, right int32) int32 {
	key, set := &p.nodes[left], &p.nodes[right]
	switch {
	case set.does == opList:
		set.member = true
	case set.does == opAttribute && set.of.header != notHeader && set.header < 0 && key.does == opLiteral && key.value.kind == kindText:
		set.does, set.header = opHas, p.header(string(key.value.text), set.of.header == responseHeader)
		return right
	default:
		p.fail(p.token.at, `"in" is supported for lists, and for texts in request.headers and response.headers`)
	}
	return p.add(node{does: opIn, a: left, b: right})
}

// unary reads signs and what they are for. Two of them cancel each other out, whatever the type of the value is.
func (p *parser) unary() int32 {
	does, mark := opNot, "!"
	if p.token.kind == "-" {
		does, mark = opNegate, "-"
	}
	odd := false
	for p.take(mark) {
		odd = !odd
	}
	of := p.member()
	if p.err != nil || !odd {
		return of
	}
	if n := &p.nodes[of]; does == opNegate && n.does == opLiteral && n.value.kind == kindInt {
		n.value.number = -n.value.number
		return of
	}
	return p.add(node{does: does, a: of})
}

// member reads a primary expression and the selections and methods behind it.
func (p *parser) member() int32 {
	left := p.primary()
	for p.err == nil {
		switch {
		case p.token.kind == ".":
			p.next()
			name, at := p.token.text, p.token.at
			p.expect("name")
			if p.token.kind != "(" {
				p.fail(at, "only attributes have fields")
				return 0
			}
			left = p.method(left, name, at)
		case p.token.kind == "[":
			p.fail(p.token.at, "only attributes have elements")
		default:
			return left
		}
	}
	return left
}

func (p *parser) primary() int32 {
	at := p.token.at
	switch p.token.kind {
	case "literal":
		v := p.token.value
		p.next()
		return p.add(node{does: opLiteral, value: v})
	case "(":
		p.next()
		inner := p.choice()
		p.expect(")")
		return inner
	case "[":
		p.next()
		n := node{does: opList, at: int32(at)}
		for p.err == nil && p.token.kind != "]" {
			n.list = append(n.list, p.choice())
			if !p.take(",") {
				break
			}
		}
		p.expect("]")
		return p.add(n)
	case "name":
		name := p.token.text
		p.next()
		if p.token.kind == "(" {
			return p.call(name, at)
		}
		return p.path(name, at)
	}
	p.unexpected()
	return 0
}

// path reads the selections behind a name. Together they name an attribute.
func (p *parser) path(name string, at int) int32 {
	path := name
	for p.err == nil {
		before, beforeToken := p.at, p.token
		key, ok := p.selection()
		if !ok {
			p.at, p.token = before, beforeToken
			break
		}
		if of := attributes[path]; of != nil && of.header != notHeader {
			return p.add(node{does: opAttribute, of: of, header: p.header(key, of.header == responseHeader)})
		}
		path += "." + key
	}
	if p.err != nil {
		return 0
	}
	of := attributes[path]
	if of == nil {
		p.fail(at, "the attribute "+path+" is not supported")
		return 0
	}
	if of.header != notHeader && p.token.kind == "[" {
		p.fail(p.token.at, "fields of "+path+" are selected by constants only")
	}
	return p.add(node{does: opAttribute, of: of, header: -1, at: int32(at)})
}

// selection reads .name or ["name"]. Without one it returns false, and the caller steps back.
func (p *parser) selection() (key string, ok bool) {
	if p.take(".") {
		name := p.token.text
		return name, p.take("name") && p.token.kind != "("
	}
	if p.take("[") {
		v := p.token.value
		return string(v.text), p.take("literal") && v.kind == kindText && p.take("]")
	}
	return "", false
}

// header returns the index of a header field among those that the expression reads.
func (p *parser) header(name string, response bool) int32 {
	h := Header{strings.ToLower(name), response}
	if name != h.Name {
		h.Name = "" // Envoy's keys are in lower case: no field has this one
	}
	i := slices.Index(p.headers, h)
	if i < 0 {
		i = len(p.headers)
		p.headers = append(p.headers, h)
	}
	return int32(i)
}

// call reads the arguments of a function behind its name.
func (p *parser) call(name string, at int) int32 {
	does, known := map[string]operation{"has": opHas, "size": opSize, "string": opString, "int": opInt, "double": opDouble, "duration": opLiteral}[name]
	if !known {
		p.fail(at, "the function "+name+" is not supported")
		return 0
	}
	p.expect("(")
	argumentAt := p.at
	argument := p.choice()
	selected := p.err == nil && strings.LastIndexByte(strings.TrimRight(p.text[argumentAt:p.token.at], " \t\r\n"), ']') < 0
	p.expect(")")
	if p.err != nil {
		return 0
	}
	n := &p.nodes[argument]
	switch name {
	case "has":
		if n.does != opAttribute || !selected {
			p.fail(at, "has takes the selection of a field, such as has(response.code)")
			return 0
		}
		n.does = opHas
		return argument
	case "duration":
		d, err := time.ParseDuration(string(n.value.text))
		if n.does != opLiteral || n.value.kind != kindText || err != nil {
			p.fail(at, `duration takes a constant, such as duration("250ms")`)
			return 0
		}
		n.value = value{kind: kindDuration, number: int64(d)}
		return argument
	}
	return p.add(node{does: does, a: argument})
}

// method reads the arguments of a method of left.
func (p *parser) method(left int32, name string, at int) int32 {
	p.expect("(")
	if name == "size" {
		p.expect(")")
		return p.add(node{does: opSize, a: left})
	}
	does, known := map[string]operation{"contains": opContains, "startsWith": opStartsWith, "endsWith": opEndsWith, "matches": opMatches}[name]
	if !known {
		p.fail(at, "the method "+name+" is not supported")
		return 0
	}
	n := node{does: does, a: left, b: p.choice()}
	p.expect(")")
	if p.err == nil && does == opMatches {
		pattern := p.nodes[n.b].value
		var err error
		if n.matches, err = regexp.Compile(string(pattern.text)); err != nil || p.nodes[n.b].does != opLiteral || pattern.kind != kindText {
			p.fail(at, "matches takes a constant regular expression of RE2")
			return 0
		}
	}
	return p.add(n)
}
