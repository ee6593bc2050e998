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
	HTTP1                     // a request line, valid or not: the parser judges it, as that of every later request
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

// Limit is the number of bytes that are inspected. See Late for a connection that is still undecided at the limit.
const Limit = 16 << 10

// classify determines the protocol from the first bytes of a connection. If in doubt it decides against HTTP: as SIP, RTSP
// and ICY share its methods, it requires a complete request line with the version. Input is opaque at the first byte that
// rules out every known protocol.
//
// A line that the HTTP/1 parser accepts is HTTP1, however unusual, unless its method is: see methodByte. So is a malformed
// line with a common method that some servers accept, such as one with two spaces: the parser rejects it. Otherwise such a
// request would reach the server unseen when it is the first one of a connection.
func classify(first []byte) Protocol {
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
		return Late(first)
	}
	return protocol
}

// Late returns the verdict on first bytes that do not decide, when no more are waited for. A common method and the
// beginning of a path are taken for a request that pauses in its first line, or has a long one. It is served under the
// timeout and the limit of a head then, as it would be behind another request.
func Late(first []byte) Protocol {
	line := withoutEmptyLines(first)
	if common, n := commonMethod(line); common == wholeMethod && beginsPath(line[n:]) {
		return HTTP1
	}
	return Opaque
}

// beginsPath reports whether what follows a method begins with a path, or with a URL of HTTP.
func beginsPath(rest []byte) bool {
	target := bytes.TrimLeft(rest, " \t")
	for _, form := range [...]string{"/", "http://", "https://"} {
		if len(target) >= len(form) && equalFold(target[:len(form)], form) {
			return true
		}
	}
	return false
}

// classifyLine checks for a request line: method SP request-target SP HTTP/1.DIGIT (RFC 9112 §3), terminated by CRLF. Empty
// lines before it do not count (RFC 9112 §2.2).
func classifyLine(first []byte) Protocol {
	line, whole := withoutEmptyLines(first), false
	if len(line) == 0 {
		return Undecided
	}
	if end := bytes.IndexByte(line, '\n'); end >= 0 {
		line, whole = bytes.TrimSuffix(line[:end], []byte{'\r'}), true
	}
	common, n := commonMethod(line)
	switch {
	case common == wholeMethod:
		return classifyCommon(line[n:], whole)
	case common == partOfMethod && !whole:
		return Undecided
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

// withoutEmptyLines returns first without the line ends and white space before its first word. The parser limits how many
// there are.
func withoutEmptyLines(first []byte) []byte {
	n := 0
	for n < len(first) && (first[n] == '\r' || first[n] == '\n' || first[n] == ' ' || first[n] == '\t') {
		n++
	}
	return first[n:]
}

// commonMethods are the methods of RFC 9110 and RFC 5789. They are recognised in any case, as browsers send patch.
var commonMethods = [...]string{"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"}

// methodMatch is how the beginning of a line compares with the common methods.
type methodMatch uint8

const (
	otherMethod  methodMatch = iota
	partOfMethod             // the line is the beginning of one, or a whole one without what follows
	wholeMethod              // one of them and white space
)

// commonMethod looks for a common method at the beginning of line, and returns its length.
func commonMethod(line []byte) (methodMatch, int) {
	for _, method := range commonMethods {
		n := len(method)
		if len(line) > 0 && line[0]|0x20 != method[0]|0x20 {
			continue // the usual case, decided without a call
		}
		switch {
		case len(line) > n && equalFold(line[:n], method) && (line[n] == ' ' || line[n] == '\t'):
			return wholeMethod, n
		case len(line) <= n && equalFold(line, method[:len(line)]):
			return partOfMethod, n
		}
	}
	return otherMethod, 0
}

// equalFold reports whether p equals text, ignoring the case of letters. text consists of letters, colons and slashes.
func equalFold(p []byte, text string) bool {
	for i, c := range p {
		if t := text[i]; c != t && (c|0x20 != t|0x20 || t|0x20 < 'a') {
			return false
		}
	}
	return true
}

// classifyCommon checks what follows a common method: a line that ends with a version of HTTP that servers accept for
// HTTP/1. A control character makes it malformed behind the beginning of a path, and otherwise another protocol.
func classifyCommon(rest []byte, whole bool) Protocol {
	for i, c := range rest {
		end := c == '\r' && i == len(rest)-1 && !whole
		if c >= ' ' && c != 0x7f || c == '\t' || end {
			continue
		}
		if beginsPath(rest[:i]) {
			return HTTP1
		}
		return Opaque
	}
	if !whole {
		return Undecided
	}
	rest = bytes.TrimRight(rest, " \t")
	text := rest[bytes.LastIndexAny(rest, " \t")+1:]
	const name = "HTTP/"
	if len(text) > len(name) && equalFold(text[:len(name)], name) && '0' <= text[len(name)] && text[len(name)] <= '2' {
		return HTTP1
	}
	return Opaque
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

// methodByte reports whether c is accepted in a method that is not a common one. The grammar allows any token, but all
// registered methods, and nearly all others, consist of these characters. The set is small on purpose: input that may
// begin a request is held until it is decided, and this set lets most words of other protocols pass at their first
// letter.
func methodByte(c byte) bool { return 'A' <= c && c <= 'Z' || digit(c) || c == '-' || c == '_' }

// targetByte reports whether c is accepted in a request target. The grammar forbids bytes above ASCII, but clients send
// them.
func targetByte(c byte) bool { return c > ' ' && c != 0x7f }

func digit(c byte) bool { return '0' <= c && c <= '9' }
