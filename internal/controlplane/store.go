package controlplane

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/xds"
)

const (
	// warmingTimeout is how long a cluster waits for its endpoints. It is Envoy's initial_fetch_timeout.
	warmingTimeout = 15 * time.Second

	// namingTimeout bounds how long routes and listeners wait for clusters, if there are always new ones that wait.
	namingTimeout = 2 * warmingTimeout

	// lingerTimeout is how long a cluster that was removed is kept for routes and listeners that still name it. It is
	// bounded, because the addresses of its endpoints may soon belong to other pods.
	lingerTimeout = time.Minute

	defaultMaxBytes = 64 << 20
	maxResource     = 16 << 20 // bytes of one resource
	maxResources    = 100_000  // of all types
	maxName         = 4 << 10  // bytes
	maxFindings     = 10_000   // of all resources; beyond it, one of each
)

// StoreConfig is the configuration of a Store. Log is required.
type StoreConfig struct {
	Log *slog.Logger
	Now func() time.Time // nil: time.Now

	// Names receives the hosts for DNS when they have changed, also before the store is initialized. It must not call the
	// store. It may be nil.
	Names func(*mesh.Names)

	// Bound is called when another listener that accepts connections is in force: open connections may have to end. It must not
	// call the store, except for Snapshot. It may be nil.
	Bound func()

	// Stored is called when another configuration is in force. It must not call the store, except for Snapshot. It may be nil.
	Stored func()

	// Listeners is called before other listeners are in force, after the first configuration. It must not call the store, except
	// for Snapshot. It may be nil.
	Listeners func(*mesh.Snapshot)

	// MaxBytes bounds the resources in sum. Resources beyond it are rejected. 0: 64 MiB.
	MaxBytes int64
}

// Store compiles the resources that it receives into a snapshot, and keeps the last good version of each. It does no I/O
// except for its log.
//
// A change is made before what it replaces is broken:
//   - A cluster is in force when its endpoints have come, or 15 s after the cluster. Until then its last version is.
//   - A cluster that was removed stays with its endpoints until no route and no listener in force names it, or for 1 min.
//   - Routes are in force when the clusters that they name are, of those that the control plane has, or after 30 s.
//   - A listener is in force when its routes are, without limit, as in Envoy; and when its clusters and the configurations of
//     its filters are, or after 30 s; and when its secrets have come, or 15 s after they were asked for. A listener of inbound
//     traffic waits neither for clusters nor for secrets.
//   - A chain or a cluster whose secret is missing is closed until it comes. A secret stays as long as it is named.
//
// A version with a finding of security is rejected, and the last good one stays in force. Without a good version, the
// rejected one is in force where it can be: it refuses what it concerns.
//
// Update is called by one goroutine, the other methods by any.
type Store struct {
	config      StoreConfig
	born        time.Time
	snapshot    atomic.Pointer[mesh.Snapshot]
	initialized chan struct{}
	took        time.Duration // from the start until initialized; set before that is closed
	kick        chan struct{} // after each change of deadline
	changes     chan struct{} // after each change of the resources

	mu       sync.Mutex
	current  *mesh.Snapshot // what is in force; published once it is whole
	entries  [xds.Types]map[string]*entry
	asked    [xds.Types]map[string]struct{} // names that the last outcome asked for
	began    bool                           // wildcard types were asked for
	seen     [xds.Types]bool                // an update of the type was received
	whole    [xds.Types]bool                // the next update of the type replaces all resources
	started  time.Time                      // of the first update of listeners
	deadline time.Time                      // when a wait is over; zero if nothing waits
	pending  int                            // resources that wait
	needs    *needs                         // nil: to be computed
	absent   [xds.Types]map[string]absence  // names that are asked for and have not come
	bytes    int64
	findings int  // of all versions
	altered  bool // the resources were, since changes was notified
	archive  archive
	compiler mesh.Compiler
	log      findingLog
}

// entry is a resource.
type entry struct {
	name    string
	active  *version // in force; nil before the first
	next    *version // accepted, and waiting for what it needs
	refused *refused // a later version that was not accepted
	removed bool     // and in force until nothing names it
	since   moment   // when it began to wait, or was removed
}

