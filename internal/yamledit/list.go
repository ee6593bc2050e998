package yamledit

import (
	"encoding/json"
	"errors"
	"io"
	"strings"
)

// Part is a piece of a document: one item of a list, or the text around items.
type Part struct {
	Text string
	Item bool // in block style with its dash, so that it is a document with a list of one item
}

// SplitList cuts a document that is a mapping into the items of its list key and the text around them. The concatenation of
// the parts is the document. Each item can be parsed by itself; an anchor of another item is then unknown, and Parse fails.
// rest is the tree of the document with a list of one 0 in place of the items. It is nil if the document has no such list,
// is in a style that is not understood, or is not valid. A caller then parses the document as a whole.
func SplitList(document, key string) (parts []Part, rest map[string]any) {
	cut, zero := splitBlock, "- 0\n"
	if strings.HasPrefix(strings.TrimLeft(document, " \t\r\n"), "{") {
		cut, zero = splitJSON, "0"
	}
	parts = cut(document, key)
	if parts == nil {
		return nil, nil
	}
	var skeleton strings.Builder
	done := false
	for i, part := range parts {
		switch {
		case !part.Item && (i == 0 || i == len(parts)-1):
			skeleton.WriteString(part.Text)
		case part.Item && !done:
			skeleton.WriteString(part.Text[:len(part.Text)-len(strings.TrimLeft(part.Text, " "))] + zero)
			done = true
		}
	}
	tree, err := Decode(skeleton.String())
	rest, _ = tree.(map[string]any)
	if items, _ := rest[key].([]any); err != nil || len(items) != 1 || items[0] != json.Number("0") {
		return nil, nil
	}
	return parts, rest
}

// splitBlock cuts at the dashes in the column of the first one. A line of a scalar, a comment or a flow collection that
// looks like that begins a part that is not valid. The caller notices that.
func splitBlock(document, key string) []Part {
	var parts []Part
	column, from, at := -1, 0, 0
	inside := false
	for line := range strings.Lines(document) {
		content := strings.TrimLeft(line, " ")
		indent := len(line) - len(content)
		text := strings.TrimRight(content, " \t\r\n")
		switch {
		case column >= 0 && inside && (text == "" || text[0] == '#'):
		case !inside:
			name, after, _ := strings.Cut(line, ":")
			after = strings.TrimSpace(after)
			inside = parts == nil && strings.Trim(name, `"'`) == key && (after == "" || after[0] == '#')
		case column < 0 && (text == "" || text[0] == '#'):
		case (column < 0 || indent == column) && (text == "-" || strings.HasPrefix(content, "- ")):
			parts = append(parts, Part{document[from:at], column >= 0})
			column, from = indent, at
		case column < 0: // not a list in block style
			return nil
		case indent <= column:
			parts = append(parts, Part{document[from:at], true})
			from, inside = at, false
		}
		at += len(line)
	}
	if column < 0 {
		return nil
	}
	parts = append(parts, Part{document[from:], inside})
	if inside {
		parts = append(parts, Part{})
	}
	return parts
}

// splitJSON cuts a JSON object.
func splitJSON(document, key string) []Part {
	if !validJSON(document) {
		return nil
	}
	var parts []Part
	depth, from, begin := 0, 0, -1
	inside, isKey := false, false
	for at := 0; at < len(document); at++ {
		switch c := document[at]; c {
		case '"':
			end := at + 1
			for document[end] != '"' {
				if document[end] == '\\' {
					end++
				}
				end++
			}
			if inside && depth == 2 && begin < 0 {
				begin = at
			}
			if depth == 1 && !inside {
				isKey = document[at+1:end] == key
			}
			at = end
		case '{', '[':
			if inside && depth == 2 && begin < 0 {
				begin = at
			}
			if depth++; depth == 2 && c == '[' && isKey && parts == nil && !inside {
				inside = true
			}
		case '}', ']', ',':
			if inside && depth == 2 && c != '}' && begin >= 0 {
				end := begin + len(strings.TrimRight(document[begin:at], " \t\r\n"))
				parts = append(parts, Part{document[from:begin], false}, Part{document[begin:end], true})
				from, begin = end, -1
			}
			if c != ',' {
				if depth--; depth == 1 && inside {
					inside, isKey = false, false
				}
			}
			if c == ',' && depth == 1 {
				isKey = false
			}
		case ' ', '\t', '\r', '\n', ':':
		default:
			if inside && depth == 2 && begin < 0 {
				begin = at
			}
		}
	}
	if parts == nil {
		return nil
	}
	return append(parts, Part{document[from:], false})
}

// validJSON is json.Valid without a copy of the text.
func validJSON(text string) bool {
	decoder := json.NewDecoder(strings.NewReader(text))
	for depth, first := 0, true; first || depth > 0; first = false {
		token, err := decoder.Token()
		if err != nil {
			return false
		}
		switch token {
		case json.Delim('{'), json.Delim('['):
			depth++
		case json.Delim('}'), json.Delim(']'):
			depth--
		}
	}
	_, err := decoder.Token()
	return errors.Is(err, io.EOF)
}
