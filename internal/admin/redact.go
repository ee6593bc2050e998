package admin

import (
	"encoding/json"
	"strings"
)

const redacted = "[redacted]"

// withoutHeaders returns a message in which the values of header fields are replaced: of those that are added, and of those
// that requests are matched by, except pseudo-headers such as :path. Inline texts, such as code, are replaced as well.
func withoutHeaders(value any) any {
	switch value := value.(type) {
	case json.RawMessage:
		var parsed any
		if err := json.Unmarshal(value, &parsed); err != nil {
			return redacted
		}
		return withoutHeaders(parsed)
	case []object:
		for i := range value {
			withoutHeaders(map[string]any(value[i]))
		}
	case []any:
		for i := range value {
			value[i] = withoutHeaders(value[i])
		}
	case object:
		return withoutHeaders(map[string]any(value))
	case map[string]any:
		hideFields(value)
	}
	return value
}

// hideFields treats the fields of a message. A HeaderValue has a key and a value, a HeaderMatcher a name.
func hideFields(message map[string]any) {
	_, keyed := message["key"].(string)
	for name, inner := range message {
		switch _, text := inner.(string); {
		case text && (keyed && (name == "value" || name == "raw_value") || name == "inline_code" || name == "inline_string"):
			message[name] = redacted
		case name == "headers" || name == "header":
			message[name] = withoutMatch(inner)
		default:
			message[name] = withoutHeaders(inner)
		}
	}
}

// withoutMatch hides what a HeaderMatcher, or each of several, compares with.
func withoutMatch(value any) any {
	switch value := value.(type) {
	case []any:
		for i := range value {
			value[i] = withoutMatch(value[i])
		}
	case map[string]any:
		name, ok := value["name"].(string)
		if !ok { // a HeaderValue
			hideFields(value)
		} else if !strings.HasPrefix(name, ":") {
			for field, inner := range value {
				if field != "name" {
					value[field] = withoutText(inner)
				}
			}
		}
	}
	return value
}

// withoutText hides all texts in a value.
func withoutText(value any) any {
	switch value := value.(type) {
	case string:
		return redacted
	case map[string]any:
		for field, inner := range value {
			value[field] = withoutText(inner)
		}
	}
	return value
}
