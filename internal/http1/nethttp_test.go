package http1

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/textproto"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/http1/http1test"
)

// net/http accepts every message that this package accepts, with the same start line, fields, framing, body and
// remaining bytes. refusedByNetHTTP and bodyRefusedByNetHTTP list the exceptions where net/http is stricter. Where it
// is laxer (lists and sizes in both framings, codings in HTTP/1.0, folded lines, CRs), the tables of http1test have the
// expected result.

func FuzzRequest(f *testing.F) {
	for _, m := range http1test.Requests {
		f.Add([]byte(m.Bytes), uint64(len(m.Bytes)))
	}
	f.Fuzz(func(t *testing.T, b []byte, seed uint64) {
		m := http1test.Message{Bytes: string(b)}
		if o := whole(t, m, false, seed); o.head != "" {
			likeNetHTTP(t, m, o, false)
		}
	})
}

func FuzzResponse(f *testing.F) {
	methods := []string{"GET", "HEAD", "CONNECT", "POST"}
	for _, m := range http1test.Responses {
		f.Add([]byte(m.Bytes), uint8(max(0, slices.Index(methods, m.Method))), uint64(len(m.Bytes)))
	}
	f.Fuzz(func(t *testing.T, b []byte, method uint8, seed uint64) {
		m := http1test.Message{Bytes: string(b), Method: methods[int(method)%len(methods)]}
		if o := whole(t, m, true, seed); o.head != "" {
			likeNetHTTP(t, m, o, true)
		}
	})
}

func FuzzChunks(f *testing.F) {
	const head = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
	for _, m := range http1test.Requests {
		if i := strings.Index(m.Bytes, "\r\n\r\n"); i >= 0 && strings.Contains(m.Bytes[:i], "chunked") {
			f.Add([]byte(m.Bytes[i+4:]), uint64(i))
		}
	}
	f.Fuzz(func(t *testing.T, b []byte, seed uint64) {
		m := http1test.Message{Bytes: head + string(b)}
		if o := whole(t, m, false, seed); o.head != "" {
			likeNetHTTP(t, m, o, false)
		}
	})
}

// whole parses a message that arrives at once. It also checks that the result is the same if it arrives in pieces, and
// that the forwarded message parses like the original.
func whole(t *testing.T, m http1test.Message, response bool, seed uint64) outcome {
	o := carry(m, response, at(len(m.Bytes)), never)
	random := rand.New(rand.NewPCG(seed, 1))
	step, skip := func() int { return 1 + random.IntN(1+len(m.Bytes)/2) }, func() bool { return random.IntN(2) == 0 }
	if pieces := carry(m, response, step, skip); pieces != o {
		t.Errorf("%q in pieces: %+v, want %+v", m.Bytes, pieces, o)
	}
	if o.head == "" {
		return o
	}
	want := o
	want.came = o.head
	m.Bytes = o.head + o.body + o.rest
	if again := carry(m, response, at(len(m.Bytes)), never); again != want {
		t.Errorf("%q: %+v, want %+v", m.Bytes, again, want)
	}
	return o
}

func likeNetHTTP(t *testing.T, m http1test.Message, o outcome, response bool) {
	t.Helper()
	text := o.came + o.body + o.rest
	b := []byte(text)
	var h Head
	parse, read := h.ParseRequest, readRequest
	if response {
		parse, read = h.ParseResponse, readResponse
	}
	if done, err := parse(b, Limits{}); !done {
		t.Fatalf("%q: %v", text, err)
	}
	if refusedByNetHTTP(&h, b, o.framing) {
		return
	}
	r := bufio.NewReaderSize(strings.NewReader(text), 1<<20) // trailers have to fit
	got, err := read(r, m.Method)
	if err != nil {
		t.Fatalf("%q: net/http refuses: %v", text, err)
	}
	if line := string(h.Line.In(b)); !strings.HasPrefix(line, got.line) {
		t.Errorf("%q: net/http reads %q", text, got.line)
	}
	sameFields(t, text, &h)
	chunked := slices.Equal(got.codings, []string{"chunked"})
	switch f := o.framing; {
	case f.Kind == Chunked && !chunked, f.Kind == Sized && (chunked || f.Length != got.length):
		t.Errorf("%q: net/http reads codings %v and length %d, want %+v", text, got.codings, got.length, f)
	}
	payload, err := io.ReadAll(got.body)
	if err != nil {
		if !bodyRefusedByNetHTTP(o.body, err) {
			t.Errorf("%q: net/http refuses the body: %v", text, err)
		}
		return
	}
	var x Body
	x.Start(o.framing, Limits{})
	if x.Scan([]byte(o.body)); x.Bytes() != int64(len(payload)) {
		t.Errorf("%q: %d bytes of payload, net/http reads %d", text, x.Bytes(), len(payload))
	}
	if rest, _ := io.ReadAll(r); string(rest) != o.rest {
		t.Errorf("%q: net/http leaves %q, want %q", text, rest, o.rest)
	}
}