// moment is a time by the store's clock: what has passed since the store was made, of which the system's clock is no part.
// 0 is no moment.
type moment time.Duration

// moment returns a time as a moment.
func (s *Store) moment(t time.Time) moment { return moment(max(t.Sub(s.born), 0) + 1) }

// after returns when a timeout that began at m is over.
func (s *Store) after(m moment, timeout time.Duration, now time.Time) time.Time {
	return now.Add(timeout - time.Duration(s.moment(now)-m))
}

// version is one version of a resource.
type version struct {
	hash     uint64
	updated  moment
	value    any
	closed   bool // it was refused, and there was no good version
	findings []mesh.Finding
	raw      span
}

// refused is a version that is not in force, or closes what it concerns.
type refused struct {
	version
	reason string
}

// NewStore returns an empty store.
func NewStore(config StoreConfig) (*Store, error) {
	if config.Log == nil {
		return nil, errors.New("controlplane: a store needs a log")
	}
	config.MaxBytes = cmp.Or(config.MaxBytes, defaultMaxBytes)
	if config.Now == nil {
		config.Now = time.Now
	}
	s := &Store{config: config, born: config.Now(), initialized: make(chan struct{}), kick: make(chan struct{}, 1), changes: make(chan struct{}, 1), current: &mesh.Snapshot{}}
	for t := range s.entries {
		s.entries[t] = map[string]*entry{}
	}
	return s, nil
}

// Snapshot returns what is in force. It returns nil before the store is initialized.
func (s *Store) Snapshot() *mesh.Snapshot { return s.snapshot.Load() }

// Whole reports whether the store is initialized and no resource waits for another one, as in the middle of a push.
func (s *Store) Whole() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.Snapshot() != nil && s.pending == 0
}

// Initialized returns a channel that is closed when the first clusters are in force with their endpoints, and the first
// listeners with their routes, or 15 s after the first listeners came.
func (s *Store) Initialized() <-chan struct{} { return s.initialized }

// Initializing returns how long the store has taken to be initialized, and false before that.
func (s *Store) Initializing() (time.Duration, bool) {
	select {
	case <-s.initialized:
		return s.took, true
	default:
		return 0, false
	}
}

// Update takes a response of the control plane. Names of types that are asked for by name and were not asked for are
// ignored.
func (s *Store) Update(u xds.Update) xds.Outcome {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.config.Now()
	if u.Type == xds.Clusters || u.Type == xds.Listeners {
		s.needs = nil
	}
	rejected := s.receive(&u, now)
	s.seen[u.Type] = true
	if u.Type == xds.Listeners && s.started.IsZero() {
		s.started = now
	}
	edit := s.current.Edit()
	s.applyDirect(edit, &u)
	var wanted map[xds.Type][]string
	if s.settles(u.Type) {
		s.settle(edit, now)
		wanted = s.ask(now)
		s.dropUnnamed(edit)
	}
	s.publish(edit, now)
	if s.archive.loose() {
		s.pack()
	}
	s.archive.release()
	if s.altered {
		s.altered = false
		notify(s.changes)
	}
	return xds.Outcome{Rejected: rejected, Wanted: wanted}
}

// settles reports whether an update of a type may put resources in force or take them away that are not in it.
func (s *Store) settles(t xds.Type) bool {
	switch t {
	case xds.Clusters, xds.Listeners, xds.Routes:
		return true
	case xds.Endpoints, xds.Extensions, xds.Secrets:
		return s.pending > 0
	}
	return false
}

// Restore takes resources that were kept by LastGood. They are in force until the control plane has answered: its first
// responses replace all clusters and listeners, and everything is asked for again. Call it before the first Update.
func (s *Store) Restore(updates []xds.Update) (rejected []xds.Rejected) {
	for _, u := range updates {
		rejected = append(rejected, s.Update(u).Rejected...)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked, s.began = [xds.Types]map[string]struct{}{}, false
	s.whole[xds.Clusters], s.whole[xds.Listeners] = true, true
	select { // restored resources are no change
	case <-s.changes:
	default:
	}
	return rejected
}

// Forget frees what is remembered so that the resources of a push share their parts. Call it when updates have paused.
func (s *Store) Forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.compiler.Forget()
}

