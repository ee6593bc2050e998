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

	resetBurst = 1000 // streams that are reset before their response by downstream's doing (CVE-2023-44487)
	resetRate  = 50
)

// budget is a bucket of tokens.
type budget struct {
	left, burst, rate int       // rate in tokens a second
	filled            time.Time // when it was last filled
}

// newBudget makes a full one.
func newBudget(burst, rate int, now time.Time) budget {
	return budget{left: burst, burst: burst, rate: rate, filled: now}
}

// spend takes a token, and reports whether there was one. The clock is asked only when it looks as if there were none.
func (b *budget) spend(clock func() time.Time) bool {
	if b.left == 0 {
		// Over a minute it does not matter, and the product stays small.
		passed := min(clock().Sub(b.filled), time.Minute)
		b.left = min(int(passed*time.Duration(b.rate)/time.Second), b.burst)
		if b.left == 0 {
			return false
		}
		b.filled = b.filled.Add(passed)
	}
	b.left--
	return true
}

// earn adds tokens.
func (b *budget) earn(n int) { b.left = min(b.left+n, b.burst) }
