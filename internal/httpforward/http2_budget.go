package httpforward

import "time"

// What one connection may do that leads to nothing. Each number is far above what well-behaved peers need, and far below
// what hurts.
const (
	maxStreams       = 4096 // open at once; downstream is told
	maxUnacked       = 32   // Settings frames on their way
	maxContinuations = 32   // in one header block; a block of 60 KiB needs 3
	maxTable         = 64 << 10

	idleBurst = 2000 // frames that carry nothing: pings, settings, priorities, empty data, updates of windows
	idleRate  = 100  // of them in a second, in the long run
	idleBonus = 8    // and so many for each frame that carries something: its answer may be such frames

	// One more for so many bytes of data. Go's readers give credit for each 4 KiB, on the stream and on the connection.
	idleBonusBytes = 512
	idleMost       = 64 << 10 // may be saved up so: a window may be full before its receiver begins to read

	resetBurst = 1000 // streams that are reset before their response by downstream's doing (CVE-2023-44487)
	resetRate  = 50
)

// budget is a bucket of tokens.
type budget struct {
	left, burst, rate int       // time fills it up to burst, with rate tokens a second
	most              int       // what can be earned in it
	filled            time.Time // when it was last filled
}

// newBudget makes one with a burst in it.
func newBudget(burst, rate, most int, now time.Time) budget {
	return budget{left: burst, burst: burst, rate: rate, most: most, filled: now}
}

// spend takes a token, and reports whether there was one. The clock is asked only when it looks as if there were none.
func (b *budget) spend(clock func() time.Time) bool {
	if b.left == 0 {
		now := clock()
		passed := min(now.Sub(b.filled), time.Hour) // the product stays small
		b.left = min(int(passed*time.Duration(b.rate)/time.Second), b.burst)
		if b.left == 0 {
			return false
		}
		b.filled = now // what is beyond the burst is not saved for another one
	}
	b.left--
	return true
}

// earn adds tokens.
func (b *budget) earn(n int) { b.left = min(b.left+n, b.most) }
