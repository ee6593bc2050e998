package http2

import (
	"errors"
	"strconv"
	"strings"
)

// The two kinds of malformed message (RFC 9113 §8.1.1).
var (
	ErrField   = errors.New("HTTP/2: invalid field")
	ErrMessage = errors.New("HTTP/2: malformed message")
)

// Request holds the pseudo-fields of a request, and its declared length.
type Request struct {
	Method, Scheme, Authority, Path string
	Protocol                        string // of an extended CONNECT (RFC 8441)
	ContentLength                   int64  // -1: not declared
}

// Tunnel reports whether a successful response turns the stream into a tunnel.
func (r *Request) Tunnel() bool { return r.Method == "CONNECT" }

// ParseRequest validates the fields of a request. The error is ErrField or ErrMessage. The values parsed before it are
// returned as well.
//
// White space around a value is accepted although RFC 9113 §8.2.1 forbids it: it is harmless, and some clients send it.
func ParseRequest(fields []Field) (Request, error) {
	r := Request{ContentLength: -1}
	for i := range fields {
		f := &fields[i]
		if !f.IsPseudo() {
			err := checkFields(fields[i:], &r.ContentLength)
			if err == nil {
				err = r.check()
			}
			return r, err
		}
		to := r.pseudo(f.Name)
		if to == nil || *to != "" || f.Value == "" || !visible(f.Value) {
			return r, ErrMessage
		}
		*to = f.Value
	}
	return r, r.check()
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
	case !token(r.Method):
		return ErrMessage
	case r.Method == "CONNECT" && r.Protocol == "":
		if r.Authority == "" || r.Scheme != "" || r.Path != "" {
			return ErrMessage
		}
	case r.Protocol != "" && (r.Method != "CONNECT" || r.Authority == ""), r.Scheme == "", r.Path == "":
		return ErrMessage
	}
	return nil
}

// Response holds the status and the declared length of a response.
type Response struct {
	Status        int
	ContentLength int64 // -1: not declared
}

// Interim reports whether another response follows (RFC 9110 §15.2).
func (r *Response) Interim() bool { return r.Status < 200 }

// ParseResponse validates the fields of a response. The errors are those of ParseRequest.
func ParseResponse(fields []Field) (Response, error) {
	r := Response{ContentLength: -1}
	if len(fields) == 0 || fields[0].Name != ":status" || len(fields[0].Value) != 3 {
		return r, ErrMessage
	}
	status, err := strconv.ParseUint(fields[0].Value, 10, 16)
	if err != nil || status < 100 || status == 101 { // HTTP/2 cannot switch protocols (RFC 9113 §8.6)
		return r, ErrMessage
	}
	r.Status = int(status)
	return r, checkFields(fields[1:], &r.ContentLength)
}

// CheckTrailers validates trailer fields. The errors are those of ParseRequest.
func CheckTrailers(fields []Field) error {
	var length int64 = -1
	return checkFields(fields, &length)
}

// checkFields validates fields other than pseudo-fields (RFC 9113 §8.2), and parses the declared length.
func checkFields(fields []Field, length *int64) error {
	for i := range fields {
		f := &fields[i]
		if !lowerToken(f.Name) || strings.ContainsAny(f.Value, "\x00\r\n") {
			if f.IsPseudo() {
				return ErrMessage
			}
			return ErrField
		}
		if err := checkMeaning(f, length); err != nil {
			return err
		}
	}
	return nil
}

// checkMeaning rejects connection-specific fields, and parses the declared length.
func checkMeaning(f *Field, length *int64) error {
	switch f.Name {
	case "connection", "proxy-connection", "keep-alive", "transfer-encoding", "upgrade":
		return ErrMessage
	case "te":
		if f.Value != "trailers" {
			return ErrMessage
		}
	case "content-length":
		n, err := strconv.ParseUint(f.Value, 10, 63)
		if err != nil || *length >= 0 && *length != int64(n) {
			return ErrMessage
		}
		*length = int64(n)
	}
	return nil
}

// Classes of bytes.
const (
	inName  = 1 << iota // allowed in a field name: a token without upper-case letters
	inToken             // allowed in a token (RFC 9110 §5.6.2)
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
	}
	return class
}()

func lowerToken(s string) bool { return all(s, inName) }
func token(s string) bool      { return all(s, inToken) }

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
