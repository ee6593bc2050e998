package admin

import (
	"bytes"
	"cmp"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/promtext"
)

var update = flag.Bool("update", false, "write the golden files")

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

// metricsText is a sample of the agent's metrics.
const metricsText = `# HELP envoy_server_state State
# TYPE envoy_server_state gauge
envoy_server_state 0
# TYPE envoy_listener_manager_workers_started gauge
envoy_listener_manager_workers_started 1
# TYPE envoy_cluster_upstream_cx_total counter
envoy_cluster_upstream_cx_total{cluster_name="PassthroughCluster"} 12
envoy_cluster_upstream_cx_total{cluster_name="BlackHoleCluster"} 0
# TYPE envoy_listener_downstream_cx_active gauge
envoy_listener_downstream_cx_active{listener_address="0.0.0.0_15006",worker="a} b"} 3
# TYPE envoy_listener_http_downstream_rq counter
envoy_listener_http_downstream_rq{response_code_class="2xx",http_conn_manager_prefix="inbound",listener_address="virtualInbound"} 7
envoy_listener_http_downstream_rq{listener_address="virtualInbound"} 0
# TYPE envoy_cluster_upstream_rq counter
envoy_cluster_upstream_rq{response_code_class="5xx",cluster_name="PassthroughCluster"} 4
# TYPE istio_requests_total counter
istio_requests_total{reporter="destination",source_app="a\"b"} 1.5e+06
# TYPE istio_request_duration_milliseconds histogram
istio_request_duration_milliseconds_bucket{reporter="destination",le="1"} 50
istio_request_duration_milliseconds_bucket{reporter="destination",le="5"} 100
istio_request_duration_milliseconds_bucket{reporter="destination",le="+Inf"} 100
istio_request_duration_milliseconds_sum{reporter="destination"} 150
istio_request_duration_milliseconds_count{reporter="destination"} 100
istio_request_duration_milliseconds_bucket{reporter="source",le="+Inf"} 0
istio_request_duration_milliseconds_sum{reporter="source"} 0
istio_request_duration_milliseconds_count{reporter="source"} 0
# TYPE go_threads gauge
go_threads 0.5
# TYPE go_gc_duration_seconds summary
go_gc_duration_seconds{quantile="0"} 0.25
go_gc_duration_seconds{quantile="1"} 0.5
go_gc_duration_seconds_sum 3
go_gc_duration_seconds_count 8
`

const statsText = `cluster.BlackHoleCluster.upstream_cx_total: 0
cluster.PassthroughCluster.upstream_cx_total: 12
cluster.PassthroughCluster.upstream_rq_5xx: 4
go_gc_duration_seconds.quantile.0: 0.25
go_gc_duration_seconds.quantile.1: 0.5
go_gc_duration_seconds_count: 8
go_gc_duration_seconds_sum: 3
go_threads: 0.5
istio_requests_total.reporter.destination.source_app.a"b: 1500000
listener.0.0.0.0_15006.downstream_cx_active.worker.a} b: 3
listener.virtualInbound.http.inbound.downstream_rq_2xx: 7
listener.virtualInbound.http_downstream_rq: 0
listener_manager.workers_started: 1
server.state: 0
istio_request_duration_milliseconds.reporter.destination: P0(nan,0) P25(nan,0.5) P50(nan,1) P75(nan,3) P90(nan,4.2) P95(nan,4.6) P99(nan,4.92) P99.5(nan,4.96) P99.9(nan,4.992) P100(nan,5)
istio_request_duration_milliseconds.reporter.source: No recorded values
`

// gatherer is a function as a Gatherer.
type gatherer func() []promtext.MetricFamily

func (g gatherer) Gather() []promtext.MetricFamily { return g() }

// gathered returns a gatherer of the families in text, in their order.
func gathered(text string) gatherer {
	parser := expfmt.NewTextParser(model.LegacyValidation)
	byName, _ := parser.TextToMetricFamilies(strings.NewReader(text))
	var families []promtext.MetricFamily
	for _, family := range byName {
		families = append(families, fromProtobuf(family))
	}
	at := func(f promtext.MetricFamily) int { return strings.Index(text, "# TYPE "+f.Name+" ") }
	slices.SortFunc(families, func(a, b promtext.MetricFamily) int { return cmp.Compare(at(a), at(b)) })
	return func() []promtext.MetricFamily { return families }
}

// fromProtobuf returns a family that Prometheus' library has parsed.
func fromProtobuf(f *dto.MetricFamily) promtext.MetricFamily {
	out := promtext.MetricFamily{Name: f.GetName(), Help: f.GetHelp(), Type: promtext.Type(strings.ToLower(f.GetType().String()))}
	if f.GetType() == dto.MetricType_UNTYPED {
		out.Type = promtext.Unknown
	}
	for _, m := range f.Metric {
		metric := promtext.Metric{
			Value: m.GetCounter().GetValue() + m.GetGauge().GetValue() + m.GetUntyped().GetValue(),
			Sum:   m.GetHistogram().GetSampleSum() + m.GetSummary().GetSampleSum(),
			Count: m.GetHistogram().GetSampleCount() + m.GetSummary().GetSampleCount(),
		}
		for _, l := range m.Label {
			metric.Labels = append(metric.Labels, promtext.Label{Name: l.GetName(), Value: l.GetValue()})
		}
		for _, b := range m.GetHistogram().GetBucket() {
			metric.Buckets = append(metric.Buckets, promtext.Bucket{Bound: b.GetUpperBound(), Count: b.GetCumulativeCount()})
		}
		for _, q := range m.GetSummary().GetQuantile() {
			metric.Quantiles = append(metric.Quantiles, promtext.Quantile{Share: q.GetQuantile(), Value: q.GetValue()})
		}
		out.Metrics = append(out.Metrics, metric)
	}
	return out
}

