package mesh

import (
	"slices"
	"strings"
	"testing"
	"unsafe"
)

// retrying returns routes of a name with one route that has a retry policy.
func retrying(name string) []byte {
	forward := join(text(1, "cluster"), nest(join(text(1, "5xx"), nest(number(1, 3), 2)), 9))
	route := join(nest(text(1, "/"), 1), nest(forward, 2))
	return join(text(1, name), nest(join(text(1, "host"), text(2, "*"), nest(route, 3)), 2))
}

func TestResourcesShareEqualParts(t *testing.T) {
	var c Compiler
	compiled := func(name string) *Forward {
		r, findings, err := c.Routes(retrying(name))
		if err != nil || len(findings) > 0 {
			t.Fatal(err, findings)
		}
		return r.Hosts[0].Routes[0].Forward
	}
	a, b := compiled("a"), compiled("b")
	if a.Retry == nil || a.Retry != b.Retry {
		t.Error("equal retry policies are not shared")
	}
	if unsafe.StringData(a.Clusters[0].Name) != unsafe.StringData(b.Clusters[0].Name) {
		t.Error("equal names are not shared")
	}
	c.Forget()
	if again := compiled("a"); again.Retry == a.Retry {
		t.Error("a retry policy is remembered after Forget")
	}
}

// A value with a finding is decoded at each place, so that each has the finding.
func TestPartsWithFindingsAreNotShared(t *testing.T) {
	var c Compiler
	bad := []byte(strings.Replace(string(retrying("a")), "5xx", "5xy", 1))
	for range 2 {
		if _, findings, err := c.Routes(bad); err != nil || len(findings) != 1 {
			t.Errorf("error %v, findings %v", err, findings)
		}
	}
}

// The remembered parts are bounded for any input.
func TestWhatIsRememberedIsBounded(t *testing.T) {
	var c Compiler
	large := make([]byte, maxShared/2)
	for i := range 4 {
		c.Name(strings.Repeat("x", i+1))
		c.begin(len(large))
	}
	if len(c.d.texts) > 2 {
		t.Errorf("%d texts are remembered", len(c.d.texts))
	}
}

// An element of two bytes takes hundreds in memory.
func TestListsOfEmptyElementsAreBounded(t *testing.T) {
	hosts := func(n int) []byte { return join([]byte(strings.Repeat("\x12\x00", n)), text(1, "routes")) }
	if _, _, err := DecodeRoutes(hosts(100)); err != nil {
		t.Error(err)
	}
	if _, _, err := DecodeRoutes(hosts(100_000)); err != errRoom {
		t.Errorf("error %v", err)
	}
}

// An error ends a resource in the middle of its fields. The paths of the next resource are its own.
func TestAnErrorLeavesNoTraceInTheNextResource(t *testing.T) {
	hosts := join(nest(nest(nil, 17), 2), text(1, "routes")) // of a field that is not supported, before the name
	_, want, err := DecodeRoutes(hosts)
	if err != nil || len(want) == 0 {
		t.Fatal(err, want)
	}
	var c Compiler
	if _, _, err := c.Routes(nest([]byte{0x12, 9}, 2)); err == nil {
		t.Fatal("a truncated host is accepted")
	}
	if _, got, err := c.Routes(hosts); err != nil || !slices.Equal(got, want) {
		t.Errorf("error %v, findings %v, want %v", err, got, want)
	}
}
