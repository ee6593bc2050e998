package sniff

import (
	"bytes"
	"regexp"
	"testing"

	"github.com/pillion-proxy/pillion/internal/http1"
	"github.com/pillion-proxy/pillion/internal/http1/http1test"
)

// FuzzClassify classifies each prefix of its input. The verdict must not depend on how the bytes arrive: once decided it
// must not change. classify must agree with the parser of the HTTP engine. The parser judges the same bytes when they are
// the second request of a connection: a request that is forwarded there is not hidden by an opaque verdict here.
func FuzzClassify(f *testing.F) {
	for _, c := range beginnings {
		if len(c.held) < 1000 {
			f.Add([]byte(c.held + c.decides))
		}
	}
	for _, m := range http1test.Requests {
		if len(m.Bytes) < 1000 {
			f.Add([]byte(m.Bytes))
		}
	}
	f.Add(recordsOf(7, hello("example.com", "h2")))
	f.Fuzz(func(t *testing.T, first []byte) {
		first = first[:min(len(first), 2000)] // the cost is quadratic
		dribbled, at := Undecided, 0
		wary := Undecided
		for n := range len(first) + 1 {
			if got := classifyWarily(first[:n]); wary == Undecided {
				wary = got
			} else if got != wary {
				t.Fatalf("%s, and %s after %d bytes, if wary", protocolName(wary), protocolName(got), n)
			}
			switch got := classify(first[:n]); {
			case got == dribbled:
			case dribbled == Undecided:
				dribbled, at = got, n
			default:
				t.Fatalf("%s after %d bytes, and %s after %d", protocolName(dribbled), at, protocolName(got), n)
			}
		}
		line := requestLine.FindSubmatch(first)
		if dribbled != Opaque && dribbled != wary {
			t.Errorf("%s, and %s if wary", protocolName(dribbled), protocolName(wary))
		}
		parses := line != nil && parserAccepts(append(bytes.Clone(line[0]), "Host: a\r\n\r\n"...))
		switch {
		case parses && dribbled != HTTP1 && detectedMethod.Match(line[1]):
			t.Errorf("%s, but the parser accepts %q", protocolName(dribbled), line[0])
		case parses && wary != HTTP1 && bytes.IndexByte(line[0], '\r') == len(line[0])-2:
			t.Errorf("%s if wary, but the parser accepts %q", protocolName(wary), line[0])
		case dribbled == HTTP1 && !parses && !malformed.Match(first):
			t.Errorf("HTTP/1, but %q is not a request", first)
		}
	})
}

func parserAccepts(request []byte) bool {
	done, err := new(http1.Head).ParseRequest(request, http1.Limits{})
	return done && err == nil
}

var (
	// requestLine is a first line behind the empty lines that the parser accepts, with its first word.
	requestLine = regexp.MustCompile(`^(?:\r\n){0,4}([^ \r\n]*) [^\n]*\n`)

	// detectedMethod are the methods with which detection takes a line for a request.
	detectedMethod = regexp.MustCompile(`^(?:[A-Z0-9_-]{1,32}|(?i:GET|HEAD|POST|PUT|DELETE|CONNECT|OPTIONS|TRACE|PATCH))$`)

	// malformed are the lines that the parser rejects and some server accepts, and a path with a control character in it.
	malformed = regexp.MustCompile(`^[\r\n \t]*(?i:GET|HEAD|POST|PUT|DELETE|CONNECT|OPTIONS|TRACE|PATCH|[A-Z0-9_-]{1,32} )` +
		`(?:[^\x00-\x08\n-\x1f\x7f]*(?i:HTTP/)[0-2][^ \t\r\n]*[ \t]*\r?\n|[ \t]*(?i:/|https?://)[^\n]*[\x00-\x1f\x7f])`)
)