// commanded records the commands that the handler passes on.
type commanded struct {
	mu     sync.Mutex
	orders []string
	level  slog.LevelVar
}

func (t *commanded) note(order string) func() { return func() { t.say(order) } }

func (t *commanded) say(order string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.orders = append(t.orders, order)
}

// taken returns the commands since the last call.
func (t *commanded) taken() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	orders := strings.Join(t.orders, " ")
	t.orders = nil
	return orders
}

func addressPorts(texts ...string) (addresses []netip.AddrPort) {
	for _, text := range texts {
		addresses = append(addresses, netip.MustParseAddrPort(text))
	}
	return addresses
}

// sample is the configuration of an agent that carries five connections.
func sample(t *commanded) Config {
	flows := flow.NewTable()
	for i, destination := range addressPorts("203.0.113.7:5432", "203.0.113.7:5432", "[2001:db8::7]:443", "192.0.2.2:8080", "192.0.2.2:9") {
		direction := flow.Outbound
		if destination.Addr() == netip.MustParseAddr("192.0.2.2") {
			direction = flow.Inbound
		}
		r := flow.Open(direction, netip.MustParseAddrPort("198.51.100.2:4711"))
		r.OriginalDestination = destination
		flows.List(r)
		if i < 4 { // the protocol of the last one is not detected yet
			flows.Carry(r, flow.Opaque, flow.Hello{})
		}
	}
	return Config{
		Version: "1.2.3",
		Started: time.Date(2026, 2, 3, 4, 5, 6, 789e6, time.UTC),
		Address: netip.MustParseAddrPort("127.0.0.1:15000"),
		Node: Node{ID: "sidecar~192.0.2.2~app-1.shop~shop.svc.cluster.local", Cluster: "app.shop",
			Metadata: map[string]any{"NAMESPACE": "shop", "ISTIO_VERSION": "1.2.3", "LABELS": map[string]string{"app": "<app>"}}},
		Options: Options{Concurrency: 2, LogLevel: "info", DrainTime: 20 * time.Second},
		Listeners: func() []Listener {
			return []Listener{
				{Name: VirtualOutbound, Addresses: addressPorts("127.0.0.1:15001", "[::1]:15001")},
				{Name: VirtualInbound, Addresses: addressPorts("0.0.0.0:15006", "[::]:15006")},
				{Name: "readiness", Addresses: addressPorts("0.0.0.0:15021"), Serves: []string{"/healthz/ready", "/healthz/live"}},
			}
		},
		Carrying: Carrying{
			OwnPorts: []uint16{15001, 15006},
			OwnAddresses: func() []netip.Addr {
				return []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("192.0.2.2")}
			},
			OpaquePorts:    [][2]uint16{{3306, 3306}, {60000, 65535}},
			InboundSources: []netip.Addr{netip.MustParseAddr("127.0.0.6"), netip.MustParseAddr("::6")},
			ConnectTimeout: 10 * time.Second, RequestHeadTimeout: time.Minute, UpstreamIdleTimeout: 3500 * time.Millisecond,
			MaxHeadBytes: 256 << 10, MaxHeadFields: 1000,
		},
		Flows:       flows,
		Ready:       func() (string, bool) { return "LIVE", true },
		Unready:     func() []string { return []string{"addresses"} },
		Metrics:     gathered(metricsText),
		RecentLog:   strings.NewReader("the last lines\n"),
		LogLevel:    t.level.Level,
		SetLogLevel: t.level.Set,
		Drain:       func(o DrainOrder) { t.say(strings.TrimSuffix("drain"+flags(o), " ")) },
		Quit:        t.note("quit"),
		Health:      func(ok bool) { t.say(map[bool]string{true: "ok", false: "fail"}[ok]) },
		ReopenLogs:  t.note("reopen"),
		Page:        text("a page"),
		Live:        text("live"),
		View:        text("view"),
		Explain:     text("explanation"),
		Log:         slog.New(slog.DiscardHandler),
	}
}

func flags(o DrainOrder) (text string) {
	for name, on := range map[string]bool{"-inbound": o.InboundOnly, "-graceful": o.Graceful, "-stay": o.SkipExit} {
		if on {
			text += name
		}
	}
	parts := strings.Split(text, "-")
	slices.Sort(parts)
	return strings.Join(parts, "-")
}

func text(s string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, s) })
}

// ask sends a request like a tool on this machine, with fields "Name: value".
func ask(handler http.Handler, method, target string, fields ...string) *httptest.ResponseRecorder {
	request := httptest.NewRequest(method, target, nil)
	request.Host, request.RemoteAddr = "localhost:15000", "127.0.0.1:4711"
	for _, field := range fields {
		name, value, _ := strings.Cut(field, ": ")
		switch name {
		case "Host":
			request.Host = value
		case "From":
			request.RemoteAddr = value
		default:
			request.Header.Set(name, value)
		}
	}
	recorder := httptest.NewRecorder()
	handler.ServeHTTP(recorder, request)
	return recorder
}

