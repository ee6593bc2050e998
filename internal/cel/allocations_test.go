//go:build !race

package cel

import "testing"

func TestJudgingAllocatesNothing(t *testing.T) {
	e, err := Parse("response.code >= 400 && request.headers['x-one'] != 'two' && xds.cluster_name.startsWith('inbound') && string(destination.port) != '1' && request.path.matches('/a')")
	if err != nil {
		t.Fatal(err)
	}
	p, r := e.Bind(place), request()
	if !p.Match(r) {
		t.Fatal("the request does not match")
	}
	if n := testing.AllocsPerRun(100, func() { p.Match(r) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
