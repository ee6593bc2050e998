package balance

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

// TestLostHostsAreRetired pushes a change of a cluster with three hosts, which the balancer follows without a request.
func TestLostHostsAreRetired(t *testing.T) {
	transports := []mesh.Transport{{TLS: &mesh.UpstreamTLS{}}}
	secured := func(c *mesh.Cluster) { c.Transports = transports }
	for _, c := range []struct {
		name   string
		change func(*source, *mesh.Cluster, *Cluster)
		want   []netip.AddrPort
	}{
		{"an endpoint is removed", func(s *source, c *mesh.Cluster, _ *Cluster) { s.set(c, equal(2)) }, []netip.AddrPort{address(2)}},
		{"an endpoint is added", func(s *source, c *mesh.Cluster, _ *Cluster) { s.set(c, equal(4)) }, nil},
		{"a weight changes", func(s *source, c *mesh.Cluster, _ *Cluster) { s.set(c, endpoints(1, 2, 1)) }, nil},
		{"an endpoint is not healthy", func(s *source, c *mesh.Cluster, _ *Cluster) {
			hosts := equal(3)
			hosts.Localities[0].Endpoints[1].Health = mesh.Unhealthy
			s.set(c, hosts)
		}, []netip.AddrPort{address(1)}},
		{"all endpoints are removed", func(s *source, c *mesh.Cluster, _ *Cluster) { s.set(c, &mesh.Assignment{}) }, []netip.AddrPort{address(0), address(1), address(2)}},
		{"the cluster is removed", func(s *source, c *mesh.Cluster, _ *Cluster) {
			e := s.Edit()
			e.SetCluster(c.Name, nil)
			s.Snapshot, _ = e.Snapshot()
		}, []netip.AddrPort{address(0), address(1), address(2)}},
		{"a limit changes", func(s *source, _ *mesh.Cluster, _ *Cluster) {
			s.set(clusterOf(mesh.RoundRobin, secured, func(c *mesh.Cluster) { c.Breakers.Requests = 5 }), s.Hosts(s.Cluster("outbound|80||a.example")))
		}, nil},
		{"TLS changes", func(s *source, _ *mesh.Cluster, _ *Cluster) {
			s.set(clusterOf(mesh.RoundRobin, func(c *mesh.Cluster) { c.Transports = []mesh.Transport{{TLS: &mesh.UpstreamTLS{}}} }), s.Hosts(s.Cluster("outbound|80||a.example")))
		}, []netip.AddrPort{address(0), address(1), address(2)}},
		{"a host is ejected", func(_ *source, _ *mesh.Cluster, c *Cluster) {
			choice := pick(t, c, &Request{})
			choice.Lease.End(status(500))
		}, []netip.AddrPort{address(0)}},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				config := clusterOf(mesh.RoundRobin, secured, func(c *mesh.Cluster) {
					c.Outliers = &mesh.Outliers{Consecutive5xx: 1, Interval: time.Hour, Ejection: time.Hour, MaxPercent: 100}
				})
				s := &source{}
				s.set(config, equal(3))
				retired := map[netip.AddrPort]struct{}{}
				calls := 0
				b := New(Config{
					Snapshot: func() *mesh.Snapshot { return s.Snapshot },
					Retire:   func(lost map[netip.AddrPort]struct{}) { maps.Copy(retired, lost); calls++ },
				})
				defer b.Close()
				cluster := b.Cluster(s.Snapshot, config)
				c.change(s, config, cluster)
				for range 3 {
					b.Follow()
				}
				time.Sleep(time.Second)
				synctest.Wait()
				got := slices.SortedFunc(maps.Keys(retired), netip.AddrPort.Compare)
				if c.name == "a host is ejected" {
					if len(got) != 1 {
						t.Errorf("retired %v, want one host", got)
					}
					return
				}
				if fmt.Sprint(got) != fmt.Sprint(c.want) || len(c.want) > 0 && calls != 1 {
					t.Errorf("retired %v by %d calls, want %v by one", got, calls, c.want)
				}
			})
		})
	}
}

// A push that changes many services looks for connections once.
func TestHostsOfManyClustersAreRetiredTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const clusters = 1000
		s := &source{}
		calls, retired := 0, 0
		b := New(Config{
			Snapshot: func() *mesh.Snapshot { return s.Snapshot },
			Retire:   func(lost map[netip.AddrPort]struct{}) { calls, retired = calls+1, retired+len(lost) },
		})
		defer b.Close()
		push := func(hosts func(i int) *mesh.Assignment) {
			e := s.Edit()
			for i := range clusters {
				name := fmt.Sprint("outbound|80||a", i)
				if s.Snapshot == nil || s.Cluster(name) == nil {
					e.SetCluster(name, clusterOf(mesh.RoundRobin, func(c *mesh.Cluster) { c.Name, c.Assignment = name, name }))
				}
				e.SetAssignment(name, hosts(i))
			}
			s.Snapshot, _ = e.Snapshot()
		}
		one := func(i int) *mesh.Assignment {
			return &mesh.Assignment{Localities: []mesh.Locality{{Endpoints: []mesh.Endpoint{{Address: address(i), Weight: 1}}}}}
		}
		push(one)
		for i := range clusters {
			b.Cluster(s.Snapshot, s.Cluster(fmt.Sprint("outbound|80||a", i)))
		}
		push(func(int) *mesh.Assignment { return &mesh.Assignment{} })
		b.Follow()
		time.Sleep(time.Second)
		synctest.Wait()
		if calls != 1 || retired != clusters {
			t.Errorf("%d hosts were retired by %d calls, want %d by one", retired, calls, clusters)
		}
	})
}
