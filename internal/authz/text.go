package authz

import (
	"strconv"
	"strings"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

// header matches a header field. The values of a repeated field are joined by commas. A missing field does not match, even
// if the matcher is inverted, except if the presence of the field is what is matched, or it counts as empty.
func (c *condition) header(r *Request) value {
	h := c.Header
	b, present := c.field(r)
	var met value
	switch {
	case h.Kind == mesh.HeaderPresence:
		met = truth(present == h.Present)
	case !present && !h.MissingIsEmpty:
		return no
	case h.Kind == mesh.HeaderRange:
		n, err := strconv.ParseInt(string(b), 10, 64)
		met = truth(err == nil && h.Start <= n && n < h.End)
	default:
		met = c.text.Match(b)
	}
	if h.Invert {
		return -met
	}
	return met
}

// field returns the value of the header field that c looks at.
func (c *condition) field(r *Request) (value []byte, present bool) {
	if c.name != notPseudo {
		return r.pseudo(c.name)
	}
	return r.value(c.Header.Name)
}

// pseudo is a pseudo-header field.
type pseudo uint8

const (
	notPseudo pseudo = iota
	pseudoMethod
	pseudoPath
	pseudoScheme
	pseudoAuthority
)

// pseudoOf returns the pseudo-header field of a name.
func pseudoOf(name string) pseudo {
	switch {
	case name == ":method":
		return pseudoMethod
	case name == ":path":
		return pseudoPath
	case name == ":scheme":
		return pseudoScheme
	case name == ":authority" || strings.EqualFold(name, "host"):
		return pseudoAuthority
	}
	return notPseudo
}

// pseudo returns the value of a pseudo-header field.
func (r *Request) pseudo(name pseudo) (value []byte, present bool) {
	switch name {
	case pseudoMethod:
		value = r.Method
	case pseudoPath:
		value = r.Path
	case pseudoScheme:
		value = r.Scheme
	case pseudoAuthority:
		value = r.Authority
	}
	return value, value != nil
}

// value returns the value of a header field that is not a pseudo-header field.
func (r *Request) value(name string) (value []byte, present bool) {
	if r.Fields == nil {
		return nil, false
	}
	found := 0
	for i := range r.Fields.Len() {
		key, v := r.Fields.At(i)
		if len(key) != len(name) || !strings.EqualFold(string(key), name) {
			continue
		}
		switch found++; found {
		case 1:
			value = v
			continue
		case 2:
			r.Scratch = append(r.Scratch[:0], value...)
		}
		r.Scratch = append(append(r.Scratch, ','), v...)
		value = r.Scratch
	}
	return value, found > 0
}
