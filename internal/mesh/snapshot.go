package mesh

import (
	"hash/maphash"
	"iter"
	"maps"
	"net/netip"
	"slices"
)

// Snapshot is everything that the control plane has configured and that is in force. It is immutable. Snapshots share the
// values that did not change, so a pointer to a value is its identity.
type Snapshot struct {
	clusters    shared[Cluster]
	assignments shared[Assignment]
	listeners   shared[Listener]
	routes      shared[Routes]
	secrets     shared[Secret]
	extensions  shared[HTTPFilter]
	names       *Names
	roots       []string

	byAddress map[netip.AddrPort]*Listener
	accepting map[uint16]*Listener // bound, by port
	measured  bool                 // a filter chain has metrics of Istio\'s
	bound     map[netip.AddrPort]*Listener
}

// Cluster returns a cluster, or nil.
func (s *Snapshot) Cluster(name string) *Cluster { return s.clusters.get(name) }

// Hosts returns the endpoints of a cluster. It returns nil if the control plane has not sent them: the cluster has no
// healthy host.
func (s *Snapshot) Hosts(c *Cluster) *Assignment {
	if c.Discovery == ByEDS {
		return s.assignments.get(c.Assignment)
	}
	return c.Hosts
}

// Assignment returns the endpoints with a name, or nil. See Hosts.
func (s *Snapshot) Assignment(name string) *Assignment { return s.assignments.get(name) }

// Listener returns a listener by its name, or nil.
func (s *Snapshot) Listener(name string) *Listener { return s.listeners.get(name) }

// Routes returns the routes of an HTTPManager, or nil.
func (s *Snapshot) Routes(h *HTTPManager) *Routes {
	if h.Routes != nil {
		return h.Routes
	}
	return s.routes.get(h.RouteName)
}

// RouteTable returns the routes with a name, or nil. See Routes.
func (s *Snapshot) RouteTable(name string) *Routes { return s.routes.get(name) }

// Secret returns a secret. It returns nil if the control plane has not sent it: whatever needs it is closed.
func (s *Snapshot) Secret(name string) *Secret { return s.secrets.get(name) }

// Filter returns the filter that is in force instead of one with OnItsOwn: the resource with its name, or else the default.
// It returns nil if there is neither, and requests must be refused. Other filters are returned as they are.
func (s *Snapshot) Filter(f *HTTPFilter) *HTTPFilter {
	if !f.OnItsOwn {
		return f
	}
	switch extension := s.extensions.get(f.Name); {
	case extension == nil && f.Type == "" && !f.Optional:
		return nil
	case extension == nil:
		return f
	case f.BeforePolicy && slices.Contains(preparingFilters, extension.Type) && !f.Optional:
		return &HTTPFilter{Name: f.Name, Type: extension.Type, Refused: true} // it might prepare requests for the policy
	default:
		return extension
	}
}

// Names returns the hosts for DNS. It returns nil before the control plane has sent them.
func (s *Snapshot) Names() *Names { return s.names }

// TrustBundle returns the roots of trust that the control plane sent, each as PEM. Callers do not change it.
func (s *Snapshot) TrustBundle() []string { return s.roots }

// Bound returns the listener that accepts connections at a port, such as 15006, or nil.
func (s *Snapshot) Bound(port uint16) *Listener { return s.accepting[port] }

// Accepted returns the addresses at which a gateway accepts connections, and their listeners.
func (s *Snapshot) Accepted() map[netip.AddrPort]*Listener {
	accepted := maps.Clone(s.bound)
	maps.DeleteFunc(accepted, func(_ netip.AddrPort, l *Listener) bool { return l.UseOriginalDst || l.Direction == Inbound })
	return accepted
}

// BoundChanged reports whether other listeners accept connections than before, or at other addresses.
func (s *Snapshot) BoundChanged(before *Snapshot) bool {
	return s.Listener(virtualInbound) != before.Listener(virtualInbound) || !maps.Equal(s.bound, before.bound)
}

