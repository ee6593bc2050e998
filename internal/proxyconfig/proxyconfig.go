// Package proxyconfig reads what Istio's ProxyConfig says: JSON, as its injector writes it, or YAML, as people do.
//
// Of YAML it knows block mappings of plain and quoted values, with comments, which is how all of Istio's documents have
// it. What it steps over, such as lists, flow style, anchors and text of several lines, is never taken for something
// else: who asks for such a value is told that it cannot be read. So a sidecar carries no YAML library for eight keys.
package proxyconfig

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"unicode"
)

// maxBytes is more than the API server takes for a whole object.
const maxBytes = 2 << 20

// Config is a mapping whose keys are paths, such as "concurrency" and "tracing.sampling". A key that has a dot itself,
// which none of Istio's has, is left out.
type Config map[string]Value

// Value is a text, unless it is Unreadable.
type Value struct {
	Text       string
	Unreadable bool // it is a list, or in a form of YAML that is not read here
}

// Parse reads JSON or YAML. Text that is neither is an error that names its line.
func Parse(text string) (Config, error) {
	if len(text) > maxBytes {
		return nil, fmt.Errorf("it has %d bytes; at most %d are read", len(text), maxBytes)
	}
	config := Config{}
	if strings.HasPrefix(strings.TrimSpace(text), "{") {
		if !config.addJSON("", text) {
			return nil, errors.New("it begins with { and is no JSON object: use JSON, or YAML with one key in a line")
		}
		return config, nil
	}
	return config, config.addYAML(text)
}

// Under returns what stands under key.
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
		case nil: // as if it were not there
		default:
			c[path+key] = Value{Text: fmt.Sprint(value)}
		}
	}
}

// level is a mapping whose keys stand at an indent, under a path that is empty or ends with a dot.
type level struct {
	indent int
	path   string
}

// addYAML adds block mappings.
func (c Config) addYAML(text string) error {
	levels := []level{{0, ""}}
	opened := ""      // the path of a key without a value, whose mapping may follow
	skip := -1        // what is indented deeper belongs to what was stepped over
	quoted := byte(0) // the quotation mark of a value that did not end with its line
	n := 0
	for line := range strings.Lines(text) {
		n++
		if quoted != 0 { // readers of YAML continue the value here, also where the line is not indented
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
				return fmt.Errorf("line %d is an item of no list: %.100q", n, content)
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
			return fmt.Errorf("line %d is not \"key: value\" in a column with its neighbours: %.100q", n, content)
		}
		opened = ""
		if strings.Contains(key, ".") {
			skip = indent
			continue
		}
		path := top.path + key
		switch value, ok := scalar(rest); {
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

// opensQuote reports whether text leaves a quotation that was closed before it open, or the other way round.
func opensQuote(mark byte, text string) bool {
	if mark == '"' {
		text = strings.NewReplacer(`\\`, "", `\"`, "").Replace(text)
	}
	return strings.Count(text, string(mark))%2 == 1
}

// cutKey cuts "key: value", whose key may be quoted. A comment in the place of the value is none.
func cutKey(content string) (key, rest string, found bool) {
	key, rest, found = strings.Cut(content, ":")
	if !found || rest != "" && rest[0] != ' ' && rest[0] != '\t' {
		return "", "", false
	}
	if rest = strings.TrimLeft(rest, " \t"); strings.HasPrefix(rest, "#") {
		rest = ""
	}
	if name, quoted := scalar(key); quoted {
		return name, rest, name != ""
	}
	return "", "", false
}

// scalar reads a plain or quoted value that ends with its line.
func scalar(text string) (value string, ok bool) {
	unprintable := func(r rune) bool { return !unicode.IsPrint(r) && r != '\t' }
	if text == "" || strings.ContainsFunc(text, unprintable) { // YAML has more line ends than one
		return "", false
	}
	switch text[0] {
	case '"': // a string of JSON is one of YAML
		decoder := json.NewDecoder(strings.NewReader(text))
		err := decoder.Decode(&value)
		return value, err == nil && nothing(text[decoder.InputOffset():])
	case '\'':
		value, rest, found := strings.Cut(text[1:], "'")
		return value, found && nothing(rest)
	case '{', '[', '}', ']', '&', '*', '!', '|', '>', '%', '@', '`', ',', '?':
		return "", false
	}
	value, _, _ = strings.Cut(text, " #")
	value = strings.TrimSpace(value)
	return value, !strings.Contains(value, ": ")
}

// nothing tells whether only blanks or a comment follow a value.
func nothing(rest string) bool {
	trimmed := strings.TrimSpace(rest)
	return trimmed == "" || trimmed[0] == '#' && trimmed != rest
}
