package configdump

import (
	"encoding/base64"
	"errors"
	"fmt"
	"math"
	"slices"
	"sort"
	"strconv"
	"strings"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/pillion-proxy/pillion/internal/wire"
)

const (
	redacted = "[redacted]"
	maxText  = 32 << 20 // of the JSON of one resource
)

// Errors of a message that cannot be printed.
var (
	errMalformed = errors.New("malformed protobuf")
	errTooLong   = fmt.Errorf("longer than %d MiB as JSON", maxText>>20)
	errValue     = errors.New("a value that JSON has no form for")
)

// Append appends the message b of the type as a JSON object whose "@type" is url.
//
// A message inside of an unknown type is printed as its bytes: {"@type": …, "value": base64}. One of a known type that
// is malformed, or has no form in JSON, is printed with "[redacted]" as its bytes, because a key in it could not be found.
// So is the outermost, and err is the reason. Fields that the types do not have are left out.
func (t *Types) Append(dst []byte, url string, b []byte) ([]byte, error) {
	p := printer{types: t, text: dst, limit: len(dst) + maxText}
	if err := p.typed(url, b, 0, false); err != nil {
		return p.opaque(len(dst), url, b, t.Known(url)), err
	}
	return p.text, nil
}

// Known reports whether there is a description of the type.
func (t *Types) Known(url string) bool { return t.messages[typeName(url)] != nil }

// typeName returns the name of the type in a type URL.
func typeName(url string) string { return url[strings.LastIndexByte(url, '/')+1:] }

// printer appends JSON to text.
type printer struct {
	types  *Types
	text   []byte
	limit  int
	values []value // of the messages that are being printed, the outermost first
}

// value is one value of a field.
type value struct {
	field *field
	bits  uint64
	bytes []byte
}

// typed prints a message with its type. hide replaces what may be secret.
func (p *printer) typed(url string, b []byte, depth int, hide bool) error {
	m := p.types.message(typeName(url))
	if m == nil {
		return fmt.Errorf("unknown type %.200q", url)
	}
	p.text = append(p.text, `{"@type":`...)
	p.string(url)
	var err error
	if special := specials[m.name]; special != nil {
		p.text = append(p.text, `,"value":`...)
		err = special(p, b, depth, hide)
	} else {
		err = p.fields(m, b, depth, hide, true)
	}
	p.text = append(p.text, '}')
	return err
}

// opaque replaces the text from start on by the bytes of a message.
func (p *printer) opaque(start int, url string, b []byte, hide bool) []byte {
	if hide {
		b = []byte(redacted)
	}
	p.text = append(p.text[:start], `{"@type":`...)
	p.string(url)
	p.text = append(p.text, `,"value":`...)
	p.base64(b)
	p.text = append(p.text, '}')
	return p.text
}

// message prints a message of a known type.
func (p *printer) message(m *message, b []byte, depth int, hide bool) error {
	if special := specials[m.name]; special != nil {
		return special(p, b, depth, hide)
	}
	p.text = append(p.text, '{')
	err := p.fields(m, b, depth, hide, false)
	p.text = append(p.text, '}')
	return err
}

// fields prints the fields of a message. more is true if the object has a member already.
func (p *printer) fields(m *message, b []byte, depth int, hide, more bool) error {
	return p.each(m, b, depth, func(f *field, values []value) error {
		before := len(p.text)
		if more {
			p.text = append(p.text, ',')
		}
		p.string(f.name)
		p.text = append(p.text, ':')
		printed, err := p.field(f, values, depth+1, hide || f.sensitive)
		switch {
		case err != nil:
			return fmt.Errorf("%s.%s: %w", m.name, f.name, err)
		case len(p.text) > p.limit:
			return errTooLong
		case !printed:
			p.text = p.text[:before]
		}
		more = more || printed
		return nil
	})
}

// each calls visit for each field of a message that has values, in the order of the description. The values are those that
// count, and valid until visit returns.
func (p *printer) each(m *message, b []byte, depth int, visit func(*field, []value) error) error {
	if depth >= wire.MaxDepth {
		return wire.ErrDepth
	}
	start := len(p.values)
	defer func() { p.values = p.values[:start] }()
	if err := p.scan(m, b); err != nil {
		return err
	}
	p.settleOneofs(start)
	values := p.values[start:]
	sort.SliceStable(values, func(i, j int) bool { return values[i].field.index < values[j].field.index })
	for len(values) > 0 {
		f, n := values[0].field, 1
		for n < len(values) && values[n].field == f {
			n++
		}
		if err := visit(f, values[:n]); err != nil {
			return err
		}
		values = values[n:]
	}
	return nil
}

// scan appends the values of a message's fields in the order of their bytes. Like other readers of protobuf, it skips
// values of unknown fields and of other wire types than the field has.
func (p *printer) scan(m *message, b []byte) error {
	for len(b) > 0 {
		number, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return errMalformed
		}
		b = b[n:]
		n = protowire.ConsumeFieldValue(number, typ, b)
		if n < 0 {
			return errMalformed
		}
		if f := m.fields[int32(number)]; f != nil {
			if err := p.add(f, typ, b[:n]); err != nil {
				return err
			}
		}
		b = b[n:]
	}
	return nil
}

