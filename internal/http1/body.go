package http1

import (
	"bytes"
	"io"
	"math"
)

// The longest lines of chunk framing, with CRLF. A line is forwarded once it is complete, so a reader's buffer must be
// able to hold one.
const (
	maxChunkLine   = 4 << 10
	maxTrailerLine = 8 << 10
)

// Body finds the end of a body without storing any of it. The caller can mix two ways of passing the body: Scan parses
// bytes and returns how many belong to the body, and Skip counts payload that need not be parsed. The zero value is a
// body that has ended.
//
// Chunk framing is forwarded byte for byte, so RFC 9112 §7.1 is enforced strictly: every line ends with CRLF, and a
// size is 1 to 16 hexadecimal digits, followed by nothing but an extension, before whose semicolon white space is
// allowed. (nginx and HAProxy accept such an extension, net/http rejects it; no implementation reads a different size.)
type Body struct {
	kind   FramingKind
	state  bodyState
	left   int64 // payload bytes until the state changes
	bytes  int64
	limits Limits // remaining limits for trailers

	forbidden []byte                 // see Forbid
	refuses   func(name []byte) bool // see Refuse
}

type bodyState uint8

const (
	bodyDone  bodyState = iota
	bodyBytes           // payload of the body or of a chunk
	chunkLine           // a chunk size and its extensions
	chunkEnd            // the CRLF after the bytes of a chunk
	trailers            // trailer fields, and the empty line
)

// Start begins a body with framing f. The limits apply to its trailers.
func (x *Body) Start(f Framing, limits Limits) {
	*x = Body{kind: f.Kind, limits: Limits{Head: limits.head(), Fields: limits.fields()}}
	switch {
	case f.Kind == Sized && f.Length > 0:
		x.state, x.left = bodyBytes, f.Length
	case f.Kind == UntilClose:
		x.state, x.left = bodyBytes, math.MaxInt64
	case f.Kind == Chunked:
		x.state = chunkLine
	}
}

// Forbid makes the trailer fields that a comma-separated list names malformed. The list is kept. Start clears it.
func (x *Body) Forbid(names []byte) { x.forbidden = names }

// Refuse makes the trailer fields malformed for whose names refuses reports true. nil: none. Start clears it.
func (x *Body) Refuse(refuses func(name []byte) bool) { x.refuses = refuses }

// Scan parses the next bytes of the connection. The first n belong to the body and are valid: they may be forwarded
// unchanged. n is less than len(p) if the body ends there, if p ends within a line of chunk framing, or on an error. An
// incomplete line must be at the beginning of the next p, followed by more bytes; a buffer of 8 KiB holds every line.
// The error is an Error about the byte at n or a later one.
func (x *Body) Scan(p []byte) (n int, err error) {
	for n < len(p) && x.state != bodyDone {
		if x.state == bodyBytes {
			took := min(x.left, int64(len(p)-n))
			x.Skip(took)
			n += int(took)
			continue
		}
		took, err := x.line(p[n:])
		if took == 0 || err != nil {
			return n, err
		}
		n += took
	}
	return n, nil
}

// Line parses the next line of chunk framing, for a caller that takes the framing off. Payload is 0, and the body has not
// ended. It returns the length of the line, 0 if p does not hold all of it; the other rules are those of Scan. trailer is the
// line of a trailer field without its end, and nil for other lines.
func (x *Body) Line(p []byte) (n int, trailer []byte, err error) {
	field := x.state == trailers
	if len(p) > 0 {
		n, err = x.line(p)
	}
	if field && n > 2 && err == nil {
		trailer = p[:n-2]
	}
	return n, trailer, err
}

// Done reports whether the body has ended. A body that ends with the connection never does.
func (x *Body) Done() bool { return x.state == bodyDone }

// Payload returns how many of the next bytes are certainly payload, so that they may be moved without Scan: the rest of
// a sized body or of a chunk, math.MaxInt64 if the body ends with the connection, otherwise 0.
func (x *Body) Payload() int64 { return x.left }

// Skip records that n bytes, at most Payload, were forwarded without Scan.
func (x *Body) Skip(n int64) {
	x.bytes += n
	if x.kind == UntilClose {
		return
	}
	x.left -= n
	switch {
	case x.left > 0:
	case x.kind == Chunked:
		x.state = chunkEnd
	default:
		x.state = bodyDone
	}
}

// Bytes returns the number of payload bytes so far, without chunk framing.
func (x *Body) Bytes() int64 { return x.bytes }

// End returns nil if the body may end with the connection here, and io.ErrUnexpectedEOF otherwise.
func (x *Body) End() error {
	if x.state == bodyDone || x.kind == UntilClose {
		return nil
	}
	return io.ErrUnexpectedEOF
}

