package metrics

import (
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/podinfo"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

var (
	peer = netip.MustParseAddrPort("198.51.100.2:4711")
	own  = netip.MustParseAddrPort("198.51.100.7:8080")
	pod  = podinfo.Pod{Name: "reviews-v1-6d4b75cb6d-hswz6", Namespace: "shop", IP: "198.51.100.7", ServiceAccount: "reader",
		Workload: "reviews-v1", App: "reviews", Version: "v1.2", CanonicalService: "reviews", CanonicalRevision: "v1",
		Cluster: "Kubernetes", Mesh: "cluster.local"}
)

// connection returns a carried connection in a table.
func connection(table *flow.Table, direction flow.Direction, protocol flow.Protocol) *flow.Record {
	r := flow.Open(direction, peer)
	r.OriginalDestination = own
	table.List(r)
	table.Carry(r, protocol, flow.Hello{})
	return r
}

// request returns a request on c with a response status, ready for Closed.
func request(c *flow.Record, host string, status int) *flow.Record {
	r := flow.Open(c.Direction, peer)
	r.Connection, r.Protocol, r.Reason = c, c.Protocol, flow.Completed
	r.UpstreamLocal = own
	r.HTTP = &flow.Request{Authority: []byte(host), Status: status}
	return r
}

// call returns a gRPC request on c, ready for Closed.
func call(c *flow.Record, host, status string) *flow.Record {
	r := request(c, host, 200)
	r.HTTP.GRPC, r.HTTP.GRPCStatus = true, []byte(status)
	return r
}

// text returns the current exposition of m. A duplicate series fails the test.
func text(t *testing.T, m *Metrics) string {
	t.Helper()
	var text strings.Builder
	if err := m.Write(&text, false); err != nil {
		t.Fatal(err)
	}
	seen := make(map[string]bool)
	for line := range strings.Lines(text.String()) {
		series := line[:strings.LastIndexByte(line, ' ')]
		if !strings.HasPrefix(line, "#") && seen[series] {
			t.Errorf("duplicate series: %s", series)
		}
		seen[series] = true
	}
	return text.String()
}

// exposition returns the current exposition of m, parsed.
func exposition(t *testing.T, m *Metrics) map[string]*dto.MetricFamily {
	t.Helper()
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(text(t, m)))
	if err != nil {
		t.Fatal(err)
	}
	return families
}

// gathered returns the current families of m. It skips the conversion to text, because that is slow for many series.
func gathered(t *testing.T, m *Metrics) map[string]*dto.MetricFamily {
	t.Helper()
	families := make(map[string]*dto.MetricFamily)
	for _, family := range m.Gather() {
		families[family.Name] = inProtobuf(family)
	}
	return families
}

// value returns the sum of the samples of a metric that have these labels. For a histogram, the sample is its count.
func value(t *testing.T, m *Metrics, name string, labels ...string) (sum float64) {
	t.Helper()
	for _, metric := range gathered(t, m)[name].GetMetric() {
		if matches(metric, labels) {
			sum += metric.GetCounter().GetValue() + metric.GetGauge().GetValue() + float64(metric.GetHistogram().GetSampleCount())
		}
	}
	return sum
}

func matches(metric *dto.Metric, labels []string) bool {
	for _, text := range labels {
		m := matcher.FindStringSubmatch(text)
		i := slices.IndexFunc(metric.Label, func(l *dto.LabelPair) bool { return l.GetName() == m[1] })
		value := ""
		if i >= 0 {
			value = metric.Label[i].GetValue()
		}
		same := value == m[4]
		if m[3] == "~" {
			same = regexp.MustCompile("^(?:" + m[4] + ")$").MatchString(value)
		}
		if same == (m[2] == "!") {
			return false
		}
	}
	return true
}

// matcher is a matcher of a label in PromQL, without quotation marks.
var matcher = regexp.MustCompile(`^(\w+)(!?)=?(~?)(.*)$`)

