package controlplane

import (
	"bytes"
	"fmt"
	"iter"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/xds"
)

// world is a control plane whose resources change, and which sends them in any order, in parts and more than once.
type world struct {
	*rig
	random *rand.Rand

	resources [xds.Types]map[string]xds.Resource // that there are
	unsent    [xds.Types]map[string]bool         // names that changed
	begun     [xds.Types]bool                    // a first response was sent, so the next ones have only what changed
	asked     [xds.Types]map[string]bool

	last      *mesh.Snapshot
	removed   map[string]time.Time // clusters, when a response removed them
	received  map[string]time.Time // clusters, when a response first had them, since they were removed
	mayRefuse bool
}

var worldTypes = []xds.Type{xds.Clusters, xds.Endpoints, xds.Listeners, xds.Routes}

func newWorld(t *testing.T, seed uint64) *world {
	w := &world{rig: newRig(t), random: rand.New(rand.NewPCG(seed, 1)), mayRefuse: true}
	for i := range w.resources {
		w.resources[i], w.unsent[i], w.asked[i] = map[string]xds.Resource{}, map[string]bool{}, map[string]bool{}
	}
	w.forget()
	return w
}

func (w *world) forget() {
	w.last, w.removed, w.received = nil, map[string]time.Time{}, map[string]time.Time{}
}

func (w *world) pick(names ...string) string { return names[w.random.IntN(len(names))] }

func (w *world) cluster() string { return w.pick("a", "b", "c", "d") }

func (w *world) set(r xds.Resource, t xds.Type) {
	w.resources[t][r.Name] = r
	w.unsent[t][r.Name] = true
}

// change changes one resource, or removes it.
func (w *world) change() {
	mark := w.pick("1", "2", "3")
	t := worldTypes[w.random.IntN(len(worldTypes))]
	var r xds.Resource
	switch t {
	case xds.Clusters:
		r = cluster(w.cluster(), w.pick("s1", "s2", "s3"), mark)
		if w.mayRefuse && w.random.IntN(8) == 0 {
			r.Value = slices.Concat(r.Value, nest(nil, 59)) // transport_socket_matcher
		}
	case xds.Endpoints: // those of a service that does not exist are empty
		w.set(assignment(w.pick("s1", "s2", "s3"), w.pick("192.0.2.1", "192.0.2.2")), t)
		return
	case xds.Listeners:
		r = httpListener(w.pick("l1", "l2", "l3"), w.pick("80", "81"), mark)
		if w.random.IntN(3) == 0 {
			r = tcpListener(r.Name, w.cluster(), mark)
		}
	case xds.Routes: // a table that listeners name always exists
		w.set(routes(w.pick("80", "81"), w.cluster(), w.cluster()), t)
		return
	}
	if w.random.IntN(3) == 0 {
		delete(w.resources[t], r.Name)
		w.unsent[t][r.Name] = true
		return
	}
	w.set(r, t)
}

