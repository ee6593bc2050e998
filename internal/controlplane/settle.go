package controlplane

import (
	"cmp"
	"iter"
	"maps"
	"time"

	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/xds"
)

// settle puts resources in force as far as what they need is there, and takes away what is not needed any more: clusters,
// then the routes that name them, then the listeners that name these.
func (s *Store) settle(edit *mesh.Edit, now time.Time) {
	s.deadline, s.pending = time.Time{}, 0
	if s.seen[xds.Listeners] && s.snapshot.Load() == nil {
		s.await(s.started.Add(warmingTimeout), now)
	}
	for _, e := range s.entries[xds.Clusters] {
		s.warm(edit, xds.Clusters, e, now, warmingTimeout, s.hasEndpoints)
	}
	for _, e := range s.entries[xds.Routes] {
		s.warm(edit, xds.Routes, e, now, namingTimeout, s.hasClusters)
	}
	for _, e := range s.entries[xds.Listeners] {
		if e.removed {
			s.erase(edit, xds.Listeners, e)
		} else {
			s.warm(edit, xds.Listeners, e, now, namingTimeout, s.hasRoutes)
		}
	}
	s.dropClusters(edit, now)
	s.reportAbsent(now)
}

// readiness is whether a resource can be in force: at once, when its time is over, or when something else has come.
type readiness uint8

const (
	ready readiness = iota
	waits
	stuck // without limit
)

// warm makes an entry's next version the active one when it is ready, or when it has waited for timeout.
func (s *Store) warm(edit *mesh.Edit, t xds.Type, e *entry, now time.Time, timeout time.Duration, state func(value any) readiness) {
	if e.next == nil {
		return
	}
	is := state(e.next.value)
	if is != ready && e.since == 0 {
		e.since = s.moment(now)
	}
	due := s.after(e.since, timeout, now)
	if is == waits && !now.Before(due) {
		is = ready
	}
	if is == ready {
		if e.active != nil {
			s.needs = nil // the version that it replaces needs nothing any more
		}
		s.drop(e.active)
		e.active, e.next, e.since = e.next, nil, 0
		put(edit, t, e.name, e.active.value)
		return
	}
	s.pending++
	if is == waits {
		s.await(due, now)
	}
}

// await makes Tick look again at a time that is to come.
func (s *Store) await(deadline, now time.Time) {
	if now.Before(deadline) && (s.deadline.IsZero() || deadline.Before(s.deadline)) {
		s.deadline = deadline
	}
}

func (s *Store) hasEndpoints(value any) readiness {
	c, ok := value.(*mesh.Cluster)
	if !ok || c.Discovery != mesh.ByEDS || s.active(xds.Endpoints, c.Assignment) {
		return ready
	}
	return waits
}

func (s *Store) hasClusters(value any) readiness {
	if r, ok := value.(*mesh.Routes); ok && !r.Refused {
		return s.clustersReady(r.ClusterNames())
	}
	return ready
}

func (s *Store) hasRoutes(value any) readiness {
	l, ok := value.(*mesh.Listener)
	if !ok || l.Refused {
		return ready
	}
	for name := range l.RouteNames() {
		if !s.active(xds.Routes, name) {
			return stuck
		}
	}
	for name := range l.NeededExtensions() {
		if !s.active(xds.Extensions, name) {
			return waits
		}
	}
	if l.Direction == mesh.Inbound {
		return ready // its policies must not wait; only clusters that policies ask have endpoints to wait for
	}
	for name := range l.SecretNames() {
		if s.awaitsSecret(name) {
			return waits
		}
	}
	return s.clustersReady(l.ClusterNames())
}

// awaitsSecret reports whether a secret may still come in time. Each secret is waited for once, so one that does not exist does
// not delay later versions of its listener.
func (s *Store) awaitsSecret(name string) bool {
	if local(name) || s.active(xds.Secrets, name) {
		return false
	}
	absent, asked := s.absent[xds.Secrets][name]
	return !asked || s.config.Now().Before(absent.since.Add(warmingTimeout))
}

// clustersReady reports whether no cluster is one that still waits for its first endpoints. A cluster that the control
// plane does not have is not waited for: requests to it fail, as they do in Envoy.
func (s *Store) clustersReady(names iter.Seq[string]) readiness {
	for name := range names {
		if e := s.entries[xds.Clusters][name]; e != nil && e.active == nil {
			return waits
		}
	}
	return ready
}

func (s *Store) active(t xds.Type, name string) bool {
	e := s.entries[t][name]
	return e != nil && e.active != nil
}

// names is a set of names for each type.
type names [xds.Types]map[string]struct{}

func (n *names) add(t xds.Type, all iter.Seq[string]) {
	for name := range all {
		n[t][name] = struct{}{}
	}
}

// needs is what is asked for by name: what the versions in force and those that wait name.
type needs struct {
	wanted    names
	lingering names // besides, by clusters that were removed: it is not asked for any more
}

