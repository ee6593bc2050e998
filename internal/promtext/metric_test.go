package promtext_test

import (
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/promtext"
)

// counted has a family of each type. Tests of package metrics compare these constructs with Prometheus' library.
var counted = []promtext.MetricFamily{
	{Name: "sold_total", Help: "What was \"sold\"\nor\\and given.", Type: promtext.Counter, Metrics: []promtext.Metric{
		{Labels: []promtext.Label{{Name: "what", Value: "a\"b\\c\nd"}, {Name: "where"}}, Value: 1e6}, {Value: 1}}},
	{Name: "steps", Help: "A counter without suffix.", Type: promtext.Counter, Metrics: []promtext.Metric{{Value: 2}}},
	{Name: "heat", Help: "A gauge.", Type: promtext.Gauge, Metrics: []promtext.Metric{{Value: math.Inf(-1)}}},
	{Name: "took", Help: "A histogram.", Type: promtext.Histogram, Metrics: []promtext.Metric{{Labels: []promtext.Label{{Name: "a", Value: "b"}}, Sum: 7.5, Count: 1_000_003,
		Buckets: []promtext.Bucket{{Bound: 1, Count: 1_000_000}, {Bound: math.Inf(1), Count: 1_000_003}}}}},
	{Name: "pause", Help: "A summary.", Type: promtext.Summary, Metrics: []promtext.Metric{{Sum: 3, Count: 2, Quantiles: []promtext.Quantile{{Share: 0, Value: 1}, {Share: 0.5, Value: 2}}}}},
	{Name: "odd", Help: "Unknown.", Type: promtext.Unknown, Metrics: []promtext.Metric{{Value: 0.5}}},
}

func TestWriteMetrics(t *testing.T) {
	const inText = `# HELP sold_total What was "sold"\nor\\and given.
# TYPE sold_total counter
sold_total{what="a\"b\\c\nd",where=""} 1e+06
sold_total 1
# HELP steps A counter without suffix.
# TYPE steps counter
steps 2
# HELP heat A gauge.
# TYPE heat gauge
heat -Inf
# HELP took A histogram.
# TYPE took histogram
took_bucket{a="b",le="1"} 1e+06
took_bucket{a="b",le="+Inf"} 1.000003e+06
took_sum{a="b"} 7.5
took_count{a="b"} 1.000003e+06
# HELP pause A summary.
# TYPE pause summary
pause{quantile="0"} 1
pause{quantile="0.5"} 2
pause_sum 3
pause_count 2
# HELP odd Unknown.
# TYPE odd untyped
odd 0.5
`
	const inOpenMetrics = `# HELP sold What was \"sold\"\nor\\and given.
# TYPE sold counter
sold_total{what="a\"b\\c\nd",where=""} 1e+06
sold_total 1.0
# HELP steps A counter without suffix.
# TYPE steps unknown
steps 2.0
# HELP heat A gauge.
# TYPE heat gauge
heat -Inf
# HELP took A histogram.
# TYPE took histogram
took_bucket{a="b",le="1.0"} 1000000
took_bucket{a="b",le="+Inf"} 1000003
took_sum{a="b"} 7.5
took_count{a="b"} 1000003
# HELP pause A summary.
# TYPE pause summary
pause{quantile="0.0"} 1.0
pause{quantile="0.5"} 2.0
pause_sum 3.0
pause_count 2
# HELP odd Unknown.
# TYPE odd unknown
odd 0.5
# EOF
`
	for format, want := range map[promtext.Format]string{promtext.Text: inText, promtext.OpenMetrics: inOpenMetrics} {
		var got strings.Builder
		if err := promtext.WriteMetrics(&got, format, counted); err != nil {
			t.Fatal(err)
		}
		got.WriteString(format.End())
		if got.String() != want {
			t.Errorf("format %d:\n%s\nwant\n%s", format, &got, want)
		}
		judge(t, format, got.String())
		families, err := promtext.Parse(strings.NewReader(got.String()), format, promtext.Limits{Bytes: 10_000, Samples: 100})
		if err != nil || len(families) != len(counted) {
			t.Fatalf("format %d: parsed as %d families, %v", format, len(families), err)
		}
		if labels := families[0].Samples[0].Labels; !slices.Equal(labels, counted[0].Metrics[0].Labels) {
			t.Errorf("format %d: labels %q", format, labels)
		}
	}
}

func TestAcceptsGzip(t *testing.T) {
	for _, c := range []struct {
		fields string
		want   bool
	}{
		{"", false}, {"gzip", true}, {"br, GZIP ; q=0.5", true}, {"gzip;q=0", false}, {"gzip;q=0.000", false}, {"gzip;q=x", false}, {"xgzip, identity", false},
	} {
		if got := promtext.AcceptsGzip([]string{c.fields}); got != c.want {
			t.Errorf("%q: %v", c.fields, got)
		}
	}
}
