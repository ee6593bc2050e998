package promtext

import (
	"bufio"
	"io"
	"strconv"
	"strings"
	"time"
)

// MetricFamily is a family of metrics that this program counts. Unlike a Family, which keeps the text that was read, it has
// numbers, and the lines of a histogram share its labels. Its type is Counter, Gauge, Histogram, Summary or Unknown.
type MetricFamily struct {
	Name    string // in OpenMetrics, a counter without the suffix _total becomes unknown
	Help    string
	Type    Type
	Metrics []Metric
}

// Metric has the value of one set of labels. Sets of labels may be shared; they are never modified.
type Metric struct {
	Labels    []Label
	Value     float64    // unless the family is a histogram or a summary
	Buckets   []Bucket   // of a histogram, ascending, the last one with the bound +Inf
	Quantiles []Quantile // of a summary, ascending
	Sum       float64    // of a histogram or a summary
	Count     uint64     // likewise
}

// Bucket is the number of observations that are not above a bound.
type Bucket struct {
	Bound float64
	Count uint64

	Exemplar *MetricExemplar // one of the observations that are in no smaller bucket; nil: none. Only OpenMetrics has them
}

// MetricExemplar is an observation, and what leads to more about it.
type MetricExemplar struct {
	Labels []Label // 128 characters in all, at most
	Value  float64
	Time   time.Time
}

// Quantile is the value that this share of the observations, from 0 to 1, does not exceed.
type Quantile struct{ Share, Value float64 }

// WriteMetrics writes families in their order. It does not write the end mark of OpenMetrics, so that parts of an exposition
// can be written separately; see End.
func WriteMetrics(w io.Writer, format Format, families []MetricFamily) error {
	out := metricWriter{writer: writer{bufio.NewWriterSize(w, 16<<10), format}}
	for i := range families {
		out.family(&families[i])
	}
	return out.Flush()
}

// End returns the text after the last family of an exposition.
func (f Format) End() string {
	if f == OpenMetrics {
		return "# EOF\n"
	}
	return ""
}

type metricWriter struct {
	writer
	number [32]byte // scratch
}

func (w *metricWriter) family(f *MetricFamily) {
	head := Family{Name: f.Name, Help: f.Help, Type: f.Type}
	if w.format == OpenMetrics && f.Type == Counter && !strings.HasSuffix(f.Name, "_total") {
		head.Type = Unknown
	}
	w.writer.family(&head)
	for i := range f.Metrics {
		m := &f.Metrics[i]
		switch f.Type {
		case Histogram:
			for _, b := range m.Buckets {
				w.sample(f.Name, "_bucket", m.Labels, "le", b.Bound)
				w.bucket(&b)
			}
			w.total(f.Name, m)
		case Summary:
			for _, q := range m.Quantiles {
				w.sample(f.Name, "", m.Labels, "quantile", q.Share)
				w.value(q.Value)
			}
			w.total(f.Name, m)
		default:
			w.sample(f.Name, "", m.Labels, "", 0)
			w.value(m.Value)
		}
	}
}

// total writes the sum and the count of a histogram or a summary.
func (w *metricWriter) total(name string, m *Metric) {
	w.sample(name, "_sum", m.Labels, "", 0)
	w.value(m.Sum)
	w.sample(name, "_count", m.Labels, "", 0)
	w.count(m.Count)
}

// sample writes a line up to its value. The label own follows the others, if it has a name.
func (w *metricWriter) sample(name, suffix string, labels []Label, own string, value float64) {
	w.strings(name, suffix)
	separator := "{"
	for _, l := range labels {
		w.strings(separator, l.Name, `="`)
		valueEscaper.WriteString(w, l.Value)
		w.WriteByte('"')
		separator = ","
	}
	if own != "" {
		w.strings(separator, own, `="`)
		w.float(value)
		w.WriteByte('"')
		separator = ","
	}
	if separator == "," {
		w.WriteByte('}')
	}
	w.WriteByte(' ')
}

// count writes the value of a line that counts. In the text format all values are floating-point numbers.
func (w *metricWriter) count(n uint64) {
	if w.format == Text {
		w.value(float64(n))
		return
	}
	w.Write(strconv.AppendUint(w.number[:0], n, 10))
	w.WriteByte('\n')
}

// bucket writes the value of a line of a bucket, with its exemplar.
func (w *metricWriter) bucket(b *Bucket) {
	e := b.Exemplar
	if e == nil || w.format == Text {
		w.count(b.Count)
		return
	}
	w.Write(strconv.AppendUint(w.number[:0], b.Count, 10))
	w.WriteString(" # ")
	w.labels(e.Labels, "")
	w.WriteByte(' ')
	w.float(e.Value)
	w.WriteByte(' ')
	w.Write(strconv.AppendFloat(w.number[:0], float64(e.Time.UnixMilli())/1000, 'f', 3, 64))
	w.WriteByte('\n')
}

func (w *metricWriter) value(v float64) {
	w.float(v)
	w.WriteByte('\n')
}

// float writes a number. OpenMetrics requires 1.0 for 1 in bounds and quantiles, and accepts it elsewhere.
func (w *metricWriter) float(v float64) {
	text := strconv.AppendFloat(w.number[:0], v, 'g', -1, 64)
	w.Write(text)
	if w.format == OpenMetrics && !strings.ContainsAny(string(text), ".eIN") {
		w.WriteString(".0")
	}
}
