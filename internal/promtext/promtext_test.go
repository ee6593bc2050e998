package promtext_test

import (
	"bytes"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/promtext"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

const (
	text = promtext.Text
	open = promtext.OpenMetrics
)

func parse(t testing.TB, format promtext.Format, in string) []promtext.Family {
	t.Helper()
	families, err := promtext.Parse(strings.NewReader(in), format, promtext.Limits{})
	if err != nil {
		t.Fatalf("%v in\n%s", err, in)
	}
	return families
}

// merge merges parts, writes the result and checks it with other parsers.
func merge(t testing.TB, format promtext.Format, parts ...[]promtext.Family) (out string, dropped int) {
	t.Helper()
	families, dropped := promtext.Merge(format, parts...)
	var b bytes.Buffer
	if err := promtext.Write(&b, format, families); err != nil {
		t.Fatal(err)
	}
	out = b.String()
	judge(t, format, out)
	again, lost := promtext.Merge(format, parse(t, format, out))
	b.Reset()
	promtext.Write(&b, format, again)
	if lost > 0 || b.String() != out {
		t.Fatalf("not stable: %d samples lost, and\n%s\nbecomes\n%s", lost, out, &b)
	}
	return out, dropped
}

// judge checks an exposition with Prometheus' parser of the text format, or against the rules of OpenMetrics on order and
// names.
func judge(t testing.TB, format promtext.Format, out string) {
	t.Helper()
	if format == text {
		parser := expfmt.NewTextParser(model.LegacyValidation)
		if _, err := parser.TextToMetricFamilies(strings.NewReader(out)); err != nil {
			t.Fatalf("expfmt: %v in\n%s", err, out)
		}
		return
	}
	if err := strict(out); err != nil {
		t.Fatalf("not OpenMetrics: %v in\n%s", err, out)
	}
}

var sampleLine = regexp.MustCompile(`^([a-zA-Z_:][a-zA-Z0-9_:]*)(\{(?:[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\["\\n])*",?)*\})? (\S+)( -?[0-9.]+)?( # \{.*\} \S+( \S+)?)?$`)

// strict checks the rules of OpenMetrics on order and names. It shares no code with the package under test.
func strict(out string) error {
	body, ok := strings.CutSuffix(out, "# EOF\n")
	if !ok {
		return fmt.Errorf("no # EOF at the end")
	}
	allowed := map[string][]string{
		"unknown": {""}, "gauge": {""}, "stateset": {""}, "counter": {"_total", "_created"}, "info": {"_info"},
		"histogram": {"_bucket", "_sum", "_count", "_created"}, "summary": {"", "_sum", "_count", "_created"},
		"gaugehistogram": {"_bucket", "_gsum", "_gcount"},
	}
	taken := make(map[string]bool)
	seen := make(map[string]bool)
	groups := make(map[string]bool)
	var name, typ, help, group string
	for line := range strings.Lines(body) {
		line = strings.TrimSuffix(line, "\n")
		if fields := strings.SplitN(line, " ", 4); fields[0] == "#" {
			switch fields[1] {
			case "HELP":
				help = fields[2]
			case "UNIT":
				if fields[2] != name || !strings.HasSuffix(name, "_"+fields[3]) {
					return fmt.Errorf("UNIT: %q", line)
				}
			case "TYPE":
				name, typ, group = fields[2], fields[3], ""
				if help != "" && help != name {
					return fmt.Errorf("HELP %s, TYPE %s", help, name)
				}
				for _, suffix := range slices.Compact(slices.Sorted(slices.Values(append([]string{""}, allowed[typ]...)))) {
					if taken[name+suffix] {
						return fmt.Errorf("%s %s clashes", typ, name)
					}
					taken[name+suffix] = true
				}
				help = ""
			default:
				return fmt.Errorf("comment %q", line)
			}
			continue
		}
		parts := sampleLine.FindStringSubmatch(line)
		if parts == nil {
			return fmt.Errorf("not a sample: %q", line)
		}
		suffix, ok := strings.CutPrefix(parts[1], name)
		if !ok || !slices.Contains(allowed[typ], suffix) {
			return fmt.Errorf("%q in %s %s", parts[1], typ, name)
		}
		if parts[5] != "" && suffix != "_total" && suffix != "_bucket" {
			return fmt.Errorf("exemplar: %q", line)
		}
		if seen[parts[1]+parts[2]] {
			return fmt.Errorf("duplicate series %s%s", parts[1], parts[2])
		}
		seen[parts[1]+parts[2]] = true
		labels := regexp.MustCompile(`(le|quantile)="[^"]*",?|,?\}`).ReplaceAllString(parts[2], "")
		if now := name + strings.Trim(labels, "{,"); typ != "gauge" && typ != "unknown" && now != group {
			if groups[now] {
				return fmt.Errorf("group %q in pieces", now)
			}
			groups[now], group = true, now
		}
	}
	return nil
}

func TestEachFormatInBothFormats(t *testing.T) {
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			families := parse(t, c.from, c.in)
			for format, want := range map[promtext.Format]string{text: c.text, open: c.open} {
				out, dropped := merge(t, format, families)
				if out != want {
					t.Errorf("%s:\n%s\nwant\n%s", format.ContentType(), out, want)
				}
				if dropped != c.dropped[format] {
					t.Errorf("%s: %d dropped, want %d", format.ContentType(), dropped, c.dropped[format])
				}
			}
		})
	}
}

