// Package promtext reads and writes the formats that Prometheus scrapes: the text format 0.0.4 and OpenMetrics 1.0.0.
//
// It exists beside github.com/prometheus/common/expfmt because that package has no parser for OpenMetrics text, refuses an
// exposition as a whole for one bad line or one family in pieces, and converts values to float64, while a merge should
// pass them on unchanged. The parser of Prometheus itself (model/textparse) is part of the server's module.
//
// Parse is lenient: it accepts what Prometheus accepts, and more, such as metadata behind samples and families in
// pieces. Write is strict: one block for each family, and only what every reader accepts. Between them stands Merge,
// which makes one exposition out of several, for one of the formats.
//
// The rule of the merge: families of the same name and type are joined, in the order of the parts. What comes first
// stays: of a series, or of a histogram or summary with the same labels, that a later part has too, the later is dropped.
// So is a family whose name has another type in an earlier part, or whose sample names could be taken for those of an
// earlier family (gauge x_count, histogram x). In OpenMetrics alone a counter x_total also takes the name x; where another
// family has that name, the counter keeps its samples and becomes unknown. What is dropped is counted, in samples.
//
// A format that lacks a type gets the nearest thing: in text info, stateset and gaugehistogram are gauges and a _created
// sample is a gauge of its own; in OpenMetrics a counter without _total is unknown. Numbers are never computed with:
// values keep the text that they came in. The numbers of a histogram are not checked against each other.
package promtext

import (
	"math"
	"slices"
	"strconv"
	"strings"
)

// Format is one of the two text formats.
type Format int

// The formats. Text is 0.0.4, OpenMetrics is 1.0.0.
const (
	Text Format = iota
	OpenMetrics
)

// Type is what a family is, in the words of OpenMetrics. What the text format calls untyped is Unknown.
type Type string

// The types of both formats. The text format has the first five.
const (
	Unknown        Type = "unknown"
	Counter        Type = "counter"
	Gauge          Type = "gauge"
	Histogram      Type = "histogram"
	Summary        Type = "summary"
	Info           Type = "info"
	StateSet       Type = "stateset"
	GaugeHistogram Type = "gaugehistogram"
)

// Family is what stands below one TYPE line.
type Family struct {
	// Name is the name in the text format: the OpenMetrics counter x is x_total here, and the info x is x_info.
	Name    string
	Type    Type
	Help    string
	Unit    string // OpenMetrics only
	Samples []Sample
}

// Sample is one line.
type Sample struct {
	Name      string // with its suffix: x_total, x_bucket
	Labels    []Label
	Value     string // as it stood
	Timed     bool
	Timestamp int64     // in milliseconds since 1970, when Timed
	Exemplar  *Exemplar // OpenMetrics only
}

// Label is a label's name and its value, not escaped. The labels of a sample have different names.
type Label struct{ Name, Value string }

// Exemplar points from a sample to one thing that was counted in it.
type Exemplar struct {
	Labels    []Label
	Value     string // as it stood
	Timestamp string // in seconds as it stood, or empty
}

// ownLabel is the label by which a type tells its samples apart, with a number. A state set has its own name for that.
var ownLabel = map[Type]string{Histogram: "le", GaugeHistogram: "le", Summary: "quantile"}

// suffixes are what a family's name may be followed by in the names of its samples. For counters and infos the name is
// that in OpenMetrics.
var suffixes = map[Type][]string{
	Unknown:        {""},
	Counter:        {"_total", "_created"},
	Gauge:          {""},
	Histogram:      {"_bucket", "_sum", "_count", "_created"},
	Summary:        {"", "_sum", "_count", "_created"},
	Info:           {"_info"},
	StateSet:       {""},
	GaugeHistogram: {"_bucket", "_gsum", "_gcount"},
}

// openMetricsName is the family's name there.
func (f *Family) openMetricsName() string {
	switch f.Type {
	case Counter:
		return strings.TrimSuffix(f.Name, "_total")
	case Info:
		return strings.TrimSuffix(f.Name, "_info")
	}
	return f.Name
}

// claims are the names that no other family may have, as its own or for samples.
func (f *Family) claims(format Format) []string {
	name, claims := f.Name, []string{f.Name}
	if format == OpenMetrics {
		name = f.openMetricsName()
		claims = []string{name}
	} else if f.Type == Counter {
		return claims
	}
	for _, suffix := range suffixes[f.Type] {
		if suffix != "" && (format == OpenMetrics || suffix != "_created") {
			claims = append(claims, name+suffix)
		}
	}
	return claims
}

// fits reports whether s may stand in f: its name has one of the type's suffixes, it has the label that the type asks
// for, and no number that readers refuse.
func (f *Family) fits(s *Sample, format Format) bool {
	if format == Text && f.Type == Counter {
		return s.Name == f.Name
	}
	suffix, ok := strings.CutPrefix(s.Name, f.openMetricsName())
	if !ok || !slices.Contains(suffixes[f.Type], suffix) || format == Text && suffix == "_created" {
		return false
	}
	if counted := suffix == "_bucket" || suffix == "_count"; counted && f.Type != GaugeHistogram && s.Value[0] == '-' {
		return false
	}
	own := ownLabel[f.Type]
	if f.Type == StateSet {
		return slices.ContainsFunc(s.Labels, func(l Label) bool { return l.Name == f.Name })
	}
	if own == "" {
		return true
	}
	i := slices.IndexFunc(s.Labels, func(l Label) bool { return l.Name == own })
	if suffix == "" || suffix == "_bucket" {
		number, ok := parseNumber(at(s.Labels, i).Value)
		return ok && !math.IsNaN(number)
	}
	return i < 0
}

func at(labels []Label, i int) Label {
	if i < 0 {
		return Label{}
	}
	return labels[i]
}

// split makes a family of type as for each sample name of f. It is the way out for what fits no other type.
func split(f Family, as Type) []Family {
	var parts []Family
	where := make(map[string]int)
	for _, s := range f.Samples {
		i, ok := where[s.Name]
		if !ok {
			i = len(parts)
			where[s.Name] = i
			parts = append(parts, Family{Name: s.Name, Type: as, Help: f.Help})
		}
		parts[i].Samples = append(parts[i].Samples, s)
	}
	return parts
}

// parseNumber takes the numbers that both formats have: no hexadecimal, no underscores.
func parseNumber(text string) (float64, bool) {
	if strings.ContainsAny(text, "xXpP_") {
		return 0, false
	}
	number, err := strconv.ParseFloat(text, 64)
	return number, err == nil
}

// canonical spells the number of a bound as OpenMetrics wants it: 1 is 1.0 there. What is no number stays.
func canonical(text string) string {
	number, ok := parseNumber(text)
	if !ok {
		return text
	}
	text = strconv.FormatFloat(number, 'g', -1, 64)
	if !strings.ContainsAny(text, ".eIN") {
		text += ".0"
	}
	return text
}
