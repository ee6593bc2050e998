// Package match compares texts and values with the matchers that the control plane sends. It does no I/O.
//
// A comparison has three results. Unknown is that of a matcher that cannot be compiled, and of a text that Envoy's regular
// expressions would read in another way than Go's. The caller decides what Unknown means: where security is concerned, the
// stricter of the two.
package match

import (
	"bytes"
	"regexp"
	"strings"
	"unicode/utf8"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

// Value is the result of a comparison. The values are ordered, so all of several is their minimum, any of them their
// maximum, and the negation of one is its negative.
type Value int8

// The values.
const (
	No Value = iota - 1
	Unknown
	Yes
)

// Of returns Yes or No.
func Of(is bool) Value {
	if is {
		return Yes
	}
	return No
}

func (v Value) String() string {
	return [...]string{"no", "unknown", "yes"}[v+1]
}

// Text is a compiled mesh.StringMatcher.
type Text struct {
	Kind       mesh.MatchKind
	Want       string
	ignoreCase bool           // of ASCII letters; not of regular expressions
	pattern    *regexp.Regexp // of MatchRegex; nil: it cannot be compiled

	// Of patterns that istiod writes for namespaces and for any name. They need no regular expression.
	within   []byte // not empty: the pattern is that of texts with this one; not a string, whose conversion allocates
	nonEmpty bool   // the pattern is that of all texts except the empty one
}

// Compile returns the Text of a matcher.
func Compile(m *mesh.StringMatcher) Text {
	t := literal(m)
	if m.Kind == mesh.MatchRegex {
		t.pattern, t.nonEmpty = pattern(m.Text), m.Text == ".+"
		if within, ok := strings.CutPrefix(m.Text, ".*"); ok && strings.HasSuffix(within, ".*") {
			if within = within[:len(within)-2]; within == regexp.QuoteMeta(within) {
				t.within = []byte(within)
			}
		}
	}
	return t
}

func literal(m *mesh.StringMatcher) Text {
	return Text{Kind: m.Kind, Want: m.Text, ignoreCase: m.IgnoreCase}
}

// pattern returns the pattern of a whole text, or nil. The expression is compiled alone first, so that no parenthesis of it
// closes the group.
func pattern(expression string) *regexp.Regexp {
	if _, err := regexp.Compile(expression); err != nil {
		return nil
	}
	re, _ := regexp.Compile(`\A(?:` + expression + `)\z`)
	return re
}

// Match compares bytes. It does not allocate.
func (t *Text) Match(b []byte) Value {
	if t.Kind != mesh.MatchRegex {
		return Of(contains(t, b))
	}
	if t.pattern == nil || !utf8.Valid(b) || bytes.IndexByte(b, '\n') >= 0 {
		return unmatchable
	}
	switch {
	case t.nonEmpty:
		return Of(len(b) > 0)
	case len(t.within) > 0:
		return Of(bytes.Contains(b, t.within))
	}
	return Of(t.pattern.Match(b))
}

// MatchString is Match for a string.
func (t *Text) MatchString(s string) Value {
	if t.Kind != mesh.MatchRegex {
		return Of(contains(t, s))
	}
	if t.pattern == nil || !utf8.ValidString(s) || strings.IndexByte(s, '\n') >= 0 {
		return unmatchable
	}
	switch {
	case t.nonEmpty:
		return Of(s != "")
	case len(t.within) > 0:
		return Of(strings.Contains(s, t.Want[2:len(t.Want)-2]))
	}
	return Of(t.pattern.MatchString(s))
}

// unmatchable is the value of a regular expression for a text that is not UTF-8 or has several lines. A dot matches such
// bytes in Go, but not in RE2: whether the author of a policy meant them is not known.
const unmatchable = Unknown

// contains reports whether s has the text of t in the place that the kind of t demands.
func contains[T []byte | string](t *Text, s T) bool {
	n := len(t.Want)
	switch {
	case len(s) < n:
		return false
	case t.Kind == mesh.MatchExact:
		return len(s) == n && equal(t, s)
	case t.Kind == mesh.MatchPrefix:
		return equal(t, s[:n])
	case t.Kind == mesh.MatchSuffix:
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
func equal[T []byte | string](t *Text, s T) bool {
	if !t.ignoreCase {
		return string(s) == t.Want
	}
	for i := range len(t.Want) {
		if lower(s[i]) != lower(t.Want[i]) {
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
