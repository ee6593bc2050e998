package metrics

import (
	"math"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"

	"github.com/pillion-proxy/pillion/internal/promtext"
)

// inProtobuf returns a family as Prometheus' libraries have it.
func inProtobuf(f promtext.MetricFamily) *dto.MetricFamily {
	kind := dto.MetricType(dto.MetricType_value[strings.ToUpper(string(f.Type))])
	out := &dto.MetricFamily{Name: &f.Name, Help: &f.Help, Type: &kind}
	for _, m := range f.Metrics {
		metric := new(dto.Metric)
		for _, l := range m.Labels {
			metric.Label = append(metric.Label, &dto.LabelPair{Name: &l.Name, Value: &l.Value})
		}
		switch kind {
		case dto.MetricType_COUNTER:
			metric.Counter = &dto.Counter{Value: &m.Value}
		case dto.MetricType_GAUGE:
			metric.Gauge = &dto.Gauge{Value: &m.Value}
		case dto.MetricType_HISTOGRAM:
			metric.Histogram = &dto.Histogram{SampleSum: &m.Sum, SampleCount: &m.Count}
			for _, b := range m.Buckets {
				metric.Histogram.Bucket = append(metric.Histogram.Bucket, &dto.Bucket{UpperBound: &b.Bound, CumulativeCount: &b.Count})
			}
		case dto.MetricType_SUMMARY:
			metric.Summary = &dto.Summary{SampleSum: &m.Sum, SampleCount: &m.Count}
			for _, q := range m.Quantiles {
				metric.Summary.Quantile = append(metric.Summary.Quantile, &dto.Quantile{Quantile: &q.Share, Value: &q.Value})
			}
		}
		out.Metric = append(out.Metric, metric)
	}
	return out
}

// The metrics of the runtime and the process have client_golang's names, types, help, labels and quantiles. Values that do not
// change within a process are equal, and the others have the same order of magnitude.
func TestRuntimeMatchesClientGolang(t *testing.T) {
	for range 10 { // so that one more collection changes little
		runtime.GC()
	}
	limitAddressSpace(t)
	registry := prometheus.NewRegistry()
	chosen := regexp.MustCompile(`^/(memory/classes/(total|heap/objects|heap/stacks|heap/released):bytes|gc/heap/goal:bytes|cpu/classes/gc/total:cpu-seconds)$`)
	registry.MustRegister(
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		collectors.NewGoCollector(collectors.WithGoCollectorMemStatsMetricsDisabled(),
			collectors.WithGoCollectorRuntimeMetrics(collectors.GoRuntimeMetricsRule{Matcher: chosen})),
	)
	want, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := gathered(t, New(pod, Options{}))
	constant := []string{"go_gc_gogc_percent", "go_gc_gomemlimit_bytes", "go_info", "go_sched_gomaxprocs_threads", "process_max_fds",
		"process_start_time_seconds", "process_virtual_memory_max_bytes"}
	for _, theirs := range want {
		ours := got[theirs.GetName()]
		if ours == nil {
			t.Errorf("no %s", theirs.GetName())
			continue
		}
		delete(got, theirs.GetName())
		if ours.GetHelp() != theirs.GetHelp() || ours.GetType() != theirs.GetType() || len(ours.Metric) != 1 || shape(ours) != shape(theirs) {
			t.Errorf("%v, want %v", ours, theirs)
		}
		a, b := number(ours), number(theirs)
		slack := 1.0
		if ours.GetType() == dto.MetricType_SUMMARY {
			slack = 0
		}
		if exact := slices.Contains(constant, theirs.GetName()); exact && a != b || math.Abs(a-b) > math.Max(a, b)/2+slack {
			t.Errorf("%s is %v, want %v", theirs.GetName(), a, b)
		}
	}
	for name := range got {
		if strings.HasPrefix(name, "go_") || strings.HasPrefix(name, "process_") {
			t.Errorf("client_golang has no %s", name)
		}
	}
}

