package configdump

import (
	"math"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/pillion-proxy/pillion/internal/wire"
)

// specials print the types that have a form of their own in JSON. init fills it, because they print messages.
var specials map[string]func(p *printer, b []byte, depth int, hide bool) error

func init() {
	specials = map[string]func(p *printer, b []byte, depth int, hide bool) error{
		"google.protobuf.Any":       (*printer).any,
		"google.protobuf.Duration":  (*printer).duration,
		"google.protobuf.Timestamp": (*printer).timestamp,
		"google.protobuf.FieldMask": (*printer).fieldMask,
		"google.protobuf.Struct":    (*printer).structure,
		"google.protobuf.Value":     (*printer).value,
		"google.protobuf.ListValue": (*printer).list,
	}
	for _, name := range []string{"Double", "Float", "Int64", "UInt64", "Int32", "UInt32", "Bool", "String", "Bytes"} {
		name = "google.protobuf." + name + "Value"
		specials[name] = func(p *printer, b []byte, depth int, hide bool) error { return p.wrapper(name, b, depth, hide) }
	}
}

// any prints the message inside with its type.
func (p *printer) any(b []byte, depth int, hide bool) error {
	var url string
	var inner []byte
	err := p.each(p.types.message("google.protobuf.Any"), b, depth, func(f *field, values []value) error {
		switch last := values[len(values)-1]; f.number {
		case 1:
			url = string(last.bytes)
		case 2:
			inner = last.bytes
		}
		return nil
	})
	if err != nil {
		return err
	}
	if !utf8.ValidString(url) {
		return wire.ErrUTF8
	}
	if url == "" {
		p.text = append(p.text, "{}"...)
		return nil
	}
	start, held := len(p.text), len(p.values)
	if err := p.typed(url, inner, depth+1, hide); err != nil {
		p.values = p.values[:held]
		p.opaque(start, url, inner, hide || p.types.Known(url))
	}
	return nil
}

// wrapper prints the value of a message that wraps one, such as google.protobuf.UInt32Value. The absent value is zero.
func (p *printer) wrapper(name string, b []byte, depth int, hide bool) error {
	m := p.types.message(name)
	last := value{field: m.fields[1]}
	err := p.each(m, b, depth, func(_ *field, values []value) error {
		last = values[len(values)-1]
		return nil
	})
	if err != nil {
		return err
	}
	printed, err := p.single(last.field, last, depth, hide)
	if !printed && err == nil {
		return p.scalar(last.field, value{})
	}
	return err
}

// seconds returns the two numbers of a google.protobuf.Duration or Timestamp.
func (p *printer) seconds(name string, b []byte, depth int) (seconds, nanos int64, err error) {
	err = p.each(p.types.message(name), b, depth, func(f *field, values []value) error {
		switch last := values[len(values)-1]; f.number {
		case 1:
			seconds = int64(last.bits)
		case 2:
			nanos = int64(int32(last.bits))
		}
		return nil
	})
	return seconds, nanos, err
}

// maxSeconds is the limit of a google.protobuf.Duration: 10,000 years.
const maxSeconds = 315_576_000_000

func (p *printer) duration(b []byte, depth int, hide bool) error {
	seconds, nanos, err := p.seconds("google.protobuf.Duration", b, depth)
	if err != nil {
		return err
	}
	if seconds < -maxSeconds || seconds > maxSeconds || nanos <= -1e9 || nanos >= 1e9 || seconds > 0 && nanos < 0 || seconds < 0 && nanos > 0 {
		return errValue
	}
	sign := ""
	if seconds < 0 || nanos < 0 {
		sign, seconds, nanos = "-", -seconds, -nanos
	}
	if hide {
		sign, seconds, nanos = "", 0, 0
	}
	p.quoted(sign + strconv.FormatInt(seconds, 10) + fraction(nanos) + "s")
	return nil
}

// fraction returns nanoseconds as a fraction of 0, 3, 6 or 9 digits.
func fraction(nanos int64) string {
	if nanos == 0 {
		return ""
	}
	digits := strconv.FormatInt(1e9+nanos, 10)[1:]
	digits = strings.TrimSuffix(strings.TrimSuffix(digits, "000"), "000")
	return "." + digits
}

func (p *printer) timestamp(b []byte, depth int, hide bool) error {
	seconds, nanos, err := p.seconds("google.protobuf.Timestamp", b, depth)
	if err != nil {
		return err
	}
	if hide {
		seconds, nanos = 0, 0
	}
	at := time.Unix(seconds, 0).UTC()
	if seconds < -maxSeconds || seconds > maxSeconds || at.Year() < 1 || at.Year() > 9999 || nanos < 0 || nanos >= 1e9 {
		return errValue
	}
	p.quoted(at.Format("2006-01-02T15:04:05") + fraction(nanos) + "Z")
	return nil
}

// fieldMask prints paths in lower camel case, separated by commas.
func (p *printer) fieldMask(b []byte, depth int, _ bool) error {
	var paths []string
	err := p.each(p.types.message("google.protobuf.FieldMask"), b, depth, func(_ *field, values []value) error {
		for _, v := range values {
			paths = append(paths, camelCase(string(v.bytes)))
		}
		return nil
	})
	p.string(strings.Join(paths, ","))
	return err
}

func camelCase(name string) string {
	var b strings.Builder
	for part := range strings.SplitSeq(name, "_") {
		if b.Len() > 0 && part != "" {
			part = strings.ToUpper(part[:1]) + part[1:]
		}
		b.WriteString(part)
	}
	return b.String()
}

// structure prints a google.protobuf.Struct.
func (p *printer) structure(b []byte, depth int, hide bool) error {
	return p.only("google.protobuf.Struct", "{}", b, depth, hide)
}

// list prints a google.protobuf.ListValue.
func (p *printer) list(b []byte, depth int, hide bool) error {
	return p.only("google.protobuf.ListValue", "[]", b, depth, hide)
}

// only prints the one field of a message in the place of the message. An absent or hidden one is printed as empty.
func (p *printer) only(name, empty string, b []byte, depth int, hide bool) error {
	found := false
	err := p.each(p.types.message(name), b, depth, func(f *field, values []value) (err error) {
		if !hide {
			found, err = p.field(f, values, depth+1, false)
		}
		return err
	})
	if err == nil && !found {
		p.text = append(p.text, empty...)
	}
	return err
}

// value prints a google.protobuf.Value. One of no kind is null.
func (p *printer) value(b []byte, depth int, hide bool) error {
	kinds := 0
	err := p.each(p.types.message("google.protobuf.Value"), b, depth, func(f *field, values []value) error {
		kinds++
		last := values[len(values)-1]
		if number := math.Float64frombits(last.bits); f.kind == kindDouble && (math.IsNaN(number) || math.IsInf(number, 0)) {
			return errValue // the strings that stand for these would be strings of the Value
		}
		printed, err := p.field(f, values, depth+1, hide)
		if !printed {
			kinds = 0
		}
		return err
	})
	if err == nil && kinds == 0 {
		p.text = append(p.text, "null"...)
	}
	return err
}