var cases = []struct {
	name, in   string
	from       promtext.Format
	text, open string
	dropped    [2]int
}{
	{name: "a Go program", from: text,
		in: `# HELP go_gc_duration_seconds A summary of the wall-time pause (stop-the-world) duration in garbage collection cycles.
# TYPE go_gc_duration_seconds summary
go_gc_duration_seconds{quantile="0"} 2.1e-05
go_gc_duration_seconds{quantile="1"} 0.000112
go_gc_duration_seconds_sum 0.000345
go_gc_duration_seconds_count 5
# HELP http_request_duration_seconds Time taken.
# TYPE http_request_duration_seconds histogram
http_request_duration_seconds_bucket{code="200",le="0.5"} 1
http_request_duration_seconds_bucket{code="200",le="1"} 2
http_request_duration_seconds_bucket{code="200",le="+Inf"} 2
http_request_duration_seconds_sum{code="200"} 0.7
http_request_duration_seconds_count{code="200"} 2
# HELP process_cpu_seconds_total Total user and system CPU time spent in seconds.
# TYPE process_cpu_seconds_total counter
process_cpu_seconds_total 0.12
`,
		text: `# HELP go_gc_duration_seconds A summary of the wall-time pause (stop-the-world) duration in garbage collection cycles.
# TYPE go_gc_duration_seconds summary
go_gc_duration_seconds{quantile="0"} 2.1e-05
go_gc_duration_seconds{quantile="1"} 0.000112
go_gc_duration_seconds_sum 0.000345
go_gc_duration_seconds_count 5
# HELP http_request_duration_seconds Time taken.
# TYPE http_request_duration_seconds histogram
http_request_duration_seconds_bucket{code="200",le="0.5"} 1
http_request_duration_seconds_bucket{code="200",le="1"} 2
http_request_duration_seconds_bucket{code="200",le="+Inf"} 2
http_request_duration_seconds_sum{code="200"} 0.7
http_request_duration_seconds_count{code="200"} 2
# HELP process_cpu_seconds_total Total user and system CPU time spent in seconds.
# TYPE process_cpu_seconds_total counter
process_cpu_seconds_total 0.12
`,
		open: `# HELP go_gc_duration_seconds A summary of the wall-time pause (stop-the-world) duration in garbage collection cycles.
# TYPE go_gc_duration_seconds summary
go_gc_duration_seconds{quantile="0.0"} 2.1e-05
go_gc_duration_seconds{quantile="1.0"} 0.000112
go_gc_duration_seconds_sum 0.000345
go_gc_duration_seconds_count 5
# HELP http_request_duration_seconds Time taken.
# TYPE http_request_duration_seconds histogram
http_request_duration_seconds_bucket{code="200",le="0.5"} 1
http_request_duration_seconds_bucket{code="200",le="1.0"} 2
http_request_duration_seconds_bucket{code="200",le="+Inf"} 2
http_request_duration_seconds_sum{code="200"} 0.7
http_request_duration_seconds_count{code="200"} 2
# HELP process_cpu_seconds Total user and system CPU time spent in seconds.
# TYPE process_cpu_seconds counter
process_cpu_seconds_total 0.12
# EOF
`},
	{name: "a Python program", from: open,
		in: `# HELP requests Requests seen.
# TYPE requests counter
requests_total{path="/a"} 3.0 # {trace_id="KOO5S4vxi0o"} 1.0 1520879607.789
requests_created{path="/a"} 1.7000000012345e+09
requests_total{path="/b"} 1.0
requests_created{path="/b"} 1.7000000012345e+09
# HELP latency_seconds Time taken.
# TYPE latency_seconds histogram
# UNIT latency_seconds seconds
latency_seconds_bucket{le="1.0"} 1.0 # {trace_id="KOO5S4vxi0o"} 0.7
latency_seconds_bucket{le="+Inf"} 1.0
latency_seconds_count 1.0
latency_seconds_sum 0.7
latency_seconds_created 1.7000000012345e+09
# HELP python Python platform information.
# TYPE python info
python_info{version="3.13"} 1.0
# TYPE state stateset
state{state="on"} 1.0
state{state="off"} 0.0
# TYPE queue gaugehistogram
queue_bucket{le="+Inf"} 2.0
queue_gcount 2.0
queue_gsum 9.0
# TYPE odd unknown
odd 1.0 1520879607.789
# EOF
`,
		text: `# HELP requests_total Requests seen.
# TYPE requests_total counter
requests_total{path="/a"} 3.0
requests_total{path="/b"} 1.0
# HELP requests_created Requests seen.
# TYPE requests_created gauge
requests_created{path="/a"} 1.7000000012345e+09
requests_created{path="/b"} 1.7000000012345e+09
# HELP latency_seconds Time taken.
# TYPE latency_seconds histogram
latency_seconds_bucket{le="1.0"} 1.0
latency_seconds_bucket{le="+Inf"} 1.0
latency_seconds_count 1.0
latency_seconds_sum 0.7
# HELP latency_seconds_created Time taken.
# TYPE latency_seconds_created gauge
latency_seconds_created 1.7000000012345e+09
# HELP python_info Python platform information.
# TYPE python_info gauge
python_info{version="3.13"} 1.0
# TYPE state gauge
state{state="on"} 1.0
state{state="off"} 0.0
# TYPE queue_bucket gauge
queue_bucket{le="+Inf"} 2.0
# TYPE queue_gcount gauge
queue_gcount 2.0
# TYPE queue_gsum gauge
queue_gsum 9.0
# TYPE odd untyped
odd 1.0 1520879607789
`,
		open: `# HELP requests Requests seen.
# TYPE requests counter
requests_total{path="/a"} 3.0 # {trace_id="KOO5S4vxi0o"} 1.0 1520879607.789
requests_created{path="/a"} 1.7000000012345e+09
requests_total{path="/b"} 1.0
requests_created{path="/b"} 1.7000000012345e+09
# HELP latency_seconds Time taken.
# TYPE latency_seconds histogram
# UNIT latency_seconds seconds
latency_seconds_bucket{le="1.0"} 1.0 # {trace_id="KOO5S4vxi0o"} 0.7
latency_seconds_bucket{le="+Inf"} 1.0
latency_seconds_count 1.0
latency_seconds_sum 0.7
latency_seconds_created 1.7000000012345e+09
# HELP python Python platform information.
# TYPE python info
python_info{version="3.13"} 1.0
# TYPE state stateset
state{state="on"} 1.0
state{state="off"} 0.0
# TYPE queue gaugehistogram
queue_bucket{le="+Inf"} 2.0
queue_gcount 2.0
queue_gsum 9.0
# TYPE odd unknown
odd 1.0 1520879607.789
# EOF
`},
	{name: "the JVM exporter: trailing commas, counters without _total", from: text,
		in: `# HELP jvm_classes_loaded The number of classes that are currently loaded in the JVM
# TYPE jvm_classes_loaded gauge
jvm_classes_loaded 3874.0
# HELP jvm_classes_loaded_total The total number of classes that have been loaded
# TYPE jvm_classes_loaded_total counter
jvm_classes_loaded_total 3874.0
# HELP jmx_config_reload_success JMX config reloads
# TYPE jmx_config_reload_success counter
jmx_config_reload_success 0.0
# TYPE kafka_requests untyped
kafka_requests{topic="a",quantile="0.5",} NaN
`,
		text: `# HELP jvm_classes_loaded The number of classes that are currently loaded in the JVM
# TYPE jvm_classes_loaded gauge
jvm_classes_loaded 3874.0
# HELP jvm_classes_loaded_total The total number of classes that have been loaded
# TYPE jvm_classes_loaded_total counter
jvm_classes_loaded_total 3874.0
# HELP jmx_config_reload_success JMX config reloads
# TYPE jmx_config_reload_success counter
jmx_config_reload_success 0.0
# TYPE kafka_requests untyped
kafka_requests{topic="a",quantile="0.5"} NaN
`,
		open: `# HELP jvm_classes_loaded The number of classes that are currently loaded in the JVM
# TYPE jvm_classes_loaded gauge
jvm_classes_loaded 3874.0
# HELP jvm_classes_loaded_total The total number of classes that have been loaded
# TYPE jvm_classes_loaded_total unknown
jvm_classes_loaded_total 3874.0
# HELP jmx_config_reload_success JMX config reloads
# TYPE jmx_config_reload_success unknown
jmx_config_reload_success 0.0
# TYPE kafka_requests unknown
kafka_requests{topic="a",quantile="0.5"} NaN
# EOF
`},
	{name: "node_exporter: text files with timestamps, escapes, UTF-8, CRLF, comments", from: text,
		in: "# a remark\r\n#\r\n\r\n# HELP\r\n# HELP node_file A \\\\ back\\nslash \"quoted\" \\x\r\n# TYPE node_file gauge\r\n" +
			"  node_file { path = \"C:\\\\DIR\\\\\" , text=\"say \\\"hi\\\"\\nthere\\d\" , name=\"Zürich 東京\" }\t1e3\t1395066363000\r\n" +
			"node_inf +Inf\nnode_ninf -Inf -62135596800000\n# EOF",
		text: "# HELP node_file A \\\\ back\\nslash \"quoted\" \\\\x\n# TYPE node_file gauge\n" +
			"node_file{path=\"C:\\\\DIR\\\\\",text=\"say \\\"hi\\\"\\nthere\\\\d\",name=\"Zürich 東京\"} 1e3 1395066363000\n" +
			"# TYPE node_inf untyped\nnode_inf +Inf\n# TYPE node_ninf untyped\nnode_ninf -Inf -62135596800000\n",
		open: "# HELP node_file A \\\\ back\\nslash \\\"quoted\\\" \\\\x\n# TYPE node_file gauge\n" +
			"node_file{path=\"C:\\\\DIR\\\\\",text=\"say \\\"hi\\\"\\nthere\\\\d\",name=\"Zürich 東京\"} 1e3 1395066363\n" +
			"# TYPE node_inf unknown\nnode_inf +Inf\n# TYPE node_ninf unknown\nnode_ninf -Inf -62135596800\n# EOF\n"},
	{name: "metadata after samples, families in pieces, TYPE twice", from: text,
		in: `h_bucket{le="+Inf",a="1"} 1
g{a="1"} 1
h_sum{a="1"} 1
h_bucket{le="+Inf",a="2"} 1
h_count{a="1"} 1
g{a="2"} 2
# TYPE h histogram
# HELP g Late.
# TYPE g gauge
# TYPE g counter
# HELP g Later.
h_sum{a="2"} 1
h_count{a="2"} 1
# TYPE empty gauge
`,
		text: `# TYPE h histogram
h_bucket{le="+Inf",a="1"} 1
h_sum{a="1"} 1
h_count{a="1"} 1
h_bucket{le="+Inf",a="2"} 1
h_sum{a="2"} 1
h_count{a="2"} 1
# HELP g Late.
# TYPE g gauge
g{a="1"} 1
g{a="2"} 2
`,
		open: `# TYPE h histogram
h_bucket{le="+Inf",a="1"} 1
h_sum{a="1"} 1
h_count{a="1"} 1
h_bucket{le="+Inf",a="2"} 1
h_sum{a="2"} 1
h_count{a="2"} 1
# HELP g Late.
# TYPE g gauge
g{a="1"} 1
g{a="2"} 2
# EOF
`},
	{name: "samples that their type does not allow", from: text,
		in: `# TYPE h histogram
h 1
h_bucket{le="+Inf"} 1
# TYPE s summary
s{quantile="half"} 1
# TYPE n histogram
n_count -1
`,
		text: "# TYPE h untyped\nh 1\n# TYPE h_bucket untyped\nh_bucket{le=\"+Inf\"} 1\n# TYPE s untyped\ns{quantile=\"half\"} 1\n# TYPE n_count untyped\nn_count -1\n",
		open: "# TYPE h unknown\nh 1\n# TYPE h_bucket unknown\nh_bucket{le=\"+Inf\"} 1\n# TYPE s unknown\ns{quantile=\"half\"} 1\n# TYPE n_count unknown\nn_count -1\n# EOF\n"},
	{name: "an OpenMetrics counter without _total, a unit that is not a suffix, exemplars too long or misplaced", from: open,
		in: "# TYPE c counter\nc 1\n# TYPE g gauge\n# UNIT g bytes\ng 1 # {a=\"b\"} 1\n# TYPE d counter\nd_total 1 # {a=\"" +
			strings.Repeat("x", 128) + "\"} 1 1\n# EOF\n",
		text: "# TYPE c untyped\nc 1\n# TYPE g gauge\ng 1\n# TYPE d_total counter\nd_total 1\n",
		open: "# TYPE c unknown\nc 1\n# TYPE g gauge\ng 1\n# TYPE d counter\nd_total 1\n# EOF\n"},
	{name: "one series twice, its labels in another order or empty", from: text,
		in:   "g{a=\"1\",b=\"2\"} 1\ng{b=\"2\",a=\"1\"} 2\ng{b=\"2\",a=\"1\",c=\"\"} 3\n",
		text: "# TYPE g untyped\ng{a=\"1\",b=\"2\"} 1\n", open: "# TYPE g unknown\ng{a=\"1\",b=\"2\"} 1\n# EOF\n", dropped: [2]int{2, 2}},
	{name: "series that differ in a label's name, or in a part of its name and value", from: text,
		in:   "g{a=\"1\"} 1\ng{b=\"1\"} 2\ng{a=\"1\",b=\"1\"} 3\ng{ab=\"1\"} 4\ng{a=\"b1\"} 5\n",
		text: "# TYPE g untyped\ng{a=\"1\"} 1\ng{b=\"1\"} 2\ng{a=\"1\",b=\"1\"} 3\ng{ab=\"1\"} 4\ng{a=\"b1\"} 5\n",
		open: "# TYPE g unknown\ng{a=\"1\"} 1\ng{b=\"1\"} 2\ng{a=\"1\",b=\"1\"} 3\ng{ab=\"1\"} 4\ng{a=\"b1\"} 5\n# EOF\n"},
	{name: "UNIT in the text format is a comment", from: text,
		in:   "# TYPE g_bytes gauge\n# UNIT g_bytes bytes\n# UNIT a-b c\ng_bytes 1\n",
		text: "# TYPE g_bytes gauge\ng_bytes 1\n",
		open: "# TYPE g_bytes gauge\ng_bytes 1\n# EOF\n"},
	{name: "timestamps at the limits", from: text,
		in:   "g 1 1000000000000000\nh 1 -1000000000000000\n",
		text: "# TYPE g untyped\ng 1 1000000000000000\n# TYPE h untyped\nh 1 -1000000000000000\n",
		open: "# TYPE g unknown\ng 1 1000000000000\n# TYPE h unknown\nh 1 -1000000000000\n# EOF\n"},
	{name: "an exemplar of the greatest length", from: open,
		in:   "# TYPE d counter\nd_total 1 # {a=\"" + strings.Repeat("x", 127) + "\"} 1 1\n# EOF\n",
		text: "# TYPE d_total counter\nd_total 1\n",
		open: "# TYPE d counter\nd_total 1 # {a=\"" + strings.Repeat("x", 127) + "\"} 1 1\n# EOF\n"},
	{name: "a histogram and a gauge that conflict only in OpenMetrics", from: text,
		in:      "# TYPE h histogram\nh_count 1\n# TYPE h_created gauge\nh_created 1\n",
		text:    "# TYPE h histogram\nh_count 1\n# TYPE h_created gauge\nh_created 1\n",
		open:    "# TYPE h histogram\nh_count 1\n# EOF\n",
		dropped: [2]int{0, 1}},
	{name: "counters whose names overlap in OpenMetrics", from: text,
		in:   "# TYPE a counter\na 1\n# TYPE a_total counter\na_total 1\n# TYPE b_total counter\nb_total 1\n# TYPE b_created gauge\nb_created 1\n",
		text: "# TYPE a counter\na 1\n# TYPE a_total counter\na_total 1\n# TYPE b_total counter\nb_total 1\n# TYPE b_created gauge\nb_created 1\n",
		open: "# TYPE a unknown\na 1\n# TYPE a_total unknown\na_total 1\n# TYPE b_total unknown\nb_total 1\n# TYPE b_created gauge\nb_created 1\n# EOF\n"},
	{name: "empty", from: text, in: "", text: "", open: "# EOF\n"},
}

