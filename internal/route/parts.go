package route

import (
	"bytes"
	"iter"
	"strings"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

// Matcher matches requests as a route does. It is for filters that have the match of a route.
type Matcher struct{ route route }

// NewMatcher compiles m.
func NewMatcher(m *mesh.RouteMatch) *Matcher {
	matcher := &Matcher{}
	var p patterns
	matcher.route.compile(&mesh.Route{Match: *m}, &p)
	return matcher
}

// Match reports whether a request matches. A match that is not understood counts by its path.
func (m *Matcher) Match(r *Request) bool {
	return m.route.miss(&search{Request: r, path: plain(origin(r.Path))}).kind == matched
}

// SetField returns an edit that replaces a field.
func SetField(name, value string) Edit {
	return Edit{Name: strings.ToLower(name), Action: mesh.OverwriteOrAdd, KeepEmpty: true, value: value}
}

// AddField returns an edit that adds a field besides those that there are.
func AddField(name, value string) Edit {
	return Edit{Name: strings.ToLower(name), Action: mesh.AppendOrAdd, KeepEmpty: true, value: value}
}

// Lookup returns the values of a header field, joined by commas, and their number. fields may be nil.
func Lookup(fields Fields, name string) (value []byte, n int) { return lookup(fields, name) }

// Parameters yields the values of a parameter in the query of a request's target, as they are.
func Parameters(target []byte, name string) iter.Seq[[]byte] {
	return func(yield func([]byte) bool) {
		_, rest, _ := bytes.Cut(target, []byte("?"))
		for len(rest) > 0 {
			var pair []byte
			pair, rest, _ = bytes.Cut(rest, []byte("&"))
			if key, value, _ := bytes.Cut(pair, []byte("=")); string(key) == name && !yield(value) {
				return
			}
		}
	}
}

// Cookie returns the value of a cookie. fields may be nil.
func Cookie(fields Fields, name string) (value []byte, present bool) { return cookie(fields, name) }
