//go:build !race

package match

import (
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

// Requests are matched without garbage, however long the texts of the policy are.
func TestMatchAllocatesNothing(t *testing.T) {
	long := strings.Repeat("long", 20)
	s := "x" + long + "y"
	b := []byte(s)
	for _, m := range []mesh.StringMatcher{
		{Kind: mesh.MatchExact, Text: s}, {Kind: mesh.MatchPrefix, Text: "x" + long}, {Kind: mesh.MatchSuffix, Text: long + "y"},
		{Kind: mesh.MatchContains, Text: "LONG" + long[4:], IgnoreCase: true},
		{Kind: mesh.MatchRegex, Text: ".*" + long + ".*"}, {Kind: mesh.MatchRegex, Text: ".+"}, {Kind: mesh.MatchRegex, Text: "x(long)+."},
	} {
		text := Compile(&m)
		once := func() {
			if text.Match(b) != Yes || text.MatchString(s) != Yes {
				t.Fatalf("%+v does not match", m)
			}
		}
		if n := testing.AllocsPerRun(100, once); n > 0 {
			t.Errorf("%+v: %v allocations", m, n)
		}
	}
}
