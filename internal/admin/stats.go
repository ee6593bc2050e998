package admin

import (
	"fmt"
	"io"
	"math"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"sort"
	"strconv"
	"strings"

	"github.com/pillion-proxy/pillion/internal/promtext"
)

// Gatherer returns the current metrics. They are sorted by name.
type Gatherer interface {
	Gather() []promtext.MetricFamily
}

// family is a gathered metric family with its stats.
type family struct {
	gathered *promtext.MetricFamily
	kind     string // counter, gauge or histogram; all other types count as gauges
	stats    []stat
}

// stat is one value of a family.
type stat struct {
	name    string // Envoy's, with dots
	value   float64
	buckets []bucket // of a histogram, whose value is the number of observations

	metric      *promtext.Metric
	first, last int // the lines [first, last) of the metric's text; last 0: all
}

type bucket struct{ bound, count float64 }

// selection holds the criteria of a query for stats.
type selection struct {
	filter   *regexp.Regexp
	kind     string
	usedOnly bool
}

// kinds maps Envoy's types to those of families. The agent has no text readouts.
var kinds = map[string]string{"": "", "All": "", "Counters": "counter", "Gauges": "gauge", "Histograms": "histogram", "TextReadouts": "text"}

func parseSelection(query url.Values) (s selection, err error) {
	var ok bool
	if s.kind, ok = kinds[query.Get("type")]; !ok {
		return s, fmt.Errorf("type=%.50q: use Counters, Gauges, Histograms, TextReadouts or All", query.Get("type"))
	}
	if text := query.Get("filter"); text != "" {
		if s.filter, err = parsePattern("filter", text); err != nil {
			return s, err
		}
	}
	s.usedOnly = query.Has("usedonly")
	return s, nil
}

func (s selection) isAll() bool { return s == selection{} }

// takes reports whether the query selects a stat. A gauge counts as used, since its value may have been set to 0; Envoy
// shows the state LIVE, which is 0, as used.
func (s selection) takes(f family, t stat) bool {
	return (s.kind == "" || s.kind == f.kind) && (s.filter == nil || s.filter.MatchString(t.name)) &&
		(!s.usedOnly || t.value != 0 || f.kind == "gauge")
}

func (h *handler) stats(w http.ResponseWriter, r *http.Request) {
	query := r.URL.Query()
	format := query.Get("format")
	switch format {
	case "prometheus":
		h.prometheus(w, r)
		return
	case "", "text", "json":
	default:
		refuse(w, "format=%.50q: use text, json or prometheus", format)
		return
	}
	gathered, selection, ok := h.asked(w, query)
	if !ok {
		return
	}
	var plain, histograms []stat
	for _, f := range statsOf(gathered) {
		for _, t := range f.stats {
			switch {
			case !selection.takes(f, t):
			case f.kind == "histogram":
				histograms = append(histograms, t)
			default:
				plain = append(plain, t)
			}
		}
	}
	for _, stats := range [][]stat{plain, histograms} {
		sort.Slice(stats, func(i, j int) bool { return stats[i].name < stats[j].name })
	}
	if format == "json" {
		answerJSON(w, object{"stats": statsJSON(plain, histograms)})
		return
	}
	var b strings.Builder
	for _, t := range plain {
		fmt.Fprintf(&b, "%s: %s\n", t.name, number(t.value))
	}
	for _, t := range histograms {
		fmt.Fprintf(&b, "%s: %s\n", t.name, t.quantiles())
	}
	answer(w, http.StatusOK, b.String())
}

// prometheus writes all metrics, or the lines that the query selects.
func (h *handler) prometheus(w http.ResponseWriter, r *http.Request) {
	gathered, selection, ok := h.asked(w, r.URL.Query())
	if !ok {
		return
	}
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	if selection.isAll() {
		_ = promtext.WriteMetrics(w, promtext.Text, gathered) // an error means that the client has left
		return
	}
	for _, f := range statsOf(gathered) {
		needsHead := true
		for _, t := range f.stats {
			if selection.takes(f, t) {
				head, lines := f.text(t)
				if needsHead {
					io.WriteString(w, head)
				}
				io.WriteString(w, lines)
				needsHead = false
			}
		}
	}
}