// Each path is requested with each method. Its whole body is here or in a golden file.
func TestPaths(t *testing.T) {
	var told commanded
	handler := NewHandler(sample(&told))
	const ok, any = "OK\n", "*"
	loggers := func(level string) string {
		text := "active loggers:\n"
		for _, name := range loggerNames {
			text += "  " + name + ": " + level + "\n"
		}
		return text
	}
	met := make(map[string]bool)
	for _, c := range []struct {
		method, target string
		code           int
		body, order    string
	}{
		{"GET", "/", 200, "admin commands are:\n" + list(), ""},
		{"GET", "/help", 200, "admin commands are:\n" + list(), ""},
		{"GET", "/nothing", 404, "invalid path. admin commands are:\n" + list(), ""},
		{"POST", "/ready/", 404, "invalid path. admin commands are:\n" + list(), ""},
		{"GET", "/ready", 200, "LIVE\n", ""},
		{"HEAD", "/ready", 200, "LIVE\n", ""}, // net/http's server drops the body
		{"POST", "/ready", 200, "LIVE\n", ""},
		{"GET", "/live", 200, "live", ""},
		{"GET", "/live/events", 200, "live", ""},
		{"GET", "/config/", 200, "view", ""},
		{"GET", "/config/cluster?name=a", 200, "view", ""},
		{"GET", "/explain?url=http://web/", 200, "explanation", ""},
		{"GET", "/config", 404, "invalid path. admin commands are:\n" + list(), ""},
		{"GET", "/listeners", 200, "virtualOutbound::127.0.0.1:15001\nvirtualOutbound::[::1]:15001\nvirtualInbound::0.0.0.0:15006\nvirtualInbound::[::]:15006\nreadiness::0.0.0.0:15021\n", ""},
		{"GET", "/listeners?format=xml", 400, "format=\"xml\": use text or json\n", ""},
		{"GET", "/clusters?format=xml", 400, "format=\"xml\": use text or json\n", ""},
		{"GET", "/certs", 200, "{\n \"certificates\": []\n}\n", ""},
		{"GET", "/identity", 501, any, ""},
		{"GET", "/identity/handshake", 405, any, ""},
		{"POST", "/identity/handshake?to=a:1", 501, any, ""},
		{"GET", "/init_dump", 200, any, ""},
		{"GET", "/memory", 200, any, ""},
		{"GET", "/server_info", 200, any, ""},
		{"GET", "/config_dump", 200, any, ""},
		{"GET", "/config_dump?resource=dynamic_listeners", 404, "dynamic_listeners not found in config dump\n", ""},
		{"GET", "/config_dump?resource=a.b", 400, "resource=\"a.b\" is not the name of a list: use one such as static_listeners\n", ""},
		{"GET", "/config_dump?mask=listener.*", 400, "mask=\"listener.*\": \"listener.*\" is not a path of fields: use one such as listener.name\n", ""},
		{"GET", "/config_dump?name_regex=(", 400, any, ""},
		{"GET", "/config_dump?name_regex=" + strings.Repeat("a", 2000), 400, any, ""},
		{"GET", "/config_dump?mask=" + strings.Repeat("a", 2000), 400, any, ""},
		{"GET", "/clusters", 200, any, ""},

		{"GET", "/stats", 200, statsText, ""},
		{"GET", "/stats?usedonly&filter=^(server\\.state|listener_manager\\.workers_started)", 200, "listener_manager.workers_started: 1\nserver.state: 0\n", ""},
		{"GET", "/stats?usedonly&filter=downstream_cx_active", 200, "listener.0.0.0.0_15006.downstream_cx_active.worker.a} b: 3\n", ""},
		{"GET", "/stats?usedonly&type=Counters", 200, "cluster.PassthroughCluster.upstream_cx_total: 12\ncluster.PassthroughCluster.upstream_rq_5xx: 4\nistio_requests_total.reporter.destination.source_app.a\"b: 1500000\nlistener.virtualInbound.http.inbound.downstream_rq_2xx: 7\n", ""},
		{"GET", "/stats?type=TextReadouts", 200, "", ""},
		{"GET", "/stats?type=counters", 400, "type=\"counters\": use Counters, Gauges, Histograms, TextReadouts or All\n", ""},
		{"GET", "/stats?format=html", 400, "format=\"html\": use text, json or prometheus\n", ""},
		{"GET", "/stats?filter=[", 400, any, ""},
		{"GET", "/stats?format=prometheus", 200, metricsText, ""},
		{"GET", "/stats/prometheus", 200, metricsText, ""},
		{"GET", "/stats/prometheus?filter=server.state", 200, "# HELP envoy_server_state State\n# TYPE envoy_server_state gauge\nenvoy_server_state 0\n", ""},
		{"GET", "/stats/prometheus?usedonly&filter=upstream_cx", 200, "# TYPE envoy_cluster_upstream_cx_total counter\nenvoy_cluster_upstream_cx_total{cluster_name=\"PassthroughCluster\"} 12\n", ""},
		{"GET", "/stats/prometheus?filter=gc_duration_seconds_sum", 200, "# TYPE go_gc_duration_seconds summary\ngo_gc_duration_seconds_sum 3\n", ""},
		{"GET", "/stats/prometheus?filter=[", 400, any, ""},

		{"POST", "/logging", 200, loggers("info"), ""},
		{"POST", "/logging?level=trace", 200, loggers("trace"), ""},
		{"POST", "/logging?pillion=error", 200, loggers("error"), ""},
		{"POST", "/logging?paths=pillion:debug,pillion:warning", 200, loggers("warning"), ""},
		{"POST", "/logging?pillion=warn", 200, loggers("warning"), ""},
		{"POST", "/logging?paths=pillion", 400, "paths=\"pillion\": use LOGGER:LEVEL, such as pillion:debug\n", ""},
		{"POST", "/logging?paths=paths:debug", 400, "\"paths\" is not a logger: POST /logging without parameters lists them\n", ""},
		{"POST", "/logging?paths=:debug", 400, "\"\" is not a logger: POST /logging without parameters lists them\n", ""},
		{"POST", "/logging?nothing=debug", 400, "\"nothing\" is not a logger: POST /logging without parameters lists them\n", ""},
		{"POST", "/logging?paths=http:debug,nothing:debug", 400, "\"nothing\" is not a logger: POST /logging without parameters lists them\n", ""},
		{"POST", "/logging", 200, loggers("warning"), ""}, // an invalid request changes nothing
		{"POST", "/logging?level=loud", 400, "\"loud\" is not a level: use trace, debug, info, warning, error, critical or off\n", ""},
		{"POST", "/logging?http=loud", 400, "\"loud\" is not a level: use trace, debug, info, warning, error, critical or off\n", ""},
		{"POST", "/logging?level=info&pillion=info", 400, "2 parameters: use one of level=, paths= and LOGGER=\n", ""},
		{"POST", "/logging?level=error", 200, loggers("error"), ""},
		{"POST", "/logging?http=debug", 200, loggers("debug"), ""},
		{"POST", "/logging?router=info", 200, loggers("debug"), ""}, // istioctl sends http:debug,router:info one by one, in any order
		{"POST", "/logging?http=error", 200, loggers("info"), ""},
		{"POST", "/logging?router=off", 200, loggers("error"), ""},
		{"POST", "/logging?paths=rbac=debug,jwt:trace", 200, loggers("trace"), ""},
		{"POST", "/logging?level=warning", 200, loggers("info"), ""}, // istioctl's --reset
		{"POST", "/logging?level=off", 200, loggers("off"), ""},

		{"GET", "/log", 200, "the last lines\n", ""},

		{"POST", "/drain_listeners", 200, ok, "drain"},
		{"POST", "/drain_listeners?inboundonly", 200, ok, "drain-inbound"},
		{"POST", "/drain_listeners?graceful&inboundonly&skip_exit", 200, ok, "drain-graceful-inbound-stay"},
		{"POST", "/drain_listeners?skip_exit", 400, "skip_exit requires graceful\n", ""},
		{"POST", "/quitquitquit", 200, ok, "quit"},
		{"POST", "/healthcheck/fail", 200, ok, "fail"},
		{"POST", "/healthcheck/ok", 200, ok, "ok"},
		{"POST", "/reopen_logs", 200, ok, "reopen"},

		{"GET", "/debug/pprof/", 200, any, ""},
		{"GET", "/debug/pprof/cmdline", 200, strings.Join(os.Args, "\x00"), ""},
		{"GET", "/debug/pprof/symbol", 200, "num_symbols: 0\n", ""},
		{"GET", "/debug/pprof/heap?gc=1&debug=1", 200, any, ""},
		{"GET", "/debug/pprof/profile?seconds=0.01", 200, any, ""},
		{"GET", "/debug/pprof/goroutine?debug=1", 200, any, ""},
		{"GET", "/debug/pprof/trace?seconds=0.01", 200, any, ""},
		{"GET", "/debug/pprof/profile?seconds=1e9", 400, "seconds=\"1e9\": use a number up to 300\n", ""},
		{"GET", "/debug/pprof/trace?seconds=NaN", 400, "seconds=\"NaN\": use a number up to 300\n", ""},
		{"GET", "/debug/pprof/heap/none", 404, any, ""},
		{"POST", "/debug/pprof/symbol", 200, any, ""},
	} {
		got := ask(handler, c.method, c.target)
		if got.Code != c.code || c.body != any && got.Body.String() != c.body {
			t.Errorf("%s %s: %d %q, want %d %q", c.method, c.target, got.Code, got.Body, c.code, c.body)
		}
		if order := told.taken(); order != c.order {
			t.Errorf("%s %s ordered %q, want %q", c.method, c.target, order, c.order)
		}
		if got.Header().Get("Cache-Control") != "no-cache, max-age=0" || got.Header().Get("X-Content-Type-Options") != "nosniff" {
			t.Errorf("%s %s: fields %v", c.method, c.target, got.Header())
		}
		if command := find(strings.Split(c.target, "?")[0]); command != nil {
			met[command.path] = true
		}
	}
	for _, c := range commands {
		if !met[c.path] {
			t.Errorf("no case for %s", c.path)
		}
		for _, method := range []string{"GET", "HEAD", "PUT", "DELETE", "OPTIONS"} {
			if !c.changes {
				continue
			}
			got := ask(handler, method, c.path)
			if got.Code != 405 || got.Body.String() != "Method "+method+" not allowed, POST required." || got.Header().Get("Allow") != "POST" {
				t.Errorf("%s %s: %d %q", method, c.path, got.Code, got.Body)
			}
		}
	}
	if orders := told.taken(); orders != "" {
		t.Errorf("ordered without POST: %s", orders)
	}
}