// name adds what a version names to n.
func (n *names) name(value any) {
	switch value := value.(type) {
	case *mesh.Cluster:
		if value.Discovery == mesh.ByEDS {
			n[xds.Endpoints][value.Assignment] = struct{}{}
		}
		n.add(xds.Secrets, value.SecretNames())
	case *mesh.Listener:
		n.add(xds.Routes, value.RouteNames())
		n.add(xds.Secrets, value.SecretNames())
		n.add(xds.Extensions, value.ExtensionNames())
	}
}

// needed returns what is needed. It is computed again after clusters or listeners changed.
func (s *Store) needed() *needs {
	if s.needs != nil {
		return s.needs
	}
	n := &needs{wanted: newNames(), lingering: newNames()}
	n.wanted[xds.Endpoints] = make(map[string]struct{}, len(s.entries[xds.Clusters]))
	for _, t := range []xds.Type{xds.Clusters, xds.Listeners} {
		for _, e := range s.entries[t] {
			set := &n.wanted
			if e.removed {
				set = &n.lingering
			}
			for v := range e.used() {
				set.name(v.value)
			}
		}
	}
	maps.DeleteFunc(n.wanted[xds.Secrets], func(name string, _ struct{}) bool { return local(name) })
	s.needs = n
	return n
}

func newNames() (n names) {
	for t := range n {
		n[t] = map[string]struct{}{}
	}
	return n
}

// dropUnnamed takes away what is asked for by name and needed by nothing any more. A name that is still asked for keeps
// its resource: it would not be sent again.
func (s *Store) dropUnnamed(edit *mesh.Edit) {
	needs := s.needed()
	for t := range xds.Type(xds.Types) {
		if t.Wildcard() {
			continue
		}
		for name, e := range s.entries[t] {
			if !has(needs.wanted[t], name) && !has(needs.lingering[t], name) && !has(s.asked[t], name) {
				s.erase(edit, t, e)
			}
		}
	}
}

// dropClusters takes away clusters that were removed, when no route and no listener in force names them or their time is
// over.
func (s *Store) dropClusters(edit *mesh.Edit, now time.Time) {
	var named map[string]struct{}
	for name, e := range s.entries[xds.Clusters] {
		switch {
		case !e.removed:
			continue
		case e.active == nil, !now.Before(s.after(e.since, lingerTimeout, now)):
			s.erase(edit, xds.Clusters, e)
			continue
		}
		if named == nil {
			named = s.namedClusters()
		}
		if !has(named, name) {
			s.erase(edit, xds.Clusters, e)
			continue
		}
		s.pending++
		s.await(s.after(e.since, lingerTimeout, now), now)
	}
}

// namedClusters returns the clusters that routes and listeners in force name.
func (s *Store) namedClusters() map[string]struct{} {
	named := map[string]struct{}{}
	add := func(names iter.Seq[string]) {
		for name := range names {
			named[name] = struct{}{}
		}
	}
	for _, e := range s.entries[xds.Listeners] {
		if l, ok := e.value().(*mesh.Listener); ok {
			add(l.ClusterNames())
		}
	}
	for name := range s.needed().wanted[xds.Routes] { // other routes are about to be dropped
		if r, ok := s.entries[xds.Routes][name].value().(*mesh.Routes); ok {
			add(r.ClusterNames())
		}
	}
	return named
}

// ask returns the names that are to be asked for from now on, of the types in which that is a change.
func (s *Store) ask(now time.Time) map[xds.Type][]string {
	wanted := map[xds.Type][]string{}
	needs := s.needed()
	for t := range xds.Type(xds.Types) {
		switch {
		case !t.Wildcard() && !maps.Equal(needs.wanted[t], s.asked[t]):
			wanted[t], s.asked[t] = sorted(needs.wanted[t]), needs.wanted[t]
			s.noteAbsent(t, now)
		case t.Wildcard() && t != xds.Clusters && !s.began:
			wanted[t] = nil
		}
	}
	s.began = true
	return wanted
}

// value returns the value in force, or nil. e may be nil.
func (e *entry) value() any {
	if e == nil || e.active == nil {
		return nil
	}
	return e.active.value
}

// versions yields all versions of an entry.
func (e *entry) versions() iter.Seq[*version] {
	return func(yield func(*version) bool) {
		for v := range e.used() {
			if !yield(v) {
				return
			}
		}
		if e.refused != nil {
			yield(&e.refused.version)
		}
	}
}

// used yields the version in force and the one that waits.
func (e *entry) used() iter.Seq[*version] {
	return func(yield func(*version) bool) {
		if e.active != nil && !yield(e.active) {
			return
		}
		if e.next != nil {
			yield(e.next)
		}
	}
}

// compareNames compares entries by their names.
func compareNames(a, b *entry) int { return cmp.Compare(a.name, b.name) }
