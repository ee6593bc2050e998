package metrics

import (
	"compress/gzip"
	"flag"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"

	"github.com/pillion-proxy/pillion/internal/dns"
	"github.com/pillion-proxy/pillion/internal/flow"
)

var update = flag.Bool("update", false, "write the golden files")

// everything returns a Metrics that has counted flows of each kind and has all sources.
func everything() *Metrics { return everythingWith(Options{Version: "1.2.3"}) }

func everythingWith(o Options) *Metrics {
	m := New(pod, o)
	table := flow.NewTable(m)
	resolver := new(dns.Stats)
	resolver.UDPQueries.Store(50)
	resolver.Answers[0].Store(40)
	resolver.Answers[9].Store(1)
	resolver.UpstreamQueries.Store(30)
	resolver.UpstreamTCP.Store(4)
	m.Watch(table, Sources{
		DNS: resolver,
		Upstream: func(d flow.Direction) Upstream {
			return Upstream{Active: 1 + int(d), Connected: 20, Failed: 3, Redialled: 2, Reused: 40, Missed: 5, Retried: 6, Copied: 8, CopiesDropped: 7}
		},
		AccessLog: func() (uint64, uint64) { return 100, 7 },
		Spans:     func() (uint64, uint64, uint64) { return 90, 8, 2 },
		Backoffs:  func() uint64 { return 8 },
		Pipes:     func() int { return 2 },
		Held:      func() (int, int, uint64) { return 1000, 2000, 3 },
		Gates:     func() []Gate { return []Gate{{"listeners", true}, {"addresses", false}} },
		Draining:  func() bool { return true },
		ControlPlane: func() ControlPlane {
			return ControlPlane{
				Connected: true, Streams: 3, Failed: 4, Lost: 2, LastPush: time.Now(), Initialized: true, Initializing: 40 * time.Millisecond,
				Types: []PushType{
					{Name: "CDS", Resources: 40, Accepted: 5, Rejected: 1, Bytes: 50_000, Decoding: 1500 * time.Microsecond},
					{Name: "LDS", Resources: 21, Accepted: 6, Rejected: 2, Bytes: 60_000, Decoding: 2500 * time.Microsecond},
				},
				Findings: []Findings{{"cosmetic", 3}, {"traffic", 2}, {"security", 1}},
				Expiry:   time.Now().Add(time.Hour), Renewals: 2, Failures: 1, Calls: 7, FailedCalls: 5,
				Authz: AuthzCounts{Allowed: 6, Denied: 4, Unanswered: 2, Fetched: 3, Unfetched: 1},
			}
		},
	})
	in, out := connection(table, flow.Inbound, flow.HTTP11), connection(table, flow.Outbound, flow.HTTP2)
	r := request(in, "reviews:9080", 200)
	r.Duration = 12500 * time.Microsecond
	r.Received.Store(3)
	r.Sent.Store(700)
	r.OriginalDestination = netip.MustParseAddrPort("192.0.2.1:9080")
	r.HTTP.DryRun = &flow.DryRun{Prefix: "istio_dry_run_deny_", Policy: "ns[prod]-policy[p]-rule[0]", Denied: true, Next: &flow.DryRun{
		Prefix: "istio_dry_run_allow_", Next: &flow.DryRun{Prefix: "istio_ext_authz_", Denied: true}}}
	m.Closed(r)
	r = call(out, "ratings.prod.svc.cluster.local:9080", "14")
	r.Duration = 2 * time.Hour
	r.HTTP.Messages, r.HTTP.ResponseMessages = 5, 6
	m.Closed(r)
	tcp := connection(table, flow.Outbound, flow.Opaque)
	tcp.Received.Store(11)
	tcp.Sent.Store(22)
	tcp.Close(table, flow.DownstreamReset, nil)
	connection(table, flow.Outbound, flow.TLS).Received.Store(100)
	flow.Open(flow.Outbound, peer).Close(table, flow.Loop, nil)
	return m
}

