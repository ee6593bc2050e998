//go:build !race

package balance

import (
	"testing"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

func TestAPickDoesNotAllocate(t *testing.T) {
	for _, policy := range []mesh.Policy{mesh.RoundRobin, mesh.LeastRequest, mesh.Random, mesh.RingHash, mesh.Maglev} {
		config := clusterOf(policy, func(c *mesh.Cluster) { c.Outliers = outliers() })
		b, c, s := newTest(t, config, endpoints(1, 2, 3))
		r := Request{Hash: 1, Hashed: true}
		if n := testing.AllocsPerRun(1000, func() {
			r.Hash *= 0x9E3779B185EBCA87
			choice, _ := b.Cluster(s.Snapshot, config).Pick(&r)
			choice.Lease.End(ok)
		}); n != 0 {
			t.Errorf("policy %d: %v allocations", policy, n)
		}
		_ = c
	}
}
