package metrics

import (
	"strings"
	"sync"

	"github.com/pillion-proxy/pillion/internal/cel"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/podinfo"
	"github.com/pillion-proxy/pillion/internal/promtext"
)

// plan is how a control plane changes Istio's metrics. It is immutable, except for known.
type plan struct {
	changes  map[string]*change // by the metric's name without "istio_"
	programs []*cel.Program     // of the labels that are added

	mu    sync.RWMutex
	known map[string]string // values of the programs, joined; the same text for the same values
}

// change is that of one metric.
type change struct {
	drop   bool
	remove map[string]bool
	added  []addedLabel
}

// addedLabel is a label whose value is that of a program.
type addedLabel struct {
	name    string
	program int
}

// Limits of what a control plane adds.
const (
	maxPlans      = 32  // different ones since the start; others change nothing
	maxPrograms   = 16  // of a plan
	maxAddedValue = 128 // bytes
)

// requestMetrics and connectionMetrics are Istio's metrics.
var (
	requestMetrics    = []string{"requests_total", "request_duration_milliseconds", "request_bytes", "response_bytes"}
	messageMetrics    = []string{"request_messages_total", "response_messages_total"}
	connectionMetrics = []string{"tcp_connections_opened_total", "tcp_connections_closed_total", "tcp_sent_bytes_total", "tcp_received_bytes_total"}
)

// Plan returns what records refer to (flow.Telemetry) so that they are counted as s has it. Equal values have the same plan.
// place returns where records have a header field.
func (m *Metrics) Plan(s *mesh.Stats, place func(cel.Header) int) any {
	if s == nil || len(s.Overrides) == 0 {
		return nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if p := m.plans[s.Key]; p != nil {
		return p
	}
	if len(m.plans) == maxPlans {
		return nil
	}
	p := &plan{changes: map[string]*change{}, known: map[string]string{}}
	for i := range s.Overrides {
		p.add(&s.Overrides[i], place)
	}
	if m.plans == nil {
		m.plans = map[string]*plan{}
	}
	m.plans[s.Key] = p
	return p
}

// add adds an override. A later one of the same metric wins.
func (p *plan) add(o *mesh.MetricOverride, place func(cel.Header) int) {
	names := []string{o.Name}
	if o.Name == "" {
		names = append(append(append([]string(nil), requestMetrics...), messageMetrics...), connectionMetrics...)
	}
	var added []addedLabel
	for _, d := range o.Dimensions {
		if len(p.programs) < maxPrograms {
			added = append(added, addedLabel{labelName(d.Name), len(p.programs)})
			p.programs = append(p.programs, d.Expression.Bind(place))
		}
	}
	for _, name := range names {
		c := p.changes[name]
		if c == nil {
			c = &change{remove: map[string]bool{}}
			p.changes[name] = c
		}
		c.drop = c.drop || o.Drop
		for _, tag := range o.Remove {
			c.remove[labelName(tag)] = true
		}
		c.added = append(c.added, added...)
	}
}

// labelName returns a name that labels may have.
func labelName(name string) string {
	return strings.Map(func(r rune) rune {
		if r == '_' || r >= '0' && r <= '9' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' {
			return r
		}
		return '_'
	}, name)
}

// planOf returns the plan of a record; nil: Istio's metrics are as usual.
func planOf(r *flow.Record) *plan {
	if t := r.HTTP.Telemetry; t != nil {
		p, _ := t.Metrics.(*plan)
		return p
	}
	return nil
}

// unmeasured reports whether the record's filter chain has no metrics of Istio's.
func unmeasured(r *flow.Record) bool { return r.HTTP.Telemetry != nil && r.HTTP.Telemetry.Unmeasured }

// drops reports whether a metric is not reported. p may be nil.
func (p *plan) drops(name string) bool {
	if p == nil {
		return false
	}
	c := p.changes[name]
	return c != nil && c.drop
}

// valueEnd ends a value among several. It is not in values.
const valueEnd = "\x00"

// values returns the values of the labels that are added for a record, each with valueEnd. limit bounds the different ones
// that are kept: further ones are unknown. p may be nil.
func (p *plan) values(r *flow.Record, limit int) string {
	if p == nil || len(p.programs) == 0 {
		return ""
	}
	buf := nameBuffers.Get().(*[maxBuffer]byte)
	defer nameBuffers.Put(buf)
	text := p.appendValues(buf[:0], r)
	p.mu.RLock()
	known, ok := p.known[string(text)]
	p.mu.RUnlock()
	if ok {
		return known
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.known) >= limit {
		return strings.Repeat(podinfo.Unknown+valueEnd, len(p.programs))
	}
	known = string(text)
	p.known[known] = known
	return known
}

func (p *plan) appendValues(dst []byte, r *flow.Record) []byte {
	for _, program := range p.programs {
		start := len(dst)
		dst, _ = program.AppendText(dst, r)
		if len(dst) == start {
			dst = append(dst, podinfo.Unknown...)
		}
		dst = dst[:min(len(dst), start+maxAddedValue)]
		for i := start; i < len(dst); i++ {
			if dst[i] == valueEnd[0] {
				dst[i] = '?'
			}
		}
		dst = append(dst, valueEnd...)
	}
	return dst
}

// labels returns the labels of a metric: those without a plan, changed. p may be nil.
func (p *plan) labels(name string, labels []promtext.Label, values string) []promtext.Label {
	if p == nil || p.changes[name] == nil {
		return labels
	}
	c := p.changes[name]
	changed := make([]promtext.Label, 0, len(labels)+len(c.added))
	for _, l := range labels {
		if !c.remove[l.Name] {
			changed = append(changed, l)
		}
	}
	all := strings.Split(values, valueEnd)
	for _, a := range c.added {
		value := podinfo.Unknown
		if a.program < len(all)-1 {
			value = strings.ToValidUTF8(all[a.program], "?")
		}
		changed = withLabel(changed, a.name, value)
	}
	return changed
}

// withLabel sets a label.
func withLabel(labels []promtext.Label, name, value string) []promtext.Label {
	for i := range labels {
		if labels[i].Name == name {
			labels[i].Value = value
			return labels
		}
	}
	return append(labels, label(name, value))
}

// merge adds up the series of a family that have the same labels. Without some labels, several sets are the same series.
func (f *family) merge() {
	index := map[string]int{}
	kept := f.Metrics[:0]
	for _, m := range f.Metrics {
		var key strings.Builder
		for _, l := range m.Labels {
			key.WriteString(l.Name + valueEnd + l.Value + valueEnd)
		}
		i, known := index[key.String()]
		if !known {
			index[key.String()] = len(kept)
			kept = append(kept, m)
			continue
		}
		to := &kept[i]
		to.Value, to.Sum, to.Count = to.Value+m.Value, to.Sum+m.Sum, to.Count+m.Count
		for j := range to.Buckets {
			to.Buckets[j].Count += m.Buckets[j].Count
		}
	}
	f.Metrics = kept
}
