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
	worlds := map[bool]*world{}
	for i := range attacks {
		a := &attacks[i]
		w := worlds[a.mesh]
		if w == nil {
			w = newWorld(t, false, a.mesh)
			worlds[a.mesh] = w
		}
		t.Run(a.name, func(t *testing.T) {
			before := []*client{w.newClient(t, originAddress, false), w.newClient(t, originAddress, true)}
			for _, c := range before {
				if err := c.ask(); err != nil {
					t.Fatalf("before the attack: %v", err)
				}
			}
			attacker := w.start(t, w.peer, nil, "attack", a.name, "1s", strconv.Itoa(shortForm))
			attacker.await(t, "ready")
			for range 3 {
				fresh := []*client{w.newClient(t, originAddress, false), w.newClient(t, originAddress, true)}
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
			t.Logf("resident memory %d KiB, of the cgroup %d KiB, held %.0f KiB, %.0f evictions", w.peakResident(t)>>10, w.cgroup.Peak()>>10,
				w.gauge(t, "pillion_held_bytes")/1024, w.gauge(t, "pillion_held_evictions_total"))
			w.cgroup.Reset()
			nettest.Eventually(t, "all memory is given back", func() bool { return w.gauge(t, "pillion_held_bytes") == 0 })
		})
	}
	for _, w := range worlds {
		if peak := w.peakResident(t); peak > memoryLimit {
			t.Errorf("the agent used %d KiB", peak>>10)
		}
	}
}

// BenchmarkHostility prints, for each attack against an agent of its own, what the agent needed and how another client
// fared: make hostility. "past it" are the same client's latencies without the agent between; see attack.past. "no core" is the
// part of the attack's time for which a thread of the agent was ready to run and had no core: see the package comment.
func BenchmarkHostility(b *testing.B) {
	const calm, storm = 5 * time.Second, 10 * time.Second
	if runtime.NumCPU() > 1 {
		pinSelf(b)
	}
	fmt.Printf("%-38s %9s %9s %9s | %-21s | %-21s | %6s %6s %6s\n", "", "resident", "cgroup", "", "p99 before", "p99 during the attack", "", "", "no")
	fmt.Printf("%-38s %9s %9s %9s | %10s %10s | %10s %10s | %6s %6s %6s\n", "attack", "KiB", "KiB", "evictions",
		"agent", "past it", "agent", "past it", "ratio", "failed", "core")
	for i := range attacks {
		a := &attacks[i]
		b.Run(a.name, func(b *testing.B) {
			w := newWorld(b, true, a.mesh)
			before := w.measure(b, a.past, calm)
			attacker := w.start(b, w.peer, lowest, "attack", a.name, "100ms", strconv.Itoa(a.connections))
			attacker.await(b, "ready")
			waited := w.waitedForCore(b)
			during := w.measure(b, a.past, storm)
			waited = w.waitedForCore(b) - waited
			w.checkAlive(b)
			ratio, failed := during.relativeTo(before), before.failed+during.failed
			fmt.Printf("%-38s %9d %9d %9.0f | %10v %10v | %10v %10v | %6.2f %6d %5.0f%%\n", a.name, w.peakResident(b)>>10, w.cgroup.Peak()>>10,
				w.gauge(b, "pillion_held_evictions_total"), before.agent, before.past, during.agent, during.past, ratio, failed,
				100*waited.Seconds()/storm.Seconds())
			attacker.end()
			if failed > 0 {
				b.Errorf("%s: %d requests of another client failed", a.name, failed)
			}
			if ratio > 2 {
				b.Errorf("%s: the 99th percentile of another client's latencies is %v, %v without the attack", a.name, during.agent, before.agent)
			}
		})
	}
}

// latencies are 99th percentiles of the other client's latencies, through the agent and past it, and the number of its
// requests that failed.
type latencies struct {
	agent, past time.Duration
	failed      int
}

// relativeTo returns by which factor the agent has delayed the client. The delay on the way past the agent is not the
// agent's: the attackers, the client and the servers share a core, and the origin serves the attackers' valid requests.
func (l latencies) relativeTo(before latencies) float64 {
	return float64(l.agent) / float64(before.agent+max(l.past-before.past, 0))
}

// measure sends requests for some time, to the origin through the agent, and to the server at address past it.
func (w *world) measure(t testing.TB, address string, lasts time.Duration) (l latencies) {
	const clients, pause = 4, 10 * time.Millisecond
	var mu sync.Mutex
	var agent, past []time.Duration
	var all sync.WaitGroup
	end := time.Now().Add(lasts)
	ask := func(c *client, taken *[]time.Duration) {
		for next := time.NewTicker(pause); time.Now().Before(end); <-next.C {
			began := time.Now()
			err := c.ask()
			took := time.Since(began)
			mu.Lock()
			*taken = append(*taken, took)
			if err != nil {
				l.failed++
			}
			mu.Unlock()
		}
	}
	for i := range clients {
		c, other := w.newClient(t, originAddress, i%2 == 1), w.newClient(t, address, i%2 == 1)
		all.Go(func() { ask(c, &agent) })
		all.Go(func() { ask(other, &past) })
	}
	all.Wait()
	l.agent, l.past = p99(agent), p99(past)
	return l
}

func p99(all []time.Duration) time.Duration {
	slices.Sort(all)
	return all[len(all)*99/100].Round(time.Microsecond)
}