// Changes returns a channel that receives after resources changed. It has one receiver.
func (s *Store) Changes() <-chan struct{} { return s.changes }

// Tick ends the waits whose time is over.
func (s *Store) Tick() {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.config.Now()
	if s.deadline.IsZero() || now.Before(s.deadline) {
		return
	}
	edit := s.current.Edit()
	s.settle(edit, now)
	s.dropUnnamed(edit)
	s.publish(edit, now)
}

// Run calls Tick when it is time, until ctx ends.
func (s *Store) Run(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.kick:
		case <-timer.C:
			s.Tick()
		}
		if deadline, ok := s.Deadline(); ok {
			timer.Reset(max(deadline.Sub(s.config.Now()), 0))
		} else {
			timer.Stop()
		}
	}
}

// Deadline returns when Tick is to be called, and false if nothing waits.
func (s *Store) Deadline() (time.Time, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.deadline, !s.deadline.IsZero()
}

var hashSeed = maphash.MakeSeed()

// receive takes the resources of an update, and returns those that are rejected.
func (s *Store) receive(u *xds.Update, now time.Time) (rejected []xds.Rejected) {
	if u.Type == xds.Names || u.Type == xds.ProxyConfigs { // one resource, whose name does not count
		u.Resources = slices.Clone(u.Resources)
		for i := range u.Resources {
			u.Resources[i].Name = ""
		}
	}
	times := occurrences(u.Resources)
	for i := range u.Resources {
		r := &u.Resources[i]
		if !u.Type.Wildcard() && !has(s.asked[u.Type], r.Name) {
			continue
		}
		count := times[r.Name]
		if count < 0 {
			continue // it was rejected
		}
		if count > 1 {
			times[r.Name] = -1
		}
		delete(s.absent[u.Type], r.Name)
		if reason := s.take(u.Type, r, count > 1, now); reason != "" {
			rejected = append(rejected, xds.Rejected{Name: r.Name, Reason: reason})
		}
	}
	if len(s.absent[u.Type]) == 0 {
		s.absent[u.Type] = nil // a map keeps its room
	}
	for _, name := range u.Removed {
		s.remove(u.Type, name, now)
	}
	if s.whole[u.Type] {
		s.whole[u.Type] = false
		s.removeOthers(u, now)
	}
	return rejected
}

// occurrences returns how often each name occurs. It returns nil for one resource.
func occurrences(resources []xds.Resource) map[string]int {
	if len(resources) < 2 {
		return nil
	}
	times := make(map[string]int, len(resources))
	for i := range resources {
		times[resources[i].Name]++
	}
	return times
}

// take takes one resource; twice reports whether the update has another one of the name. It returns why the resource is
// rejected, or "".
func (s *Store) take(t xds.Type, r *xds.Resource, twice bool, now time.Time) (reason string) {
	hash := maphash.Bytes(hashSeed, r.Value)
	if r.TypeURL != t.URL() {
		hash = ^hash // the same bytes mean something else
	}
	e := s.entries[t][r.Name]
	if e != nil && !e.removed && !twice {
		if reason, same := s.unchanged(e, hash); same {
			return reason
		}
	}
	if e == nil {
		if reason := s.full(r.Name); reason != "" {
			return reason
		}
		e = &entry{name: r.Name}
		s.entries[t][r.Name] = e
	}
	if e.removed {
		e.removed, e.since = false, 0
	}
	v := version{hash: hash, updated: s.moment(now)}
	reason = s.tooLarge(r)
	if twice {
		reason = "more than one resource with this name in a response"
	}
	if reason != "" {
		v.hash, v.value = 0, closed(t, r.Name) // it is judged again when it comes again
		s.refuse(t, e, v, reason, nil)
		return reason
	}
	c := compile(&s.compiler, t, r)
	v.value, v.findings = c.value, c.findings
	s.log.findings(s.config.Log, t, r.Name, c.findings)
	if c.reason == "" {
		s.accept(t, e, &v, r.Value)
		return ""
	}
	s.refuse(t, e, v, c.reason, r.Value)
	return c.reason
}

