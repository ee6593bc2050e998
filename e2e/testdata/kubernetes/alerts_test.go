package kubernetes

import (
	"maps"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/rulefmt"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/tsdb/chunkenc"
	"github.com/prometheus/prometheus/tsdb/chunks"
	"github.com/prometheus/prometheus/util/annotations"
	"sigs.k8s.io/yaml"
)

const alertsFile = "deploy/helm/pillion/alerts/pillion.yaml"

// alerts returns the alerts after Prometheus' own check.
func alerts(t *testing.T) []rulefmt.Rule {
	t.Helper()
	var o struct{ Spec any }
	if err := yaml.Unmarshal([]byte(read(t, alertsFile)), &o); err != nil {
		t.Fatal(err)
	}
	text, err := yaml.Marshal(o.Spec)
	if err != nil {
		t.Fatal(err)
	}
	groups, failed := rulefmt.Parse(text, false, model.UTF8Validation, parser.NewParser(parser.Options{}), nil)
	if len(failed) > 0 || len(groups.Groups) != 1 {
		t.Fatalf("%d groups: %v", len(groups.Groups), failed)
	}
	return groups.Groups[0].Rules
}

// apiServerMetrics are metrics of API servers. The agent has all others.
var apiServerMetrics = map[string][]string{
	"apiserver_admission_webhook_rejection_count": {"name", "error_type", "operation", "type", "rejection_code"},
	"apiserver_admission_webhook_fail_open_count": {"name", "type"},
}

func TestAlertsQueryExistingMetricsAndHaveARunbook(t *testing.T) {
	known, asked := names(t), make(map[string]bool)
	maps.Copy(known, apiServerMetrics)
	document := read(t, "docs/troubleshooting.md")
	var described, defined []string
	for _, m := range regexp.MustCompile("(?m)^### (Pillion\\w+)\n\n[^#]{80}").FindAllStringSubmatch(document, -1) {
		described = append(described, m[1])
	}
	for _, rule := range alerts(t) {
		by := ask(t, rule.Alert, rule.Expr, "", nil, known, asked)
		defined = append(defined, rule.Alert)
		if want := "https://github.com/pillion-proxy/pillion/blob/main/docs/troubleshooting.md#" + strings.ToLower(rule.Alert); rule.Annotations["runbook_url"] != want {
			t.Errorf("%s: the runbook is %s, want %s", rule.Alert, rule.Annotations["runbook_url"], want)
		}
		if rule.For == 0 || !slices.Contains([]string{"critical", "warning", "info"}, rule.Labels["severity"]) || rule.Annotations["description"] == "" {
			t.Errorf("%s: %+v", rule.Alert, rule)
		}
		for _, m := range regexp.MustCompile(`\$labels\.(\w+)`).FindAllStringSubmatch(rule.Annotations["summary"]+rule.Annotations["description"], -1) {
			if !slices.Contains(by, m[1]) {
				t.Errorf("%s: the text has the label %s, the alert only %v", rule.Alert, m[1], by)
			}
		}
	}
	slices.Sort(defined)
	slices.Sort(described)
	if !slices.Equal(defined, described) {
		t.Errorf("the alerts are\n%v\nthe document has entries for\n%v", defined, described)
	}
}

