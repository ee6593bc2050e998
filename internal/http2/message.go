package http2

import (
	"strconv"
	"strings"
)

// Request holds the pseudo-fields of a request, and its declared length.
type Request struct {
	Method, Scheme, Authority, Path string
	Protocol                        string // of an extended CONNECT (RFC 8441)
	ContentLength                   int64  // -1: not declared
	RepeatedLength                  bool   // the length is declared more than once: see SingleLength
}

// Tunnel reports whether a successful response turns the stream into a tunnel.
func (r *Request) Tunnel() bool { return r.Method == "CONNECT" }

// ParseRequest validates the fields of a request. The error is a Rule or a *FieldError. The values parsed before it are
// returned as well.
//
// White space around a value is accepted although RFC 9113 §8.2.1 forbids it: it is harmless, and some clients send it.
func ParseRequest(fields []Field) (Request, error) {
	r := Request{ContentLength: -1}
	pseudo := 0
	for ; pseudo < len(fields) && fields[pseudo].IsPseudo(); pseudo++ {
		f := &fields[pseudo]
		to := r.pseudo(f.Name)
		if to == nil || *to != "" || f.Value == "" || !visible(f.Value) {
			return r, fieldError(BadPseudoField, f)
		}
		*to = f.Value
	}
	c := checker{section: requestHead, authority: &r}
	err := c.check(fields[pseudo:])
	r.ContentLength, r.RepeatedLength = c.length()
	if err == nil {
		err = r.check()
	}
	return r, err
}

// pseudo returns the field of r for a pseudo-field, or nil if its name is unknown.
func (r *Request) pseudo(name string) *string {
	switch name {
	case ":method":
		return &r.Method
	case ":scheme":
		return &r.Scheme
	case ":authority":
		return &r.Authority
	case ":path":
		return &r.Path
	case ":protocol":
		return &r.Protocol
	}
	return nil
}

// check validates the combination of pseudo-fields (RFC 9113 §8.3.1 and §8.5, RFC 8441 §4).
func (r *Request) check() error {
	switch {
	case r.Method != "" && !token(r.Method):
		return BadPseudoField
	case r.Authority != "" && !host(r.Authority):
		return BadHost
	case r.Method == "CONNECT" && r.Protocol == "":
		if r.Authority == "" || r.Scheme != "" || r.Path != "" {
			return WrongPseudoFields
		}
	case r.Method == "", r.Protocol != "" && (r.Method != "CONNECT" || r.Authority == ""), r.Scheme == "", r.Path == "":
		return WrongPseudoFields
	}
	return nil
}

// Response holds the status and the declared length of a response.
type Response struct {
	Status         int
	ContentLength  int64 // -1: not declared
	RepeatedLength bool  // the length is declared more than once: see SingleLength
}

// Interim reports whether another response follows (RFC 9110 §15.2).
func (r *Response) Interim() bool { return r.Status < 200 }

// ParseResponse validates the fields of a response. The errors are those of ParseRequest.
func ParseResponse(fields []Field) (Response, error) {
	r := Response{ContentLength: -1}
	if len(fields) == 0 || fields[0].Name != ":status" || len(fields[0].Value) != 3 {
		return r, BadStatus
	}
	status, err := strconv.ParseUint(fields[0].Value, 10, 16)
	if err != nil || status < 100 || status == 101 { // HTTP/2 cannot switch protocols (RFC 9113 §8.6)
		return r, BadStatus
	}
	r.Status = int(status)
	c := checker{section: responseHead}
	err = c.check(fields[1:])
	r.ContentLength, r.RepeatedLength = c.length()
	return r, err
}

// CheckTrailers validates trailer fields. The errors are those of ParseRequest. Fields for framing, routing or the
// connection are rejected as in HTTP/1 (RFC 9110 §6.5.1), as a recipient may read trailers like a head.
func CheckTrailers(fields []Field) error {
	c := checker{section: trailers}
	return c.check(fields)
}

// section is a part of a message that has fields.
type section uint8

const (
	requestHead section = iota
	responseHead
	trailers
)

// checker validates the fields of one section, except pseudo-fields.
type checker struct {
	section   section
	authority *Request // of a request: Host is compared with its authority
	hosts     int
	lengths   int    // number of declared lengths
	text      string // of the first length
	declared  int64
}

// length returns the declared length, -1 if no length is declared, and whether it is declared more than once.
func (c *checker) length() (n int64, repeated bool) {
	if c.lengths == 0 {
		return -1, false
	}
	return c.declared, c.lengths > 1
}

// check validates fields (RFC 9113 §8.2).
func (c *checker) check(fields []Field) error {
	for i := range fields {
		f := &fields[i]
		rule := c.field(f)
		switch {
		case rule != 0:
		case f.IsPseudo():
			rule = BadPseudoField
		case !lowerToken(f.Name):
			rule = BadFieldName
		case breaksLine(f.Value):
			rule = BadFieldValue
		}
		if rule != 0 {
			return fieldError(rule, f)
		}
	}
	return nil
}

