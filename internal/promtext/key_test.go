package promtext

import (
	"fmt"
	"math/rand/v2"
	"testing"
)

// The key of a set of labels does not depend on their order, however many they are.
func TestKeysIgnoreTheOrderOfLabels(t *testing.T) {
	for _, n := range []int{1, 5, 32, 33, 200} {
		labels := make([]Label, n)
		for i := range labels {
			labels[i] = Label{Name: fmt.Sprintf("l%03d", i), Value: "v"}
		}
		want := key(labels, "")
		for range 20 {
			rand.Shuffle(n, func(i, k int) { labels[i], labels[k] = labels[k], labels[i] })
			if got := key(labels, ""); got != want {
				t.Fatalf("%d labels: %q, want %q", n, got, want)
			}
		}
	}
}
