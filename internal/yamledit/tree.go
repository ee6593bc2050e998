package yamledit

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// A tree is the content of a document, whatever its style: map[string]any, []any, string, bool, nil, json.Number, and
// other for scalars that Kubernetes has no type for. Values that a caller adds may also be an Object, a []string or an
// int.

// Object is a mapping whose members are written in this order.
type Object []Member

// Member is one member of an Object. It is an alias of an unnamed struct so that callers may write it without field
// names.
type Member = struct {
	Key   string
	Value any
}

// MarshalJSON keeps the order.
func (o Object) MarshalJSON() ([]byte, error) {
	var b strings.Builder
	b.WriteByte('{')
	for i, m := range o {
		if i > 0 {
			b.WriteByte(',')
		}
		b.WriteString(JSON(m.Key) + ":" + JSON(m.Value))
	}
	b.WriteByte('}')
	return []byte(b.String()), nil
}

// JSON returns a tree as one line of JSON that is also YAML. It panics if v is not a tree.
func JSON(v any) string {
	var b strings.Builder
	encoder := json.NewEncoder(&b)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(v); err != nil {
		panic(fmt.Sprintf("not a tree: %v", err))
	}
	return escaped(strings.TrimSuffix(b.String(), "\n"))
}

// other is a scalar with a tag that Kubernetes does not use. It is compared and kept in place, never interpreted.
type other struct{ Tag, Value string }

// normal returns the tree that a reader of v would get.
func normal(v any) any {
	switch v := v.(type) {
	case Object:
		m := make(map[string]any, len(v))
		for _, member := range v {
			m[member.Key] = normal(member.Value)
		}
		return m
	case map[string]any:
		m := make(map[string]any, len(v))
		for key, value := range v {
			m[key] = normal(value)
		}
		return m
	case []any:
		list := make([]any, len(v))
		for i := range v {
			list[i] = normal(v[i])
		}
		return list
	case []string:
		list := make([]any, len(v))
		for i := range v {
			list[i] = v[i]
		}
		return list
	case int:
		return json.Number(strconv.Itoa(v))
	}
	return v
}

// equal compares two trees as they were read.
func equal(a, b any) bool {
	switch a := a.(type) {
	case map[string]any:
		b, same := b.(map[string]any)
		if same = same && len(a) == len(b); same {
			for key, value := range a {
				other, has := b[key]
				if !has || !equal(value, other) {
					return false
				}
			}
		}
		return same
	case []any:
		b, same := b.([]any)
		return same && slices.EqualFunc(a, b, equal)
	}
	switch b.(type) {
	case map[string]any, []any:
		return false
	}
	return a == b
}

// maxExpanded bounds the values that aliases expand to: a few lines of nested aliases can stand for billions.
const maxExpanded = 100_000

// Decode returns the tree of a YAML text. It is nil for a text without a document.
func Decode(text string) (any, error) {
	var n yaml.Node
	if err := yaml.Unmarshal([]byte(text), &n); err != nil || n.Kind == 0 {
		return nil, err
	}
	return treeOf(&n)
}

// treeOf returns the tree of a node. Numbers and booleans are read as kubectl reads them, by the rules of YAML 1.1.
func treeOf(n *yaml.Node) (any, error) {
	r := reader{left: maxExpanded}
	return r.tree(n, false)
}

// reader builds a tree and counts down the values that aliases expand to.
type reader struct{ left int }

func (r *reader) tree(n *yaml.Node, expanded bool) (any, error) {
	if expanded {
		if r.left--; r.left < 0 {
			return nil, fmt.Errorf("line %d: aliases stand for more than %d values: write them out, or use fewer", n.Line, maxExpanded)
		}
	}
	switch n.Kind {
	case yaml.DocumentNode:
		return r.tree(n.Content[0], expanded)
	case yaml.AliasNode:
		return r.tree(n.Alias, true)
	case yaml.SequenceNode:
		list := make([]any, len(n.Content))
		for i, item := range n.Content {
			var err error
			if list[i], err = r.tree(item, expanded); err != nil {
				return nil, err
			}
		}
		return list, nil
	case yaml.MappingNode:
		return r.mapping(n, expanded)
	}
	return scalar(n), nil
}

