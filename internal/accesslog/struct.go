package accesslog

import (
	"bytes"
	"errors"
	"math"
	"sort"
	"strconv"

	"github.com/pillion-proxy/pillion/internal/wire"
)

// maxNested is how deep objects of a format may be nested.
const maxNested = 16

var errNested = errors.New("access log format: objects are nested too deeply")

// appendStruct appends the JSON of a google.protobuf.Struct. Its members are sorted by name, as in Envoy.
func appendStruct(dst, b []byte) (_ []byte, err error) {
	dst = appendObject(dst, wire.Read(b, &err), &err)
	return dst, err
}

func appendObject(dst []byte, m wire.Message, err *error) []byte {
	if m.Depth() > 3*maxNested && *err == nil {
		*err = errNested
	}
	type member struct {
		name  string
		value wire.Message
	}
	var members []member
	for m.Next() {
		if m.Number != 1 {
			continue
		}
		one := member{value: m.Nested(nil)}
		for m := m.Message(); m.Next(); {
			switch m.Number {
			case 1:
				one.name = m.String()
			case 2:
				one.value = m.Message()
			}
		}
		members = append(members, one)
	}
	sort.SliceStable(members, func(i, j int) bool { return members[i].name < members[j].name })
	dst = append(dst, '{')
	for i, one := range members {
		if i > 0 {
			dst = append(dst, ',')
		}
		dst = append(appendString(dst, one.name), ':')
		dst = appendValue(dst, one.value, err)
	}
	return append(dst, '}')
}

func appendString(dst []byte, text string) []byte {
	return append(appendText(append(dst, '"'), text, jsonString, math.MaxInt32), '"')
}

// appendValue appends a google.protobuf.Value.
func appendValue(dst []byte, m wire.Message, err *error) []byte {
	start := len(dst)
	for m.Next() {
		dst = dst[:start]
		switch m.Number {
		case 2:
			dst = appendNumber(dst, m.Double())
		case 3:
			dst = appendString(dst, m.String())
		case 4:
			dst = strconv.AppendBool(dst, m.Bool())
		case 5:
			dst = appendObject(dst, m.Message(), err)
		case 6:
			dst = appendList(dst, m.Message(), err)
		}
	}
	if len(dst) == start {
		dst = append(dst, "null"...)
	}
	return dst
}

func appendNumber(dst []byte, f float64) []byte {
	if math.IsNaN(f) || math.IsInf(f, 0) {
		return append(dst, "null"...)
	}
	return strconv.AppendFloat(dst, f, 'g', -1, 64)
}

func appendList(dst []byte, m wire.Message, err *error) []byte {
	dst = append(dst, '[')
	for m.Next() {
		dst = append(appendValue(dst, m.Message(), err), ',')
	}
	return append(bytes.TrimSuffix(dst, []byte{','}), ']')
}
