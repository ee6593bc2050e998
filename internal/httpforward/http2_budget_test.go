package httpforward

import (
	"testing"
	"time"
)

// spent is how many tokens are there at a moment.
func (b *bucket) spent(at time.Time) (n int) {
	for b.spend(func() time.Time { return at }) {
		n++
	}
	return n
}

func TestABucketFillsWithTimeUpToItsBurst(t *testing.T) {
	start := time.Unix(1e9, 0)
	b := newBucket(1000, 50, 1000, start)
	if n := b.spent(start); n != 1000 {
		t.Errorf("%d tokens at first", n)
	}
	for _, c := range []struct {
		after time.Duration
		want  int
	}{
		{time.Second, 50}, {1010 * time.Millisecond, 0}, {1030 * time.Millisecond, 1}, {2 * time.Second, 48},
		{24 * time.Hour, 1000}, // and not the same again for each minute that has passed
		{25 * time.Hour, 1000},
	} {
		if n := b.spent(start.Add(c.after)); n != c.want {
			t.Errorf("after %v: %d tokens, want %d", c.after, n, c.want)
		}
	}
}

func TestABucketIsEarnedUpToItsMost(t *testing.T) {
	start := time.Unix(1e9, 0)
	b := newBucket(10, 1, 100, start)
	b.earn(1000)
	if n := b.spent(start); n != 100 {
		t.Errorf("%d tokens", n)
	}
}
