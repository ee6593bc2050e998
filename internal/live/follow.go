package live

import (
	"errors"
	"slices"
	"sync"
	"sync/atomic"
)

// Bounds of followers.
const (
	maxFollowers = 16
	queueLength  = 1024 // records that wait for a slow follower
)

// following is the set of followers. Without followers, a closed record costs the read of one pointer.
type following struct {
	all atomic.Pointer[[]*follower] // never changed, only replaced
	mu  sync.Mutex                  // held while it is replaced
}

// follower receives the records that its filter matches, through its queue. Records that exceed its rate or find the queue
// full are dropped and counted in missed.
type follower struct {
	filter    Filter
	queue     chan *Record // not modified after they are queued
	perSecond uint32       // 0 for no bound
	missed    atomic.Uint64

	mu     sync.Mutex
	second uint32
	got    uint32 // in that second
}

var errTooMany = errors.New("16 pages and taps follow the agent, the maximum: close one")

// join adds a follower. leave removes it.
func (f *following) join(filter Filter, perSecond uint32) (*follower, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	all := f.list()
	if len(all) >= maxFollowers {
		return nil, errTooMany
	}
	joined := &follower{filter: filter, queue: make(chan *Record, queueLength), perSecond: perSecond}
	all = append(slices.Clone(all), joined)
	f.all.Store(&all)
	return joined, nil
}

func (f *following) leave(who *follower) {
	f.mu.Lock()
	defer f.mu.Unlock()
	all := slices.DeleteFunc(slices.Clone(f.list()), func(one *follower) bool { return one == who })
	if len(all) == 0 {
		f.all.Store(nil)
		return
	}
	f.all.Store(&all)
}

// Followed reports whether a page or a tap follows records.
func (v *View) Followed() bool { return v.following.all.Load() != nil }

func (f *following) list() []*follower {
	if all := f.all.Load(); all != nil {
		return *all
	}
	return nil
}

// send passes a record to the followers. It never waits. The copy that they share is made only if one of them accepts it.
func (f *following) send(e *entry, second uint32) {
	all := f.all.Load()
	if all == nil {
		return
	}
	var record *Record
	for _, one := range *all {
		if !one.filter.matches(e) {
			continue
		}
		if !one.admits(second) {
			one.missed.Add(1)
			continue
		}
		if record == nil {
			made := e.record()
			record = &made
		}
		select {
		case one.queue <- record:
		default:
			one.missed.Add(1)
		}
	}
}

func (f *follower) admits(second uint32) bool {
	if len(f.queue) == cap(f.queue) {
		return false
	}
	if f.perSecond == 0 {
		return true
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.second != second {
		f.second, f.got = second, 0
	}
	f.got++
	return f.got <= f.perSecond
}