// limitAddressSpace sets a limit that cannot be reached, so that it differs from the process's other limits.
func limitAddressSpace(t *testing.T) {
	var before syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_AS, &before); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Setrlimit(syscall.RLIMIT_AS, &syscall.Rlimit{Cur: min(before.Cur, 1<<50), Max: before.Max}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Setrlimit(syscall.RLIMIT_AS, &before) })
}

// shape returns the labels and the quantiles of a family's only metric.
func shape(f *dto.MetricFamily) string {
	m := f.Metric[0]
	text := ""
	for _, l := range m.Label {
		text += l.GetName() + "=" + l.GetValue() + " "
	}
	for _, q := range m.GetSummary().GetQuantile() {
		text += (&dto.Quantile{Quantile: q.Quantile}).String()
	}
	return text
}

// number returns the value of a family's only metric, or the time that a summary observed.
func number(f *dto.MetricFamily) float64 {
	m := f.Metric[0]
	return m.GetCounter().GetValue() + m.GetGauge().GetValue() + m.GetSummary().GetSampleSum()
}

// Everything is written as Prometheus' library writes it, in both formats.
func TestWriteMatchesExpfmt(t *testing.T) {
	odd := []promtext.Label{{Name: "a", Value: "back\\slash, \"quotes\", é and\na line"}, {Name: "b"}}
	var values []promtext.Metric
	for _, value := range []float64{0, 1, -1, 0.1, 1e6, 1e21, 123456789, 1 << 53, math.NaN(), math.Inf(1), math.Inf(-1), math.SmallestNonzeroFloat64} {
		values = append(values, promtext.Metric{Labels: odd, Value: value})
	}
	all := append(everything().Gather(),
		promtext.MetricFamily{Name: "a_total", Help: "back\\slash, \"quotes\" and\na line", Type: promtext.Counter, Metrics: values},
		promtext.MetricFamily{Name: "a_counter_without_suffix", Help: "x", Type: promtext.Counter, Metrics: values},
		promtext.MetricFamily{Name: "a_gauge", Help: "x", Type: promtext.Gauge, Metrics: values},
		promtext.MetricFamily{Name: "a_histogram", Help: "x", Type: promtext.Histogram, Metrics: []promtext.Metric{{Labels: odd, Sum: 1, Count: math.MaxUint64,
			Buckets: []promtext.Bucket{{Bound: -1, Count: 1_000_000}, {Bound: 1e6, Count: 1 << 60}, {Bound: math.Inf(1), Count: math.MaxUint64}}}}},
		promtext.MetricFamily{Name: "a_summary", Help: "x", Type: promtext.Summary, Metrics: []promtext.Metric{{Labels: odd, Sum: 3, Count: 2,
			Quantiles: []promtext.Quantile{{Share: 0, Value: 1}, {Share: 0.5, Value: math.NaN()}, {Share: 1, Value: 2}}}}},
	)
	for format, theirs := range map[promtext.Format]expfmt.FormatType{promtext.Text: expfmt.TypeTextPlain, promtext.OpenMetrics: expfmt.TypeOpenMetrics} {
		var got, want strings.Builder
		if err := promtext.WriteMetrics(&got, format, all); err != nil {
			t.Fatal(err)
		}
		got.WriteString(format.End())
		encoder := expfmt.NewEncoder(&want, expfmt.NewFormat(theirs))
		for _, family := range all {
			if err := encoder.Encode(inProtobuf(family)); err != nil {
				t.Fatal(err)
			}
		}
		if err := encoder.(expfmt.Closer).Close(); err != nil {
			t.Fatal(err)
		}
		if got.String() != want.String() {
			t.Errorf("%s", difference(got.String(), want.String()))
		}
	}
}

// difference returns the first lines that differ.
func difference(got, want string) string {
	a, b := strings.Split(got, "\n"), strings.Split(want, "\n")
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return "got  " + a[i] + "\nwant " + b[i]
		}
	}
	return "one is longer"
}
