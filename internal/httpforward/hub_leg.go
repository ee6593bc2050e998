package httpforward

import (
	"io"
	"time"

	"github.com/pillion-proxy/pillion/internal/http2"
	"github.com/pillion-proxy/pillion/internal/tcp"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// leg is one HTTP/2 connection of a hub: the downstream one, or one to an upstream.
type leg struct {
	h    *hub
	conn *tcp.Conn // nil: not connected yet, or closed

	legInput
	legOutput
	legUp

	readErr, writeErr error // io.EOF from reading is an orderly close
}

// legInput is the input of a leg, and its peer's credit.
type legInput struct {
	in         *tcp.Buffer // nil if all that was read is handled
	pending    bool        // in may have whole frames
	left       int         // of the turn: see laneTurn
	greeted    bool        // the peer's first SETTINGS frame has arrived
	block      block       // an incomplete header block
	decoder    *http2.Decoder
	idleFrames bucket
	began      time.Time // when the beginning of an incomplete frame or header block arrived

	credit int64 // what the peer may still send on the connection
	owed   int   // of it, to be given back
}

// legOutput is the output of a leg, and the credit that its peer has given.
type legOutput struct {
	out     []byte // whole frames; a slab if it is large
	sent    int    // of out
	written uint64 // bytes that the socket has taken
	encoder *http2.Encoder

	window  int64   // what the peer still takes on the connection
	initial int64   // what it takes on a new stream
	blocked []*pipe // wait for room in out or in window

	ended []endedStream // downstream's: streams whose records close when their last byte is written
}

type endedStream struct {
	s  *stream
	at uint64 // of written
}

// legUp is the state of a leg to an upstream.
type legUp struct {
	target  upstream.Target
	calls   map[uint32]*call // open, by the numbers of this connection; nil on a leg of HTTP/1
	open    int              // calls that are open
	next    uint32           // number of the next stream
	limit   uint32           // streams that may be open at once
	waiting []*call          // for the connection, or for a place on it
	joined  int              // calls in waiting that have not left
	closing bool             // takes no new streams
	idleAt  time.Time        // when the last stream ended; zero: it has streams
	use     upstream.Use
	http1   *legHTTP1 // nil: the leg speaks HTTP/2
}

func (l *leg) init(h *hub, conn *tcp.Conn) {
	l.h, l.conn, l.left = h, conn, laneTurn
	l.decoder = http2.NewDecoder(l.limits().MaxHeadBytes, l.limits().MaxHeadFields)
	l.encoder = http2.NewEncoder()
	l.idleFrames = newIdleBucket(h.now())
	l.window, l.initial = http2.FirstWindow, http2.FirstWindow
	l.credit = connectionWindow
}

// isDown reports whether the peer is downstream.
func (l *leg) isDown() bool { return l == &l.h.down }

// limits returns the settings with the limits of what the peer sends.
func (l *leg) limits() *Settings {
	if l.isDown() {
		return l.h.settings
	}
	return l.h.settings.ofServers()
}

// greet sends the first frames. For upstream the client's preface comes before them.
func (l *leg) greet() {
	settings := []http2.Setting{{ID: http2.MaxConcurrentStreams, Value: uint32(l.h.maxStreams())}}
	if !l.isDown() {
		l.out = append(l.out, http2.Preface...)
		settings[0] = http2.Setting{ID: http2.EnablePush, Value: 0}
	}
	settings = append(settings, http2.Setting{ID: http2.MaxHeaderListSize, Value: uint32(l.limits().MaxHeadBytes)})
	l.out = appendSettings(l.out, settings)
	l.out = http2.AppendWindowUpdate(l.out, 0, connectionWindow-http2.FirstWindow)
}

// idle reports whether all output is written.
func (l *leg) idle() bool { return l.sent == len(l.out) }

// full reports whether the peer takes so little that no more output is made for it.
func (l *leg) full() bool { return len(l.out)-l.sent >= maxOut }

// lose marks the connection as lost.
func (l *leg) lose(err error) {
	if l.readErr == nil {
		l.readErr = err
	}
}

// rests reports whether pump has nothing to do. Most upstream connections rest in most turns.
func (l *leg) rests() bool {
	if x := l.http1; x != nil && (x.ended != nil || x.halfClose) {
		return false
	}
	return l.conn != nil && !l.pending && !l.conn.Readable() && len(l.out) == 0 && l.left > 0 && len(l.blocked) == 0 &&
		l.owed < connectionWindow/4 && l.readErr == nil && l.writeErr == nil
}

// pump moves what can be moved, until the turn is over. It reports whether bytes moved.
func (l *leg) pump() (moved bool) {
	if l.conn == nil {
		return false
	}
	was := l.written
	l.grant()
	for l.left > 0 && l.h.over == running {
		l.flush()
		l.unblock()
		if l.readErr != nil || l.full() || l.h.down.full() {
			break
		}
		if l.pending {
			moved = true
			l.parse()
			continue
		}
		if !l.mayRead() || l.read() == 0 {
			break
		}
		moved = true
		l.parse()
	}
	if l.http1 != nil {
		l.settleEnd()
	}
	l.flush()
	return moved || l.written != was || l.left <= 0 || !l.isDown() && l.readErr != nil
}

// flush writes out, and reports whether all of it is written.
func (l *leg) flush() bool {
	for l.sent < len(l.out) && l.writeErr == nil && l.conn.Writable() {
		n, err := l.conn.Write(l.out[l.sent:])
		l.sent += n
		l.written += uint64(n)
		if err != nil {
			if err != tcp.ErrAgain {
				l.writeErr = err
			}
			break
		}
	}
	if l.writeErr == nil && len(l.ended) > 0 {
		l.closeWritten()
	}
	switch {
	case l.sent == len(l.out):
		l.out, l.sent = l.out[:0], 0
		if cap(l.out) > keptScratch {
			tcp.GiveSlab(l.out)
			l.out = nil
		}
		if l.http1 != nil && l.http1.halfClose && l.writeErr == nil {
			_ = l.conn.CloseWrite() // the next read reports an error
		}
		return true
	case l.sent > len(l.out)/2:
		l.out = l.out[:copy(l.out, l.out[l.sent:])]
		l.sent = 0
	}
	return false
}

// reserve makes room for n bytes of output in a slab, so that long outputs leave no garbage.
func (l *leg) reserve(n int) {
	if n += len(l.out); n > keptScratch && n > cap(l.out) {
		longer := append(tcp.TakeSlab(max(n, 2*cap(l.out))), l.out...)
		tcp.GiveSlab(l.out)
		l.out = longer
	}
}

// closeWritten closes the records of streams whose last byte is written.
func (l *leg) closeWritten() {
	done := 0
	for done < len(l.ended) && l.ended[done].at <= l.written {
		s := l.ended[done].s
		c := s.call
		l.h.closeStream(s, nil)
		c.recycle()
		done++
	}
	l.ended = append(l.ended[:0], l.ended[done:]...)
	if len(l.ended) == 0 && cap(l.ended) > keptEntries {
		l.ended = nil
	}
}

// closeEnded closes the records of all ended streams, when no more is written.
func (l *leg) closeEnded() {
	for _, e := range l.ended {
		var err error
		if e.at > l.written {
			err = l.writeErr
		}
		l.h.closeStream(e.s, err)
	}
	l.ended = nil
}

// mayRead reports whether to try a read. Each frame may cause output for its sender, and responses cause output for
// downstream: without room for it, they wait in the kernel.
func (l *leg) mayRead() bool {
	return l.readErr == nil && !l.full() && !l.h.down.full() && (l.http1 == nil || l.http1.mayRead()) && l.conn.Readable()
}

// read reads once, after the incomplete frame that the buffer may hold.
func (l *leg) read() int {
	if l.in == nil {
		l.in = tcp.TakeBuffer()
	}
	n, err := l.in.Fill(l.conn)
	if err == tcp.ErrFull && l.in.Grow(l.longest()) {
		n, err = l.in.Fill(l.conn)
	}
	switch {
	case err == nil:
		l.left -= n
		l.h.clock = time.Time{}
		if l.isDown() {
			l.h.requests = l.h.now()
		}
		return n
	case err == tcp.ErrAgain:
	case l.http1 != nil:
		l.http1.ended = err // what was read before comes first
	default:
		l.readErr = err
	}
	l.settle()
	return 0
}

// longest returns how many bytes the buffer must be able to hold.
func (l *leg) longest() int {
	if l.http1 != nil {
		return l.limits().MaxHeadBytes + 1
	}
	return http2.HeaderLength + http2.MinFrameSize + tcp.BufferSize
}

// settle releases the buffer if it is empty.
func (l *leg) settle() {
	if l.in != nil && l.in.Len() == 0 {
		l.freeInput()
	}
}

func (l *leg) freeInput() {
	l.in.Release()
	l.in, l.pending = nil, false
}

// parse handles the whole frames in the buffer.
func (l *leg) parse() {
	l.pending = false
	for l.in != nil && l.h.over == running && l.readErr == nil {
		if l.left <= 0 || l.full() || l.h.down.full() {
			l.pending = l.wholeFrame()
			break
		}
		l.left -= frameCost
		step := l.step
		if l.http1 != nil {
			step = l.stepHTTP1
		}
		progress, err := step(l.in.Bytes())
		if err != nil && !l.h.handleError(l, err) {
			return
		}
		if !progress {
			break
		}
	}
	l.settle()
	l.grant()
}

func (l *leg) wholeFrame() bool {
	b := l.in.Bytes()
	if l.http1 != nil {
		return true
	}
	return len(b) >= http2.HeaderLength && len(b) >= http2.HeaderLength+http2.ParseHeader(b).Length
}

// grant gives the credit of the connection back. It does not wait for streams that are not read: the others, or a peer that
// reads its streams one after the other, would wait with them.
func (l *leg) grant() {
	if l.owed >= connectionWindow/4 {
		l.out = http2.AppendWindowUpdate(l.out, 0, l.owed)
		l.credit += int64(l.owed)
		l.owed = 0
	}
}

// headSince returns since when the rest of a frame or of a header block is missing; zero if no part is missing.
func (l *leg) headSince() time.Time {
	switch {
	case !l.block.open && l.in == nil:
		l.began = time.Time{}
	case l.began.IsZero():
		l.began = l.h.now()
	}
	return l.began
}

// held returns how much memory the leg holds.
func (l *leg) held() int {
	n := piece(cap(l.out)) + piece(cap(l.block.fragments))
	if l.in != nil {
		l.in.Shrink() // it waits for the rest of a frame, perhaps for long
		n += piece(l.in.Cap())
	}
	return n
}

// unblock passes on what has waited for room or for credit of the connection.
func (l *leg) unblock() {
	if len(l.blocked) == 0 || l.full() || l.window <= 0 {
		return
	}
	waited := l.blocked
	l.blocked = nil
	for _, p := range waited {
		if p.blocked == l { // otherwise it waits for another connection by now
			p.blocked = nil
			l.h.pass(p)
		}
	}
}

// block notes that a pipe waits for room or for credit of the connection.
func (l *leg) wait(p *pipe) {
	if p.blocked != l {
		p.blocked, p.c.referred = l, true
		l.blocked = append(l.blocked, p)
	}
}

// beginBlock returns out with room for a frame header. The caller appends a header block and passes it to endBlock.
func (l *leg) beginBlock() (block []byte, at int) {
	var room [http2.HeaderLength]byte
	l.reserve(1 << 10)
	return append(l.out, room[:]...), len(l.out)
}

func (l *leg) endBlock(block []byte, at int, stream uint32, end bool) {
	l.out = http2.AppendHeaders(block, at, stream, end)
	l.idleFrames.earn(idleBonus)
}

// sendFields sends fields as a header block.
func (l *leg) sendFields(stream uint32, end bool, fields []http2.Field) {
	block, at := l.beginBlock()
	l.endBlock(l.h.appendFields(block, l.encoder, fields), at, stream, end)
}

func (l *leg) reset(stream uint32, code http2.Code) {
	if l.http1 != nil {
		l.http1.broken, l.closing = true, true
		return
	}
	l.out = http2.AppendResetStream(l.out, stream, code)
}

// close closes the connection: in order if it has no stream, otherwise with a reset. One of HTTP/1 that can carry another
// request goes to the pool.
func (l *leg) close() {
	if l.conn != nil {
		if l.spare() {
			l.h.engine.config.Pool.GiveUsed(l.target, l.conn, l.use)
		} else if l.http1 != nil && l.http1.broken {
			l.conn.Reset()
		} else if l.open == 0 || l.readErr == io.EOF {
			l.conn.Close()
		} else {
			l.conn.Reset()
		}
		l.conn = nil
	}
	l.release()
}

func (l *leg) release() {
	l.freeInput()
	l.block.free()
	tcp.GiveSlab(l.out)
	l.out, l.sent, l.blocked = nil, 0, nil
}