// Each byte and each end is counted once, while goroutines move bytes, others update the counters and one scrapes. The race
// detector watches.
func TestSumsAreExact(t *testing.T) {
	const owners, connections, moves, size = 4, 50, 40, 7
	m := New(pod, Options{Version: "v"})
	table := flow.NewTable(m)
	m.Watch(table, Sources{})
	var working, watching sync.WaitGroup
	done := make(chan struct{})
	for i := range 3 {
		watching.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				if i == 0 {
					m.Write(new(strings.Builder), true)
				} else {
					m.Progress(table)
				}
				runtime.Gosched()
			}
		})
	}
	for range owners {
		working.Go(func() {
			for i := range connections {
				c := connection(table, flow.Outbound, flow.Opaque)
				keptAlive := connection(table, flow.Inbound, flow.HTTP11)
				for range moves {
					c.Received.Add(size)
					c.Sent.Add(2 * size)
					r := request(keptAlive, fmt.Sprintf("host%d", i), 200)
					r.Received.Add(size)
					m.Closed(r)
				}
				table.Leave(keptAlive)
				c.Close(table, flow.DownstreamReset, nil)
			}
		})
	}
	working.Wait()
	close(done)
	watching.Wait()
	for _, c := range []struct {
		metric string
		want   float64
	}{
		{"istio_tcp_received_bytes_total", owners * connections * moves * size},
		{"istio_tcp_sent_bytes_total", owners * connections * moves * size * 2},
		{"istio_tcp_connections_opened_total", owners * connections},
		{"istio_tcp_connections_closed_total", owners * connections},
		{"istio_requests_total", owners * connections * moves},
		{"istio_request_duration_milliseconds", owners * connections * moves},
	} {
		if got := value(t, m, c.metric); got != c.want {
			t.Errorf("%s = %v, want %v", c.metric, got, c.want)
		}
	}
	var sum float64
	for _, metric := range gathered(t, m)["istio_request_bytes"].Metric {
		sum += metric.Histogram.GetSampleSum()
	}
	if want := float64(owners * connections * moves * size); sum != want {
		t.Errorf("the sum of istio_request_bytes is %v, want %v", sum, want)
	}
	if got := value(t, m, "pillion_open_connections"); got != 0 {
		t.Errorf("%v open connections, want 0", got)
	}
}

func TestBytesOfOpenConnectionsAreCounted(t *testing.T) {
	m := New(pod, Options{Version: "v"})
	table := flow.NewTable(m)
	m.Watch(table, Sources{})
	table.List(flow.Open(flow.Inbound, peer))
	c := connection(table, flow.Inbound, flow.TLS)
	for i := range uint64(3) {
		c.Received.Add(10)
		c.Sent.Add(100)
		m.Progress(table)
		if received := m.directions[flow.Inbound].end(flow.Closed).tcp.received.Load(); received != 10*(i+1) {
			t.Errorf("received %d after %d moves", received, i+1)
		}
	}
	if got := value(t, m, "istio_tcp_sent_bytes_total", "reporter=destination", "response_flags=-"); got != 300 {
		t.Errorf("sent %v", got)
	}
	for protocol, want := range map[string]float64{"tls": 1, "undecided": 1, "http1": 0} {
		if got := value(t, m, "pillion_open_connections", "direction=inbound", "protocol="+protocol); got != want {
			t.Errorf("%v open connections of %s, want %v", got, protocol, want)
		}
	}
	if got := value(t, m, "istio_tcp_connections_closed_total"); got != 0 {
		t.Errorf("%v closed connections, want 0", got)
	}
}

// The sinks receive Closed without Opened for a connection that was not carried.
func TestConnectionsThatWereNotCarried(t *testing.T) {
	for _, c := range []struct {
		direction   flow.Direction
		reason      flow.Reason
		name, flags string // labels of the series; an empty name: no series
	}{
		{flow.Outbound, flow.UpstreamRefused, "PassthroughCluster", "UF,URX"},
		{flow.Inbound, flow.UpstreamTimeout, "InboundPassthroughCluster", "UF,URX"},
		{flow.Outbound, flow.Loop, "BlackHoleCluster", "UH"},
		{flow.Inbound, flow.Loop, "BlackHoleCluster", "UH"},
		{flow.Outbound, flow.Drained, "PassthroughCluster", "-"},
		{flow.Inbound, flow.ForeignAddress, "", ""},
		{flow.Outbound, flow.NoOriginalDestination, "", ""},
		{flow.Outbound, flow.MaxConnections, "", ""},
	} {
		m := New(pod, Options{Version: "v"})
		flow.Open(c.direction, peer).Close(flow.NewTable(m), c.reason, nil)
		want := 0.0
		if c.name != "" {
			want = 1
		}
		for _, metric := range []string{"istio_tcp_connections_opened_total", "istio_tcp_connections_closed_total"} {
			got := value(t, m, metric, "destination_service_name="+c.name, "response_flags="+c.flags, "request_protocol=tcp",
				"destination_service=unknown")
			if all := value(t, m, metric); got != want || all != want {
				t.Errorf("%s, %s: %s is %v, and %v in all; want %v", c.direction, c.reason, metric, got, all, want)
			}
		}
		if got := value(t, m, "pillion_flows_total", "direction="+c.direction.String(), "reason="+string(c.reason)); got != 1 {
			t.Errorf("%s, %s: counted %v", c.direction, c.reason, got)
		}
	}
}

