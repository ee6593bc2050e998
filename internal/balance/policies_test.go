package balance

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

func TestEqualHostsGetEqualShares(t *testing.T) {
	const n = 30000
	for _, policy := range []mesh.Policy{mesh.RoundRobin, mesh.LeastRequest, mesh.Random} {
		_, c, _ := newTest(t, clusterOf(policy), equal(3))
		for i := range 3 {
			within(t, "share", spread(t, c, n, &Request{})[address(i)], n, 1.0/3)
		}
	}
}

func TestWeightsDivideRequests(t *testing.T) {
	const n = 60000
	weights := []uint32{1, 2, 3}
	for policy, want := range map[mesh.Policy][]float64{
		mesh.RoundRobin:   {1. / 6, 2. / 6, 3. / 6},
		mesh.LeastRequest: {1. / 6, 2. / 6, 3. / 6},
		mesh.Random:       {1. / 3, 1. / 3, 1. / 3}, // as in Envoy
	} {
		_, c, _ := newTest(t, clusterOf(policy), endpoints(weights...))
		counts := spread(t, c, n, &Request{})
		for i := range weights {
			within(t, describe(counts), counts[address(i)], n, want[i])
		}
	}
}

// In each cycle of a schedule each host has as many turns as its weight is, and the turns of a host are spread: at any time
// it has had its share, give or take a few. The reference is the share itself.
func TestRoundRobinIsExactAndSpread(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		hosts := 2 + random.IntN(12)
		weights := make([]uint32, hosts)
		highest, sum := uint32(0), uint32(0)
		for i := range weights {
			weights[i] = 1 + random.Uint32N(40)
			highest, sum = max(highest, weights[i]), sum+weights[i]
		}
		_, c, _ := newTest(t, clusterOf(mesh.RoundRobin), endpoints(weights...))
		s := &c.view.Load().levels[0].sets[0]
		s.balance.turn.Store(uint64(random.IntN(hosts))*uint64(highest) - 1)
		turns := make([]float64, hosts)
		for n := 1; n <= int(sum); n++ {
			turns[s.balance.next()]++
			for i, got := range turns {
				if d := got - float64(n)*float64(weights[i])/float64(sum); d > 3 || d < -3 {
					t.Fatalf("weights %v: after %d turns host %d had %v", weights, n, i, got)
				}
			}
		}
	}
}

func TestRoundRobinTakesTurns(t *testing.T) {
	_, c, _ := newTest(t, clusterOf(mesh.RoundRobin), equal(4))
	last := pick(t, c, &Request{}).Address
	for range 40 {
		next := pick(t, c, &Request{}).Address
		want := slices.IndexFunc([]int{0, 1, 2, 3}, func(i int) bool { return address(i) == last }) + 1
		if next != address(want%4) {
			t.Fatalf("%v follows %v", next, last)
		}
		last = next
	}
}

// The reference draws two hosts and compares their requests. Its probabilities are computed, not drawn.
func TestLeastRequestPrefersTheIdle(t *testing.T) {
	const n = 40000
	_, c, _ := newTest(t, clusterOf(mesh.LeastRequest), equal(4))
	s := &c.view.Load().levels[0].sets[0]
	active := []int64{5, 1, 3, 1}
	for i, m := range s.members {
		m.host.active.Store(active[i])
	}
	want := make([]float64, 4)
	for i := range active {
		for k := range active {
			best := i // the first of equal ones
			if active[k] < active[i] {
				best = k
			}
			want[best] += 1. / 16
		}
	}
	counts := spread(t, c, n, &Request{})
	for i := range active {
		within(t, describe(counts), counts[address(i)], n, want[i])
	}
}

// With requests that last, hosts of different weights end up with requests in progress by weight.
func TestLeastRequestLoadsByWeight(t *testing.T) {
	_, c, _ := newTest(t, clusterOf(mesh.LeastRequest), endpoints(1, 3))
	var open []Choice
	for range 40000 {
		open = append(open, pick(t, c, &Request{}))
		if len(open) > 400 {
			i := rand.IntN(len(open))
			open[i].Lease.End(ok)
			open = slices.Delete(open, i, i+1)
		}
	}
	v := c.view.Load()
	if one, three := v.members[0].host.Active(), v.members[1].host.Active(); one < 90 || one > 110 {
		t.Errorf("hosts of weight 1 and 3 have %d and %d requests", one, three)
	}
}

