package httpforward

import (
	"time"

	"github.com/pillion-proxy/pillion/internal/http2"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

const (
	laneTurn     = 1 << 20   // bytes that a lane may read before others get their turn
	maxCredit    = 16 << 10  // bytes of credit of ours that may wait for a side before we stop to read from it
	maxOut       = 256 << 10 // bytes that frames may come to before the next ones have to wait until they are written
	keptScratch  = 4 << 10   // the scratch memory that an idle connection keeps
	keptFragment = 16 << 10
)

// lane carries the frames of one direction. It reads, deals with the frames that are there, and reads no more until all
// that came of them is written. So it holds one buffer at most and what became of it, and what waits notDraining in the sender's
// kernel.
type lane struct {
	m        *multiplex
	other    *lane // the way back
	src, dst *tcp.Conn

	in       *tcp.Buffer // nil while nothing is read that is not dealt with
	large    bool        // in is a large one
	parsed   int         // bytes of in that are dealt with; out may point at them
	out      tcp.Vector  // whole frames, pieces of in and of scratch
	scratch  []byte      // frames and headers that are not in in
	outgrown [][]byte    // what scratch was before it grew; out may point at it
	ended    []*stream   // their records close when out is written
	credit   int         // bytes of out that give credit back, for what dst has sent to us
	written  uint64      // bytes that dst took
	bulk     bool        // the last read left more behind
	long     bool        // the turn ended with more to read
	crowded  bool        // in has more to deal with, once out is written

	srcErr, dstErr error // io.EOF of src is its orderly end

	settled    bool      // src's first Settings frame has come
	frameLimit int       // the largest frame that dst takes, as far as anybody was told
	rest       rest      // of a frame whose beginning is dealt with
	block      block     // a header block that is not complete
	began      time.Time // see headSince
	owed       int       // bytes of the connection's window that src gets back, for data that dst never sees
	idleFrames budget

	decoder *http2.Decoder // of src's header blocks
	encoder *http2.Encoder // of header blocks for dst
	unacked []tableSize    // of src's Settings frames that dst has not acknowledged
}

// rest is what is still to come of a frame.
type rest struct {
	data   int    // bytes of data
	behind int    // bytes that are thrown away after them
	stream uint32 // whose data it is
	end    bool   // the last byte of data ends the stream
}

// block collects a header block that comes in several frames.
type block struct {
	open          bool
	stream        uint32
	end           bool // the block ends the stream
	fragments     []byte
	continuations int
	err           error // of its stream, found in the first frame
}

func (l *lane) init(m *multiplex, other *lane) {
	l.m, l.other = m, other
	l.frameLimit = http2.MinFrameSize
	l.decoder = http2.NewDecoder(m.engine.config.MaxHeadBytes, m.engine.config.MaxHeadFields)
	l.encoder = http2.NewEncoder()
	l.idleFrames = newBudget(idleBurst, idleRate, idleMax, m.requests)
}

// fromDown tells the direction.
func (l *lane) fromDown() bool { return l == &l.m.toUp }

// idle reports whether everything that was dealt with is delivered.
func (l *lane) idle() bool { return l.out.Len() == 0 }

// pump moves frames until src has none, dst takes none, or the turn is over. It reports whether anything moved.
func (l *lane) pump() (moved bool) {
	l.long = false
	for left := laneTurn; left > 0; {
		waits := l.out.Len()
		done := l.flush()
		moved = moved || l.out.Len() < waits
		if done && l.crowded {
			moved = true
			left -= maxOut
			l.parse()
			continue
		}
		if !done || !l.mayRead() {
			return moved
		}
		n := l.read()
		if n == 0 {
			return moved || l.srcErr != nil
		}
		moved = true
		left -= n
		l.parse()
	}
	l.long = true
	return moved
}

// flush writes out, and reports whether all of it is written. What nobody can take any more is dropped.
func (l *lane) flush() bool {
	for l.out.Len() > 0 && l.dst != nil && l.dstErr == nil {
		if !l.dst.Writable() {
			return false
		}
		n, err := l.dst.WriteVector(&l.out)
		l.written += uint64(n)
		if err == tcp.ErrAgain {
			return false
		} else if err != nil {
			l.dstErr = err
		}
	}
	if l.holds() {
		return true
	}
	l.out.Reset()
	l.scratch, l.credit = l.scratch[:0], 0
	clear(l.outgrown)
	l.outgrown = l.outgrown[:0]
	if l.in != nil {
		l.in.Discard(l.parsed)
		l.parsed = 0
		if l.in.Len() == 0 {
			l.in.Release()
			l.in = nil
		}
	}
	if l.in == nil && cap(l.scratch) > keptScratch {
		l.scratch = nil
	}
	l.settle()
	return true
}

// settle closes the records of streams whose last frame is written.
func (l *lane) settle() {
	for i, s := range l.ended {
		s.close(l.m, l.dstErr)
		l.ended[i] = nil
	}
	l.ended = l.ended[:0]
}

// mayRead reports whether a read is worth trying, and may be tried: a side that makes us give credit back and does not
// take it is not listened to. What else waits for a side is no reason to stop: it may not read before it is heard. When
// upstream refuses to be written to, it may have said why. When upstream has ended, what downstream still sends is not read:
// as long as we do not know a request, it may be sent again elsewhere.
func (l *lane) mayRead() bool {
	if l.fromDown() && l.other.srcErr != nil {
		return false
	}
	return l.src != nil && l.srcErr == nil && l.other.credit < maxCredit && l.m.over == running &&
		(l.src.Readable() || l.other.dstErr != nil)
}

// read reads once, behind the beginning of a frame that may be held.
func (l *lane) read() int {
	l.makeRoom()
	n, err := l.in.Fill(l.src)
	if err == tcp.ErrFull && l.in.Grow(l.needs()) {
		n, err = l.in.Fill(l.src)
	}
	switch {
	case err == nil:
		l.bulk = n >= tcp.BufferSize/2 && l.src.Readable()
		l.m.clock = time.Time{}
		if l.fromDown() {
			l.m.requests = l.m.now()
		}
		return n
	case err != tcp.ErrAgain:
		l.srcErr = err
	case l.other.dstErr != nil:
		l.srcErr = l.other.dstErr
	}
	l.bulk = false
	if l.in.Len() == 0 {
		l.in.Release()
		l.in = nil
	}
	return 0
}

// makeRoom sees to a buffer, a large one while there is bulk.
func (l *lane) makeRoom() {
	switch {
	case l.in == nil && !l.bulk:
		l.in, l.large = tcp.TakeBuffer(), false
	case l.in == nil:
		l.in, l.large = tcp.TakeLargeBuffer(), true
	case l.bulk && !l.large:
		beginning := l.in
		l.in, l.large = tcp.TakeLargeBuffer(), true
		l.in.Append(beginning.Bytes())
		beginning.Release()
	}
}

// needs is the size of the largest frame that has to be in the buffer as a whole.
func (l *lane) needs() int { return http2.HeaderLength + max(http2.MinFrameSize, l.blockLimit()) }

// blockLimit bounds a header block as it is on the wire, with padding and priority.
func (l *lane) blockLimit() int { return l.m.engine.config.MaxHeadBytes + 262 }

// parse deals with all that is in the buffer. Header blocks may grow when they are encoded anew, a reference to a large
// field above all: then parse stops early, and crowded says so.
func (l *lane) parse() {
	l.crowded = false
	for l.in != nil && l.m.over == running {
		if l.out.Len() > maxOut {
			l.crowded = true
			break
		}
		progress, err := l.step(l.in.Bytes()[l.parsed:])
		if err != nil && !l.m.handleError(l, err) {
			return
		}
		if !progress {
			break
		}
	}
	if l.owed > 0 {
		l.giveBack(0, l.owed)
		l.owed = 0
	}
}

// giveBack gives src credit, for data that dst does not see: on a stream, or, with zero, on the connection.
func (l *lane) giveBack(stream uint32, n int) {
	was := len(l.other.scratch)
	l.other.insert(http2.AppendWindowUpdate(l.other.scratch, stream, n))
	l.other.credit += len(l.other.scratch) - was
}

// headSince is since when we wait for the rest of a frame or of a header block; zero while there is none to wait for. The
// time does not run while dst keeps us from reading.
func (l *lane) headSince() time.Time {
	switch {
	case !l.idle() || !l.block.open && (l.in == nil || l.in.Len() == l.parsed):
		l.began = time.Time{}
	case l.began.IsZero():
		l.began = l.m.now()
	}
	return l.began
}

// step deals with the frame that b begins with, or the rest of one. It reports false when more bytes are needed. After an
// error of a stream the frame is dealt with.
func (l *lane) step(b []byte) (bool, error) {
	if l.rest.data+l.rest.behind > 0 {
		if len(b) == 0 {
			return false, nil
		}
		return true, l.continueFrame(b)
	}
	if len(b) < http2.HeaderLength {
		return false, l.checkBeginning(b)
	}
	h := http2.ParseHeader(b)
	if err := l.checkBeginning(b); err != nil {
		return false, err
	}
	if err := l.check(h); err != nil {
		return false, err
	}
	if !l.block.open && len(b) >= http2.HeaderLength+h.Length {
		l.began = time.Time{}
	}
	switch h.Type {
	case http2.Data:
		return l.data(h, b)
	case http2.Headers, http2.Continuation, http2.PriorityFrame, http2.ResetStream, http2.Settings, http2.Ping, http2.GoAway,
		http2.WindowUpdate:
		whole := http2.HeaderLength + h.Length
		if len(b) < whole {
			return false, nil
		}
		l.parsed += whole
		return true, l.frame(h, b[:whole])
	case http2.PushPromise: // it was forbidden, and no client may send it
		return false, http2.ConnectionError(http2.ProtocolError, "a push")
	}
	l.parsed += http2.HeaderLength // an extension, which is between neighbours (RFC 9113 §5.5)
	l.rest = rest{behind: h.Length}
	return true, l.idleFrame()
}

// checkBeginning judges upstream's first bytes. One that does not speak HTTP/2 answers with something else.
func (l *lane) checkBeginning(b []byte) error {
	if l.settled || l.fromDown() || http2.BeginsLikeServer(b) {
		return nil
	}
	return errNotHTTP2
}

// check judges a header where it stands.
func (l *lane) check(h http2.Header) error {
	if err := h.Check(l.frameLimit); err != nil {
		return err
	}
	switch {
	case !l.settled && (h.Type != http2.Settings || h.Has(http2.Ack)):
		return http2.ConnectionError(http2.ProtocolError, "the first frame is not SETTINGS")
	case l.block.open != (h.Type == http2.Continuation), l.block.open && h.Stream != l.block.stream:
		return http2.ConnectionError(http2.ProtocolError, "a header block is interrupted")
	case h.Type == http2.Headers || h.Type == http2.Continuation:
		if len(l.block.fragments)+h.Length > l.blockLimit() {
			return http2.ConnectionError(http2.EnhanceYourCalm, "header block too large")
		}
	case (h.Type == http2.Settings || h.Type == http2.GoAway) && h.Length > http2.MinFrameSize:
		return http2.ConnectionError(http2.EnhanceYourCalm, "frame too large")
	}
	return nil
}

// frame deals with a whole frame.
func (l *lane) frame(h http2.Header, b []byte) error {
	payload := b[http2.HeaderLength:]
	switch h.Type {
	case http2.Headers:
		return l.headers(h, payload)
	case http2.Continuation:
		return l.continuation(h, payload)
	case http2.Settings:
		return l.settings(h, payload)
	case http2.ResetStream:
		return l.resetStream(h, b)
	case http2.WindowUpdate:
		return l.windowUpdate(h, b)
	case http2.GoAway:
		return l.goAway(b)
	case http2.Ping:
		return l.ping(h, b)
	case http2.PriorityFrame: // obsolete, and between neighbours
		if http2.DependsOnItself(h.Stream, payload) {
			return http2.StreamError(h.Stream, http2.ProtocolError, "stream depends on itself")
		}
	}
	return l.idleFrame()
}

// insert puts frames of our own into the lane: scratch with them appended. What out points at notDraining where it is, even if
// scratch has moved. A server speaks of its settings first: until then the frames are held in scratch.
func (l *lane) insert(scratch []byte) {
	was := len(l.scratch)
	if cap(scratch) != cap(l.scratch) && was > 0 {
		l.outgrown = append(l.outgrown, l.scratch)
	}
	l.scratch = scratch
	if !l.holds() {
		l.out.Append(scratch[was:])
	}
}

// holds reports whether frames for downstream have to wait for upstream's settings.
func (l *lane) holds() bool { return !l.settled && !l.fromDown() }

// idleFrame counts a frame that carries nothing.
func (l *lane) idleFrame() error {
	if l.idleFrames.spend(l.m.now) {
		return nil
	}
	return http2.ConnectionError(http2.EnhanceYourCalm, "flood of frames that carry nothing")
}

// progress counts a frame that carries something, with so many bytes of data. What comes back because of it may be frames
// that carry nothing: credit, for each piece in which the data is consumed.
func (l *lane) progress(data int) {
	bonus := idleBonus + data/idleBonusBytes
	l.idleFrames.earn(bonus)
	l.other.idleFrames.earn(bonus)
}

// headers begins a header block.
func (l *lane) headers(h http2.Header, payload []byte) error {
	fragment, err := h.Fragment(payload)
	if fragment == nil && err != nil {
		return err
	}
	if h.Has(http2.EndHeaders) {
		return l.message(h.Stream, h.Has(http2.EndStream), fragment, err)
	}
	l.block.open, l.block.stream, l.block.end, l.block.err = true, h.Stream, h.Has(http2.EndStream), err
	l.block.fragments = append(l.block.fragments, fragment...)
	return nil
}

// continuation goes on with a header block.
func (l *lane) continuation(h http2.Header, fragment []byte) error {
	b := &l.block
	if b.continuations++; b.continuations > maxContinuations {
		return http2.ConnectionError(http2.EnhanceYourCalm, "too many CONTINUATION frames")
	}
	b.fragments = append(b.fragments, fragment...)
	if !h.Has(http2.EndHeaders) {
		return nil
	}
	whole := *b
	*b = block{}
	err := l.message(whole.stream, whole.end, whole.fragments, whole.err)
	if cap(whole.fragments) <= keptFragment {
		b.fragments = whole.fragments[:0]
	}
	return err
}

// message deals with a complete header block. Before it may be refused it is decoded, as the sender's table must be
// followed. broken is an error of its stream that was found before.
func (l *lane) message(stream uint32, end bool, encoded []byte, broken error) error {
	fields, whole, err := l.decoder.Decode(encoded)
	if err != nil {
		return err
	}
	if l.fromDown() {
		return l.m.fromDownstream(stream, end, fields, whole, broken)
	}
	if broken != nil {
		return broken
	}
	return l.m.fromUpstream(stream, end, fields, whole)
}

// ping passes a ping on, so that it measures the whole way.
func (l *lane) ping(h http2.Header, b []byte) error {
	if l.m.lost == nil {
		l.out.Append(b)
	} else if !h.Has(http2.Ack) {
		start := len(l.other.scratch)
		answer := append(l.other.scratch, b...)
		answer[start+4] |= byte(http2.Ack)
		l.other.insert(answer)
	}
	return l.idleFrame()
}

// windowUpdate passes credit on.
func (l *lane) windowUpdate(h http2.Header, b []byte) error {
	n := http2.Uint31(b[http2.HeaderLength:])
	if n == 0 {
		return http2.StreamError(h.Stream, http2.ProtocolError, "increment of zero")
	}
	if h.Stream != 0 {
		s, err := l.find(h.Stream)
		if err != nil {
			return err
		}
		if s == nil {
			return l.idleFrame() // it has crossed with the end of the stream
		}
	} else if l.fromDown() {
		l.m.window.connection += int64(n)
	}
	l.out.Append(b)
	return l.idleFrame()
}

// find returns the stream that a frame is for, nil when it is closed. A stream that was never opened is an error.
func (l *lane) find(id uint32) (*stream, error) {
	if s := l.m.streams.find(id); s != nil {
		return s, nil
	}
	if id > l.m.streams.last || id&1 == 0 {
		return nil, http2.ConnectionError(http2.ProtocolError, "frame for an idle stream")
	}
	return nil, nil
}

// release gives back what the lane holds.
func (l *lane) release() {
	l.out.Reset()
	l.in.Release()
	l.in = nil
}