// unchanged reports whether a version has been received already, and why it was rejected.
func (s *Store) unchanged(e *entry, hash uint64) (reason string, same bool) {
	switch {
	case e.refused != nil && e.refused.hash == hash:
		return e.refused.reason, true
	case e.next != nil && e.next.hash == hash:
		s.forget(e)
		return "", true
	case e.active != nil && !e.active.closed && e.active.hash == hash:
		s.forget(e)
		s.drop(e.next)
		e.next, e.since = nil, 0
		return "", true
	}
	return "", false
}

// tooLarge returns why a resource is too large, or nothing.
func (s *Store) tooLarge(r *xds.Resource) string {
	if len(r.Value) > maxResource {
		return fmt.Sprintf("%d bytes are more than the limit of %d for a resource", len(r.Value), maxResource)
	}
	if s.bytes+int64(len(r.Value)) > s.config.MaxBytes {
		return fmt.Sprintf("the resources have more than %d bytes", s.config.MaxBytes)
	}
	return ""
}

// full returns why a resource with another name cannot be kept, or nothing.
func (s *Store) full(name string) string {
	if len(name) > maxName {
		return fmt.Sprintf("its name has %d bytes, more than %d", len(name), maxName)
	}
	count := 0
	for t := range s.entries {
		count += len(s.entries[t])
	}
	if count >= maxResources {
		return fmt.Sprintf("more than %d resources", maxResources)
	}
	return ""
}

// accept makes v the version that is in force, or that is next.
func (s *Store) accept(t xds.Type, e *entry, v *version, raw []byte) {
	s.forget(e)
	s.keep(v, raw)
	s.drop(e.next)
	if t == xds.Clusters || t == xds.Listeners || t == xds.Routes {
		e.next = v
		return
	}
	s.drop(e.active)
	e.active = v
}

// refuse records a version that is refused. Without a good one it closes what it concerns.
func (s *Store) refuse(t xds.Type, e *entry, v version, reason string, raw []byte) {
	s.forget(e)
	s.keep(&v, raw)
	e.refused = &refused{v, reason}
	latest := cmp.Or(e.next, e.active)
	if latest != nil && !latest.closed {
		return
	}
	s.findings += len(v.findings)
	stand := &version{hash: v.hash, updated: v.updated, value: v.value, findings: v.findings, closed: true}
	if t == xds.Clusters || t == xds.Listeners || t == xds.Routes {
		s.drop(e.next)
		e.next = stand
	} else {
		s.drop(e.active)
		e.active = stand
	}
}

// keep keeps the bytes and the findings of a version.
func (s *Store) keep(v *version, raw []byte) {
	if s.findings+len(v.findings) > maxFindings {
		v.findings = worst(v.findings)
	}
	s.findings += len(v.findings)
	v.raw = s.archive.add(raw)
	s.altered = true
	s.bytes += int64(len(raw))
}

// worst returns the finding of the highest class, for all.
func worst(findings []mesh.Finding) []mesh.Finding {
	if len(findings) < 2 {
		return findings
	}
	f := slices.MaxFunc(findings, func(a, b mesh.Finding) int { return cmp.Compare(a.Class, b.Class) })
	f.Problem += fmt.Sprintf(" (and %d more findings)", len(findings)-1)
	return []mesh.Finding{f}
}

// drop gives up the bytes and the findings of a version.
func (s *Store) drop(v *version) {
	if v != nil {
		s.findings -= len(v.findings)
		v.raw.free()
		s.bytes -= int64(v.raw.size)
	}
}

// forget gives up the version that was refused.
func (s *Store) forget(e *entry) {
	if e.refused != nil {
		s.drop(&e.refused.version)
		e.refused = nil
	}
}

