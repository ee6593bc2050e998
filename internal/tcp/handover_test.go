package tcp

import (
	"io"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// exhaust waits until the connection has no more events, so that the next event is a new one.
func exhaust(t *testing.T, w *Waiter, conn *Conn) {
	t.Helper()
	for {
		if _, err := conn.Read(make([]byte, 100)); err != ErrAgain {
			t.Fatalf("reading from a silent peer: %v", err)
		}
		switch err := w.Wait(time.Now().Add(20*time.Millisecond), conn, nil); err {
		case nil:
		case ErrDeadline:
			return
		default:
			t.Fatal(err)
		}
	}
}

// An event that arrives while a connection rests ends the next wait at once, whichever waiter that is.
func TestEventsOfARestingConnectionAreKept(t *testing.T) {
	for name, c := range map[string]struct {
		happens func(far *Conn)
		seen    func(near *Conn) bool
	}{
		"bytes":        {func(far *Conn) { far.Write([]byte("x")) }, (*Conn).Readable},
		"a half-close": {func(far *Conn) { far.CloseWrite() }, (*Conn).Readable},
		"a close":      {(*Conn).Close, (*Conn).Readable},
		"a reset":      {(*Conn).Reset, func(near *Conn) bool { return near.Failed() != nil }},
	} {
		for _, when := range []string{"before", "after"} {
			t.Run(name+" "+when+" the hand-over", func(t *testing.T) {
				far, near := connected(t, newPoller(t), "127.0.0.1:0")
				first, next := NewWaiter(t.Context()), NewWaiter(t.Context())
				defer first.Close()
				defer next.Close()
				exhaust(t, first, near)
				near.Rest()
				if when == "before" {
					c.happens(far)
					nettest.Eventually(t, "the event", func() bool { return c.seen(near) })
					if err := next.Wait(time.Now().Add(patience), near, nil); err != nil {
						t.Errorf("first wait: %v", err)
					}
				} else {
					exhaust(t, next, near)
					c.happens(far)
				}
				for !c.seen(near) {
					if err := next.Wait(time.Now().Add(patience), near, nil); err != nil {
						t.Fatal(err)
					}
				}
				if first.happened() {
					t.Error("the previous waiter was woken")
				}
			})
		}
	}
}

func TestQuiet(t *testing.T) {
	for name, c := range map[string]struct {
		happens func(far *Conn)
		quiet   bool
	}{
		"nothing":      {func(*Conn) {}, true},
		"bytes":        {func(far *Conn) { far.Write([]byte("x")) }, false},
		"a half-close": {func(far *Conn) { far.CloseWrite() }, false},
		"a close":      {(*Conn).Close, false},
		"a reset":      {(*Conn).Reset, false},
	} {
		t.Run(name, func(t *testing.T) {
			// Without a wait the poller receives no events, so the result must come from the kernel.
			far, near := connected(t, newPoller(t), "127.0.0.1:0")
			if !near.Quiet() {
				t.Fatal("a new connection is not quiet")
			}
			c.happens(far)
			if c.quiet != near.Quiet() && !nettest.Within(patience, func() bool { return c.quiet == near.Quiet() }) {
				t.Errorf("Quiet = %v", !c.quiet)
			}
			if name == "bytes" {
				if n, err := near.Read(make([]byte, 10)); n != 1 || err != nil || !near.Quiet() {
					t.Errorf("after Quiet: read %d, %v; Quiet = %v", n, err, near.Quiet())
				}
			}
		})
	}
}

// TestConnectionsMoveBetweenGoroutines has many goroutines take a connection from a pool, send a request, wait for the
// answer, and put the connection back. An event that wakes the wrong goroutine makes the right one's wait reach its
// deadline.
func TestConnectionsMoveBetweenGoroutines(t *testing.T) {
	poller := newPoller(t)
	const conns, users, turns = 4, 12, 150
	stock := make(chan *Conn, conns)
	var echoes, asking sync.WaitGroup
	for range conns {
		dialled, accepted := connected(t, poller, "127.0.0.1:0")
		stock <- dialled
		echoes.Go(func() {
			if err := echo(t.Context(), accepted); err != io.EOF {
				t.Errorf("echo: %v", err)
			}
		})
	}
	for user := range users {
		asking.Go(func() {
			w := NewWaiter(t.Context())
			defer w.Close()
			random := rand.New(rand.NewPCG(uint64(user), 1))
			for range turns {
				conn := <-stock
				if err := ask(w, conn, numbered(1+random.IntN(3000))); err != nil {
					t.Error(err)
				}
				conn.Rest()
				stock <- conn
			}
		})
	}
	asking.Wait()
	for range conns {
		(<-stock).Close()
	}
	echoes.Wait()
}

// ask sends a question and waits for an answer of the same length.
func ask(w *Waiter, conn *Conn, question []byte) error {
	answer := make([]byte, len(question))
	for sent, got := 0, 0; got < len(question); {
		n, err := conn.Write(question[sent:])
		if err != nil && err != ErrAgain {
			return err
		}
		sent += n
		m, err := conn.Read(answer[got:])
		if err != nil && err != ErrAgain {
			return err
		}
		if got += m; n == 0 && m == 0 {
			if err := w.Wait(time.Now().Add(patience), conn, nil); err != nil {
				return err
			}
		}
	}
	return nil
}

func TestWakeAllEndsEveryWait(t *testing.T) {
	poller := newPoller(t)
	const waits = 20
	var ready, ended sync.WaitGroup
	ready.Add(waits)
	changed := make(chan struct{}) // closed before WakeAll
	for range waits {
		_, near := connected(t, poller, "127.0.0.1:0")
		ended.Go(func() {
			w := NewWaiter(t.Context())
			defer w.Close()
			ready.Done()
			for {
				select {
				case <-changed:
					return
				default:
				}
				if err := w.Wait(time.Now().Add(patience), near, nil); err != nil {
					t.Errorf("Wait: %v", err)
					return
				}
			}
		})
	}
	_, resting := connected(t, poller, "127.0.0.1:0")
	w := NewWaiter(t.Context())
	defer w.Close()
	exhaust(t, w, resting)
	resting.Rest()
	ready.Wait()
	close(changed)
	poller.WakeAll()
	ended.Wait()
	if w.happened() {
		t.Error("the waiter of a resting connection was woken")
	}
}

// An owner may check for a change just before WakeAll and wait just after it. That wait must end at once, and only that one.
func TestAWaitThatBeginsAfterWakeAllEndsAtOnce(t *testing.T) {
	poller := newPoller(t)
	_, silent := connected(t, poller, "127.0.0.1:0")
	w := NewWaiter(t.Context())
	defer w.Close()
	for range 2 {
		poller.WakeAll()
		if err := w.Wait(time.Now().Add(patience), silent, nil); err != nil {
			t.Errorf("first wait: %v", err)
		}
		for w.happened() { // WakeAll has woken the waiter as well if the connection was watched already
		}
		if err := w.Wait(time.Now().Add(time.Millisecond), silent, nil); err != ErrDeadline {
			t.Errorf("second wait: %v", err)
		}
	}
}

// A new connection has no event. It is writable, but that is an event only after its send buffer was full.
func TestANewConnectionHasNoEvent(t *testing.T) {
	poller := newPoller(t)
	far, near := connected(t, poller, "127.0.0.1:0")
	w := NewWaiter(t.Context())
	defer w.Close()
	if err := w.Wait(time.Now().Add(20*time.Millisecond), near, nil); err != ErrDeadline {
		t.Errorf("first wait: %v", err)
	}
	chunk := make([]byte, 1<<20)
	for { // until the send buffer is full
		if _, err := near.Write(chunk); err == ErrAgain {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		io.Copy(io.Discard, far)
	}()
	for {
		if err := w.Wait(time.Now().Add(patience), near, nil); err != nil {
			t.Fatalf("waiting for room in the send buffer: %v", err)
		}
		if _, err := near.Write(chunk); err == nil {
			break
		}
	}
	near.Close()
	<-drained
}

// The timer of a waiter outlives a wait. Each wait must end at its own deadline, and not before.
func TestEachWaitHasItsOwnDeadline(t *testing.T) {
	poller := newPoller(t)
	_, silent := connected(t, poller, "127.0.0.1:0")
	w := NewWaiter(t.Context())
	defer w.Close()
	exhaust(t, w, silent)
	later := 20 * time.Millisecond
	for _, waits := range [][]time.Duration{{time.Hour, later}, {later, 3 * later}, {later, time.Hour, later}, {-later, later, later}} {
		for i, length := range waits {
			if i+1 < len(waits) {
				w.wake() // ends the wait: the timer goes on
			}
			deadline := time.Now().Add(length)
			err := w.Wait(deadline, silent, nil)
			if i+1 < len(waits) {
				if err != nil {
					t.Errorf("%v, wait %d: %v in spite of an event", waits, i, err)
				}
			} else if err != ErrDeadline || time.Now().Before(deadline) {
				t.Errorf("%v, wait %d: %v, %v before its deadline", waits, i, err, time.Until(deadline))
			}
		}
	}
	for _, c := range []struct {
		length time.Duration
		goesOn bool
	}{{time.Hour, true}, {brief, false}, {2 * time.Hour, true}} {
		w.wake()
		if err := w.Wait(time.Now().Add(c.length), silent, nil); err != nil || w.armed != 0 != c.goesOn {
			t.Errorf("after a wait of up to %v, the timer goes on: %v, %v", c.length, w.armed != 0, err)
		}
	}
	time.AfterFunc(2*later, w.wake)
	if err := w.Wait(time.Time{}, silent, nil); err != nil || w.news.Load() != 0 {
		t.Errorf("without a deadline: %v", err)
	}
}
