package balance

import (
	"context"
	"errors"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

// resolver answers lookups.
type resolver struct {
	mu      sync.Mutex
	answers map[string][]netip.Addr
	ttl     time.Duration
	delay   time.Duration
	lookups int
}

func (r *resolver) lookup(ctx context.Context, name string, _ mesh.DNSFamily) ([]netip.Addr, time.Duration, error) {
	r.mu.Lock()
	addresses, found := r.answers[name]
	r.lookups++
	delay, ttl := r.delay, r.ttl
	r.mu.Unlock()
	answered := time.NewTimer(delay)
	defer answered.Stop()
	select {
	case <-answered.C:
	case <-ctx.Done():
		return nil, 0, ctx.Err()
	}
	if !found {
		return nil, 0, errors.New("no answer")
	}
	return addresses, ttl, nil
}

func (r *resolver) set(name string, last ...byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.answers[name] = nil
	for _, b := range last {
		r.answers[name] = append(r.answers[name], netip.AddrFrom4([4]byte{203, 0, 113, b}))
	}
}

func (r *resolver) forget(name string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.answers, name)
}

func named(names ...string) *mesh.Assignment {
	var l mesh.Locality
	for _, name := range names {
		l.Endpoints = append(l.Endpoints, mesh.Endpoint{Host: name, Port: 443, Weight: 1})
	}
	return &mesh.Assignment{Localities: []mesh.Locality{l}}
}

// newNamed makes a cluster whose hosts are names.
func newNamed(t *testing.T, r *resolver, discovery mesh.Discovery, names ...string) (*Balancer, *Cluster, *mesh.Cluster) {
	config := clusterOf(mesh.RoundRobin, func(c *mesh.Cluster) {
		c.Discovery, c.Hosts, c.DNS = discovery, named(names...), mesh.DNS{Refresh: time.Minute, RespectTTL: true}
	})
	b := New(Config{Lookup: r.lookup})
	return b, b.Cluster(&mesh.Snapshot{}, config), config
}

// hosts returns the last bytes of the addresses that get requests.
func hosts(t *testing.T, c *Cluster) (all []byte) {
	t.Helper()
	for host := range spread(t, c, 50, &Request{}) {
		all = append(all, host.Addr().As4()[3])
	}
	slices.Sort(all)
	return all
}

func TestNamesAreLookedUpOnFirstUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &resolver{answers: map[string][]netip.Addr{}, delay: time.Second}
		r.set("a.example", 1, 2)
		r.set("b.example", 3)
		b, c, _ := newNamed(t, r, mesh.StrictDNS, "a.example", "b.example")
		defer b.Close()
		if synctest.Wait(); r.lookups != 0 {
			t.Error("looked up before the first use")
		}
		if _, failure := c.Pick(&Request{}); failure != Resolving {
			t.Fatalf("failure %d", failure)
		}
		<-c.Resolved()
		if got := hosts(t, c); string(got) != "\x01\x02\x03" {
			t.Errorf("hosts %v", got)
		}
		r.set("b.example", 4)
		time.Sleep(63 * time.Second)
		if got := hosts(t, c); string(got) != "\x01\x02\x04" {
			t.Errorf("after a refresh: hosts %v", got)
		}
		r.forget("a.example") // a lookup that fails keeps what is known
		time.Sleep(63 * time.Second)
		if got := hosts(t, c); string(got) != "\x01\x02\x04" {
			t.Errorf("after a failure: hosts %v", got)
		}
		r.set("a.example")
		time.Sleep(63 * time.Second)
		if got := hosts(t, c); string(got) != "\x04" {
			t.Errorf("after an empty answer: hosts %v", got)
		}
	})
}

func TestTTLsAreRespected(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &resolver{answers: map[string][]netip.Addr{}, ttl: 2 * time.Second}
		r.set("a.example", 1)
		b, c, _ := newNamed(t, r, mesh.StrictDNS, "a.example")
		defer b.Close()
		<-c.Resolved()
		r.set("a.example", 2)
		time.Sleep(3 * time.Second)
		synctest.Wait()
		if got := hosts(t, c); string(got) != "\x02" {
			t.Errorf("hosts %v", got)
		}
	})
}

