// Package promtext reads and writes the formats that Prometheus scrapes: the text format 0.0.4 and OpenMetrics 1.0.0.
//
// It exists beside github.com/prometheus/common/expfmt because that package has no parser for OpenMetrics text, rejects a
// whole exposition for one bad line or one family in pieces, and converts values to float64, while a merge should not
// change them. The parser of Prometheus itself (model/textparse) is part of the server's module.
//
// Parse is lenient: it accepts what Prometheus accepts and more, such as metadata after samples and families in pieces.
// Write is strict: one block for each family, with only those constructs that every reader accepts. Merge combines several
// parsed expositions into one, for one of the formats. WriteMetrics writes numbers that this program counts; expfmt would
// link protobuf's reflection, which is a tenth of the binary.
//
// Rules of the merge: families of the same name and type are joined, in the order of the parts. The first occurrence wins:
// if a later part repeats a series, or a histogram or summary with the same labels, the later one is dropped. A family is
// also dropped if an earlier part uses its name with another type, or if its sample names could be mistaken for those of an
// earlier family (gauge x_count, histogram x). In OpenMetrics, a counter x_total also occupies the name x; if another
// family has that name, the counter keeps its samples and becomes unknown. Dropped samples are counted.
//
// A type that a format lacks becomes the nearest one: in text, info, stateset and gaugehistogram become gauges, and a
// _created sample becomes a separate gauge; in OpenMetrics, a counter without _total becomes unknown. Values keep their
// text. The values of a histogram are not checked for consistency.
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

// Type is the type of a family, named as in OpenMetrics. Untyped in the text format is Unknown here.
type Type string

// The types of OpenMetrics. The text format has the first five.
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

// Family is a metric with its metadata and samples.
type Family struct {
	// Name is the name in the text format: the OpenMetrics counter x is x_total here, and the info x is x_info.
	Name    string
	Type    Type
	Help    string
	Unit    string // OpenMetrics only
	Samples []Sample
}

// Sample is one line of an exposition.
type Sample struct {
	Name      string // with its suffix: x_total, x_bucket
	Labels    []Label
	Value     string // in its original notation
	Timed     bool
	Timestamp int64     // in milliseconds since 1970; valid if Timed
	Exemplar  *Exemplar // OpenMetrics only
}

// Label is a label's name and its unescaped value. The names of a sample's labels are unique.
type Label struct{ Name, Value string }

// Exemplar refers to one of the events that a sample counts.
type Exemplar struct {
	Labels    []Label
	Value     string // in its original notation
	Timestamp string // in seconds, in its original notation; may be empty
}

// ownLabel is the label with a number that distinguishes the samples of a type. A state set uses its own name instead.
var ownLabel = map[Type]string{Histogram: "le", GaugeHistogram: "le", Summary: "quantile"}

// suffixes are appended to a family's name to form the names of its samples. For counters and infos, the family's name is
// that of OpenMetrics.
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

// openMetricsName returns the family's name in OpenMetrics.
func (f *Family) openMetricsName() string {
	switch f.Type {
	case Counter:
		return strings.TrimSuffix(f.Name, "_total")
	case Info:
		return strings.TrimSuffix(f.Name, "_info")
	}
	return f.Name
}

// claims returns the names that no other family may use, neither for itself nor for its samples.
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

// fits reports whether s may be a sample of f: its name has one of the type's suffixes, it has the label that the type
// requires, and no value that readers reject.
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

// split returns one family of type as for each sample name of f. It is used for families that fit no other type.
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

// parseNumber parses a number that both formats accept: not hexadecimal and without underscores.
func parseNumber(text string) (float64, bool) {
	if strings.ContainsAny(text, "xXpP_") {
		return 0, false
	}
	number, err := strconv.ParseFloat(text, 64)
	return number, err == nil
}

// canonical returns a bound in the notation that OpenMetrics requires, such as 1.0 for 1. Text that is not a number is
// returned unchanged.
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
