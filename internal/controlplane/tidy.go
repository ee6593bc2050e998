package controlplane

import (
	"sync"
	"time"
)

const (
	tidyAfter = 5 * time.Second // after the last update; a changed configuration is saved before
	tidyBytes = 1 << 20         // of updates since the last time; the first updates are followed in any case
)

// tidier gives memory back to the system when updates have paused. What they are received and decoded in is many times as
// large as what is kept, and the runtime would hold it for minutes. It costs one cycle of the garbage collector.
type tidier struct {
	free func()

	mu      sync.Mutex
	timer   *time.Timer // nil before the first update
	bytes   int         // of updates since free
	stopped bool
}

// newTidier returns a tidier that has seen no update.
func newTidier(free func()) *tidier { return &tidier{free: free, bytes: tidyBytes} }

// updated takes the size of an update.
func (t *tidier) updated(bytes int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.bytes += bytes
	switch {
	case t.stopped || t.bytes < tidyBytes:
	case t.timer == nil:
		t.timer = time.AfterFunc(tidyAfter, t.tidy)
	default:
		t.timer.Reset(tidyAfter)
	}
}

func (t *tidier) tidy() {
	t.mu.Lock()
	t.bytes = 0
	t.mu.Unlock()
	t.free()
}

// stop ends the timer.
func (t *tidier) stop() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.stopped = true
	if t.timer != nil {
		t.timer.Stop()
	}
}
