package relay

import (
	"bytes"
	"io"
	"net"
	"testing"
	"time"
)

// A user that takes all that is allowed, as soon as it is allowed, gets the rate in the mean, in bursts of a step at most.
func TestAPaceAllowsItsRate(t *testing.T) {
	for _, rate := range []uint64{1, 19, 1000, 1 << 20, 1 << 40} {
		p, now, moved, largest := NewPace(rate), time.Unix(1e9, 0), 0, 0
		end := now.Add(20 * time.Second)
		for rounds := 0; now.Before(end); rounds++ {
			n := p.Allowance(now)
			largest = max(largest, n)
			moved += n
			p.Spend(n)
			next := p.Next()
			if !next.After(now) {
				t.Fatalf("rate %d: after taking %d bytes, the next time is not later", rate, n)
			}
			if rounds > 1000 {
				t.Fatalf("rate %d: more than 1000 rounds in 20 s", rate)
			}
			now = next
		}
		if got, want := float64(moved)/20, float64(rate); got < 0.95*want || got > 1.05*want+0.05 {
			t.Errorf("rate %d: %v bytes for each second", rate, got)
		}
		if most := max(float64(rate)/20, 1); float64(largest) > most {
			t.Errorf("rate %d: a burst of %d bytes, want at most %v", rate, largest, most)
		}
	}
}

// Bytes that have moved without being allowed are made up for, and time without bytes is not saved up.
func TestAPaceKeepsDebtsAndNoSavings(t *testing.T) {
	p, now := NewPace(1000), time.Unix(1e9, 0)
	if got := p.Allowance(now); got != 50 {
		t.Errorf("at first %d bytes are allowed, want 50", got)
	}
	p.Spend(1050)
	if got := p.Allowance(now.Add(999 * time.Millisecond)); got != 0 {
		t.Errorf("in debt, %d bytes are allowed", got)
	}
	if got := p.Next().Sub(now); got < 1025*time.Millisecond || got > 1026*time.Millisecond {
		t.Errorf("in debt, the next bytes move after %v, want 1.025 s", got)
	}
	if got := p.Allowance(now.Add(time.Hour)); got != 50 {
		t.Errorf("after an hour %d bytes are allowed, want 50", got)
	}
	if NewPace(0) != nil {
		t.Error("a rate of zero limits")
	}
}

// A relay passes each direction at its rate.
func TestARelayKeepsToItsRates(t *testing.T) {
	const rate, size = 80_000, 30_000
	const least = (size - rate/20) * time.Second / rate
	r := newRig(t, Options{PaceDown: NewPace(rate), PaceUp: NewPace(rate)})
	for _, c := range []struct{ from, to *net.TCPConn }{{r.client, r.server}, {r.server, r.client}} {
		want, began := pattern(size), time.Now()
		if _, err := c.from.Write(want); err != nil {
			t.Fatal(err)
		}
		c.from.CloseWrite()
		got, err := io.ReadAll(c.to)
		if took := time.Since(began); took < least {
			t.Errorf("took %v, want at least %v", took, least)
		}
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%d bytes arrived, %v", len(got), err)
		}
	}
	r.wantEnd(t, Closed)
}

// A limit of one direction does not hold back the other, and the end of a side is noticed meanwhile.
func TestARateIsThatOfOneDirection(t *testing.T) {
	r := newRig(t, Options{PaceUp: NewPace(1)})
	if _, err := r.server.Write(pattern(1 << 10)); err != nil {
		t.Fatal(err)
	}
	want := pattern(1 << 20)
	go r.client.Write(want)
	got := make([]byte, len(want))
	if _, err := io.ReadFull(r.server, got); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the other direction has %v", err)
	}
	reset(r.client)
	r.wantEnd(t, DownReset)
}
