package jwt

import (
	"regexp"
	"strings"
	"sync"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

// Claims are the payloads of the verified tokens of a request. A nil Claims is without any.
type Claims struct {
	payloads map[string]any // by the keys that providers have for them
}

// filterName is the name under which policies and routes look for claims.
const filterName = "envoy.filters.http.jwt_authn"

// Match reports whether a claim matches. A missing claim does not match; m.Invert inverts that as well.
func (c *Claims) Match(m *mesh.MetadataMatcher) bool {
	value, exists := c.lookup(m)
	return matches(&m.Value, value, exists) != m.Invert
}

// lookup returns the value at the path of m.
func (c *Claims) lookup(m *mesh.MetadataMatcher) (value any, exists bool) {
	if c == nil || m.Filter != filterName {
		return nil, false
	}
	value = map[string]any(c.payloads)
	for _, key := range m.Path {
		object, ok := value.(map[string]any)
		if !ok {
			return nil, false
		}
		if value, exists = object[key]; !exists {
			return nil, false
		}
	}
	return value, exists
}

// matches reports whether a value matches.
func matches(m *mesh.ValueMatcher, value any, exists bool) bool {
	switch m.Kind {
	case mesh.ValueNull:
		return exists && value == nil
	case mesh.ValueText:
		text, ok := value.(string)
		return ok && matchText(&m.Text, text)
	case mesh.ValueBool:
		truth, ok := value.(bool)
		return ok && truth == m.Bool
	case mesh.ValuePresence:
		return exists == m.Bool
	case mesh.ValueList:
		list, _ := value.([]any)
		for _, element := range list {
			if len(m.Any) == 1 && matches(&m.Any[0], element, true) {
				return true
			}
		}
	case mesh.ValueOr:
		for i := range m.Any {
			if matches(&m.Any[i], value, exists) {
				return true
			}
		}
	}
	return false
}

func matchText(m *mesh.StringMatcher, text string) bool {
	want := m.Text
	if m.Kind == mesh.MatchRegex {
		pattern := compiled(want)
		return pattern != nil && pattern.MatchString(text)
	}
	if m.IgnoreCase {
		text, want = strings.ToLower(text), strings.ToLower(want)
	}
	switch m.Kind {
	case mesh.MatchExact:
		return text == want
	case mesh.MatchPrefix:
		return strings.HasPrefix(text, want)
	case mesh.MatchSuffix:
		return strings.HasSuffix(text, want)
	}
	return strings.Contains(text, want)
}

// maxPatterns bounds the patterns that are kept.
const maxPatterns = 256

// patterns has compiled patterns by their texts; nil is one that cannot be compiled.
var patterns = struct {
	sync.Mutex
	m map[string]*regexp.Regexp
}{m: map[string]*regexp.Regexp{}}

// compiled returns the pattern of a whole text, or nil.
func compiled(text string) *regexp.Regexp {
	patterns.Lock()
	defer patterns.Unlock()
	pattern, ok := patterns.m[text]
	if !ok {
		if len(patterns.m) == maxPatterns {
			clear(patterns.m)
		}
		pattern, _ = regexp.Compile(`^(?:` + text + `)$`)
		patterns.m[text] = pattern
	}
	return pattern
}
