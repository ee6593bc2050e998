// Package proxyconfig reads Istio's ProxyConfig, as JSON or YAML. Istio's injector writes JSON; people write YAML.
//
// The parser supports a subset of YAML: block mappings of plain and quoted scalars, with comments. All of Istio's examples
// are in this form, and eight keys do not justify a YAML library in every sidecar. Values in other forms, such as lists,
// flow style, anchors and multi-line text, are skipped and marked Unreadable, never misread.
package proxyconfig

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode"
)

// maxBytes is above the API server's limit for a whole object.
const maxBytes = 2 << 20

// Config maps paths, such as "concurrency" and "tracing.sampling", to values. Keys that contain a dot are left out; Istio
// does not have any.
type Config map[string]Value

// Value is a scalar.
type Value struct {
	Text       string
	Unreadable bool // a list, or in a form of YAML that is not supported; Text is empty
}

// Parse reads JSON or YAML. The error of a malformed text names its line.
func Parse(text string) (Config, error) {
	if len(text) > maxBytes {
		return nil, fmt.Errorf("%d bytes: must be %d at most", len(text), maxBytes)
	}
	config := Config{}
	if strings.HasPrefix(strings.TrimSpace(text), "{") {
		if !config.addJSON("", text) {
			return nil, errors.New("it begins with { and is not a JSON object: use JSON, or YAML with one key on each line")
		}
		return config, nil
	}
	return config, config.addYAML(text)
}

// Object returns JSON or YAML as the values of its JSON form: objects, lists, strings, float64s and bools. Of YAML it has
// what Parse reads. Numbers are strings then, which protobuf's JSON allows; true and false are bools, except in
// proxyMetadata, whose values are strings.
func Object(text string) (map[string]any, error) {
	config, err := Parse(text)
	if err != nil {
		return nil, err
	}
	object := map[string]any{}
	if strings.HasPrefix(strings.TrimSpace(text), "{") {
		return object, json.Unmarshal([]byte(text), &object)
	}
	for path, value := range config {
		if !value.Unreadable {
			set(object, strings.Split(path, "."), value.Text)
		}
	}
	return object, nil
}

// set puts a scalar of YAML at a path.
func set(object map[string]any, path []string, text string) {
	for _, key := range path[:len(path)-1] {
		inner, ok := object[key].(map[string]any)
		if !ok {
			inner = map[string]any{}
			object[key] = inner
		}
		object = inner
	}
	key := path[len(path)-1]
	object[key] = text
	if inStrings := slices.Contains(path[:len(path)-1], "proxyMetadata"); !inStrings && (text == "true" || text == "false") {
		object[key] = text == "true"
	}
}

// Merge adds the values of from to into. Objects are merged; other values of from replace those of into.
func Merge(into, from map[string]any) {
	for key, value := range from {
		if inner, ok := value.(map[string]any); ok {
			if old, ok := into[key].(map[string]any); ok {
				Merge(old, inner)
				continue
			}
		}
		into[key] = value
	}
}

// Under returns the part of c below key, with paths relative to key.
func (c Config) Under(key string) Config {
	part := Config{}
	for path, value := range c {
		if rest, under := strings.CutPrefix(path, key+"."); under {
			part[rest] = value
		}
	}
	return part
}

// addJSON adds a JSON object at a path, and reports whether text is one.
func (c Config) addJSON(path, text string) bool {
	decoder := json.NewDecoder(strings.NewReader(text))
	decoder.UseNumber()
	var object map[string]any
	if decoder.Decode(&object) != nil || object == nil || len(bytes.TrimSpace([]byte(text[decoder.InputOffset():]))) > 0 {
		return false
	}
	c.addObject(path, object)
	return true
}

func (c Config) addObject(path string, object map[string]any) {
	for key, value := range object {
		if strings.Contains(key, ".") {
			continue
		}
		switch value := value.(type) {
		case map[string]any:
			c.addObject(path+key+".", value)
		case []any:
			c[path+key] = Value{Unreadable: true}
		case nil: // null means absent
		default:
			c[path+key] = Value{Text: fmt.Sprint(value)}
		}
	}
}

// level is a block mapping: the indent of its keys, and its path. A path is empty or ends with a dot.
type level struct {
	indent int
	path   string
}

