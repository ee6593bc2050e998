package admin

import (
	"bytes"
	"encoding/json"
	"io"
	"iter"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/pillion-proxy/pillion/internal/ownport"
)

// section is one message of a dump. Its resources are made when they are written, so a dump of thousands takes the memory
// of one.
type section struct {
	message string         // its type
	fields  object         // all but the lists
	lists   []resourceList // in the order of their names
}

// resourceList is a repeated field of a section.
type resourceList struct {
	name    string
	message string // type of the items
	items   iter.Seq[item]
}

// item is one resource of a list.
type item struct {
	name  string
	value func() object
}

// write writes the selected part of the sections as one response. It returns false, and has not written anything, if the
// choice is a list that no section has.
func (c choice) write(w http.ResponseWriter, sections []section) bool {
	if c.resource != "" && !slices.ContainsFunc(sections, func(s section) bool {
		return slices.ContainsFunc(s.lists, func(l resourceList) bool { return l.name == c.resource })
	}) {
		return false
	}
	w.Header().Set("Content-Type", "application/json")
	out := &indented{w: w}
	out.open("{\n \"configs\": [")
	for _, s := range sections {
		if c.resource == "" {
			c.writeSection(out, s)
			continue
		}
		for _, l := range s.lists {
			if l.name == c.resource {
				c.writeItems(out, l, 2, func(o object) object { return c.mask.of(typed(l.message, o)).(object) })
			}
		}
	}
	out.close("\n ]")
	out.text("\n}\n")
	return true
}

func (c choice) writeSection(out *indented, s section) {
	fields := object{}
	maps.Copy(fields, s.fields)
	fields = c.mask.of(typed(s.message, fields)).(object)
	out.element(2)
	out.open("{")
	lists := s.lists
	for _, key := range fields.keys() {
		for len(lists) > 0 && lists[0].name < key {
			c.writeList(out, lists[0])
			lists = lists[1:]
		}
		out.element(3)
		out.value(key, 3)
		out.text(": ")
		out.value(fields[key], 3)
	}
	for _, l := range lists {
		c.writeList(out, l)
	}
	out.close("\n  }")
}

func (c choice) writeList(out *indented, l resourceList) {
	below, ok := c.mask[l.name]
	if len(c.mask) > 0 && !ok {
		return
	}
	out.element(3)
	out.value(l.name, 3)
	out.text(": ")
	out.open("[")
	c.writeItems(out, l, 4, func(o object) object { return below.of(o).(object) })
	out.close("\n   ]")
}

func (c choice) writeItems(out *indented, l resourceList, depth int, mask func(object) object) {
	for item := range l.items {
		if out.failed {
			return
		}
		if c.name == nil || c.name.MatchString(item.name) {
			value := any(mask(item.value()))
			if c.redact {
				value = withoutHeaders(value)
			}
			out.element(depth)
			out.value(value, depth)
		}
	}
}

func (o object) keys() []string {
	keys := make([]string, 0, len(o))
	for key := range o {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	return keys
}

// writeTime is for each value of a dump.
const writeTime = 10 * time.Second

// indented writes JSON in Envoy's formatting, value by value.
type indented struct {
	w       http.ResponseWriter
	buffer  bytes.Buffer
	encoder *json.Encoder // into buffer; nil before the first value
	empty   []bool        // of each open object and array: it has no element yet
	failed  bool          // the client left
}

func (i *indented) text(s string) {
	if _, err := io.WriteString(i.w, s); err != nil {
		i.failed = true
	}
}

func (i *indented) open(s string) {
	i.text(s)
	i.empty = append(i.empty, true)
}

// close ends the innermost object or array. Its end stands on the same line if it is empty.
func (i *indented) close(s string) {
	last := len(i.empty) - 1
	if i.empty[last] {
		s = strings.TrimSpace(s)
	}
	i.empty = i.empty[:last]
	i.text(s)
}

// element begins the next element of the innermost object or array, on a line with that many blanks.
func (i *indented) element(depth int) {
	last := len(i.empty) - 1
	if !i.empty[last] {
		i.text(",")
	}
	i.empty[last] = false
	i.text("\n" + strings.Repeat(" ", depth))
}

// value writes one value whose first line has begun with that many blanks.
func (i *indented) value(v any, depth int) {
	ownport.Extend(i.w, writeTime)
	if i.encoder == nil {
		i.encoder = json.NewEncoder(&i.buffer)
		i.encoder.SetEscapeHTML(false)
	}
	i.buffer.Reset()
	i.encoder.SetIndent(strings.Repeat(" ", depth), " ")
	i.encoder.Encode(v) // of types that can be encoded
	if _, err := i.w.Write(bytes.TrimSuffix(i.buffer.Bytes(), []byte("\n"))); err != nil {
		i.failed = true
	}
}
