package promtext

import (
	"bufio"
	"io"
	"strconv"
	"strings"
)

// Write writes families as one exposition. They must be the result of Merge for the same format, since Write does not check
// for conflicts between families.
func Write(w io.Writer, format Format, families []Family) error {
	out := writer{bufio.NewWriterSize(w, 16<<10), format}
	for i := range families {
		out.family(&families[i])
	}
	out.WriteString(format.End())
	return out.Flush()
}

// writer keeps its first error until Flush.
type writer struct {
	*bufio.Writer
	format Format
}

func (w writer) strings(parts ...string) {
	for _, part := range parts {
		w.WriteString(part)
	}
}

func (w writer) family(f *Family) {
	name, typ, help := f.Name, string(f.Type), helpEscaper.Replace(f.Help)
	if w.format == OpenMetrics {
		name, help = f.openMetricsName(), valueEscaper.Replace(f.Help)
	} else if f.Type == Unknown {
		typ = "untyped"
	}
	if help != "" {
		w.strings("# HELP ", name, " ", help, "\n")
	}
	w.strings("# TYPE ", name, " ", typ, "\n")
	if w.format == OpenMetrics && f.Unit != "" && f.Type != Info && f.Type != StateSet && strings.HasSuffix(name, "_"+f.Unit) {
		w.strings("# UNIT ", name, " ", f.Unit, "\n")
	}
	for i := range f.Samples {
		w.sample(f, &f.Samples[i])
	}
}

func (w writer) sample(f *Family, s *Sample) {
	w.WriteString(s.Name)
	own := ""
	if w.format == OpenMetrics {
		own = ownLabel[f.Type]
	}
	if len(s.Labels) > 0 {
		w.labels(s.Labels, own)
	}
	w.strings(" ", s.Value)
	if s.Timed && w.format == Text {
		w.strings(" ", strconv.FormatInt(s.Timestamp, 10))
	} else if s.Timed {
		w.strings(" ", strconv.FormatFloat(float64(s.Timestamp)/1000, 'f', -1, 64))
	}
	counted := f.Type == Counter && s.Name == f.Name || strings.HasSuffix(s.Name, "_bucket") && ownLabel[f.Type] == "le"
	if e := s.Exemplar; e != nil && w.format == OpenMetrics && counted {
		w.WriteString(" # ")
		w.labels(e.Labels, "")
		w.strings(" ", e.Value)
		if e.Timestamp != "" {
			w.strings(" ", e.Timestamp)
		}
	}
	w.WriteByte('\n')
}

// labels writes labels in braces, the value of the label named bound in its canonical notation.
func (w writer) labels(labels []Label, bound string) {
	w.WriteByte('{')
	for i, label := range labels {
		if i > 0 {
			w.WriteByte(',')
		}
		value := label.Value
		if label.Name == bound {
			value = canonical(value)
		}
		w.strings(label.Name, `="`, valueEscaper.Replace(value), `"`)
	}
	w.WriteByte('}')
}

var (
	helpEscaper  = strings.NewReplacer(`\`, `\\`, "\n", `\n`)
	valueEscaper = strings.NewReplacer(`\`, `\\`, "\n", `\n`, `"`, `\"`)
)
