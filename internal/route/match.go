package route

import (
	"regexp"
	"strconv"
	"sync"
	"sync/atomic"

	"github.com/pillion-proxy/pillion/internal/match"
	"github.com/pillion-proxy/pillion/internal/mesh"
)

// search is a request that conditions are compared with. It remembers the header field that was looked up last: the
// conditions of neighbouring routes are often about the same one.
type search struct {
	*Request
	path []byte // that of Table.path

	name  string
	value []byte
	n     int
}

// field is Request.field.
func (s *search) field(name string) (value []byte, n int) {
	if name != s.name || name == "" {
		s.name = name
		s.value, s.n = s.Request.field(name)
	}
	return s.value, s.n
}

// miss is the condition of a route that a request does not meet.
type miss struct {
	kind  missKind
	index int // of the header, parameter or metadata matcher
}

type missKind uint8

const (
	matched missKind = iota
	missedPath
	missedHeader
	missedQuery
	missedMetadata
)

// miss returns the first condition that a request does not meet. Of a match that is not understood only the path counts, and
// a regular expression matches every path, so that the requests that it may be meant for are found.
func (r *route) miss(s *search) miss {
	if !r.matchPath(s.path) {
		return miss{kind: missedPath}
	}
	c := r.conditions
	if c == nil {
		return miss{}
	}
	for i := range c.headers {
		if !c.headers[i].match(s) {
			return miss{missedHeader, i}
		}
	}
	for i := range c.query {
		if !c.query[i].match(s.Path) {
			return miss{missedQuery, i}
		}
	}
	for i := range c.metadata {
		if !s.metadata(&c.metadata[i]) {
			return miss{missedMetadata, i}
		}
	}
	return miss{}
}

func (r *route) matchPath(path []byte) bool {
	m := &r.source.Match
	switch m.Kind {
	case mesh.PathExact:
		return len(path) == len(m.Path) && samePrefix(path, m.Path, m.IgnoreCase)
	case mesh.PathPrefix:
		return samePrefix(path, m.Path, m.IgnoreCase)
	case mesh.PathSeparatedPrefix:
		return samePrefix(path, m.Path, m.IgnoreCase) && (len(path) == len(m.Path) || path[len(m.Path)] == '/')
	}
	return m.Refused || r.path.match(path)
}

// samePrefix reports whether text begins with prefix.
func samePrefix(text []byte, prefix string, ignoreCase bool) bool {
	if len(text) < len(prefix) {
		return false
	}
	if ignoreCase {
		return equalFold(text[:len(prefix)], prefix)
	}
	return string(text[:len(prefix)]) == prefix
}

func (r *Request) metadata(m *mesh.MetadataMatcher) bool {
	if r.Metadata == nil {
		return m.Invert
	}
	return r.Metadata.Match(m) == match.Yes
}

// header is a compiled mesh.HeaderMatcher.
type header struct {
	source  *mesh.HeaderMatcher
	pattern *pattern // of a text that is a regular expression
}

func compileHeader(source *mesh.HeaderMatcher, p *patterns) header {
	h := header{source: source}
	if source.Kind == mesh.HeaderText && source.Text.Kind == mesh.MatchRegex {
		h.pattern = p.get(source.Text.Text)
	}
	return h
}

func (h *header) match(s *search) bool {
	m := h.source
	value, n := s.field(m.Name)
	switch {
	case m.Kind == mesh.HeaderPresence:
		return ((n > 0) == m.Present) != m.Invert
	case n == 0 && !m.MissingIsEmpty:
		return false
	case n > 1:
		return h.matchJoined(s.Request, n)
	}
	return h.matchValue(value) != m.Invert
}

// joined has buffers for the values of fields that occur several times.
var joined = sync.Pool{New: func() any { return new([]byte) }}

// matchJoined matches the values of a field that occurs several times.
func (h *header) matchJoined(r *Request, n int) bool {
	b := joined.Get().(*[]byte)
	defer joined.Put(b)
	*b = (*b)[:0]
	for i := range r.Fields.Len() {
		if name, value := r.Fields.At(i); equalFold(name, h.source.Name) {
			*b = append(*b, value...)
			if n--; n > 0 {
				*b = append(*b, ',')
			}
		}
	}
	return h.matchValue(*b) != h.source.Invert
}

