package balance

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
)

// clusterOf returns a cluster with Istio's limits: none.
func clusterOf(policy mesh.Policy, change ...func(*mesh.Cluster)) *mesh.Cluster {
	const none = 1<<32 - 1
	c := &mesh.Cluster{
		Name: "outbound|80||a.example", Discovery: mesh.ByEDS, Assignment: "outbound|80||a.example",
		Balancing: mesh.Balancing{Policy: policy, MinRing: 1024, MaxRing: 8 << 20, Table: 65537, Choices: 2, SlowStartMin: 10},
		Breakers:  mesh.Breakers{Connections: none, Pending: none, Requests: none, Retries: none},
	}
	for _, f := range change {
		f(c)
	}
	return c
}

func address(i int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, byte(100 + i/250), byte(1 + i%250)}), 8080)
}

// endpoints returns an assignment with one locality of healthy endpoints with these weights.
func endpoints(weights ...uint32) *mesh.Assignment {
	l := mesh.Locality{}
	for i, weight := range weights {
		l.Endpoints = append(l.Endpoints, mesh.Endpoint{Address: address(i), Weight: weight})
	}
	return &mesh.Assignment{Localities: []mesh.Locality{l}}
}

// equal returns n endpoints of weight 1.
func equal(n int) *mesh.Assignment {
	weights := make([]uint32, n)
	for i := range weights {
		weights[i] = 1
	}
	return endpoints(weights...)
}

// source is a control plane.
type source struct{ *mesh.Snapshot }

func (s *source) set(c *mesh.Cluster, hosts *mesh.Assignment) {
	e := s.Edit()
	e.SetCluster(c.Name, c)
	e.SetAssignment(c.Assignment, hosts)
	s.Snapshot, _ = e.Snapshot()
}

// newTest makes a balancer with one cluster.
func newTest(t testing.TB, c *mesh.Cluster, hosts *mesh.Assignment) (*Balancer, *Cluster, *source) {
	t.Helper()
	s := &source{}
	s.set(c, hosts)
	b := New(Config{})
	t.Cleanup(b.Close)
	return b, b.Cluster(s.Snapshot, c), s
}

var ok = Outcome{Status: 200, GRPC: -1, Connected: true}

func status(code int) Outcome { return Outcome{Status: code, GRPC: -1, Connected: true} }

var refused = Outcome{GRPC: -1, Reason: flow.UpstreamRefused}

// pick chooses a host, which must be there.
func pick(t testing.TB, c *Cluster, r *Request) Choice {
	t.Helper()
	choice, failure := c.Pick(r)
	if failure != None {
		t.Fatalf("no host: failure %d", failure)
	}
	return choice
}

// spread counts the hosts of n requests that end at once.
func spread(t testing.TB, c *Cluster, n int, r *Request) map[netip.AddrPort]int {
	t.Helper()
	counts := map[netip.AddrPort]int{}
	for range n {
		choice := pick(t, c, r)
		counts[choice.Address]++
		choice.Lease.End(ok)
	}
	return counts
}

// within fails unless got is expected, give or take six standard deviations of n draws: one in a billion exceeds that.
func within(t testing.TB, what string, got, n int, share float64) {
	t.Helper()
	if d := float64(got) - float64(n)*share; d*d > 36*float64(n)*share*(1-share)+1e-6 {
		t.Errorf("%s: %d of %d, want %.1f", what, got, n, float64(n)*share)
	}
}

func describe(counts map[netip.AddrPort]int) string { return fmt.Sprint(counts) }