// breaksLine reports whether a value has a byte that RFC 9113 §8.2.1 forbids. Three searches for one byte are ten times as
// fast as one for a set of bytes, and a peer can repeat a long value by its index at the cost of one byte.
func breaksLine(value string) bool {
	return strings.IndexByte(value, '\n') >= 0 || strings.IndexByte(value, '\r') >= 0 || strings.IndexByte(value, 0) >= 0
}

// field validates a field by its name. It returns 0 if the field breaks no rule.
func (c *checker) field(f *Field) Rule {
	switch f.Name {
	case "connection", "proxy-connection", "keep-alive", "transfer-encoding", "upgrade":
		return ConnectionField
	case "te":
		if c.section != trailers && f.Value != "trailers" {
			return ConnectionField
		}
	case "host":
		if c.section == requestHead {
			return c.host(f.Value)
		}
	case "content-length":
		if c.section != trailers {
			return c.contentLength(f.Value)
		}
	case "expect", "http2-settings":
	default:
		return 0
	}
	if c.section == trailers {
		return ForbiddenTrailer
	}
	return 0
}

// host validates Host. It must not contradict :authority (RFC 9113 §8.3.1), because two recipients that prefer different
// ones would route the request differently.
func (c *checker) host(value string) Rule {
	c.hosts++
	switch r := c.authority; {
	case c.hosts > 1:
		return RepeatedHost
	case value != "" && !host(value):
		return BadHost
	case r.Authority != "" && !strings.EqualFold(withoutPort(r.Scheme, r.Authority), withoutPort(r.Scheme, value)):
		return HostDiffers
	}
	return 0
}

// withoutPort returns an authority without the default port of its scheme.
func withoutPort(scheme, authority string) string {
	switch scheme {
	case "http":
		return strings.TrimSuffix(authority, ":80")
	case "https":
		return strings.TrimSuffix(authority, ":443")
	}
	return authority
}

// contentLength parses a declared length. Equal lengths in several fields, or in a list, count as one (RFC 9110 §8.6).
func (c *checker) contentLength(list string) Rule {
	for more := true; more; {
		var text string
		text, list, more = strings.Cut(list, ",")
		if more || c.lengths > 0 {
			text = strings.Trim(text, " \t")
		}
		if c.lengths++; c.lengths > 1 {
			if text != c.text {
				return ContentLengthsDiffer
			}
			continue
		}
		n, err := strconv.ParseUint(text, 10, 63)
		if err != nil {
			return BadContentLength
		}
		c.text, c.declared = text, int64(n)
	}
	return 0
}

// SingleLength returns fields with one Content-Length that has one value, as RFC 9110 §8.6 demands of a recipient that
// forwards a repeated length. The fields have been validated, and are changed.
func SingleLength(fields []Field) []Field {
	kept, found := fields[:0], false
	for _, f := range fields {
		if f.Name == "content-length" {
			if found {
				continue
			}
			found = true
			f.Value, _, _ = strings.Cut(f.Value, ",")
			f.Value = strings.Trim(f.Value, " \t")
		}
		kept = append(kept, f)
	}
	return kept
}

// Classes of bytes.
const (
	inName  = 1 << iota // allowed in a field name: a token without upper-case letters
	inToken             // allowed in a token (RFC 9110 §5.6.2)
	inHost              // allowed in a host with a port (RFC 3986 §3.2.2), as in package http1
)

var class = func() (class [256]byte) {
	for c := range class {
		b := byte(c)
		switch {
		case 'A' <= b && b <= 'Z':
			class[c] = inToken
		case 'a' <= b && b <= 'z', '0' <= b && b <= '9', strings.IndexByte("!#$%&'*+-.^_`|~", b) >= 0:
			class[c] = inToken | inName
		}
		switch {
		case 'A' <= b && b <= 'Z', 'a' <= b && b <= 'z', '0' <= b && b <= '9', strings.IndexByte("-._~!$&'()*+,;=%:[]", b) >= 0:
			class[c] |= inHost
		}
	}
	return class
}()

func lowerToken(s string) bool { return all(s, inName) }
func token(s string) bool      { return all(s, inToken) }
func host(s string) bool       { return all(s, inHost) }

func all(s string, of byte) bool {
	for i := range len(s) {
		if class[s[i]]&of == 0 {
			return false
		}
	}
	return s != ""
}

// visible rejects bytes that would end a request line or one of its parts if the next hop turned the request into
// HTTP/1.
func visible(s string) bool {
	for i := range len(s) {
		if s[i] <= ' ' || s[i] == 0x7f {
			return false
		}
	}
	return true
}
