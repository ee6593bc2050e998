package inject

import (
	"encoding/json"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf16"
)

// block writes a value as YAML in block style, as it stands behind "key:" or "-" at a column. What it writes begins on
// this line and has no line break at its end. Lists in mappings are not indented, as kubectl has it.
func block(b *strings.Builder, v any, column int, lineBreak string) {
	newLine := lineBreak + strings.Repeat(" ", column)
	switch v := v.(type) {
	case object:
		for i, m := range v {
			if i > 0 {
				b.WriteString(newLine)
			}
			blockMember(b, m.key, m.value, column, lineBreak)
		}
	case map[string]any:
		for i, key := range sortedKeys(v) {
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
			if empty(item) {
				b.WriteString(oneLine(item))
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
	case object, map[string]any, []any, []string:
		if empty(value) {
			b.WriteString(" " + oneLine(value))
			return
		}
		switch value.(type) {
		case object, map[string]any:
			column += 2
		}
		b.WriteString(lineBreak + strings.Repeat(" ", column))
		block(b, value, column, lineBreak)
	default:
		b.WriteString(" " + word(value))
	}
}

// flow writes a value in flow style, which is JSON with blanks, in one line.
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
	case object:
		list("{", "}", len(v), func(i int) { flowMember(b, v[i].key, v[i].value) })
	case map[string]any:
		keys := sortedKeys(v)
		list("{", "}", len(keys), func(i int) { flowMember(b, keys[i], v[keys[i]]) })
	case []any:
		list("[", "]", len(v), func(i int) { flow(b, v[i]) })
	case []string:
		flow(b, normal(v))
	default:
		b.WriteString(oneLine(v))
	}
}

func flowMember(b *strings.Builder, key string, value any) {
	b.WriteString(oneLine(key) + ": ")
	flow(b, value)
}

func empty(v any) bool {
	switch v := v.(type) {
	case object:
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

// obvious is what every reader takes for a string without quotes, but for the words below.
var obvious = regexp.MustCompile(`^([A-Za-z/][A-Za-z0-9._/-]*|[0-9]+(m|s|Ki|Mi|Gi))$`)

// word is a scalar in one line.
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
	panic(fmt.Sprintf("a tree with a %T", v))
}

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
	return oneLine(s)
}

// escaped takes what is JSON already. Its escapes are YAML's, but YAML wants more of them.
func escaped(s string) string {
	var b strings.Builder
	for _, r := range s {
		switch {
		case unicode.IsPrint(r):
			b.WriteRune(r)
		case r > 0xFFFF: // as JSON has it, in two halves
			high, low := utf16.EncodeRune(r)
			fmt.Fprintf(&b, `\u%04X\u%04X`, high, low)
		default:
			fmt.Fprintf(&b, `\u%04X`, r)
		}
	}
	return b.String()
}
