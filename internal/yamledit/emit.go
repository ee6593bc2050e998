package yamledit

import (
	"encoding/json"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf16"
)

// block writes a value as YAML in block style, as it appears after "key:" or "-" at a column. The text starts on the
// current line and has no line break at its end. Lists in mappings are not indented, like kubectl's output.
func block(b *strings.Builder, v any, column int, lineBreak string) {
	newLine := lineBreak + strings.Repeat(" ", column)
	switch v := v.(type) {
	case Object:
		for i, m := range v {
			if i > 0 {
				b.WriteString(newLine)
			}
			blockMember(b, m.Key, m.Value, column, lineBreak)
		}
	case map[string]any:
		for i, key := range SortedKeys(v) {
			if i > 0 {
				b.WriteString(newLine)
			}
			blockMember(b, key, v[key], column, lineBreak)
		}
	case []any:
		for i, item := range v {
			if i > 0 {
				b.WriteString(newLine)
			}
			b.WriteString("- ")
			if Empty(item) {
				b.WriteString(JSON(item))
				continue
			}
			block(b, item, column+2, lineBreak)
		}
	case []string:
		block(b, normal(v), column, lineBreak)
	default:
		b.WriteString(word(v))
	}
}

func blockMember(b *strings.Builder, key string, value any, column int, lineBreak string) {
	b.WriteString(word(key) + ":")
	switch value := value.(type) {
	case Object, map[string]any, []any, []string:
		if Empty(value) {
			b.WriteString(" " + JSON(value))
			return
		}
		switch value.(type) {
		case Object, map[string]any:
			column += 2
		}
		b.WriteString(lineBreak + strings.Repeat(" ", column))
		block(b, value, column, lineBreak)
	default:
		b.WriteString(" " + word(value))
	}
}

// flow writes a value in flow style on one line. It is JSON with spaces.
func flow(b *strings.Builder, v any) {
	list := func(open, end string, n int, item func(int)) {
		b.WriteString(open)
		for i := range n {
			if i > 0 {
				b.WriteString(", ")
			}
			item(i)
		}
		b.WriteString(end)
	}
	switch v := v.(type) {
	case Object:
		list("{", "}", len(v), func(i int) { flowMember(b, v[i].Key, v[i].Value) })
	case map[string]any:
		keys := SortedKeys(v)
		list("{", "}", len(keys), func(i int) { flowMember(b, keys[i], v[keys[i]]) })
	case []any:
		list("[", "]", len(v), func(i int) { flow(b, v[i]) })
	case []string:
		flow(b, normal(v))
	default:
		b.WriteString(JSON(v))
	}
}

func flowMember(b *strings.Builder, key string, value any) {
	b.WriteString(JSON(key) + ": ")
	flow(b, value)
}

// obvious matches text that every YAML reader takes for a string without quotes, except the words in quote.
var obvious = regexp.MustCompile(`^([A-Za-z/][A-Za-z0-9._/-]*|[0-9]+(m|s|Ki|Mi|Gi))$`)

// word returns a scalar on one line.
func word(v any) string {
	switch v := v.(type) {
	case string:
		return quote(v)
	case bool:
		return strconv.FormatBool(v)
	case int:
		return strconv.Itoa(v)
	case json.Number:
		return v.String()
	case nil:
		return "null"
	case other:
		return "!<tag:yaml.org,2002:" + strings.TrimPrefix(v.Tag, "!!") + "> " + quote(v.Value)
	}
	panic(fmt.Sprintf("not a tree: %T", v))
}

// quote returns s as a YAML scalar on one line, with quotes where a reader needs them.
func quote(s string) string {
	switch strings.ToLower(s) {
	case "true", "false", "yes", "no", "on", "off", "y", "n", "null":
		return `"` + s + `"`
	}
	if obvious.MatchString(s) {
		return s
	}
	printable := strings.IndexFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) < 0
	if printable && strings.ContainsAny(s, `"\`) {
		return "'" + strings.ReplaceAll(s, "'", "''") + "'"
	}
	return JSON(s)
}

// escaped escapes the characters of a JSON text that YAML requires escaped and JSON does not.
func escaped(s string) string {
	var b strings.Builder
	for _, r := range s {
		switch {
		case unicode.IsPrint(r):
			b.WriteRune(r)
		case r > 0xFFFF: // a surrogate pair, as in JSON
			high, low := utf16.EncodeRune(r)
			fmt.Fprintf(&b, `\u%04X\u%04X`, high, low)
		default:
			fmt.Fprintf(&b, `\u%04X`, r)
		}
	}
	return b.String()
}
