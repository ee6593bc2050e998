package hostility

import (
	"cmp"
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
	worlds := map[kind]*world{}
	for i := range attacks {
		a := &attacks[i]
		w := worlds[a.of]
		if w == nil {
			w = newWorld(t, false, a.of)
			worlds[a.of] = w
		}
		// Go's server ends a new connection of HTTP/2 if it reads no settings for 2 s, as while 10,000 handlers begin.
		second := secondAddress
		if a.of == gateway {
			second = originAddress // its server has no such attack
		}
		t.Run(a.name, func(t *testing.T) {
			before := []*client{w.newClient(t, originAddress, false), w.newClient(t, originAddress, true)}
			for _, c := range before {
				if err := c.ask(); err != nil {
					t.Fatalf("before the attack: %v", err)
				}
			}
			attacker := w.start(t, w.peer, nil, "attack", a.name, "3s", strconv.Itoa(cmp.Or(shorter[a.name], shortForm)))
			attacker.await(t, "ready")
			for range 3 {
				fresh := []*client{w.newClient(t, originAddress, false), w.newClient(t, second, true)}
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

// Each attack is measured in pairs of a calm time and an attack: two, and a third one if they do not agree on the verdict. A pair in
// which other processes had a larger share of the agent's core than disturbed is repeated, up to repeats times.
const (
	mostDelay = 2 // the largest ratio
	pairs     = 3
	disturbed = 0.05
	repeats   = 3
)

// BenchmarkHostility prints, for each attack against an agent of its own, what the agent needed and how another client
// fared: make hostility. The latencies are medians over the pairs of 99th percentiles (of two, the larger); "past it" are the same
// client's without the agent between, see attack.past. The ratio is the median of those of the pairs, which stand behind it. "others"
// is the part of the time for which other processes had the agent's core.
func BenchmarkHostility(b *testing.B) {
	if runtime.NumCPU() > 1 {
		pinSelf(b)
	}
	fmt.Printf("%-38s %9s %9s %9s | %-21s | %-21s | %-25s | %6s %6s\n", "", "resident", "cgroup", "", "p99 without attack", "p99 during the attack",
		"ratio", "", "")
	fmt.Printf("%-38s %9s %9s %9s | %10s %10s | %10s %10s | %6s %-18s | %6s %6s\n", "attack", "KiB", "KiB", "evictions",
		"agent", "past it", "agent", "past it", "median", "of the pairs", "failed", "others")
	for i := range attacks {
		a := &attacks[i]
		b.Run(a.name, func(b *testing.B) {
			w := newWorld(b, true, a.of)
			m := w.measurePairs(b, a)
			ratio := median(m.ratios)
			fmt.Printf("%-38s %9d %9d %9.0f | %10v %10v | %10v %10v | %6.2f %-18s | %6d %5.0f%%\n", a.name, w.peakResident(b)>>10, w.cgroup.Peak()>>10,
				w.gauge(b, "pillion_held_evictions_total"), median(m.calm.agent), median(m.calm.past), median(m.storm.agent), median(m.storm.past),
				ratio, fmt.Sprintf("%.2f", m.ratios), m.failed, 100*m.others/float64(len(m.ratios)))
			if m.failed > 0 {
				b.Errorf("%s: %d requests of another client failed", a.name, m.failed)
			}
			if ratio > mostDelay {
				b.Errorf("%s: the 99th percentile of another client's latencies is %v, %v without the attack", a.name,
					median(m.storm.agent), median(m.calm.agent))
			}
		})
	}
}

// measurement has values of each pair that counts.
type measurement struct {
	calm, storm struct{ agent, past []time.Duration }
	ratios      []float64
	others      float64 // sum of the shares of the agent's core that others had
	failed      int     // requests, in all pairs
}

func (w *world) measurePairs(b *testing.B, a *attack) (m measurement) {
	for attempt := 0; len(m.ratios) < pairs && !m.agree(); attempt++ {
		before, during, others := w.measurePair(b, a)
		m.failed += before.failed + during.failed
		if others > disturbed && attempt < repeats {
			continue
		}
		m.calm.agent, m.calm.past = append(m.calm.agent, before.agent), append(m.calm.past, before.past)
		m.storm.agent, m.storm.past = append(m.storm.agent, during.agent), append(m.storm.past, during.past)
		m.ratios = append(m.ratios, during.relativeTo(before))
		m.others += others
	}
	return m
}

// agree reports whether a third pair could not change the verdict.
func (m *measurement) agree() bool {
	return len(m.ratios) == pairs-1 && m.ratios[0] > mostDelay == (m.ratios[1] > mostDelay)
}

// measurePair also returns the share of the agent's core that other processes had.
func (w *world) measurePair(b *testing.B, a *attack) (before, during latencies, others float64) {
	const calm, storm = 2 * time.Second, 8 * time.Second
	began := w.othersOnCore(b)
	before = w.measure(b, a.past, calm)
	inCalm := w.othersOnCore(b) - began
	attacker := w.start(b, w.peer, lowest, "attack", a.name, "100ms", strconv.Itoa(a.connections))
	attacker.await(b, "ready")
	began = w.othersOnCore(b)
	during = w.measure(b, a.past, storm)
	inStorm := w.othersOnCore(b) - began
	w.checkAlive(b)
	attacker.end()
	nettest.Eventually(b, "all memory is given back", func() bool { return w.gauge(b, "pillion_held_bytes") == 0 })
	return before, during, max(inCalm, 0).Seconds()/calm.Seconds() + max(inStorm, 0).Seconds()/storm.Seconds()
}

// median returns the larger of two in the middle.
func median[T cmp.Ordered](values []T) T { return slices.Sorted(slices.Values(values))[len(values)/2] }

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
	const clients, pause = 4, 5 * time.Millisecond
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
		c.transport.CloseIdleConnections()
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
