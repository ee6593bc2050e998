package balance

import (
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
)

// outliers are Istio's defaults, but all hosts may be ejected.
func outliers() *mesh.Outliers {
	return &mesh.Outliers{
		Consecutive5xx: 5, Interval: 10 * time.Second, Ejection: 30 * time.Second, MaxEjection: 300 * time.Second, MaxPercent: 100,
	}
}

// fail ends n requests at a host with an outcome.
func fail(t *testing.T, c *Cluster, to netip.AddrPort, n int, o Outcome) {
	t.Helper()
	for n > 0 {
		choice := pick(t, c, &Request{})
		if choice.Address == to {
			choice.Lease.End(o)
			n--
		} else {
			choice.Lease.End(Outcome{GRPC: -1, Reason: flow.DownstreamLeft})
		}
	}
}

func TestAHostIsEjectedAndReturns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, c, _ := newTest(t, clusterOf(mesh.RoundRobin, func(c *mesh.Cluster) { c.Outliers = outliers() }), equal(3))
		bad := c.hosts[address(1)]
		for round, want := range []time.Duration{30, 60, 90, 120} { // each ejection is longer than the last
			fail(t, c, address(1), 4, status(503))
			if bad.Ejected() {
				t.Fatal("ejected too early")
			}
			fail(t, c, address(1), 1, status(500))
			if !bad.Ejected() || spread(t, c, 300, &Request{})[address(1)] != 0 {
				t.Fatal("not ejected")
			}
			since := time.Now()
			for bad.Ejected() {
				time.Sleep(time.Second)
				synctest.Wait()
			}
			if got := time.Since(since); got < want*time.Second || got > want*time.Second+11*time.Second {
				t.Errorf("round %d: back after %v, want %v", round, got, want*time.Second)
			}
			if spread(t, c, 300, &Request{})[address(1)] != 100 {
				t.Error("the host that is back gets no requests")
			}
		}
		time.Sleep(2 * time.Minute) // each interval without an ejection makes the next one shorter
		synctest.Wait()
		if bad.outlier.backoff != 0 || c.sweep != nil {
			t.Errorf("the back-off is %d, and the timer is %v", bad.outlier.backoff, c.sweep)
		}
	})
}

func TestWhatEjects(t *testing.T) {
	timeout := Outcome{GRPC: -1, Reason: flow.RequestTimeout, Connected: true}
	broken := Outcome{GRPC: -1, Reason: flow.UpstreamReset, Connected: true}
	left := Outcome{GRPC: -1, Reason: flow.DownstreamLeft, Connected: true}
	unavailable := Outcome{Status: 200, GRPC: 14, Connected: true}
	notFound := Outcome{Status: 200, GRPC: 5, Connected: true}
	gatewayOnly := func(o *mesh.Outliers) { o.Consecutive5xx, o.ConsecutiveGateway = 0, 5 }
	split := func(o *mesh.Outliers) { o.SplitLocal, o.ConsecutiveLocal = true, 5 }
	splitOff := func(o *mesh.Outliers) { o.SplitLocal = true }
	never := func(o *mesh.Outliers) { o.Consecutive5xx = 0 }
	for name, c := range map[string]struct {
		change   func(*mesh.Outliers)
		outcomes []Outcome // repeated
		want     bool
	}{
		"500":                           {nil, []Outcome{status(500)}, true},
		"499":                           {nil, []Outcome{status(499)}, false},
		"500 between 200":               {nil, []Outcome{status(500), ok}, false},
		"refused":                       {nil, []Outcome{refused}, true},
		"timeout":                       {nil, []Outcome{timeout}, true},
		"broken":                        {nil, []Outcome{broken}, true},
		"downstream left":               {nil, []Outcome{left}, false},
		"downstream left between 500":   {nil, []Outcome{status(500), left}, true},
		"gRPC unavailable":              {nil, []Outcome{unavailable}, true},
		"gRPC not found":                {nil, []Outcome{notFound}, false},
		"gateway: 503":                  {gatewayOnly, []Outcome{status(503)}, true},
		"gateway: 500":                  {gatewayOnly, []Outcome{status(500)}, false},
		"gateway: 503 between 500":      {gatewayOnly, []Outcome{status(503), status(500)}, false},
		"gateway: refused":              {gatewayOnly, []Outcome{refused}, true},
		"split: refused":                {split, []Outcome{refused}, true},
		"split: refused between 500":    {split, []Outcome{refused, status(500), ok}, false},
		"split: 500":                    {split, []Outcome{status(500)}, true},
		"split, not counted: refused":   {splitOff, []Outcome{refused}, false},
		"never: 500":                    {never, []Outcome{status(500)}, false},
		"500 between timeout and reset": {nil, []Outcome{timeout, status(500), broken}, true},
	} {
		t.Run(name, func(t *testing.T) {
			config := outliers()
			if c.change != nil {
				c.change(config)
			}
			_, cluster, _ := newTest(t, clusterOf(mesh.RoundRobin, func(m *mesh.Cluster) { m.Outliers = config }), equal(2))
			h := cluster.hosts[address(0)]
			for i := range 12 {
				h.observe(c.outcomes[i%len(c.outcomes)])
			}
			if h.Ejected() != c.want {
				t.Errorf("ejected: %v", h.Ejected())
			}
		})
	}
}