func TestHostsThatFailedAreAvoided(t *testing.T) {
	for _, policy := range []mesh.Policy{mesh.RoundRobin, mesh.LeastRequest, mesh.Random} {
		_, c, _ := newTest(t, clusterOf(policy), equal(3))
		avoid := []netip.AddrPort{address(0), address(1)}
		counts := spread(t, c, 2000, &Request{Avoid: avoid, Repicks: 5})
		if policy == mesh.RoundRobin && len(counts) != 1 || counts[address(2)] < 1600 { // of six draws: 1 - (2/3)^6 = 91 %
			t.Errorf("policy %d: %v", policy, counts)
		}
		_, single, _ := newTest(t, clusterOf(policy), equal(1))
		if got := pick(t, single, &Request{Avoid: avoid, Repicks: 5}).Address; got != address(0) {
			t.Errorf("policy %d: %v, although there is only one host", policy, got)
		}
	}
}

// A retry avoids the priorities of the attempts before it, whose load the others share by their health. When all were tried, or
// too few attempts were made, they get their load again.
func TestRetriesAvoidThePrioritiesThatWereTried(t *testing.T) {
	const n = 20000
	up, down := mesh.Healthy, mesh.Unhealthy
	hosts := assignment([]mesh.Health{up, down}, []mesh.Health{up, down, down, down}, []mesh.Health{up})
	tried := func(hosts ...int) (list []netip.AddrPort) {
		for _, i := range hosts {
			list = append(list, address(i))
		}
		return list
	}
	for _, test := range []struct {
		tried []netip.AddrPort
		every uint32
		want  map[int]float64 // shares by host
	}{
		{nil, 2, map[int]float64{0: 0.7, 2: 0.3}},
		{tried(0), 2, map[int]float64{0: 0.7, 2: 0.3}},
		{tried(0, 0), 2, map[int]float64{2: 0.35, 6: 0.65}},
		{tried(0, 0, 2), 2, map[int]float64{2: 0.35, 6: 0.65}},
		{tried(1), 1, map[int]float64{2: 0.35, 6: 0.65}}, // it has been ejected since
		{tried(0, 2), 1, map[int]float64{6: 1}},
		{tried(0, 2, 6), 1, map[int]float64{0: 0.7, 2: 0.3}},
		{tried(0, 2, 6), 0, map[int]float64{0: 0.7, 2: 0.3}},
	} {
		_, c, _ := newTest(t, clusterOf(mesh.LeastRequest), hosts)
		counts := spread(t, c, n, &Request{Tried: test.tried, Priorities: test.every})
		for i := range 7 {
			within(t, fmt.Sprintf("%v, every %d: host %d", test.tried, test.every, i), counts[address(i)], n, test.want[i])
		}
	}
}

// The tables of Envoy's documentation on priority levels and on panic thresholds, with hosts in place of percents.
func TestPrioritiesTakeLoadByHealth(t *testing.T) {
	for _, c := range []struct {
		healthy []int // percent of 100 hosts, by priority
		panic   float64
		load    []uint32
		inPanic []bool
	}{
		{[]int{100, 100}, 50, []uint32{100, 0}, []bool{false, false}},
		{[]int{72, 100}, 50, []uint32{100, 0}, []bool{false, false}},
		{[]int{71, 100}, 50, []uint32{99, 1}, []bool{false, false}},
		{[]int{50, 100}, 50, []uint32{70, 30}, []bool{false, false}},
		{[]int{25, 100}, 50, []uint32{35, 65}, []bool{false, false}},
		{[]int{25, 25}, 50, []uint32{50, 50}, []bool{true, true}},
		{[]int{0, 100}, 50, []uint32{0, 100}, []bool{false, false}},
		{[]int{25, 25}, 0, []uint32{50, 50}, []bool{false, false}},
		{[]int{20, 20, 10}, 0, []uint32{40, 40, 20}, []bool{false, false, false}},
		{[]int{5, 0}, 50, []uint32{50, 50}, []bool{true, true}},
		{[]int{5, 65}, 50, []uint32{8, 92}, []bool{true, false}}, // documented as 7 and 93; what rounding leaves goes to the first
		{[]int{0, 0}, 50, []uint32{50, 50}, []bool{true, true}},
		{[]int{0, 0}, 0, []uint32{100, 0}, []bool{false, false}},
		{[]int{100, 0}, 50, []uint32{100, 0}, []bool{false, false}},
	} {
		levels := make([]health, len(c.healthy))
		for i, healthy := range c.healthy {
			levels[i] = health{total: 100, usable: healthy}
		}
		distribute(levels, c.panic)
		for i, l := range levels {
			if l.load != c.load[i] || l.panic != c.inPanic[i] {
				t.Errorf("health %v, panic below %v: level %d has load %d, panic %v; want %d, %v", c.healthy, c.panic, i, l.load, l.panic, c.load[i], c.inPanic[i])
			}
		}
	}
}

