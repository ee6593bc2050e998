package sniff

import "bytes"

// classifyWarily is classify for a connection whose requests must not pass unseen. What is opaque otherwise is HTTP1 if a
// lenient server may take it for a request, and undecided while it may become one: a line of any method, with any version
// of HTTP or with none but a whole URL (HTTP/0.9).
func classifyWarily(first []byte) Protocol {
	protocol := classify(first)
	if protocol != Opaque {
		return protocol
	}
	first = first[:min(len(first), Limit)]
	if protocol = resemblesRequest(withoutEmptyLines(first)); protocol == Undecided && len(first) == Limit {
		return HTTP1
	}
	return protocol
}

func resemblesRequest(line []byte) Protocol {
	whole := false
	if end := bytes.IndexByte(line, '\n'); end >= 0 {
		line, whole = line[:end], true
	}
	line = bytes.TrimSuffix(line, []byte{'\r'})
	method := 0
	for method < len(line) && tokenByte(line[method]) {
		method++
	}
	rest := line[method:]
	switch {
	case method == len(line) && !whole:
		return Undecided
	case method == 0, method == len(line), rest[0] != ' ' && rest[0] != '\t', bytes.ContainsFunc(rest, control):
		return Opaque
	case !whole:
		return Undecided
	}
	for _, scheme := range [...]string{"http://", "https://"} {
		if target := bytes.TrimLeft(rest, " \t"); len(target) >= len(scheme) && equalFold(target[:len(scheme)], scheme) {
			return HTTP1
		}
	}
	for word := range bytes.FieldsSeq(rest) {
		if len(word) >= len("HTTP/") && equalFold(word[:len("HTTP/")], "HTTP/") {
			return HTTP1
		}
	}
	return Opaque
}

func control(r rune) bool { return r < ' ' && r != '\t' || r == 0x7f }

// tokenByte reports whether c is one of a token (RFC 9110 §5.6.2), as the grammar has it for methods.
func tokenByte(c byte) bool {
	return 'a' <= c|0x20 && c|0x20 <= 'z' || digit(c) || bytes.IndexByte([]byte("!#$%&'*+-.^_`|~"), c) >= 0
}

// BeginsTLS reports whether bytes that are not a ClientHello begin like what some server of TLS accepts before one, or in its
// place: a handshake that cannot be parsed, a record with a version that does not exist, or an alert or a change of keys
// before the handshake.
func BeginsTLS(first []byte) bool {
	const changeCipherSpec, alert, maxVersionHigh = 20, 21, 15
	if len(first) == 0 || first[0] < changeCipherSpec || first[0] > recordHandshake || len(first) > 1 && first[1] > maxVersionHigh {
		return false
	}
	if first[0] == recordHandshake {
		return len(first) > 1 && first[1] == recordVersionHigh || len(first) <= recordHeader || first[recordHeader] == clientHello
	}
	size := map[byte]int{changeCipherSpec: 1, alert: 2}[first[0]]
	length := first[min(len(first), 3):min(len(first), recordHeader)]
	return bytes.HasPrefix([]byte{0, byte(size)}, length)
}
