package e2e

import (
	"bufio"
	"compress/gzip"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/nettest"
)

// families is an exposition as Prometheus reads it.
type families map[string]*dto.MetricFamily

// podURL returns the URL of a path on a port of the pod.
func podURL(port uint16, path string) string {
	return "http://" + netip.AddrPortFrom(nettest.PodIP4, port).String() + path
}

// scrape gets the agent's own metrics from the peer, as Prometheus does.
func (s *stage) scrape(t testing.TB) families {
	t.Helper()
	return parseMetrics(t, s.exposition(t, capture.MetricsPort, nil).body)
}

// exposition is an answer to a scrape.
type exposition struct {
	header http.Header
	body   string
}

// exposition scrapes a port of the pod from the peer, with fields of a request.
func (s *stage) exposition(t testing.TB, port uint16, fields http.Header) exposition {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), "GET", podURL(port, "/stats/prometheus"), nil)
	if err != nil {
		t.Fatal(err)
	}
	if fields != nil {
		request.Header = fields
	}
	response, err := s.inbound().client(t, false).Do(request)
	if err != nil {
		t.Fatal(err)
	}
	body := text(t, response)
	if response.StatusCode != 200 {
		t.Fatalf("port %d answers %s: %s", port, response.Status, body)
	}
	return exposition{response.Header, body}
}

func parseMetrics(t testing.TB, text string) families {
	t.Helper()
	parser := expfmt.NewTextParser(model.LegacyValidation)
	parsed, err := parser.TextToMetricFamilies(strings.NewReader(text))
	if err != nil {
		t.Fatalf("%v in\n%s", err, text)
	}
	return parsed
}

// sample returns the sum of the samples of a metric that have these labels. For a histogram, the sample is its count.
func sample(f families, name string, labels ...string) (sum float64) {
	for _, metric := range f[name].GetMetric() {
		if hasLabels(metric, labels) {
			sum += metric.GetCounter().GetValue() + metric.GetGauge().GetValue() + metric.GetUntyped().GetValue() +
				float64(metric.GetHistogram().GetSampleCount())
		}
	}
	return sum
}

