package hostility

import (
	"fmt"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// TestHostility lets each attack work against one agent, one after the other, while another client sends requests.
func TestHostility(t *testing.T) {
	w := newWorld(t, false)
	for i := range attacks {
		a := &attacks[i]
		t.Run(a.name, func(t *testing.T) {
			before := []*client{w.newClient(t, false), w.newClient(t, true)}
			for _, c := range before {
				if err := c.ask(); err != nil {
					t.Fatalf("before the attack: %v", err)
				}
			}
			attacker := w.start(t, w.peer, "attack", a.name, "1s", strconv.Itoa(shortForm), "0")
			attacker.await(t, "ready")
			for range 3 {
				fresh := []*client{w.newClient(t, false), w.newClient(t, true)}
				for j, c := range append(fresh, before...) {
					if err := c.ask(); err != nil {
						w.checkAlive(t)
						t.Errorf("client %d is not served: %v", j, err)
					}
				}
				for _, c := range fresh {
					c.transport.CloseIdleConnections()
				}
			}
			attacker.end()
			w.checkAlive(t)
			t.Logf("resident memory %d KiB, of the cgroup %d KiB, held %.0f KiB, %.0f evictions", w.peakResident(t)>>10, w.cgroup.peak()>>10,
				w.gauge(t, "pillion_held_bytes")/1024, w.gauge(t, "pillion_held_evictions_total"))
			w.cgroup.reset()
			nettest.Eventually(t, "all memory is given back", func() bool { return w.gauge(t, "pillion_held_bytes") == 0 })
		})
	}
	if peak := w.peakResident(t); peak > memoryLimit {
		t.Errorf("the agent used %d KiB", peak>>10)
	}
}

// BenchmarkHostility prints, for each attack against an agent of its own, what the agent needed and how another client
// fared: make hostility.
func BenchmarkHostility(b *testing.B) {
	const calm, storm = 5 * time.Second, 10 * time.Second
	if runtime.NumCPU() > 1 {
		pinSelf(b)
	}
	fmt.Printf("%-40s %10s %10s %10s %12s %12s %7s %7s\n", "attack", "resident", "cgroup", "evictions", "p99 before", "p99 during", "ratio", "failed")
	for i := range attacks {
		a := &attacks[i]
		b.Run(a.name, func(b *testing.B) {
			w := newWorld(b, true)
			before, failed := w.measure(b, calm)
			attacker := w.start(b, w.peer, "attack", a.name, "100ms", strconv.Itoa(a.connections), "19")
			attacker.await(b, "ready")
			during, lost := w.measure(b, storm)
			w.checkAlive(b)
			fmt.Printf("%-40s %6d KiB %6d KiB %10.0f %12v %12v %7.2f %7d\n", a.name, w.peakResident(b)>>10, w.cgroup.peak()>>10,
				w.gauge(b, "pillion_held_evictions_total"), before, during, float64(during)/float64(before), failed+lost)
			attacker.end()
			if failed+lost > 0 {
				b.Errorf("%s: %d requests of another client failed", a.name, failed+lost)
			}
			if during > 2*before {
				b.Errorf("%s: the 99th percentile of another client's latencies is %v, %v without the attack", a.name, during, before)
			}
		})
	}
}

// measure sends requests for some time, and returns the 99th percentile of their latencies and how many failed.
func (w *world) measure(t testing.TB, lasts time.Duration) (p99 time.Duration, failed int) {
	const clients, pause = 4, 10 * time.Millisecond
	var mu sync.Mutex
	var latencies []time.Duration
	var all sync.WaitGroup
	end := time.Now().Add(lasts)
	for i := range clients {
		c := w.newClient(t, i%2 == 1)
		all.Go(func() {
			for next := time.NewTicker(pause); time.Now().Before(end); <-next.C {
				began := time.Now()
				err := c.ask()
				took := time.Since(began)
				mu.Lock()
				latencies = append(latencies, took)
				if err != nil {
					failed++
				}
				mu.Unlock()
			}
		})
	}
	all.Wait()
	slices.Sort(latencies)
	return latencies[len(latencies)*99/100], failed
}
