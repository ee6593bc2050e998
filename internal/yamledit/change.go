package yamledit

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Change is one step of an edit. Path leads from the root to a mapping or a list; indices of lists are decimal numbers.
//
// A caller orders its changes so that those that shift indices of a list come after all changes whose path leads through
// that list. Then the result is the same whether they are applied one by one, as JSON Patch does, or all at once to a
// text.
type Change struct {
	Path []string
	Kind Kind
	Key  string // the member's key, or the index of the item to remove or insert
	// Old is, for SetMember, the key of the member that is replaced, if it differs from Key. For InsertItem it is the index,
	// before all changes, of the item after which the new one is written, or "" for the front.
	Old string
	// Values holds one value, or for AddFront and AddBack any number of items.
	Values []any
	// Was is the source text of a member or an item that is restored. It is used if it fits the place, else Values is written.
	Was *Source
}

// Kind is what a Change does.
type Kind int

// The kinds of change.
const (
	SetMember    Kind = iota // adds or replaces a member of a mapping
	AddFront                 // inserts items at the beginning of a list
	AddBack                  // appends items to a list
	RemoveMember             // removes a member of a mapping
	RemoveItem               // removes an item of a list
	CutItem                  // removes an item with the comments above it; InsertItem restores both
	InsertItem               // inserts an item into a list
)

// Source is the text of one member of a mapping, key included, or that of an item with what CutItem removes. Column is
// that of the key or of the dash, from 0; it is -1 in flow style and JSON.
type Source struct {
	Text   string
	Column int
}

// Decode returns the key and the value.
func (s Source) Decode() (string, any, error) {
	text := "{" + s.Text + "}"
	if s.Column >= 0 {
		text = strings.Repeat(" ", s.Column) + s.Text
	}
	tree, err := Decode(text)
	if err != nil {
		return "", nil, err
	}
	m, _ := tree.(map[string]any)
	if len(m) != 1 {
		return "", nil, errors.New("not a single key with its value")
	}
	key := SortedKeys(m)[0]
	return key, m[key], nil
}

// DecodeItem returns the value of an item.
func (s Source) DecodeItem() (any, error) {
	text := s.Text
	if s.Column < 0 {
		text = "[" + strings.Trim(text, ", \t\r\n") + "]"
	}
	tree, err := Decode(text)
	if err != nil {
		return nil, err
	}
	if items, _ := tree.([]any); len(items) == 1 {
		return items[0], nil
	}
	return nil, errors.New("not a single item")
}

// Apply applies changes to a tree and returns the result. The tree may be modified.
func Apply(tree any, changes []Change) (any, error) {
	for _, c := range changes {
		var err error
		if tree, err = c.apply(tree, c.Path); err != nil {
			return nil, err
		}
	}
	return tree, nil
}

func (c Change) apply(tree any, path []string) (any, error) {
	switch v := tree.(type) {
	case map[string]any:
		if len(path) > 0 {
			below, err := c.apply(v[path[0]], path[1:])
			v[path[0]] = below
			return v, err
		}
		switch c.Kind {
		case SetMember:
			if c.Old != "" {
				delete(v, c.Old)
			}
			v[c.Key] = normal(c.Values[0])
			return v, nil
		case RemoveMember:
			delete(v, c.Key)
			return v, nil
		}
	case []any:
		if c.Kind == InsertItem && len(path) == 0 {
			i := index(c.Key)
			if i < 0 || i > len(v) {
				return nil, fmt.Errorf("no place %s in a list of %d", c.Key, len(v))
			}
			return slices.Insert(v, i, normal(c.Values[0])), nil
		}
		if len(path) > 0 || c.Kind == RemoveItem || c.Kind == CutItem {
			at := c.Key
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
		switch c.Kind {
		case AddFront, AddBack:
			items := normal(c.Values).([]any)
			if c.Kind == AddFront {
				return append(items, v...), nil
			}
			return append(v, items...), nil
		}
	}
	return nil, fmt.Errorf("%s has no mapping or list to change", Pointer(c.Path...))
}

// index parses the index of a list item. It returns -1 if key is not a number.
func index(key string) int {
	if i, err := strconv.Atoi(key); err == nil {
		return i
	}
	return -1
}

// PatchStep is one operation of a JSON Patch (RFC 6902).
type PatchStep struct {
	Op    string `json:"op"`
	Path  string `json:"path"`
	Value any    `json:"value,omitempty"`
}

// Patch returns changes as a JSON Patch. Its "add" replaces a member that exists (RFC 6902 §4.1).
func Patch(changes []Change) []PatchStep {
	steps := []PatchStep{}
	for _, c := range changes {
		at := Pointer(c.Path...)
		switch c.Kind {
		case SetMember:
			if c.Old != "" && c.Old != c.Key {
				steps = append(steps, PatchStep{Op: "remove", Path: at + Pointer(c.Old)})
			}
			steps = append(steps, PatchStep{"add", at + Pointer(c.Key), c.Values[0]})
		case AddFront:
			for _, value := range slices.Backward(c.Values) {
				steps = append(steps, PatchStep{"add", at + "/0", value})
			}
		case AddBack:
			for _, value := range c.Values {
				steps = append(steps, PatchStep{"add", at + "/-", value})
			}
		case InsertItem:
			steps = append(steps, PatchStep{"add", at + Pointer(c.Key), c.Values[0]})
		case RemoveMember, RemoveItem, CutItem:
			steps = append(steps, PatchStep{Op: "remove", Path: at + Pointer(c.Key)})
		}
	}
	return steps
}

var (
	pointerEscapes   = strings.NewReplacer("~", "~0", "/", "~1")
	pointerUnescapes = strings.NewReplacer("~1", "/", "~0", "~")
)

// Pointer returns keys as a JSON Pointer (RFC 6901).
func Pointer(keys ...string) string {
	var b strings.Builder
	for _, key := range keys {
		b.WriteByte('/')
		pointerEscapes.WriteString(&b, key)
	}
	return b.String()
}

// ParsePointer returns the keys of a JSON Pointer.
func ParsePointer(p string) []string {
	keys := strings.Split(strings.TrimPrefix(p, "/"), "/")
	for i := range keys {
		keys[i] = pointerUnescapes.Replace(keys[i])
	}
	return keys
}