// hasLabels reports whether a metric has labels, given as matchers such as name=value and name!~regexp.
func hasLabels(metric *dto.Metric, want []string) bool {
	for _, text := range want {
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

// The queries of Istio's mesh, service and workload dashboards and of Kiali find data when there was traffic of each kind.
func TestDashboardQueriesFindTheTraffic(t *testing.T) {
	t.Parallel()
	nettest.RequireRoot(t)
	program := peer(t, "grpc")
	s := newInjectedStage(t, nil, patientWithClients...)
	for _, c := range []struct {
		way
		host string
	}{{s.inbound(), "reviews:9080"}, {s.outbound(), "ratings.prod.svc.cluster.local:9080"}} {
		d := newDialogue(t, c.way, false, func(w http.ResponseWriter, r *http.Request) { io.Copy(w, r.Body) })
		request := d.request(t, "POST", "/", strings.NewReader("question"))
		request.Host = c.host
		text(t, d.do(t, request))
		downstream, upstream := c.ask(t, "speaks first")
		reads(t, upstream, "speaks first")
		halfClose(t, downstream, upstream)
	}
	out := s.outbound()
	out.runPeer(t, program, "call", out.startPeer(t, 50051, program, "serve", "ADDRESS"))

	var f families
	if !nettest.Within(nettest.Patience, func() bool {
		f = s.scrape(t)
		return sample(f, "istio_requests_total") >= 16 && sample(f, "istio_tcp_connections_closed_total") >= 2
	}) {
		t.Fatalf("%v requests and %v connections are counted; the access log is\n%s", sample(f, "istio_requests_total"),
			sample(f, "istio_tcp_connections_closed_total"), s.agent.access)
	}
	list, err := os.ReadFile("../internal/metrics/testdata/dashboards.txt")
	if err != nil {
		t.Fatal(err)
	}
	asked := 0
	for line := range strings.Lines(string(list)) {
		if strings.HasPrefix(line, "#") {
			continue
		}
		asked++
		q := strings.Split(strings.TrimSuffix(line, "\n"), ";")
		metric, where, by := strings.TrimSpace(q[1]), strings.Fields(q[2]), strings.Fields(q[3])
		found := slices.ContainsFunc(f[metric].GetMetric(), func(m *dto.Metric) bool {
			return hasLabels(m, where) && !slices.ContainsFunc(by, func(name string) bool {
				if name == "le" {
					return m.Histogram == nil
				}
				return !slices.ContainsFunc(m.Label, func(l *dto.LabelPair) bool { return l.GetName() == name })
			})
		})
		if !found {
			t.Errorf("%s: no %s with %s by %s", q[0], metric, where, by)
		}
	}
	if asked < 25 {
		t.Errorf("%d queries are listed", asked)
	}
	// The numbers are those of the traffic.
	for _, c := range []struct {
		metric, labels string
		want           float64
	}{
		{"istio_requests_total", "reporter=destination response_code=200 request_protocol=http", 1},
		{"istio_requests_total", "reporter=source response_code=200 request_protocol=http destination_service_name=ratings", 1},
		{"istio_requests_total", "reporter=source request_protocol=grpc grpc_response_status=12", 1},
		{"istio_tcp_connections_opened_total", "reporter=destination", 1},
		{"istio_tcp_connections_closed_total", "reporter=source response_flags=-", 1},
		{"pillion_gate_open", "gate=inbound", 1},
		{"istio_build", "component=proxy", 1},
	} {
		if got := sample(f, c.metric, strings.Fields(c.labels)...); got != c.want {
			t.Errorf("%s with %s is %v, want %v", c.metric, c.labels, got, c.want)
		}
	}
	if sent := sample(f, "istio_request_messages_total", "reporter=source"); sent < 20 {
		t.Errorf("%v messages of gRPC", sent)
	}
}

func TestFormatOfMetricsIsNegotiated(t *testing.T) {
	t.Parallel()
	s := newInjectedStage(t, nil)
	for _, port := range []uint16{capture.MetricsPort, capture.StatusPort} {
		plain := s.exposition(t, port, nil)
		if kind := plain.header.Get("Content-Type"); !strings.HasPrefix(kind, "text/plain; version=0.0.4") {
			t.Errorf("port %d: Content-Type %s", port, kind)
		}
		parseMetrics(t, plain.body)

		open := s.exposition(t, port, http.Header{"Accept": {"application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"}})
		if kind := open.header.Get("Content-Type"); !strings.HasPrefix(kind, "application/openmetrics-text; version=1.0.0") {
			t.Errorf("port %d: Content-Type %s", port, kind)
		}
		if !strings.HasSuffix(open.body, "\n# EOF\n") || strings.Count(open.body, "# EOF") != 1 || !strings.Contains(open.body, "# TYPE istio_build gauge\n") {
			t.Errorf("port %d: not OpenMetrics:\n%.2000s", port, open.body)
		}

		zipped := s.exposition(t, port, http.Header{"Accept-Encoding": {"gzip"}})
		reader, err := gzip.NewReader(strings.NewReader(zipped.body))
		if err != nil || zipped.header.Get("Content-Encoding") != "gzip" {
			t.Fatalf("port %d: %q, %v", port, zipped.header, err)
		}
		unzipped, err := io.ReadAll(reader)
		if err != nil {
			t.Fatal(err)
		}
		if sample(parseMetrics(t, string(unzipped)), "istio_build") != 1 {
			t.Errorf("port %d: no istio_build in what was zipped", port)
		}
	}
}

func TestBytesOfOpenConnectionAreCounted(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	s.eachDirection(t, func(t *testing.T, w way) {
		reporter := map[string]string{"inbound IPv4": "reporter=destination", "outbound IPv4": "reporter=source"}[w.name]
		downstream, upstream := w.connect(t)
		for round := range 3 {
			converse(t, downstream, upstream)
			nettest.Eventually(t, "the bytes are counted", func() bool {
				f := s.scrape(t)
				return sample(f, "istio_tcp_received_bytes_total", reporter) == float64((round+1)*len("question")) &&
					sample(f, "istio_tcp_sent_bytes_total", reporter) == float64((round+1)*len("answer"))
			})
		}
		if f := s.scrape(t); sample(f, "istio_tcp_connections_opened_total", reporter) != 1 || sample(f, "istio_tcp_connections_closed_total", reporter) != 0 {
			t.Error("the connection is not open by its metrics")
		}
	})
}

// Prometheus scrapes one port for the agent's metrics and those of the workload, in two formats. A failed part does not
// affect the others.
func TestMetricsOfTheWorkloadAreMergedWithOurs(t *testing.T) {
	t.Parallel()
	s := newInjectedStage(t, []string{`ISTIO_PROMETHEUS_ANNOTATIONS={"scrape":"true","targets":[` +
		`{"port":"9100","path":"/metrics"},{"port":9101,"path":"open"},{"port":"9102"},{"port":"9103"}]}`})
	registry := prometheus.NewRegistry()
	sold := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "shop_sold_total", Help: "What was sold."}, []string{"what"})
	took := prometheus.NewHistogram(prometheus.HistogramOpts{Name: "shop_seconds", Help: "How long it took.", Buckets: []float64{.1, 1}})
	build := prometheus.NewGauge(prometheus.GaugeOpts{Name: "istio_build", Help: "Not ours."})
	registry.MustRegister(sold, took, build)
	sold.WithLabelValues(`a "book"`).Add(3)
	took.Observe(.5)
	build.Set(99)
	serve := func(port int, handler http.Handler) {
		server := httptest.NewUnstartedServer(handler)
		server.Listener.Close()
		server.Listener = s.pod.Listen(t, "tcp", fmt.Sprintf("127.0.0.1:%d", port))
		server.Start()
		t.Cleanup(server.Close)
	}
	var agents atomic.Value
	serve(9100, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		agents.Store(r.UserAgent())
		promhttp.HandlerFor(registry, promhttp.HandlerOpts{EnableOpenMetrics: true}).ServeHTTP(w, r)
	}))
	serve(9101, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/openmetrics-text; version=1.0.0; charset=utf-8")
		io.WriteString(w, "# TYPE opened counter\n# HELP opened What was opened.\nopened_total 7 # {trace_id=\"abc\"} 1\nopened_created 1.7e9\n"+
			"# TYPE state stateset\n# HELP state How it is.\nstate{state=\"up\"} 1\n# EOF\n")
	}))
	serve(9103, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { http.Error(w, "no", http.StatusInternalServerError) }))

	merged := s.exposition(t, capture.StatusPort, http.Header{"User-Agent": {"Prometheus/3.1"}})
	f := parseMetrics(t, merged.body)
	for _, c := range []struct {
		metric, labels string
		want           float64
	}{
		{"shop_sold_total", "", 3}, {"shop_seconds", "", 1}, {"opened_total", "", 7}, {"state", "state=up", 1},
		{"pillion_scrape_target_up", "port=9100 path=/metrics", 1}, {"pillion_scrape_target_up", "port=9101 path=/open", 1},
		{"pillion_scrape_target_up", "port=9102 path=/metrics", 0}, {"pillion_scrape_target_up", "port=9103", 0},
		{"pillion_gate_open", "gate=drain", 1}, {"istio_build", "component=proxy", 1},
	} {
		if got := sample(f, c.metric, strings.Fields(c.labels)...); got != c.want || f[c.metric] == nil {
			t.Errorf("%s with %q is %v, want %v", c.metric, c.labels, got, c.want)
		}
	}
	if up := f["pillion_scrape_target_up"].GetMetric(); len(up) != 4 {
		t.Errorf("%d targets, want 4", len(up))
	}
	if got := agents.Load(); got != "Prometheus/3.1" {
		t.Errorf("the workload is asked by %v", got)
	}
	s.agent.log.await(t, "scraping the workload failed", "port=9102")
	s.agent.log.await(t, "scraping the workload failed", "port=9103")

	problems, err := promlint.New(strings.NewReader(merged.body)).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		// Others named these.
		if !strings.HasPrefix(p.Metric, "istio_") && !strings.HasPrefix(p.Metric, "envoy_") && !strings.HasPrefix(p.Metric, "opened_") {
			t.Errorf("%s: %s", p.Metric, p.Text)
		}
	}
	open := s.exposition(t, capture.StatusPort, http.Header{"Accept": {"application/openmetrics-text;version=1.0.0"}}).body
	for _, want := range []string{"# TYPE shop_sold counter\n", `shop_sold_total{what="a \"book\""} 3`, "opened_total 7", "# TYPE istio_build gauge\n"} {
		if strings.Count(open, want) != 1 {
			t.Errorf("%q is there %d times", want, strings.Count(open, want))
		}
	}
	if !strings.HasSuffix(open, "\n# EOF\n") || strings.Count(open, "# EOF") != 1 {
		t.Error("OpenMetrics does not end once")
	}
}