// text returns the comments above a family and the lines of one of its stats.
func (f *family) text(t stat) (head, lines string) {
	var b strings.Builder
	alone := *f.gathered
	alone.Metrics = []promtext.Metric{*t.metric}
	_ = promtext.WriteMetrics(&b, promtext.Text, []promtext.MetricFamily{alone})
	n := 0
	for line := range strings.Lines(b.String()) {
		if strings.HasPrefix(line, "#") {
			head += line
			continue
		}
		if t.last == 0 || t.first <= n && n < t.last {
			lines += line
		}
		n++
	}
	return head, lines
}

// asked parses the query and gathers the metrics. If the query is wrong, it answers the request and returns false.
func (h *handler) asked(w http.ResponseWriter, query url.Values) ([]promtext.MetricFamily, selection, bool) {
	selection, err := parseSelection(query)
	if err != nil {
		refuse(w, "%v", err)
		return nil, selection, false
	}
	return h.Metrics.Gather(), selection, true
}

// statsOf returns the values of gathered families under Envoy's names.
func statsOf(gathered []promtext.MetricFamily) []family {
	families := make([]family, 0, len(gathered))
	for i := range gathered {
		of := &gathered[i]
		f := family{gathered: of, kind: "gauge"}
		if of.Type == promtext.Counter || of.Type == promtext.Histogram {
			f.kind = string(of.Type)
		}
		for i := range of.Metrics {
			f.add(&of.Metrics[i])
		}
		families = append(families, f)
	}
	return families
}

// add adds the stats of one metric. A summary becomes one stat per line, since Envoy has no summaries.
func (f *family) add(m *promtext.Metric) {
	name := f.gathered.Name
	labels := make([]label, 0, len(m.Labels))
	for _, l := range m.Labels {
		labels = append(labels, label{l.Name, strings.ReplaceAll(l.Value, "\n", " ")}) // a stat is one line
	}
	t := stat{name: dotted(name, labels), value: m.Value, metric: m}
	switch f.gathered.Type {
	case promtext.Histogram:
		t.value = float64(m.Count)
		for _, b := range m.Buckets {
			t.buckets = append(t.buckets, bucket{b.Bound, float64(b.Count)})
		}
	case promtext.Summary:
		line := 0
		add := func(name string, value float64, labels []label) {
			f.stats = append(f.stats, stat{name: dotted(name, labels), value: value, metric: m, first: line, last: line + 1})
			line++
		}
		for _, q := range m.Quantiles {
			share := strconv.FormatFloat(q.Share, 'g', -1, 64)
			add(name, q.Value, append(slices.Clone(labels), label{"quantile", share}))
		}
		add(name+"_sum", m.Sum, labels)
		add(name+"_count", float64(m.Count), labels)
		return
	}
	f.stats = append(f.stats, t)
}

type label struct{ name, value string }

// scopes map prefixes of Prometheus names to scopes of Envoy's dotted names, the more specific first. The value of a scope's
// label follows the scope.
var scopes = []struct {
	prefix string
	of     []scope
}{
	{"envoy_cluster_manager_cds_", []scope{{"cluster_manager", ""}, {"cds", ""}}},
	{"envoy_listener_manager_lds_", []scope{{"listener_manager", ""}, {"lds", ""}}},
	{"envoy_cluster_manager_", []scope{{"cluster_manager", ""}}},
	{"envoy_listener_manager_", []scope{{"listener_manager", ""}}},
	{"envoy_server_", []scope{{"server", ""}}},
	{"envoy_cluster_", []scope{{"cluster", "cluster_name"}}},
	{"envoy_listener_http_", []scope{{"listener", "listener_address"}, {"http", "http_conn_manager_prefix"}}},
	{"envoy_listener_", []scope{{"listener", "listener_address"}}},
	{"envoy_http_", []scope{{"http", "http_conn_manager_prefix"}}},
	{"envoy_tcp_", []scope{{"tcp", "tcp_prefix"}}},
}