// add appends the values in b: one, or several that are packed.
func (p *printer) add(f *field, typ protowire.Type, b []byte) error {
	wanted := wireTypes[f.kind]
	switch {
	case typ == wanted:
		v, _ := consume(f, typ, b)
		p.values = append(p.values, v)
	case typ == protowire.BytesType && f.repeated:
		packed, _ := protowire.ConsumeBytes(b)
		for len(packed) > 0 {
			v, n := consume(f, wanted, packed)
			if n < 0 {
				return errMalformed
			}
			p.values, packed = append(p.values, v), packed[n:]
		}
	}
	return nil
}

func consume(f *field, typ protowire.Type, b []byte) (v value, n int) {
	v.field = f
	switch typ {
	case protowire.VarintType:
		v.bits, n = protowire.ConsumeVarint(b)
	case protowire.Fixed32Type:
		var bits uint32
		bits, n = protowire.ConsumeFixed32(b)
		v.bits = uint64(bits)
	case protowire.Fixed64Type:
		v.bits, n = protowire.ConsumeFixed64(b)
	case protowire.BytesType:
		v.bytes, n = protowire.ConsumeBytes(b)
	}
	return v, n
}

var wireTypes = [...]protowire.Type{
	kindDouble: protowire.Fixed64Type, kindFixed64: protowire.Fixed64Type, kindSfixed64: protowire.Fixed64Type,
	kindFloat: protowire.Fixed32Type, kindFixed32: protowire.Fixed32Type, kindSfixed32: protowire.Fixed32Type,
	kindString: protowire.BytesType, kindBytes: protowire.BytesType, kindMessage: protowire.BytesType, kindGroup: protowire.StartGroupType,
	kindInt64: protowire.VarintType, kindUint64: protowire.VarintType, kindInt32: protowire.VarintType, kindBool: protowire.VarintType,
	kindUint32: protowire.VarintType, kindEnum: protowire.VarintType, kindSint32: protowire.VarintType, kindSint64: protowire.VarintType,
}

// settleOneofs drops the values that a later field of the same oneof replaces.
func (p *printer) settleOneofs(start int) {
	var last map[int]*field // the field that counts of a oneof; nil: it came after others, so earlier values are replaced
	for i := len(p.values) - 1; i >= start; i-- {
		f := p.values[i].field
		if f.oneof == 0 {
			continue
		}
		winner, seen := last[f.oneof]
		switch {
		case !seen:
			if last == nil {
				last = make(map[int]*field)
			}
			last[f.oneof] = f
		case winner != f:
			last[f.oneof], p.values[i].field = nil, nil
		}
	}
	if last != nil {
		kept := slices.DeleteFunc(p.values[start:], func(v value) bool { return v.field == nil })
		p.values = p.values[:start+len(kept)]
	}
}

// field prints the values of one field. It reports false if the field is to be left out.
func (p *printer) field(f *field, values []value, depth int, hide bool) (printed bool, err error) {
	if f.kind == kindMessage {
		m := p.types.message(f.typeName)
		switch {
		case m == nil:
			return false, fmt.Errorf("no description of %s", f.typeName)
		case m.mapEntry:
			return true, p.entries(m, values, depth, hide)
		case !f.repeated:
			return true, p.message(m, merge(values), depth, hide)
		}
	}
	if !f.repeated {
		last := values[len(values)-1]
		if !f.optional && last.bits == 0 && len(last.bytes) == 0 && f.kind != kindMessage {
			return false, nil
		}
		return p.single(f, last, depth, hide)
	}
	separator := byte('[')
	for _, v := range values {
		before := len(p.text)
		p.text = append(p.text, separator)
		shown, err := p.single(f, v, depth, hide)
		if err != nil {
			return true, err
		}
		if !shown {
			p.text = p.text[:before]
			continue
		}
		separator = ','
	}
	p.text = append(p.text, ']')
	return separator == ',', nil
}

// merge returns the bytes of a message that came in parts. Concatenated, they are the merged message.
func merge(values []value) []byte {
	if len(values) == 1 {
		return values[0].bytes
	}
	var all []byte
	for _, v := range values {
		all = append(all, v.bytes...)
	}
	return all
}

// single prints one value. A hidden value without a form that hides it is left out.
func (p *printer) single(f *field, v value, depth int, hide bool) (printed bool, err error) {
	switch {
	case f.kind == kindMessage:
		return true, p.message(p.types.message(f.typeName), v.bytes, depth, hide)
	case hide && f.kind == kindString:
		p.string(redacted)
		return true, nil
	case hide && f.kind == kindBytes:
		p.base64([]byte(redacted))
		return true, nil
	case hide:
		return false, nil
	}
	return true, p.scalar(f, v)
}