// A client that sends another Host with each request makes neither the exposition nor the agent grow.
func TestClientsCannotMakeTheMetricsGrow(t *testing.T) {
	t.Parallel()
	s := newStage(t, "--log-level", "info", "--access-log", "off")
	w := s.inbound()
	address := w.serveScript(t, serveQuickly)
	flood := func(from, to int) {
		const burst = 100
		downstream := w.dial(t, address)
		defer downstream.Close()
		r := bufio.NewReader(downstream)
		for ; from < to; from += burst {
			downstream.SetDeadline(time.Now().Add(nettest.Patience))
			var requests strings.Builder
			for serial := range burst {
				fmt.Fprintf(&requests, "GET / HTTP/1.1\r\nHost: host%d.example\r\n\r\n", from+serial)
			}
			writes(t, net.Conn(downstream), requests.String())
			for range burst {
				if status, _ := readAnswer(t, r); status != "200" {
					t.Fatalf("answered %s", status)
				}
			}
		}
	}
	series := func() (lines int, f families) {
		body := s.exposition(t, capture.MetricsPort, nil).body
		return strings.Count(body, "\nistio_"), parseMetrics(t, body)
	}
	flood(0, 2000)
	linesBefore, _ := series()
	before := s.agent.resident(t)
	flood(2000, 20_000)
	grown := s.agent.resident(t) - before
	// The last requests are counted shortly after their responses.
	var lines int
	var f families
	nettest.Eventually(t, "all requests are counted", func() bool {
		lines, f = series()
		return sample(f, "istio_requests_total") >= 20_000
	})
	if lines != linesBefore || lines > 2000 {
		t.Errorf("%d lines of Istio's metrics after 2,000 hosts, and %d after 20,000", linesBefore, lines)
	}
	if n := sample(f, "istio_requests_total"); n != 20_000 {
		t.Errorf("%v requests are counted", n)
	}
	if unnamed := sample(f, "pillion_metrics_unnamed_requests_total", "direction=inbound"); unnamed < 20_000-30 || unnamed >= 20_000 {
		t.Errorf("%v unnamed requests", unnamed)
	}
	if grown > 8<<20 && !raceDetector {
		t.Errorf("the agent grew by %d KiB", grown>>10)
	}
	t.Logf("%d lines; the agent grew by %d KiB", lines, grown>>10)
}