func TestEachReasonIsCounted(t *testing.T) {
	m := New(pod, Options{Version: "v"})
	table := flow.NewTable(m)
	for _, e := range flow.Explanations {
		flow.Open(flow.Inbound, peer).Close(table, e.Reason, nil)
		m.Closed(&flow.Record{Direction: flow.Outbound, Reason: e.Reason, Connection: flow.Open(flow.Outbound, peer), HTTP: new(flow.Request)})
	}
	for _, e := range flow.Explanations {
		for _, direction := range []string{"inbound", "outbound"} {
			if got := value(t, m, "pillion_flows_total", "direction="+direction, "reason="+string(e.Reason)); got != 1 {
				t.Errorf("%s, %s: counted %v", direction, e.Reason, got)
			}
		}
		flags := e.RequestFlags
		if got := value(t, m, "istio_requests_total", "response_flags="+orDash(flags), "response_code=0"); got < 1 {
			t.Errorf("%s: no request with flags %q", e.Reason, flags)
		}
	}
}

func TestRequestsByLabel(t *testing.T) {
	m := New(pod, Options{Version: "v"})
	table := flow.NewTable(m)
	out, in := connection(table, flow.Outbound, flow.HTTP2), connection(table, flow.Inbound, flow.HTTP11)
	engine := request(out, "a.example", 503)
	engine.HTTP.Flags, engine.Reason, engine.UpstreamLocal = "UO", flow.Overload, netip.AddrPort{}
	for _, r := range []*flow.Record{
		request(out, "a.example", 200), request(out, "A.Example", 204), request(out, "a.example", 200), request(out, "a.example", 999),
		call(out, "a.example", "0"), call(out, "a.example", "16"), call(out, "a.example", "17"), call(out, "a.example", "ok"),
		call(out, "a.example", ""), engine,
		request(in, "", 200), request(in, "new.example", 404), request(in, "new.example", 200), request(in, "new.example", 404),
	} {
		m.Closed(r)
	}
	for _, c := range []struct {
		want   float64
		labels string
	}{
		{10, "reporter=source"},
		{4, "reporter=destination"},
		{2, "request_protocol=http response_code=200 grpc_response_status= destination_service=a.example connection_security_policy=unknown"},
		{1, "request_protocol=http response_code=204 destination_service=a.example"},
		{1, "request_protocol=http response_code=0 destination_service=a.example"},
		{1, "request_protocol=grpc response_code=200 grpc_response_status=0"},
		{1, "request_protocol=grpc response_code=200 grpc_response_status=16"},
		{2, "request_protocol=grpc response_code=200 grpc_response_status=unknown"},
		{1, "request_protocol=grpc response_code=200 grpc_response_status="},
		{1, "response_code=503 response_flags=UO"},
		{1, "response_code=200 destination_service=unknown destination_service_name=InboundPassthroughCluster connection_security_policy=none"},
		{1, "response_code=404 destination_service=unknown"},
		{1, "response_code=404 destination_service=new.example"},
	} {
		if got := value(t, m, "istio_requests_total", strings.Fields(c.labels)...); got != c.want {
			t.Errorf("%s: %v requests, want %v", c.labels, got, c.want)
		}
	}
	if got := value(t, m, "pillion_metrics_unnamed_requests_total"); got != 1 {
		t.Errorf("%v unnamed requests", got)
	}
	if got := value(t, m, "envoy_cluster_upstream_rq_total", "cluster_name=PassthroughCluster"); got != 9 {
		t.Errorf("%v upstream requests", got)
	}
	if got := value(t, m, "envoy_cluster_upstream_rq", "cluster_name=PassthroughCluster", "response_code_class=2xx"); got != 8 {
		t.Errorf("%v upstream responses 2xx", got)
	}
}

