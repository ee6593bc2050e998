package http1

import (
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

func parseRequest(t *testing.T, message string) (*Head, []byte) {
	t.Helper()
	h, b := new(Head), []byte(message)
	if done, err := h.ParseRequest(b, Limits{}); !done || err != nil {
		t.Fatalf("%q: %v, %v", message, done, err)
	}
	return h, b
}

func TestTheRequestLineIsTakenApart(t *testing.T) {
	h, b := parseRequest(t, "\r\nPURGE /a?b HTTP/1.0\r\nX:  y \r\n\r\nbody")
	for _, c := range []struct{ what, got, want string }{
		{"line", string(h.Line.In(b)), "PURGE /a?b HTTP/1.0"},
		{"method", string(h.Method.In(b)), "PURGE"},
		{"target", string(h.Target.In(b)), "/a?b"},
		{"field", string(h.Fields[0].Line.In(b)), "X:  y "},
		{"name", string(h.Fields[0].Name.In(b)), "X"},
		{"value", string(h.Fields[0].Value.In(b)), "y"},
		{"behind the head", string(b[h.Length:]), "body"},
	} {
		if c.got != c.want {
			t.Errorf("%s: %q, want %q", c.what, c.got, c.want)
		}
	}
	if h.Minor != 0 {
		t.Errorf("HTTP/1.%d", h.Minor)
	}
}

func TestTheStatusLineIsTakenApart(t *testing.T) {
	for _, c := range []struct {
		line   string
		status int
		reason string
	}{
		{"HTTP/1.1 404 Not Found ", 404, "Not Found "},
		{"HTTP/1.1 200 ", 200, ""},
		{"HTTP/1.1 200", 200, ""},
		{"HTTP/1.1 100  x", 100, " x"},
	} {
		h, b := new(Head), []byte(c.line+"\r\n\r\n")
		if done, err := h.ParseResponse(b, Limits{}); !done || err != nil {
			t.Fatalf("%q: %v, %v", c.line, done, err)
		}
		if reason := string(h.Reason.In(b)); h.Status != c.status || reason != c.reason || h.Minor != 1 {
			t.Errorf("%q: %d %q HTTP/1.%d", c.line, h.Status, reason, h.Minor)
		}
	}
}

func TestLimitsAreTheCallers(t *testing.T) {
	const message = "GET / HTTP/1.1\r\nHost: a\r\nX: y\r\n\r\n"
	for _, c := range []struct {
		limits Limits
		want   error
	}{
		{Limits{Head: len(message), Fields: 2}, nil},
		{Limits{Head: len(message) - 1, Fields: 2}, ErrHeadTooLarge},
		{Limits{Head: len(message), Fields: 1}, ErrTooManyFields},
		{Limits{Head: 1}, ErrHeadTooLarge},
		{Limits{}, nil},
		{Limits{Head: -1, Fields: -1}, nil},
	} {
		var h Head
		if done, err := h.ParseRequest([]byte(message), c.limits); !errors.Is(err, c.want) || done != (c.want == nil) {
			t.Errorf("%+v: %v, %v, want %v", c.limits, done, err, c.want)
		}
	}
}

// A caller whose buffer is as large as the limit must not be asked for more.
func TestAFullBufferIsTooLarge(t *testing.T) {
	const begun = "GET / HTTP/1.1\r\nHost: a\r\n"
	var h Head
	if done, err := h.ParseRequest([]byte(begun), Limits{Head: len(begun)}); done || err != ErrHeadTooLarge {
		t.Errorf("%v, %v", done, err)
	}
}

// The line is spoilt behind the parser's back, so that a second look would find its end.
func TestALineThatDribblesInIsLookedAtOnce(t *testing.T) {
	const size = 256 << 10
	b := []byte("GET /" + strings.Repeat("x", size))
	var h Head
	for n := range b {
		if done, err := h.ParseRequest(b[:n+1], Limits{Head: 2 * size}); done || err != nil {
			t.Fatalf("at %d: %v, %v", n, done, err)
		}
		b[n] = '\n'
	}
}

func TestACompleteHeadStaysComplete(t *testing.T) {
	h, b := parseRequest(t, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
	length, fields := h.Length, len(h.Fields)
	done, err := h.ParseRequest(append(b, "more"...), Limits{})
	if !done || err != nil || h.Length != length || len(h.Fields) != fields {
		t.Errorf("%v, %v: %+v", done, err, h)
	}
}

func TestAHeadIsAsNewAfterReset(t *testing.T) {
	h := new(Head)
	h.ParseRequest([]byte("\r\nGET / HTTP/1.0\r\nHost: a\r\nConnection: X\r\nX\r\n"), Limits{})
	h.Reset()
	if h.Has(Host) || h.Has(Connection) {
		t.Error("fields are left")
	}
	b := []byte("HTTP/1.1 200 OK\r\n\r\n")
	done, err := h.ParseResponse(b, Limits{})
	if !done || err != nil || h.Length != len(b) || len(h.Fields) != 0 || !h.Method.Empty() {
		t.Errorf("%v, %v: %+v", done, err, h)
	}
}

func TestFindSeesKeptFieldsOnly(t *testing.T) {
	h, _ := parseRequest(t, "GET / HTTP/1.1\r\nX: y\r\nHost: a\r\ncookie: 1\r\nCookie: 2\r\n\r\n")
	if i := h.Find(Cookie); i != 2 {
		t.Errorf("the first Cookie is at %d", i)
	}
	h.Fields[2].Dropped = true
	if i := h.Find(Cookie); i != 3 {
		t.Errorf("the second Cookie is at %d", i)
	}
	h.Fields[3].Dropped = true
	if h.Has(Cookie) || !h.Has(Host) || h.Has(Date) {
		t.Error("Has disagrees")
	}
}

func TestEveryKnownNameIsKnownInAnyCase(t *testing.T) {
	if knownCount > 64 {
		t.Fatalf("%d known names do not fit the bits of a word", knownCount)
	}
	for k := Unknown + 1; k < knownCount; k++ {
		name := k.String()
		if name == "" || name != strings.ToLower(name) || run([]byte(name), token) != len(name) {
			t.Fatalf("known name %d is %q", k, name)
		}
		for _, spelling := range []string{name, strings.ToUpper(name), strings.ToUpper(name[:1]) + name[1:]} {
			if got := knownName([]byte(spelling)); got != k {
				t.Errorf("%s is %s", spelling, got)
			}
		}
		for _, other := range []string{strings.Map(withoutBit5, name), name + "x", "x" + name, name[1:], name + "_"} {
			if got := knownName([]byte(other)); got != Unknown && got.String() != strings.ToLower(other) {
				t.Errorf("%s is %s", other, got)
			}
		}
	}
}

// withoutBit5 makes a letter large, and a control character of a digit or a hyphen.
func withoutBit5(r rune) rune { return r &^ 0x20 }

// The table of bytes is held against the words of the RFCs, byte by byte.
func TestEveryByteIsInItsClasses(t *testing.T) {
	for c := range 256 {
		letter := 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9'
		for _, is := range []struct {
			what string
			got  bool
			want bool
		}{
			{"token", classes[c]&token != 0, letter || c < 0x80 && strings.ContainsRune("!#$%&'*+-.^_`|~", rune(c))},
			{"target", classes[c]&targetByte != 0, c > ' ' && c != 0x7f},
			{"host", classes[c]&hostByte != 0, letter || c < 0x80 && strings.ContainsRune("-._~!$&'()*+,;=%:[]", rune(c))},
		} {
			if is.got != is.want {
				t.Errorf("%#x is in %s: %v", c, is.what, is.got)
			}
		}
	}
}

func TestAnErrorSaysHowARequestIsAnswered(t *testing.T) {
	for e, status := range map[Error]int{
		ErrHeadTooLarge: 431, ErrTooManyFields: 431, ErrTrailersTooLarge: 431, ErrBareCR: 400, ErrBothFramings: 400,
	} {
		if e.Status() != status {
			t.Errorf("%s: %d", e.Name(), e.Status())
		}
		var as Error
		if err := error(e); !errors.As(err, &as) || as != e {
			t.Errorf("%s is lost in an error", e.Name())
		}
	}
}

// Fault is the line that has to be corrected.
func TestAnErrorPointsToItsLine(t *testing.T) {
	for _, c := range []struct {
		message string
		want    Error
		fault   string
	}{
		{"GET  / HTTP/1.1\r\n", ErrBadRequestLine, "GET  / HTTP/1.1"},
		{"GET / HTTP/1.1\n", ErrBareLF, "GET / HTTP/1.1"},
		{"GET / HTTP/1.1\r\nHost: a\r\nX : y\r\n", ErrSpaceBeforeColon, "X : y"},
		{"GET / HTTP/1.1\r\nHost: a\r\nX: y\n", ErrBareLF, "X: y"},
		{"GET / HTTP/1.1\r\nHost: a\r\nX: \r\r\nY: z\r\n\r\n", ErrBareCR, "X: \r"},
		{"GET / HTTP/1.1\r\nHost: a\r\nX: y\r\nY: \x00\r\n\r\n", ErrNUL, "Y: \x00"},
		{"GET / HTTP/1.1\r\nHost: a\r\nX: y\r\nhost: b\r\n\r\n", ErrRepeatedHost, "host: b"},
		{"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", ErrBadHost, "Host: a/b"},
		{"GET / HTTP/1.1\r\nX: y\r\n\r\n", ErrMissingHost, ""},
		{"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n", ErrContentLengthsDiffer, "Content-Length: 6"},
		{"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n", ErrBadContentLength, "Content-Length: x"},
		{"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: x\r\n\r\n", ErrBothFramings, "Transfer-Encoding: x"},
		{"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: x\r\n\r\n", ErrUnsupportedCoding, "Transfer-Encoding: x"},
	} {
		h, b := new(Head), []byte(c.message)
		done, err := h.ParseRequest(b, Limits{})
		if done {
			_, err = h.RequestFraming(b)
		}
		if got := string(h.Fault.In(b)); err != c.want || got != c.fault {
			t.Errorf("%q: %v at %q, want %v at %q", c.message, err, got, c.want, c.fault)
		}
		if c.want != ErrBadRequestLine && string(h.Target.In(b)) != "/" {
			t.Errorf("%q: the target is %q", c.message, h.Target.In(b))
		}
	}
}

func TestTheAuthorityIsThatOfAnAbsoluteTargetOrOfHost(t *testing.T) {
	for target, want := range map[string]string{
		"/": "a", "*": "a", "/x://y": "a", "b": "a", "ftp://b/": "a", "http:///x": "a", "http://u@/": "a", "http:/b": "a",
		"http://b": "b", "http://b/c": "b", "HTTPS://b:8443?c": "b:8443", "http://u:p@b:80/@x": "b:80", "http://[2001:db8::1]:80/": "[2001:db8::1]:80",
	} {
		h, b := parseRequest(t, "GET "+target+" HTTP/1.1\r\nHost: a\r\n\r\n")
		if got := string(h.Authority(b)); got != want {
			t.Errorf("%s: %q, want %q", target, got, want)
		}
	}
	h, b := parseRequest(t, "GET / HTTP/1.0\r\n\r\n")
	if got := h.Authority(b); got != nil {
		t.Errorf("without Host: %q", got)
	}
}
