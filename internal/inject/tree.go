package inject

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

// A tree is what a document says, whatever way it is written: map[string]any, []any, string, bool, nil, json.Number, and
// other for what Kubernetes has no use for. What we make may also be an object, whose members have an order, a []string
// and an int.

// object is a mapping whose members are written in this order.
type object []member

type member struct {
	key   string
	value any
}

// MarshalJSON keeps the order.
func (o object) MarshalJSON() ([]byte, error) {
	var b strings.Builder
	b.WriteByte('{')
	for i, m := range o {
		if i > 0 {
			b.WriteByte(',')
		}
		b.WriteString(oneLine(m.key) + ":" + oneLine(m.value))
	}
	b.WriteByte('}')
	return []byte(b.String()), nil
}

// oneLine is v as JSON, which is YAML too. Everything in a tree can be written so.
func oneLine(v any) string {
	var b strings.Builder
	encoder := json.NewEncoder(&b)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(v); err != nil {
		panic(fmt.Sprintf("a tree that is no JSON: %v", err))
	}
	return escaped(strings.TrimSuffix(b.String(), "\n"))
}

// other is a scalar with a tag of its own. It is only compared, and kept where it is.
type other struct{ Tag, Value string }

// normal turns what we made into the tree that a reader would get.
func normal(v any) any {
	switch v := v.(type) {
	case object:
		m := make(map[string]any, len(v))
		for _, member := range v {
			m[member.key] = normal(member.value)
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

// equal compares two trees that were read.
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

// maxExpanded bounds what aliases stand for: a document of a few lines can say billions of things by them.
const maxExpanded = 100_000

// plain reads the tree of a document. Numbers and booleans are what kubectl takes them for, which reads YAML 1.1.
func plain(n *yaml.Node) (any, error) {
	p := planer{left: maxExpanded}
	return p.plain(n, false)
}

// planer counts down what it has expanded.
type planer struct{ left int }

func (p *planer) plain(n *yaml.Node, expanded bool) (any, error) {
	if expanded {
		if p.left--; p.left < 0 {
			return nil, fmt.Errorf("line %d: aliases stand for more than %d values: write them out, or fewer of them", n.Line, maxExpanded)
		}
	}
	switch n.Kind {
	case yaml.DocumentNode:
		return p.plain(n.Content[0], expanded)
	case yaml.AliasNode:
		return p.plain(n.Alias, true)
	case yaml.SequenceNode:
		list := make([]any, len(n.Content))
		for i, item := range n.Content {
			var err error
			if list[i], err = p.plain(item, expanded); err != nil {
				return nil, err
			}
		}
		return list, nil
	case yaml.MappingNode:
		return p.mapping(n, expanded)
	}
	return scalar(n), nil
}

func (p *planer) mapping(n *yaml.Node, expanded bool) (any, error) {
	m := make(map[string]any, len(n.Content)/2)
	merged := make(map[string]any)
	for i := 0; i < len(n.Content); i += 2 {
		key := n.Content[i]
		if key.Kind == yaml.AliasNode {
			key = key.Alias
		}
		if key.Kind != yaml.ScalarNode {
			return nil, fmt.Errorf("line %d: a key that is no text: Kubernetes has none", key.Line)
		}
		value, err := p.plain(n.Content[i+1], expanded)
		if err != nil {
			return nil, err
		}
		if key.ShortTag() == "!!merge" {
			if err := merge(merged, value); err != nil {
				return nil, fmt.Errorf("line %d: %w", key.Line, err)
			}
			continue
		}
		if _, twice := m[key.Value]; twice {
			return nil, fmt.Errorf("line %d: key %q stands twice: take one out", key.Line, key.Value)
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

// merge adds what a mapping, or each of a list of them, has and into has not.
func merge(into map[string]any, from any) error {
	list, isList := from.([]any)
	if !isList {
		list = []any{from}
	}
	for _, item := range list {
		m, ok := item.(map[string]any)
		if !ok {
			return errors.New("what is merged by << must be a mapping or a list of them")
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

// parseJSON is plain for JSON, which an API server sends.
func parseJSON(text []byte) (any, error) {
	var v any
	decoder := json.NewDecoder(strings.NewReader(string(text)))
	decoder.UseNumber()
	if err := decoder.Decode(&v); err != nil {
		return nil, err
	}
	return v, nil
}

// get walks down mappings. What is not there, or no mapping, is nil.
func get(v any, keys ...string) any {
	for _, key := range keys {
		m, _ := v.(map[string]any)
		v = m[key]
	}
	return v
}

// text is the string at keys, or "" when there is none.
func text(v any, keys ...string) string {
	s, _ := get(v, keys...).(string)
	return s
}

// sortedKeys is for whatever must come out in the same order each time.
func sortedKeys(m map[string]any) []string { return slices.Sorted(maps.Keys(m)) }

// change is one step. Path leads from the object to a mapping or a list, with indices of lists as decimal numbers.
//
// Steps are made so that those that shift indices of a list come after all that lead through it. So it is the same
// whether they are done one after the other, as JSON Patch does, or all at once in a text.
type change struct {
	path []string
	kind kind
	key  string // of the member, or index of the item that is removed
	old  string // setMember: the member that the new one takes the place of, when it has another key
	// values has one value, or for addFront any number of them.
	values []any
	// was is how the member has been written, if it is a member that comes back.
	was *written
}

type kind int

const (
	setMember    kind = iota // of a mapping, new or not
	addFront                 // items of a list
	addBack                  // an item of a list
	removeMember             // of a mapping
	removeItem               // of a list
)

// written is a member of a mapping as it stood in the text, key and all. Column is that of its key, from 0; in JSON and
// in flow style it is -1.
type written struct {
	Text   string
	Column int
}

// parse returns the key and the value.
func (w written) parse() (string, any, error) {
	source := "{" + w.Text + "}"
	if w.Column >= 0 {
		source = strings.Repeat(" ", w.Column) + w.Text
	}
	var n yaml.Node
	if err := yaml.Unmarshal([]byte(source), &n); err != nil {
		return "", nil, err
	}
	tree, err := plain(&n)
	if err != nil {
		return "", nil, err
	}
	m, _ := tree.(map[string]any)
	if len(m) != 1 {
		return "", nil, errors.New("it is not one key and its value")
	}
	key := sortedKeys(m)[0]
	return key, m[key], nil
}

// apply does changes to a tree, which it may alter.
func apply(tree any, changes []change) (any, error) {
	for _, c := range changes {
		var err error
		if tree, err = c.apply(tree, c.path); err != nil {
			return nil, err
		}
	}
	return tree, nil
}

func (c change) apply(tree any, path []string) (any, error) {
	switch v := tree.(type) {
	case map[string]any:
		if len(path) > 0 {
			below, err := c.apply(v[path[0]], path[1:])
			v[path[0]] = below
			return v, err
		}
		switch c.kind {
		case setMember:
			if c.old != "" {
				delete(v, c.old)
			}
			v[c.key] = normal(c.values[0])
			return v, nil
		case removeMember:
			delete(v, c.key)
			return v, nil
		}
	case []any:
		if len(path) > 0 || c.kind == removeItem {
			at := c.key
			if len(path) > 0 {
				at = path[0]
			}
			i := index(at)
			if i < 0 || i >= len(v) {
				return nil, fmt.Errorf("no item %s in a list of %d", at, len(v))
			}
			if len(path) == 0 {
				return slices.Delete(v, i, i+1), nil
			}
			var err error
			v[i], err = c.apply(v[i], path[1:])
			return v, err
		}
		switch c.kind {
		case addFront, addBack:
			items := normal(c.values).([]any)
			if c.kind == addFront {
				return append(items, v...), nil
			}
			return append(v, items...), nil
		}
	}
	return nil, fmt.Errorf("nothing to change at /%s", strings.Join(c.path, "/"))
}

// index is an item's place in a list, or -1.
func index(key string) int {
	if i, err := strconv.Atoi(key); err == nil {
		return i
	}
	return -1
}

// patchStep is a step of JSON Patch, RFC 6902.
type patchStep struct {
	Op    string `json:"op"`
	Path  string `json:"path"`
	Value any    `json:"value,omitempty"`
}

// patch says the changes of an injection in JSON Patch. "add" also replaces a member that there is.
func patch(changes []change) []patchStep {
	steps := []patchStep{}
	for _, c := range changes {
		at := pointer(c.path...)
		switch c.kind {
		case setMember:
			if c.old != "" && c.old != c.key {
				steps = append(steps, patchStep{Op: "remove", Path: at + pointer(c.old)})
			}
			steps = append(steps, patchStep{"add", at + pointer(c.key), c.values[0]})
		case addFront:
			for _, value := range slices.Backward(c.values) {
				steps = append(steps, patchStep{"add", at + "/0", value})
			}
		case addBack:
			for _, value := range c.values {
				steps = append(steps, patchStep{"add", at + "/-", value})
			}
		case removeMember, removeItem:
			steps = append(steps, patchStep{Op: "remove", Path: at + pointer(c.key)})
		}
	}
	return steps
}

var (
	pointerEscapes   = strings.NewReplacer("~", "~0", "/", "~1")
	pointerUnescapes = strings.NewReplacer("~1", "/", "~0", "~")
)

// pointer is a JSON pointer, RFC 6901.
func pointer(keys ...string) string {
	var b strings.Builder
	for _, key := range keys {
		b.WriteByte('/')
		pointerEscapes.WriteString(&b, key)
	}
	return b.String()
}

// unpointer splits what pointer made.
func unpointer(p string) []string {
	keys := strings.Split(strings.TrimPrefix(p, "/"), "/")
	for i := range keys {
		keys[i] = pointerUnescapes.Replace(keys[i])
	}
	return keys
}