// healthy is an agent under load without faults, for an hour.
const healthy = `
  pillion_gate_open{namespace="shop", pod="web", gate="inbound"} 1x60
  istio_requests_total{namespace="shop", pod="web", reporter="destination", response_code="200"} 0+600x60
  istio_requests_total{namespace="shop", pod="web", reporter="destination", response_code="500"} 0+6x60
  pillion_flows_total{namespace="shop", pod="web", direction="outbound", reason="completed"} 0+600x60
  pillion_flows_total{namespace="shop", pod="web", direction="outbound", reason="upstream_refused"} 0+6x60
  pillion_flows_total{namespace="shop", pod="web", direction="inbound", reason="max_connections"} 0x60
  pillion_flows_total{namespace="shop", pod="web", direction="inbound", reason="loop"} 0x60
  process_open_fds{namespace="shop", pod="web"} 100x60
  process_max_fds{namespace="shop", pod="web"} 1000x60
  pillion_accept_backoffs_total{namespace="shop", pod="web"} 3x60
  pillion_mesh_connected{namespace="shop", pod="web"} 1x60
  pillion_mesh_findings{namespace="shop", pod="web", class="security"} 0x60
  pillion_mesh_findings{namespace="shop", pod="web", class="traffic"} 2x60
  istio_agent_cert_expiry_seconds{namespace="shop", pod="web", resource_name="default"} 1800x60
  pillion_identity_failures_total{namespace="shop", pod="web"} 3x60
  pillion_access_log_dropped_total{namespace="shop", pod="web"} 7x60
  pillion_metrics_folded_requests_total{namespace="shop", pod="web", direction="inbound"} 2x60
  pillion_dns_queries_total{namespace="shop", pod="web", transport="udp"} 0+600x60
  pillion_dns_unanswered_queries_total{namespace="shop", pod="web"} 0+6x60
  apiserver_admission_webhook_rejection_count{name="inject.pillion.dev", error_type="calling_webhook_error"} 4x60
  apiserver_admission_webhook_rejection_count{name="inject.pillion.dev", error_type="no_error"} 0+6x60
  apiserver_admission_webhook_fail_open_count{name="inject.pillion.dev", type="admit"} 4x60
  apiserver_admission_webhook_fail_open_count{name="other.example", type="admit"} 0+6x60
`

// faults are series of another pod, or of the API server, at which an alert fires.
var faults = map[string]string{
	"PillionNotReady":               `pillion_gate_open{namespace="shop", pod="bad", gate="inbound"} 0x60`,
	"PillionServerErrors":           `istio_requests_total{namespace="shop", pod="bad", reporter="destination", response_code="503"} 0+60x60`,
	"PillionUpstreamFailures":       `pillion_flows_total{namespace="shop", pod="bad", direction="outbound", reason="upstream_timeout"} 0+60x60`,
	"PillionConnectionsRefused":     `pillion_flows_total{namespace="shop", pod="bad", direction="inbound", reason="no_descriptors"} 0+1x60`,
	"PillionMisdirectedConnections": `pillion_flows_total{namespace="shop", pod="bad", direction="inbound", reason="no_original_destination"} 0+1x60`,
	"PillionMeshRefusals":           `pillion_flows_total{namespace="shop", pod="bad", direction="inbound", reason="mesh_refused"} 0+1x60`,
	"PillionControlPlaneLost":       `pillion_mesh_connected{namespace="shop", pod="bad"} 0x60`,
	"PillionConfigurationRefused":   `pillion_mesh_findings{namespace="shop", pod="bad", class="security"} 2x60`,
	"PillionCertificateExpiring": "istio_agent_cert_expiry_seconds{namespace=\"shop\", pod=\"bad\", resource_name=\"default\"} 1800x60\n" +
		`  pillion_identity_failures_total{namespace="shop", pod="bad"} 0+1x60`,
	"PillionDescriptorsLow": "process_open_fds{namespace=\"shop\", pod=\"bad\"} 950x60\n  process_max_fds{namespace=\"shop\", pod=\"bad\"} 1000x60",
	"PillionAcceptStalled":  `pillion_accept_backoffs_total{namespace="shop", pod="bad"} 0+1x60`,
	"PillionAccessLogLost":  `pillion_access_log_dropped_total{namespace="shop", pod="bad"} 0+1x60`,
	"PillionMetricsFolded":  `pillion_metrics_folded_requests_total{namespace="shop", pod="bad", direction="inbound"} 0+1x60`,
	"PillionDNSFailures": "pillion_dns_queries_total{namespace=\"shop\", pod=\"bad\", transport=\"udp\"} 0+60x60\n" +
		`  pillion_dns_unanswered_queries_total{namespace="shop", pod="bad"} 0+30x60`,
	"PillionWebhookFailing": `apiserver_admission_webhook_rejection_count{name="inject.pillion.dev", error_type="calling_webhook_error", operation="CREATE"} 0+1x60`,
}

// series are those of a text as above. They implement storage.SeriesSet.
type series struct {
	all  []storage.Series
	next int
}

func (s *series) Next() bool                        { s.next++; return s.next <= len(s.all) }
func (s *series) At() storage.Series                { return s.all[s.next-1] }
func (s *series) Err() error                        { return nil }
func (s *series) Warnings() annotations.Annotations { return nil }

// sample is a float at a time.
type sample struct {
	time  int64
	value float64
}

