package sniff

import (
	"bufio"
	"bytes"
	"net/http"
	"strings"
	"testing"
)

// FuzzClassify asks for each prefix of what came. The verdict must not depend on how the bytes arrive: once decided it
// stays, and nothing is undecided at the limit. A request line must be one for net/http, too, and the other way round.
func FuzzClassify(f *testing.F) {
	for _, c := range beginnings {
		if len(c.held) < 1000 {
			f.Add([]byte(c.held + c.decides))
		}
	}
	f.Add(recordsOf(7, hello("example.com", "h2")))
	f.Fuzz(func(t *testing.T, first []byte) {
		first = first[:min(len(first), 2000)] // each prefix is looked at from its beginning
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
		if at > 0 && (dribbled == HTTP1) != (first[at-1] == '\n' && requestForNetHTTP(first[:at])) && !stranger(first[:at]) {
			t.Fatalf("%s, and net/http thinks otherwise of %q", protocolName(dribbled), first[:at])
		}
	})
}

// requestForNetHTTP reports whether net/http takes a line for a request's.
func requestForNetHTTP(line []byte) bool {
	whole := append(bytes.Clone(line), "Host: a\r\n\r\n"...)
	request, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(whole)))
	return err == nil && request.ProtoMajor == 1
}

// stranger reports whether a line is one of which the two think differently. net/http wants to understand the target as
// a URI, which is the engine's to judge, or the workload's.
func stranger(line []byte) bool {
	_, rest, _ := strings.Cut(string(line), " ")
	target, _, _ := strings.Cut(rest, " ")
	plain := strings.HasPrefix(target, "/") && !strings.Contains(target, "%")
	return !plain && target != "*"
}