func TestMerge(t *testing.T) {
	type part struct {
		format promtext.Format
		in     string
	}
	for _, c := range []struct {
		name    string
		parts   []part
		format  promtext.Format
		want    string
		dropped int
	}{
		{"families are joined, and the first of two equal series wins",
			[]part{{text, "# TYPE up gauge\nup{a=\"1\"} 1\n"}, {text, "# HELP up Is up.\n# TYPE up gauge\nup{a=\"1\"} 2\nup{a=\"2\"} 2\n"}}, text,
			"# HELP up Is up.\n# TYPE up gauge\nup{a=\"1\"} 1\nup{a=\"2\"} 2\n", 1},
		{"across formats",
			[]part{{text, "# TYPE c_total counter\nc_total{a=\"1\"} 1\n"}, {open, "# TYPE c counter\nc_total{a=\"1\"} 2\nc_total{a=\"2\"} 2\n# EOF\n"}}, open,
			"# TYPE c counter\nc_total{a=\"1\"} 1\nc_total{a=\"2\"} 2\n# EOF\n", 1},
		{"a histogram comes from one part as a whole",
			[]part{{text, "# TYPE h histogram\nh_bucket{le=\"1\"} 1\nh_count 1\n"}, {open, "# TYPE h histogram\nh_bucket{le=\"1.0\"} 1\nh_bucket{le=\"2.0\"} 1\nh_count 1\nh_count{a=\"1\"} 1\n# EOF\n"}}, open,
			"# TYPE h histogram\nh_bucket{le=\"1.0\"} 1\nh_count 1\nh_count{a=\"1\"} 1\n# EOF\n", 3},
		{"the earlier of two types wins",
			[]part{{text, "# TYPE a gauge\na 1\n"}, {text, "# TYPE a counter\na{b=\"1\"} 1\na{b=\"2\"} 1\n"}}, text,
			"# TYPE a gauge\na 1\n", 2},
		{"a histogram and a gauge with the name of its count",
			[]part{{text, "# TYPE h histogram\nh_bucket{le=\"+Inf\"} 1\nh_count 1\n"}, {text, "# TYPE h_count gauge\nh_count 7\n"}}, text,
			"# TYPE h histogram\nh_bucket{le=\"+Inf\"} 1\nh_count 1\n", 1},
		{"the same, in the other order",
			[]part{{text, "# TYPE h_count gauge\nh_count 7\n"}, {text, "# TYPE h histogram\nh_bucket{le=\"+Inf\"} 1\nh_count 1\n"}}, open,
			"# TYPE h_count gauge\nh_count 7\n# EOF\n", 2},
		{"a counter and a histogram of its OpenMetrics name, in text",
			[]part{{open, "# TYPE x counter\nx_total 1\n# EOF\n"}, {text, "# TYPE x histogram\nx_count 1\n"}}, text,
			"# TYPE x_total counter\nx_total 1\n# TYPE x histogram\nx_count 1\n", 0},
		{"the same in OpenMetrics: the counter becomes unknown, and keeps its samples",
			[]part{{open, "# TYPE x counter\nx_total 1 # {a=\"b\"} 1\nx_created 5\n# EOF\n"}, {text, "# TYPE x gauge\nx 1\n"}}, open,
			"# TYPE x_total unknown\nx_total 1\n# TYPE x_created unknown\nx_created 5\n# TYPE x gauge\nx 1\n# EOF\n", 0},
		{"empty parts", []part{{text, ""}, {open, "# EOF\n"}}, open, "# EOF\n", 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			var parts [][]promtext.Family
			for _, part := range c.parts {
				parts = append(parts, parse(t, part.format, part.in))
			}
			out, dropped := merge(t, c.format, parts...)
			if out != c.want || dropped != c.dropped {
				t.Errorf("%d dropped:\n%s\nwant %d:\n%s", dropped, out, c.dropped, c.want)
			}
		})
	}
}

