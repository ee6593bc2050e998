package controlplane

import (
	"maps"
	"slices"
	"time"

	"github.com/pillion-proxy/pillion/internal/xds"
)

// absence is of a resource that is asked for and has not come.
type absence struct {
	since  time.Time
	logged bool
}

// effects is what follows from resources that do not come.
var effects = [xds.Types]string{
	xds.Endpoints:  "clusters have no hosts",
	xds.Routes:     "listeners are not in force",
	xds.Secrets:    "connections that need them are refused",
	xds.Extensions: "filters have no configuration",
}

// noteAbsent records which of the names that are asked for have not come.
func (s *Store) noteAbsent(t xds.Type, now time.Time) {
	absent := make(map[string]absence, max(len(s.asked[t])-len(s.entries[t]), 0))
	for name := range s.asked[t] {
		if s.entries[t][name] != nil {
			continue
		}
		a, ok := s.absent[t][name]
		if !ok {
			a.since = now
			s.await(now.Add(warmingTimeout), now)
		}
		absent[name] = a
	}
	s.absent[t] = absent
}

// maxAbsentNames bounds the names in one line of the log.
const maxAbsentNames = 10

// reportAbsent logs the resources that are absent for too long, once.
func (s *Store) reportAbsent(now time.Time) {
	for t := range xds.Type(xds.Types) {
		var late []string
		for name, a := range s.absent[t] {
			switch due := a.since.Add(warmingTimeout); {
			case a.logged:
			case now.Before(due):
				s.await(due, now)
			default:
				a.logged = true
				s.absent[t][name] = a
				late = append(late, name)
			}
		}
		if len(late) > 0 {
			slices.Sort(late)
			s.config.Log.Warn("the control plane does not send resources that its configuration names",
				"type", t, "effect", effects[t], "count", len(late), "names", late[:min(len(late), maxAbsentNames)])
		}
	}
}

// Absent is a resource that the configuration names and that has not come.
type Absent struct {
	Type  xds.Type
	Name  string
	Since time.Time // when it was asked for
}

// Absent returns the resources that are asked for and have not come, in the order of their types and names.
func (s *Store) Absent() []Absent {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []Absent
	for t := range xds.Type(xds.Types) {
		for _, name := range slices.Sorted(maps.Keys(s.absent[t])) {
			all = append(all, Absent{t, name, s.absent[t][name].since})
		}
	}
	return all
}
