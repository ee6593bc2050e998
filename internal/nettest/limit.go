package nettest

import (
	"fmt"
	"runtime"
	"sync/atomic"
	"testing"
	"time"
)

// UnderLimit runs a test of a limit of time that must not pass too early. A busy machine can pause longer than the limit
// between two steps of the test. If the test fails, it therefore runs again with a limit eight times as long, and once more.
// Only the failures of the last run count.
func UnderLimit(t *testing.T, limit time.Duration, test func(t testing.TB, limit time.Duration)) {
	t.Helper()
	for range 2 {
		first := &attempt{TB: t}
		done := make(chan struct{})
		go func() {
			defer close(done)
			test(first, limit)
		}()
		<-done
		if !first.Failed() {
			return
		}
		t.Logf("under a limit of %v: failed; again with a longer one", limit)
		limit *= 8
	}
	test(t, limit)
}

// attempt is a run of a test whose failures do not count.
type attempt struct {
	testing.TB
	failed atomic.Bool
}

func (a *attempt) Fail()        { a.failed.Store(true) }
func (a *attempt) Failed() bool { return a.failed.Load() }

func (a *attempt) FailNow() {
	a.Fail()
	runtime.Goexit()
}

func (a *attempt) Error(args ...any) {
	a.Helper()
	a.Log(args...)
	a.Fail()
}

func (a *attempt) Errorf(format string, args ...any) {
	a.Helper()
	a.Error(fmt.Sprintf(format, args...))
}

func (a *attempt) Fatal(args ...any) {
	a.Helper()
	a.Log(args...)
	a.FailNow()
}

func (a *attempt) Fatalf(format string, args ...any) {
	a.Helper()
	a.Fatal(fmt.Sprintf(format, args...))
}