// The merge of parts that pass the linter passes it as well.
func TestMergeOfCleanPartsPassesPromlint(t *testing.T) {
	goProgram, python := parse(t, text, cases[0].in), parse(t, open, strings.NewReplacer(
		"# TYPE state", "# HELP state On.\n# TYPE state", "# TYPE odd unknown\nodd 1.0 1520879607.789\n", "",
		"# TYPE queue gaugehistogram\nqueue_bucket{le=\"+Inf\"} 2.0\nqueue_gcount 2.0\nqueue_gsum 9.0\n", "").Replace(cases[1].in))
	out, dropped := merge(t, text, goProgram, python, goProgram)
	problems, err := promlint.New(strings.NewReader(out)).Lint()
	if err != nil || len(problems) > 0 {
		t.Errorf("promlint: %v %v in\n%s", err, problems, out)
	}
	if dropped != 10 {
		t.Errorf("%d dropped, want all 10 of the repeated part", dropped)
	}
}

func TestErrorsNameTheLineAndTheReason(t *testing.T) {
	small := promtext.Limits{Bytes: 100, Line: 30, Families: 2, Samples: 3, Labels: 2}
	for _, c := range []struct {
		in     string
		format promtext.Format
		want   string
	}{
		{"a 1\n<html>\n", text, `line 2: "<html>" does not begin with a metric name`},
		{"a-b 1", text, `line 1: "a-b 1" does not begin with a metric name`},
		{`{"a.b"} 1`, text, `line 1: "{\"a.b\"} 1" does not begin with a metric name`},
		{"a", text, `line 1: a: "" is not a value`},
		{"a one", text, `line 1: a: "one" is not a value`},
		{"a 0x1p3", text, `line 1: a: "0x1p3" is not a value`},
		{"a 1_0", text, `line 1: a: "1_0" is not a value`},
		{"a 1 1.5", text, `line 1: a: "1.5" is not a timestamp`},
		{"a 1 1e3", text, `line 1: a: "1e3" is not a timestamp`},
		{"a 1 NaN\n# EOF", open, `line 1: a: "NaN" is not a timestamp`},
		{"a 1 1000000000000001", text, `line 1: a: "1000000000000001" is not a timestamp`},
		{"a 1 -1000000000000001", text, `line 1: a: "-1000000000000001" is not a timestamp`},
		{"a 1 99999999999999999", text, `line 1: a: "99999999999999999" is not a timestamp`},
		{"a 1 1 1", text, `line 1: a: unexpected "1"`},
		{"a 1 # {} 1", text, `line 1: a: unexpected "# {} 1"`},
		{"a 1 # 1\n# EOF", open, `line 1: a: exemplar: "1" instead of its labels`},
		{"a 1 # {} x\n# EOF", open, `line 1: a: exemplar: "x" is not a value`},
		{"a 1 # {} 1 x\n# EOF", open, `line 1: a: exemplar: "x" is not a timestamp`},
		{`a{b="1",b="2"} 1`, text, `line 1: a: duplicate label b`},
		{`a{__name__="b"} 1`, text, `line 1: a: "__name__=\"b\"} 1" is not a label name`},
		{`a{b:c="b"} 1`, text, `line 1: a: label b: ":c=\"b\"} 1" instead of =`},
		{`a{b=c} 1`, text, `line 1: a: label b: "c} 1" instead of "`},
		{`a{b="c" d="e"} 1`, text, `line 1: a: label b: "d=\"e\"} 1" instead of ,`},
		{`a{b="c\"} 1`, text, `line 1: a: the value of label b does not end`},
		{`a{b="c",`, text, `line 1: a: "" is not a label name`},
		{"a{b=\"\xff\"} 1", text, `line 1: not UTF-8: "a{b=\"\xff\"} 1"`},
		{"# TYPE a thing", text, `line 1: TYPE of a: "thing" is not a type of this format`},
		{"# TYPE a info", text, `line 1: TYPE of a: "info" is not a type of this format`},
		{"# HELP a-b c", text, `line 1: HELP: "a-b" is not a metric name`},
		{"a 1\n", open, `the exposition does not end in # EOF: it was truncated`},
		{"# EOF\na 1\n", open, `line 2: "a 1" follows # EOF`},
		{strings.Repeat("#\n", 51), text, `the exposition is longer than 100 bytes`},
		{"\n#" + strings.Repeat("x", 40), text, `line 2: longer than 30 bytes: "#` + strings.Repeat("x", 39) + `"…`},
		{"a 1\nb 1\nc 1", text, `line 3: "c" exceeds the limit of 2 families`},
		{"# TYPE a gauge\n# TYPE b gauge\n# HELP c d", text, `line 3: "c" exceeds the limit of 2 families`},
		{"a 1\na 1\na 1\na 1", text, `line 4: "a" exceeds the limit of 3 samples`},
		{`a{a="",b="",c=""} 1`, text, `line 1: a: label "c" exceeds the limit of 2 labels`},
	} {
		_, err := promtext.Parse(strings.NewReader(c.in), c.format, small)
		if err == nil || err.Error() != c.want {
			t.Errorf("%q:\n%v, want\n%s", c.in, err, c.want)
		}
	}
}

