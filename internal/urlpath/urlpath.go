// Package urlpath brings the path of a request to one normal form.
//
// Servers read a path in different ways: some decode %2F, some merge slashes, some resolve dot segments before they look
// at anything else. A policy or a route that looks at another form than the server does can be evaded. So the form is made
// once, and policies, routes and the server see the same bytes.
//
// The steps and their order are those of Envoy (source/common/http/path_utility.cc, with the path canonicalization of
// Chromium's URL library): escaped slashes, then normalization, then merged slashes.
package urlpath

import (
	"bytes"
	"errors"
	"unicode/utf8"
)

// Form says which changes a path undergoes. The zero value leaves it as it is.
type Form struct {
	Slashes Slashes // what becomes of %2F and %5C

	// Normalize resolves dot segments, also those that are written as %2E; turns backslashes into slashes; decodes escaped
	// letters, digits and "-._~"; and escapes bytes that a path must not have. Other escapes stay as they are.
	Normalize bool

	MergeSlashes bool // several slashes in a row become one

	// Strict rejects paths that servers read in different ways and that the other fields do not settle: see ErrAmbiguous.
	Strict bool
}

// Slashes is what becomes of escaped slashes and backslashes.
type Slashes uint8

// The choices.
const (
	KeepSlashes     Slashes = iota
	RejectSlashes           // ErrEscapedSlash
	RedirectSlashes         // they are unescaped, and Append returns ErrRedirect with the result
	UnescapeSlashes
)

// The reasons for which a path is rejected. A request with such a path is answered 400.
var (
	ErrFragment     = errors.New("the path has a fragment")
	ErrEscapedSlash = errors.New("the path has an escaped slash")
	ErrHiddenEscape = errors.New("the path has an escape sequence within another")
	ErrNUL          = errors.New("the path has an escaped NUL")
	ErrNotUTF8      = errors.New("the path is not UTF-8")
	ErrAmbiguous    = errors.New("servers read the path in different ways")
)

// ErrRedirect is not a failure of Append: the client is to be redirected to the result.
var ErrRedirect = errors.New("the path has an escaped slash, and the client is redirected to the path without")

// Split cuts a target in origin form at its query. The query has its question mark.
func Split(target []byte) (path, query []byte) {
	if i := bytes.IndexByte(target, '?'); i >= 0 {
		return target[:i], target[i:]
	}
	return target, nil
}

// Append appends the form of a request target: a path and, unchanged, its query. A target that is not in origin form, such
// as "*", is appended as it is.
//
// On an error other than ErrRedirect dst is returned without an addition.
func (f Form) Append(dst, target []byte) ([]byte, error) {
	if len(target) == 0 || target[0] != '/' {
		return append(dst, target...), nil
	}
	path, query := Split(target)
	if bytes.IndexByte(target, '#') >= 0 {
		return dst, ErrFragment
	}
	if f.Strict && f.ambiguous(path) {
		return dst, ErrAmbiguous
	}
	if f.Slashes == RejectSlashes && hasEscapedSlash(path) {
		return dst, ErrEscapedSlash
	}
	start := len(dst)
	dst, err := f.path(dst, path)
	if err != nil {
		return dst[:start], err
	}
	if f.MergeSlashes {
		dst = merge(dst, start)
	}
	dst = append(dst, query...)
	if f.Slashes == RedirectSlashes && hasEscapedSlash(path) {
		return dst, ErrRedirect
	}
	return dst, nil
}

// Has reports whether a target certainly has the form, so that Append would append it unchanged. It is quick, and false for
// some targets that have it.
func (f Form) Has(target []byte) bool {
	if f == (Form{}) && bytes.IndexByte(target, '#') < 0 {
		return true
	}
	last := byte(0)
	for i, c := range target {
		switch {
		case c == '?':
			return bytes.IndexByte(target[i:], '#') < 0
		case !plain[c], c == '.' && last == '/', c == '/' && last == '/':
			return false
		}
		last = c
	}
	return true
}

// path appends a path in its form, with slashes not merged yet.
func (f Form) path(dst, source []byte) ([]byte, error) {
	start := len(dst)
	for len(source) > 0 {
		if size := f.slash(source); size > 0 {
			dst, source = append(dst, '/'), source[size:]
			if f.Normalize {
				dst, source = f.dots(dst, start, source)
			}
			continue
		}
		var err error
		switch c := source[0]; {
		case !f.Normalize && f.unescapes() && isEscaped(source, '\\'):
			dst, source = append(dst, '\\'), source[3:]
		case !f.Normalize:
			dst, source = append(dst, c), source[1:]
		case c == '%':
			dst, source, err = escape(dst, source)
		case c < utf8.RuneSelf:
			dst, source = literal(dst, c), source[1:]
		default:
			dst, source, err = beyondASCII(dst, source)
		}
		if err != nil {
			return dst, err
		}
	}
	return dst, nil
}

// slash returns the length of what source begins with if that becomes a slash, or 0.
func (f Form) slash(source []byte) int {
	switch {
	case len(source) == 0:
		return 0
	case source[0] == '/', source[0] == '\\' && f.Normalize:
		return 1
	case f.unescapes() && (isEscaped(source, '/') || isEscaped(source, '\\') && f.Normalize):
		return 3
	}
	return 0
}

func (f Form) unescapes() bool { return f.Slashes == UnescapeSlashes || f.Slashes == RedirectSlashes }

