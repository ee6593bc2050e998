package balance

import (
	"runtime"
	"sync/atomic"
	"testing"

	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/nettest"
)

// Hosts outlive views, and one that is not healthy must not keep the view alive in which it was.
func TestOldViewsAreFreed(t *testing.T) {
	config := clusterOf(mesh.RoundRobin)
	s := &source{}
	s.set(config, equal(1))
	b := New(Config{Snapshot: func() *mesh.Snapshot { return s.Snapshot }})
	defer b.Close()
	const views = 20
	var freed atomic.Int64
	for i := range views {
		hosts := equal(i + 2)
		hosts.Localities[0].Endpoints = hosts.Localities[0].Endpoints[i:]
		hosts.Localities[0].Endpoints[0].Health = mesh.Unhealthy // it was the healthy one before
		s.set(config, hosts)
		c := b.Cluster(s.Snapshot, s.Cluster(config.Name))
		runtime.AddCleanup(c.view.Load(), func(int) { freed.Add(1) }, 0)
	}
	nettest.Eventually(t, "all views but the one in force are freed", func() bool {
		runtime.GC()
		return freed.Load() >= views-2
	})
}