// Destination returns the listener of connections to an original destination: the one with that address, or the one with
// that port and the unspecified address of the same family. Without either it returns nil, and the connection stays with
// the listener that accepted it. Listeners of inbound traffic and those that use the original destination themselves are
// not returned.
func (s *Snapshot) Destination(address netip.AddrPort) *Listener {
	ip := address.Addr().Unmap()
	if l := s.byAddress[netip.AddrPortFrom(ip, address.Port())]; l != nil {
		return l
	}
	wildcard := netip.IPv6Unspecified()
	if ip.Is4() {
		wildcard = netip.IPv4Unspecified()
	}
	return s.byAddress[netip.AddrPortFrom(wildcard, address.Port())]
}

// Clusters yields the clusters by their names, in order.
func (s *Snapshot) Clusters() iter.Seq2[string, *Cluster] { return s.clusters.all() }

// Assignments yields the endpoints by their names, in order.
func (s *Snapshot) Assignments() iter.Seq2[string, *Assignment] { return s.assignments.all() }

// Listeners yields the listeners by their names, in order.
func (s *Snapshot) Listeners() iter.Seq2[string, *Listener] { return s.listeners.all() }

// AccessLogs yields the access logs of the listeners and of their filter chains. Many of the lists are the same.
func (s *Snapshot) AccessLogs() iter.Seq[[]AccessLog] {
	return func(yield func([]AccessLog) bool) {
		for _, shard := range s.listeners {
			for _, l := range shard {
				if !yield(l.AccessLogs) || l.Default != nil && !yield(l.Default.AccessLogs()) {
					return
				}
				for _, c := range l.Chains {
					if !yield(c.AccessLogs()) {
						return
					}
				}
			}
		}
	}
}

// Tracings yields how the requests of the filter chains are traced. Many of the values are the same.
func (s *Snapshot) Tracings() iter.Seq[*Tracing] {
	return func(yield func(*Tracing) bool) {
		for _, shard := range s.listeners {
			for _, l := range shard {
				if !l.Default.trace(yield) {
					return
				}
				for _, c := range l.Chains {
					if !c.trace(yield) {
						return
					}
				}
			}
		}
	}
}

// trace yields how the chain's requests are traced, if they are. c may be nil.
func (c *FilterChain) trace(yield func(*Tracing) bool) bool {
	return c == nil || c.HTTP == nil || c.HTTP.Tracing == nil || yield(c.HTTP.Tracing)
}

// RouteTables yields the routes that are resources of their own by their names, in order.
func (s *Snapshot) RouteTables() iter.Seq2[string, *Routes] { return s.routes.all() }

// Secrets yields the secrets by their names, in order.
func (s *Snapshot) Secrets() iter.Seq2[string, *Secret] { return s.secrets.all() }

// Edit is a snapshot in the making. The snapshot that it began with stays as it is. It is used by one goroutine.
type Edit struct {
	next    *Snapshot
	changed bool

	// The shards that are the edit's own, and so may be changed.
	clusters, assignments, listeners, routes, secrets, extensions uint64
}

// Edit begins a snapshot with the content of s. A nil s is empty.
func (s *Snapshot) Edit() *Edit {
	if s == nil {
		s = &Snapshot{}
	}
	next := *s
	return &Edit{next: &next}
}

// ListenersChanged reports whether the edit has set or removed a listener.
func (e *Edit) ListenersChanged() bool { return e.listeners != 0 }

// The methods below set a value. A nil value removes it.

// SetCluster sets a cluster.
func (e *Edit) SetCluster(name string, c *Cluster) {
	e.changed = e.next.clusters.set(&e.clusters, name, c) || e.changed
}

// SetAssignment sets endpoints.
func (e *Edit) SetAssignment(name string, a *Assignment) {
	e.changed = e.next.assignments.set(&e.assignments, name, a) || e.changed
}

// SetListener sets a listener.
func (e *Edit) SetListener(name string, l *Listener) {
	e.changed = e.next.listeners.set(&e.listeners, name, l) || e.changed
}