func (h *header) matchValue(value []byte) bool {
	if h.source.Kind == mesh.HeaderRange {
		number, err := strconv.ParseInt(string(value), 10, 64)
		return err == nil && h.source.Start <= number && number < h.source.End
	}
	return matchText(&h.source.Text, h.pattern, value)
}

// matchText matches a value. p is the pattern of a matcher of MatchRegex.
func matchText(m *mesh.StringMatcher, p *pattern, value []byte) bool {
	switch m.Kind {
	case mesh.MatchExact:
		return len(value) == len(m.Text) && samePrefix(value, m.Text, m.IgnoreCase)
	case mesh.MatchPrefix:
		return samePrefix(value, m.Text, m.IgnoreCase)
	case mesh.MatchSuffix:
		return len(value) >= len(m.Text) && samePrefix(value[len(value)-len(m.Text):], m.Text, m.IgnoreCase)
	case mesh.MatchContains:
		for ; len(value) >= len(m.Text); value = value[1:] {
			if samePrefix(value, m.Text, m.IgnoreCase) {
				return true
			}
			if len(value) == 0 {
				break
			}
		}
		return false
	}
	return p.match(value)
}

// field returns the value of a header field or pseudo-header field, and how often it occurs. Of several values it returns the
// first.
func (r *Request) field(name string) (value []byte, n int) {
	switch {
	case equalName(name, ":authority"), equalName(name, "host"):
		value = r.Authority
	case name == "" || name[0] != ':':
		return lookup(r.Fields, name)
	case equalName(name, ":path"):
		value = r.Path
	case equalName(name, ":method"):
		value = r.Method
	case equalName(name, ":scheme"):
		value = r.Scheme
	}
	if value == nil {
		return nil, 0
	}
	return value, 1
}

// lookup returns the first value of a header field, and how often it occurs.
func lookup(fields Fields, name string) (value []byte, n int) {
	if fields == nil {
		return nil, 0
	}
	for i := range fields.Len() {
		if key, v := fields.At(i); len(key) == len(name) && equalFold(key, name) {
			if n == 0 {
				value = v
			}
			n++
		}
	}
	return value, n
}

// equalName and equalFold compare ASCII without regard to case.
func equalName(a, b string) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range len(a) {
		if lower(a[i]) != lower(b[i]) {
			return false
		}
	}
	return true
}

func equalFold(a []byte, b string) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if lower(a[i]) != lower(b[i]) {
			return false
		}
	}
	return true
}

func lower(c byte) byte {
	if 'A' <= c && c <= 'Z' {
		c += 'a' - 'A'
	}
	return c
}

// query is a compiled mesh.QueryMatcher.
type query struct {
	source  *mesh.QueryMatcher
	pattern *pattern // of a text that is a regular expression
}

func compileQuery(source *mesh.QueryMatcher, p *patterns) query {
	q := query{source: source}
	if source.Text != nil && source.Text.Kind == mesh.MatchRegex {
		q.pattern = p.get(source.Text.Text)
	}
	return q
}

func (q *query) match(target []byte) bool {
	value, present := parameter(target, q.source.Name)
	if q.source.Text == nil {
		return present == q.source.Present
	}
	return present && matchText(q.source.Text, q.pattern, value)
}

// parameter returns the first value of a parameter in the query of a request's target. Names and values are not unescaped.
func parameter(target []byte, name string) (value []byte, present bool) {
	for value := range Parameters(target, name) {
		return value, true
	}
	return nil, false
}

// pattern is a regular expression that has to match the whole of a text. It is compiled when it is first used.
type pattern struct {
	text   string
	regexp atomic.Pointer[regexp.Regexp]
}

// match reports whether text matches. An expression that is malformed matches nothing; its route is refused.
func (p *pattern) match(text []byte) bool {
	re := p.regexp.Load()
	if re == nil {
		var err error
		if re, err = regexp.Compile(`\A(?:` + p.text + `)\z`); err != nil {
			re = nothing()
		}
		p.regexp.Store(re)
	}
	return re.Match(text)
}

var nothing = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`\A\z.`) })

// patterns has the patterns of a virtual host, of which many may be equal.
type patterns map[string]*pattern

func (p *patterns) get(text string) *pattern {
	if *p == nil {
		*p = patterns{}
	}
	if (*p)[text] == nil {
		(*p)[text] = &pattern{text: text}
	}
	return (*p)[text]
}
