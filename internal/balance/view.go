package balance

import (
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sort"
	"sync"
	"time"

	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

// view is a cluster as hosts are chosen from it. Only its counters change.
type view struct {
	config *mesh.Cluster
	source *mesh.Assignment // as configured, with names
	names  *names           // nil: all hosts are addresses

	members []member // all hosts, by priority
	levels  []level  // by priority
	renew   int64    // when the weights are out of date because a host is in slow start, in nanoseconds; 0: never

	// The highest numbers in progress. Envoy keeps requests that find no connection in a queue; here they get a connection.
	// So queued, the limit of HTTP/1 requests, is connections and queue together.
	connections, requests, queued int64
}

// member is a host in a view.
type member struct {
	host      *Host
	endpoint  *mesh.Endpoint // nil for OriginalDestination
	locality  *mesh.Locality
	transport *mesh.Transport
	group     *tcp.Group
	usable    bool
	weight    float64 // that of the endpoint, or less during slow start
}

// tls returns what secures connections to the host; nil: they are plain.
func (m *member) tls() *mesh.UpstreamTLS {
	if m.transport == nil {
		return nil
	}
	return m.transport.TLS
}

// level is the hosts of one priority.
type level struct {
	load    uint32 // percent of the requests that go to this level and those before it
	health  uint32 // percent
	panic   bool   // health is ignored
	all     []member
	sets    []set // one, or one for each locality if these are weighted
	weights []uint64
	hash    consistent
}

// set is hosts among which a policy chooses.
type set struct {
	members  []*member
	locality *mesh.Locality // the first, if there are several
	balance  interleaving
}

// compile makes the view of a configuration, with mu held. now is when hosts are new that were not in the last view.
func (c *Cluster) compile(config *mesh.Cluster, source *mesh.Assignment, now time.Time) {
	v := &view{config: config, source: source, names: c.names}
	v.connections = int64(config.Breakers.Connections)
	v.requests = int64(config.Breakers.Requests)
	v.queued = min(v.requests, v.connections+int64(config.Breakers.Pending))
	hosts := make(map[netip.AddrPort]*Host)
	if config.Discovery == mesh.OriginalDestination {
		m := member{host: c.keep(hosts, netip.AddrPort{}, now), transport: config.TransportTo(&mesh.Endpoint{}), usable: true, weight: 1}
		m.join(hosts)
		v.members = []member{m}
	} else if resolved := c.names.expand(source); resolved != nil {
		c.enrol(v, hosts, resolved, now)
	}
	c.hosts = hosts
	v.build()
	if old := c.view.Swap(v); old != nil {
		c.retireLost(old)
	}
}

// retireLost retires the connections that were made to the hosts of an old view, unless those to the host still belong to the
// same group.
func (c *Cluster) retireLost(old *view) {
	for i := range old.members {
		m := &old.members[i]
		if h := c.hosts[m.host.Address]; h == nil || h.group != m.group {
			c.balancer.retire(m.group)
		}
	}
}

// keep returns the state of a host, which it makes if it is new.
func (c *Cluster) keep(hosts map[netip.AddrPort]*Host, address netip.AddrPort, now time.Time) *Host {
	h := hosts[address]
	if h == nil {
		h = c.hosts[address]
	}
	if h == nil {
		h = &Host{Address: address, cluster: c, added: now}
	}
	return h
}

// join adds a member's host to those of its view. If the host has several members, the first decides whether connections stay.
func (m *member) join(hosts map[netip.AddrPort]*Host) {
	h := m.host
	if hosts[h.Address] == nil {
		hosts[h.Address] = h
		h.renew(m.usable, m.tls())
	}
	m.group = h.group
}

// enrol makes the members of a view.
func (c *Cluster) enrol(v *view, hosts map[netip.AddrPort]*Host, from *mesh.Assignment, now time.Time) {
	for i := range from.Localities {
		locality := &from.Localities[i]
		for k := range locality.Endpoints {
			e := &locality.Endpoints[k]
			if !e.Address.IsValid() {
				continue
			}
			h := c.keep(hosts, e.Address, now)
			m := member{host: h, endpoint: e, locality: locality, transport: v.config.TransportTo(e), weight: float64(e.Weight)}
			m.usable = e.Health.Usable() && !h.outlier.ejected.Load()
			m.join(hosts)
			v.ease(&m, now)
			v.members = append(v.members, m)
		}
	}
	sort.SliceStable(v.members, func(i, k int) bool { return v.members[i].locality.Priority < v.members[k].locality.Priority })
}

// slowSteps is into how many steps the weight of a new host is divided.
const slowSteps = 20

// ease reduces the weight of a host in slow start.
func (v *view) ease(m *member, now time.Time) {
	b := &v.config.Balancing
	window := b.SlowStart
	if window <= 0 || m.host.added.IsZero() || b.Policy != mesh.RoundRobin && b.Policy != mesh.LeastRequest {
		return
	}
	age := now.Sub(m.host.added)
	if age >= window {
		return
	}
	m.weight *= max(b.SlowStartMin/100, float64(max(age, time.Second))/float64(window))
	if v.renew == 0 {
		v.renew = now.Add(max(window/slowSteps, time.Millisecond)).UnixNano()
	}
}

// build makes the levels.
func (v *view) build() {
	var healths []health
	for first := 0; first < len(v.members); {
		last := first + 1
		for last < len(v.members) && v.priority(last) == v.priority(first) {
			last++
		}
		members := v.members[first:last]
		h := health{total: len(members)}
		for i := range members {
			if members[i].usable {
				h.usable++
			}
		}
		healths = append(healths, h)
		v.levels = append(v.levels, level{})
		first = last
	}
	distribute(healths, v.config.Balancing.PanicBelow)
	first, load := 0, uint32(0)
	for i, h := range healths {
		load += h.load
		v.levels[i].load, v.levels[i].health, v.levels[i].panic, v.levels[i].all = load, h.health(), h.panic, v.members[first:first+h.total]
		v.levels[i].fill(v.members[first:first+h.total], h.panic, &v.config.Balancing)
		first += h.total
	}
}

func (v *view) priority(i int) uint32 {
	if l := v.members[i].locality; l != nil {
		return l.Priority
	}
	return 0
}

// fill groups the hosts of a level that get requests: the usable ones, or all in a panic.
func (l *level) fill(members []member, panic bool, b *mesh.Balancing) {
	var locality *mesh.Locality
	total := 0
	for i := range members {
		m := &members[i]
		if len(l.sets) == 0 || b.LocalityWeighted && m.locality != locality {
			l.close(locality, total, panic, b)
			l.sets, locality, total = append(l.sets, set{locality: m.locality}), m.locality, 0
		}
		total++
		if m.usable || panic {
			s := &l.sets[len(l.sets)-1]
			s.members = append(s.members, m)
		}
	}
	l.close(locality, total, panic, b)
	for i := range l.sets {
		l.sets[i].balance.fill(l.sets[i].members)
	}
	l.hash.policy, l.hash.balancing = b.Policy, b
}

// close ends the set of a locality, of which total hosts exist. Its weight is lower if few of them are usable.
func (l *level) close(locality *mesh.Locality, total int, panic bool, b *mesh.Balancing) {
	if !b.LocalityWeighted || len(l.sets) == 0 {
		return
	}
	weight := float64(0)
	if locality != nil && total > 0 {
		share := 1.0
		if !panic {
			share = min(1, overprovisioning*float64(len(l.sets[len(l.sets)-1].members))/float64(total)/100)
		}
		weight = float64(locality.Weight) * share
	}
	sum := uint64(0)
	if len(l.weights) > 0 {
		sum = l.weights[len(l.weights)-1]
	}
	l.weights = append(l.weights, sum+uint64(math.Round(weight*1000)))
}

// overprovisioning is by how many percent more requests healthy hosts take before another priority or locality gets some.
const overprovisioning = 140

// health is how many hosts of a level are usable, and what follows from that.
type health struct {
	total, usable int    // total is at least 1
	load          uint32 // percent of the requests
	panic         bool   // health is ignored
}

// distribute divides the requests among levels, as Envoy does: each takes as much as its health permits, in order.
func distribute(levels []health, panicBelow float64) {
	available := uint32(0)
	for i := range levels {
		available = min(100, available+levels[i].health())
	}
	if available > 0 {
		share(levels, available)
	}
	switch {
	case available == 100 || len(levels) == 0:
		return // no level is in a panic, however few hosts of it are usable
	case available == 0 && panicBelow == 0:
		levels[0].load = 100
		return
	}
	all := true
	for i := range levels {
		levels[i].panic = levels[i].inPanic(panicBelow)
		all = all && levels[i].panic
	}
	if all {
		sharePanic(levels)
	}
}

func (h *health) health() uint32 { return min(100, uint32(overprovisioning*h.usable/h.total)) }

func (h *health) inPanic(below float64) bool { return 100*float64(h.usable)/float64(h.total) < below }

// share divides the requests by health. available is the health of all levels together.
func share(levels []health, available uint32) {
	left := uint32(100)
	first := -1
	for i := range levels {
		h := levels[i].health()
		if h > 0 && first < 0 {
			first = i
		}
		levels[i].load = min(left, h*100/available)
		left -= levels[i].load
	}
	levels[first].load += left // rounding
}

// sharePanic divides the requests by the number of hosts.
func sharePanic(levels []health) {
	total := 0
	for i := range levels {
		total += levels[i].total
	}
	left := uint32(100)
	for i := range levels {
		levels[i].load = uint32(100 * levels[i].total / total)
		left -= levels[i].load
	}
	levels[0].load += left // levels have hosts
}

// pick chooses a member, or returns nil.
func (v *view) pick(r *Request) *member {
	if len(v.levels) == 0 {
		return nil
	}
	if v.config.Discovery == mesh.OriginalDestination {
		return &v.members[0] // whatever is configured for the choice among hosts; it has no locality
	}
	policy := v.config.Balancing.Policy
	hashes := policy == mesh.RingHash || policy == mesh.Maglev
	random := rand.Uint64()
	hash := random
	if hashes && r.Hashed {
		hash = r.Hash
	}
	for attempt := uint64(0); ; attempt++ {
		l := v.levelFor(r, hash)
		var m *member
		if hashes {
			m = l.hash.pick(l, hash, attempt)
		} else {
			m = l.locality().pick(&v.config.Balancing, rand.Uint64())
		}
		if m == nil || attempt >= uint64(r.Repicks) || !slices.Contains(r.Avoid, m.host.Address) {
			return m
		}
		if !hashes {
			hash = rand.Uint64()
		}
	}
}

// level returns the level that a number stands for.
func (v *view) level(hash uint64) *level {
	if len(v.levels) == 1 {
		return &v.levels[0]
	}
	percent := uint32(hash % 100)
	for i := range v.levels {
		if percent < v.levels[i].load {
			return &v.levels[i]
		}
	}
	return &v.levels[0]
}

// levelFor is level without the priorities that the request avoids. What they would get is divided among the others by their
// health, in order, as Envoy's previous_priorities does.
func (v *view) levelFor(r *Request, hash uint64) *level {
	if r.Priorities == 0 || len(r.Tried) < int(r.Priorities) || len(v.levels) == 1 {
		return v.level(hash)
	}
	tried := r.Tried[:len(r.Tried)-len(r.Tried)%int(r.Priorities)]
	total := uint32(0)
	for i := range v.levels {
		if !v.levels[i].has(tried) {
			total = min(100, total+v.levels[i].health)
		}
	}
	if total == 0 {
		return v.level(hash) // all were tried
	}
	percent, last := uint32(hash%100), (*level)(nil)
	for i := range v.levels {
		l := &v.levels[i]
		if l.health == 0 || l.has(tried) {
			continue
		}
		share := l.health * 100 / total
		if percent < share {
			return l
		}
		percent, last = percent-share, l
	}
	return last // rounding
}

// has reports whether a host of the level is among some, usable or not.
func (l *level) has(some []netip.AddrPort) bool {
	return slices.ContainsFunc(l.all, func(m member) bool { return slices.Contains(some, m.host.Address) })
}

// locality returns a set at random by the weights of localities.
func (l *level) locality() *set {
	if len(l.weights) == 0 {
		return &l.sets[0]
	}
	sum := l.weights[len(l.weights)-1]
	if sum == 0 {
		return &noSet
	}
	n, _ := slices.BinarySearch(l.weights, rand.Uint64N(sum)+1)
	return &l.sets[n]
}

var noSet set

// consistent is the table of a policy that chooses by hash. It is made when it is first used.
type consistent struct {
	policy    mesh.Policy
	balancing *mesh.Balancing
	once      sync.Once
	ring      []point
	table     []*member
}

func (c *consistent) pick(l *level, hash, attempt uint64) *member {
	c.once.Do(func() {
		weighted := l.normalized(c.balancing.LocalityWeighted)
		if c.policy == mesh.RingHash {
			c.ring = newRing(weighted, c.balancing.MinRing, c.balancing.MaxRing)
		} else {
			c.table = newMaglev(weighted, c.balancing.Table)
		}
	})
	if c.policy == mesh.RingHash {
		return pickRing(c.ring, hash, attempt)
	}
	return pickMaglev(c.table, hash, attempt)
}

// weighted is a member with its share of all weight.
type weighted struct {
	*member
	share float64
}

// normalized returns the members of a level with their shares. With weighted localities, a locality's weight is divided
// among its hosts; as in Envoy, it does not depend on how many of them are healthy here.
func (l *level) normalized(byLocality bool) []weighted {
	var all []weighted
	total := 0.0 // weight of all localities
	for i := range l.sets {
		total += float64(l.sets[i].locality.Weight)
	}
	for i := range l.sets {
		s := &l.sets[i]
		part, sum := 1.0, 0.0
		if byLocality {
			part = float64(s.locality.Weight) / total
		}
		for _, m := range s.members {
			sum += m.weight
		}
		for _, m := range s.members {
			if share := m.weight * part / sum; share > 0 {
				all = append(all, weighted{m, share})
			}
		}
	}
	return all
}
