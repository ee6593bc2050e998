package upstream

import (
	"context"
	"errors"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

// Behind a balanced address, the next attempt may reach another server. Behind another address it cannot.
func TestOnlyABalancedTargetIsDialledAgain(t *testing.T) {
	s := newServer(t)
	for _, c := range []struct {
		target Target
		want   int
	}{
		{Target{Address: nettest.Refusing(t)}, 1},
		{Target{Address: nettest.Refusing(t), Balanced: true}, 3},
		{Target{Address: netip.MustParseAddrPort("127.0.0.1:9"), Source: netip.MustParseAddr("203.0.113.1"), Balanced: true}, 1}, // not an own address
		{Target{Address: s.listener.Addr(), Balanced: true}, 1},
	} {
		var stats Stats
		up, attempts, err := (&Dialer{Poller: s.poller, Stats: &stats}).Dial(s.w, c.target)
		failures := c.want
		if err == nil {
			up.Close()
			failures--
		}
		if attempts != c.want || stats.Failed.Load() != uint64(failures) || stats.Redialled.Load() != uint64(c.want-1) ||
			stats.Connected.Load() != uint64(c.want-failures) {
			t.Errorf("%+v: %d attempts, want %d; %d failed, %d connected, %d were repeated; %v", c.target, attempts, c.want,
				stats.Failed.Load(), stats.Connected.Load(), stats.Redialled.Load(), err)
		}
	}
}

// The attempts share the time of the dial.
func TestAttemptsEndWithTheDialsTime(t *testing.T) {
	s := newServer(t)
	expired := Dialer{Poller: s.poller, Timeout: time.Nanosecond}
	if _, attempts, err := expired.Dial(s.w, Target{Address: nettest.Refusing(t), Balanced: true}); attempts != 1 || err == nil {
		t.Errorf("%d attempts, %v", attempts, err)
	}
	deadline := time.Now().Add(time.Hour)
	balanced := Target{Balanced: true}
	for attempt, most := range map[int]time.Duration{1: 20 * time.Minute, 2: 30 * time.Minute, 3: time.Hour} {
		got := time.Until(attemptDeadline(deadline, balanced, attempt))
		if got > most || got < most-time.Minute {
			t.Errorf("attempt %d may take %v, want %v", attempt, got, most)
		}
	}
	if got := attemptDeadline(deadline, Target{}, 1); !got.Equal(deadline) {
		t.Errorf("the only attempt ends at %v, want %v", got, deadline)
	}
	if got := attemptDeadline(time.Time{}, balanced, 1); !got.IsZero() {
		t.Errorf("without a deadline, an attempt ends at %v", got)
	}
}

func TestADialThatIsCanceledBetweenTwoAttempts(t *testing.T) {
	s := newServer(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	w := tcp.NewWaiter(ctx)
	defer w.Close()
	_, attempts, err := (&Dialer{Poller: s.poller}).Dial(w, Target{Address: nettest.Refusing(t), Balanced: true})
	if attempts != 1 || !errors.Is(err, tcp.ErrCanceled) {
		t.Errorf("%d attempts, %v", attempts, err)
	}
}

// An event that the waiter received before does not end the pause.
func TestAnEventDoesNotEndThePause(t *testing.T) {
	s := newServer(t)
	near, far := s.connect(t)
	defer near.Close()
	if err := s.w.Wait(time.Now(), near, nil); !errors.Is(err, tcp.ErrDeadline) {
		t.Fatal(err)
	}
	if _, err := far.Write([]byte("event")); err != nil {
		t.Fatal(err)
	}
	nettest.Eventually(t, "the event", near.Readable)
	began := time.Now()
	if err := pause(s.w, time.Time{}); err != nil || time.Since(began) < redialPause/2 {
		t.Errorf("the pause ended after %v: %v", time.Since(began), err)
	}
}

func TestAResetOrAnUnreachableHostIsWorthAnotherAttempt(t *testing.T) {
	for err, want := range map[error]bool{
		unix.ECONNREFUSED: true, unix.ECONNRESET: true, unix.EHOSTUNREACH: true, tcp.ErrDeadline: true,
		unix.ENETUNREACH: false, unix.EMFILE: false, unix.EADDRNOTAVAIL: false, unix.ETIMEDOUT: false, tcp.ErrCanceled: false,
	} {
		if got := mayRedial(err); got != want {
			t.Errorf("mayRedial(%v) = %v", err, got)
		}
	}
}