func TestNegotiation(t *testing.T) {
	for _, c := range []struct {
		accept string
		want   promtext.Format
	}{
		{"", text},
		{"*/*", text},
		{"text/html", text},
		{"application/openmetrics-text", open},
		{"application/*", text},
		{"application/openmetrics-text;version=0.0.1", text},
		{"application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1", open},
		{"application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5, text/plain;version=1.0.0;q=0.9, */*;q=0.2", open},
		{"application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited;q=0.6,application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3", open},
		{"text/plain;version=0.0.4, application/openmetrics-text;version=1.0.0", open},
		{"text/plain;version=0.0.4, application/openmetrics-text;version=1.0.0;q=0.9", text},
		{"text/plain;q=0.1, application/openmetrics-text;q=0.2, */*", open},
		{"application/openmetrics-text;q=0.2, */*", text},
		{"application/openmetrics-text;q=0", text},
		{"application/openmetrics-text;q=1, text/plain;q=0", open},
		{"application/openmetrics-text;q=1.5, */*", text},
		{"application/openmetrics-text, text/plain;q=-1", open},
		{"application/openmetrics-text;q=NaN", text},
		{"application/openmetrics-text;q=7", text},
		{";;,,=", text},
	} {
		if got := promtext.Negotiate(c.accept); got != c.want {
			t.Errorf("%q: %s", c.accept, got.ContentType())
		}
	}
	for contentType, want := range map[string]string{
		"":                             "text/plain; version=0.0.4; charset=utf-8",
		"text/plain":                   "text/plain; version=0.0.4; charset=utf-8",
		"text/plain; version=0.0.4":    "text/plain; version=0.0.4; charset=utf-8",
		"Application/OpenMetrics-Text": "application/openmetrics-text; version=1.0.0; charset=utf-8",
		open.ContentType():             "application/openmetrics-text; version=1.0.0; charset=utf-8",
		"application/openmetrics-text; version=2.0.0": "",
		"application/vnd.google.protobuf":             "",
		"text/html":                                   "",
		"/":                                           "",
	} {
		format, err := promtext.FormatOf(contentType)
		if want == "" && err == nil || want != "" && (err != nil || format.ContentType() != want) {
			t.Errorf("%q: %s %v", contentType, format.ContentType(), err)
		}
	}
}

// FuzzParse checks the promise of the package: every exposition that Parse accepts can be written in both formats, alone and
// merged with itself, and other parsers accept the result.
func FuzzParse(f *testing.F) {
	for _, c := range cases {
		f.Add(c.in, c.from == open)
	}
	f.Fuzz(func(t *testing.T, in string, openMetrics bool) {
		format := text
		if openMetrics {
			format = open
		}
		families, err := promtext.Parse(strings.NewReader(in), format, promtext.Limits{Bytes: 10000})
		if err != nil {
			return
		}
		samples := 0
		for _, family := range families {
			samples += len(family.Samples)
		}
		for _, format := range []promtext.Format{text, open} {
			once, dropped := merge(t, format, families)
			twice, again := merge(t, format, families, families)
			if once != twice || again != dropped+samples {
				t.Errorf("merged with itself, %d and %d of %d dropped:\n%s\nbecomes\n%s", dropped, again, samples, once, twice)
			}
		}
	})
}