// As in Envoy since 1.28, not even one host is ejected if that is more than the share that may be.
func TestNoMoreHostsAreEjectedThanMayBe(t *testing.T) {
	for percent, want := range map[uint32]int{0: 0, 9: 0, 10: 1, 34: 3, 100: 10, 200: 10} {
		config := outliers()
		config.MaxPercent = percent
		_, c, _ := newTest(t, clusterOf(mesh.RoundRobin, func(m *mesh.Cluster) { m.Outliers = config }), equal(10))
		ejected := 0
		for _, h := range c.hosts {
			for range 5 {
				h.observe(status(500))
			}
			if h.Ejected() {
				ejected++
			}
		}
		if ejected != want || c.Stats.EjectionsPrevented.Load() != uint64(10-want) {
			t.Errorf("%d %%: %d ejected, want %d; %d prevented", percent, ejected, want, c.Stats.EjectionsPrevented.Load())
		}
	}
}

func TestEjectedHostsFailOver(t *testing.T) {
	up := mesh.Healthy
	_, c, _ := newTest(t, clusterOf(mesh.LeastRequest, func(c *mesh.Cluster) { c.Outliers = outliers() }), assignment([]mesh.Health{up}, []mesh.Health{up}))
	fail(t, c, address(0), 5, refused)
	if counts := spread(t, c, 100, &Request{}); counts[address(1)] != 100 {
		t.Errorf("%v", counts)
	}
}

func TestWithoutOutlierDetectionAllReturn(t *testing.T) {
	config := clusterOf(mesh.RoundRobin, func(c *mesh.Cluster) { c.Outliers = outliers() })
	b, c, s := newTest(t, config, equal(2))
	fail(t, c, address(0), 5, refused)
	off := *config
	off.Outliers = nil
	s.set(&off, equal(2))
	b.Cluster(s.Snapshot, &off)
	if counts := spread(t, c, 100, &Request{}); counts[address(0)] != 50 {
		t.Errorf("%v", counts)
	}
}

func TestSlowStart(t *testing.T) {
	const n = 20000
	for _, policy := range []mesh.Policy{mesh.RoundRobin, mesh.LeastRequest} {
		synctest.Test(t, func(t *testing.T) {
			config := clusterOf(policy, func(c *mesh.Cluster) { c.Balancing.SlowStart = 100 * time.Second })
			b, c, s := newTest(t, config, equal(1))
			time.Sleep(time.Second)
			s.set(config, equal(2))
			b.Cluster(s.Snapshot, config)
			for _, weight := range []float64{0.1, 0.1, 0.1, 0.15, 0.2} { // after 0, 5, 10 … s
				got := spread(t, c, n, &Request{})[address(1)]
				within(t, "new host", got, n, weight/(1+weight))
				time.Sleep(5*time.Second + time.Millisecond)
			}
			time.Sleep(100 * time.Second)
			within(t, "host that is not new any more", spread(t, c, n, &Request{})[address(1)], n, 0.5)
			if c.view.Load().renew != 0 {
				t.Error("the view is still compiled again and again")
			}
		})
	}
}
