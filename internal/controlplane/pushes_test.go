package controlplane

import (
	"fmt"
	"log/slog"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/controlplane/pushtest"
	"github.com/pillion-proxy/pillion/internal/xds"
)

// processorTime returns the CPU time of the process. On a busy machine it varies less than the clock.
func processorTime(tb testing.TB) time.Duration {
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		tb.Fatal(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

// reportProcessorTime reports the CPU time of an operation since start.
func reportProcessorTime(b *testing.B, start time.Duration) {
	b.ReportMetric(float64((processorTime(b)-start).Microseconds())/1e3/float64(b.N), "cpu-ms/op")
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
	takeAll(t, s, pushtest.Sidecar())
	if s.Snapshot() == nil {
		t.Fatal("no snapshot")
	}
}

func BenchmarkThousandServices(b *testing.B) {
	updates := pushtest.Thousand()
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
	start := processorTime(b)
	for b.Loop() {
		s = quietStore(b)
		takeAll(b, s, updates)
	}
	reportProcessorTime(b, start)
	runtime.GC()
	runtime.ReadMemStats(&after)
	if s.Snapshot() == nil {
		b.Fatal("not in force")
	}
	b.ReportMetric(float64(size)/1e6, "MB")
	b.ReportMetric(float64(keptSize(s))/1e3, "packed-KB")
	b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/1e6, "heap-MB")
	runtime.KeepAlive(s)
}

func BenchmarkOneEndpointOfThousandServices(b *testing.B) {
	s := quietStore(b)
	takeAll(b, s, pushtest.Thousand())
	const name = "outbound|9080||svc0500.default.svc.cluster.local"
	start := processorTime(b)
	defer func() { reportProcessorTime(b, start) }()
	for i := 0; b.Loop(); i++ {
		u := update(xds.Endpoints, assignment(name, fmt.Sprintf("10.0.%d.%d", i/250%250, i%250)))
		s.Update(u)
	}
}

// Showing and saving resources must not unpack the same chunk again and again.
func BenchmarkShowThousandServices(b *testing.B) {
	s := quietStore(b)
	takeAll(b, s, pushtest.Thousand())
	for name, all := range map[string]func() Resources{"in order": s.Resources, "to keep": s.LastGood} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				for r := range all() {
					if _, err := r.Bytes(); err != nil {
						b.Fatal(err)
					}
				}
			}
		})
	}
}
