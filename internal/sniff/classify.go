package sniff

import (
	"bytes"

	"github.com/pillion-proxy/pillion/internal/flow"
)

// Protocol is the verdict on the first bytes of a connection.
type Protocol uint8

// The verdicts.
const (
	Undecided Protocol = iota // more bytes are needed
	HTTP1                     // a complete request line of HTTP/1.x
	HTTP2                     // the client's connection preface
	TLS                       // a complete ClientHello
	Opaque                    // something else
)

// Flow returns the protocol for a connection's record. The minor version of HTTP/1.x is taken from each request.
func (p Protocol) Flow() flow.Protocol {
	return [...]flow.Protocol{HTTP1: flow.HTTP11, HTTP2: flow.HTTP2, TLS: flow.TLS, Undecided: flow.Opaque, Opaque: flow.Opaque}[p]
}

// preface is the client connection preface of HTTP/2 (RFC 9113 §3.4).
const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

// Limit is the number of bytes that are inspected. A connection that is still undecided at the limit is opaque.
const Limit = 16 << 10

// Classify determines the protocol from the first bytes of a connection. If in doubt it decides against HTTP: as SIP, RTSP
// and ICY share its methods, it requires a complete request line with the version. Input is opaque at the first byte that
// rules out every known protocol.
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

// classifyLine checks for a request line: method SP request-target SP HTTP/1.DIGIT (RFC 9112 §3), terminated by CRLF, or
// by the bare LF of old clients.
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

// version is the end of a request line, without the minor version's digit and the optional CR.
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

// maxMethod is the longest accepted length of a method. The longest registered method has 17 letters.
const maxMethod = 32

// methodByte reports whether c is accepted in a method. The grammar allows any token, but all registered methods, and
// nearly all others, consist of these characters. The set is small on purpose: input that may begin a request is held until
// it is decided, and this set lets most words of other protocols pass at their first letter.
func methodByte(c byte) bool { return 'A' <= c && c <= 'Z' || digit(c) || c == '-' || c == '_' }

// targetByte reports whether c is accepted in a request target. The grammar forbids bytes above ASCII, but clients send
// them.
func targetByte(c byte) bool { return c > ' ' && c != 0x7f }

func digit(c byte) bool { return '0' <= c && c <= '9' }
