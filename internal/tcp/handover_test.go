package tcp

import (
	"io"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// exhaust waits until nothing happens to the connection any more, so that the next event is a new one.
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

// What happens to a connection at rest is there for the next who waits for it, at once.
func TestNothingIsLostWhileAConnectionRests(t *testing.T) {
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
						t.Errorf("the first wait ended with %v", err)
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
					t.Error("who gave it away was woken")
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
			// Nobody waits, so that the kernel alone knows.
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
					t.Errorf("after it was asked: read %d, %v, and it is quiet: %v", n, err, near.Quiet())
				}
			}
		})
	}
}

// TestConnectionsWanderBetweenGoroutines has many goroutines take a connection out of a common stock, ask something over
// it, wait for the answer, and put it back, as a pool's users do. An event that wakes the wrong one shows as a wait that
// ends at its deadline.
func TestConnectionsWanderBetweenGoroutines(t *testing.T) {
	poller := newPoller(t)
	const conns, users, turns = 4, 12, 150
	stock := make(chan *Conn, conns)
	var echoes, asking sync.WaitGroup
	for range conns {
		dialled, accepted := connected(t, poller, "127.0.0.1:0")
		stock <- dialled
		echoes.Go(func() {
			if err := echo(t.Context(), accepted); err != io.EOF {
				t.Errorf("echo ended with %v", err)
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

// ask sends a question and waits for as many bytes to come back.
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
					t.Errorf("a wait ended with %v", err)
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
		t.Error("somebody was woken for a connection at rest")
	}
}

// Who looked before the change waits after it, if only just: that wait is over at once, and only that one.
func TestAWaitThatBeginsAfterWakeAllEndsAtOnce(t *testing.T) {
	poller := newPoller(t)
	_, silent := connected(t, poller, "127.0.0.1:0")
	w := NewWaiter(t.Context())
	defer w.Close()
	for range 2 {
		poller.WakeAll()
		if err := w.Wait(time.Now().Add(patience), silent, nil); err != nil {
			t.Errorf("the first wait ends with %v", err)
		}
		for w.happened() { // the round woke it, too, once the connection was watched
		}
		if err := w.Wait(time.Now().Add(time.Millisecond), silent, nil); err != ErrDeadline {
			t.Errorf("the second wait ends with %v", err)
		}
	}
}

// A connection begins without an event: it can be written to, but that is news only to who has found it full.
func TestAConnectionBeginsInSilence(t *testing.T) {
	poller := newPoller(t)
	far, near := connected(t, poller, "127.0.0.1:0")
	w := NewWaiter(t.Context())
	defer w.Close()
	if err := w.Wait(time.Now().Add(20*time.Millisecond), near, nil); err != ErrDeadline {
		t.Errorf("the first wait ends with %v", err)
	}
	chunk := make([]byte, 1<<20)
	for { // until it is full
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
			t.Fatalf("a full connection's wait ends with %v", err)
		}
		if _, err := near.Write(chunk); err == nil {
			break
		}
	}
	near.Close()
	<-drained
}
