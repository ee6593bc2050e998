//go:build !race

package httpforward

import (
	"runtime"
	"testing"
)

// Header blocks of many frames take pooled memory: without it, each would leave several times its size to the collector.
func TestLongHeaderBlocksLeaveNoGarbage(t *testing.T) {
	fragment := make([]byte, 16<<10)
	collect := func() {
		var b block
		for i := range 15 {
			fragment[0] = byte(i)
			b.add(fragment)
		}
		for i := range 15 {
			if b.fragments[i*len(fragment)] != byte(i) {
				t.Fatalf("fragment %d is lost", i)
			}
		}
		b.free()
		if b.fragments != nil {
			t.Fatal("the block keeps its memory")
		}
	}
	collect()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	const blocks = 100
	for range blocks {
		collect()
	}
	runtime.ReadMemStats(&after)
	if each := (after.TotalAlloc - before.TotalAlloc) / blocks; each > 64<<10 {
		t.Errorf("%d KiB are allocated for each block of 240 KiB", each>>10)
	}
}
