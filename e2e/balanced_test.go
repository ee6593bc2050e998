package e2e

import (
	"net/http"
	"net/netip"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// The calls of one gRPC client, of all four kinds, are balanced one by one over three endpoints that require mutual TLS. They pass
// the agent twice, as the client's sidecar and as the servers'.
func TestCallsOfAGRPCConnectionAreBalancedOneByOne(t *testing.T) {
	t.Parallel()
	nettest.RequireRoot(t)
	program := peer(t, "grpc")
	servers := subset{Name: v1, Mutual: true, HTTP2: true}
	ports := []int{50061, 50062, 50063}
	for _, port := range ports {
		servers.Endpoints = append(servers.Endpoints, endpoint{Address: netip.AddrPortFrom(nettest.PodIP4, uint16(port))})
	}
	b := newBookOf(t, nettest.Elsewhere4.String(), nil, []subset{servers}, rule{Weights: map[string]uint32{v1: 1}, Retries: 2})
	for _, port := range ports {
		b.inbound().startPeer(t, port, program, "serve", "ADDRESS")
	}
	output := b.outbound().runPeer(t, program, "call", at(reviewsPort).String())
	if !strings.HasSuffix(output, "ok unimplemented method\n") || strings.Count(output, "ok ") != strings.Count(output, "\n") {
		t.Errorf("client output:\n%s", output)
	}
	for _, e := range servers.Endpoints {
		b.agent.log.await(t, "direction=inbound", "original_destination="+e.Address.String(), "protocol=HTTP/2")
	}
	b.agent.log.await(t, "direction=outbound", "original_destination="+at(reviewsPort).String(), "protocol=HTTP/2")
}

// A test of h2spec that a server passes must also pass through the agent where that has streams of its own, whether the server
// speaks HTTP/2 or HTTP/1.
func TestH2specPassesWhereStreamsAreRouted(t *testing.T) {
	t.Parallel()
	nettest.RequireRoot(t)
	program := peer(t, "h2spec")
	one, two := new(http.Protocols), new(http.Protocols)
	one.SetHTTP1(true)
	two.SetUnencryptedHTTP2(true)
	for name, protocols := range map[string]*http.Protocols{"to HTTP/2": two, "to HTTP/1": one} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			servers := subset{Name: v1, HTTP2: protocols == two}
			b := newBookOf(t, nettest.Elsewhere4.String(), nil, []subset{servers}, rule{Weights: map[string]uint32{v1: 1}})
			w := b.outbound()
			reference, port := serveHTTP2(t, w), serveGreetings(t, w, protocols)
			b.Clusters[0].Endpoints = []endpoint{{Address: at(int(port))}}
			b.push(t)
			nettest.Eventually(t, "the endpoint", func() bool {
				_, clusters := get(t, b.pod, "http://127.0.0.1:15000/clusters")
				return strings.Contains(clusters, at(int(port)).String())
			})
			passed := h2specPasses(t, w, program, reference, reviewsPort)
			if passed < 100 {
				t.Errorf("%d tests passed", passed)
			}
		})
	}
}
