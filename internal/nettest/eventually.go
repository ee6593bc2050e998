package nettest

import (
	"testing"
	"time"
)

// Patience is how long a test waits for what should happen at once, on a machine that is busy with other tests.
const Patience = 20 * time.Second

// Eventually waits until condition holds, and fails the test when it does not in time. It is for what announces itself
// in no other way, such as a line in a log or a number in /proc.
func Eventually(t testing.TB, what string, condition func() bool) {
	t.Helper()
	if !Within(Patience, condition) {
		t.Fatalf("%s: still not so after %v", what, Patience)
	}
}

// Within waits until condition holds, for at most limit, and reports whether it does.
func Within(limit time.Duration, condition func() bool) bool {
	for deadline := time.Now().Add(limit); !condition(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			return false
		}
	}
	return true
}