// The golden file omits the runtime's metrics, most buckets, and reasons that did not occur. The labels that all of Istio's
// metrics share are listed only for requests and opened connections.
func TestGolden(t *testing.T) {
	const golden = "testdata/exposition.golden"
	out := regexp.MustCompile(`^(# (HELP|TYPE) )?(go_|process_|envoy_server_(uptime|memory|concurrency)|pillion_mesh_push_age|istio_agent_cert_expiry)|_bucket{.*le="([1-9][0-9]*)"|^pillion_flows_total.* 0\n`)
	shared := regexp.MustCompile(`source_workload=.*destination_cluster="[^"]*"`)
	var got strings.Builder
	for line := range strings.Lines(text(t, everything())) {
		if out.MatchString(line) {
			continue
		}
		if !strings.HasPrefix(line, "istio_requests_total{") && !strings.HasPrefix(line, "istio_tcp_connections_opened_total{") {
			line = shared.ReplaceAllString(line, "...")
		}
		got.WriteString(line)
	}
	if *update {
		if err := os.WriteFile(golden, []byte(got.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if got.String() != string(want) {
		t.Errorf("differs from %s; go test ./internal/metrics -update writes it. Now:\n%s", golden, &got)
	}
}

// istioLabels are the labels of Istio's metrics, in Istio's order.
const istioLabels = "reporter source_workload source_canonical_service source_canonical_revision source_workload_namespace " +
	"source_principal source_app source_version source_cluster destination_workload destination_workload_namespace " +
	"destination_principal destination_app destination_version destination_service destination_canonical_service " +
	"destination_canonical_revision destination_service_name destination_service_namespace destination_cluster"

const ofRequests = istioLabels + " request_protocol response_code grpc_response_status response_flags connection_security_policy"
const ofTCP = istioLabels + " request_protocol response_flags connection_security_policy"

func TestLabelsHaveIstiosOrder(t *testing.T) {
	families := exposition(t, everything())
	for name, labels := range map[string]string{
		"istio_requests_total": ofRequests, "istio_request_duration_milliseconds": ofRequests, "istio_request_bytes": ofRequests,
		"istio_response_bytes": ofRequests, "istio_request_messages_total": istioLabels, "istio_response_messages_total": istioLabels,
		"istio_tcp_connections_opened_total": ofTCP, "istio_tcp_connections_closed_total": ofTCP,
		"istio_tcp_sent_bytes_total": ofTCP, "istio_tcp_received_bytes_total": ofTCP, "istio_build": "component tag",
	} {
		if families[name] == nil {
			t.Errorf("no %s", name)
		}
		for _, metric := range families[name].GetMetric() {
			var got []string
			for _, l := range metric.Label {
				got = append(got, l.GetName())
			}
			if strings.Join(got, " ") != labels {
				t.Errorf("%s has labels %v", name, got)
			}
		}
	}
}

// The panels of Istio's dashboards and Kiali's graph find their series. The list describes its own format; e2e runs the same
// list against an agent that carries traffic.
func TestDashboardsFindTheirSeries(t *testing.T) {
	const list = "testdata/dashboards.txt"
	text, err := os.ReadFile(list)
	if err != nil {
		t.Fatal(err)
	}
	families := exposition(t, everything())
	for line := range strings.Lines(string(text)) {
		if strings.HasPrefix(line, "#") {
			continue
		}
		q := strings.Split(strings.TrimSuffix(line, "\n"), ";")
		panel, metric, where, by := q[0], strings.TrimSpace(q[1]), strings.Fields(q[2]), strings.Fields(q[3])
		found := slices.ContainsFunc(families[metric].GetMetric(), func(metric *dto.Metric) bool {
			for _, by := range by {
				if by == "le" && metric.Histogram == nil ||
					by != "le" && !slices.ContainsFunc(metric.Label, func(l *dto.LabelPair) bool { return l.GetName() == by }) {
					return false
				}
			}
			return matches(metric, where)
		})
		if !found {
			t.Errorf("%s: no %s with %s by %s", panel, metric, where, by)
		}
	}
}

func TestNamesPassPromlint(t *testing.T) {
	problems, err := promlint.New(strings.NewReader(text(t, everything()))).Lint()
	if err != nil {
		t.Fatal(err)
	}
	// Names of Istio and Envoy; existing queries depend on them.
	given := []string{"istio_request_duration_milliseconds", "envoy_cluster_upstream_cx_connect_fail", "envoy_cluster_upstream_rq",
		"envoy_cluster_upstream_rq_retry", "envoy_listener_http_downstream_rq", "envoy_cluster_manager_cds_update_rejected",
		"envoy_cluster_manager_cds_update_success", "envoy_listener_manager_lds_update_rejected", "envoy_listener_manager_lds_update_success",
		"istio_agent_istiod_connection_failures", "istio_agent_istiod_connection_terminations", "istio_agent_num_failed_outgoing_requests",
		"istio_agent_num_outgoing_requests", "envoy_server_initialization_time_ms", "envoy_http_inbound_0_0_0_0_9080_rbac"}
	for _, p := range problems {
		if !slices.Contains(given, p.Metric) {
			t.Errorf("%s: %s", p.Metric, p.Text)
		}
	}
	if len(problems) != len(given) {
		t.Errorf("%d problems: %v", len(problems), problems)
	}
}

func TestOpenMetrics(t *testing.T) {
	var text strings.Builder
	if err := everything().Write(&text, true); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"# TYPE istio_requests counter\n", "# TYPE istio_request_bytes histogram\n", `le="0.5"} 0`, "\n# EOF\n"} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("no %q", want)
		}
	}
}

