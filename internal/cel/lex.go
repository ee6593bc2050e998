package cel

import (
	"strconv"
	"strings"
	"unicode/utf8"
)

// token is a lexical element. Punctuation has its text as kind.
type token struct {
	kind  string // "name", "literal", "end", or punctuation
	text  string // of a name
	value value  // of a literal
	at    int    // index in the text
}

// or is the operator of disjunction.
const or = "|" + "|"

// punctuation has the longer ones first.
var punctuation = []string{"&&", or, "==", "!=", "<=", ">=", "<", ">", "!", "?", ":", "(", ")", "[", "]", ".", ",", "+", "-", "*", "/", "%"}

// next reads the next token into p.token.
func (p *parser) next() {
	for p.at < len(p.text) && strings.IndexByte(" \t\n\r\f", p.text[p.at]) >= 0 {
		p.at++
	}
	if strings.HasPrefix(p.text[p.at:], "//") {
		p.fail(p.at, "comments are not supported")
	}
	start := p.at
	p.token = token{kind: "end", at: start}
	if start == len(p.text) {
		return
	}
	switch c := p.text[start]; {
	case c >= '0' && c <= '9', c == '.' && start+1 < len(p.text) && isDigit(p.text[start+1]):
		p.number()
	case c == '"' || c == '\'':
		p.quoted(false)
	case isNameStart(c):
		p.name()
	default:
		p.mark()
	}
}

// mark reads punctuation.
func (p *parser) mark() {
	start := p.at
	for _, mark := range punctuation {
		if strings.HasPrefix(p.text[start:], mark) {
			p.at += len(mark)
			p.token.kind = mark
			return
		}
	}
	r, _ := utf8.DecodeRuneInString(p.text[start:])
	p.fail(start, "unexpected "+strconv.QuoteRune(r))
}

// name reads a name, a keyword, or a string with a prefix.
func (p *parser) name() {
	start := p.at
	for p.at < len(p.text) && (isNameStart(p.text[p.at]) || isDigit(p.text[p.at])) {
		p.at++
	}
	text := p.text[start:p.at]
	if p.at < len(p.text) && (p.text[p.at] == '"' || p.text[p.at] == '\'') {
		if text != "r" && text != "R" {
			p.fail(start, "strings with the prefix "+text+" are not supported")
			return
		}
		p.quoted(true)
		return
	}
	switch text {
	case "true", "false":
		p.literal(truth(text == "true"))
	case "null":
		p.literal(value{kind: kindNull})
	case "in":
		p.token.kind = "in"
	default:
		p.token.kind, p.token.text = "name", text
	}
}

func (p *parser) literal(v value) { p.token.kind, p.token.value = "literal", v }

func isDigit(c byte) bool { return c >= '0' && c <= '9' }

func isNameStart(c byte) bool { return c == '_' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' }

// number reads an integer or a floating-point number without its sign.
func (p *parser) number() {
	start := p.at
	hex := strings.HasPrefix(p.text[start:], "0x")
	if hex {
		p.at += 2
	}
	real := false
	for ; p.at < len(p.text); p.at++ {
		c := p.text[p.at]
		switch {
		case isDigit(c), hex && (c >= 'a' && c <= 'f' || c >= 'A' && c <= 'F'):
			continue
		case !hex && c == '.' && !real && p.at+1 < len(p.text) && isDigit(p.text[p.at+1]):
			real = true
			continue
		case !hex && (c == 'e' || c == 'E'):
			real = true
			if p.at+1 < len(p.text) && (p.text[p.at+1] == '+' || p.text[p.at+1] == '-') {
				p.at++
			}
			continue
		}
		break
	}
	text := p.text[start:p.at]
	if p.at < len(p.text) && isNameStart(p.text[p.at]) {
		p.fail(start, "unsigned numbers are not supported")
		return
	}
	if real {
		f, err := strconv.ParseFloat(text, 64)
		if err != nil {
			p.fail(start, "the number "+text+" is malformed")
			return
		}
		p.literal(value{kind: kindDouble, real: f})
		return
	}
	base, digits := 10, text
	if hex {
		base, digits = 16, text[2:]
	}
	n, err := strconv.ParseInt(digits, base, 64)
	if err != nil {
		p.fail(start, "the number "+text+" is malformed or too large")
		return
	}
	p.literal(value{kind: kindInt, number: n})
}

// quoted reads a string from its quotation mark on.
func (p *parser) quoted(raw bool) {
	start := p.at
	mark := p.text[start : start+1]
	if long := strings.Repeat(mark, 3); strings.HasPrefix(p.text[start:], long) {
		mark = long
	}
	p.at += len(mark)
	var text []byte
	for {
		switch rest := p.text[p.at:]; {
		case rest == "", len(mark) == 1 && (rest[0] == '\n' || rest[0] == '\r'):
			p.fail(start, "the string has no end")
			return
		case strings.HasPrefix(rest, mark):
			p.at += len(mark)
			p.literal(value{kind: kindText, text: text})
			return
		case rest[0] == '\\' && !raw:
			if text = p.escape(text); p.err != nil {
				return
			}
		default:
			text = append(text, p.text[p.at])
			p.at++
		}
	}
}

// escapes are those of one letter.
const escapes = "a\ab\bf\fn\nr\rt\tv\v\\\\??\"\"''``"

// escape appends the character of an escape sequence.
func (p *parser) escape(text []byte) []byte {
	start := p.at
	if start+1 == len(p.text) {
		p.fail(start, "the string has no end")
		return text
	}
	letter := p.text[start+1]
	for i := 0; i < len(escapes); i += 2 {
		if escapes[i] == letter {
			p.at += 2
			return append(text, escapes[i+1])
		}
	}
	digits, base, skip := 0, 16, 2
	switch letter {
	case 'x', 'X':
		digits = 2
	case 'u':
		digits = 4
	case 'U':
		digits = 8
	case '0', '1', '2', '3':
		digits, base, skip = 3, 8, 1
	}
	end := start + skip + digits
	if digits == 0 || end > len(p.text) {
		p.fail(start, "unknown escape sequence")
		return text
	}
	n, err := strconv.ParseUint(p.text[start+skip:end], base, 32)
	if r := rune(n); err != nil || n > utf8.MaxRune || !utf8.ValidRune(r) {
		p.fail(start, "the escape sequence is not a character")
		return text
	}
	p.at = end
	return utf8.AppendRune(text, rune(n))
}
