package balance

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

// names are the names of the hosts of a cluster with DNS, and their addresses. They are looked up when the cluster is used,
// and again as long as it is. The addresses of a cluster that is not used for a while expire; the next use looks them up.
type names struct {
	cluster *Cluster
	config  mesh.DNS
	single  bool // LogicalDNS: only the first address of an answer is a host
	wanted  []string

	state atomic.Uint32 // unknown, looking, known
	inUse atomic.Bool   // since the last lookup

	// With the cluster's mu held.
	answers  map[string][]netip.Addr
	resolved chan struct{} // closed when the first lookup of all names has ended
	timer    *time.Timer   // of the next lookup
	unused   time.Duration // how long the cluster has not been used
	stopped  bool
}

const (
	unknown uint32 = iota
	looking
	known
)

const (
	lookupTimeout = 5 * time.Second // of one name
	minRefresh    = time.Second     // between two lookups, whatever the answer's TTL is
	failedRefresh = 5 * time.Second // at most, after a lookup that failed
	keepUnused    = 5 * time.Minute // how long names are looked up without use
)

// newNames returns the names of a cluster, or nil if all its hosts are addresses. The names that were known stay known.
func newNames(c *Cluster, config *mesh.Cluster, hosts *mesh.Assignment) *names {
	if config.Discovery != mesh.StrictDNS && config.Discovery != mesh.LogicalDNS || hosts == nil {
		return nil
	}
	n := &names{
		cluster: c, config: config.DNS, single: config.Discovery == mesh.LogicalDNS,
		answers: map[string][]netip.Addr{}, resolved: make(chan struct{}),
	}
	missing := false
	for i := range hosts.Localities {
		for k := range hosts.Localities[i].Endpoints {
			name := hosts.Localities[i].Endpoints[k].Host
			if name == "" || slices.Contains(n.wanted, name) {
				continue
			}
			n.wanted = append(n.wanted, name)
			if addresses, ok := c.names.answer(name); ok {
				n.answers[name] = addresses
			} else {
				missing = true
			}
		}
	}
	if len(n.wanted) == 0 {
		return nil
	}
	if !missing && c.names.state.Load() == known {
		n.state.Store(known)
		close(n.resolved)
		n.timer = time.AfterFunc(minRefresh, n.again)
	}
	return n
}

func (n *names) answer(name string) ([]netip.Addr, bool) {
	if n == nil {
		return nil, false
	}
	addresses, ok := n.answers[name]
	return addresses, ok
}

// stop ends the lookups, with the cluster's mu held.
func (n *names) stop() {
	if n == nil {
		return
	}
	n.stopped = true
	if n.timer != nil {
		n.timer.Stop()
	}
}

// ready notes that the cluster is used, and reports whether the names were looked up. If not, it begins that.
func (n *names) ready() bool {
	if !n.inUse.Load() {
		n.inUse.Store(true)
	}
	if n.state.Load() == known {
		return true
	}
	n.cluster.Resolved()
	return false
}

// Resolved returns a channel that is closed when the names of the cluster's hosts were looked up, successfully or not. It
// begins the lookup. Without names it returns nil.
func (c *Cluster) Resolved() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := c.names
	if n == nil {
		return nil
	}
	if n.state.Load() == unknown && !n.stopped {
		n.state.Store(looking)
		if !c.balancer.run(n.lookup) {
			n.finish(nil, 0)
		}
	}
	return n.resolved
}

// run starts a task, unless the balancer is closed.
func (b *Balancer) run(task func()) bool {
	b.starting.Lock()
	defer b.starting.Unlock()
	if b.ctx.Err() != nil {
		return false
	}
	b.tasks.Go(task)
	return true
}

// lookup looks all names up. A name whose lookup fails keeps its addresses.
func (n *names) lookup() {
	answers, shortest := make(map[string][]netip.Addr), time.Duration(0)
	failed := false
	for _, name := range n.wanted {
		addresses, ttl, err := n.resolve(name)
		if err != nil {
			failed = true
			continue
		}
		answers[name] = addresses
		if ttl > 0 && (shortest == 0 || ttl < shortest) {
			shortest = ttl
		}
	}
	refresh := n.config.Refresh
	if n.config.RespectTTL && shortest > 0 {
		refresh = shortest
	}
	if failed {
		refresh = min(refresh, failedRefresh)
	}
	n.cluster.mu.Lock()
	defer n.cluster.mu.Unlock()
	n.finish(answers, max(refresh, minRefresh))
}

var errNoLookup = errors.New("names are not looked up")

func (n *names) resolve(name string) ([]netip.Addr, time.Duration, error) {
	b := n.cluster.balancer
	if b.config.Lookup == nil {
		return nil, 0, errNoLookup
	}
	ctx, cancel := context.WithTimeout(b.ctx, lookupTimeout)
	defer cancel()
	return b.config.Lookup(ctx, name, n.config.Family)
}

// finish takes over answers and sets the time of the next lookup, with the cluster's mu held.
func (n *names) finish(answers map[string][]netip.Addr, next time.Duration) {
	changed := false
	for name, addresses := range answers {
		old, ok := n.answers[name]
		changed = changed || !ok || !slices.Equal(old, addresses)
		n.answers[name] = addresses
	}
	over := n.stopped || next == 0
	if changed && !over {
		n.cluster.refresh()
	}
	if n.state.Swap(known) != known { // after the hosts are in the view, because picks go on now
		close(n.resolved)
	}
	if over {
		return
	}
	if n.inUse.Swap(false) {
		n.unused = 0
	} else {
		n.unused += next
	}
	n.timer = time.AfterFunc(next, n.again)
}

// again looks the names up once more, or forgets them if the cluster has not been used for long.
func (n *names) again() {
	n.cluster.mu.Lock()
	defer n.cluster.mu.Unlock()
	switch {
	case n.stopped:
	case n.unused >= keepUnused && !n.inUse.Load():
		n.unused, n.resolved = 0, make(chan struct{})
		n.state.Store(unknown)
	default:
		n.cluster.balancer.run(n.lookup)
	}
}

// expand returns the endpoints with addresses in place of names, with the cluster's mu held.
func (n *names) expand(source *mesh.Assignment) *mesh.Assignment {
	if n == nil || source == nil {
		return source
	}
	expanded := &mesh.Assignment{Name: source.Name, Localities: slices.Clone(source.Localities)}
	for i := range expanded.Localities {
		locality := &expanded.Localities[i]
		var endpoints []mesh.Endpoint
		for _, e := range locality.Endpoints {
			if e.Host == "" {
				endpoints = append(endpoints, e)
				continue
			}
			addresses := n.answers[e.Host]
			if n.single && len(addresses) > 1 {
				addresses = addresses[:1]
			}
			for _, address := range addresses {
				e.Address = netip.AddrPortFrom(address, e.Port)
				endpoints = append(endpoints, e)
			}
		}
		locality.Endpoints = endpoints
	}
	return expanded
}
