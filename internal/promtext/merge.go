package promtext

import (
	"slices"
	"sort"
)

// Merge combines parts into one set of families that Write can write in format, by the rules in the package comment. It also
// returns the number of samples that it dropped. It does not modify the parts; the result shares memory with them.
func Merge(format Format, parts ...[]Family) (families []Family, dropped int) {
	m := merger{format: format, byName: make(map[string]*merged), claimed: make(map[string]bool), others: make(map[string]bool)}
	if format == OpenMetrics {
		for _, part := range parts {
			for i := range part {
				names := format
				if part[i].Type == Counter {
					names = Text // the name without _total yields to other families
				}
				for _, name := range part[i].claims(names) {
					m.others[name] = true
				}
			}
		}
	}
	for number, part := range parts {
		for _, f := range part {
			for _, f := range m.adapt(f) {
				m.add(number, f)
			}
		}
	}
	for _, f := range m.order {
		for _, group := range f.groups {
			f.Samples = append(f.Samples, group.samples...)
		}
		families = append(families, f.Family)
	}
	return families, m.dropped
}

type merger struct {
	format  Format
	byName  map[string]*merged
	order   []*merged
	claimed map[string]bool
	others  map[string]bool // in OpenMetrics, the names to which counters yield
	dropped int
}

// merged is a family under construction. The samples of one histogram or summary must be adjacent and come from one part.
type merged struct {
	Family
	seen    map[string]bool   // series
	byGroup map[string]*group // by labels, without ownLabel
	groups  []*group
}

type group struct {
	part    int
	samples []Sample
}

// adapt converts a family to types that the format has.
func (m *merger) adapt(f Family) []Family {
	base := f.openMetricsName()
	switch {
	case m.format == OpenMetrics && f.Type == Counter:
		if base == f.Name || base == "" || m.others[base] || m.others[base+"_created"] {
			return split(f, Unknown)
		}
	case m.format == Text && f.Type == GaugeHistogram:
		return split(f, Gauge)
	case m.format == Text && (f.Type == Info || f.Type == StateSet):
		f.Type = Gauge
	case m.format == Text && f.Type != Gauge && f.Type != Unknown:
		created := f
		created.Samples = nil
		var rest []Sample
		for _, s := range f.Samples {
			if s.Name == base+"_created" {
				created.Samples = append(created.Samples, s)
			} else {
				rest = append(rest, s)
			}
		}
		f.Samples = rest
		return append([]Family{f}, split(created, Gauge)...)
	}
	return []Family{f}
}

// add joins f with the family of its name and type, or adds that family.
func (m *merger) add(part int, f Family) {
	if len(f.Samples) == 0 {
		return
	}
	to := m.byName[f.Name]
	if to == nil || to.Type != f.Type {
		claims := f.claims(m.format)
		if slices.ContainsFunc(claims, func(name string) bool { return m.claimed[name] }) {
			m.dropped += len(f.Samples)
			return
		}
		for _, name := range claims {
			m.claimed[name] = true
		}
		to = &merged{
			Family: Family{Name: f.Name, Type: f.Type, Help: f.Help, Unit: f.Unit},
			seen:   make(map[string]bool), byGroup: make(map[string]*group),
		}
		m.byName[f.Name] = to
		m.order = append(m.order, to)
	}
	if to.Help == "" {
		to.Help = f.Help
	}
	for i := range f.Samples {
		if !to.add(part, f.Samples[i]) {
			m.dropped++
		}
	}
}

// add adds s and reports whether it did. A duplicate is rejected, and so is a sample of a histogram or summary that another
// part has begun.
func (f *merged) add(part int, s Sample) bool {
	own := ownLabel[f.Type]
	if f.Type == StateSet {
		own = f.Name
	}
	of := key(s.Labels, own)
	series := of + s.Name
	if i := slices.IndexFunc(s.Labels, func(l Label) bool { return l.Name == own }); i >= 0 && f.Type != StateSet {
		series += "\xff" + canonical(s.Labels[i].Value)
	} else if i >= 0 {
		series += "\xff" + s.Labels[i].Value
	}
	if f.seen[series] {
		return false
	}
	g := f.byGroup[of]
	if g == nil {
		g = &group{part: part}
		f.byGroup[of] = g
		f.groups = append(f.groups, g)
	}
	if g.part != part {
		return false
	}
	f.seen[series] = true
	g.samples = append(g.samples, s)
	return true
}

// sortLabels sorts labels by name. The usual few stay on the stack, unlike with package sort.
func sortLabels(labels []Label) {
	if len(labels) > 32 {
		clone := slices.Clone(labels)
		sort.Slice(clone, func(i, k int) bool { return clone[i].Name < clone[k].Name })
		copy(labels, clone)
		return
	}
	for i := range labels {
		for k := i; k > 0 && labels[k].Name < labels[k-1].Name; k-- {
			labels[k], labels[k-1] = labels[k-1], labels[k]
		}
	}
}

// key returns a key for a set of labels in any order, ignoring the label named without. A label with an empty value counts
// as absent. The separator 0xff does not occur in UTF-8.
func key(labels []Label, without string) string {
	sorted := append(make([]Label, 0, 32), labels...) // usually on the stack
	sortLabels(sorted)
	text := make([]byte, 0, 512)
	for _, label := range sorted {
		if label.Value != "" && label.Name != without {
			text = append(text, label.Name...)
			text = append(text, 0xff)
			text = append(text, label.Value...)
			text = append(text, 0xff)
		}
	}
	return string(text)
}