// Clients send arbitrary hosts, and upstreams answer with arbitrary status codes, in both directions.
func TestSeriesAreBounded(t *testing.T) {
	for _, limit := range []int{DefaultMaxSeries, MinMaxSeries, 20_000} {
		m := everythingWith(Options{MaxSeries: limit})
		table := flow.NewTable(m)
		before := heap()
		var sent float64
		for _, direction := range []flow.Direction{flow.Inbound, flow.Outbound} {
			c := connection(table, direction, flow.HTTP11)
			m.Closed(request(c, "served.example", 200))
			for i := range 25_000 { // names that are not served, before the others
				m.Closed(request(c, fmt.Sprintf("junk%d.example", i), 400+i%200))
			}
			known := len(m.directions[direction].services)
			for i := range 50_000 { // a server that answers every name
				r := request(c, fmt.Sprintf([]string{"host%d.example", "host%d", "host%d.ns.svc"}[i%3], i), i%700)
				if i%4 == 0 {
					r.HTTP.GRPC, r.HTTP.GRPCStatus = true, strconv.AppendInt(nil, int64(i%50), 10)
				}
				r.Reason = flow.Explanations[i%len(flow.Explanations)].Reason
				m.Closed(r)
			}
			for _, e := range flow.Explanations {
				flow.Open(direction, peer).Close(table, e.Reason, nil)
			}
			m.Closed(request(c, "served.example", 200))
			sent += 75_002
			if known > 3 {
				t.Errorf("%s: %d hosts after requests for names that are not served", direction, known)
			}
			if got := value(t, m, "istio_requests_total", "destination_service=served.example", "reporter="+m.directions[direction].reporter); got != 2 {
				t.Errorf("%v requests to the first host", got)
			}
			for _, name := range []string{"pillion_metrics_unnamed_requests_total", "pillion_metrics_folded_requests_total"} {
				if value(t, m, name, "direction="+direction.String()) == 0 {
					t.Errorf("%s is 0", name)
				}
			}
		}
		if grown := heap() - before; grown > 3<<20 {
			t.Errorf("150,000 hosts hold %d bytes", grown)
		}
		series := 0
		for line := range strings.Lines(text(t, m)) {
			if line[0] != '#' {
				series++
			}
		}
		if series > limit || series < limit*3/4 {
			t.Errorf("%d series with a limit of %d", series, limit)
		}
		if got := value(t, m, "istio_requests_total"); got != sent+2 { // and two of everything
			t.Errorf("%v requests are counted, want %v", got, sent+2)
		}
	}
}

func heap() int64 {
	runtime.GC()
	var stats runtime.MemStats
	runtime.ReadMemStats(&stats)
	return int64(stats.HeapAlloc)
}

// Folded requests keep what rates of errors are made of.
func TestFoldedRequestsKeepTheirClass(t *testing.T) {
	m := New(pod, Options{Version: "v"})
	in := connection(flow.NewTable(m), flow.Inbound, flow.HTTP2)
	for i := range m.directions[flow.Inbound].budget.sets {
		m.Closed(request(in, fmt.Sprintf("host%d", i%4), 200+i/4))
	}
	failed := call(in, "host0", "0")
	failed.HTTP.Status = 503
	for _, r := range []*flow.Record{request(in, "host0", 404), request(in, "host0", 503), call(in, "host0", "13"), failed,
		call(in, "host0", "0"), call(in, "host0", ""), request(in, "host0", 200)} {
		m.Closed(r)
	}
	for _, c := range []struct {
		want   float64
		labels string
	}{
		{1, "response_code=400 request_protocol=http"},
		{1, "response_code=500 request_protocol=http"},
		{1, "response_code=500 grpc_response_status=2"},
		{1, "response_code=200 grpc_response_status=2"},
		{1, "response_code=200 grpc_response_status=0"},
		{1, "response_code=200 request_protocol=grpc grpc_response_status="},
	} {
		if got := value(t, m, "istio_requests_total", append(strings.Fields(c.labels), "destination_service=unknown")...); got != c.want {
			t.Errorf("%s: %v requests, want %v", c.labels, got, c.want)
		}
	}
	if got := value(t, m, "istio_requests_total", "destination_service=host0.shop.svc.cluster.local", "response_code=200"); got != 2 {
		t.Errorf("%v requests with known labels", got)
	}
}

