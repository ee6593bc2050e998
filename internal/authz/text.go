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
	b, present := r.value(h.Name)
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

// value returns the value of a header field by its name, which may be that of a pseudo-header field.
func (r *Request) value(name string) (value []byte, present bool) {
	switch {
	case name == ":method":
		return r.Method, r.Method != nil
	case name == ":path":
		return r.Path, r.Path != nil
	case name == ":scheme":
		return r.Scheme, r.Scheme != nil
	case name == ":authority" || strings.EqualFold(name, "host"):
		return r.Authority, r.Authority != nil
	case r.Fields == nil:
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
