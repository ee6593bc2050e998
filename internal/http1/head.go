// Package http1 implements the wire format of HTTP/1 (RFC 9112): parsing a head, the framing of its body, the
// hop-by-hop fields that are not forwarded, and finding the end of a body.
//
// It does no I/O and has no policy. A Head holds offsets into the caller's buffer and copies nothing, so a message is
// forwarded with its own bytes: case, order and white space within values are preserved. Every accepted message has
// only one interpretation. A message that two recipients could interpret differently is an Error: if we ended a request
// at one byte and the next hop at another, the difference would be a smuggled request (RFC 9112 §11.2).
//
// The parser is laxer than the grammar in three places, for existing programs: up to four empty lines before a request
// are skipped; several equal Content-Lengths count as one; and control characters other than NUL, CR and LF are allowed
// in field values, where this package never treats them as white space (RFC 9110 §5.5). Every line ends with CRLF: a
// recipient may accept a bare LF (RFC 9112 §2.2), but a proxy that turned it into CRLF would make a line of what an
// origin that rejects it, such as Node or Apache, takes for a part of a value.
package http1

import "bytes"

// Limits bound a head, and the trailers of a chunked body.
type Limits struct {
	Head   int // bytes, with line ends and the empty line; zero or less: DefaultHead; at most 1 GiB
	Fields int // field lines; zero or less: DefaultFields
}

// The limits of a zero Limits.
const (
	DefaultHead   = 64 << 10
	DefaultFields = 256
)

func (l Limits) head() int {
	if l.Head <= 0 {
		return DefaultHead
	}
	return min(l.Head, 1<<30) // offsets have 32 bits
}

func (l Limits) fields() int {
	if l.Fields <= 0 {
		return DefaultFields
	}
	return l.Fields
}

// Span is a range of offsets into the buffer that a head was parsed from. Its end is exclusive.
type Span struct{ Start, End uint32 }

// In returns the bytes of s in b.
func (s Span) In(b []byte) []byte { return b[s.Start:s.End] }

// Empty reports whether s contains no bytes.
func (s Span) Empty() bool { return s.Start == s.End }

// Field is one field line.
type Field struct {
	Line    Span  // without its line end
	Name    Span  // a token
	Value   Span  // without surrounding white space
	Known   Known // which known name it is, ignoring case
	Dropped bool  // AppendLines leaves it out
}

// Head is the start line and the fields of one message, as offsets into the buffer that it was parsed from. They are
// valid while the message begins at the buffer's first byte. The zero value is ready to parse. Callers may change
// Dropped only.
type Head struct {
	Line   Span // the start line, without its line end
	Method Span // of a request
	Target Span // of a request, in any form
	Status int  // of a response, 100 to 999
	Reason Span // of a response; may be empty
	Minor  int  // the x of HTTP/1.x
	Fields []Field
	Length int  // bytes up to the end of the empty line, skipped empty lines included; 0 until the head is complete
	Fault  Span // after an error: the line that it is about; empty if it is not about one line

	next    int    // where the next line begins
	seen    int    // no LF before this offset except those parsed
	skipped int    // empty lines before a request
	begun   bool   // the start line was parsed
	crlfs   int    // lines parsed
	edited  bool   // some line is shorter than in the buffer
	known   uint64 // a bit for each Known among Fields
}

// Reset prepares h for another head. It keeps the memory of Fields.
func (h *Head) Reset() { *h = Head{Fields: h.Fields[:0]} }

// ParseRequest continues parsing the request at the beginning of b. b must hold all bytes of the previous call at the
// same offsets, possibly in other memory. If it returns false without an error, it needs more bytes. Each byte is
// examined once, and the result does not depend on how the bytes were split.
//
// The error is an Error. The head is unusable after an error, except that Fault is set, and Method and Target if the
// request line was valid.
func (h *Head) ParseRequest(b []byte, limits Limits) (done bool, err error) {
	return h.parse(b, limits, true)
}

// ParseResponse is ParseRequest for a response. An interim response (1xx) counts as a head of its own.
func (h *Head) ParseResponse(b []byte, limits Limits) (done bool, err error) {
	return h.parse(b, limits, false)
}

