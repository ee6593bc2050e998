package match

import (
	"sync"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

// Metadata has the values that one filter leaves about a request, in the form of JSON.
type Metadata map[string]any

// Match compares a value. A missing value does not match; m.Invert inverts that as well. Whether the values are those of
// m.Filter is for the caller to decide.
func (d Metadata) Match(m *mesh.MetadataMatcher) Value {
	value, exists := d.lookup(m.Path)
	return invert(m, matches(&m.Value, value, exists))
}

// MatchText is Match for a value that is a text without an object around it.
func MatchText(m *mesh.MetadataMatcher, text string, exists bool) Value {
	return invert(m, matches(&m.Value, text, exists))
}

func invert(m *mesh.MetadataMatcher, met Value) Value {
	if m.Invert {
		return -met
	}
	return met
}

// lookup returns the value at a path of keys.
func (d Metadata) lookup(path []string) (value any, exists bool) {
	value = map[string]any(d)
	for _, key := range path {
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

// matches compares a value. A matcher that is not understood is Unknown.
func matches(m *mesh.ValueMatcher, value any, exists bool) Value {
	some := No
	switch m.Kind {
	case mesh.ValueNull:
		return Of(exists && value == nil)
	case mesh.ValueText:
		text, ok := value.(string)
		if !ok || !exists {
			return No
		}
		return matchText(&m.Text, text)
	case mesh.ValueBool:
		truth, ok := value.(bool)
		return Of(ok && truth == m.Bool)
	case mesh.ValuePresence:
		return Of(exists == m.Bool)
	case mesh.ValueList:
		list, _ := value.([]any)
		for _, element := range list {
			if len(m.Any) != 1 {
				return Unknown
			}
			some = max(some, matches(&m.Any[0], element, true))
		}
		return some
	case mesh.ValueOr:
		for i := range m.Any {
			some = max(some, matches(&m.Any[i], value, exists))
		}
		return some
	}
	return Unknown
}

func matchText(m *mesh.StringMatcher, text string) Value {
	if m.Kind != mesh.MatchRegex {
		t := literal(m)
		return Of(contains(&t, text))
	}
	return compiled(m).MatchString(text)
}

// maxPatterns bounds the patterns that are kept.
const maxPatterns = 256

// patterns has compiled matchers by the texts of their expressions: matchers of metadata have no place for them.
var patterns = struct {
	sync.Mutex
	m map[string]*Text
}{m: map[string]*Text{}}

// compiled returns the Text of a matcher that is a regular expression.
func compiled(m *mesh.StringMatcher) *Text {
	patterns.Lock()
	defer patterns.Unlock()
	t := patterns.m[m.Text]
	if t == nil {
		if len(patterns.m) == maxPatterns {
			clear(patterns.m)
		}
		t = new(Compile(m))
		patterns.m[m.Text] = t
	}
	return t
}
