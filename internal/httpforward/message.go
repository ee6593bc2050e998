package httpforward

import (
	"io"

	"github.com/pillion-proxy/pillion/internal/http1"
	"github.com/pillion-proxy/pillion/internal/relay"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

const (
	// turn is how many bytes a message may move before other connections get theirs.
	turn = 1 << 20

	// spliceFrom is how much payload has to be ahead for the body to go by splice. Less is cheaper to copy.
	spliceFrom = tcp.BufferSize
)

// smallBody is how many bytes are rather copied behind the head than sent as a second piece of memory.
const smallBody = 2 << 10

// message is one HTTP/1 message on its way from src to dst: a head that was written anew, and a body that keeps its
// bytes. Bytes of the body go on only when they have been looked at, or when the framing says that they need not be.
type message struct {
	src, dst *tcp.Conn
	in       *tcp.Buffer // read from src: the body's next bytes and what comes after it; nil: nothing
	head     []byte      // as it goes to dst
	ready    int         // bytes at the front of in that are in out, or were
	out      tcp.Vector  // what dst has not taken yet, of head and in
	body     http1.Body
	bulk     relay.Mover
	retain   bool // head and in hold all that went out, so that it can be sent again
	ended    bool // src has closed, and that is the end of the body

	srcErr error // reading ended; io.EOF in the middle of a body
	dstErr error // writing failed
	bad    error // the body is malformed
}

// start queues the head, and as much of the body as is in the buffer.
func (m *message) start(in *tcp.Buffer, framing http1.Framing, limits http1.Limits) {
	m.in = in
	m.body.Start(framing, limits)
	m.bulk = relay.Mover{Src: m.src, Dst: m.dst}
	m.bulk.Expect(m.body.Payload() - int64(m.held()))
	m.out.Append(m.head)
	m.scan()
	if n := m.ready; n <= smallBody && !m.retain {
		m.out.Reset()
		m.head = append(m.head, m.in.Bytes()[:n]...)
		m.in.Discard(n)
		m.ready = 0
		m.out.Append(m.head)
	}
}

// again queues what was retained once more, for another dst.
func (m *message) again(dst *tcp.Conn) {
	m.dst, m.bulk.Dst, m.dstErr = dst, dst, nil
	m.out.Reset()
	m.out.Append(m.head)
	if m.in != nil {
		m.out.Append(m.in.Bytes()[:m.ready])
	}
}

// settle says that the message will not be sent again.
func (m *message) settle() {
	if m.retain && m.out.Len() == 0 {
		m.sent()
	}
	m.retain = false
}

// untouched reports whether dst has taken nothing of a retained message.
func (m *message) untouched() bool { return m.out.Len() == len(m.head)+m.ready }

// held is how many bytes are in the buffer.
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
	m.out.Append(fresh[:n])
	m.ready += n
}

// done reports whether everything has been taken by dst.
func (m *message) done() bool { return m.taken() && m.out.Len() == 0 && m.bulk.Held() == 0 }

// taken reports whether all of the body was taken from src.
func (m *message) taken() bool { return m.ended || m.body.Done() }

// delivered is how many bytes of payload dst has taken. Chunk framing that waits for a full dst counts as payload that
// does.
func (m *message) delivered() uint64 {
	waiting := m.bulk.Held() + min(m.out.Len(), m.ready)
	return uint64(max(m.body.Bytes()-int64(waiting), 0))
}

// move moves what can be moved. It reports whether its turn was over before that.
func (m *message) move() (longTurn bool) {
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

// put writes and returns how many bytes dst took.
func (m *message) put() int {
	if !m.dst.Writable() {
		return 0
	}
	var n int
	var err error
	if m.out.Len() > 0 {
		n, err = m.dst.WriteVector(&m.out)
	} else {
		n, err = m.bulk.Put()
	}
	if err != nil && err != tcp.ErrAgain {
		m.dstErr = err
	}
	if m.out.Len() == 0 && !m.retain {
		m.sent()
	}
	return n
}

// sent forgets what dst has taken.
func (m *message) sent() {
	m.head = m.head[:0]
	if m.ready > 0 {
		m.in.Discard(m.ready)
		m.ready = 0
	}
}

// take reads more of the body. It reports false when there is nothing now.
func (m *message) take() bool {
	if !m.src.Readable() {
		return false
	}
	ahead := m.body.Payload()
	if m.retain && (ahead >= spliceFrom || m.held() >= tcp.BufferSize) {
		m.settle() // it is too large to be held
	}
	var err error
	if m.held() == 0 && ahead >= spliceFrom {
		var n int
		n, err = m.bulk.Take(ahead)
		m.body.Skip(int64(n))
	} else {
		if m.in == nil {
			m.in = tcp.TakeBuffer()
		}
		if _, err = m.in.Fill(m.src); err == nil { // it has room: a buffer holds every line that Scan waits for
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

// release gives back what the message holds, but for the buffer that it was started with. The message is as new.
func (m *message) release() {
	m.bulk.Release()
	m.out.Reset()
	*m = message{head: m.head[:0], out: m.out}
}
