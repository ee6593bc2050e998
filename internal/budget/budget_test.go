package budget

import (
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
)

// holder is an owner that counts its interrupts.
type holder struct {
	Account
	pending atomic.Int32 // interrupts that were not taken back
}

func (h *holder) Interrupt() { h.pending.Add(1) }
func (h *holder) Continue()  { h.pending.Store(0) }

func open(b *Budget, address string) *holder {
	h := new(holder)
	h.Open(b, h, netip.MustParseAddr(address))
	return h
}

// evictedOf returns the indexes of the evicted holders.
func evictedOf(all []*holder) (indexes []int) {
	for i, h := range all {
		if h.Evicted() != (h.pending.Load() == 1) {
			panic("an eviction without an interrupt, or the reverse")
		}
		if h.Evicted() {
			indexes = append(indexes, i)
		}
	}
	return indexes
}

func TestTheHeaviestPeerLosesItsLargestAndOldest(t *testing.T) {
	const kib = 1 << 10
	b := New(1000 * kib)
	all := []*holder{
		open(b, "198.51.100.1"), open(b, "198.51.100.1"), open(b, "198.51.100.1"), open(b, "198.51.100.1"),
		open(b, "198.51.100.2"), open(b, "198.51.100.2"),
	}
	for i, n := range []int{100, 200, 200, 120, 300, 60} { // 980 KiB: the first peer has 620
		if !all[i].Hold(n * kib) {
			t.Fatalf("holder %d was evicted while there was room", i)
		}
	}
	for _, step := range []struct {
		who, holds int // KiB
		want       []int
		used       int
	}{
		{5, 80, nil, 1000},               // the limit is allowed
		{5, 81, []int{1}, 801},           // of the first peer's largest, the older
		{0, 150, []int{1}, 851},          // grows, and is the younger of its size now
		{4, 500, []int{1, 4}, 551},       // the heaviest itself
		{5, 700, []int{1, 4, 5}, 470},    // the same, at once
		{3, 651, []int{1, 3, 4, 5}, 350}, // one too many
		{0, 650, []int{1, 3, 4, 5}, 850},
		{2, 400, []int{0, 1, 3, 4, 5}, 400},   // the larger
		{2, 1001, []int{0, 1, 2, 3, 4, 5}, 0}, // more than there is
	} {
		granted := all[step.who].Hold(step.holds * kib)
		for _, h := range all {
			if h.Evicted() && h.Hold(0) {
				t.Fatal("an evicted account is in order again")
			}
		}
		if got := evictedOf(all); !slices.Equal(got, step.want) || b.Used() != step.used*kib || granted == slices.Contains(got, step.who) {
			t.Fatalf("%d holds %d KiB: granted %v, evicted %v, used %d KiB; want evicted %v, used %d KiB",
				step.who, step.holds, granted, got, b.Used()/kib, step.want, step.used)
		}
	}
	if b.Evictions() != 6 {
		t.Errorf("%d evictions, want 6", b.Evictions())
	}
	for i, h := range all {
		if h.Hold(1) || h.Hold(2) {
			t.Errorf("holder %d may hold again before it was closed", i)
		}
		h.Close()
		if h.Evicted() || h.pending.Load() != 0 {
			t.Errorf("holder %d is still evicted after it was closed", i)
		}
		h.Open(b, h, netip.MustParseAddr("198.51.100.3"))
		if !h.Hold(kib) {
			t.Errorf("holder %d is evicted after it was opened again", i)
		}
		h.Close()
		h.Close()
	}
	if b.Used() != 0 || len(b.peers) != 0 {
		t.Errorf("%d bytes and %d peers are left", b.Used(), len(b.peers))
	}
}

// An evicted owner needs time to free its memory. Until then others get half as much again, and no more.
func TestMemoryOfTheEvictedCountsUntilItIsFreed(t *testing.T) {
	b := New(1000)
	evicted, second, third, fourth := open(b, "198.51.100.1"), open(b, "198.51.100.2"), open(b, "198.51.100.3"), open(b, "198.51.100.4")
	if !evicted.Hold(800) || !second.Hold(700) || !evicted.Evicted() {
		t.Fatal("the heaviest was not evicted")
	}
	if third.Hold(1) || !third.Evicted() || b.Used() != 1500 {
		t.Errorf("a byte more than there is was granted, or %d bytes are used", b.Used())
	}
	if evicted.Hold(801) || b.Used() != 1500 || evicted.Hold(300) || b.Used() != 1000 {
		t.Errorf("after a part was freed %d bytes are used", b.Used())
	}
	if !fourth.Hold(300) || b.Used() != 1300 || second.Evicted() {
		t.Errorf("%d bytes are used after a part was given to another", b.Used())
	}
	for _, h := range []*holder{evicted, second, third, fourth} {
		h.Close()
	}
	if b.Used() != 0 || b.evicted != 0 {
		t.Errorf("%d bytes are used, %d by the evicted", b.Used(), b.evicted)
	}
}

func TestAnAccountMayEndAnywhereInItsList(t *testing.T) {
	b := New(1000)
	all := []*holder{open(b, "198.51.100.1"), open(b, "198.51.100.1"), open(b, "198.51.100.1"), open(b, "198.51.100.1")}
	for _, h := range all {
		h.Hold(100)
	}
	all[1].Close() // from the middle
	all[3].Close() // from the end
	rival := open(b, "198.51.100.2")
	rival.Hold(950)
	if got := evictedOf(all); len(got) != 0 || !rival.Evicted() {
		t.Fatalf("evicted %v, want the rival", got)
	}
	rival.Close()
	all[0].Hold(450)
	all[2].Hold(551)
	if got := evictedOf(all); !slices.Equal(got, []int{0}) {
		t.Errorf("evicted %v, want the older", got)
	}
	for _, h := range all {
		h.Close()
	}
}

