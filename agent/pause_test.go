package agent

import (
	"context"
	"runtime"
	"runtime/debug"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// Memory is freed once after each load, and not during it.
func TestMemoryIsFreedInPauses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var allocated, freeable atomic.Uint64
		var freed atomic.Int64
		read := func() heapState { return heapState{allocated: allocated.Load(), freeable: freeable.Load()} }
		free := func() {
			freed.Add(1)
			freeable.Store(0)
		}
		collected := make(chan struct{}, 1)
		ctx, cancel := context.WithCancel(t.Context())
		defer synctest.Wait()
		defer cancel()
		go freeInPauses(ctx, collected, read, free)

		for round := range int64(3) {
			freeable.Store(leastFreed)
			collected <- struct{}{}
			for range 5 {
				synctest.Wait() // it has read the last value
				allocated.Add(pauseBytes)
				time.Sleep(pauseInterval)
			}
			synctest.Wait()
			if freed.Load() != round {
				t.Fatalf("freed during load %d", round)
			}
			time.Sleep(3 * pauseInterval)
			synctest.Wait()
			if freed.Load() != round+1 {
				t.Fatalf("freed %d times after %d loads", freed.Load(), round+1)
			}
		}
		freeable.Store(leastFreed - 1)
		collected <- struct{}{}
		time.Sleep(time.Minute)
		synctest.Wait()
		if freed.Load() != 3 {
			t.Error("freed too little to be worth it")
		}
	})
}

// The figures of the runtime that decide: what was allocated, and the part of it that may be garbage.
func TestGarbageIsFreeable(t *testing.T) {
	const size = 64 << 20
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	debug.FreeOSMemory()
	before := readHeap()
	garbage = make([]byte, size)
	garbage = nil
	after := readHeap()
	if grown := after.allocated - before.allocated; grown < size {
		t.Errorf("%d bytes were allocated, want %d", grown, size)
	}
	if after.freeable < size/2 { // garbage of before may be gone
		t.Errorf("%d bytes are freeable, want about %d", after.freeable, size)
	}
	debug.FreeOSMemory()
	if now := readHeap(); now.freeable >= size/2 {
		t.Errorf("%d bytes are freeable after they were freed", now.freeable)
	}
}

var garbage []byte // escapes

func TestCollectionsAreNotified(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	collected := collections(ctx)
	<-collected // the first value is there from the start
	for range 3 {
		nettest.Eventually(t, "the notification of a collection", func() bool {
			runtime.GC()
			select {
			case <-collected:
				return true
			default:
				return false
			}
		})
	}
}
