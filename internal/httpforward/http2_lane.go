package httpforward

import (
	"time"

	"github.com/pillion-proxy/pillion/internal/http2"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

const (
	maxCredit    = 16 << 10  // bytes of our WINDOW_UPDATEs that may queue for a peer before we stop reading from it
	maxOut       = 256 << 10 // output size at which parsing stops until it is written
	keptScratch  = 4 << 10   // scratch memory that an idle connection keeps
	keptFragment = 16 << 10
)

// A turn of a lane is over after it has read laneTurn bytes, or less if they were expensive: some 0.1 ms. A frame that arrives
// is counted with the time that it takes, as bytes that could be copied in it: a peer can send 1,800 frames, or header
// blocks of 3 MB that refer to table entries, in one buffer.
const (
	laneTurn  = 256 << 10
	frameCost = 256 // of each frame
	blockCost = 8 << 10
	fieldCost = 256 // of each field in a block, besides its length
)

// lane forwards the frames of one direction. It reads, handles the frames that arrived, and does not read again until
// all resulting output is written. So it holds at most one buffer and the output produced from it; everything else
// stays in the sender's kernel.
type lane struct {
	m        *multiplex
	other    *lane // the opposite direction
	src, dst *tcp.Conn

	laneInput
	laneOutput
	frameState
	laneTables

	idleFrames     bucket
	srcErr, dstErr error // io.EOF from src is an orderly close
}

// laneInput is the input of a lane.
type laneInput struct {
	in      *tcp.Buffer // nil if no read bytes are unhandled
	large   bool        // in is a large buffer
	parsed  int         // handled bytes of in; out may point at them
	bulk    bool        // the last read left bytes in the socket
	left    int         // of the turn: see laneTurn
	pending bool        // in has unhandled frames, because out is full or the turn is over
}

// laneOutput is the output of a lane.
type laneOutput struct {
	out      tcp.Vector // whole frames, pieces of in and of scratch
	scratch  []byte     // frames and headers generated here
	outgrown [][]byte   // earlier arrays of scratch, before it grew; out may point at them
	ended    []*stream  // streams whose records close when out is written
	credit   int        // bytes of out that are WINDOW_UPDATEs of our own
	written  uint64     // bytes that dst accepted
}

// frameState is the position of a lane in its frames.
type frameState struct {
	settingsSent bool      // src's first SETTINGS frame was forwarded, or sent in its place
	frameLimit   int       // the largest frame size that dst has announced
	rest         rest      // rest of a frame whose beginning was handled
	block        block     // an incomplete header block
	began        time.Time // see headSince
	owed         int       // connection-level credit to return to src, for data that is not forwarded
}

// laneTables are the HPACK tables of a lane.
type laneTables struct {
	decoder *http2.Decoder // of src's header blocks
	encoder *http2.Encoder // of header blocks for dst
	unacked []tableSize    // of src's SETTINGS frames that dst has not acknowledged

	tableHeld int // memory of a header table larger than the initial one
}

// rest is the part of a frame that has not arrived.
type rest struct {
	data   int    // bytes of data
	behind int    // bytes to discard after them
	stream uint32 // the stream of the data
	end    bool   // the last byte of data ends the stream
}

// block collects a header block that spans several frames.
type block struct {
	open          bool
	stream        uint32
	end           bool // the block ends the stream
	fragments     []byte
	continuations int
	err           error // a stream error found in the first frame
}

// add appends a fragment. Long blocks are collected in slabs: the garbage of growing slices would be several times the size
// of the blocks, which peers choose.
func (b *block) add(fragment []byte) {
	if n := len(b.fragments) + len(fragment); n > keptFragment && n > cap(b.fragments) {
		longer := append(tcp.TakeSlab(n), b.fragments...)
		tcp.GiveSlab(b.fragments)
		b.fragments = longer
	}
	b.fragments = append(b.fragments, fragment...)
}

// free empties the block. Only the memory of a short one is kept.
func (b *block) free() {
	fragments := b.fragments[:0]
	if cap(fragments) > keptFragment {
		tcp.GiveSlab(fragments)
		fragments = nil
	}
	*b = block{fragments: fragments}
}

// messages takes complete header blocks. broken is a stream error that the first frame has.
type messages interface {
	message(stream uint32, end bool, encoded []byte, broken error) error
}

// headers begins a block with a HEADERS frame. A complete one is not copied.
func (b *block) headers(h http2.Header, payload []byte, to messages) error {
	fragment, err := h.Fragment(payload)
	if fragment == nil && err != nil {
		return err
	}
	if h.Has(http2.EndHeaders) {
		return to.message(h.Stream, h.Has(http2.EndStream), fragment, err)
	}
	b.open, b.stream, b.end, b.err = true, h.Stream, h.Has(http2.EndStream), err
	b.add(fragment)
	return nil
}

// continuation adds a CONTINUATION frame. The block is closed before its message is handled.
func (b *block) continuation(h http2.Header, fragment []byte, to messages) error {
	if b.continuations++; b.continuations > maxContinuations {
		return errManyContinuations
	}
	b.add(fragment)
	if !h.Has(http2.EndHeaders) {
		return nil
	}
	whole := *b
	*b = block{}
	err := to.message(whole.stream, whole.end, whole.fragments, whole.err)
	whole.free()
	b.fragments = whole.fragments
	return err
}

// blockTurn is what a decoded block takes of a turn.
func blockTurn(fields []http2.Field) int {
	n := blockCost
	for i := range fields {
		n += fieldCost + len(fields[i].Value)
	}
	return n
}

func (l *lane) init(m *multiplex, other *lane) {
	l.m, l.other, l.left = m, other, laneTurn
	l.frameLimit = http2.MinFrameSize
	l.decoder = http2.NewDecoder(l.limits().MaxHeadBytes, l.limits().MaxHeadFields)
	l.encoder = http2.NewEncoder()
	l.idleFrames = newIdleBucket(m.requests)
}

// fromDown reports whether the lane carries frames from downstream to upstream.
func (l *lane) fromDown() bool { return l == &l.m.toUp }

// limits returns the settings with the limits of what the lane carries.
func (l *lane) limits() *Settings {
	if l.fromDown() {
		return l.m.settings
	}
	return l.m.settings.ofServers()
}

// idle reports whether all output is written.
func (l *lane) idle() bool { return l.out.Len() == 0 }

// turnOver reports whether the lane may do no more before the goroutine yields.
func (l *lane) turnOver() bool { return l.left <= 0 }

// pump forwards frames until src has no more, dst accepts no more, or the turn is over. It reports whether any bytes
// moved.
func (l *lane) pump() (moved bool) {
	for !l.turnOver() {
		waits := l.out.Len()
		done := l.flush()
		moved = moved || l.out.Len() < waits
		if l.fromDown() && !l.m.proceed() {
			return moved
		}
		if done && l.pending {
			moved = true
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
		l.left -= n
		l.parse()
	}
	return true
}

// flush writes out, and reports whether all of it is written. Output for a peer that is gone is dropped.
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
	l.closeEnded()
	return true
}

// closeEnded closes the records of streams whose last frame is written.
func (l *lane) closeEnded() {
	for i, s := range l.ended {
		l.m.closeStream(s, l.dstErr)
		l.ended[i] = nil
	}
	if l.ended = l.ended[:0]; cap(l.ended) > keptEntries {
		l.ended = nil
	}
}

// mayRead reports whether to try a read. Stop reading from a peer that does not drain the WINDOW_UPDATEs we owe it.
// Other queued output is not a reason: the peer may be waiting for us to read first. If writing to upstream failed,
// upstream may have sent the cause, so it is read. Once upstream has ended, downstream is not read any more: a request
// that we have not read can safely be sent again on another connection.
func (l *lane) mayRead() bool {
	if l.fromDown() && l.other.srcErr != nil {
		return false
	}
	return l.src != nil && l.srcErr == nil && l.other.credit < maxCredit && l.m.over == running &&
		(l.src.Readable() || l.other.dstErr != nil)
}

// read reads once, after the incomplete frame that the buffer may hold.
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

// makeRoom provides a buffer, a large one while a peer sends much.
func (l *lane) makeRoom() {
	switch {
	case l.in == nil && (!l.bulk || l.m.engine.config.Budget.Tight()):
		l.in, l.large = tcp.TakeBuffer(), false
	case l.in == nil:
		l.in, l.large = tcp.TakeLargeBuffer(), true
	case l.bulk && !l.large && !l.m.engine.config.Budget.Tight():
		beginning := l.in
		l.in, l.large = tcp.TakeLargeBuffer(), true
		l.in.Append(beginning.Bytes())
		beginning.Release()
	}
}

// needs returns the size of the largest frame that must fit the buffer as a whole.
func (l *lane) needs() int { return http2.HeaderLength + max(http2.MinFrameSize, l.blockLimit()) }

// blockLimit limits an encoded header block, with padding and priority.
func (l *lane) blockLimit() int { return l.limits().MaxHeadBytes + 262 }

// parse handles the frames in the buffer. A header block may grow when it is re-encoded, most of all a reference to a
// large table entry: parse stops when out is full, or the turn is over, and sets pending.
func (l *lane) parse() {
	l.pending = false
	for l.in != nil && l.m.over == running {
		if l.out.Len() > maxOut || l.turnOver() || l.fromDown() && l.m.suspended != nil {
			l.pending = true
			break
		}
		l.left -= frameCost
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

// giveBack sends src credit for data that is not forwarded: for a stream, or with zero for the connection.
func (l *lane) giveBack(stream uint32, n int) {
	was := len(l.other.scratch)
	l.other.insert(http2.AppendWindowUpdate(l.other.scratch, stream, n))
	l.other.credit += len(l.other.scratch) - was
}

// headSince returns since when the rest of a frame or of a header block is missing; zero if no part is missing. Time
// during which dst keeps us from reading does not count.
func (l *lane) headSince() time.Time {
	switch {
	case !l.idle() || l.m.suspended != nil || !l.block.open && (l.in == nil || l.in.Len() == l.parsed):
		l.began = time.Time{}
	case l.began.IsZero():
		l.began = l.m.now()
	}
	return l.began
}

// step handles the frame at the beginning of b, or the rest of one. It reports false if more bytes are needed. After a
// stream error the frame counts as handled.
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
	case http2.PushPromise: // disabled by our SETTINGS, and never allowed from a client
		return false, http2.ConnectionError(http2.ProtocolError, "a push")
	}
	l.parsed += http2.HeaderLength // an extension is hop-by-hop (RFC 9113 §5.5)
	l.rest = rest{behind: h.Length}
	return true, l.idleFrame()
}

// checkBeginning checks upstream's first bytes. A server that does not speak HTTP/2 sends something else than SETTINGS.
func (l *lane) checkBeginning(b []byte) error {
	if l.settingsSent || l.fromDown() || http2.BeginsLikeServer(b) {
		return nil
	}
	return errNotHTTP2
}

// check validates a frame header in the current state.
func (l *lane) check(h http2.Header) error {
	if err := h.Check(l.frameLimit); err != nil {
		return err
	}
	switch {
	case !l.settingsSent && (h.Type != http2.Settings || h.Has(http2.Ack)):
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

// frame handles a complete frame.
func (l *lane) frame(h http2.Header, b []byte) error {
	payload := b[http2.HeaderLength:]
	switch h.Type {
	case http2.Headers:
		return l.block.headers(h, payload, l)
	case http2.Continuation:
		return l.block.continuation(h, payload, l)
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
	case http2.PriorityFrame: // obsolete, and hop-by-hop
		if http2.DependsOnItself(h.Stream, payload) {
			return http2.StreamError(h.Stream, http2.ProtocolError, "stream depends on itself")
		}
	}
	return l.idleFrame()
}

// insert queues frames of our own: the argument is scratch with the frames appended. Bytes that out points at stay in
// place, even if scratch has moved. A server's SETTINGS come first: until they are sent, the frames are held in
// scratch.
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

// holds reports whether frames for downstream must wait for upstream's SETTINGS.
func (l *lane) holds() bool { return !l.settingsSent && !l.fromDown() }

// idleFrame counts a frame without effect.
func (l *lane) idleFrame() error {
	if l.idleFrames.spend(l.m.now) {
		return nil
	}
	return errManyIdle
}

// progress counts a frame with effect and the length of its data. The peer may respond with frames without effect: a
// WINDOW_UPDATE for each piece of data that it consumes.
func (l *lane) progress(data int) {
	bonus := idleBonus + data/idleBonusBytes
	l.idleFrames.earn(bonus)
	l.other.idleFrames.earn(bonus)
}

// message handles a complete header block. Even a rejected block is decoded first, to keep the HPACK table in step with
// the sender's. broken is a stream error found earlier.
func (l *lane) message(stream uint32, end bool, encoded []byte, broken error) error {
	defer l.decoder.Forget()
	fields, whole, err := l.decoder.Decode(encoded)
	if err != nil {
		return err
	}
	l.left -= blockTurn(fields)
	if l.fromDown() {
		return l.m.fromDownstream(stream, end, fields, whole, broken)
	}
	if broken != nil {
		return broken
	}
	return l.m.fromUpstream(stream, end, fields, whole)
}

// ping forwards a ping, so that it measures the round trip to the far end.
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

// windowUpdate forwards credit.
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
			return l.idleFrame() // crossed with the end of the stream
		}
	} else if l.fromDown() {
		l.m.window.connection += int64(n)
	}
	l.out.Append(b)
	return l.idleFrame()
}

// find returns the stream of a frame, nil if the stream is closed. A stream that was never opened is an error.
func (l *lane) find(id uint32) (*stream, error) {
	if s := l.m.streams.find(id); s != nil {
		return s, nil
	}
	if id > l.m.streams.last || id&1 == 0 {
		return nil, http2.ConnectionError(http2.ProtocolError, "frame for an idle stream")
	}
	return nil, nil
}

// release releases the buffers.
func (l *lane) release() {
	l.out.Reset()
	l.in.Release()
	l.in = nil
	l.block.free()
}
