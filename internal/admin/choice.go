package admin

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/url"
	"regexp"
	"strings"
	"sync"
)

// maxPattern bounds masks and regular expressions. Go's regexp runs in linear time.
const maxPattern = 1 << 10

// choice is the part of a dump that a query selects.
type choice struct {
	resource string         // only the items of this list; empty: everything
	mask     fields         // the fields kept of a message; nil: all
	name     *regexp.Regexp // of resources; nil: any
	redact   bool           // without the values of header fields
}

// fields is a tree of field paths. A leaf keeps everything below it.
type fields map[string]fields

func parseChoice(query url.Values) (choice, error) {
	c := choice{resource: query.Get("resource")}
	switch text := query.Get("redact"); text {
	case "":
	case "headers":
		c.redact = true
	default:
		return c, fmt.Errorf("redact=%.50q: use headers", text)
	}
	if c.resource != "" && !fieldName().MatchString(c.resource) {
		return c, fmt.Errorf("resource=%.50q is not the name of a list: use one such as static_listeners", c.resource)
	}
	if text := query.Get("mask"); text != "" {
		var err error
		if c.mask, err = parseMask(text); err != nil {
			return c, err
		}
	}
	if text := query.Get("name_regex"); text != "" {
		pattern, err := parsePattern("name_regex", "^(?:"+text+")$")
		if err != nil {
			return c, err
		}
		c.name = pattern
	}
	return c, nil
}

func parsePattern(parameter, text string) (*regexp.Regexp, error) {
	if len(text) > maxPattern {
		return nil, fmt.Errorf("%s=%.50q... is longer than %d bytes: use a shorter one", parameter, text, maxPattern)
	}
	pattern, err := regexp.Compile(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w: use RE2 syntax", parameter, err)
	}
	return pattern, nil
}

var fieldName = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^[a-z][a-z0-9_]*$`) })

func parseMask(text string) (fields, error) {
	if len(text) > maxPattern {
		return nil, fmt.Errorf("mask=%.50q... is longer than %d bytes: use a shorter one", text, maxPattern)
	}
	mask := fields{}
	for path := range strings.SplitSeq(text, ",") {
		at := mask
		names := strings.Split(path, ".")
		for i, name := range names {
			if !fieldName().MatchString(name) {
				return nil, fmt.Errorf("mask=%.50q: %.50q is not a path of fields: use one such as listener.name", text, path)
			}
			below, there := at[name]
			if there && len(below) == 0 {
				break // a shorter path keeps everything below
			}
			if !there || i == len(names)-1 {
				below = fields{}
				at[name] = below
			}
			at = below
		}
	}
	return mask, nil
}

// of returns a message, or each message of a list, with only the fields of the mask and @type.
func (f fields) of(value any) any {
	if len(f) == 0 {
		return value
	}
	switch value := value.(type) {
	case []object:
		kept := []object{}
		for _, item := range value {
			kept = append(kept, f.of(item).(object))
		}
		return kept
	case []any:
		kept := []any{}
		for _, item := range value {
			kept = append(kept, f.of(item))
		}
		return kept
	case object:
		kept := object{}
		for key, inner := range value {
			if below, ok := f[key]; ok {
				kept[key] = below.of(inner)
			} else if key == "@type" {
				kept[key] = inner
			}
		}
		return kept
	case map[string]any:
		return f.of(object(value))
	case json.RawMessage:
		var parsed map[string]any
		decoder := json.NewDecoder(bytes.NewReader(value))
		decoder.UseNumber()
		if err := decoder.Decode(&parsed); err != nil {
			return value // it is no message, so it has no fields
		}
		return f.of(parsed)
	}
	return value
}
