package export

import (
	"net/http"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

// A push that changes anything about a receiver changes its name: its exporter is made again.
func TestReceiversThatDifferHaveDifferentNames(t *testing.T) {
	named := []mesh.NamedValue{{Name: "a", Value: "b"}}
	grpc, http1 := mesh.GRPCService{Cluster: "c"}, mesh.HTTPService{Cluster: "c", URI: "http://h/p"}
	receivers := map[string]mesh.Receiver{}
	add := func(what string, g mesh.GRPCService, h mesh.HTTPService, change func(*mesh.GRPCService, *mesh.HTTPService)) {
		if change != nil {
			change(&g, &h)
		}
		receivers["gRPC: "+what], receivers["HTTP: "+what] = mesh.Receiver{GRPC: &g}, mesh.Receiver{HTTP: &h}
	}
	add("the first", grpc, http1, nil)
	add("cluster", grpc, http1, func(g *mesh.GRPCService, h *mesh.HTTPService) { g.Cluster, h.Cluster = "d", "d" })
	add("address", grpc, http1, func(g *mesh.GRPCService, h *mesh.HTTPService) { g.Authority, h.URI = "a", "http://h/q" })
	add("timeout", grpc, http1, func(g *mesh.GRPCService, h *mesh.HTTPService) { g.Timeout, h.Timeout = time.Minute, time.Minute })
	g, h := receivers["gRPC: the first"], receivers["HTTP: the first"]
	g.Service, h.Service = "s", "s"
	receivers["gRPC: service"], receivers["HTTP: service"] = g, h
	g, h = receivers["gRPC: the first"], receivers["HTTP: the first"]
	g.GRPC, h.Header = &mesh.GRPCService{Cluster: "c", Metadata: named}, named
	receivers["gRPC: fields"], receivers["HTTP: fields"] = g, h

	seen := map[string]string{}
	for what, r := range receivers {
		name, _, _ := To(&r, "/s/m", func(string, bool) http.RoundTripper { return nil })
		if other := seen[name]; other != "" {
			t.Errorf("%s and %s have the name %q", what, other, name)
		}
		seen[name] = what
	}
}