// addYAML adds the scalars of block mappings.
func (c Config) addYAML(text string) error {
	levels := []level{{0, ""}}
	opened := ""      // path of the last key if it had no value; its mapping may follow
	skip := -1        // lines with a larger indent belong to an unsupported value
	quoted := byte(0) // quotation mark of a value that continues on the next line
	n := 0
	for line := range strings.Lines(text) {
		n++
		if quoted != 0 { // YAML continues the value, also if this line is not indented
			if opensQuote(quoted, line) {
				quoted = 0
			}
			continue
		}
		line = strings.TrimRight(line, " \t\r\n")
		content := strings.TrimLeft(line, " ")
		indent := len(line) - len(content)
		if content == "" || content[0] == '#' || indent == 0 && content == "---" || skip >= 0 && indent > skip {
			continue
		}
		skip = -1
		if content == "-" || strings.HasPrefix(content, "- ") {
			if opened == "" {
				return fmt.Errorf("line %d is a list item outside a list: %.100q", n, content)
			}
			c[strings.TrimSuffix(opened, ".")] = Value{Unreadable: true}
			skip = indent
			continue
		}
		top := levels[len(levels)-1]
		if opened != "" && indent > top.indent {
			top = level{indent, opened}
			levels = append(levels, top)
		}
		for indent < top.indent && len(levels) > 1 {
			levels = levels[:len(levels)-1]
			top = levels[len(levels)-1]
		}
		key, rest, found := cutKey(content)
		if !found || indent != top.indent {
			return fmt.Errorf("line %d is not \"key: value\" at the indent of its neighbours: %.100q", n, content)
		}
		opened = ""
		if strings.Contains(key, ".") {
			skip = indent
			continue
		}
		path := top.path + key
		switch value, ok := Scalar(rest); {
		case rest == "":
			opened = path + "."
		case ok:
			c[path] = Value{Text: value}
		case rest[0] == '{' && c.addJSON(path+".", rest):
		default:
			c[path] = Value{Unreadable: true}
			skip = indent
			if mark := rest[0]; (mark == '\'' || mark == '"') && opensQuote(mark, rest) {
				quoted = mark
			}
		}
	}
	return nil
}

// opensQuote reports whether text has an odd number of quotation marks, so that it opens or closes a quotation.
func opensQuote(mark byte, text string) bool {
	if mark == '"' {
		text = strings.NewReplacer(`\\`, "", `\"`, "").Replace(text)
	}
	return strings.Count(text, string(mark))%2 == 1
}

// cutKey splits "key: value". The key may be quoted. A comment in place of the value counts as no value.
func cutKey(content string) (key, rest string, found bool) {
	key, rest, found = strings.Cut(content, ":")
	if !found || rest != "" && rest[0] != ' ' && rest[0] != '\t' {
		return "", "", false
	}
	if rest = strings.TrimLeft(rest, " \t"); strings.HasPrefix(rest, "#") {
		rest = ""
	}
	if name, quoted := Scalar(key); quoted {
		return name, rest, name != ""
	}
	return "", "", false
}

// Scalar parses a plain or quoted value of YAML on one line. It returns false for a value in another form.
func Scalar(text string) (value string, ok bool) {
	unprintable := func(r rune) bool { return !unicode.IsPrint(r) && r != '\t' }
	if text == "" || strings.ContainsFunc(text, unprintable) { // YAML has further line breaks
		return "", false
	}
	switch text[0] {
	case '"': // JSON strings are valid in YAML
		decoder := json.NewDecoder(strings.NewReader(text))
		err := decoder.Decode(&value)
		return value, err == nil && blank(text[decoder.InputOffset():])
	case '\'':
		value, rest, found := strings.Cut(text[1:], "'")
		return value, found && blank(rest)
	case '{', '[', '}', ']', '&', '*', '!', '|', '>', '%', '@', '`', ',', '?':
		return "", false
	}
	value, _, _ = strings.Cut(text, " #")
	value = strings.TrimSpace(value)
	return value, !strings.Contains(value, ": ")
}

// blank reports whether the rest of a line after a value is only white space and a comment.
func blank(rest string) bool {
	trimmed := strings.TrimSpace(rest)
	return trimmed == "" || trimmed[0] == '#' && trimmed != rest
}
