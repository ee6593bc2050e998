package nettest

import (
	"testing"
	"time"
)

// Patience bounds the wait for an event that must happen. It only guards against a hang: a test that passes never waits
// that long, however busy the machine is, and no test concludes anything from how much of it was used.
const Patience = time.Minute

// Eventually waits until condition holds, and fails the test after Patience. It is for state that cannot be waited for in
// another way, such as a line in a log or a number in /proc.
func Eventually(t testing.TB, what string, condition func() bool) {
	t.Helper()
	if !Within(Patience, condition) {
		t.Fatalf("condition not met within %v: %s", Patience, what)
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