// parse parses lines up to the empty one.
func (h *Head) parse(b []byte, limits Limits, request bool) (done bool, err error) {
	limit := limits.head()
	for h.Length == 0 && err == nil {
		i := bytes.IndexByte(b[h.seen:], '\n')
		if i < 0 && len(b) < limit {
			h.seen = len(b)
			return false, nil
		}
		start, end := h.next, h.seen+i
		if i < 0 || end >= limit {
			return false, ErrHeadTooLarge
		}
		h.next, h.seen = end+1, end+1
		bare := end == start || b[end-1] != '\r'
		if !bare {
			end--
			h.crlfs++
		}
		switch {
		case !h.begun && !request:
			err = h.statusLine(b, start, end)
		case !h.begun && (start < end || h.skipped == MaxEmptyLines):
			err = h.requestLine(b, start, end)
		case bare:
			// reported below; an error of a start line comes first, so that Method and Target are known
		case !h.begun:
			h.skipped++
		case start < end:
			err = h.field(b, start, end, limits)
		default:
			return h.finish(b, request)
		}
		if bare && err == nil {
			err = ErrBareLF
		}
		if err != nil {
			h.Fault = span(start, end)
		}
	}
	return err == nil, err
}

// MaxEmptyLines is how many empty lines may precede a request: RFC 9112 §2.2 asks for at least one.
const MaxEmptyLines = 4

// requestLine parses `method SP request-target SP HTTP/1.x` (RFC 9112 §3), with single spaces.
func (h *Head) requestLine(b []byte, start, end int) error {
	line := b[start:end]
	method := run(line, token)
	if method == 0 || method == len(line) || line[method] != ' ' {
		return ErrBadRequestLine
	}
	target := run(line[method+1:], targetByte)
	version := method + 1 + target + 1
	if target == 0 || version > len(line) || line[version-1] != ' ' {
		return ErrBadRequestLine
	}
	var ok bool
	if h.Minor, ok = minor(line[version:]); !ok {
		return ErrBadVersion
	}
	h.begun = true
	h.Line = span(start, end)
	h.Method = span(start, start+method)
	h.Target = span(start+method+1, start+version-1)
	return nil
}

// statusLine parses `HTTP/1.x SP 3DIGIT [SP reason]` (RFC 9112 §4). Some servers omit the second space together with
// the reason.
func (h *Head) statusLine(b []byte, start, end int) error {
	const status = len("HTTP/1.x ")
	line := b[start:end]
	if len(line) < status || line[status-1] != ' ' {
		return ErrBadStatusLine
	}
	var ok bool
	if h.Minor, ok = minor(line[:status-1]); !ok {
		return ErrBadVersion
	}
	code := line[status:]
	if len(code) < 3 || !digit(code[0]) || !digit(code[1]) || !digit(code[2]) || code[0] == '0' ||
		len(code) > 3 && code[3] != ' ' {
		return ErrBadStatusLine
	}
	h.begun = true
	h.Line = span(start, end)
	h.Status = int(code[0]-'0')*100 + int(code[1]-'0')*10 + int(code[2]-'0')
	h.Reason = span(min(start+status+4, end), end)
	return nil
}

// BeginsInterim reports whether b begins with the status line of an interim response, or is malformed (RFC 9110 §15.2).
// 101 is not one: no other response follows it.
func BeginsInterim(b []byte) bool {
	const code = len("HTTP/1.1 ")
	return len(b) >= code+3 && b[code] == '1' && string(b[code:code+3]) != "101"
}

// minor returns the digit x of HTTP/1.x.
func minor(version []byte) (int, bool) {
	if len(version) != len("HTTP/1.x") || string(version[:7]) != "HTTP/1." || !digit(version[7]) {
		return 0, false
	}
	return int(version[7] - '0'), true
}

// field parses `name: value` (RFC 9112 §5).
func (h *Head) field(b []byte, start, end int, limits Limits) error {
	line := b[start:end]
	name := run(line, token)
	if name == 0 || name == len(line) || line[name] != ':' {
		return fieldError(line)
	}
	if len(h.Fields) >= limits.fields() {
		return ErrTooManyFields
	}
	from, to := trim(line, name+1)
	known := knownName(line[:name])
	h.known |= 1 << known
	h.Fields = append(h.Fields, Field{
		Line:  span(start, end),
		Name:  span(start, start+name),
		Value: span(start+from, start+to),
		Known: known,
	})
	return nil
}