// send sends a response of a type with all that is unsent, or a part of it, and perhaps something else again.
func (w *world) send(t xds.Type, all bool) {
	u := xds.Update{Type: t}
	for _, name := range slices.Sorted(maps.Keys(w.resources[t])) {
		again := w.random.IntN(5) == 0
		part := all || w.random.IntN(3) > 0
		if !w.begun[t] && t.Wildcard() || w.unsent[t][name] && part || again {
			u.Resources = append(u.Resources, w.resources[t][name])
			delete(w.unsent[t], name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(w.unsent[t])) {
		if _, ok := w.resources[t][name]; !ok {
			u.Removed = append(u.Removed, name)
			delete(w.unsent[t], name)
		}
	}
	w.begun[t] = true
	if !t.Wildcard() { // as xds does
		u.Resources = slices.DeleteFunc(u.Resources, func(r xds.Resource) bool { return !w.asked[t][r.Name] })
	}
	w.random.Shuffle(len(u.Resources), func(i, j int) { u.Resources[i], u.Resources[j] = u.Resources[j], u.Resources[i] })
	w.take(u)
}

func (w *world) take(u xds.Update) {
	if u.Type == xds.Clusters {
		for _, r := range u.Resources {
			if _, ok := w.received[r.Name]; !ok {
				w.received[r.Name] = w.now
			}
			delete(w.removed, r.Name)
		}
		for _, name := range u.Removed {
			w.removed[name] = w.now
			delete(w.received, name)
		}
	}
	// A handler must not keep memory of the response.
	for i := range u.Resources {
		u.Resources[i].Value = bytes.Clone(u.Resources[i].Value)
	}
	outcome := w.Update(u)
	for i := range u.Resources {
		clear(u.Resources[i].Value)
	}
	for t, names := range outcome.Wanted {
		asked := map[string]bool{}
		for _, name := range names {
			asked[name] = true
			if !w.asked[t][name] {
				w.unsent[t][name] = true
			}
		}
		w.asked[t] = asked
	}
	w.check()
}

// check compares the snapshot with the one before it.
func (w *world) check() {
	s, last := w.Snapshot(), w.last
	if w.last = s; s == nil {
		return
	}
	for name, l := range s.Listeners() {
		for table := range l.RouteNames() {
			if r := s.RouteTable(table); r == nil {
				w.t.Errorf("listener %s is in force without its routes %s", name, table)
			} else {
				w.checkClusters(last, "routes "+table, r.ClusterNames())
			}
		}
		w.checkClusters(last, "listener "+name, l.ClusterNames())
	}
	for name, c := range s.Clusters() {
		old := (*mesh.Cluster)(nil)
		if last != nil {
			old = last.Cluster(name)
		}
		switch {
		case s.Hosts(c) != nil:
		case old != nil && last.Hosts(old) != nil && w.now.Sub(w.received[name]) < warmingTimeout:
			w.t.Errorf("cluster %s lost its endpoints", name)
		case old == nil && w.now.Sub(w.received[name]) < warmingTimeout:
			w.t.Errorf("cluster %s is in force without endpoints %v after it came", name, w.now.Sub(w.received[name]))
		}
	}
}

// checkClusters checks that what is in force does not lose a cluster.
func (w *world) checkClusters(last *mesh.Snapshot, what string, names iter.Seq[string]) {
	for name := range names {
		if w.last.Cluster(name) != nil || last == nil || last.Cluster(name) == nil {
			continue
		}
		if at, ok := w.removed[name]; !ok || w.now.Sub(at) < lingerTimeout {
			w.t.Errorf("%s lost the cluster %s", what, name)
		}
	}
}

// restart replaces the store by one that has what the first one keeps.
func (w *world) restart() {
	updates := map[xds.Type]*xds.Update{}
	for r := range w.LastGood() {
		b, err := r.Bytes()
		if err != nil {
			w.t.Fatal(err)
		}
		if updates[r.Type] == nil {
			updates[r.Type] = &xds.Update{Type: r.Type}
		}
		updates[r.Type].Resources = append(updates[r.Type].Resources, xds.Resource{Name: r.Name, TypeURL: r.TypeURL, Value: b})
	}
	next := newRig(w.t)
	next.now = w.now
	var list []xds.Update
	for _, t := range worldTypes {
		if u := updates[t]; u != nil {
			list = append(list, *u)
		}
	}
	if rejected := next.Restore(list); len(rejected) > 0 {
		w.t.Errorf("rejected %v", rejected)
	}
	w.rig = next
	w.forget()
	for _, t := range worldTypes {
		w.begun[t], w.asked[t], w.unsent[t] = false, map[string]bool{}, map[string]bool{}
		for name := range w.resources[t] {
			w.unsent[t][name] = true
		}
	}
	for _, name := range []string{"a", "b", "c", "d"} {
		if _, ok := w.resources[xds.Clusters][name]; !ok {
			w.removed[name] = w.now // by a first response without it
		}
	}
	w.send(xds.Clusters, true)
}

// finish sends everything and lets all waits end.
func (w *world) finish() {
	for range 4 { // names are asked for in turns
		for _, t := range worldTypes {
			w.send(t, true)
		}
	}
	for range 3 {
		w.now = w.now.Add(lingerTimeout)
		w.Tick()
		w.check()
		w.send(xds.Clusters, true) // names that are not needed any more are given up
	}
}

// canonical returns a store that got the world's resources once, in order.
func (w *world) canonical() *world {
	c := newWorld(w.t, 1)
	c.mayRefuse = false
	c.resources = w.resources
	for _, t := range worldTypes {
		for name := range c.resources[t] {
			c.unsent[t][name] = true
		}
	}
	c.finish()
	return c
}

func (w *world) contents() string {
	text := w.inForce()
	for r := range w.Resources() {
		text += fmt.Sprintf("\n%v %s %s warming %v refused %v", r.Type, r.Name, r.Version, r.Warming, r.Refusal != nil)
	}
	return text
}

func TestResponsesInAnyOrderConverge(t *testing.T) {
	seeds := uint64(150)
	if testing.Short() {
		seeds = 30
	}
	for seed := range seeds {
		w := newWorld(t, seed)
		for range 200 {
			switch w.random.IntN(20) {
			case 0:
				w.now = w.now.Add(time.Duration(w.random.IntN(40)) * time.Second)
				w.Tick()
				w.check()
			case 1:
				if w.random.IntN(5) == 0 {
					w.restart()
				}
			case 2, 3, 4, 5, 6, 7, 8, 9:
				w.change()
			default:
				t := worldTypes[w.random.IntN(len(worldTypes))]
				if w.begun[xds.Clusters] || t == xds.Clusters {
					w.send(t, false)
				}
			}
		}
		w.mayRefuse = false
		for name := range w.resources[xds.Clusters] {
			w.set(cluster(name, w.pick("s1", "s2", "s3"), "last"), xds.Clusters)
		}
		for _, name := range []string{"80", "81"} {
			if _, ok := w.resources[xds.Routes][name]; !ok {
				w.set(routes(name, w.cluster()), xds.Routes)
			}
		}
		for _, name := range []string{"s1", "s2", "s3"} {
			if _, ok := w.resources[xds.Endpoints][name]; !ok {
				w.set(assignment(name, "192.0.2.1"), xds.Endpoints)
			}
		}
		w.finish()
		if got, want := w.contents(), w.canonical().contents(); got != want {
			t.Errorf("in force:\n%s\nwant:\n%s", got, want)
		}
		w.checkBytes()
		if t.Failed() {
			t.Fatalf("with seed %d", seed)
		}
	}
}

// checkBytes checks that the store counts the bytes that it keeps, and that they are the control plane's.
func (w *world) checkBytes() {
	var sum int64
	live := map[*chunk]int{}
	for t := range w.entries {
		for _, e := range w.entries[t] {
			for v := range e.versions() {
				sum += int64(v.raw.size)
				live[v.raw.in] += int(v.raw.size)
			}
		}
	}
	if w.bytes != sum {
		w.t.Errorf("%d bytes are counted, %d are kept", w.bytes, sum)
	}
	for c, n := range live {
		if c != nil && c.live != n {
			w.t.Errorf("a chunk counts %d bytes in use, %d are", c.live, n)
		}
	}
	for r := range w.LastGood() {
		if b, err := r.Bytes(); err != nil || !bytes.Equal(b, w.resources[r.Type][r.Name].Value) {
			w.t.Errorf("the bytes of %v %s are not those that came: %v", r.Type, r.Name, err)
		}
	}
}