// dots resolves the dot segments at the beginning of source, which follows a slash, the last byte of dst.
func (f Form) dots(dst []byte, start int, source []byte) (_, rest []byte) {
	for {
		n, length := f.dot(source)
		if n == 0 {
			return dst, source
		}
		if n == 2 {
			if i := bytes.LastIndexByte(dst[start:len(dst)-1], '/'); i >= 0 {
				dst = dst[:start+i+1]
			}
		}
		source = source[length+f.slash(source[length:]):]
	}
}

// dot returns the number of dots of the dot segment that source begins with, and its length without the slash that ends
// it. 0 is no dot segment.
func (f Form) dot(source []byte) (n, length int) {
	for {
		switch rest := source[length:]; {
		case len(rest) == 0 || f.slash(rest) > 0:
			return n, length
		case rest[0] == '.':
			length++
		case isEscaped(rest, '.'):
			length += 3
		default:
			return 0, 0
		}
		if n++; n > 2 {
			return 0, 0
		}
	}
}

// escape appends the escape sequence that source begins with. A percent sign alone stays as it is.
func escape(out, source []byte) ([]byte, []byte, error) {
	switch value, ok := escaped(source); {
	case !ok:
		return append(out, '%'), source[1:], nil
	case value == 0:
		return out, source, ErrNUL
	case completes(out, value):
		return out, source, ErrHiddenEscape
	case unreserved(value):
		return append(out, value), source[3:], nil
	default:
		return append(out, source[:3]...), source[3:], nil
	}
}

// completes reports whether out with c ends in an escape sequence, of which out has the percent sign: then decoding made one,
// as of %2%45, and the next decoder would resolve it.
func completes(out []byte, c byte) bool {
	_, ok := digit(c)
	n := len(out)
	return ok && (n > 0 && out[n-1] == '%' || n > 1 && out[n-2] == '%')
}

// beyondASCII appends the character beyond ASCII that source begins with, escaped.
func beyondASCII(out, source []byte) ([]byte, []byte, error) {
	r, size := utf8.DecodeRune(source)
	if r == utf8.RuneError && size == 1 {
		return out, source, ErrNotUTF8
	}
	for _, c := range source[:size] {
		out = percent(out, c)
	}
	return out, source[size:], nil
}

// literal appends a byte of ASCII, escaped if a path must not have it.
func literal(out []byte, c byte) []byte {
	if c <= ' ' || c == 0x7f || bytes.IndexByte([]byte("\"#<>?^`{|}"), c) >= 0 {
		return percent(out, c)
	}
	return append(out, c)
}

func percent(out []byte, c byte) []byte {
	const digits = "0123456789ABCDEF"
	return append(out, '%', digits[c>>4], digits[c&15])
}

// merge replaces runs of slashes in dst[start:] by one.
func merge(dst []byte, start int) []byte {
	n := start
	for i := start; i < len(dst); i++ {
		if dst[i] == '/' && n > start && dst[n-1] == '/' {
			continue
		}
		dst[n] = dst[i]
		n++
	}
	return dst[:n]
}

// ambiguous reports whether servers differ in how they read a path after its form was made. They differ in path parameters,
// which some cut off before they match; in an escaped percent sign, behind which another escape may be; in control
// characters; in escapes without two digits; and in what the form leaves of slashes and dot segments.
func (f Form) ambiguous(path []byte) bool {
	for i, c := range path {
		rest := path[i:]
		switch {
		case c == ';' || c < ' ' || c == 0x7f || c == '\\' && !f.Normalize:
			return true
		case c == '%':
			value, ok := escaped(rest)
			slash := value == '/' || value == '\\'
			if !ok || value == '%' || value == ';' || value < ' ' || value == 0x7f || slash && !f.unescapes() {
				return true
			}
		}
		if size := f.slash(rest); size > 0 {
			n, _ := f.dot(rest[size:])
			if n > 0 && !f.Normalize || f.slash(rest[size:]) > 0 && !f.MergeSlashes {
				return true
			}
		}
	}
	return false
}

// escaped returns the byte for which the escape sequence at the beginning of text stands.
func escaped(text []byte) (value byte, ok bool) {
	if len(text) < 3 || text[0] != '%' {
		return 0, false
	}
	high, ok1 := digit(text[1])
	low, ok2 := digit(text[2])
	return high<<4 | low, ok1 && ok2
}

// isEscaped reports whether text begins with an escape sequence for c.
func isEscaped(text []byte, c byte) bool {
	value, ok := escaped(text)
	return ok && value == c
}

// hasEscapedSlash reports whether a path has an escaped slash or backslash.
func hasEscapedSlash(path []byte) bool {
	for i := range path {
		if isEscaped(path[i:], '/') || isEscaped(path[i:], '\\') {
			return true
		}
	}
	return false
}

func digit(c byte) (value byte, ok bool) {
	switch {
	case '0' <= c && c <= '9':
		return c - '0', true
	case 'a' <= c|0x20 && c|0x20 <= 'f':
		return c | 0x20 - 'a' + 10, true
	}
	return 0, false
}

func unreserved(c byte) bool {
	return 'a' <= c|0x20 && c|0x20 <= 'z' || '0' <= c && c <= '9' || c == '-' || c == '.' || c == '_' || c == '~'
}

// plain has the bytes that no form changes or rejects, except for dots and slashes after a slash.
var plain = func() (plain [256]bool) {
	for c := range 256 {
		plain[c] = unreserved(byte(c)) || bytes.IndexByte([]byte("/!$&'()*+,:=@[]"), byte(c)) >= 0
	}
	return plain
}()