func TestHistogramsMatchPrometheus(t *testing.T) {
	for _, unit := range []float64{1, float64(time.Millisecond)} {
		var ours histogram
		theirs := prometheus.NewHistogram(prometheus.HistogramOpts{Name: "x", Buckets: buckets[:]})
		limits := &byteLimits
		if unit != 1 {
			limits = &durationLimits
		}
		for _, bound := range buckets {
			for _, off := range []float64{-1, 0, 1} {
				value := uint64(max(0, bound*unit+off))
				ours.observe(value, limits)
				theirs.Observe(float64(value) / unit)
			}
		}
		ours.observe(1<<62, limits)
		theirs.Observe(float64(1<<62) / unit)
		var want dto.Metric
		if err := theirs.Write(&want); err != nil {
			t.Fatal(err)
		}
		got := ours.expose(unit)
		if got.Count != want.Histogram.GetSampleCount() || got.Sum/want.Histogram.GetSampleSum()-1 > 1e-9 {
			t.Errorf("count and sum: %v", got)
		}
		for i, bucket := range want.Histogram.Bucket {
			if got.Buckets[i].Count != bucket.GetCumulativeCount() || got.Buckets[i].Bound != bucket.GetUpperBound() {
				t.Errorf("unit %v: bucket %v, want %v", unit, got.Buckets[i], bucket)
			}
		}
	}
}

// The counters that a connection caches for its next request must not be used for a request with other labels.
func TestCountersDoNotDependOnEarlierRequestsOfTheConnection(t *testing.T) {
	changes := map[string]func(*flow.Record){
		"same":          func(*flow.Record) {},
		"host":          func(r *flow.Record) { r.HTTP.Authority = []byte("ratings") },
		"spelling":      func(r *flow.Record) { r.HTTP.Authority = []byte("reviews.shop:80") },
		"no host":       func(r *flow.Record) { r.HTTP.Authority = nil },
		"invalid host":  func(r *flow.Record) { r.HTTP.Authority = []byte("a b") },
		"status":        func(r *flow.Record) { r.HTTP.Status = 201 },
		"last status":   func(r *flow.Record) { r.HTTP.Status = 599 },
		"odd status":    func(r *flow.Record) { r.HTTP.Status = 600 },
		"flags":         func(r *flow.Record) { r.HTTP.Flags = "UC" },
		"reason":        func(r *flow.Record) { r.Reason = flow.UpstreamReset },
		"gRPC":          func(r *flow.Record) { r.HTTP.GRPC = true },
		"gRPC's status": func(r *flow.Record) { r.HTTP.GRPC, r.HTTP.GRPCStatus = true, []byte("5") },
	}
	counts := func(requests ...*flow.Record) string {
		m := New(pod, Options{})
		for _, r := range requests {
			m.Closed(r)
		}
		var f families // without those of the runtime, for speed
		m.istio(&f)
		m.own(&f, [2][len(protocols)]int{})
		var lines []string
		for _, family := range f {
			for _, metric := range family.Metrics {
				lines = append(lines, fmt.Sprintf("%s %v\n", family.Name, metric))
			}
		}
		slices.Sort(lines)
		return strings.Join(lines, "")
	}
	for first, change := range changes {
		for second, then := range changes {
			var together, apart []*flow.Record
			shared := connection(flow.NewTable(), flow.Inbound, flow.HTTP2)
			for i, change := range []func(*flow.Record){change, then, then, change} {
				for _, list := range []*[]*flow.Record{&together, &apart} {
					c := shared
					if list == &apart {
						c = connection(flow.NewTable(), flow.Inbound, flow.HTTP2)
					}
					r := request(c, "reviews", 200)
					change(r)
					r.Received.Store(uint64(i))
					*list = append(*list, r)
				}
			}
			if got, want := counts(together...), counts(apart...); got != want {
				t.Errorf("%s, then %s:\n%s\nwant\n%s", first, second, got, want)
			}
		}
	}
}

func BenchmarkClosed(b *testing.B) {
	m := New(pod, Options{Version: "v"})
	in := connection(flow.NewTable(m), flow.Inbound, flow.HTTP11)
	ok, other := request(in, "reviews.shop.svc.cluster.local:9080", 200), request(in, "ratings", 404)
	for _, c := range []struct {
		name    string
		records []*flow.Record
	}{{"same", []*flow.Record{ok, ok}}, {"other", []*flow.Record{ok, other}}} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				m.Closed(c.records[i%2])
			}
		})
	}
}
