package balance

import (
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

// Cluster is the state of a cluster. Its methods may be called concurrently.
type Cluster struct {
	Name  string
	Stats ClusterStats

	balancer *Balancer
	view     atomic.Pointer[view] // never nil

	requests, connections, retries atomic.Int64 // in progress
	pending                        atomic.Int64 // requests of HTTP/2 that wait for a stream

	mu      sync.Mutex
	hosts   map[netip.AddrPort]*Host // of the view
	names   *names                   // of a cluster with DNS
	sweep   *time.Timer              // nil while no host is ejected or has been lately
	stopped bool
	left    bool // the configuration in force does not have it
}

// ClusterStats counts what happened to a cluster.
type ClusterStats struct {
	Overflowed         atomic.Uint64 // requests and connections above a limit
	RetriesOverflowed  atomic.Uint64
	NoHealthyHost      atomic.Uint64
	Ejections          atomic.Uint64
	EjectionsPrevented atomic.Uint64 // by the highest share of hosts that may be ejected
}

func newCluster(b *Balancer, config *mesh.Cluster, hosts *mesh.Assignment) *Cluster {
	c := &Cluster{Name: config.Name, balancer: b, hosts: map[netip.AddrPort]*Host{}}
	c.names = newNames(c, config, hosts)
	c.compile(config, hosts, time.Time{}) // its first hosts are not new
	return c
}

// update takes over a configuration and endpoints. Endpoints that stay keep their state.
func (c *Cluster) update(config *mesh.Cluster, hosts *mesh.Assignment) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.left = false
	old := c.view.Load()
	if old.config == config && old.source == hosts {
		return
	}
	if old.source != hosts || old.config.Discovery != config.Discovery || old.config.DNS != config.DNS {
		c.names.stop()
		c.names = newNames(c, config, hosts)
	}
	if config.Outliers == nil {
		c.readmit()
	}
	c.compile(config, hosts, time.Now())
}

// refresh compiles the view again, because the health or the weight of a host has changed. It is called with mu held.
func (c *Cluster) refresh() {
	v := c.view.Load()
	c.compile(v.config, v.source, time.Now())
}

// leave retires the hosts of a cluster that was removed. Requests of an older snapshot still go to them.
func (c *Cluster) leave() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.left {
		return
	}
	c.left = true
	for _, h := range c.hosts {
		h.group = nil
	}
	c.refresh()
}

// stop ends timers and lookups.
func (c *Cluster) stop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stopped = true
	c.names.stop()
	if c.sweep != nil {
		c.sweep.Stop()
	}
}

// Kind is what a pick is for.
type Kind uint8

// The kinds.
const (
	HTTP1 Kind = iota // a request on an HTTP/1 connection
	HTTP2             // a request on an HTTP/2 connection
	TCP               // a connection
)

// Request is what a host is chosen for.
type Request struct {
	Kind Kind

	Hash   uint64 // for RingHash and Maglev
	Hashed bool   // Hash is set; otherwise these policies choose at random

	Original netip.AddrPort   // where the connection was going; for OriginalDestination
	Avoid    []netip.AddrPort // hosts that are avoided if there are others
	Repicks  uint32           // how often a host is chosen again because it is in Avoid, at most

	// Tried are the hosts of the attempts before, of which each Priorities change the priorities that are avoided, if there are
	// others; 0: none is avoided.
	Tried      []netip.AddrPort
	Priorities uint32
}

// Choice is a host that was chosen for a request. Its Lease must be ended once.
type Choice struct {
	Address   netip.AddrPort
	Endpoint  *mesh.Endpoint  // nil for OriginalDestination
	Transport *mesh.Transport // how connections to the host are secured; nil: they are plain
	Group     *tcp.Group      // of connections to the host
	Lease     Lease
}

// Lease is the place that a request or connection takes at a host.
type Lease interface{ End(Outcome) }

// Queue is a Lease that counts its wait for a stream of HTTP/2. The limit of requests of HTTP/1 includes those that wait.
type Queue interface {
	// Wait begins a wait. It returns false if as many requests wait as the cluster permits; the lease stays.
	Wait() bool

	// Go ends a wait that has begun.
	Go()
}

// Retrier is a Lease of a request that may be sent again within the limit of its cluster.
type Retrier interface {
	// Retry takes a place among the requests that are sent again. It returns false if the cluster permits no more of them. A
	// request takes it once, from any of its leases, and keeps it until EndRetry, whether or not the lease has ended.
	Retry() bool

	// EndRetry gives the place back.
	EndRetry()
}

// Failure is why no host was chosen.
type Failure uint8