func TestAnUnusedNameIsNotLookedUpForever(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &resolver{answers: map[string][]netip.Addr{}}
		r.set("a.example", 1)
		b, c, _ := newNamed(t, r, mesh.StrictDNS, "a.example")
		defer b.Close()
		<-c.Resolved()
		time.Sleep(time.Hour)
		if synctest.Wait(); r.lookups > 8 {
			t.Errorf("%d lookups in an hour without use", r.lookups)
		}
		r.set("a.example", 2)
		if _, failure := c.Pick(&Request{}); failure != Resolving {
			t.Errorf("failure %d: an old answer is used", failure)
		}
		<-c.Resolved()
		if got := hosts(t, c); string(got) != "\x02" {
			t.Errorf("hosts %v", got)
		}
	})
}

func TestALookupThatFailsIsMadeAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &resolver{answers: map[string][]netip.Addr{}, delay: time.Minute}
		r.set("a.example", 1)
		b, c, _ := newNamed(t, r, mesh.StrictDNS, "a.example")
		defer b.Close()
		began := time.Now()
		<-c.Resolved()
		if d := time.Since(began); d > 6*time.Second {
			t.Errorf("the first request waited %v", d)
		}
		if _, failure := c.Pick(&Request{}); failure != NoHost {
			t.Errorf("failure %d", failure)
		}
		r.mu.Lock()
		r.delay = 0
		r.mu.Unlock()
		time.Sleep(6 * time.Second)
		synctest.Wait()
		if got := hosts(t, c); string(got) != "\x01" {
			t.Errorf("hosts %v", got)
		}
	})
}

func TestLogicalDNSHasOneHost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &resolver{answers: map[string][]netip.Addr{}}
		r.set("a.example", 3, 1, 2)
		b, c, _ := newNamed(t, r, mesh.LogicalDNS, "a.example")
		defer b.Close()
		<-c.Resolved()
		if got := hosts(t, c); string(got) != "\x03" {
			t.Errorf("hosts %v", got)
		}
	})
}

func TestAPushKeepsWhatIsKnown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &resolver{answers: map[string][]netip.Addr{}}
		r.set("a.example", 1)
		r.set("b.example", 2)
		b, c, config := newNamed(t, r, mesh.StrictDNS, "a.example")
		defer b.Close()
		<-c.Resolved()
		same, more := *config, *config
		same.Hosts, more.Hosts = named("a.example"), named("a.example", "b.example")
		b.Cluster(&mesh.Snapshot{}, &same)
		if got := hosts(t, c); string(got) != "\x01" { // without a lookup
			t.Errorf("hosts %v", got)
		}
		b.Cluster(&mesh.Snapshot{}, &more)
		<-c.Resolved()
		if got := hosts(t, c); string(got) != "\x01\x02" {
			t.Errorf("hosts %v", got)
		}
	})
}

// A request that comes while the names become known is sent, or waits.
func TestAPickMeetsNoClusterWithoutItsHosts(t *testing.T) {
	const clusters, picking = 500, 4
	r := &resolver{answers: map[string][]netip.Addr{}, ttl: time.Hour}
	r.set("a.example", 1)
	for range clusters {
		b, c, _ := newNamed(t, r, mesh.StrictDNS, "a.example")
		var failures [picking]Failure
		var all sync.WaitGroup
		for i := range picking {
			all.Go(func() {
				for failures[i] = Resolving; failures[i] == Resolving; runtime.Gosched() {
					var choice Choice
					if choice, failures[i] = c.Pick(&Request{}); choice.Lease != nil {
						choice.Lease.End(Outcome{GRPC: -1})
					}
				}
			})
		}
		all.Wait()
		b.Close()
		if failures != [picking]Failure{} {
			t.Fatalf("picks failed: %v", failures)
		}
	}
}