// fieldError returns the error of a field line that does not begin with a token and a colon.
func fieldError(line []byte) error {
	name, _, colon := bytes.Cut(line, []byte{':'})
	switch {
	case bytes.IndexByte(line, '\r') >= 0:
		return ErrBareCR
	case bytes.IndexByte(line, 0) >= 0:
		return ErrNUL
	case blank(line[0]):
		return ErrObsFold
	case !colon:
		return ErrNoColon
	case len(name) > 0 && blank(name[len(name)-1]):
		return ErrSpaceBeforeColon
	}
	return ErrBadFieldName
}

// finish validates the complete head. If the number of CRs equals the number of lines, there is no CR elsewhere.
func (h *Head) finish(b []byte, request bool) (done bool, err error) {
	head := b[:h.next]
	switch {
	case bytes.Count(head, cr) != h.crlfs:
		return false, h.faultyLine(b, '\r', ErrBareCR)
	case bytes.IndexByte(head, 0) >= 0:
		return false, h.faultyLine(b, 0, ErrNUL)
	}
	if request {
		if err := h.checkHost(b); err != nil {
			return false, err
		}
	}
	h.Length = len(head)
	return true, nil
}

// faultyLine sets Fault to the first line that contains c, and returns err.
func (h *Head) faultyLine(b []byte, c byte, err Error) error {
	h.Fault = h.Line
	for i := range h.Fields {
		if bytes.IndexByte(h.Fault.In(b), c) >= 0 {
			break
		}
		h.Fault = h.Fields[i].Line
	}
	return err
}

// faultyField sets Fault to the line of field i, and returns err.
func (h *Head) faultyField(i int, err Error) error {
	h.Fault = h.Fields[i].Line
	return err
}

var cr = []byte{'\r'}

// checkHost enforces RFC 9112 §3.2: exactly one Host, optional only in HTTP/1.0, with a valid value. The value may be
// empty, as for a target without authority.
func (h *Head) checkHost(b []byte) error {
	i := h.Find(Host)
	switch {
	case i < 0 && h.Minor == 0:
		return nil
	case i < 0:
		return ErrMissingHost
	case h.after(i, Host) >= 0:
		return h.faultyField(h.after(i, Host), ErrRepeatedHost)
	}
	if host := h.Fields[i].Value.In(b); run(host, hostByte) != len(host) {
		return h.faultyField(i, ErrBadHost)
	}
	return nil
}

// Authority returns the host that a request is for, with its port: that of an absolute target, or of Host. Origins prefer
// the target as well (RFC 9112 §3.2.2). It is nil if the request has neither. h may be incomplete.
func (h *Head) Authority(b []byte) []byte {
	if authority := absolute(h.Target.In(b)); len(authority) > 0 {
		return authority
	}
	if i := h.Find(Host); i >= 0 {
		return h.Fields[i].Value.In(b)
	}
	return nil
}

// absolute returns the host and port of a target in absolute form, nil in another form.
func absolute(target []byte) []byte {
	i := bytes.Index(target[:min(len(target), len("https://"))], []byte("://"))
	if i < 0 || !same(target[:i], "http") && !same(target[:i], "https") {
		return nil
	}
	authority := target[i+len("://"):]
	if end := bytes.IndexAny(authority, "/?#"); end >= 0 {
		authority = authority[:end]
	}
	return authority[bytes.LastIndexByte(authority, '@')+1:]
}

// Find returns the index of the first kept field of kind k, or -1.
func (h *Head) Find(k Known) int {
	if h.known&(1<<k) == 0 {
		return -1
	}
	return h.after(-1, k)
}

// Has reports whether a field of kind k is kept.
func (h *Head) Has(k Known) bool { return h.Find(k) >= 0 }

// after returns the index of the first kept field of kind k after field i, or -1.
func (h *Head) after(i int, k Known) int {
	for i++; i < len(h.Fields); i++ {
		if h.Fields[i].Known == k && !h.Fields[i].Dropped {
			return i
		}
	}
	return -1
}

func span(start, end int) Span { return Span{uint32(start), uint32(end)} }
