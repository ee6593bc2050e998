//go:build !race

package metrics

import (
	"testing"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
)

// Counting does not allocate: neither for a request with known labels nor for one whose host is not counted by itself.
func TestClosedDoesNotAllocate(t *testing.T) {
	m := New(pod, Options{Version: "v"})
	table := flow.NewTable(m)
	in := connection(table, flow.Inbound, flow.HTTP11)
	ok, created := request(in, "reviews.shop.svc.cluster.local:9080", 200), request(in, "Reviews", 201)
	odd, rpc := request(in, "no such host", 404), call(in, "reviews", "16")
	never := request(flow.Open(flow.Outbound, peer), "a.example", 200)
	tcp := connection(table, flow.Outbound, flow.TLS)
	tcp.Reason = flow.DownstreamReset
	tls, other := request(in, "reviews", 200), request(in, "reviews", 200)
	tls.Security, other.Security = between(idOfClient), between("spiffe://cluster.local/ns/shop/sa/other")
	secured := connection(table, flow.Inbound, flow.Opaque)
	secured.Security, secured.Reason = between(idOfClient), flow.DownstreamReset
	for name, records := range map[string][]*flow.Record{
		"the same": {ok}, "in turn": {ok, created, odd, rpc}, "not carried": {never}, "a connection": {tcp}, "by TLS": {tls, other}, "a connection by TLS": {secured},
	} {
		if n := testing.AllocsPerRun(100, func() {
			for _, r := range records {
				m.Closed(r)
			}
		}); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
	if n := testing.AllocsPerRun(100, func() { m.Progress(table) }); n != 0 {
		t.Errorf("progress: %v allocations", n)
	}
}

func TestCountingWithAddedLabelsDoesNotAllocate(t *testing.T) {
	m := New(pod, Options{})
	in := connection(flow.NewTable(m), flow.Inbound, flow.HTTP11)
	r := request(in, "reviews", 200)
	r.HTTP.Path = []byte("/a")
	r.HTTP.Telemetry = asked(m, mesh.MetricOverride{Name: "requests_total", Dimensions: []mesh.Dimension{dimension(t, "path", "request.path")}})
	if n := testing.AllocsPerRun(100, func() { m.Closed(r) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
