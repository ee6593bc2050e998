package controlplane

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/pillion-proxy/pillion/internal/wire"
	"github.com/pillion-proxy/pillion/internal/xds"
)

// recorded returns the responses in a file of testdata: DeltaDiscoveryResponses of istiod, each after its length.
// sidecar.gz is the first push to a sidecar; watch.gz is a sidecar's stream while routes and services change.
func recorded(tb testing.TB, name string) (updates []xds.Update) {
	tb.Helper()
	packed, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		tb.Fatal(err)
	}
	unpacker, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		tb.Fatal(err)
	}
	plain, err := io.ReadAll(unpacker)
	if err != nil {
		tb.Fatal(err)
	}
	for len(plain) > 0 {
		size, n := binary.Uvarint(plain)
		updates = append(updates, response(tb, plain[n:n+int(size)]))
		plain = plain[n+int(size):]
	}
	return updates
}

func response(tb testing.TB, b []byte) (u xds.Update) {
	tb.Helper()
	var err error
	m := wire.Read(b, &err)
	for m.Next() {
		switch m.Number {
		case 2:
			var r xds.Resource
			for m := m.Message(); m.Next(); {
				switch m.Number {
				case 2:
					for m := m.Message(); m.Next(); {
						switch m.Number {
						case 1:
							r.TypeURL = m.String()
						case 2:
							r.Value = m.Bytes()
						}
					}
				case 3:
					r.Name = m.String()
				}
			}
			u.Resources = append(u.Resources, r)
		case 4:
			url := m.String()
			for u.Type = 0; u.Type.URL() != url; u.Type++ {
			}
		case 6:
			u.Removed = append(u.Removed, m.String())
		}
	}
	if err != nil {
		tb.Fatal(err)
	}
	return u
}

// thousand returns a push with 1,000 services of two ports each: the recorded one, in which clusters, endpoints and a
// listener of the service reviews and a virtual host of httpbin are cloned. The names of the clones have its length, so that the lengths in the messages stay right.
func thousand(tb testing.TB) []xds.Update {
	tb.Helper()
	updates := recorded(tb, "sidecar.gz")
	for i := range updates {
		u := &updates[i]
		for _, r := range u.Resources {
			switch {
			case u.Type == xds.Routes && r.Name == "8000":
				r.Value = cloneHosts(tb, r.Value)
				u.Resources = replace(u.Resources, r)
			case u.Type == xds.Listeners && r.Name == "10.96.0.10_9443",
				u.Type < xds.Listeners && (r.Name == "outbound|9080||reviews.default.svc.cluster.local" || r.Name == "outbound|9443||reviews.default.svc.cluster.local"):
				if u.Type == xds.Endpoints {
					r.Value = moreEndpoints(tb, r.Value)
				}
				for n := range 1000 {
					u.Resources = append(u.Resources, xds.Resource{Name: string(clone([]byte(r.Name), n)), TypeURL: r.TypeURL, Value: clone(r.Value, n)})
				}
			}
		}
	}
	return updates
}

func clone(b []byte, n int) []byte {
	name := fmt.Appendf(nil, "svc%04d", n)
	b = bytes.ReplaceAll(bytes.ReplaceAll(b, []byte("reviews"), name), []byte("httpbin"), name)
	address := fmt.Appendf(nil, "10.1%d.%d.1%d", n/100, n/10%10, n%10)
	return bytes.ReplaceAll(bytes.ReplaceAll(b, []byte("10.96.0.10"), address), []byte("10.96.1.10"), address)
}

// cloneHosts clones the virtual host of httpbin.
func cloneHosts(tb testing.TB, b []byte) []byte {
	var err error
	clones := bytes.Clone(b)
	m := wire.Read(b, &err)
	for m.Next() {
		if host := m.Bytes; m.Number == 2 && bytes.Contains(host(), []byte("httpbin.default.svc.cluster.local:8000")) {
			for n := range 1000 {
				clones = wire.AppendBytes(clones, 2, clone(m.Bytes(), n))
			}
		}
	}
	if err != nil {
		tb.Fatal(err)
	}
	return clones
}

// moreEndpoints repeats the endpoints of an assignment in a second locality.
func moreEndpoints(tb testing.TB, b []byte) []byte {
	var err error
	more := bytes.Clone(b)
	m := wire.Read(b, &err)
	for m.Next() {
		if m.Number == 2 {
			more = wire.AppendBytes(more, 2, m.Bytes())
		}
	}
	if err != nil {
		tb.Fatal(err)
	}
	return more
}

func replace(resources []xds.Resource, r xds.Resource) []xds.Resource {
	for i := range resources {
		if resources[i].Name == r.Name {
			resources[i] = r
		}
	}
	return resources
}

func quietStore(tb testing.TB) *Store {
	s, err := NewStore(StoreConfig{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		tb.Fatal(err)
	}
	return s
}

func takeAll(tb testing.TB, s *Store, updates []xds.Update) {
	for _, u := range updates {
		for _, r := range s.Update(u).Rejected {
			tb.Errorf("%v %s: %s", u.Type, r.Name, r.Reason)
		}
	}
}

func TestARecordedPushIsInForce(t *testing.T) {
	s := quietStore(t)
	takeAll(t, s, recorded(t, "sidecar.gz"))
	if s.Snapshot() == nil {
		t.Fatal("no snapshot")
	}
}

func BenchmarkThousandServices(b *testing.B) {
	updates := thousand(b)
	size := 0
	for _, u := range updates {
		before := size
		for _, r := range u.Resources {
			size += len(r.Value)
		}
		b.Logf("%v: %d resources, %d bytes", u.Type, len(u.Resources), size-before)
	}
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	var s *Store
	for b.Loop() {
		s = quietStore(b)
		takeAll(b, s, updates)
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	if s.Snapshot() == nil {
		b.Fatal("not in force")
	}
	packed := 0
	seen := map[*chunk]bool{}
	for t := range s.entries {
		for _, e := range s.entries[t] {
			for v := range e.versions() {
				if c := v.raw.in; c != nil && !seen[c] {
					seen[c] = true
					packed += len(c.packed) + cap(c.plain)
				}
			}
		}
	}
	b.ReportMetric(float64(size)/1e6, "MB")
	b.ReportMetric(float64(packed)/1e3, "packed-KB")
	b.ReportMetric(float64(len(seen)), "chunks")
	b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/1e6, "heap-MB")
	runtime.KeepAlive(s)
}

func BenchmarkOneEndpointOfThousandServices(b *testing.B) {
	s := quietStore(b)
	takeAll(b, s, thousand(b))
	const name = "outbound|9080||svc0500.default.svc.cluster.local"
	for i := 0; b.Loop(); i++ {
		u := update(xds.Endpoints, assignment(name, fmt.Sprintf("10.0.%d.%d", i/250%250, i%250)))
		s.Update(u)
	}
}
