package authz

import (
	"bytes"
	"regexp"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

// text is a compiled mesh.StringMatcher.
type text struct {
	kind       mesh.MatchKind
	want       string
	ignoreCase bool           // of ASCII letters; not of regular expressions
	pattern    *regexp.Regexp // of MatchRegex; nil: it cannot be compiled
}

func compileText(m *mesh.StringMatcher) text {
	t := text{kind: m.Kind, want: m.Text, ignoreCase: m.IgnoreCase}
	if m.Kind == mesh.MatchRegex {
		t.pattern, _ = regexp.Compile(`^(?:` + m.Text + `)$`) // the whole text has to match
	}
	return t
}

func (t *text) match(b []byte) value {
	if t.kind != mesh.MatchRegex {
		return truth(contains(t, b))
	}
	if t.pattern == nil || !utf8.Valid(b) || bytes.IndexByte(b, '\n') >= 0 {
		return unmatchable
	}
	return truth(t.pattern.Match(b))
}

func (t *text) matchString(s string) value {
	if t.kind != mesh.MatchRegex {
		return truth(contains(t, s))
	}
	if t.pattern == nil || !utf8.ValidString(s) || strings.IndexByte(s, '\n') >= 0 {
		return unmatchable
	}
	return truth(t.pattern.MatchString(s))
}

// unmatchable is the value of a regular expression for a text that is not UTF-8 or has several lines. A dot matches such
// bytes in Go, but not in RE2: whether the author of a policy meant them is not known.
const unmatchable = unknown

// contains reports whether s has the text of t in the place that the kind of t demands.
func contains[T []byte | string](t *text, s T) bool {
	n := len(t.want)
	switch {
	case len(s) < n:
		return false
	case t.kind == mesh.MatchExact:
		return len(s) == n && equal(t, s)
	case t.kind == mesh.MatchPrefix:
		return equal(t, s[:n])
	case t.kind == mesh.MatchSuffix:
		return equal(t, s[len(s)-n:])
	}
	for i := 0; i+n <= len(s); i++ {
		if equal(t, s[i:i+n]) {
			return true
		}
	}
	return false
}

// equal compares s with the text of t, which has its length.
func equal[T []byte | string](t *text, s T) bool {
	if !t.ignoreCase {
		return string(s) == t.want
	}
	for i := range len(t.want) {
		if lower(s[i]) != lower(t.want[i]) {
			return false
		}
	}
	return true
}

func lower(c byte) byte {
	if 'A' <= c && c <= 'Z' {
		return c + 'a' - 'A'
	}
	return c
}

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
		met = c.text.match(b)
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
