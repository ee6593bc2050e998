package httpforward

import (
	"io"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/http1"
	"github.com/pillion-proxy/pillion/internal/relay"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

const (
	// turn is how many bytes a message may move before the goroutine yields to other connections.
	turn = 256 << 10

	// spliceFrom is the smallest remaining payload for which splice is cheaper than copying.
	spliceFrom = tcp.BufferSize
)

// smallBody is the largest buffered body that is copied behind the head instead of being written as a second vector.
const smallBody = 2 << 10

// message is one HTTP/1 message on its way from src to dst: a rewritten head, and a body whose bytes are forwarded
// unchanged. Body bytes are forwarded only after they were parsed, or when the framing makes parsing unnecessary.
type message struct {
	src, dst *tcp.Conn
	in       *tcp.Buffer // bytes read from src: the next of the body and those after it; may be nil
	head     []byte      // as it goes to dst
	ready    int         // bytes at the front of in that are or were in out
	out      tcp.Vector  // parts of head and in that dst has not accepted yet
	body     http1.Body
	tape     *flow.Body // records the body; nil: not recorded

	pace      *pace                  // nil: the rate is not limited
	nominated []byte                 // fields that are forbidden in the trailers, such as those that Connection names
	refuses   func(name []byte) bool // others that are; may be nil

	bulk   relay.Mover
	retain bool // head, kept and in keep everything sent, so that it can be sent again
	ended  bool // src has closed, and that ends the body

	keepLimit int    // how much of the body kept and in may keep; zero: one buffer
	kept      []byte // the beginning of the body, in a slab; the rest is in in

	srcErr error // reading ended; io.EOF in the middle of a body
	dstErr error // writing failed
	bad    error // the body is malformed
}

// start queues the head and the part of the body that is in the buffer.
func (m *message) start(in *tcp.Buffer, framing http1.Framing, limits http1.Limits) {
	m.in = in
	m.body.Start(framing, limits)
	m.body.Forbid(m.nominated)
	m.body.Refuse(m.refuses)
	m.bulk = relay.Mover{Src: m.src, Dst: m.dst}
	m.bulk.Expect(m.body.Payload() - int64(m.held()))
	m.out.Append(m.head)
	if m.pace != nil {
		m.pace.free = len(m.head)
	}
	m.scan()
	if n := m.ready; n <= smallBody && !m.retain {
		m.out.Reset()
		m.head = append(m.head, m.in.Bytes()[:n]...)
		m.in.Discard(n)
		m.ready = 0
		m.out.Append(m.head)
	}
}

// resend queues a retained message again, for another dst.
func (m *message) resend(dst *tcp.Conn) {
	m.dst, m.bulk.Dst, m.dstErr = dst, dst, nil
	m.out.Reset()
	m.out.Append(m.head)
	if m.pace != nil {
		m.pace.free = len(m.head)
	}
	m.out.Append(m.kept)
	if m.in != nil {
		m.out.Append(m.in.Bytes()[:m.ready])
	}
}

// keepMore makes room in a full buffer of a retained message, or for a body of which ahead bytes are still to arrive. It
// reports false if the message becomes too large to retain. Everything queued has been written.
func (m *message) keepMore(ahead int64) bool {
	n := len(m.kept) + m.held()
	if m.keepLimit == 0 || int64(n)+ahead > int64(m.keepLimit) {
		return false
	}
	if m.held() < tcp.BufferSize {
		return true
	}
	if need := len(m.kept) + m.ready; need > cap(m.kept) {
		larger := append(tcp.TakeSlab(min(max(2*need, int(ahead)+n), m.keepLimit)), m.kept...)
		tcp.GiveSlab(m.kept)
		m.kept = larger
	}
	m.kept = append(m.kept, m.in.Bytes()[:m.ready]...)
	m.in.Discard(m.ready)
	m.ready = 0
	return true
}

// freeKept frees kept. No part of it is queued.
func (m *message) freeKept() {
	if m.kept != nil {
		tcp.GiveSlab(m.kept)
		m.kept = nil
	}
}

// stopRetaining gives up the ability to send the message again.
func (m *message) stopRetaining() {
	if m.retain && m.out.Len() == 0 {
		m.discardSent()
	}
	m.retain = false
}

// untouched reports whether dst has accepted no byte of a retained message.
func (m *message) untouched() bool { return m.out.Len() == len(m.head)+len(m.kept)+m.ready }

// held returns the number of bytes in the buffer.
func (m *message) held() int {
	if m.in == nil {
		return 0
	}
	return m.in.Len()
}

// scan queues the bytes in the buffer that belong to the body.
func (m *message) scan() {
	if m.held() == m.ready || m.body.Done() {
		return
	}
	fresh := m.in.Bytes()[m.ready:]
	var n int
	n, m.bad = m.body.Scan(fresh)
	if m.tape != nil {
		m.tape.Add(fresh[:n])
	}
	m.out.Append(fresh[:n])
	m.ready += n
}

// done reports whether dst has accepted the whole message.
func (m *message) done() bool { return m.taken() && m.out.Len() == 0 && m.bulk.Held() == 0 }

// taken reports whether the whole body was read from src.
func (m *message) taken() bool { return m.ended || m.body.Done() }

// delivered returns how many bytes of payload dst has accepted. Buffered chunk framing counts as undelivered payload.
func (m *message) delivered() uint64 {
	waiting := m.bulk.Held() + min(m.out.Len(), m.ready)
	return uint64(max(m.body.Bytes()-int64(waiting), 0))
}

// move reads and writes until either side blocks. It reports true if its turn ended before that.
func (m *message) move() (longTurn bool) {
	if m.pace != nil {
		m.pace.next = time.Time{}
	}
	for left := turn; left > 0; {
		switch {
		case m.dstErr != nil:
			return false
		case m.out.Len() > 0 || m.bulk.Held() > 0:
			n := m.put()
			if n == 0 {
				return false
			}
			left -= n
		case m.taken() || m.bad != nil || m.srcErr != nil || !m.take():
			return false
		}
	}
	return true
}

// put writes, and returns how many bytes dst accepted.
func (m *message) put() int {
	if !m.dst.Writable() {
		return 0
	}
	var n int
	var err error
	switch {
	case m.pace != nil:
		if n, err = m.pace.write(m.dst, &m.out); n == 0 && err == nil {
			return 0
		}
	case m.out.Len() > 0:
		n, err = m.dst.WriteVector(&m.out)
	default:
		n, err = m.bulk.Put()
	}
	if err != nil && err != tcp.ErrAgain {
		m.dstErr = err
	}
	if m.out.Len() == 0 && !m.retain {
		m.discardSent()
	}
	return n
}

// discardSent releases the bytes that dst has accepted.
func (m *message) discardSent() {
	m.head = m.head[:0]
	m.freeKept()
	if m.ready > 0 {
		m.in.Discard(m.ready)
		m.ready = 0
	}
}

// take reads more of the body. It reports false if no more can be read now.
func (m *message) take() bool {
	if !m.src.Readable() {
		return false
	}
	ahead := m.body.Payload()
	if m.retain && (ahead >= spliceFrom || m.held() >= tcp.BufferSize) && !m.keepMore(ahead) {
		m.stopRetaining() // too large to retain
	}
	var err error
	if m.held() == 0 && ahead >= spliceFrom && !m.retain && m.pace == nil && (m.tape == nil || m.tape.Cut()) {
		var n int
		n, err = m.bulk.Take(ahead)
		m.body.Skip(int64(n))
	} else {
		if m.in == nil {
			m.in = tcp.TakeBuffer()
		}
		if _, err = m.in.Fill(m.src); err == nil { // Fill has room, because a buffer holds every line that Scan waits for
			m.scan()
		}
	}
	switch {
	case err == tcp.ErrAgain:
		return false
	case err == io.EOF && m.body.End() == nil:
		m.ended = true
	case err != nil:
		m.srcErr = err
		return false
	}
	return true
}

// release releases what the message holds, except for the buffer that it was started with, and resets it for reuse.
func (m *message) release() {
	m.bulk.Release()
	m.out.Reset()
	m.freeKept()
	head, out := m.head[:0], m.out
	*m = message{} // a literal with fields would be built on the stack first
	m.head, m.out = head, out
}
