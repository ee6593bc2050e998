package balance

import (
	"fmt"
	"maps"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

// TestLostHostsAreRetired pushes a change of a cluster with three hosts, which the balancer follows without a request.
func TestLostHostsAreRetired(t *testing.T) {
	transports := []mesh.Transport{{TLS: &mesh.UpstreamTLS{}}}
	secured := func(c *mesh.Cluster) { c.Transports = transports }
	for _, c := range []struct {
		name   string
		change func(*source, *mesh.Cluster, *Cluster)
		want   []int
	}{
		{"an endpoint is removed", func(s *source, c *mesh.Cluster, _ *Cluster) { s.set(c, equal(2)) }, []int{2}},
		{"an endpoint is added", func(s *source, c *mesh.Cluster, _ *Cluster) { s.set(c, equal(4)) }, nil},
		{"a weight changes", func(s *source, c *mesh.Cluster, _ *Cluster) { s.set(c, endpoints(1, 2, 1)) }, nil},
		{"an endpoint is not healthy", func(s *source, c *mesh.Cluster, _ *Cluster) {
			hosts := equal(3)
			hosts.Localities[0].Endpoints[1].Health = mesh.Unhealthy
			s.set(c, hosts)
		}, []int{1}},
		{"all endpoints are removed", func(s *source, c *mesh.Cluster, _ *Cluster) { s.set(c, &mesh.Assignment{}) }, []int{0, 1, 2}},
		{"the cluster is removed", func(s *source, c *mesh.Cluster, _ *Cluster) {
			e := s.Edit()
			e.SetCluster(c.Name, nil)
			s.Snapshot, _ = e.Snapshot()
		}, []int{0, 1, 2}},
		{"a limit changes", func(s *source, _ *mesh.Cluster, _ *Cluster) {
			s.set(clusterOf(mesh.RoundRobin, secured, func(c *mesh.Cluster) { c.Breakers.Requests = 5 }), s.Hosts(s.Cluster("outbound|80||a.example")))
		}, nil},
		{"TLS changes", func(s *source, _ *mesh.Cluster, _ *Cluster) {
			s.set(clusterOf(mesh.RoundRobin, func(c *mesh.Cluster) { c.Transports = []mesh.Transport{{TLS: &mesh.UpstreamTLS{}}} }), s.Hosts(s.Cluster("outbound|80||a.example")))
		}, []int{0, 1, 2}},
		{"a host is ejected", func(_ *source, _ *mesh.Cluster, c *Cluster) {
			choice := pick(t, c, &Request{})
			choice.Lease.End(status(500))
		}, []int{0}},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				config := clusterOf(mesh.RoundRobin, secured, func(c *mesh.Cluster) {
					c.Outliers = &mesh.Outliers{Consecutive5xx: 1, Interval: time.Hour, Ejection: time.Hour, MaxPercent: 100}
				})
				s := &source{}
				s.set(config, equal(3))
				retired := map[*tcp.Group]struct{}{}
				calls := 0
				b := New(Config{
					Snapshot: func() *mesh.Snapshot { return s.Snapshot },
					Retire:   func(lost map[*tcp.Group]struct{}) { maps.Copy(retired, lost); calls++ },
				})
				defer b.Close()
				cluster := b.Cluster(s.Snapshot, config)
				groups := groupsOf(cluster)
				c.change(s, config, cluster)
				for range 3 {
					b.Follow()
				}
				time.Sleep(time.Second)
				synctest.Wait()
				var got []int
				for i := range 3 {
					if _, ok := retired[groups[address(i)]]; ok {
						got = append(got, i)
					}
				}
				if len(got) != len(retired) {
					t.Errorf("%d groups are retired, only %d of which connections had", len(retired), len(got))
				}
				for a, g := range groupsOf(cluster) {
					if _, ok := retired[g]; ok {
						t.Errorf("further connections to %v belong to a retired group", a)
					}
				}
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

// groupsOf returns the groups of further connections to the hosts of a cluster.
func groupsOf(c *Cluster) map[netip.AddrPort]*tcp.Group {
	groups := map[netip.AddrPort]*tcp.Group{}
	for _, m := range c.view.Load().members {
		groups[m.host.Address] = m.group
	}
	return groups
}

// A host that one cluster has lost is a host of another.
func TestConnectionsOfOtherClustersAreNotRetired(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{}
		retired := map[*tcp.Group]struct{}{}
		b := New(Config{
			Snapshot: func() *mesh.Snapshot { return s.Snapshot },
			Retire:   func(lost map[*tcp.Group]struct{}) { maps.Copy(retired, lost) },
		})
		defer b.Close()
		one := clusterOf(mesh.RoundRobin)
		other := clusterOf(mesh.RoundRobin, func(c *mesh.Cluster) { c.Name, c.Assignment = "outbound|80|v1|a.example", "outbound|80|v1|a.example" })
		s.set(one, equal(1))
		s.set(other, equal(1))
		lost, kept := pick(t, b.Cluster(s.Snapshot, one), &Request{}), pick(t, b.Cluster(s.Snapshot, other), &Request{})
		s.set(one, &mesh.Assignment{})
		b.Follow()
		time.Sleep(time.Second)
		synctest.Wait()
		if _, ok := retired[lost.Group]; !ok {
			t.Error("the connections of the cluster that has lost the host are not retired")
		}
		if _, ok := retired[kept.Group]; ok {
			t.Error("the connections of a cluster that still has the host are retired")
		}
	})
}

// A push that changes many services looks for connections once.
func TestHostsOfManyClustersAreRetiredTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const clusters = 1000
		s := &source{}
		calls, retired := 0, 0
		b := New(Config{
			Snapshot: func() *mesh.Snapshot { return s.Snapshot },
			Retire:   func(lost map[*tcp.Group]struct{}) { calls, retired = calls+1, retired+len(lost) },
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
