package httpforward

import (
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/tcp"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// The table changes one thing at a time of an exchange whose request may be sent again.
func TestWhichRequestsAreSentAgain(t *testing.T) {
	reused := func(s *session, x *exchange) { s.used, s.Target.Balanced = true, false }
	fresh := func(*session, *exchange) {}
	for _, c := range []struct {
		name   string
		on     func(*session, *exchange)
		change func(*session, *exchange)
		want   bool
	}{
		{"on a reused connection", reused, fresh, true},
		{"on a new connection to a balanced target", fresh, fresh, true},
		{"on a new connection to another target", fresh, func(s *session, _ *exchange) { s.Target.Balanced = false }, false},
		{"with a server that had it for a while", fresh, func(_ *session, x *exchange) { x.sentAt = time.Now().Add(-2 * takeover) }, false},
		{"with a server that had it for a while, on a reused connection", reused, func(_ *session, x *exchange) { x.sentAt = time.Now().Add(-2 * takeover) }, true},
		{"after a half-close", fresh, func(s *session, _ *exchange) { s.ended = true }, false},
		{"after a half-close, on a reused connection", reused, func(s *session, _ *exchange) { s.ended = true }, true},
		{"a second time", fresh, func(_ *session, x *exchange) { x.repeated = true }, false},
		{"a second time, on a reused connection", reused, func(_ *session, x *exchange) { x.repeated = true }, false},
		{"on an authenticated connection", reused, func(s *session, _ *exchange) { s.bound = true }, false},
		{"after a part of it was let go", reused, func(_ *session, x *exchange) { x.request.retain = false }, false},
		{"with another method", reused, func(_ *session, x *exchange) { x.http.Method = []byte("POST") }, false},
		{"with another method of which no byte was sent", reused, func(_ *session, x *exchange) {
			x.http.Method = []byte("POST")
			x.request.out.Append(x.request.head)
		}, true},
		{"after a byte of its response", reused, func(_ *session, x *exchange) {
			x.response.in = tcp.TakeBuffer()
			x.response.in.Append([]byte("H"))
		}, false},
	} {
		s := &session{Connection: &Connection{Target: upstream.Target{Balanced: true}}}
		x := &exchange{s: s}
		x.http.Method, x.request.head, x.request.retain, x.sentAt = []byte("GET"), []byte("head"), true, time.Now()
		c.on(s, x)
		c.change(s, x)
		if got := x.mayRepeat(); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

func TestADownstreamConnectionOutlivesItsUpstreamConnection(t *testing.T) {
	now := time.Now()
	open, closed := newOrigin(t), nettest.Refusing(t)
	for _, c := range []struct {
		name string
		s    session
		want bool
	}{
		{"inbound, while the workload listens", session{Connection: &Connection{Target: upstream.Target{Address: open.address}}}, true},
		{"inbound, when the workload listens no more", session{Connection: &Connection{Target: upstream.Target{Address: closed}}}, false},
		{"inbound, authenticated", session{bound: true, Connection: &Connection{Target: upstream.Target{Address: open.address}}}, false},
		{"outbound, while a request may be on its way", session{lastUse: now.Add(time.Hour), Connection: &Connection{Target: upstream.Target{Balanced: true}}}, true},
		{"outbound, authenticated", session{bound: true, lastUse: now.Add(time.Hour), Connection: &Connection{Target: upstream.Target{Balanced: true}}}, false},
		{"outbound, later", session{lastUse: now.Add(-inFlight), Connection: &Connection{Target: upstream.Target{Balanced: true, Address: open.address}}}, false},
	} {
		if got := c.s.outlives(); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

func TestAnOrphanedDownstreamConnectionIsCheckedAgain(t *testing.T) {
	soon, later := time.Now().Add(time.Second), time.Now().Add(time.Hour)
	for _, c := range []struct {
		name     string
		s        session
		from, to time.Time
	}{
		{"with an upstream connection", session{idleEnd: later, Connection: &Connection{}}, later, later},
		{"inbound", session{orphaned: true, idleEnd: later, Connection: &Connection{}}, time.Now().Add(listenCheck), time.Now().Add(listenCheck + time.Minute)},
		{"inbound, when the idle time ends earlier", session{orphaned: true, idleEnd: soon, Connection: &Connection{}}, soon, soon},
		{"outbound", session{orphaned: true, idleEnd: later, lastUse: soon, Connection: &Connection{Target: upstream.Target{Balanced: true}}}, soon.Add(inFlight), soon.Add(inFlight)},
	} {
		if got := c.s.nextCheck(); got.Before(c.from) || got.After(c.to) {
			t.Errorf("%s: %v, want %v to %v", c.name, got, c.from, c.to)
		}
	}
	over := session{orphaned: true, idleEnd: time.Now(), lastUse: later, Connection: &Connection{Target: upstream.Target{Balanced: true}}}
	if over.outlastsWait(tcp.ErrDeadline) {
		t.Error("a connection outlasts its idle time")
	}
	over.idleEnd = time.Time{}
	if !over.outlastsWait(tcp.ErrDeadline) || over.outlastsWait(tcp.ErrCanceled) {
		t.Error("a connection does not outlast a check, or outlasts the end of the agent")
	}
}
