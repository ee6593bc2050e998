package bench

import (
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

var (
	strict = flag.Bool("strict", false, "fail when a target is missed")
	only   = flag.String("figures", "", "measure only these, separated by commas: "+strings.Join(figureNames(), ", "))
)

// sizes sets the amount of work of each measurement.
type sizes struct {
	rounds           int   // default number of rounds
	connectionRounds int   // rounds for the cost of a connection; its target leaves the least room
	latencyRounds    int   // rounds for latency; it is most sensitive to other work on the machine
	downloads        int   // rounds of downloads through pillion run; other work on the machine affects them
	bulk             int64 // bytes in each direction
	connections      int64 // short connections
	traced           int64 // short connections under strace
	messages         int64
	requests         int64 // small HTTP requests at full speed
	paced            int64 // small HTTP requests at requestsPerSecond
	handshakes       int64 // TLS connections
	idle             int64 // connections
	settle           time.Duration
	pushed           time.Duration // after a push; the agent saves it and gives memory back meanwhile
	starts, inits    int
}

var fullSizes = sizes{
	rounds: 3, connectionRounds: 7, latencyRounds: 5, downloads: 7, bulk: 1 << 30, connections: 5000, traced: 200, messages: 40_000,
	requests: 60_000, paced: 2 * requestsPerSecond, handshakes: 3000, idle: 3000, settle: 3 * time.Second, pushed: 8 * time.Second, starts: 11, inits: 15,
}

// figures are the measurements, in the table's order.
var figures = []struct {
	name    string
	measure func(t testing.TB, k *kit, s sizes) []*row
}{
	{"bulk", measureBulk},
	{"connections", measureConnections},
	{"calls", measureCalls},
	{"messages", measureMessages},
	{"idle", measureIdle},
	{"http1", measureHTTP1},
	{"telemetry", measureTelemetry},
	{"tracing", measureTracing},
	{"http2", measureHTTP2},
	{"http-connections", measureHTTPConnections},
	{"http-bulk", measureHTTPBulk},
	{"latency", measureLatency},
	{"http-idle", measureHTTPIdle},
	{"start", measureStart},
	{"control-plane", measureControlPlane},
	{"tls", measureTLS},
	{"tls-both", measureTLSBothSides},
	{"tls-connections", measureTLSConnections},
	{"tls-bulk", measureTLSBulk},
	{"tls-idle", measureTLSIdle},
	{"policies", measurePolicies},
	{"routes", measureRoutes},
	{"routes-http2", measureRoutesHTTP2},
	{"routes-tls", measureRoutesTLS},
	{"routes-connections", measureRoutesConnections},
	{"edge", measureEdge},
	{"edge-tls", measureEdgeTLS},
	{"edge-connections", measureEdgeConnections},
	{"init", measureInit},
	{"run-start", measureRunStart},
	{"run-download", measureRunDownload},
}

// chosen reports whether a figure is to be measured.
func chosen(name string) bool { return *only == "" || slices.Contains(strings.Split(*only, ","), name) }

func figureNames() (names []string) {
	for _, f := range figures {
		names = append(names, f.name)
	}
	return names
}

// progress receives the progress messages of a benchmark. A test discards them.
var progress io.Writer = io.Discard

// BenchmarkFigures measures all promises of the project about its cost and prints the table.
func BenchmarkFigures(b *testing.B) {
	if b.N != 1 {
		b.Fatal("run with -benchtime 1x: one iteration takes minutes")
	}
	progress = os.Stdout
	fmt.Fprintln(progress)
	loadBefore := machineLoad()
	k := newKit(b, true)
	var rows []*row
	for _, f := range figures {
		if chosen(f.name) {
			rows = append(rows, f.measure(b, k, fullSizes)...)
		}
	}
	fmt.Fprintln(progress)
	writeTable(progress, rows, loadBefore)
	for _, r := range rows {
		if *strict && r.verdict() == "MISSED" {
			b.Errorf("%s: missed the target %s", r.title, r.target())
		}
	}
}

// turns is a series of rounds in which contenders are measured side by side.
type turns struct {
	figure     string
	contenders []contender
	rounds     int
}

// take measures every contender in each round, each time as a new process in a new world. Each round begins with another
// contender, so that the order varies.
func (turns turns) take(t testing.TB, k *kit, rows []*row, measure func(t testing.TB, c contender, w *world, p *proxy)) {
	for round := range turns.rounds {
		for i := range turns.contenders {
			c := turns.contenders[(i+round)%len(turns.contenders)]
			inScope(t, func(t testing.TB) {
				w := newWorld(t, k, c)
				measure(t, c, w, c.start(t, w))
			})
		}
		fmt.Fprintf(progress, "%s, round %d:", turns.figure, round+1)
		for _, c := range turns.contenders {
			for _, r := range rows {
				if samples := r.samples[c.name]; len(samples) > 0 {
					fmt.Fprintf(progress, "  %s %s", c.name, threeDigits(samples[len(samples)-1]))
				}
			}
		}
		fmt.Fprintln(progress)
	}
}

// cpuOf returns the proxy's CPU time for a load, from its start until shortly after its end, so that the work for closing
// the last connections is included.
func cpuOf(t testing.TB, p *proxy, h *helper) time.Duration {
	t.Helper()
	const aftermath = 50 * time.Millisecond
	time.Sleep(aftermath) // excludes the end of the warm-up
	before := p.cpu(t)
	h.finish(t)
	time.Sleep(aftermath)
	return p.cpu(t) - before
}

func measureBulk(t testing.TB, k *kit, s sizes) []*row {
	down := &row{title: "CPU per GiB, download", unit: "s", promises: []promise{{0.5, nameHAProxy}}}
	up := &row{title: "CPU per GiB, upload", unit: "s", promises: []promise{{0.5, nameHAProxy}}}
	rows := []*row{down, up}
	turns{"bulk", k.bulk, s.rounds}.take(t, k, rows, func(t testing.TB, c contender, w *world, p *proxy) {
		gib := float64(s.bulk) / (1 << 30)
		down.add(c.name, cpuOf(t, p, w.startLoad(t, "download", s.bulk, 1)).Seconds()/gib)
		up.add(c.name, cpuOf(t, p, w.startLoad(t, "upload", s.bulk, 1)).Seconds()/gib)
	})
	return rows
}

// atATime is the number of connections that the load uses concurrently.
const atATime = 16

func measureConnections(t testing.TB, k *kit, s sizes) []*row {
	r := &row{title: "CPU per new connection", unit: "µs", promises: []promise{{1.1, nameHAProxy}}}
	turns{"connections", k.opaque, s.connectionRounds}.take(t, k, []*row{r}, func(t testing.TB, c contender, w *world, p *proxy) {
		cpu := cpuOf(t, p, w.startLoad(t, "connections", s.connections, atATime))
		r.add(c.name, microseconds(cpu)/float64(s.connections))
	})
	return []*row{r}
}

// measureCalls counts the system calls of a connection. The connections are sequential, so that the count hardly depends on
// the machine.
func measureCalls(t testing.TB, k *kit, s sizes) []*row {
	r := &row{title: "system calls per new connection", unit: ""}
	if _, err := exec.LookPath("strace"); err != nil {
		fmt.Fprintf(progress, "cannot count system calls: %v\n", err)
		return nil
	}
	for _, c := range k.opaque {
		inScope(t, func(t testing.TB) {
			w := newWorld(t, k, c)
			p := c.start(t, w)
			h := w.startLoad(t, "connections", s.traced, 1)
			calls := p.traceCalls(t, w.pod, func() { h.finish(t) })
			r.add(c.name, float64(calls["total"])/float64(s.traced))
			fmt.Fprintf(progress, "system calls per new connection, %s:%s\n", c.name, perConnection(calls, s.traced))
		})
	}
	return []*row{r}
}

// perConnection lists the calls that a connection makes, the most frequent first.
func perConnection(calls map[string]int, connections int64) string {
	var names []string
	for name, n := range calls {
		if name != "total" && float64(n) >= 0.02*float64(connections) {
			names = append(names, name)
		}
	}
	slices.SortFunc(names, func(a, b string) int { return calls[b] - calls[a] })
	var list strings.Builder
	for _, name := range names {
		fmt.Fprintf(&list, " %s %.2f", name, float64(calls[name])/float64(connections))
	}
	return list.String()
}

func measureMessages(t testing.TB, k *kit, s sizes) []*row {
	r := &row{title: fmt.Sprintf("CPU per message of %d B there and back", messageSize), unit: "µs"}
	turns{"messages", k.opaque, s.rounds}.take(t, k, []*row{r}, func(t testing.TB, c contender, w *world, p *proxy) {
		cpu := cpuOf(t, p, w.startLoad(t, "messages", s.messages, 32))
		r.add(c.name, microseconds(cpu)/float64(s.messages))
	})
	return []*row{r}
}

func measureIdle(t testing.TB, k *kit, s sizes) []*row {
	memory := &row{title: "memory per idle connection", unit: "KiB", promises: []promise{{atMost: 10}}}
	descriptors := &row{title: "descriptors per idle connection", unit: "", promises: []promise{{atMost: 2}}}
	restIdle(t, k, s, turns{"idle", k.opaque, 1}, "idle", memory, descriptors)
	return []*row{memory, descriptors}
}

// restIdle measures what connections cost that a load of the kind has used and then leaves alone.
func restIdle(t testing.TB, k *kit, s sizes, turns turns, kind string, memory, descriptors *row) {
	turns.take(t, k, []*row{memory, descriptors}, func(t testing.TB, c contender, w *world, p *proxy) {
		rest(t, s, c, w, p, kind, memory, descriptors)
	})
}

func rest(t testing.TB, s sizes, c contender, w *world, p *proxy, kind string, memory, descriptors *row) {
	h := w.startLoad(t, kind, s.idle, atATime)
	time.Sleep(s.settle / 10) // the warm-up's connections are still closing
	residentBefore, descriptorsBefore := p.resident(t), p.descriptors(t)
	h.finish(t)
	time.Sleep(s.settle)
	memory.add(c.name, float64(p.resident(t)-residentBefore)/1024/float64(s.idle))
	descriptors.add(c.name, float64(p.descriptors(t)-descriptorsBefore)/float64(s.idle))
}

func measureStart(t testing.TB, k *kit, s sizes) []*row {
	start := &row{title: "start to ready", unit: "ms", promises: []promise{{atMost: 50}}}
	memory := &row{title: "resident memory at start", unit: "MB", promises: []promise{{atMost: 10}}}
	rows := []*row{start, memory}
	for range s.starts {
		for _, c := range k.opaque {
			inScope(t, func(t testing.TB) {
				pod, _ := nettest.PodAndPeer(t)
				took, p := c.startupTime(t, pod)
				time.Sleep(100 * time.Millisecond) // includes the memory of work after readiness
				start.add(c.name, milliseconds(took))
				memory.add(c.name, float64(p.resident(t))/1e6)
			})
		}
	}
	return rows
}

func measureInit(t testing.TB, k *kit, s sizes) []*row {
	programs := &row{title: "pillion init, with iptables", unit: "ms", promises: []promise{{atMost: 30}}}
	native := &row{title: "pillion init, with nftables and without programs", unit: "ms", promises: []promise{{atMost: 15}}}
	rows := map[string]*row{"iptables": programs, "nftables": native}
	for range s.inits {
		for backend, r := range rows {
			inScope(t, func(t testing.TB) {
				pod, _ := nettest.PodAndPeer(t)
				cmd := pod.Command(0, 0, k.pillion, append(slices.Clone(initArguments), "--backend", backend)...)
				begin := time.Now()
				out, err := pod.Run(cmd)
				took := time.Since(begin)
				if err != nil {
					t.Fatalf("%v\n%s", err, out)
				}
				r.add(namePillion, milliseconds(took))
			})
		}
	}
	for _, r := range rows {
		fmt.Fprintf(progress, "%s: %.1f\n", r.title, r.samples[namePillion])
	}
	startedBy := func(backend string, most float64) *row {
		r := &row{title: "programs that init starts, with " + backend, promises: []promise{{atMost: most}}}
		inScope(t, func(t testing.TB) { r.add(namePillion, programsStarted(t, k, backend)) })
		return r
	}
	measured := []*row{programs, native}
	if _, err := exec.LookPath("strace"); err == nil {
		measured = append(measured, startedBy("iptables", 8), startedBy("nftables", 0))
	}
	return measured
}

// programsStarted returns the number of programs that init and its children execute.
func programsStarted(t testing.TB, k *kit, backend string) float64 {
	t.Helper()
	pod, _ := nettest.PodAndPeer(t)
	path := filepath.Join(t.TempDir(), "trace")
	words := append([]string{"-qq", "-f", "-e", "trace=execve", "-o", path, k.pillion}, initArguments...)
	if out, err := pod.Run(pod.Command(0, 0, "strace", append(words, "--backend", backend)...)); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	trace, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return float64(strings.Count(string(trace), " = 0\n") - 1)
}

func microseconds(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }
func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