func TestClassesArePowersOfTwo(t *testing.T) {
	for n, want := range map[int]int{
		1: 0, 4096: 0, 4097: 1, 8192: 1, 8193: 2, 256 << 10: 6, 256<<10 + 1: 7, 1 << 40: classes - 1,
	} {
		if got := class(n); got != want {
			t.Errorf("%d bytes are of class %d, want %d", n, got, want)
		}
	}
}

// A host has a prefix of 64 bits, and all the addresses in it.
func TestAPeerWithManyAddressesIsOne(t *testing.T) {
	b := New(100)
	mine := []*holder{open(b, "2001:db8::1"), open(b, "2001:db8::2"), open(b, "2001:db8::3%eth0")}
	other, mapped := open(b, "2001:db8:0:1::1"), open(b, "::ffff:198.51.100.1")
	other.Hold(40)
	mapped.Hold(1)
	for _, h := range mine {
		h.Hold(20)
	}
	if got := evictedOf([]*holder{mine[0], mine[1], mine[2], other, mapped}); !slices.Equal(got, []int{0}) {
		t.Errorf("evicted %v, want the oldest of the prefix", got)
	}
	if len(b.peers) != 3 {
		t.Errorf("%d peers, want 3", len(b.peers))
	}
	for _, h := range append(mine, other, mapped) {
		h.Close()
	}
}

func TestWithoutABudgetThereIsNoLimit(t *testing.T) {
	var none *Budget
	var a Account
	if !a.Hold(1<<40) || a.Evicted() {
		t.Error("the zero account has a limit")
	}
	h := open(none, "198.51.100.1")
	if !h.Hold(1<<40) || none.Used() != 0 || none.Limit() != 0 || none.Evictions() != 0 || none.Tight() {
		t.Error("no budget has a limit")
	}
	h.Close()
	a.Close()
}

func TestABudgetIsTightFromItsHalf(t *testing.T) {
	b := New(100)
	h := open(b, "198.51.100.1")
	defer h.Close()
	for n, want := range map[int]bool{0: false, 50: false, 51: true} {
		if h.Hold(n); b.Tight() != want {
			t.Errorf("%d of 100 are used: Tight is %v", n, b.Tight())
		}
	}
}

// Under the race detector: owners hold, are evicted and close while others do.
func TestABudgetIsForManyGoroutines(t *testing.T) {
	b := New(1 << 18)
	var owners sync.WaitGroup
	var evictions atomic.Uint64
	for i := range 8 {
		owners.Go(func() {
			h := new(holder)
			for j := range 2000 {
				h.Open(b, h, netip.AddrFrom4([4]byte{198, 51, 100, byte(i % 3)}))
				for k := range j % 5 {
					if !h.Hold((j*7919 + k*104729) % (1 << 19)) {
						evictions.Add(1)
						break
					}
				}
				h.Close()
				if h.pending.Load() != 0 {
					t.Error("interrupted after the end")
				}
			}
		})
	}
	owners.Wait()
	if b.Used() != 0 || len(b.peers) != 0 || b.Evictions() == 0 {
		t.Errorf("%d bytes and %d peers are left after %d evictions", b.Used(), len(b.peers), b.Evictions())
	}
}

func BenchmarkHold(b *testing.B) {
	budget := New(1 << 30)
	b.RunParallel(func(pb *testing.PB) {
		h := open(budget, "198.51.100.1")
		for pb.Next() {
			h.Hold(100 << 10)
			h.Hold(0)
		}
		h.Close()
	})
}

// Less than nothing counts as nothing, so that no account can be heavy without being in a list.
func TestAnAccountHoldsNothingAtLeast(t *testing.T) {
	b := New(1 << 20)
	all := []*holder{open(b, "192.0.2.1"), open(b, "192.0.2.2")}
	if !all[0].Hold(-15<<10) || b.Used() != 0 {
		t.Errorf("%d bytes are held", b.Used())
	}
	all[0].Hold(900 << 10)
	all[1].Hold(200 << 10)
	if got := evictedOf(all); !slices.Equal(got, []int{0}) {
		t.Errorf("evicted: %v, want the first", got)
	}
	for _, h := range all {
		h.Close()
	}
	if b.Used() != 0 {
		t.Errorf("%d bytes are held", b.Used())
	}
}

// Connections that are detained after their eviction take memory and descriptors as well.
func TestFewConnectionsAreDetained(t *testing.T) {
	var files syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err != nil {
		t.Fatal(err)
	}
	lower := files
	lower.Cur = 400
	for _, c := range []struct {
		limit, want int
		files       *syscall.Rlimit
	}{
		{10 * detainedSize, 10, &files},
		{1 << 30, int(min(maxDetained, files.Cur/4)), &files},
		{1 << 30, 100, &lower},
		{10 * detainedSize, 10, &lower},
	} {
		if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, c.files); err != nil {
			t.Fatal(err)
		}
		b, detained := New(c.limit), 0
		if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &files); err != nil {
			t.Fatal(err)
		}
		for range 1 << 17 {
			if b.Detain() {
				detained++
			}
		}
		if b.Release(); detained != c.want || !b.Detain() || b.Detain() {
			t.Errorf("%d connections are detained, want %d, and the next one after a release", detained, c.want)
		}
	}
	if (*Budget)(nil).Detain() {
		t.Error("a connection is detained without a limit of memory")
	}
}