func (p *printer) scalar(f *field, v value) error {
	switch f.kind {
	case kindDouble:
		p.float(math.Float64frombits(v.bits), 64)
	case kindFloat:
		p.float(float64(math.Float32frombits(uint32(v.bits))), 32)
	case kindInt64, kindSfixed64:
		p.quoted(strconv.FormatInt(int64(v.bits), 10))
	case kindSint64:
		p.quoted(strconv.FormatInt(protowire.DecodeZigZag(v.bits), 10))
	case kindUint64, kindFixed64:
		p.quoted(strconv.FormatUint(v.bits, 10))
	case kindInt32, kindSfixed32:
		p.text = strconv.AppendInt(p.text, int64(int32(v.bits)), 10)
	case kindSint32:
		p.text = strconv.AppendInt(p.text, int64(int32(protowire.DecodeZigZag(v.bits&math.MaxUint32))), 10)
	case kindUint32, kindFixed32:
		p.text = strconv.AppendUint(p.text, uint64(uint32(v.bits)), 10)
	case kindBool:
		p.text = strconv.AppendBool(p.text, v.bits != 0)
	case kindEnum:
		p.enum(f, int32(v.bits))
	case kindBytes:
		p.base64(v.bytes)
	case kindString:
		if !utf8.Valid(v.bytes) {
			return wire.ErrUTF8
		}
		p.text = appendString(p.text, v.bytes)
	default:
		return errValue
	}
	return nil
}

func (p *printer) enum(f *field, number int32) {
	switch name, ok := p.types.enums[f.typeName][number]; {
	case f.typeName == "google.protobuf.NullValue":
		p.text = append(p.text, "null"...)
	case ok:
		p.quoted(name)
	default:
		p.text = strconv.AppendInt(p.text, int64(number), 10)
	}
}

// entries prints a map. Of entries with the same key the last counts.
func (p *printer) entries(m *message, values []value, depth int, hide bool) error {
	key, inner := m.fields[1], m.fields[2]
	if key == nil || inner == nil {
		return errMalformed
	}
	byKey := make(map[string]value)
	var keys []string
	for _, v := range values {
		name, held, err := p.entry(m, v.bytes)
		if err != nil {
			return err
		}
		if _, ok := byKey[name]; !ok {
			keys = append(keys, name)
		}
		byKey[name] = held
	}
	slices.Sort(keys)
	separator := ""
	p.text = append(p.text, '{')
	for _, name := range keys {
		before := len(p.text)
		p.text = append(p.text, separator...)
		p.string(name)
		p.text = append(p.text, ':')
		shown, err := p.single(inner, byKey[name], depth, hide)
		if err != nil {
			return err
		}
		if !shown {
			p.text = p.text[:before]
			continue
		}
		separator = ","
	}
	p.text = append(p.text, '}')
	return nil
}

// entry returns the key of an entry of a map as text, and its value. An absent one is zero.
func (p *printer) entry(m *message, b []byte) (name string, held value, err error) {
	start := len(p.values)
	defer func() { p.values = p.values[:start] }()
	if err := p.scan(m, b); err != nil {
		return "", held, err
	}
	key := value{field: m.fields[1]}
	held.field = m.fields[2]
	var parts []value
	for _, v := range p.values[start:] {
		if v.field == key.field {
			key = v
		} else if held = v; v.field.kind == kindMessage {
			parts = append(parts, v)
		}
	}
	if len(parts) > 1 {
		held.bytes = merge(parts)
	}
	text := len(p.text)
	err = p.scalar(key.field, key)
	name = string(p.text[text:])
	p.text = p.text[:text]
	if key.field.kind == kindString {
		return string(key.bytes), held, err
	}
	return strings.Trim(name, `"`), held, err
}

func (p *printer) quoted(plain string) {
	p.text = append(p.text, '"')
	p.text = append(p.text, plain...)
	p.text = append(p.text, '"')
}

func (p *printer) base64(b []byte) {
	p.text = append(p.text, '"')
	p.text = base64.StdEncoding.AppendEncode(p.text, b)
	p.text = append(p.text, '"')
}

const hexDigits = "0123456789abcdef"

// string prints a string. Bytes that are not UTF-8 are replaced.
func (p *printer) string(s string) {
	if !utf8.ValidString(s) {
		s = strings.ToValidUTF8(s, "\uFFFD")
	}
	p.text = appendString(p.text, s)
}

// appendString appends UTF-8 as a JSON string.
func appendString[T string | []byte](text []byte, s T) []byte {
	text = append(text, '"')
	for i := range len(s) {
		switch c := s[i]; {
		case c == '"' || c == '\\':
			text = append(text, '\\', c)
		case c == '\n':
			text = append(text, '\\', 'n')
		case c < 0x20:
			text = append(text, '\\', 'u', '0', '0', hexDigits[c>>4], hexDigits[c&15])
		default:
			text = append(text, c)
		}
	}
	return append(text, '"')
}

// float prints a number. JSON has no form for those that are not finite, so they are strings.
func (p *printer) float(f float64, bits int) {
	switch {
	case math.IsNaN(f):
		p.quoted("NaN")
	case math.IsInf(f, 1):
		p.quoted("Infinity")
	case math.IsInf(f, -1):
		p.quoted("-Infinity")
	default:
		p.text = strconv.AppendFloat(p.text, f, 'g', -1, bits)
	}
}
