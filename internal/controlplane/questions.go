package controlplane

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/xds"
)

// Resources returns the resources as they are now, in the order of their types, and in each type by name. A resource of
// which a version is in force and another one waits is there twice, the latter as Warming.
func (s *Store) Resources() Resources {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []Resource
	now, u := s.config.Now(), &unpacker{limit: maxUnpacked}
	for t := range xds.Type(xds.Types) {
		for _, e := range slices.SortedFunc(maps.Values(s.entries[t]), compareNames) {
			all = s.resources(all, t, e, now, u)
		}
	}
	return slices.Values(all)
}

// resources appends an entry's resources.
func (s *Store) resources(all []Resource, t xds.Type, e *entry, now time.Time, u *unpacker) []Resource {
	for v := range e.used() {
		r := Resource{
			Type: t, Name: e.name, TypeURL: t.URL(), Updated: s.after(v.updated, 0, now), Version: v.text(), Findings: v.findings, Warming: v == e.next,
		}
		if !v.closed {
			r.Bytes = v.reader(u)
		}
		if e.refused != nil && v == latest(e) {
			r.Refusal = &Refusal{Reason: e.refused.reason, At: s.after(e.refused.updated, 0, now), Bytes: e.refused.reader(u), Findings: e.refused.findings}
		}
		all = append(all, r)
	}
	return all
}

// LastGood returns the last good version of each resource that was not removed. Reading the bytes in the order that is
// returned unpacks each chunk once.
func (s *Store) LastGood() Resources {
	s.mu.Lock()
	defer s.mu.Unlock()
	now, byChunk, u := s.config.Now(), map[*chunk][]Resource{}, &unpacker{}
	for t := range xds.Type(xds.Types) {
		for _, e := range s.entries[t] {
			if v := latest(e); v != nil && !v.closed && !e.removed {
				in := v.raw.in
				byChunk[in] = append(byChunk[in], Resource{
					Type: t, Name: e.name, TypeURL: t.URL(), Updated: s.after(v.updated, 0, now), Version: v.text(), Bytes: v.reader(u), Findings: v.findings,
				})
			}
		}
	}
	return func(yield func(Resource) bool) {
		for _, resources := range byChunk {
			for _, r := range resources {
				if !yield(r) {
					return
				}
			}
		}
	}
}

func latest(e *entry) *version {
	if e.next != nil {
		return e.next
	}
	return e.active
}

// reader returns a function that returns the bytes of a version.
func (v *version) reader(u *unpacker) func() ([]byte, error) {
	raw := v.raw.view()
	return func() ([]byte, error) { return u.read(raw) }
}

// text returns the version as it is shown.
func (v *version) text() string { return fmt.Sprintf("%016x", v.hash) }

// TypeCounts is what a Store has of one type.
type TypeCounts struct {
	InForce  int
	Warming  int                    // versions that wait
	Refused  int                    // resources of which a later version was refused
	Findings [mesh.Security + 1]int // by class, as Findings returns them
}

// TypeCounts returns how many resources and findings there are. It is cheap enough for each scrape.
func (s *Store) TypeCounts() (all [xds.Types]TypeCounts) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for t := range s.entries {
		counts := &all[t]
		for _, e := range s.entries[t] {
			if e.active != nil {
				counts.InForce++
			}
			if e.next != nil {
				counts.Warming++
			}
			if e.refused != nil {
				counts.Refused++
			}
			for v := range e.used() {
				for _, f := range e.shown(v) {
					counts.Findings[f.Class]++
				}
			}
		}
	}
	return all
}

// shown returns the findings that concern a version: those of the refused one, if that came after it.
func (e *entry) shown(v *version) []mesh.Finding {
	if e.refused != nil && v == latest(e) {
		return e.refused.findings
	}
	return v.findings
}

// ResourceFinding is a finding with its resource.
type ResourceFinding struct {
	Type xds.Type
	Name string
	mesh.Finding
}

// Findings returns the findings of all resources, in their order.
func (s *Store) Findings() []ResourceFinding {
	var all []ResourceFinding
	for r := range s.Resources() {
		findings := r.Findings
		if r.Refusal != nil {
			findings = r.Refusal.Findings
		}
		for _, f := range findings {
			all = append(all, ResourceFinding{r.Type, r.Name, f})
		}
	}
	return all
}
