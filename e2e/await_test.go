package e2e

import (
	"testing"
	"time"
)

// patience is how long a test waits for what should happen at once, on a machine that is busy with other tests.
const patience = 20 * time.Second

// await waits until condition holds, and fails the test when it does not in time.
func await(t testing.TB, what string, condition func() bool) {
	t.Helper()
	if !holdsWithin(patience, condition) {
		t.Fatalf("%s: still not so after %v", what, patience)
	}
}

func holdsWithin(limit time.Duration, condition func() bool) bool {
	for deadline := time.Now().Add(limit); !condition(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			return false
		}
	}
	return true
}
