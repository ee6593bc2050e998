package sniff

import (
	"bufio"
	"bytes"
	"net/http"
	"strings"
	"testing"
)

// FuzzClassify classifies each prefix of its input. The verdict must not depend on how the bytes arrive: once decided it
// must not change. Classify and net/http must agree on whether a line is a request line.
func FuzzClassify(f *testing.F) {
	for _, c := range beginnings {
		if len(c.held) < 1000 {
			f.Add([]byte(c.held + c.decides))
		}
	}
	f.Add(recordsOf(7, hello("example.com", "h2")))
	f.Fuzz(func(t *testing.T, first []byte) {
		first = first[:min(len(first), 2000)] // the cost is quadratic
		dribbled, at := Undecided, 0
		for n := range len(first) + 1 {
			switch got := Classify(first[:n]); {
			case got == dribbled:
			case dribbled == Undecided:
				dribbled, at = got, n
			default:
				t.Fatalf("%s after %d bytes, and %s after %d", protocolName(dribbled), at, protocolName(got), n)
			}
		}
		if at > 0 && (dribbled == HTTP1) != (first[at-1] == '\n' && requestForNetHTTP(first[:at])) && !knownDifference(first[:at]) {
			t.Fatalf("%s, but net/http disagrees on %q", protocolName(dribbled), first[:at])
		}
	})
}

// requestForNetHTTP reports whether net/http accepts line as a request line.
func requestForNetHTTP(line []byte) bool {
	whole := append(bytes.Clone(line), "Host: a\r\n\r\n"...)
	request, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(whole)))
	return err == nil && request.ProtoMajor == 1
}

// knownDifference reports whether Classify and net/http may disagree on line. net/http also parses the target as a URI.
// Here that is left to the HTTP engine or the workload.
func knownDifference(line []byte) bool {
	_, rest, _ := strings.Cut(string(line), " ")
	target, _, _ := strings.Cut(rest, " ")
	plain := strings.HasPrefix(target, "/") && !strings.Contains(target, "%")
	return !plain && target != "*"
}