func (s sample) ST() int64                     { return 0 }
func (s sample) T() int64                      { return s.time }
func (s sample) F() float64                    { return s.value }
func (s sample) H() *histogram.Histogram       { return nil }
func (s sample) FH() *histogram.FloatHistogram { return nil }
func (s sample) Type() chunkenc.ValueType      { return chunkenc.ValFloat }
func (s sample) Copy() chunks.Sample           { return s }

// load returns the series of a text, with a sample each minute.
func load(t *testing.T, text string) *storage.MockQueryable {
	t.Helper()
	var all []storage.Series
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); line == "" {
			continue
		}
		of, values, err := parser.NewParser(parser.Options{}).ParseSeriesDesc(line)
		if err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		var samples []chunks.Sample
		for i, v := range values {
			samples = append(samples, sample{int64(i) * time.Minute.Milliseconds(), v.Value})
		}
		all = append(all, storage.NewListSeries(of, samples))
	}
	return &storage.MockQueryable{MockQuerier: &storage.MockQuerier{
		SelectMockFunction: func(_ bool, _ *storage.SelectHints, matchers ...*labels.Matcher) storage.SeriesSet {
			matching := &series{}
			for _, s := range all {
				if !slices.ContainsFunc(matchers, func(m *labels.Matcher) bool { return !m.Matches(s.Labels().Get(m.Name)) }) {
					matching.all = append(matching.all, s)
				}
			}
			return matching
		},
	}}
}

// refusals are the reasons that the agent logs as warnings.
func refusals(t *testing.T) []string {
	t.Helper()
	_, from, _ := strings.Cut(read(t, "docs/reasons.md"), "\n| `memory_budget` |")
	rows, _, found := strings.Cut("| `memory_budget` |"+from, "\n| `idle_timeout` |")
	if !found {
		t.Fatal("docs/reasons.md has another order")
	}
	var reasons []string
	for _, m := range regexp.MustCompile("(?m)^\\| `(\\w+)` \\|").FindAllStringSubmatch(rows, -1) {
		reasons = append(reasons, m[1])
	}
	return reasons
}

func TestEachAlertFiresAtItsFaultAndNotOtherwise(t *testing.T) {
	engine := promql.NewEngine(promql.EngineOpts{MaxSamples: 100_000, Timeout: time.Minute, Parser: parser.NewParser(parser.Options{})})
	firing := func(text, expr string) (found []string) {
		query, err := engine.NewInstantQuery(t.Context(), load(t, text), nil, expr, time.Unix(0, 0).Add(50*time.Minute))
		if err != nil {
			t.Fatal(err)
		}
		defer query.Close()
		result := query.Exec(t.Context())
		if result.Err != nil {
			t.Fatal(result.Err)
		}
		for _, s := range result.Value.(promql.Vector) {
			found = append(found, s.Metric.Get("pod"))
		}
		return found
	}
	for _, rule := range alerts(t) {
		if got := firing(healthy, rule.Expr); len(got) > 0 {
			t.Errorf("%s fires at a healthy agent", rule.Alert)
		}
		got, want := firing(healthy+faults[rule.Alert], rule.Expr), []string{"bad"}
		if rule.Alert == "PillionWebhookFailing" {
			want = []string{""}
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s fires for %q, want %q", rule.Alert, got, want)
		}
		if rule.Alert == "PillionWebhookFailing" {
			ignored := "  apiserver_admission_webhook_fail_open_count{name=\"inject.pillion.dev\", type=\"validating\"} 0+1x60\n"
			if got := firing(healthy+ignored, rule.Expr); !slices.Equal(got, want) {
				t.Errorf("%s fires for %q with failurePolicy: Ignore, want %q", rule.Alert, got, want)
			}
		}
	}
	for _, reason := range refusals(t) {
		if slices.Contains([]string{"denied", "policy_denied", "fault"}, reason) {
			continue // refused on purpose, by policies and faults that users configure
		}
		fault := `pillion_flows_total{namespace="shop", pod="bad", direction="inbound", reason="` + reason + `"} 0+1x60`
		if !slices.ContainsFunc(alerts(t), func(rule rulefmt.Rule) bool { return len(firing(healthy+fault, rule.Expr)) > 0 }) {
			t.Errorf("no alert fires at connections refused with the reason %s", reason)
		}
	}
}
