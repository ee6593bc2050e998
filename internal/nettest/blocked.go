package nettest

import (
	"bytes"
	"fmt"
	"runtime"
	"testing"
)

// OnceBlocked calls act, in a goroutine of its own, once the calling goroutine waits inside function: a name as stack
// traces have it, such as "tcp.(*Waiter).Wait". It is for what must happen during a wait. The test fails if the wait does
// not begin. It ends act before the test's cleanup.
func OnceBlocked(t testing.TB, function string, act func()) {
	t.Helper()
	header := stackHeader()
	done := make(chan struct{})
	go func() {
		defer close(done)
		if Within(Patience, func() bool { return blockedIn(header, function) }) {
			act()
		} else {
			t.Errorf("the test did not come to wait in %s", function)
		}
	}()
	t.Cleanup(func() { <-done })
}

// stackHeader returns how the stack trace of the calling goroutine begins, such as "goroutine 7 [".
func stackHeader() []byte {
	stack := make([]byte, 64)
	stack = stack[:runtime.Stack(stack, false)]
	return fmt.Appendf(nil, "%s[", stack[:bytes.IndexByte(stack, '[')])
}

// blockedIn reports whether the goroutine whose trace begins with header is parked, and called function.
func blockedIn(header []byte, function string) bool {
	all := make([]byte, 64<<10)
	n := runtime.Stack(all, true)
	for ; n == len(all); n = runtime.Stack(all, true) {
		all = make([]byte, 2*len(all))
	}
	all = all[:n]
	for trace := range bytes.SplitSeq(all, []byte("\n\n")) {
		state, found := bytes.CutPrefix(trace, header)
		if found {
			return !bytes.HasPrefix(state, []byte("running")) && !bytes.HasPrefix(state, []byte("runnable")) &&
				bytes.Contains(trace, []byte(function+"("))
		}
	}
	return false
}
