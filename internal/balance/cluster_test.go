package balance

import (
	"math/rand/v2"
	"net/netip"
	"sync"
	"testing"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

func TestStateSurvivesPushes(t *testing.T) {
	config := clusterOf(mesh.RoundRobin, func(c *mesh.Cluster) { c.Outliers = outliers() })
	b, c, s := newTest(t, config, equal(3))
	var kept Choice
	for kept.Address != address(1) {
		kept = pick(t, c, &Request{})
	}
	for range 5 {
		c.hosts[address(2)].observe(status(500))
	}
	if !c.hosts[address(2)].Ejected() {
		t.Fatal("not ejected")
	}
	changed := *config
	changed.Balancing.Policy = mesh.LeastRequest
	s.set(&changed, equal(4))
	if again := b.Cluster(s.Snapshot, &changed); again != c {
		t.Fatal("a push made another state")
	}
	if h := c.hosts[address(1)]; h.Active() == 0 {
		t.Error("the push forgot a request in progress")
	}
	if !c.hosts[address(2)].Ejected() || spread(t, c, 1000, &Request{})[address(2)] != 0 {
		t.Error("the push returned an ejected host")
	}
	if spread(t, c, 1000, &Request{})[address(3)] == 0 {
		t.Error("the new host gets no requests")
	}
}

func TestARemovedHostFinishesItsRequests(t *testing.T) {
	config := clusterOf(mesh.RoundRobin)
	b, c, s := newTest(t, config, equal(2))
	var open []Choice
	for range 10 {
		open = append(open, pick(t, c, &Request{}))
	}
	s.set(config, equal(1))
	b.Cluster(s.Snapshot, config)
	if counts := spread(t, c, 100, &Request{}); counts[address(0)] != 100 {
		t.Errorf("%v", counts)
	}
	for _, choice := range open {
		choice.Lease.End(status(500))
	}
	if requests, _, _ := c.Active(); requests != 0 {
		t.Errorf("%d requests are left", requests)
	}
}

// A request with an older snapshot does not bring back what was replaced.
func TestAnOldSnapshotDoesNotBringBackTheOld(t *testing.T) {
	config := clusterOf(mesh.RoundRobin)
	s := &source{}
	s.set(config, equal(1))
	b := New(Config{Snapshot: func() *mesh.Snapshot { return s.Snapshot }})
	t.Cleanup(b.Close)
	old := s.Snapshot
	b.Cluster(old, config)
	s.set(config, equal(2))
	b.Cluster(s.Snapshot, config)
	if c := b.Cluster(old, config); len(c.Hosts()) != 2 {
		t.Errorf("%d hosts", len(c.Hosts()))
	}
	e := s.Edit()
	e.SetCluster(config.Name, nil)
	s.Snapshot, _ = e.Snapshot()
	if c := b.Cluster(old, config); len(c.Hosts()) != 2 { // removed: requests of the old snapshot go on
		t.Errorf("%d hosts", len(c.Hosts()))
	}
	other := clusterOf(mesh.RoundRobin, func(c *mesh.Cluster) { c.Name = "other" })
	s.set(other, equal(1))
	b.Cluster(s.Snapshot, other)
	if b.Known(config.Name) != nil || b.Known("other") == nil {
		t.Error("the removed cluster is kept")
	}
}

func TestOnlyUsedClustersHaveState(t *testing.T) {
	s := &source{}
	for i := range 1000 {
		s.set(clusterOf(mesh.RingHash, func(c *mesh.Cluster) { c.Name = address(i).String() }), equal(3))
	}
	b := New(Config{Snapshot: func() *mesh.Snapshot { return s.Snapshot }})
	t.Cleanup(b.Close)
	if n := len(b.Clusters()); n != 0 {
		t.Errorf("%d clusters before the first request", n)
	}
	config := s.Snapshot.Cluster(address(5).String())
	pick(t, b.Cluster(s.Snapshot, config), &Request{})
	if n := len(b.Clusters()); n != 1 {
		t.Errorf("%d clusters", n)
	}
}

func TestBreakers(t *testing.T) {
	limits := func(connections, pending, requests, retries uint32) func(*mesh.Cluster) {
		return func(c *mesh.Cluster) {
			c.Breakers = mesh.Breakers{Connections: connections, Pending: pending, Requests: requests, Retries: retries}
		}
	}
	for name, c := range map[string]struct {
		limits  func(*mesh.Cluster)
		request Request
		want    int
	}{
		"requests":                {limits(100, 100, 3, 100), Request{}, 3},
		"requests of HTTP/2":      {limits(1, 1, 3, 100), Request{Kind: HTTP2}, 3},
		"connections and pending": {limits(1, 2, 100, 100), Request{}, 3},
		"connections of TCP":      {limits(2, 100, 100, 100), Request{Kind: TCP}, 2},
		"requests that are none":  {limits(100, 100, 0, 100), Request{}, 0},
		"no limits":               {limits(1<<32-1, 1<<32-1, 1<<32-1, 1<<32-1), Request{}, 20},
	} {
		t.Run(name, func(t *testing.T) {
			_, cluster, _ := newTest(t, clusterOf(mesh.LeastRequest, c.limits), equal(2))
			for range 2 { // the second time, all places are free again
				var open []Choice
				for range 20 {
					choice, failure := cluster.Pick(&c.request)
					if failure == None {
						open = append(open, choice)
					} else if failure != Overflow {
						t.Fatalf("failure %d", failure)
					}
				}
				if len(open) != c.want {
					t.Errorf("%d at a time, want %d", len(open), c.want)
				}
				for _, choice := range open {
					choice.Lease.End(ok)
				}
			}
			requests, connections, retries := cluster.Active()
			if requests != 0 || connections != 0 || retries != 0 {
				t.Errorf("%d requests, %d connections, %d retries are left", requests, connections, retries)
			}
			if overflowed := cluster.Stats.Overflowed.Load(); overflowed != uint64(2*(20-c.want)) {
				t.Errorf("%d overflows", overflowed)
			}
			for _, h := range cluster.Hosts() {
				if h.Active() != 0 {
					t.Errorf("%v has %d requests", h.Address, h.Active())
				}
			}
		})
	}
}

// The places of requests that are sent again are limited, and given back.
func TestRetriesAreLimited(t *testing.T) {
	_, c, _ := newTest(t, clusterOf(mesh.LeastRequest, func(c *mesh.Cluster) { c.Breakers.Requests, c.Breakers.Retries = 100, 2 }), equal(2))
	var all [3]Retrier
	for i := range all {
		choice := pick(t, c, &Request{})
		choice.Lease.End(ok) // the place is the request's
		all[i] = choice.Lease.(Retrier)
	}
	if !all[0].Retry() || !all[1].Retry() || all[2].Retry() {
		t.Error("another number than 2 is sent again")
	}
	if n := c.Stats.RetriesOverflowed.Load(); n != 1 {
		t.Errorf("%d overflows", n)
	}
	if all[0].EndRetry(); !all[2].Retry() {
		t.Error("a free place is not given")
	}
	all[1].EndRetry()
	all[2].EndRetry()
	if _, _, retries := c.Active(); retries != 0 {
		t.Errorf("%d retries are left", retries)
	}
}

// A budget allows retries in proportion to the requests in progress, and some in any case.
func TestABudgetOfRetries(t *testing.T) {
	for inProgress, want := range map[int]int{1: 3, 10: 3, 40: 8} {
		_, c, _ := newTest(t, clusterOf(mesh.LeastRequest, func(c *mesh.Cluster) {
			c.Breakers.Retries, c.Breakers.RetryBudget = 0, &mesh.RetryBudget{Percent: 20, AtLeast: 3}
		}), equal(2))
		var last Retrier
		for range inProgress {
			last = pick(t, c, &Request{}).Lease.(Retrier)
		}
		retries := 0
		for last.Retry() {
			retries++
		}
		if retries != want {
			t.Errorf("%d requests: %d retries at a time, want %d", inProgress, retries, want)
		}
	}
}

func TestOriginalDestination(t *testing.T) {
	_, c, _ := newTest(t, clusterOf(mesh.ClusterProvided, func(c *mesh.Cluster) { c.Discovery = mesh.OriginalDestination }), nil)
	to := netip.MustParseAddrPort("203.0.113.7:443")
	choice := pick(t, c, &Request{Kind: TCP, Original: to})
	if choice.Address != to || choice.Endpoint != nil {
		t.Errorf("%+v", choice)
	}
	choice.Lease.End(ok)
	if _, connections, _ := c.Active(); connections != 0 {
		t.Errorf("%d connections are left", connections)
	}
}

// A cluster of the original destination has one host, whatever is configured for the choice among several. Istiod gives weights of
// localities to all clusters of a mesh that has them.
func TestOriginalDestinationNeedsNoChoice(t *testing.T) {
	to := netip.MustParseAddrPort("203.0.113.7:443")
	for _, policy := range []mesh.Policy{mesh.RoundRobin, mesh.LeastRequest, mesh.Random, mesh.RingHash, mesh.Maglev, mesh.ClusterProvided} {
		for _, weighted := range []bool{false, true} {
			_, c, _ := newTest(t, clusterOf(policy, func(c *mesh.Cluster) {
				c.Discovery, c.Balancing.LocalityWeighted = mesh.OriginalDestination, weighted
			}), nil)
			choice, failure := c.Pick(&Request{Original: to, Hash: 1, Hashed: true})
			if failure != None || choice.Address != to {
				t.Errorf("policy %d, weighted %v: %v, failure %d", policy, weighted, choice.Address, failure)
				continue
			}
			choice.Lease.End(ok)
		}
	}
}

// Picks go on while hosts come and go and are ejected. Run with -race. Nothing is left at the end, and a host that is not
// configured any more is not chosen.
func TestPicksDuringPushes(t *testing.T) {
	for _, policy := range []mesh.Policy{mesh.RoundRobin, mesh.LeastRequest, mesh.Random, mesh.RingHash, mesh.Maglev} {
		config := clusterOf(policy, func(c *mesh.Cluster) {
			c.Outliers, c.Balancing.Table = outliers(), 257
			c.Outliers.MaxPercent, c.Outliers.Interval, c.Outliers.Ejection = 50, 1, 1
		})
		b, c, s := newTest(t, config, equal(5))
		stop := make(chan struct{})
		var running sync.WaitGroup
		for range 4 {
			running.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
					}
					choice, failure := c.Pick(&Request{Hash: rand.Uint64(), Hashed: true})
					if failure != None {
						t.Errorf("policy %d: failure %d", policy, failure)
						return
					}
					choice.Lease.End(status(200 + 300*rand.IntN(2)))
				}
			})
		}
		for i := range 200 {
			s.set(config, equal(5+i%3))
			b.Cluster(s.Snapshot, config)
		}
		close(stop)
		running.Wait()
		last := *config
		last.Outliers = nil // both that are left may be ejected
		s.set(&last, equal(2))
		b.Cluster(s.Snapshot, &last)
		for host := range spread(t, c, 500, &Request{}) {
			if host != address(0) && host != address(1) {
				t.Errorf("policy %d: %v was removed", policy, host)
			}
		}
		if requests, _, _ := c.Active(); requests != 0 {
			t.Errorf("policy %d: %d requests are left", policy, requests)
		}
	}
}

// Requests of HTTP/2 that wait for a stream are counted for the cluster.
func TestALimitedNumberOfRequestsWaits(t *testing.T) {
	_, cluster, _ := newTest(t, clusterOf(mesh.LeastRequest, func(c *mesh.Cluster) { c.Breakers = mesh.Breakers{Pending: 2, Requests: 100, Retries: 100} }), equal(2))
	var queues []Queue
	for range 3 {
		queues = append(queues, pick(t, cluster, &Request{Kind: HTTP2}).Lease.(Queue))
	}
	if !queues[0].Wait() || !queues[1].Wait() || queues[2].Wait() || cluster.Stats.Overflowed.Load() != 1 {
		t.Errorf("another number than 2 waits, %d overflows", cluster.Stats.Overflowed.Load())
	}
	queues[0].Go()
	if !queues[2].Wait() {
		t.Error("a free place is not given")
	}
}
