package httpforward

import (
	"slices"

	"github.com/pillion-proxy/pillion/internal/http2"
)

// undecided is a request of HTTP/2 that is not decided about yet.
type undecided struct {
	s       *stream
	id      uint32 // of s
	end     bool   // the head is the whole request
	request http2.Request
	fields  []http2.Field
	seen    seen
	check   Check      // that the decision waits for; nil: none yet
	body    *Collected // nil: it was not needed
}

// suspend keeps a request until a question about it is answered. Streams have to be opened upstream in the order of their
// numbers, so no further frames of downstream are handled until then: they stay in its kernel, and those of upstream pass.
func (m *multiplex) suspend(u *undecided, check Check) {
	kept := *u
	if u.check == nil {
		kept.fields = slices.Clone(u.fields) // they are the decoder's
	}
	kept.check = check
	m.suspended = &kept
	check.Notify(m.w.Wake)
}

// proceed reports whether frames of downstream may be handled. It decides about the request that was suspended if there is
// an answer now.
func (m *multiplex) proceed() bool {
	u := m.suspended
	switch {
	case u == nil:
		return true
	case m.streams.find(u.id) != u.s: // upstream is gone, or has reset it
		u.check.Cancel()
		m.suspended = nil
		return true
	case !u.check.Answered():
		return false
	}
	m.suspended = nil
	if err := m.decide(u); err != nil {
		m.handleError(&m.toUp, err)
	}
	return m.suspended == nil
}

// giveUp gives up the question of a request that is suspended.
func (m *multiplex) giveUp() {
	if m.suspended != nil {
		m.suspended.check.Cancel()
		m.suspended = nil
	}
}
