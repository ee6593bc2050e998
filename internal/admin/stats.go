package admin

import (
	"cmp"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// family is a metric of the Prometheus text format, with the lines that it is made of.
type family struct {
	name, kind string // counter, gauge, histogram; all others count as gauges
	head       []string
	stats      []stat
}

// stat is one of a family's values.
type stat struct {
	name    string // Envoy's, with dots
	value   float64
	buckets []bucket // of a histogram, whose value is the number of observations
	lines   []string
}

type bucket struct{ bound, count float64 }

// selection is which stats a query asks for.
type selection struct {
	filter   *regexp.Regexp
	kind     string
	usedOnly bool
}

// kinds are Envoy's types by ours. Text readouts we have none.
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

// takes reports whether a stat is asked for. Whether a gauge that is 0 was ever set is not known; Envoy shows the state
// LIVE, which is 0, as used.
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
	text, selection, ok := h.asked(w, query)
	if !ok {
		return
	}
	var plain, histograms []stat
	for _, f := range parseFamilies(text) {
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
		slices.SortFunc(stats, func(a, b stat) int { return cmp.Compare(a.name, b.name) })
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

// prometheus writes the metrics as they are, or the lines that are asked for.
func (h *handler) prometheus(w http.ResponseWriter, r *http.Request) {
	text, selection, ok := h.asked(w, r.URL.Query())
	if !ok {
		return
	}
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	if selection.isAll() {
		io.WriteString(w, text)
		return
	}
	for _, f := range parseFamilies(text) {
		head := f.head
		for _, t := range f.stats {
			if selection.takes(f, t) {
				io.WriteString(w, strings.Join(head, "")+strings.Join(t.lines, ""))
				head = nil
			}
		}
	}
}

// asked reads the metrics and what the query asks of them. When it cannot, it answers.
func (h *handler) asked(w http.ResponseWriter, query url.Values) (string, selection, bool) {
	selection, err := parseSelection(query)
	if err != nil {
		refuse(w, "%v", err)
		return "", selection, false
	}
	var text strings.Builder
	if err := h.Metrics(&text); err != nil {
		answer(w, http.StatusInternalServerError, fmt.Sprintf("writing metrics: %v\n", err))
		return "", selection, false
	}
	return text.String(), selection, true
}

// parseFamilies reads the agent's own metrics, which are well-formed. Lines that it does not understand it leaves out.
func parseFamilies(text string) []family {
	var families []family
	for line := range strings.Lines(text) {
		words := strings.Fields(line)
		if len(words) == 0 {
			continue
		}
		if words[0] == "#" {
			if len(words) < 3 || words[1] != "HELP" && words[1] != "TYPE" {
				continue
			}
			if n := len(families); n == 0 || families[n-1].name != words[2] {
				families = append(families, family{name: words[2], kind: "gauge"})
			}
			f := &families[len(families)-1]
			f.head = append(f.head, line)
			if len(words) > 3 && words[1] == "TYPE" && (words[3] == "counter" || words[3] == "histogram") {
				f.kind = words[3]
			}
			continue
		}
		name, labels, value, ok := parseSample(line)
		if !ok {
			continue
		}
		if n := len(families); n == 0 || !families[n-1].has(name) {
			families = append(families, family{name: name, kind: "gauge"})
		}
		families[len(families)-1].add(name, labels, value, line)
	}
	return families
}

// has reports whether a sample of this name belongs to the family.
func (f *family) has(name string) bool {
	suffix, ok := strings.CutPrefix(name, f.name)
	return ok && (suffix == "" || suffix == "_bucket" || suffix == "_sum" || suffix == "_count")
}

func (f *family) add(name string, labels []label, value float64, line string) {
	if f.kind != "histogram" {
		f.stats = append(f.stats, stat{name: dotted(name, labels), value: value, lines: []string{line}})
		return
	}
	var bound float64
	others := slices.DeleteFunc(slices.Clone(labels), func(l label) bool {
		if l.name == "le" {
			bound, _ = strconv.ParseFloat(l.value, 64)
		}
		return l.name == "le"
	})
	dots := dotted(f.name, others)
	if n := len(f.stats); n == 0 || f.stats[n-1].name != dots {
		f.stats = append(f.stats, stat{name: dots})
	}
	t := &f.stats[len(f.stats)-1]
	t.lines = append(t.lines, line)
	switch strings.TrimPrefix(name, f.name) {
	case "_bucket":
		t.buckets = append(t.buckets, bucket{bound, value})
	case "_count":
		t.value = value
	}
}

type label struct{ name, value string }

var (
	sampleLine = regexp.MustCompile(`^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{((?:[^"}]|"(?:[^"\\]|\\.)*")*)\})?[ \t]+([^ \t\n]+)`)
	labelPair  = regexp.MustCompile(`([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"`)
	unescaped  = strings.NewReplacer(`\\`, `\`, `\"`, `"`, `\n`, " ") // a stat is one line
)

func parseSample(line string) (name string, labels []label, value float64, ok bool) {
	m := sampleLine.FindStringSubmatch(line)
	if m == nil {
		return "", nil, 0, false
	}
	value, err := strconv.ParseFloat(m[3], 64)
	for _, pair := range labelPair.FindAllStringSubmatch(m[2], -1) {
		labels = append(labels, label{pair[1], unescaped.Replace(pair[2])})
	}
	return m[1], labels, value, err == nil
}

// scopes are how Envoy's Prometheus names came from its dotted ones, the more specific first. The value of the label, if
// there is one, stood behind the scope.
var scopes = []struct{ prefix, scope, label string }{
	{"envoy_cluster_manager_", "cluster_manager", ""},
	{"envoy_listener_manager_", "listener_manager", ""},
	{"envoy_server_", "server", ""},
	{"envoy_cluster_", "cluster", "cluster_name"},
	{"envoy_listener_", "listener", "listener_address"},
	{"envoy_http_", "http", "http_conn_manager_prefix"},
	{"envoy_tcp_", "tcp", "tcp_prefix"},
}

// dotted is the name that Envoy would print for a stat. Labels that are no part of a scope follow, as .name.value.
func dotted(name string, labels []label) string {
	parts := []string{strings.TrimPrefix(name, "envoy_")}
	for _, s := range scopes {
		rest, ok := strings.CutPrefix(name, s.prefix)
		at := slices.IndexFunc(labels, func(l label) bool { return l.name == s.label })
		if !ok || s.label != "" && at < 0 {
			continue
		}
		parts = []string{s.scope}
		if at >= 0 {
			parts = append(parts, labels[at].value)
			labels = slices.Delete(slices.Clone(labels), at, at+1)
		}
		parts = append(parts, rest)
		break
	}
	for _, l := range labels {
		parts = append(parts, l.name, l.value)
	}
	return strings.Join(parts, ".")
}

// number prints whole numbers without an exponent, as Envoy's are.
func number(v float64) string {
	if v == math.Trunc(v) && math.Abs(v) < 1<<53 {
		return strconv.FormatFloat(v, 'f', 0, 64)
	}
	return strconv.FormatFloat(v, 'g', -1, 64)
}

// quantilesShown are Envoy's.
var quantilesShown = []float64{0, 25, 50, 75, 90, 95, 99, 99.5, 99.9, 100}

// quantiles prints a histogram. Envoy's first number is of the last few seconds, of which we know nothing.
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

// quantile interpolates inside the bucket in which the quantile falls. Beyond the last bound it is that bound.
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