type scope struct{ name, label string }

// dotted returns the name that Envoy would print for a stat. A status class is a suffix, such as _2xx. Labels that are not
// part of a scope follow, as .name.value.
func dotted(name string, labels []label) string {
	var parts, others []string
	left := slices.Clone(labels)
	take := func(name string) (value string, found bool) {
		at := slices.IndexFunc(left, func(l label) bool { return l.name == name })
		if at < 0 {
			return "", false
		}
		value = left[at].value
		left = slices.Delete(left, at, at+1)
		return value, true
	}
	rest := strings.TrimPrefix(name, "envoy_")
	for _, s := range scopes {
		after, ok := strings.CutPrefix(name, s.prefix)
		missing := func(of scope) bool {
			return of.label != "" && !slices.ContainsFunc(left, func(l label) bool { return l.name == of.label })
		}
		if !ok || slices.ContainsFunc(s.of, missing) {
			continue
		}
		rest = after
		for _, of := range s.of {
			parts = append(parts, of.name)
			if value, found := take(of.label); found {
				parts = append(parts, value)
			}
		}
		break
	}
	if class, found := take("response_code_class"); found {
		rest += "_" + class
	}
	for _, l := range left {
		others = append(others, l.name, l.value)
	}
	return strings.Join(slices.Concat(parts, []string{rest}, others), ".")
}

// number prints integers without an exponent, as Envoy does.
func number(v float64) string {
	if v == math.Trunc(v) && math.Abs(v) < 1<<53 {
		return strconv.FormatFloat(v, 'f', 0, 64)
	}
	return strconv.FormatFloat(v, 'g', -1, 64)
}

// quantilesShown are the quantiles that Envoy prints, in percent.
var quantilesShown = []float64{0, 25, 50, 75, 90, 95, 99, 99.5, 99.9, 100}

// quantiles prints a histogram. Envoy's first number covers the last few seconds, which are not counted separately here.
func (t stat) quantiles() string {
	if t.value == 0 {
		return "No recorded values"
	}
	var parts []string
	for _, q := range quantilesShown {
		parts = append(parts, fmt.Sprintf("P%s(nan,%s)", number(q), strconv.FormatFloat(t.quantile(q/100), 'g', 6, 64)))
	}
	return strings.Join(parts, " ")
}

// quantile interpolates within the bucket of the quantile. A quantile beyond the last bound is returned as that bound.
func (t stat) quantile(q float64) float64 {
	rank := q * t.value
	var below bucket
	for _, b := range t.buckets {
		if b.count > below.count && b.count >= rank {
			if math.IsInf(b.bound, 1) {
				break
			}
			return below.bound + (b.bound-below.bound)*(rank-below.count)/(b.count-below.count)
		}
		if !math.IsInf(b.bound, 1) {
			below = b
		}
	}
	return below.bound
}

func statsJSON(plain, histograms []stat) []object {
	stats := []object{}
	for _, t := range plain {
		var value any // JSON has no infinity
		if !math.IsNaN(t.value) && !math.IsInf(t.value, 0) {
			value = t.value
		}
		stats = append(stats, object{"name": t.name, "value": value})
	}
	computed := []object{}
	for _, t := range histograms {
		values := []object{}
		for _, q := range quantilesShown {
			cumulative := any(nil)
			if t.value > 0 {
				cumulative = t.quantile(q / 100)
			}
			values = append(values, object{"interval": nil, "cumulative": cumulative})
		}
		computed = append(computed, object{"name": t.name, "values": values})
	}
	if len(computed) > 0 {
		stats = append(stats, object{"histograms": object{"supported_quantiles": quantilesShown, "computed_quantiles": computed}})
	}
	return stats
}
