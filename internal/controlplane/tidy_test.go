package controlplane

import (
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func TestMemoryIsGivenBackWhenUpdatesHavePaused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var freed atomic.Int32
		tidy := newTidier(func() { freed.Add(1) })
		expect := func(what string, want int32) {
			t.Helper()
			synctest.Wait()
			if freed.Load() != want {
				t.Fatalf("%s: memory was given back %d times, want %d", what, freed.Load(), want)
			}
		}
		for range 5 { // the first push
			tidy.updated(1000)
			time.Sleep(tidyAfter - 1)
		}
		expect("during the first push", 0)
		time.Sleep(tidyAfter)
		expect("after the first push", 1)
		tidy.updated(tidyBytes - 1)
		time.Sleep(2 * tidyAfter)
		expect("after a small update", 1)
		tidy.updated(1)
		time.Sleep(tidyAfter)
		expect("after small updates", 2)
		tidy.updated(tidyBytes)
		tidy.stop()
		tidy.updated(tidyBytes)
		time.Sleep(2 * tidyAfter)
		expect("after the end", 2)
	})
}