// remove takes a resource away. Endpoints, routes and secrets stay for as long as they are asked for: their removal comes with
// that of their users. A control plane that loses a certificate must not close a port with it, and Envoy keeps it as well.
func (s *Store) remove(t xds.Type, name string, now time.Time) {
	e := s.entries[t][name]
	if e == nil || t == xds.Endpoints || t == xds.Routes || t == xds.Secrets {
		return
	}
	s.forget(e)
	s.drop(e.next)
	e.next = nil
	s.altered = true
	if t == xds.Clusters && e.active != nil {
		e.removed, e.since = true, s.moment(now)
		return
	}
	e.removed = true
}

// removeOthers removes the resources that an update does not have.
func (s *Store) removeOthers(u *xds.Update, now time.Time) {
	present := make(map[string]struct{}, len(u.Resources))
	for i := range u.Resources {
		present[u.Resources[i].Name] = struct{}{}
	}
	for name := range s.entries[u.Type] {
		if !has(present, name) {
			s.remove(u.Type, name, now)
		}
	}
}

// erase takes a resource out of the store and out of force.
func (s *Store) erase(edit *mesh.Edit, t xds.Type, e *entry) {
	if t == xds.Clusters || t == xds.Listeners {
		s.needs = nil
	}
	s.forget(e)
	s.drop(e.next)
	s.drop(e.active)
	delete(s.entries[t], e.name)
	put(edit, t, e.name, nil)
}

// applyDirect puts resources in force that wait for nothing.
func (s *Store) applyDirect(edit *mesh.Edit, u *xds.Update) {
	if u.Type == xds.Clusters || u.Type == xds.Listeners || u.Type == xds.Routes {
		return
	}
	apply := func(name string) {
		e := s.entries[u.Type][name]
		switch {
		case e == nil:
		case e.removed:
			s.erase(edit, u.Type, e)
		case e.active != nil:
			put(edit, u.Type, name, e.active.value)
		}
	}
	for i := range u.Resources {
		apply(u.Resources[i].Name)
	}
	for _, name := range u.Removed {
		apply(name)
	}
}

// publish makes the edit's snapshot the current one.
func (s *Store) publish(edit *mesh.Edit, now time.Time) {
	snapshot, changed := edit.Snapshot()
	if changed {
		if names := snapshot.Names(); s.config.Names != nil && names != nil && names != s.current.Names() {
			s.config.Names(names)
		}
		s.current = snapshot
	}
	switch before := s.snapshot.Load(); {
	case before != nil:
		if changed {
			if s.config.Listeners != nil && edit.ListenersChanged() {
				s.config.Listeners(snapshot)
			}
			s.snapshot.Store(snapshot)
			if s.config.Stored != nil {
				s.config.Stored()
			}
			if s.config.Bound != nil && snapshot.BoundChanged(before) {
				s.config.Bound()
			}
		}
	case s.complete(now):
		s.snapshot.Store(s.current)
		s.took = now.Sub(s.born)
		close(s.initialized)
		s.config.Log.Info("first configuration in force",
			"clusters", len(s.entries[xds.Clusters]), "listeners", len(s.entries[xds.Listeners]), "routes", len(s.entries[xds.Routes]), "waiting", s.pending)
	}
	notify(s.kick)
}

// notify wakes the receiver of a channel with room for one value, now or when it receives next.
func notify(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// complete reports whether the first configuration is in force.
func (s *Store) complete(now time.Time) bool {
	if !s.seen[xds.Clusters] || !s.seen[xds.Listeners] {
		return false
	}
	return s.pending == 0 || !now.Before(s.started.Add(warmingTimeout))
}

// pack compresses what was added, together with what is left of chunks that are mostly unused.
func (s *Store) pack() {
	var u unpacker
	for t := range s.entries {
		for _, e := range s.entries[t] {
			for v := range e.versions() {
				if !v.raw.sparse() {
					continue
				}
				if b, err := u.read(v.raw.view()); err == nil {
					v.raw.free()
					v.raw = s.archive.add(b)
				}
			}
		}
	}
	s.archive.seal()
}

func has(set map[string]struct{}, name string) bool {
	_, ok := set[name]
	return ok
}

func sorted(set map[string]struct{}) []string { return slices.Sorted(maps.Keys(set)) }