func TestUnsupportedCommandsAreAnswered501(t *testing.T) {
	var told commanded
	config := sample(&told)
	config.SetLogLevel, config.Drain, config.Quit, config.Health, config.ReopenLogs, config.RecentLog = nil, nil, nil, nil, nil, nil
	config.Page, config.Live, config.Unready = nil, nil, nil
	config.Ready = func() (string, bool) { return "DRAINING", false }
	handler := NewHandler(config)
	for target, want := range map[string]int{
		"/logging": 200, "/logging?level=debug": 501, "/drain_listeners": 501, "/quitquitquit": 501, "/healthcheck/fail": 501,
		"/reopen_logs": 501, "/log": 501, "/live": 404, "/ready": 503, "/init_dump": 200, "/identity": 501, "/identity/handshake": 501,
	} {
		if got := ask(handler, "POST", target); got.Code != want {
			t.Errorf("%s: %d %q, want %d", target, got.Code, got.Body, want)
		}
	}
	if got := ask(handler, "GET", "/ready"); got.Body.String() != "DRAINING\n" {
		t.Errorf("/ready: %q", got.Body)
	}
	if got := ask(handler, "GET", "/", "Accept: text/html"); !strings.HasPrefix(got.Body.String(), "admin commands") {
		t.Errorf("/ without a page: %q", got.Body)
	}
}