// reading is a message as net/http reads it.
type reading struct {
	line    string // up to the status, in a response
	length  int64
	codings []string
	body    io.Reader
}

func readRequest(r *bufio.Reader, _ string) (reading, error) {
	got, err := http.ReadRequest(r)
	if err != nil {
		return reading{}, err
	}
	line := got.Method + " " + got.RequestURI + " " + got.Proto
	return reading{line, got.ContentLength, got.TransferEncoding, got.Body}, nil
}

func readResponse(r *bufio.Reader, method string) (reading, error) {
	got, err := http.ReadResponse(r, &http.Request{Method: method})
	if err != nil {
		return reading{}, err
	}
	return reading{fmt.Sprint(got.Proto, " ", got.StatusCode), got.ContentLength, got.TransferEncoding, got.Body}, nil
}

// sameFields compares the fields with those of net/textproto, the parser of net/http.
func sameFields(t *testing.T, text string, h *Head) {
	t.Helper()
	b := []byte(text)
	_, lines, _ := bytes.Cut(b[:h.Length], []byte{'\n'})
	want, err := textproto.NewReader(bufio.NewReader(bytes.NewReader(lines))).ReadMIMEHeader()
	if err != nil {
		t.Fatalf("%q: net/textproto refuses: %v", text, err)
	}
	got := make(textproto.MIMEHeader)
	for _, f := range h.Fields {
		got.Add(string(f.Name.In(b)), string(f.Value.In(b)))
	}
	if len(got) != len(want) {
		t.Fatalf("%q: fields %q, want %q", text, got, want)
	}
	for name, values := range want {
		if !slices.Equal(got[name], values) {
			t.Errorf("%q: %s is %q, want %q", text, name, got[name], values)
		}
	}
}

// refusedByNetHTTP reports whether a message contains something that net/http rejects and this package forwards: a
// target that is not a URI (the workload judges it); control characters in values, harmless for the decisions made
// here; a Trailer that announces fields rejected later; equal Content-Lengths in a list. net/http leaves the response
// that opens a tunnel to its caller.
func refusedByNetHTTP(h *Head, b []byte, f Framing) bool {
	if target := string(h.Target.In(b)); target != "" {
		if string(h.Method.In(b)) == "CONNECT" && target[0] != '/' {
			target = "http://" + target
		}
		if _, err := url.ParseRequestURI(target); err != nil {
			return true
		}
	}
	for _, field := range h.Fields {
		if slices.ContainsFunc(field.Line.In(b), control) || field.Known == Trailer ||
			field.Known == ContentLength && slices.Contains(field.Value.In(b), ',') {
			return true
		}
	}
	return f.Kind == Tunnel && h.Status != 101
}

// bodyRefusedByNetHTTP reports whether a body contains something that net/http rejects and this package forwards: white
// space before an extension, as RFC 9112 §7.1.1 allows; more extensions than payload; and control characters in
// trailers.
func bodyRefusedByNetHTTP(body string, err error) bool {
	return spacedExtension.MatchString(body) || strings.Contains(err.Error(), "too much non-data") ||
		strings.Contains(err.Error(), "malformed MIME header") && slices.ContainsFunc([]byte(body), control)
}

var spacedExtension = regexp.MustCompile(`(?m)^[0-9A-Fa-f]+[ \t]+;`)

func control(c byte) bool { return c < ' ' && c != '\t' || c == 0x7f }
