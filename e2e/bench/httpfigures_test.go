package bench

import (
	"fmt"
	"testing"
	"time"
)

// streamsEach is the number of concurrent requests on each HTTP/2 connection.
const streamsEach = 16

func measureHTTP1(t testing.TB, k *kit, s sizes) (rows []*row) {
	for _, connections := range []int{32, 256} {
		r := &row{title: fmt.Sprintf("CPU per HTTP/1.1 request, %d connections", connections), unit: "µs",
			promises: []promise{{0.9, nameHAProxy}, {0.5, nameReverseProxy}}}
		what := fmt.Sprintf("http1, %d connections", connections)
		turns{what, k.http1, s.rounds}.take(t, k, []*row{r}, func(t testing.TB, c contender, w *world, p *proxy) {
			cpu := cpuOf(t, p, w.startLoad(t, "http1", s.requests, connections))
			r.add(c.name, microseconds(cpu)/float64(s.requests))
		})
		rows = append(rows, r)
	}
	return rows
}

// measureTelemetry compares the agent with one that neither logs nor counts.
func measureTelemetry(t testing.TB, k *kit, s sizes) []*row {
	const most = 0.08 // maximum share of telemetry in the cost of a request
	r := &row{title: "CPU per HTTP/1.1 request, telemetry", unit: "µs", promises: []promise{{1 / (1 - most), nameSilent}}}
	turns{"telemetry", k.telemetry, s.connectionRounds}.take(t, k, []*row{r}, func(t testing.TB, c contender, w *world, p *proxy) {
		cpu := cpuOf(t, p, w.startLoad(t, "http1", s.requests, 32))
		r.add(c.name, microseconds(cpu)/float64(s.requests))
	})
	return []*row{r}
}

func measureHTTP2(t testing.TB, k *kit, s sizes) []*row {
	const connections = 8
	r := &row{title: fmt.Sprintf("CPU per HTTP/2 request, %d × %d streams", connections, streamsEach), unit: "µs",
		promises: []promise{{0.95, nameHAProxy}, {0.4, nameReverseProxy}}}
	turns{"http2", k.http, s.rounds}.take(t, k, []*row{r}, func(t testing.TB, c contender, w *world, p *proxy) {
		cpu := cpuOf(t, p, w.startLoad(t, "http2", s.requests, connections))
		r.add(c.name, microseconds(cpu)/float64(s.requests))
	})
	return []*row{r}
}

func measureHTTPConnections(t testing.TB, k *kit, s sizes) []*row {
	r := &row{title: "CPU per HTTP/1.1 request on a new connection", unit: "µs", promises: []promise{{1, nameHAProxy}}}
	turns := turns{"http-connections", k.http, s.connectionRounds}
	turns.take(t, k, []*row{r}, func(t testing.TB, c contender, w *world, p *proxy) {
		cpu := cpuOf(t, p, w.startLoad(t, "http-connections", s.connections, atATime))
		r.add(c.name, microseconds(cpu)/float64(s.connections))
	})
	return []*row{r}
}

func measureHTTPBulk(t testing.TB, k *kit, s sizes) []*row {
	down := &row{title: "CPU per GiB of a response's body", unit: "s", promises: []promise{{0.5, nameHAProxy}}}
	up := &row{title: "CPU per GiB of a request's body", unit: "s", promises: []promise{{0.5, nameHAProxy}}}
	rows := []*row{down, up}
	turns{"http-bulk", k.http, s.rounds}.take(t, k, rows, func(t testing.TB, c contender, w *world, p *proxy) {
		gib := float64(s.bulk) / (1 << 30)
		down.add(c.name, cpuOf(t, p, w.startLoad(t, "http-download", s.bulk, 1)).Seconds()/gib)
		up.add(c.name, cpuOf(t, p, w.startLoad(t, "http-upload", s.bulk, 1)).Seconds()/gib)
	})
	return rows
}

func measureLatency(t testing.TB, k *kit, s sizes) []*row {
	p50 := &row{title: fmt.Sprintf("latency at %d requests/s, p50", requestsPerSecond), unit: "µs"}
	p99 := &row{title: fmt.Sprintf("latency at %d requests/s, p99", requestsPerSecond), unit: "µs"}
	rows := []*row{p50, p99}
	turns{"latency", k.latency, s.latencyRounds}.take(t, k, rows, func(t testing.TB, c contender, w *world, _ *proxy) {
		report := w.startLoad(t, "latency", s.paced, atATime).finish(t)
		var half, most time.Duration
		if _, err := fmt.Sscan(report, &half, &most); err != nil {
			t.Fatalf("the load reports %q: %v", report, err)
		}
		p50.add(c.name, microseconds(half))
		p99.add(c.name, microseconds(most))
	})
	return rows
}

func measureHTTPIdle(t testing.TB, k *kit, s sizes) []*row {
	memory := &row{title: "memory per idle HTTP/1.1 connection", unit: "KiB", promises: []promise{{atMost: 8}}}
	descriptors := &row{title: "descriptors per idle HTTP/1.1 connection", promises: []promise{{atMost: 2}}}
	restIdle(t, k, s, turns{"http-idle", k.http, 1}, "http-idle", memory, descriptors)
	return []*row{memory, descriptors}
}
