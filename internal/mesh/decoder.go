package mesh

import (
	"errors"
	"fmt"
	"reflect"
	"strconv"
	"strings"

	"github.com/pillion-proxy/pillion/internal/wire"
)

// treatment is what becomes of a field that is present.
type treatment uint8

const (
	unknown  treatment = iota // not in the table: a finding of the message's class
	decoded                   // by the switch of the function that reads the message
	once                      // decoded: a message that occurs once; protobuf would merge another one, so that is a finding of security
	choice                    // decoded: a member of the message's only oneof; a further member that is read is a finding of security
	ignored                   // it concerns nothing that pillion does
	cosmetic                  // a finding
	traffic                   // a finding
	security                  // a finding
)

// field is a row of a table.
type field struct {
	name string
	is   treatment
}

// message is the table of the fields of one type of message, by number. It stands beside the function that reads the
// message, so a reader sees at once what pillion does with each field.
type message struct {
	name   string
	class  Class // of unknown fields
	fields []field
}

// decoder reads one resource. Errors of the wire format and findings collect in it.
type decoder struct {
	err      error
	findings []Finding
	refusals int  // findings that close what they concern, also those that are not kept
	narrow   int  // those of refusals that refuse less than a filter chain
	shadow   bool // what is read cannot restrict anything, so its findings are of the class of traffic at most

	conditions int // nodes of policies that were read
	room       int // bytes that lists may still take

	// Shared texts, and shared values without findings. They may be nil.
	texts  wire.Texts
	shared map[sharedKey]any

	// path has the field that is being read of each message that is being read, from the resource inwards; depth is the
	// index of the innermost. Messages without a table have no step of their own.
	path  []step
	depth int
}

// step is one field on the path from the resource to the field that is being read.
type step struct {
	field *field
	index int    // among the occurrences of the field
	seen  uint64 // numbers of the fields that must occur once and were read, of the same message
}

// read returns a reader of the resource b.
func (d *decoder) read(b []byte) wire.Message {
	m := wire.Read(b, &d.err)
	m.Texts = d.texts
	d.room = max(d.room, roomAtLeast+roomForByte*len(b))
	return m
}

// next moves m to the next field that table has as decoded, and reports the others.
func (d *decoder) next(m *wire.Message, table *message) bool {
	d.depth = m.Depth()
	if d.depth >= len(d.path) {
		d.path = append(d.path, make([]step, d.depth+8-len(d.path))...)
	}
	here := &d.path[d.depth]
	for m.Next() {
		var row *field
		if m.Number < len(table.fields) {
			row = &table.fields[m.Number]
		}
		if row == nil || row.is == unknown {
			here.field, here.index = nil, 0
			d.report(table.class, fmt.Sprintf("unknown field %d of %s", m.Number, table.name))
			continue
		}
		if here.field == row {
			here.index++
		} else {
			here.field, here.index = row, 0
		}
		switch row.is {
		case decoded:
			return true
		case once:
			if here.seen&(1<<m.Number) != 0 {
				d.report(Security, "more than once")
			}
			here.seen |= 1 << m.Number
			return true
		case choice: // number 0 is not a field's
			if here.seen&1 != 0 {
				d.report(Security, "more than one member of a oneof")
			}
			here.seen |= 1
			return true
		case cosmetic:
			d.report(Cosmetic, unsupported)
		case traffic:
			d.report(Traffic, unsupported)
		case security:
			d.report(Security, unsupported)
		}
	}
	*here = step{}
	d.depth--
	return false
}

const unsupported = "not supported"

// Lists may take some bytes for each resource, and some for each of its bytes: an element of 2 bytes takes up to 300.
const (
	roomAtLeast = 64 << 10
	roomForByte = 16
)

var errRoom = errors.New("its lists take too much memory")

// add appends the value of m's current field to a list of the fields with this number. The list has room for all of them.
func add[T any](d *decoder, list *[]T, m *wire.Message, value T) {
	if *list == nil {
		count := 1 + m.Count(m.Number)
		if d.room -= count * int(reflect.TypeFor[T]().Size()); d.room < 0 && d.err == nil {
			d.err = errRoom
		}
		if d.err != nil {
			return
		}
		*list = make([]T, 0, count)
	}
	*list = append(*list, value)
}

// report adds a finding about the field that is being read.
func (d *decoder) report(class Class, problem string) {
	if class >= Unenforced {
		d.refusals++
	}
	if d.shadow {
		class = min(class, Traffic)
	}
	if len(d.findings) == maxFindings {
		last := &d.findings[maxFindings-1]
		last.Class, last.Path, last.Problem = max(last.Class, class), "", "more findings than are kept"
		return
	}
	d.findings = append(d.findings, Finding{Class: class, Path: d.place(), Problem: clip(problem)})
}

// maxProblem bounds the text of a finding, in bytes: names in resources have no limit.
const maxProblem = 500

func clip(text string) string {
	if len(text) <= maxProblem {
		return text
	}
	return strings.ToValidUTF8(text[:maxProblem], "") + "…"
}

// place returns the path of the field that is being read.
func (d *decoder) place() string {
	var b strings.Builder
	for _, step := range d.path[:d.depth+1] {
		if step.field == nil {
			continue
		}
		if b.Len() > 0 {
			b.WriteByte('.')
		}
		b.WriteString(step.field.name)
		if step.index > 0 {
			b.WriteString("[" + strconv.Itoa(step.index) + "]")
		}
	}
	return b.String()
}

// attribute sets the origin of the findings from index first on that have none: an inner message has named its own.
func (d *decoder) attribute(first int, origin string) {
	for i := min(first, len(d.findings)); i < len(d.findings); i++ {
		if d.findings[i].Origin == "" {
			d.findings[i].Origin = clip(origin)
		}
	}
}
