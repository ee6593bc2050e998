package http1

// class is a set of bytes that are allowed in one part of a head.
type class uint8

const (
	token      class = 1 << iota // methods and field names (RFC 9110 §5.6.2)
	targetByte                   // request targets: no space or control characters, but bytes beyond ASCII, because clients send them
	hostByte                     // Host: uri-host and port (RFC 3986 §3.2.2)
)

// classes maps each byte to its classes.
var classes = func() (of [256]class) {
	const (
		alphanumeric = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
		unreserved   = alphanumeric + "-._~"
		subDelims    = "!$&'()*+,;="
	)
	for _, set := range []struct {
		class class
		bytes string
	}{
		{token, alphanumeric + "!#$%&'*+-.^_`|~"},
		{hostByte, unreserved + subDelims + "%:[]"},
	} {
		for _, c := range []byte(set.bytes) {
			of[c] |= set.class
		}
	}
	for c := '!'; c <= 0xff; c++ {
		if c != 0x7f {
			of[c] |= targetByte
		}
	}
	return of
}()

// run returns how many of the first bytes of p are in class c.
func run(p []byte, c class) int {
	for i, x := range p {
		if classes[x]&c == 0 {
			return i
		}
	}
	return len(p)
}

func digit(c byte) bool { return '0' <= c && c <= '9' }
func blank(c byte) bool { return c == ' ' || c == '\t' }

// trim returns the bounds of p[start:] without surrounding white space.
func trim(p []byte, start int) (from, to int) {
	for to = len(p); to > start && blank(p[to-1]); to-- {
	}
	for from = start; from < to && blank(p[from]); from++ {
	}
	return from, to
}

// same reports whether p equals lower, a word of lower-case letters, digits and hyphens, ignoring ASCII case. Setting
// bit 5 converts a letter to lower case. It also converts control characters to digits and hyphens, so only letters are
// compared that way.
func same(p []byte, lower string) bool {
	if len(p) != len(lower) {
		return false
	}
	for i, c := range p {
		if l := lower[i]; c != l && (c|0x20 != l || l < 'a') {
			return false
		}
	}
	return true
}