func (r *reader) mapping(n *yaml.Node, expanded bool) (any, error) {
	m := make(map[string]any, len(n.Content)/2)
	var merged map[string]any
	for i := 0; i < len(n.Content); i += 2 {
		key := n.Content[i]
		if key.Kind == yaml.AliasNode {
			key = key.Alias
		}
		if key.Kind != yaml.ScalarNode {
			return nil, fmt.Errorf("line %d: a key is not a scalar: Kubernetes has only text as keys", key.Line)
		}
		value, err := r.tree(n.Content[i+1], expanded)
		if err != nil {
			return nil, err
		}
		if key.ShortTag() == "!!merge" {
			if merged == nil {
				merged = make(map[string]any)
			}
			if err := merge(merged, value); err != nil {
				return nil, fmt.Errorf("line %d: %w", key.Line, err)
			}
			continue
		}
		if _, twice := m[key.Value]; twice {
			return nil, fmt.Errorf("line %d: duplicate key %q: remove one", key.Line, key.Value)
		}
		m[key.Value] = value
	}
	for key, value := range merged {
		if _, own := m[key]; !own {
			m[key] = value
		}
	}
	return m, nil
}

// merge adds the members of a mapping, or of each mapping in a list, that into does not have.
func merge(into map[string]any, from any) error {
	list, isList := from.([]any)
	if !isList {
		list = []any{from}
	}
	for _, item := range list {
		m, ok := item.(map[string]any)
		if !ok {
			return errors.New("the value of << must be a mapping or a list of mappings")
		}
		for key, value := range m {
			if _, has := into[key]; !has {
				into[key] = value
			}
		}
	}
	return nil
}

func scalar(n *yaml.Node) any {
	switch n.ShortTag() {
	case "!!str":
		if n.Style == 0 {
			switch n.Value {
			case "y", "Y", "yes", "Yes", "YES", "on", "On", "ON":
				return true
			case "n", "N", "no", "No", "NO", "off", "Off", "OFF":
				return false
			}
		}
		return n.Value
	case "!!timestamp":
		return n.Value
	case "!!null":
		return nil
	case "!!bool":
		return strings.EqualFold(n.Value, "true")
	case "!!int":
		if number, err := strconv.ParseInt(strings.ReplaceAll(n.Value, "_", ""), 0, 64); err == nil {
			return json.Number(strconv.FormatInt(number, 10))
		}
	case "!!float":
		if json.Valid([]byte(n.Value)) {
			return json.Number(n.Value)
		}
	}
	return other{n.ShortTag(), n.Value}
}

// DecodeJSON returns the tree of one JSON value.
func DecodeJSON(text []byte) (any, error) {
	var v any
	decoder := json.NewDecoder(strings.NewReader(string(text)))
	decoder.UseNumber()
	if err := decoder.Decode(&v); err != nil {
		return nil, err
	}
	return v, nil
}

// Get follows keys through mappings. It returns nil if a key is missing or its holder is not a mapping.
func Get(v any, keys ...string) any {
	for _, key := range keys {
		m, _ := v.(map[string]any)
		v = m[key]
	}
	return v
}

// Text returns the string at keys, or "" if there is no string.
func Text(v any, keys ...string) string {
	s, _ := Get(v, keys...).(string)
	return s
}

// SortedKeys returns the keys of m in an order that does not change from run to run.
func SortedKeys(m map[string]any) []string { return slices.Sorted(maps.Keys(m)) }

// Empty reports whether v is a mapping or list without content.
func Empty(v any) bool {
	switch v := v.(type) {
	case Object:
		return len(v) == 0
	case map[string]any:
		return len(v) == 0
	case []any:
		return len(v) == 0
	case []string:
		return len(v) == 0
	}
	return false
}
