package httpforward

import "time"

// Limits on what one connection may do without effect. Each is far above what well-behaved peers need, and far below
// what does harm.
const (
	maxStreams       = 4096 // open at once; announced to downstream
	maxUnacked       = 32   // unacknowledged SETTINGS frames
	maxContinuations = 32   // in one header block; a block of 60 KiB needs 3
	maxTable         = 64 << 10

	// idleBurst is how many frames without effect a peer may send ahead: pings, settings, priorities, empty data, window
	// updates. Frames with effect and data earn more. Each of these frames is work for the other peer: with 2,000, floods of
	// pings on 20 connections multiplied the latencies of other clients of a Go server by four (`make hostility`).
	idleBurst = 256
	idleRate  = 100 // per second, in the long run
	idleBonus = 8   // added per frame with effect: the response may be frames without effect

	// One token is added per this many bytes of data. Go's readers send a WINDOW_UPDATE for each 4 KiB, on the stream
	// and on the connection.
	idleBonusBytes = 512
	idleMax        = 64 << 10 // upper bound of the tokens earned: a window may be full before its receiver begins to read

	resetBurst = 1000 // streams that downstream resets before their response (CVE-2023-44487)
	resetRate  = 50
	manyResets = 100              // more than completed requests; downstream is then read at intervals
	resetPause = time.Millisecond // default of Config.resetPause, that interval
)

// bucket is a token bucket.
type bucket struct {
	left, burst, rate int       // refilled up to burst, with rate tokens per second
	limit             int       // upper bound for earn
	filled            time.Time // when it was last refilled
}

// newBucket returns a bucket with burst tokens.
func newBucket(burst, rate, limit int, now time.Time) bucket {
	return bucket{left: burst, burst: burst, rate: rate, limit: limit, filled: now}
}

// newIdleBucket returns the bucket of one sender's frames without effect.
func newIdleBucket(now time.Time) bucket { return newBucket(idleBurst, idleRate, idleMax, now) }

// newResetBucket returns the bucket of the streams that downstream may open in vain.
func newResetBucket(now time.Time) bucket { return newBucket(resetBurst, resetRate, resetBurst, now) }

// spend takes a token, and reports whether one was left. It reads the clock only when the bucket looks empty.
func (b *bucket) spend(clock func() time.Time) bool {
	if b.left == 0 {
		now := clock()
		passed := min(now.Sub(b.filled), time.Hour) // avoids an overflow of the product
		b.left = min(int(passed*time.Duration(b.rate)/time.Second), b.burst)
		if b.left == 0 {
			return false
		}
		b.filled = now // tokens beyond the burst are lost
	}
	b.left--
	return true
}

// earn adds n tokens.
func (b *bucket) earn(n int) { b.left = min(b.left+n, b.limit) }
