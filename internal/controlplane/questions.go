package controlplane

import (
	"fmt"
	"maps"
	"slices"

	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/xds"
)

// Resources returns the resources as they are now, in the order of their types, and in each type by name. A resource of
// which a version is in force and another one waits is there twice, the latter as Warming.
func (s *Store) Resources() Resources {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []Resource
	var u unpacker
	for t := range xds.Type(xds.Types) {
		for _, e := range slices.SortedFunc(maps.Values(s.entries[t]), compareNames) {
			all = e.resources(all, t, &u)
		}
	}
	return slices.Values(all)
}

// resources appends an entry's resources.
func (e *entry) resources(all []Resource, t xds.Type, u *unpacker) []Resource {
	for v := range e.used() {
		r := Resource{
			Type: t, Name: e.name, TypeURL: t.URL(), Updated: v.updated, Version: v.text(), Findings: v.findings, Warming: v == e.next,
		}
		if !v.closed {
			r.Bytes = v.reader(u)
		}
		if e.refused != nil && v == latest(e) {
			r.Refusal = &Refusal{Reason: e.refused.reason, At: e.refused.updated, Bytes: e.refused.reader(u), Findings: e.refused.findings}
		}
		all = append(all, r)
	}
	return all
}

// LastGood returns the last good version of each resource that was not removed, in the order of Resources.
func (s *Store) LastGood() Resources {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []Resource
	var u unpacker
	for t := range xds.Type(xds.Types) {
		for _, e := range slices.SortedFunc(maps.Values(s.entries[t]), compareNames) {
			if v := latest(e); v != nil && !v.closed && !e.removed {
				all = append(all, Resource{Type: t, Name: e.name, TypeURL: t.URL(), Updated: v.updated, Version: v.text(), Bytes: v.reader(&u), Findings: v.findings})
			}
		}
	}
	return slices.Values(all)
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
