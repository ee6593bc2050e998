package agent

import (
	"context"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"sync"
	"time"
)

// When a load has ended, the garbage of its connections is collected. Without allocations the runtime would collect it after
// two minutes, and the garbage may be as large as what is in use: 5 KiB of 14 for each of some thousand connections whose
// handshakes of TLS have just ended.
const (
	pauseInterval = time.Second
	pauseBytes    = 256 << 10 // allocated in an interval: less is a pause
	leastFreed    = 4 << 20   // less is not worth a collection
)

// heapState is what decides about a collection, in bytes.
type heapState struct {
	allocated uint64 // since the start
	freeable  uint64 // garbage at most, and free memory that is resident
}

func readHeap() heapState {
	samples := []metrics.Sample{
		{Name: "/gc/heap/allocs:bytes"}, {Name: "/memory/classes/heap/objects:bytes"},
		{Name: "/memory/classes/heap/free:bytes"}, {Name: "/gc/heap/live:bytes"},
	}
	metrics.Read(samples)
	at := func(i int) uint64 { return samples[i].Value.Uint64() }
	return heapState{allocated: at(0), freeable: at(1) + at(2) - min(at(3), at(1))}
}

// startTending frees memory in pauses, and calms the runtime's monitor, until stopTending is called.
func (a *Agent) startTending() {
	ctx, cancel := context.WithCancel(context.Background())
	var tending sync.WaitGroup
	tending.Go(func() { freeInPauses(ctx, collections(ctx), readHeap, debug.FreeOSMemory) })
	tending.Go(func() { a.calmMonitor(ctx) })
	a.stopTending = func() {
		cancel()
		tending.Wait()
	}
}

// collections returns a channel that receives a value after collections of garbage. An agent without load has none, and so
// does not wake.
func collections(ctx context.Context) <-chan struct{} {
	collected := make(chan struct{}, 1)
	type sentinel struct{ _ [16]*byte } // not in a block with other objects, which may be in use
	var next func(struct{})
	next = func(struct{}) {
		if ctx.Err() != nil {
			return
		}
		runtime.AddCleanup(new(sentinel), next, struct{}{})
		select {
		case collected <- struct{}{}:
		default:
		}
	}
	next(struct{}{})
	return collected
}

// freeInPauses frees memory in the first pause after a collection, if that is worth it.
func freeInPauses(ctx context.Context, collected <-chan struct{}, read func() heapState, free func()) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-collected:
		}
		for last, paused := read(), false; !paused; {
			select {
			case <-ctx.Done():
				return
			case <-time.After(pauseInterval):
			}
			now := read()
			if paused = now.allocated-last.allocated < pauseBytes; paused && now.freeable >= leastFreed {
				free()
			}
			last = now
		}
	}
}