// line parses one line of chunk framing. It returns 0 if p does not hold the whole line.
func (x *Body) line(p []byte) (int, error) {
	switch x.state {
	case chunkEnd:
		return x.chunkEnd(p)
	case chunkLine:
		return x.chunkLine(p)
	}
	return x.trailer(p)
}

func (x *Body) chunkEnd(p []byte) (int, error) {
	if p[0] != '\r' || len(p) > 1 && p[1] != '\n' {
		return 0, ErrBadChunkEnd
	}
	if len(p) == 1 {
		return 0, nil
	}
	x.state = chunkLine
	return 2, nil
}

func (x *Body) chunkLine(p []byte) (int, error) {
	line, n, err := wholeLine(p, maxChunkLine, ErrChunkLineTooLong)
	if n == 0 || err != nil {
		return 0, err
	}
	size, err := chunkSize(line)
	if err != nil {
		return 0, err
	}
	if x.left = size; size > 0 {
		x.state = bodyBytes
	} else {
		x.state = trailers
	}
	return n, nil
}

// chunkSize parses `1*16HEXDIG [ BWS ";" extensions ]`.
func chunkSize(line []byte) (int64, error) {
	var size uint64
	digits := 0
	for ; digits < len(line); digits++ {
		v := hexadecimal(line[digits])
		if v < 0 {
			break
		}
		size = size<<4 | uint64(v)
	}
	if digits == 0 || digits > 16 || size > math.MaxInt64 {
		return 0, ErrBadChunkSize
	}
	if extensions := line[digits:]; len(extensions) > 0 {
		if from, to := trim(extensions, 0); from == to || extensions[from] != ';' {
			return 0, ErrBadChunkSize
		}
	}
	return int64(size), nil
}

func hexadecimal(c byte) int {
	switch {
	case digit(c):
		return int(c - '0')
	case 'a' <= c|0x20 && c|0x20 <= 'f':
		return int(c|0x20-'a') + 10
	}
	return -1
}

// noTrailer are the fields for framing, routing or the connection. They are not allowed in trailers (RFC 9110 §6.5.1 and
// §7.6.1), and are dangerous to recipients that read trailers like a head: Node closes the connection after a trailer
// Connection: close, under a request of another client that follows on it.
const noTrailer = hopByHop | 1<<ContentLength | 1<<TransferEncoding | 1<<Trailer | 1<<Expect | 1<<Host

// trailer parses a trailer field, or the empty line. A field of noTrailer, or one that Connection names, is an error:
// chunk framing is forwarded byte for byte, so a single field cannot be dropped.
func (x *Body) trailer(p []byte) (int, error) {
	line, n, err := wholeLine(p, min(maxTrailerLine, x.limits.Head), ErrTrailersTooLarge)
	if n == 0 || err != nil {
		return 0, err
	}
	if len(line) == 0 {
		x.state = bodyDone
		return n, nil
	}
	name := run(line, token)
	if name == 0 || name == len(line) || line[name] != ':' {
		return 0, fieldError(line)
	}
	if noTrailer&(1<<knownName(line[:name])) != 0 || x.forbids(line[:name]) {
		return 0, ErrForbiddenTrailer
	}
	if x.limits.Fields == 0 {
		return 0, ErrTooManyFields
	}
	x.limits.Head -= n
	x.limits.Fields--
	return n, nil
}

// forbids reports whether the caller forbids the field, as it does those that Connection names.
func (x *Body) forbids(name []byte) bool {
	return len(x.forbidden) > 0 && (x.forbidden[0] == everyName[0] || contains(x.forbidden, name)) || x.refuses != nil && x.refuses(name)
}

// contains reports whether a comma-separated list contains name, ignoring case.
func contains(list, name []byte) bool {
	for len(list) > 0 {
		var one []byte
		if one, list = element(list); bytes.EqualFold(one, name) {
			return true
		}
	}
	return false
}

// wholeLine returns the first line of p without its CRLF, and its length with CRLF. The length is 0 if p does not hold
// the whole line. tooLong is the error for a line longer than limit.
func wholeLine(p []byte, limit int, tooLong Error) (line []byte, n int, err error) {
	n = bytes.IndexByte(p[:min(len(p), limit)], '\n') + 1
	switch {
	case n == 0 && len(p) >= limit:
		return nil, 0, tooLong
	case n == 0:
		return nil, 0, nil
	case n == 1 || p[n-2] != '\r':
		return nil, 0, ErrBareLF
	}
	line = p[:n-2]
	switch {
	case bytes.IndexByte(line, '\r') >= 0:
		return nil, 0, ErrBareCR
	case bytes.IndexByte(line, 0) >= 0:
		return nil, 0, ErrNUL
	}
	return line, n, nil
}