// Whatever the health, all load is given away, and only to levels with hosts that get requests.
func TestLoadIsAlwaysComplete(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	for range 20000 {
		levels := make([]health, 1+random.IntN(4))
		for i := range levels {
			levels[i].total = 1 + random.IntN(7)
			levels[i].usable = random.IntN(levels[i].total + 1)
		}
		panicBelow := float64(random.IntN(3) * 50)
		distribute(levels, panicBelow)
		sum, usable := uint32(0), 0
		for _, l := range levels {
			sum += l.load
			usable += l.usable
			if l.load > 0 && l.usable == 0 && !l.panic && usable > 0 {
				t.Fatalf("%+v: load without a host", levels)
			}
		}
		if sum != 100 {
			t.Fatalf("%+v: the load is %d", levels, sum)
		}
	}
}

// assignment has a locality for each list of healths, at the priority with its number.
func assignment(priorities ...[]mesh.Health) *mesh.Assignment {
	a, n := &mesh.Assignment{}, 0
	for p, healths := range priorities {
		l := mesh.Locality{Priority: uint32(p), Weight: 1}
		for _, h := range healths {
			l.Endpoints = append(l.Endpoints, mesh.Endpoint{Address: address(n), Weight: 1, Health: h})
			n++
		}
		a.Localities = append(a.Localities, l)
	}
	return a
}

func TestFailover(t *testing.T) {
	const n = 20000
	up, down := mesh.Healthy, mesh.Unhealthy
	_, c, _ := newTest(t, clusterOf(mesh.LeastRequest), assignment([]mesh.Health{up, down}, []mesh.Health{up}, []mesh.Health{up}))
	counts := spread(t, c, n, &Request{})
	within(t, describe(counts), counts[address(0)], n, 0.7)
	within(t, describe(counts), counts[address(2)], n, 0.3)
	_, c, _ = newTest(t, clusterOf(mesh.LeastRequest), assignment([]mesh.Health{down, down}, []mesh.Health{up}))
	if counts := spread(t, c, 100, &Request{}); counts[address(2)] != 100 {
		t.Errorf("%v", counts)
	}
}

func TestPanic(t *testing.T) {
	_, c, _ := newTest(t, clusterOf(mesh.LeastRequest), assignment([]mesh.Health{mesh.Unhealthy, mesh.Unhealthy}))
	if _, failure := c.Pick(&Request{}); failure != NoHost {
		t.Errorf("without a panic threshold: failure %d", failure)
	}
	if got := c.Stats.NoHealthyHost.Load(); got != 1 {
		t.Errorf("%d requests without a host are counted", got)
	}
	panics := func(c *mesh.Cluster) { c.Balancing.PanicBelow = 50 }
	_, c, _ = newTest(t, clusterOf(mesh.LeastRequest, panics), assignment([]mesh.Health{mesh.Unhealthy, mesh.Unhealthy}))
	if counts := spread(t, c, 1000, &Request{}); len(counts) != 2 {
		t.Errorf("in a panic: %v", counts)
	}
	_, c, _ = newTest(t, clusterOf(mesh.LeastRequest, panics), nil)
	if _, failure := c.Pick(&Request{}); failure != NoHost {
		t.Errorf("without endpoints: failure %d", failure)
	}
}

