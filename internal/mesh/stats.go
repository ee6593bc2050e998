package mesh

import (
	"cmp"
	"slices"
	"strings"

	"github.com/pillion-proxy/pillion/internal/cel"
	"github.com/pillion-proxy/pillion/internal/wire"
)

// Stats is how Istio's metrics of a filter chain are changed (stats.PluginConfig). Without it a chain has no such metrics.
type Stats struct {
	Overrides []MetricOverride

	// Key is the same for equal values.
	Key string `json:"-"`
}

// MetricOverride is a change of one metric.
type MetricOverride struct {
	Name       string // without the prefix "istio_"; empty: all metrics
	Drop       bool   // it is not reported
	Remove     []string
	Dimensions []Dimension // labels that are added, or replaced, by their names
}

// Dimension is a label and the expression that gives its value.
type Dimension struct {
	Name       string
	Expression *cel.Expression `json:"-"`
}

var statsFields = message{statsType, Cosmetic, []field{
	1:  {"debug", ignored},
	2:  {"max_peer_cache_size", ignored},
	3:  {"stat_prefix", cosmetic},
	4:  {"field_separator", ignored},
	5:  {"value_separator", ignored},
	6:  {"disable_host_header_fallback", ignored}, // inbound, the host names a service of this workload only if it is served
	7:  {"tcp_reporting_duration", ignored},       // each scrape has the bytes of open connections
	8:  {"metrics", decoded},
	9:  {"definitions", cosmetic},
	10: {"reporter", cosmetic}, // of a waypoint
	11: {"rotation_interval", cosmetic},
	12: {"graceful_deletion_interval", cosmetic},
}}

var metricFields = message{"stats.MetricConfig", Cosmetic, []field{
	1: {"dimensions", decoded},
	2: {"name", decoded},
	3: {"tags_to_remove", decoded},
	4: {"match", ignored}, // without effect in Istio as well
	5: {"drop", decoded},
}}

// stats returns how metrics are changed. Its findings never concern security.
func (d *decoder) stats(m wire.Message, config []byte) *Stats {
	s := &Stats{Key: string(config)}
	for d.next(&m, &statsFields) {
		add(d, &s.Overrides, &m, d.metricOverride(m.Message()))
	}
	return s
}

func (d *decoder) metricOverride(m wire.Message) (o MetricOverride) {
	for d.next(&m, &metricFields) {
		switch m.Number {
		case 1:
			d.dimension(m.Message(), &o)
		case 2:
			o.Name = strings.TrimPrefix(m.String(), "istio_")
		case 3:
			o.Remove = append(o.Remove, m.String())
		case 5:
			o.Drop = m.Bool()
		}
	}
	slices.SortFunc(o.Dimensions, func(a, b Dimension) int { return cmp.Compare(a.Name, b.Name) })
	switch of, messages := strings.HasPrefix(o.Name, "tcp_"), strings.Contains(o.Name, "_messages_"); {
	case (of || o.Name == "") && len(o.Dimensions) > 0:
		d.report(Cosmetic, "the tags of "+o.Name+" are added to requests only, not to connections")
	case messages && len(o.Dimensions)+len(o.Remove) > 0:
		d.report(Cosmetic, "the tags of "+o.Name+" are not changed")
	}
	return o
}

// dimension reads an entry of a map from names to expressions.
func (d *decoder) dimension(m wire.Message, o *MetricOverride) {
	var name, text string
	for m.Next() {
		switch m.Number {
		case 1:
			name = m.String()
		case 2:
			text = m.String()
		}
	}
	expression, err := cel.Parse(text)
	if err != nil {
		d.report(Cosmetic, "the tag "+name+" has no value: the expression "+text+" is not understood: "+err.Error())
		return
	}
	o.Dimensions = append(o.Dimensions, Dimension{name, expression})
}