// The failures.
const (
	None      Failure = iota
	NoHost            // no healthy host
	Overflow          // a limit of the cluster is reached
	Resolving         // the names of the hosts are being looked up: see Cluster.Resolved
)

// Known reports whether the names of the cluster's hosts were looked up. If not, it begins that.
func (c *Cluster) Known() bool { return c.settled() != nil }

// settled returns the view in force; nil: the names of its hosts are not known yet, and are being looked up.
func (c *Cluster) settled() *view {
	for {
		v := c.view.Load()
		switch {
		case v.names == nil:
			return v
		case !v.names.ready():
			return nil
		case c.view.Load() == v: // otherwise the names may have become known after v was made, which lacks the hosts then
			return v
		}
	}
}

// Pick chooses a host.
func (c *Cluster) Pick(r *Request) (Choice, Failure) {
	v := c.settled()
	if v == nil {
		return Choice{}, Resolving
	}
	if v.renew != 0 && time.Now().UnixNano() > v.renew {
		v = c.advance(v)
	}
	m := v.pick(r)
	if m == nil {
		c.Stats.NoHealthyHost.Add(1)
		return Choice{}, NoHost
	}
	lease := c.reserve(v, m.host, r)
	if lease == nil {
		return Choice{}, Overflow
	}
	choice := Choice{Address: m.host.Address, Endpoint: m.endpoint, Transport: m.transport, Group: m.group, Lease: lease}
	if m.endpoint == nil {
		choice.Address = r.Original
	}
	return choice, None
}

// At takes a place at a host, for a request that can go to no other. It returns no lease and no failure if the host has
// left the cluster: what is on a connection to it is finished.
func (c *Cluster) At(host netip.AddrPort, r *Request) (Lease, Failure) {
	v := c.view.Load()
	for i := range v.members {
		m := &v.members[i]
		if m.host.Address != host && m.endpoint != nil {
			continue
		}
		if lease := c.reserve(v, m.host, r); lease != nil {
			return lease, None
		}
		return nil, Overflow
	}
	return nil, None
}

// advance compiles a view again whose weights change with time. One goroutine does it, the others use the old view.
func (c *Cluster) advance(v *view) *view {
	if !c.mu.TryLock() {
		return v
	}
	defer c.mu.Unlock()
	if c.view.Load() == v {
		c.refresh()
	}
	return c.view.Load()
}

// reserve takes a place at a host, or returns nil if a limit is reached.
func (c *Cluster) reserve(v *view, h *Host, r *Request) Lease {
	if r.Kind == TCP {
		if !take(&c.connections, v.connections) {
			c.Stats.Overflowed.Add(1)
			return nil
		}
		h.start()
		return (*connection)(h)
	}
	limit := v.requests
	if r.Kind == HTTP1 {
		limit = v.queued
	}
	if !take(&c.requests, limit) {
		c.Stats.Overflowed.Add(1)
		return nil
	}
	h.start()
	return h
}

// retryLimit returns how many retries may be in progress.
func (c *Cluster) retryLimit(b *mesh.Breakers) int64 {
	if b.RetryBudget == nil {
		return int64(b.Retries)
	}
	return max(int64(b.RetryBudget.Percent/100*float64(c.requests.Load())), int64(b.RetryBudget.AtLeast))
}

// take adds one to a count if that stays within the limit.
func take(count *atomic.Int64, limit int64) bool {
	if count.Add(1) > limit {
		count.Add(-1)
		return false
	}
	return true
}

// Active returns the requests and connections in progress.
func (c *Cluster) Active() (requests, connections, retries int64) {
	return c.requests.Load(), c.connections.Load(), c.retries.Load()
}

// HostState is a host as it is used now.
type HostState struct {
	*Host
	Endpoint mesh.Endpoint
	Locality *mesh.Locality
	Weight   uint32 // as configured
	Healthy  bool   // false for one that is ejected or of which the control plane says so
	Load     uint32 // percent of the cluster's requests that the hosts of its priority get together
	Panic    bool   // too few hosts of its priority are healthy, so that all of them get its requests
}

// Hosts returns the hosts in the order of their priorities.
func (c *Cluster) Hosts() []HostState {
	v := c.view.Load()
	var all []HostState
	before := uint32(0)
	for i := range v.levels {
		l := &v.levels[i]
		for k := range l.all {
			if m := &l.all[k]; m.endpoint != nil {
				all = append(all, HostState{m.host, *m.endpoint, m.locality, m.endpoint.Weight, m.usable, l.load - before, l.panic})
			}
		}
		before = l.load
	}
	return all
}
