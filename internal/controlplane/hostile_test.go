package controlplane

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/controlplane/pushtest"
	"github.com/pillion-proxy/pillion/internal/xds"
)

func TestARecordedStreamLosesNoCluster(t *testing.T) {
	w := newWorld(t, 1)
	updates := pushtest.Watch()
	if len(updates) < 30 {
		t.Fatalf("%d updates", len(updates))
	}
	for i, u := range updates {
		if outcome := w.Update(u); len(outcome.Rejected) > 0 {
			t.Errorf("update %d, %v: rejected %+v", i, u.Type, outcome.Rejected)
		}
		w.check()
		w.now = w.now.Add(time.Second)
	}
	got := w.inForce()
	if strings.Contains(got, "outbound|80||extra") || !strings.Contains(got, "outbound|9080||reviews") {
		t.Errorf("in force: %s", got)
	}
	// An agent that gets the last resources only has the same in force.
	again := newRig(t)
	for r := range w.Resources() {
		b, err := r.Bytes()
		if err != nil {
			t.Fatal(err)
		}
		again.Update(update(r.Type, xds.Resource{Name: r.Name, TypeURL: r.TypeURL, Value: b}))
	}
	again.advance(time.Hour)
	if text := again.inForce(); text != got {
		t.Errorf("in force:\n%s\nwant:\n%s", text, got)
	}
}

// Readers use snapshots and ask questions while updates come. The race detector judges.
func TestReadersDoNotMeetUpdates(t *testing.T) {
	s := quietStore(t)
	takeAll(t, s, pushtest.Sidecar())
	stop := make(chan struct{})
	var readers sync.WaitGroup
	for range 2 {
		readers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				snapshot := s.Snapshot()
				for _, c := range snapshot.Clusters() {
					if snapshot.Cluster(c.Name) != c {
						t.Error("a snapshot changed")
					}
					snapshot.Hosts(c)
				}
				for r := range s.Resources() {
					if _, err := r.Bytes(); err != nil {
						t.Error(err)
					}
				}
				s.Findings()
				s.Absent()
				s.Tick()
				s.Deadline()
			}
		})
	}
	for i := range 10 {
		for _, u := range pushtest.Sidecar() {
			u.Resources = u.Resources[i%len(u.Resources):]
			for j := range u.Resources {
				r := &u.Resources[j]
				r.Value = slices.Concat(r.Value, text(2000+i, strings.Repeat("x", 2000))) // an unknown field, a finding
			}
			s.Update(u)
		}
	}
	close(stop)
	readers.Wait()
}

// A resource's bytes are in a chunk with others. Chunks whose resources were replaced must not accumulate.
func TestReplacedResourcesAreNotKept(t *testing.T) {
	s := quietStore(t)
	takeAll(t, s, pushtest.Sidecar())
	names := s.asked[xds.Endpoints]
	for i := range 20_000 {
		for name := range names {
			s.Update(update(xds.Endpoints, assignment(name, fmt.Sprintf("10.0.%d.%d", i/250%250, i%250))))
			break // any
		}
	}
	if size := keptSize(s); size > 200_000 {
		t.Errorf("%d bytes are kept of %d", size, s.bytes)
	}
}

// A chunk goes when its last resource is replaced. Resources that are replaced at random leave few in each chunk.
func TestChunksThatAreMostlyUnusedAreMerged(t *testing.T) {
	r := begin(t)
	random := rand.New(rand.NewPCG(1, 2))
	const names = 200
	for i := range 20 * names {
		mark := make([]byte, 500)
		for j := range mark {
			mark[j] = 'a' + byte(random.IntN(26))
		}
		n := random.IntN(names)
		if i < names {
			n = i
		}
		r.accepts(update(xds.Clusters, cluster(fmt.Sprint(n), "web", string(mark))))
	}
	size, seen := 0, map[*chunk]bool{nil: true}
	for t := range r.entries {
		for _, e := range r.entries[t] {
			for v := range e.versions() {
				if c := v.raw.in; !seen[c] {
					seen[c] = true
					size += c.size
				}
			}
		}
	}
	if size > 2*int(r.bytes)+looseSize {
		t.Errorf("chunks have %d bytes for %d of resources", size, r.bytes)
	}
}

// keptSize returns the memory that raw bytes take.
func keptSize(s *Store) (size int) {
	seen := map[*chunk]bool{nil: true}
	for t := range s.entries {
		for _, e := range s.entries[t] {
			for v := range e.versions() {
				if c := v.raw.in; !seen[c] {
					seen[c] = true
					size += len(c.packed) + cap(c.plain)
				}
			}
		}
	}
	return size
}

// FuzzUpdate gives a store that has a configuration resources of any bytes. It must take or reject them, and go on.
func FuzzUpdate(f *testing.F) {
	for _, u := range pushtest.Sidecar() {
		for i, r := range u.Resources {
			if i%5 == 0 {
				f.Add(uint8(u.Type), r.Name, r.Value, uint8(i))
			}
		}
	}
	first := []xds.Update{
		update(xds.Clusters, cluster("web", "web", "1")),
		update(xds.Endpoints, assignment("web", "192.0.2.10")),
		update(xds.Listeners, httpListener("http", "80", "1")),
		update(xds.Routes, routes("80", "web")),
	}
	f.Fuzz(func(t *testing.T, kind uint8, name string, value []byte, how uint8) {
		w := newWorld(t, 1)
		for _, u := range first {
			w.Update(u)
		}
		w.check()
		u := xds.Update{Type: xds.Type(kind % uint8(xds.Types))}
		if how&4 != 0 { // the name of a resource that there is
			name = [xds.Types]string{"web", "web", "http", "80"}[u.Type]
		}
		u.Resources = []xds.Resource{resource(u.Type, name, value)}
		if how&1 != 0 {
			u.Resources = append(u.Resources, resource(u.Type, name, value))
		}
		if how&2 != 0 {
			u.Removed = []string{name}
		}
		w.Update(u)
		w.check()
		w.advance(warmingTimeout)
		w.check()
		var sum int64
		for t := range w.entries {
			for _, e := range w.entries[t] {
				for v := range e.versions() {
					sum += int64(v.raw.size)
				}
			}
		}
		if sum != w.bytes {
			t.Errorf("%d bytes are counted, %d are kept", w.bytes, sum)
		}
		for _, u := range first {
			for _, r := range w.Update(u).Rejected {
				t.Errorf("%v %s: %s", u.Type, r.Name, r.Reason)
			}
		}
		if text := w.inForce(); !strings.Contains(text, "web=192.0.2.10") || !strings.Contains(text, "http→80") {
			t.Errorf("in force: %s", text)
		}
	})
}
