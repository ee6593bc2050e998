package nettest

import (
	"testing"
	"time"
)

// A test whose limit is too short for the machine runs again with a longer one, whichever way it fails.
func TestUnderLimitRunsAgainWithALongerLimit(t *testing.T) {
	for name, fail := range map[string]func(testing.TB){
		"Fail":    testing.TB.Fail,
		"FailNow": testing.TB.FailNow,
		"Error":   func(t testing.TB) { t.Error("too early") },
		"Errorf":  func(t testing.TB) { t.Errorf("too %s", "early") },
		"Fatal":   func(t testing.TB) { t.Fatal("too early") },
		"Fatalf":  func(t testing.TB) { t.Fatalf("too %s", "early") },
	} {
		runs := 0
		UnderLimit(t, time.Second, func(t testing.TB, limit time.Duration) {
			if runs++; limit < 64*time.Second {
				fail(t)
			}
		})
		if runs != 3 {
			t.Errorf("%s: %d runs, want 3", name, runs)
		}
	}
	runs := 0
	UnderLimit(t, time.Second, func(testing.TB, time.Duration) { runs++ })
	if runs != 1 {
		t.Errorf("%d runs of a test that passes", runs)
	}
}