// SetRoutes sets routes that are a resource of their own.
func (e *Edit) SetRoutes(name string, r *Routes) {
	e.changed = e.next.routes.set(&e.routes, name, r) || e.changed
}

// SetSecret sets a secret.
func (e *Edit) SetSecret(name string, s *Secret) {
	e.changed = e.next.secrets.set(&e.secrets, name, s) || e.changed
}

// SetExtension sets the configuration of an HTTP filter.
func (e *Edit) SetExtension(name string, f *HTTPFilter) {
	e.changed = e.next.extensions.set(&e.extensions, name, f) || e.changed
}

// SetNames sets the hosts for DNS.
func (e *Edit) SetNames(n *Names) {
	e.changed = e.changed || e.next.names != n
	e.next.names = n
}

// SetTrustBundle sets the roots of trust.
func (e *Edit) SetTrustBundle(roots []string) {
	e.changed = e.changed || !slices.Equal(e.next.roots, roots)
	e.next.roots = roots
}

// Snapshot ends the edit and returns its snapshot, and whether that differs from the one the edit began with.
func (e *Edit) Snapshot() (s *Snapshot, changed bool) {
	if e.listeners != 0 {
		e.next.indexListeners()
	}
	return e.next, e.changed
}

// indexListeners fills the indices of the listeners. Of several listeners with one address the first by name is used.
func (s *Snapshot) indexListeners() {
	s.measured = false
	s.byAddress, s.accepting, s.bound = map[netip.AddrPort]*Listener{}, map[uint16]*Listener{}, map[netip.AddrPort]*Listener{}
	for _, l := range s.listeners.all() {
		s.measured = s.measured || l.measured()
		for _, address := range l.Addresses {
			if _, taken := s.accepting[address.Port()]; !taken && !l.Virtual {
				s.accepting[address.Port()] = l
			}
			if _, taken := s.bound[address]; !taken && !l.Virtual {
				s.bound[address] = l
			}
			if _, taken := s.byAddress[address]; !taken && !l.UseOriginalDst && l.Direction != Inbound {
				s.byAddress[address] = l
			}
		}
	}
}

// Measures reports whether the metrics of a chain's connections or requests are to be counted. If the configuration has no
// metrics of Istio's at all, they are.
func (s *Snapshot) Measures(c *FilterChain) bool { return !s.measured || c.Metrics() != nil }

func (l *Listener) measured() bool {
	has := func(c *FilterChain) bool { return c.Metrics() != nil }
	return slices.ContainsFunc(l.Chains, has) || l.Default != nil && has(l.Default)
}

// shards is the number of parts of a table. An edit copies the parts that it changes: one of 64 if one value changes.
const shards = 64

// shared is a map whose copies share what did not change.
type shared[V any] [shards]map[string]*V

var tableSeed = maphash.MakeSeed()

func shard(name string) uint64 { return maphash.String(tableSeed, name) % shards }

func (t *shared[V]) get(name string) *V { return t[shard(name)][name] }

// set sets a value, or removes it if v is nil. owned has a bit for each shard that no other table shares. It returns false
// if the table has that value already.
func (t *shared[V]) set(owned *uint64, name string, v *V) bool {
	i := shard(name)
	if t[i][name] == v {
		return false
	}
	if *owned&(1<<i) == 0 {
		t[i] = maps.Clone(t[i])
		*owned |= 1 << i
	}
	if v == nil {
		delete(t[i], name)
		return true
	}
	if t[i] == nil {
		t[i] = map[string]*V{}
	}
	t[i][name] = v
	return true
}

func (t *shared[V]) all() iter.Seq2[string, *V] {
	return func(yield func(string, *V) bool) {
		var names []string
		for _, part := range t {
			names = slices.AppendSeq(names, maps.Keys(part))
		}
		slices.Sort(names)
		for _, name := range names {
			if !yield(name, t.get(name)) {
				return
			}
		}
	}
}
