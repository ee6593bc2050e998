package accesslog

import (
	"strconv"
	"unicode/utf8"

	"github.com/pillion-proxy/pillion/internal/flow"
)

// style is the context of a value in the line.
type style uint8

const (
	bare       style = iota // in text, between spaces: visible ASCII, and no quotation mark
	quoted                  // in text, between quotation marks
	jsonString              // inside a JSON string
	jsonValue               // as a whole JSON value
	plain                   // as it is, apart from invalid UTF-8: a text of protobuf
)

// Bounds. A longer value ends in cutMark; in a full line the last values may consist of it alone. A format reserves room
// for short values and for its own text, so values are cut and the line itself never is.
const (
	maxValue = flow.MaxValue
	maxLine  = 32 << 10
	maxShort = 80 // room for an operator whose value has a natural bound, such as an address with its zone
	cutMark  = flow.CutMark
)

type text interface{ ~string | ~[]byte }

// special marks the bytes that may need an escape: control characters, DEL, quotation marks, backslashes, all bytes of
// UTF-8 beyond ASCII, and in a bare value the space.
var special = func() (t [5][256]bool) {
	for s := range t {
		for b := range 256 {
			t[s][b] = b < ' ' || b == '"' || b == '\\' || b >= 0x7f || style(s) == bare && b == ' '
			if style(s) == plain {
				t[s][b] = b >= utf8.RuneSelf
			}
		}
	}
	return t
}()

// appendText appends untrusted text so that it cannot end its field, its line or its JSON string, nor control a terminal.
// It appends at most room bytes.
//
// In text, a special byte becomes \xNN. So does a quotation mark (not \"), so that a reader which only looks for quotation
// marks splits the line correctly. Printable UTF-8 is kept between quotation marks. In JSON the escapes are JSON's, and
// invalid UTF-8 becomes \ufffd.
func appendText[T text](dst []byte, value T, s style, room int) []byte {
	unusual := &special[s]
	n := 0
	for n < len(value) && !unusual[value[n]] {
		n++
	}
	if n == len(value) && n <= room {
		return append(dst, value...)
	}
	end := len(dst) + max(room-len(cutMark), 0)
	for i := 0; i < len(value); {
		before, size := len(dst), 1
		if b := value[i]; !unusual[b] {
			dst = append(dst, b)
		} else {
			dst, size = appendSpecial(dst, string(value[i:min(i+utf8.UTFMax, len(value))]), s)
		}
		if len(dst) > end {
			return append(dst[:before], cutMark...)
		}
		i += size
	}
	return dst
}

// appendSpecial appends the first character of value and returns its length in value.
func appendSpecial(dst []byte, value string, s style) ([]byte, int) {
	r, size := utf8.DecodeRuneInString(value)
	valid := r != utf8.RuneError || size > 1
	inJSON := s == jsonString || s == jsonValue
	switch {
	case s == plain && valid:
		return append(dst, value[:size]...), size
	case s == plain:
		return append(dst, '?'), size
	case r == '\\' || inJSON && r == '"':
		return append(dst, '\\', byte(r)), size
	case r == '\n':
		return append(dst, `\n`...), size
	case r == '\r':
		return append(dst, `\r`...), size
	case r == '\t':
		return append(dst, `\t`...), size
	case r >= 0x80 && valid && s != bare && (strconv.IsPrint(r) || inJSON && r > 0xffff):
		return append(dst, value[:size]...), size
	case inJSON:
		return append(dst, '\\', 'u', hex[r>>12&15], hex[r>>8&15], hex[r>>4&15], hex[r&15]), size
	}
	for i := range size {
		dst = append(dst, '\\', 'x', hex[value[i]>>4], hex[value[i]&15])
	}
	return dst, size
}

const hex = "0123456789abcdef"
