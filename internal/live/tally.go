package live

import (
	"math/bits"
	"sync"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
)

// book has a tally for each name, up to its limit; later names share one. Tallies are never removed, so that a connection
// may keep a pointer.
type book struct {
	limit int
	mu    sync.RWMutex
	named map[string]*tally
	other *tally // nil until it is needed
}

// Names of shared tallies. They cannot be names of hosts: see hostName.
const (
	otherName   = "(other)"   // names beyond the limit
	unknownName = "(unknown)" // neither a host nor an original destination
)

func (b *book) find(name []byte) *tally {
	b.mu.RLock()
	t := b.named[string(name)]
	b.mu.RUnlock()
	if t != nil {
		return t
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if t = b.named[string(name)]; t != nil {
		return t
	}
	if len(b.named) >= b.limit {
		if b.other == nil {
			b.other = &tally{name: otherName}
		}
		return b.other
	}
	if b.named == nil {
		b.named = make(map[string]*tally)
	}
	t = &tally{name: string(name)}
	b.named[t.name] = t
	return t
}

// all returns the tallies that exist, in no order.
func (b *book) all() []*tally {
	b.mu.RLock()
	defer b.mu.RUnlock()
	list := make([]*tally, 0, len(b.named)+1)
	for _, t := range b.named {
		list = append(list, t)
	}
	if b.other != nil {
		list = append(list, b.other)
	}
	return list
}

// tally counts what happened under one name: since the beginning, by second for a minute, and latencies and reasons in
// half minutes. It takes 5 KiB.
type tally struct {
	name string

	mu      sync.Mutex
	total   counts
	reasons []uint64 // by index of reasonNames; nil until the first failure
	seconds [64]slot // by second; more than a minute, so that the current second does not overwrite a whole one
	halves  [2]half  // by half minute: this one and the one before
}

type counts struct {
	requests, connections, flows, errors, bytes uint64
}

func (c *counts) add(more counts) {
	c.requests += more.requests
	c.connections += more.connections
	c.flows += more.flows
	c.errors += more.errors
	c.bytes += more.bytes
}

// slot holds the counts of one second. It is valid only if second matches, because old slots are not cleared.
type slot struct {
	second                               uint32
	requests, connections, flows, errors uint32
	bytes                                uint64
}

func (s slot) counts() counts {
	return counts{uint64(s.requests), uint64(s.connections), uint64(s.flows), uint64(s.errors), s.bytes}
}

// half holds the counts of the half minute with this number.
type half struct {
	number  uint32
	latency [buckets]uint32
	reasons []uint32 // likewise
}

const halfMinute = 30 // seconds

// end is the part of a closed record that a tally counts.
type end struct {
	second         uint32
	reason         int // an index of reasonNames; noFailure for an ordinary end
	request, timed bool
	duration       time.Duration
	bytes          uint64
}

func (t *tally) slot(second uint32) *slot {
	s := &t.seconds[second%uint32(len(t.seconds))]
	if s.second != second {
		*s = slot{second: second}
	}
	return s
}

func (t *tally) half(second uint32) *half {
	number := second / halfMinute
	h := &t.halves[number%uint32(len(t.halves))]
	if h.number != number {
		clear(h.reasons)
		*h = half{number: number, reasons: h.reasons}
	}
	return h
}

func (t *tally) opened(second uint32) {
	t.mu.Lock()
	t.total.connections++
	t.slot(second).connections++
	t.mu.Unlock()
}

func (t *tally) add(e *end) {
	t.mu.Lock()
	s := t.slot(e.second)
	t.total.flows++
	s.flows++
	t.total.bytes += e.bytes
	s.bytes += e.bytes
	if e.request {
		t.total.requests++
		s.requests++
	}
	if e.timed {
		t.half(e.second).latency[bucket(e.duration)]++
	}
	if e.reason != noFailure {
		t.total.errors++
		s.errors++
		h := t.half(e.second)
		if t.reasons == nil {
			t.reasons = make([]uint64, len(reasonNames))
		}
		if h.reasons == nil {
			h.reasons = make([]uint32, len(reasonNames))
		}
		t.reasons[e.reason]++
		h.reasons[e.reason]++
	}
	t.mu.Unlock()
}

// Failures by name: flow's reasons, followed by failures that a complete response reports.
const noFailure = -1

var responseFailures = []Reason{
	{Reason: flow.FailureStatus, Text: "The response had a status of 5xx."},
	{Reason: flow.FailureGRPC, Text: "The response had a gRPC status that corresponds to 5xx."},
}

var reasonNames, reasonIndex = func() (names []string, index map[string]int) {
	for _, e := range flow.Explanations {
		names = append(names, string(e.Reason))
	}
	for _, failure := range responseFailures {
		names = append(names, failure.Reason)
	}
	index = make(map[string]int)
	for i, name := range names {
		index[name] = i
	}
	return names, index
}()

// failure returns the index in reasonNames of the failure that a record ended with, or noFailure.
func failure(r *flow.Record) int {
	if name := r.Failure(); name != "" {
		return reasonIndex[name]
	}
	return noFailure
}

// Latencies are counted in buckets of growing width: eight for each doubling, so that the middle of a bucket is at most
// 6.25 % from any value in it. The unit is 1.024 µs, because a shift is faster than a division. The last bucket also holds
// everything above 73 minutes.
const (
	perDoubling = 8
	buckets     = 30 * perDoubling
)

func bucket(d time.Duration) int {
	n := uint64(max(0, d)) >> 10
	if n < perDoubling {
		return int(n)
	}
	doublings := bits.Len64(n) - bits.Len64(perDoubling)
	return min(buckets-1, doublings*perDoubling+int(n>>doublings))
}

// middle returns the latency that represents a bucket.
func middle(bucket int) time.Duration {
	if bucket < perDoubling {
		return time.Duration(bucket)<<10 + 1<<9
	}
	doublings := bucket/perDoubling - 1
	low := uint64(perDoubling+bucket%perDoubling) << doublings
	return time.Duration(low<<10 + 1<<(doublings+9))
}

// sums adds up one or more tallies for a snapshot.
type sums struct {
	total   counts
	reasons []uint64       // by index of reasonNames; nil without failures
	seconds [minute]counts // whole seconds, the oldest first
	recent  []uint64       // as reasons, for the last half to whole minute
	latency [buckets]uint64
}

const minute = 60

// read adds the tally. now is the current second; it is incomplete and left out of seconds.
func (s *sums) read(t *tally, now uint32) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s.total.add(t.total)
	for i := range s.seconds {
		if second := int64(now) - minute + int64(i); second >= 0 {
			if slot := t.seconds[second%int64(len(t.seconds))]; int64(slot.second) == second {
				s.seconds[i].add(slot.counts())
			}
		}
	}
	s.reasons = addReasons(s.reasons, t.reasons)
	for i := range t.halves {
		h := &t.halves[i]
		if age := now/halfMinute - h.number; age > 1 {
			continue
		}
		for i, n := range h.latency {
			s.latency[i] += uint64(n)
		}
		s.recent = addReasons(s.recent, h.reasons)
	}
}

// addReasons adds counts of reasons to sum. Both may be nil.
func addReasons[N uint32 | uint64](sum []uint64, more []N) []uint64 {
	if sum == nil && more != nil {
		sum = make([]uint64, len(more))
	}
	for i, n := range more {
		sum[i] += uint64(n)
	}
	return sum
}

// percentile returns the latency that a share of the requests did not exceed; 0 without requests.
func (s *sums) percentile(share float64) time.Duration {
	var count uint64
	for _, n := range s.latency {
		count += n
	}
	if count == 0 {
		return 0
	}
	rank := uint64(share * float64(count-1))
	for i, n := range s.latency {
		if rank < n {
			return middle(i)
		}
		rank -= n
	}
	return middle(buckets - 1)
}