// A page of another site, or one whose name resolves to 127.0.0.1, can make a browser send requests.
func TestOnlyThisMachineAndThisSiteAreServed(t *testing.T) {
	var told commanded
	handler := NewHandler(sample(&told))
	for _, c := range []struct {
		method, target string
		fields         []string
		code           int
	}{
		{"GET", "/", []string{"Accept: text/html,*/*"}, 200},
		{"GET", "/ready", []string{"Host: "}, 200},
		{"GET", "/ready", []string{"Host: LOCALHOST"}, 200},
		{"GET", "/ready", []string{"Host: 127.0.0.1"}, 200},
		{"GET", "/ready", []string{"Host: 127.9.9.9:1"}, 200},
		{"GET", "/ready", []string{"Host: [::1]:15000"}, 200},
		{"GET", "/ready", []string{"Host: [::1]"}, 200},
		{"GET", "/ready", []string{"Host: [::ffff:127.0.0.1]:15000", "From: [::1]:4711"}, 200},
		{"GET", "/ready", []string{"Host: evil.example"}, 403},
		{"GET", "/ready", []string{"Host: evil.example:15000"}, 403},
		{"GET", "/live/events", []string{"Host: evil.example:15000"}, 403},
		{"GET", "/debug/pprof/", []string{"Host: evil.example:15000"}, 403},
		{"GET", "/ready", []string{"Host: localhost.evil.example"}, 403},
		{"GET", "/ready", []string{"Host: localhost.:15000"}, 403},
		{"GET", "/ready", []string{"Host: 127.0.0.1.evil.example"}, 403},
		{"GET", "/ready", []string{"Host: 2130706433"}, 403},
		{"GET", "/ready", []string{"Host: 0.0.0.0:15000"}, 403},
		{"GET", "/ready", []string{"Host: [::]:15000"}, 403},
		{"GET", "/ready", []string{"Host: 192.0.2.2:15000"}, 403},
		{"GET", "/ready", []string{"From: 192.0.2.9:4711"}, 403},
		{"GET", "/ready", []string{"From: nonsense"}, 403},
		{"POST", "/quitquitquit", nil, 200},
		{"POST", "/quitquitquit", []string{"Origin: http://localhost:15000", "Sec-Fetch-Site: same-origin"}, 200},
		{"POST", "/quitquitquit", []string{"Origin: http://localhost:15000"}, 200},
		{"POST", "/quitquitquit", []string{"Sec-Fetch-Site: none"}, 200},
		{"POST", "/quitquitquit", []string{"Origin: http://evil.example"}, 403},
		{"POST", "/quitquitquit", []string{"Origin: http://localhost:8080"}, 403}, // possibly a page of the workload
		{"POST", "/quitquitquit", []string{"Origin: null"}, 403},
		{"POST", "/quitquitquit", []string{"Sec-Fetch-Site: cross-site"}, 403},
		{"POST", "/quitquitquit", []string{"Sec-Fetch-Site: same-site"}, 403},
		{"POST", "/quitquitquit", []string{"Host: evil.example:15000", "Origin: http://evil.example:15000"}, 403},
	} {
		got := ask(handler, c.method, c.target, c.fields...)
		if got.Code != c.code {
			t.Errorf("%s %s with %q: %d %q, want %d", c.method, c.target, c.fields, got.Code, got.Body, c.code)
		}
		if orders := told.taken(); (orders == "quit") != (c.method == "POST" && c.code == 200) {
			t.Errorf("%s %s with %q ordered %q", c.method, c.target, c.fields, orders)
		}
	}
}

func TestAProfilesSecondsAreBoundedInAForm(t *testing.T) {
	var told commanded
	request := httptest.NewRequest("POST", "/debug/pprof/profile", strings.NewReader("seconds=301"))
	request.Host, request.RemoteAddr = "localhost", "127.0.0.1:4711"
	request.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	recorder := httptest.NewRecorder()
	NewHandler(sample(&told)).ServeHTTP(recorder, request)
	if recorder.Code != 400 {
		t.Errorf("%d %q", recorder.Code, recorder.Body)
	}
}

func TestABrowserGetsThePage(t *testing.T) {
	var told commanded
	handler := NewHandler(sample(&told))
	if got := ask(handler, "GET", "/", "Accept: text/html"); got.Body.String() != "a page" {
		t.Errorf("a browser gets %q", got.Body)
	}
	if got := ask(handler, "GET", "/", "Accept: */*"); !strings.HasPrefix(got.Body.String(), "admin commands are:\n  /: ") {
		t.Errorf("curl gets %q", got.Body)
	}
}

