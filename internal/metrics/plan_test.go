package metrics

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/cel"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
)

func dimension(t *testing.T, name, text string) mesh.Dimension {
	t.Helper()
	e, err := cel.Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	return mesh.Dimension{Name: name, Expression: e}
}

// asked returns telemetry with these overrides.
func asked(m *Metrics, overrides ...mesh.MetricOverride) *flow.Telemetry {
	s := &mesh.Stats{Overrides: overrides, Key: fmt.Sprintf("%+v", overrides)}
	for _, o := range overrides {
		for _, d := range o.Dimensions {
			s.Key += d.Expression.String()
		}
	}
	return flow.NewTelemetry(nil, m.Plan(s, func(cel.Header) int { return 0 }), false)
}

// byteStream counts a connection of bytes.
func byteStream(m *Metrics, table *flow.Table, telemetry *flow.Telemetry) {
	r := flow.Open(flow.Inbound, peer)
	r.OriginalDestination = own
	r.Ask(telemetry)
	table.List(r)
	table.Carry(r, flow.Opaque, flow.Hello{})
	r.Received.Store(7)
	r.Reason = flow.Closed
	m.Closed(r)
}

func namesOf(t *testing.T, m *Metrics, name string) (names []string) {
	t.Helper()
	for _, family := range m.Gather() {
		if family.Name != name {
			continue
		}
		for _, l := range family.Metrics[0].Labels {
			names = append(names, l.Name)
		}
	}
	return names
}