func TestMetricsWithoutSourceAreOmitted(t *testing.T) {
	families := exposition(t, New(pod, Options{Version: "v"}))
	for _, name := range []string{"pillion_open_connections", "pillion_pool_reused_total", "pillion_gate_open", "pillion_pipes",
		"pillion_access_log_written_total", "pillion_spans_exported_total", "pillion_held_bytes", "pillion_accept_backoffs_total", "envoy_cluster_upstream_cx_active"} {
		if families[name] != nil {
			t.Errorf("%s is present", name)
		}
	}
	for _, name := range []string{"pillion_flows_total", "pillion_connections_total", "istio_build", "envoy_server_live",
		"go_goroutines", "process_resident_memory_bytes", "process_open_fds", "process_max_fds"} {
		if families[name] == nil {
			t.Errorf("%s is missing", name)
		}
	}
}

func TestHandler(t *testing.T) {
	handler := everything().Handler()
	for _, c := range []struct {
		method, path, accept, encoding string
		code                           int
		kind, begins                   string
	}{
		{"GET", Path, "", "", 200, "text/plain; version=0.0.4; charset=utf-8", "# HELP envoy_"},
		{"GET", Path + "?usedonly", "*/*", "", 200, "text/plain; version=0.0.4; charset=utf-8", "# HELP envoy_"},
		{"GET", Path, "application/openmetrics-text; version=1.0.0", "", 200, "application/openmetrics-text; version=1.0.0; charset=utf-8", "# HELP envoy_"},
		{"GET", Path, "", "gzip", 200, "text/plain; version=0.0.4; charset=utf-8", "# HELP envoy_"},
		{"HEAD", Path, "", "", 200, "text/plain; version=0.0.4; charset=utf-8", ""},
		{"POST", Path, "", "", 405, "", ""},
		{"GET", "/metrics", "", "", 404, "", ""},
		{"GET", "/", "", "", 404, "", ""},
		{"GET", Path + "/x", "", "", 404, "", ""},
	} {
		r := httptest.NewRequest(c.method, c.path, nil)
		r.Header.Set("Accept", c.accept)
		r.Header.Set("Accept-Encoding", c.encoding)
		answer := httptest.NewRecorder()
		handler.ServeHTTP(answer, r)
		if answer.Code != c.code {
			t.Errorf("%s %s: %d, want %d", c.method, c.path, answer.Code, c.code)
		}
		if c.code != http.StatusOK {
			continue
		}
		kind, _, _ := strings.Cut(answer.Header().Get("Content-Type"), "; escaping")
		if kind != c.kind || answer.Header().Get("Content-Encoding") != c.encoding {
			t.Errorf("%s %q: %v", c.method, c.accept, answer.Header())
		}
		var body io.Reader = answer.Body
		if c.encoding == "gzip" {
			var err error
			if body, err = gzip.NewReader(body); err != nil {
				t.Fatal(err)
			}
		}
		if text, err := io.ReadAll(body); err != nil || !strings.HasPrefix(string(text), c.begins) {
			t.Errorf("%s %q: %.100q, %v", c.method, c.accept, text, err)
		}
	}
}

// held is a client that reads its answer only after release is closed.
type held struct {
	*httptest.ResponseRecorder
	begun, release chan struct{}
}

func (h *held) Write(b []byte) (int, error) {
	select {
	case h.begun <- struct{}{}:
	default:
	}
	<-h.release
	return h.ResponseRecorder.Write(b)
}

func TestSlowReadersAreBounded(t *testing.T) {
	handler := everything().Handler()
	release := make(chan struct{})
	done := make(chan struct{}, maxScrapes)
	for range maxScrapes {
		h := &held{httptest.NewRecorder(), make(chan struct{}, 1), release}
		go func() {
			handler.ServeHTTP(h, httptest.NewRequest("GET", Path, nil))
			done <- struct{}{}
		}()
		<-h.begun
	}
	answer := httptest.NewRecorder()
	handler.ServeHTTP(answer, httptest.NewRequest("GET", Path, nil))
	if answer.Code != http.StatusServiceUnavailable {
		t.Errorf("status of the next scrape = %d, want 503", answer.Code)
	}
	close(release)
	for range maxScrapes {
		<-done
	}
}
