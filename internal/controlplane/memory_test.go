//go:build !race

package controlplane

import (
	"log/slog"
	"runtime"
	"testing"

	"github.com/pillion-proxy/pillion/internal/controlplane/pushtest"
)

// A store with 1,000 services of two ports, 5.9 MB as they are sent, takes 7.2 MB.
func TestTheMemoryOfAThousandServicesIsBounded(t *testing.T) {
	const limit = 8 << 20
	before := liveHeap()
	s, err := NewStore(StoreConfig{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	for _, u := range pushtest.Thousand() {
		s.Update(u)
	}
	s.Forget()
	if taken := liveHeap() - before; taken > limit {
		t.Errorf("the store takes %d bytes, more than %d", taken, limit)
	}
	runtime.KeepAlive(s)
}

func liveHeap() int64 {
	runtime.GC()
	runtime.GC() // frees what the first has finalized
	var stats runtime.MemStats
	runtime.ReadMemStats(&stats)
	return int64(stats.HeapAlloc)
}