func TestOverridesOfMetrics(t *testing.T) {
	m := New(pod, Options{})
	table := flow.NewTable(m)
	in := connection(table, flow.Inbound, flow.HTTP11)
	telemetry := asked(m,
		mesh.MetricOverride{Remove: []string{"source_app"}},
		mesh.MetricOverride{Name: "requests_total", Remove: []string{"response_code", "response_flags"}, Dimensions: []mesh.Dimension{
			dimension(t, "tenant", "request.headers['x-tenant']"), dimension(t, "source_version", "request.host"), dimension(t, "a-b", "response.code / 100")}},
		mesh.MetricOverride{Name: "response_bytes", Drop: true},
		mesh.MetricOverride{Name: "tcp_received_bytes_total", Drop: true},
	)
	for _, status := range []int{200, 201, 404, 200} {
		r := request(in, "reviews", status)
		r.HTTP.Telemetry = telemetry
		r.HTTP.Fields = [][]byte{[]byte("blue")}
		if status == 404 {
			r.HTTP.Fields = nil
		}
		m.Closed(r)
	}
	byteStream(m, table, telemetry)

	for name, c := range map[string]struct {
		want   float64
		labels []string
	}{
		"codes are added up":       {3, []string{"tenant=blue", "source_version=reviews", "a_b=2"}},
		"a header that is missing": {1, []string{"tenant=unknown", "a_b=4"}},
	} {
		if got := value(t, m, "istio_requests_total", c.labels...); got != c.want {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
	for name, gone := range map[string][]string{
		"istio_requests_total": {"source_app", "response_code", "response_flags"}, "istio_request_duration_milliseconds": {"source_app"},
		"istio_tcp_connections_opened_total": {"source_app"},
	} {
		labels := namesOf(t, m, name)
		for _, label := range gone {
			if len(labels) == 0 || slices.Contains(labels, label) {
				t.Errorf("%s has the labels %v", name, labels)
			}
		}
	}
	if labels := namesOf(t, m, "istio_request_duration_milliseconds"); !slices.Contains(labels, "response_code") || slices.Contains(labels, "tenant") {
		t.Errorf("another metric has the labels %v", labels)
	}
	for _, dropped := range []string{"istio_response_bytes", "istio_tcp_received_bytes_total"} {
		if namesOf(t, m, dropped) != nil {
			t.Errorf("%s is reported", dropped)
		}
	}
	// Each series occurs once: Prometheus would reject others.
	var b strings.Builder
	if err := m.Write(&b, false); err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for line := range strings.Lines(b.String()) {
		if series, _, found := strings.Cut(line, "} "); found && seen[series] {
			t.Errorf("%s occurs twice", series)
		} else {
			seen[series] = true
		}
	}
}

func TestSeriesWithTheSameLabelsAreAddedUp(t *testing.T) {
	m := New(pod, Options{})
	in := connection(flow.NewTable(m), flow.Inbound, flow.HTTP11)
	m.Closed(request(in, "reviews", 200)) // before the control plane asks for anything
	for _, telemetry := range []*flow.Telemetry{asked(m, mesh.MetricOverride{Name: "response_bytes", Drop: true}), asked(m, mesh.MetricOverride{Name: "none"})} {
		r := request(in, "reviews", 200)
		r.HTTP.Telemetry = telemetry
		m.Closed(r)
	}
	for _, family := range m.Gather() {
		switch family.Name {
		case "istio_requests_total":
			if len(family.Metrics) != 1 || family.Metrics[0].Value != 3 {
				t.Errorf("requests: %+v", family.Metrics)
			}
		case "istio_request_bytes":
			if last := family.Metrics[0].Buckets; len(family.Metrics) != 1 || family.Metrics[0].Count != 3 || last[len(last)-1].Count != 3 {
				t.Errorf("bytes: %+v", family.Metrics)
			}
		case "istio_response_bytes":
			if family.Metrics[0].Count != 2 {
				t.Errorf("bytes of responses: %+v", family.Metrics)
			}
		}
	}
}

func TestChainsWithoutMetricsAreNotCounted(t *testing.T) {
	m := New(pod, Options{})
	table := flow.NewTable(m)
	telemetry := flow.NewTelemetry(nil, nil, true)
	r := request(connection(table, flow.Inbound, flow.HTTP11), "reviews", 200)
	r.HTTP.Telemetry = telemetry
	m.Closed(r)
	byteStream(m, table, telemetry)
	for _, family := range m.Gather() {
		if strings.HasPrefix(family.Name, "istio_") && family.Name != "istio_build" {
			t.Errorf("%s has %d series", family.Name, len(family.Metrics))
		}
	}
	if got := value(t, m, "pillion_flows_total", "direction=inbound"); got != 2 {
		t.Errorf("%v flows, want 2", got)
	}
}

func TestValuesThatAControlPlaneAsksForAreBounded(t *testing.T) {
	m := New(pod, Options{})
	in := connection(flow.NewTable(m), flow.Inbound, flow.HTTP11)
	telemetry := asked(m, mesh.MetricOverride{Name: "requests_total", Dimensions: []mesh.Dimension{dimension(t, "path", "request.path"), dimension(t, "long", "request.id")}})
	const requests = 500
	for i := range requests {
		r := request(in, "reviews", 200)
		r.HTTP.Telemetry, r.HTTP.Path, r.HTTP.ID = telemetry, []byte(fmt.Sprintf("/%d\x00\xff", i)), []byte(strings.Repeat("x", 1000))
		m.Closed(r)
	}
	total := 0.0
	for _, family := range m.Gather() {
		if family.Name != "istio_requests_total" {
			continue
		}
		for _, metric := range family.Metrics {
			total += metric.Value
			for _, l := range metric.Labels {
				if len(l.Value) > maxAddedValue || strings.Contains(l.Value, "\x00") || strings.Contains(l.Value, "\xff") {
					t.Errorf("label %s has the value %q", l.Name, l.Value)
				}
			}
		}
		if most := m.directions[flow.Inbound].budget.sets + foldedSets; len(family.Metrics) > most {
			t.Errorf("%d series, want at most %d", len(family.Metrics), most)
		}
	}
	if total != requests {
		t.Errorf("%v requests are counted, want %d", total, requests)
	}
	for i := range 2 * maxPlans {
		asked(m, mesh.MetricOverride{Name: fmt.Sprint(i)})
	}
	if len(m.plans) != maxPlans {
		t.Errorf("%d plans", len(m.plans))
	}
}
