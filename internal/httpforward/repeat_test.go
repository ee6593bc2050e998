package httpforward

import (
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/tcp"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// The table changes one thing at a time of an exchange whose request may be sent again.
func TestWhichRequestsAreSentAgain(t *testing.T) {
	reused := func(s *session, x *exchange) { s.used, s.target.Balanced = true, false }
	fresh := func(*session, *exchange) {}
	for _, c := range []struct {
		name   string
		on     func(*session, *exchange)
		change func(*session, *exchange)
		want   bool
	}{
		{"on a reused connection", reused, fresh, true},
		{"on a new connection to a balanced target", fresh, fresh, true},
		{"on a new connection to another target", fresh, func(s *session, _ *exchange) { s.target.Balanced = false }, false},
		{"with a server that had it for a while", fresh, func(_ *session, x *exchange) { x.sentAt = time.Now().Add(-2 * takeover) }, false},
		{"with a server that had it for a while, on a reused connection", reused, func(_ *session, x *exchange) { x.sentAt = time.Now().Add(-2 * takeover) }, true},
		{"after a half-close", fresh, func(s *session, _ *exchange) { s.ended = true }, false},
		{"after a half-close, on a reused connection", reused, func(s *session, _ *exchange) { s.ended = true }, true},
		{"a second time", fresh, func(_ *session, x *exchange) { x.repeated = true }, false},
		{"a second time, on a reused connection", reused, func(_ *session, x *exchange) { x.repeated = true }, false},
		{"on an authenticated connection", reused, func(s *session, _ *exchange) { s.bound = true }, false},
		{"after a part of it was let go", reused, func(_ *session, x *exchange) { x.request.retain = false }, false},
		{"with another method", reused, func(_ *session, x *exchange) { x.record.HTTP.Method = []byte("POST") }, false},
		{"with another method of which no byte was sent", reused, func(_ *session, x *exchange) {
			x.record.HTTP.Method = []byte("POST")
			x.request.out.Append(x.request.head)
		}, true},
		{"after a byte of its response", reused, func(_ *session, x *exchange) {
			x.response.in = tcp.TakeBuffer()
			x.response.in.Append([]byte("H"))
		}, false},
	} {
		s := &session{target: upstream.Target{Balanced: true}}
		x := &exchange{s: s}
		x.record.HTTP.Method, x.request.head, x.request.retain, x.sentAt = []byte("GET"), []byte("head"), true, time.Now()
		c.on(s, x)
		c.change(s, x)
		if got := x.mayRepeat(); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}
