// Package balance chooses the endpoints of clusters. It keeps what must outlive the pushes of a control plane: requests in
// progress, ejections, counters and answers of DNS, by the name of the cluster and the address of the endpoint.
//
// A Cluster is made when it is first used, so a service that no request goes to costs no memory. Its view is immutable and
// compiled when its configuration, its endpoints or their health change. A pick reads the view and a few counters: it
// takes no lock and does not allocate.
package balance

import (
	"context"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

// Config is what a Balancer needs.
type Config struct {
	// Snapshot returns the configuration in force. A request with an older snapshot gets the cluster as it is in force, so
	// that a cluster does not change back and forth during a push. nil: the cluster of the request is used.
	Snapshot func() *mesh.Snapshot

	// Lookup resolves the names of clusters with DNS, outside of the data path. nil: such clusters have no hosts.
	Lookup Lookup

	// Retire receives the groups of connections to hosts that a cluster has lost, that are not healthy any more, or that are
	// secured otherwise now, soon after the change: they must not begin another request. nil: connections stay.
	Retire func(map[*tcp.Group]struct{})
}

// retireDelay is how long lost hosts are collected: looking for their connections costs more than a host does.
const retireDelay = 10 * time.Millisecond

// Lookup returns the addresses of a name, in the order of the answer, and how long they may be kept; zero: not known. It
// returns no addresses and no error if the name has none.
type Lookup func(ctx context.Context, name string, family mesh.DNSFamily) ([]netip.Addr, time.Duration, error)

// Balancer has the state of all clusters. Make it with New.
type Balancer struct {
	config Config
	ctx    context.Context // of lookups
	cancel context.CancelFunc
	tasks  sync.WaitGroup // lookups in progress

	starting sync.Mutex // held to start a task or to end ctx

	clusters atomic.Pointer[map[string]*Cluster] // never changed; replaced with mu held
	mu       sync.Mutex

	retiring sync.Mutex
	lost     map[*tcp.Group]struct{} // for Config.Retire; nil: no group
}

// New makes a Balancer. Close it.
func New(config Config) *Balancer {
	b := &Balancer{config: config}
	b.ctx, b.cancel = context.WithCancel(context.Background())
	b.clusters.Store(&map[string]*Cluster{})
	return b
}

// Close stops timers and lookups, and waits for these. Picks and leases stay possible; ejections then stay as they are.
func (b *Balancer) Close() {
	b.starting.Lock()
	b.cancel()
	b.starting.Unlock()
	for _, c := range *b.clusters.Load() {
		c.stop()
	}
	b.tasks.Wait()
}

// Cluster returns the state of a cluster of a snapshot, and brings it up to date.
func (b *Balancer) Cluster(s *mesh.Snapshot, config *mesh.Cluster) *Cluster {
	hosts := s.Hosts(config)
	c := (*b.clusters.Load())[config.Name]
	if c != nil && c.Follows(config, hosts) {
		return c
	}
	return b.renew(c, config, hosts)
}

// Follows reports whether the state is that of a configuration with its hosts.
func (c *Cluster) Follows(config *mesh.Cluster, hosts *mesh.Assignment) bool {
	v := c.view.Load()
	return v.config == config && v.source == hosts
}

// Follow brings the clusters that have been used up to date with the configuration in force, without waiting for a request.
func (b *Balancer) Follow() {
	s := b.config.Snapshot()
	for name, c := range *b.clusters.Load() {
		if config := s.Cluster(name); config != nil {
			b.Cluster(s, config)
		} else {
			c.leave()
		}
	}
}

// retire has Config.Retire called with a group, soon.
func (b *Balancer) retire(g *tcp.Group) {
	if b.config.Retire == nil {
		return
	}
	b.retiring.Lock()
	defer b.retiring.Unlock()
	if b.lost == nil {
		b.lost = make(map[*tcp.Group]struct{})
		time.AfterFunc(retireDelay, b.retireLost)
	}
	b.lost[g] = struct{}{}
}

func (b *Balancer) retireLost() {
	b.retiring.Lock()
	lost := b.lost
	b.lost = nil
	b.retiring.Unlock()
	b.config.Retire(lost)
}

// Known returns the state of a cluster that has been used, or nil.
func (b *Balancer) Known(name string) *Cluster { return (*b.clusters.Load())[name] }

// renew makes a cluster, or has it take over the configuration in force.
func (b *Balancer) renew(c *Cluster, config *mesh.Cluster, hosts *mesh.Assignment) *Cluster {
	if c == nil {
		c = b.add(config, hosts)
	}
	if b.config.Snapshot != nil {
		s := b.config.Snapshot()
		current := s.Cluster(config.Name)
		if current == nil {
			return c // removed; a request of an older snapshot still goes to it
		}
		config, hosts = current, s.Hosts(current)
	}
	c.update(config, hosts)
	return c
}

// add makes a cluster, and drops those that the configuration in force has not any more and that carry no request.
func (b *Balancer) add(config *mesh.Cluster, hosts *mesh.Assignment) *Cluster {
	b.mu.Lock()
	defer b.mu.Unlock()
	old := *b.clusters.Load()
	if c := old[config.Name]; c != nil {
		return c
	}
	next := maps.Clone(old)
	if b.config.Snapshot != nil {
		s := b.config.Snapshot()
		maps.DeleteFunc(next, func(name string, c *Cluster) bool {
			unused := s.Cluster(name) == nil && c.requests.Load() == 0 && c.connections.Load() == 0
			if unused {
				c.stop()
			}
			return unused
		})
	}
	c := newCluster(b, config, hosts)
	next[config.Name] = c
	b.clusters.Store(&next)
	return c
}

// Clusters returns the clusters that have been used, by name.
func (b *Balancer) Clusters() []*Cluster {
	known := *b.clusters.Load()
	all := make([]*Cluster, 0, len(known))
	for _, name := range slices.Sorted(maps.Keys(known)) {
		all = append(all, known[name])
	}
	return all
}
