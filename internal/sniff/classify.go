package sniff

import (
	"bytes"

	"github.com/pillion-proxy/pillion/internal/flow"
)

// Protocol is what the first bytes of a connection are.
type Protocol uint8

// The protocols.
const (
	Undecided Protocol = iota // more bytes are needed
	HTTP1                     // a whole request line of HTTP/1.x
	HTTP2                     // the client's connection preface
	TLS                       // a whole ClientHello
	Opaque                    // something else
)

// Flow is the protocol as a connection's record has it. Which HTTP/1.x it is, each request says itself.
func (p Protocol) Flow() flow.Protocol {
	return [...]flow.Protocol{HTTP1: flow.HTTP11, HTTP2: flow.HTTP2, TLS: flow.TLS, Undecided: flow.Opaque, Opaque: flow.Opaque}[p]
}

// preface is how an HTTP/2 client begins (RFC 9113 §3.4).
const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

// Limit is how many bytes are looked at. What cannot be decided by then is opaque.
const Limit = 16 << 10

// Classify judges what a connection begins with. It never errs towards HTTP: a method alone is not enough, as SIP, RTSP
// and ICY have the same ones, so the whole request line is looked at, with its version. What can no longer become one of
// the known protocols is opaque at its first wrong byte.
func Classify(first []byte) Protocol {
	if len(first) == 0 {
		return Undecided
	}
	first = first[:min(len(first), Limit)]
	protocol := Opaque
	switch {
	case first[0] == recordHandshake:
		_, protocol = parseHello(first)
	case first[0] == 'P' && bytes.HasPrefix(first, []byte(preface)):
		return HTTP2
	case first[0] == 'P' && bytes.HasPrefix([]byte(preface), first):
		protocol = Undecided
	default:
		protocol = classifyLine(first)
	}
	if protocol == Undecided && len(first) == Limit {
		return Opaque
	}
	return protocol
}

// classifyLine judges a request line: method SP request-target SP HTTP/1.DIGIT (RFC 9112 §3), ended by CRLF, or by LF
// alone as old clients do.
func classifyLine(first []byte) Protocol {
	line, whole := first, false
	if end := bytes.IndexByte(first, '\n'); end >= 0 {
		line, whole = bytes.TrimSuffix(first[:end], []byte{'\r'}), true
	}
	method := 0
	for method < len(line) && methodByte(line[method]) {
		method++
	}
	if method > maxMethod {
		return Opaque
	}
	if method == len(line) && !whole {
		return Undecided
	}
	if method == 0 || method == len(line) || line[method] != ' ' {
		return Opaque
	}
	rest := line[method+1:]
	target := 0
	for target < len(rest) && targetByte(rest[target]) {
		target++
	}
	if target == len(rest) && !whole {
		return Undecided
	}
	if target == 0 || target == len(rest) || rest[target] != ' ' {
		return Opaque
	}
	return classifyVersion(rest[target+1:], whole)
}

// version is what a request line ends with, but for one digit and a CR that may still stand there.
const version = "HTTP/1."

func classifyVersion(text []byte, whole bool) Protocol {
	name := text[:min(len(text), len(version))]
	if !bytes.HasPrefix([]byte(version), name) {
		return Opaque
	}
	minor := text[len(name):]
	if whole {
		if len(minor) == 1 && digit(minor[0]) {
			return HTTP1
		}
		return Opaque
	}
	if len(minor) == 0 || digit(minor[0]) && (len(minor) == 1 || len(minor) == 2 && minor[1] == '\r') {
		return Undecided
	}
	return Opaque
}

// maxMethod is the length of the longest method that is looked for. The longest one that is registered has 17 letters.
const maxMethod = 32

// methodByte reports whether c may stand in a method. The grammar allows any token, but every method that is registered,
// and nearly every other, is made of these; and what may begin a request is held until it is known, so the less the
// better: most words of other protocols go on at their first letter.
func methodByte(c byte) bool { return 'A' <= c && c <= 'Z' || digit(c) || c == '-' || c == '_' }

// targetByte reports whether c may stand in a request target. Bytes above ASCII are not allowed there, and sent all the
// same.
func targetByte(c byte) bool { return c > ' ' && c != 0x7f }

func digit(c byte) bool { return '0' <= c && c <= '9' }