func TestRequestsBeyondTheLimitAreTurnedAway(t *testing.T) {
	var told commanded
	config := sample(&told)
	entered, leave := make(chan struct{}), make(chan struct{})
	config.Metrics = gatherer(func() []promtext.MetricFamily {
		entered <- struct{}{}
		<-leave
		return nil
	})
	handler := NewHandler(config)
	var asking sync.WaitGroup
	for range maxRequests {
		asking.Go(func() { ask(handler, "GET", "/stats") })
		<-entered
	}
	if got := ask(handler, "GET", "/ready"); got.Code != 503 {
		t.Errorf("one more: %d", got.Code)
	}
	if got := ask(handler, "GET", "/live"); got.Code != 200 {
		t.Errorf("a stream: %d", got.Code)
	}
	close(leave)
	asking.Wait()
	if got := ask(handler, "GET", "/ready"); got.Code != 200 {
		t.Errorf("after that: %d", got.Code)
	}
}

func TestQuitComesAfterItsAnswer(t *testing.T) {
	var told commanded
	config := sample(&told)
	quit, received := make(chan struct{}), make(chan struct{})
	config.Quit = func() {
		<-received // the client can only have received bytes that were sent
		close(quit)
	}
	server := httptest.NewServer(NewHandler(config))
	defer server.Close()
	response, err := server.Client().Post(server.URL+"/quitquitquit", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	close(received)
	<-quit
	response.Body.Close()
}

// golden lists the responses that are in testdata as a whole, with their protobuf messages.
var golden = []struct{ file, target, message string }{
	{"config_dump.json", "/config_dump?include_eds", "envoy.admin.v3.ConfigDump"},
	{"config_dump_mask.json", "/config_dump?resource=static_listeners&mask=listener.name,listener.filter_chains.name", "envoy.admin.v3.ConfigDump"},
	{"config_dump_name.json", "/config_dump?name_regex=Passthrough.*&mask=bootstrap.node.id,static_clusters.cluster.name,static_listeners,static_route_configs", "envoy.admin.v3.ConfigDump"},
	{"clusters.txt", "/clusters", ""},
	{"clusters.json", "/clusters?format=json", "envoy.admin.v3.Clusters"},
	{"listeners.json", "/listeners?format=json", "envoy.admin.v3.Listeners"},
	{"init_dump.json", "/init_dump", "envoy.admin.v3.UnreadyTargetsDumps"},
	{"certs.json", "/certs", "envoy.admin.v3.Certificates"},
	{"controlled_config_dump.json", "/config_dump?include_eds&name_regex=(?:out|coming|ref|198|80|kube|wasm).*", "envoy.admin.v3.ConfigDump"},
	{"controlled_clusters.txt", "/clusters", ""},
	{"controlled_clusters.json", "/clusters?format=json", "envoy.admin.v3.Clusters"},
	{"controlled_init_dump.json", "/init_dump", "envoy.admin.v3.UnreadyTargetsDumps"},
	{"stats.json", "/stats?format=json", ""},
	{"help.txt", "/help", ""},
}

func TestGoldens(t *testing.T) {
	var told commanded
	handler := NewHandler(sample(&told))
	controlled := NewHandler(withControlPlane(controlled()))
	for _, g := range golden {
		handler := handler
		if strings.HasPrefix(g.file, "controlled_") {
			handler = controlled
		}
		got := ask(handler, "GET", g.target)
		name := filepath.Join("testdata", g.file)
		if *update {
			if err := os.WriteFile(name, got.Body.Bytes(), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if got.Code != 200 || !bytes.Equal(got.Body.Bytes(), want) {
			t.Errorf("%s: %d, not as %s:\n%s", g.target, got.Code, name, got.Body)
		}
		if kind := got.Header().Get("Content-Type"); (kind == "application/json") != strings.HasSuffix(g.file, ".json") {
			t.Errorf("%s is %s", g.target, kind)
		}
	}
}

func TestWithTPROXYTheInboundListenerIsTransparent(t *testing.T) {
	var told commanded
	config := sample(&told)
	config.Carrying.TPROXYMark = 77
	dump := ask(NewHandler(config), "GET", "/config_dump").Body.String()
	for part, want := range map[string]int{
		`"transparent": true`: 1, `"name": "envoy.filters.listener.original_src"`: 1, `"mark": 77`: 1,
		"upstream_bind_config": 0, // the source is the client's address
	} {
		if got := strings.Count(dump, part); got != want {
			t.Errorf("%s is there %d times, want %d", part, got, want)
		}
	}
}

// Envoy's own messages read these responses, with unknown fields as errors. They are in a module of their own.
func TestEveryJSONIsEnvoysMessage(t *testing.T) {
	var told commanded
	full := sample(&told)
	bare := Config{ // an agent without any setting
		Started: time.Now(), Address: full.Address, Flows: flow.NewTable(), Ready: full.Ready, Log: full.Log,
		Listeners: func() []Listener {
			return []Listener{{Name: VirtualInbound, Addresses: addressPorts("0.0.0.0:15006")}, {Name: "status", Addresses: addressPorts("[::]:15020")}}
		},
		Carrying: Carrying{OwnAddresses: func() []netip.Addr { return nil }, OpaquePorts: [][2]uint16{{1, 65535}}, TPROXYMark: 1337},
	}
	var given bytes.Buffer
	encoder := json.NewEncoder(&given)
	for _, config := range []Config{full, bare, withControlPlane(controlled())} {
		handler := NewHandler(config)
		add := func(target, message string) {
			if message != "" {
				encoder.Encode(map[string]string{"name": target, "type": message, "body": ask(handler, "GET", target).Body.String()})
			}
		}
		for _, g := range golden {
			if !strings.Contains(g.target, "mask=") { // a mask may remove required fields
				add(g.target, g.message)
			}
		}
		add("/config_dump", "envoy.admin.v3.ConfigDump")
		add("/config_dump?resource=static_listeners", "envoy.admin.v3.ConfigDump")
		add("/config_dump?resource=static_route_configs", "envoy.admin.v3.ConfigDump")
		add("/config_dump?include_eds&resource=static_endpoint_configs", "envoy.admin.v3.ConfigDump")
		add("/config_dump?resource=static_clusters&name_regex=.*Hole.*", "envoy.admin.v3.ConfigDump")
		add("/server_info", "envoy.admin.v3.ServerInfo")
		add("/memory", "envoy.admin.v3.Memory")
	}
	program := filepath.Join(t.TempDir(), "envoyjson")
	build := exec.Command("go", "build", "-buildvcs=false", "-o", program, "./envoyjson")
	build.Dir = filepath.Join("..", "..", "e2e", "testdata", "peers")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building envoyjson (make modules fetches what it needs): %v\n%s", err, out)
	}
	judge := func(given []byte) string {
		cmd := exec.Command(program)
		cmd.Stdin = bytes.NewReader(given)
		out, err := cmd.CombinedOutput()
		if (err != nil) != (len(out) > 0) {
			t.Errorf("envoyjson: %v: %s", err, out)
		}
		return string(out)
	}
	if complaints := judge(given.Bytes()); complaints != "" {
		t.Error(complaints)
	}
	for _, wrong := range []string{`{"no_field":1}`, `{"configs":[{"@type":"type.googleapis.com/envoy.admin.v3.ClustersConfigDump","no_field":1}]}`,
		`{"configs":[{"@type":"type.googleapis.com/envoy.config.listener.v3.Filter"}]}`} { // a filter without a name is invalid
		line, _ := json.Marshal(map[string]string{"name": "wrong", "type": "envoy.admin.v3.ConfigDump", "body": wrong})
		if judge(line) == "" {
			t.Errorf("envoyjson takes %s", wrong)
		}
	}
}

// istioctl builds its tables from these sections, names and addresses.
func TestTheDumpIsReadAsIstioctlReadsIt(t *testing.T) {
	var told commanded
	handler := NewHandler(sample(&told))
	type address struct {
		Socket struct {
			Address string
			Port    int `json:"port_value"`
		} `json:"socket_address"`
	}
	type named struct {
		Type    string `json:"@type"`
		Name    string
		Address address
		Chains  []struct {
			Name    string
			Filters []struct{ Name string }
		} `json:"filter_chains"`
	}
	var dump struct {
		Configs []struct {
			Type      string                     `json:"@type"`
			Listeners []struct{ Listener named } `json:"static_listeners"`
			Clusters  []struct{ Cluster named }  `json:"static_clusters"`
			Endpoints []struct {
				Config struct {
					Cluster   string `json:"cluster_name"`
					Endpoints []struct {
						Hosts []struct{ Endpoint struct{ Address address } } `json:"lb_endpoints"`
					}
				} `json:"endpoint_config"`
			} `json:"static_endpoint_configs"`
		}
	}
	if err := json.Unmarshal(ask(handler, "GET", "/config_dump?include_eds=true").Body.Bytes(), &dump); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, config := range dump.Configs {
		got = append(got, strings.TrimPrefix(config.Type, "type.googleapis.com/envoy.admin.v3."))
		for _, l := range config.Listeners {
			got = append(got, l.Listener.Name+" "+l.Listener.Address.Socket.Address)
		}
		for _, c := range config.Clusters {
			got = append(got, c.Cluster.Name)
		}
		for _, e := range config.Endpoints {
			for _, locality := range e.Config.Endpoints {
				for _, host := range locality.Hosts {
					got = append(got, e.Config.Cluster+" "+host.Endpoint.Address.Socket.Address)
				}
			}
		}
	}
	want := []string{
		"BootstrapConfigDump",
		"ClustersConfigDump", "BlackHoleCluster", "InboundPassthroughCluster", "PassthroughCluster",
		"EndpointsConfigDump", "InboundPassthroughCluster 192.0.2.2", "PassthroughCluster 203.0.113.7", "PassthroughCluster 2001:db8::7",
		"ListenersConfigDump", "virtualOutbound 127.0.0.1", "virtualInbound 0.0.0.0", "readiness 0.0.0.0",
		"ScopedRoutesConfigDump", "RoutesConfigDump", "SecretsConfigDump", "EcdsConfigDump",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}

// istioctl prints a row for each chain of a listener.
func TestChainsOfAListenerHaveDifferentNames(t *testing.T) {
	var told commanded
	var dump struct {
		Configs []struct {
			Listeners []struct {
				Listener struct {
					Name   string
					Chains []struct {
						Name  string
						Match struct {
							Port int `json:"destination_port"`
						} `json:"filter_chain_match"`
						Metadata struct {
							Filter map[string]struct {
								Refused []int `json:"refused_ports"`
							} `json:"filter_metadata"`
						}
					} `json:"filter_chains"`
				}
			} `json:"static_listeners"`
		}
	}
	if err := json.Unmarshal(ask(NewHandler(sample(&told)), "GET", "/config_dump").Body.Bytes(), &dump); err != nil {
		t.Fatal(err)
	}
	refused := 0
	for _, config := range dump.Configs {
		for _, l := range config.Listeners {
			seen := make(map[string]bool)
			for _, chain := range l.Listener.Chains {
				if seen[chain.Name] {
					t.Errorf("%s has several chains %q", l.Listener.Name, chain.Name)
				}
				seen[chain.Name] = true
				if ports := chain.Metadata.Filter["pillion"].Refused; len(ports) > 0 {
					refused++
					if want := map[string]int{VirtualOutbound: 15001, VirtualInbound: 15006}[l.Listener.Name]; chain.Match.Port != want || !slices.Equal(ports, []int{15001, 15006}) {
						t.Errorf("%s: port %d, ports %v", chain.Name, chain.Match.Port, ports)
					}
				}
			}
		}
	}
	if refused != 2 {
		t.Errorf("%d chains with refused ports, want 2", refused)
	}
}

// istioctl prints the build version as MAJOR.MINOR.PATCH-LABEL.
func TestBuildVersion(t *testing.T) {
	for version, want := range map[string]string{
		"v1.2.3": "1.2.3-pillion", "1.2.3": "1.2.3-pillion", "v0.10.0-3-g642d4a8-dirty": "0.10.0-pillion-3-g642d4a8-dirty",
		"642d4a8": "0.0.0-pillion-642d4a8", "": "0.0.0-pillion", "v1.2": "0.0.0-pillion-v1.2", "v99999999999.1.1": "0.0.0-pillion-v99999999999.1.1",
	} {
		var told commanded
		config := sample(&told)
		config.Version = version
		var dump struct {
			Configs []struct {
				Bootstrap struct {
					Node struct {
						Version *string `json:"user_agent_version"` // excludes the build version
						Build   struct {
							Version struct {
								Major int `json:"major_number"`
								Minor int `json:"minor_number"`
								Patch int
							}
							Metadata map[string]string
						} `json:"user_agent_build_version"`
					}
				}
			}
		}
		if err := json.Unmarshal(ask(NewHandler(config), "GET", "/config_dump").Body.Bytes(), &dump); err != nil {
			t.Fatal(err)
		}
		node := dump.Configs[0].Bootstrap.Node
		got := fmt.Sprintf("%d.%d.%d-%s", node.Build.Version.Major, node.Build.Version.Minor, node.Build.Version.Patch, node.Build.Metadata["build.label"])
		if got != want || node.Version != nil {
			t.Errorf("%q: %s, want %s", version, got, want)
		}
	}
}

// Clients choose destinations, so a response has at most maxHosts of them.
func TestClustersAreBounded(t *testing.T) {
	var told commanded
	config := sample(&told)
	config.Flows = flow.NewTable()
	for i := range maxHosts + 100 {
		r := flow.Open(flow.Outbound, netip.MustParseAddrPort("198.51.100.2:4711"))
		r.OriginalDestination = netip.AddrPortFrom(netip.MustParseAddr("203.0.113.7"), uint16(i+1))
		config.Flows.List(r)
		config.Flows.Carry(r, flow.Opaque, flow.Hello{})
	}
	if got := strings.Count(ask(NewHandler(config), "GET", "/clusters").Body.String(), "::cx_active::1\n"); got != maxHosts {
		t.Errorf("%d hosts, want %d", got, maxHosts)
	}
}

// No query and no header makes the handler panic.
func FuzzQueries(f *testing.F) {
	for _, seed := range []string{"mask=a.b,a,a.b.c&resource=static_listeners", "name_regex=(?i)a*", "filter=^a$&usedonly", "format=json&include_eds", "paths=pillion:debug,http=off", "level=warn"} {
		f.Add(seed, "localhost")
	}
	f.Add("", "[::1")
	var told commanded
	config := sample(&told)
	config.Quit = nil
	handler := NewHandler(config)
	f.Fuzz(func(t *testing.T, query, host string) {
		for _, path := range []string{"/config_dump", "/stats", "/stats/prometheus", "/clusters", "/listeners", "/logging", "/drain_listeners"} {
			request := httptest.NewRequest("POST", path, nil)
			request.URL.RawQuery, request.Host, request.RemoteAddr = query, host, "127.0.0.1:4711"
			recorder := httptest.NewRecorder()
			handler.ServeHTTP(recorder, request)
			if kind := recorder.Header().Get("Content-Type"); kind == "application/json" && !json.Valid(recorder.Body.Bytes()) {
				t.Errorf("%s?%s: %q", path, query, recorder.Body)
			}
		}
	})
}

func FuzzMetrics(f *testing.F) {
	for _, seed := range []string{"# TYPE a counter\na 1\n", "# TYPE h histogram\nh_bucket{le=\"1\"} 2\nh_count 2\n", "envoy_cluster_x{cluster_name=\"c\",a=\"b\\\"\"} NaN\n"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		for _, family := range statsOf(gathered(text).Gather()) {
			for _, s := range family.stats {
				if n := number(s.value) + s.quantiles(); n == "" || strings.Contains(s.name, "\n") {
					t.Errorf("%q", s.name)
				}
			}
		}
	})
}