// The states of hosts tell who gets the requests: the load of each priority, and whether it is in a panic. The requests follow.
func TestHostsTellWhoGetsRequests(t *testing.T) {
	const n = 20000
	up, down := mesh.Healthy, mesh.Unhealthy
	for _, test := range []struct {
		hosts *mesh.Assignment
		panic float64
		want  string // load by host; !: in a panic
	}{
		{assignment([]mesh.Health{up}, []mesh.Health{up}), 50, "100 0"},
		{assignment([]mesh.Health{up, down}, []mesh.Health{up}), 50, "70 70 30"},
		{assignment([]mesh.Health{down}, []mesh.Health{up}), 50, "0 100"},
		{assignment([]mesh.Health{down}, []mesh.Health{down, down, down}), 50, "25! 75! 75! 75!"},
		{assignment([]mesh.Health{up, down, down, down}, []mesh.Health{up, up, down, down, down}), 30, "39! 39! 39! 39! 61 61 61 61 61"},
	} {
		_, c, _ := newTest(t, clusterOf(mesh.RoundRobin, func(c *mesh.Cluster) { c.Balancing.PanicBelow = test.panic }), test.hosts)
		var got []string
		getting := map[uint32]float64{} // hosts that get requests, by priority
		for _, h := range c.Hosts() {
			text := fmt.Sprint(h.Load)
			if h.Panic {
				text += "!"
			}
			got = append(got, text)
			if h.Panic || h.Healthy {
				getting[h.Locality.Priority]++
			}
		}
		if text := strings.Join(got, " "); text != test.want {
			t.Errorf("the load is %s, want %s", text, test.want)
		}
		counts := spread(t, c, n, &Request{})
		for _, h := range c.Hosts() {
			share := 0.0
			if h.Panic || h.Healthy {
				share = float64(h.Load) / 100 / getting[h.Locality.Priority]
			}
			within(t, test.want+" "+h.Address.String(), counts[h.Address], n, share)
		}
	}
}

// A locality's weight divides requests; fewer healthy hosts than 1/1.4 of it reduce its weight.
func TestLocalityWeights(t *testing.T) {
	const n = 50000
	weighted := func(c *mesh.Cluster) { c.Balancing.LocalityWeighted = true }
	hosts := &mesh.Assignment{Localities: []mesh.Locality{
		{Zone: "a", Weight: 3, Endpoints: equal(2).Localities[0].Endpoints},
		{Zone: "b", Weight: 1, Endpoints: equal(10).Localities[0].Endpoints[2:6]},
		{Zone: "c", Weight: 0, Endpoints: equal(10).Localities[0].Endpoints[6:]},
	}}
	zone := func(counts map[netip.AddrPort]int) (a, b, c int) {
		for host, n := range counts {
			switch i := int(host.Addr().As4()[3]) - 1; {
			case i < 2:
				a += n
			case i < 6:
				b += n
			default:
				c += n
			}
		}
		return a, b, c
	}
	for _, policy := range []mesh.Policy{mesh.RoundRobin, mesh.LeastRequest, mesh.Random} {
		_, c, _ := newTest(t, clusterOf(policy, weighted), hosts)
		counts := spread(t, c, n, &Request{})
		a, b, none := zone(counts)
		within(t, describe(counts), a, n, 0.75)
		within(t, describe(counts), b, n, 0.25)
		if none != 0 {
			t.Errorf("a locality of weight 0 got %d", none)
		}
	}
	hosts.Localities[0].Endpoints[1].Health = mesh.Unhealthy // 70 % of its weight is left
	_, c, _ := newTest(t, clusterOf(mesh.RoundRobin, weighted), hosts)
	a, _, _ := zone(spread(t, c, n, &Request{}))
	within(t, "locality with half of its hosts", a, n, 2.1/3.1)
}

func TestLocalitiesWithoutWeightsAreOneSet(t *testing.T) {
	const n = 30000
	hosts := &mesh.Assignment{Localities: []mesh.Locality{
		{Zone: "a", Weight: 1, Endpoints: equal(1).Localities[0].Endpoints},
		{Zone: "b", Weight: 2, Endpoints: equal(3).Localities[0].Endpoints[1:]},
	}}
	_, c, _ := newTest(t, clusterOf(mesh.LeastRequest), hosts)
	within(t, "zone a", spread(t, c, n, &Request{})[address(0)], n, 1.0/3)
}
