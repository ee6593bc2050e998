package httpforward

import (
	"slices"
	"sync"
	"time"

	"github.com/pillion-proxy/pillion/internal/balance"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/http2"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/relay"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

// call is one request of a hub, and its response.
type call struct {
	*stream // with downstream's number
	h       *hub

	waits balance.Queue // in which the call waits for a stream; may be nil

	leg  *leg   // that carries the request, or will; nil: not chosen yet, or the request is answered here
	upID uint32 // number on leg; 0: not open there

	sent requestHead // as it was received
	req  pipe
	resp pipe

	decision, previous Decision
	check              Check             // of the last decision that needed an answer; may be nil
	asking             bool              // check has no answer yet
	askedAt            time.Time         // when asking was set
	body               *Collected        // until the call is decided about; nil: its body was not needed
	collecting         uint32            // Decision.Collect, of a body that is not collected yet; zero: none
	policy             *mesh.RetryPolicy // nil: no retry is left, or allowed
	left               uint32            // retries
	place              retryPlace        // of those that were made
	resends            int               // after refusals of streams that were not processed

	resumeAt time.Time // the end of a delay or of a pause between two attempts; zero: the call is not paused
	headEnd  time.Time // the end of Settings.RequestTimeout
	moved    time.Time // when a part of a message came or was passed on last

	arriveEnd time.Time // until when the whole request must have arrived; zero: no limit
	replied   bool      // the response is made here
	closed    bool      // it has left the table
	referred  bool      // lists may still refer to it when it is closed
}

// callPool keeps the memory of calls for others.
var callPool = sync.Pool{New: func() any { return new(call) }}

// recycle gives the call back, after its record has closed. Calls that lists may refer to are left to the garbage collector.
func (c *call) recycle() {
	if c.referred {
		return
	}
	fields, up, down := c.sent.fields, c.req.queue, c.resp.queue
	clear(fields)
	if cap(fields) > keptFields {
		fields = nil
	}
	*c = call{}
	c.sent.fields, c.req.queue, c.resp.queue = fields[:0], up[:0], down[:0]
	callPool.Put(c)
}

// keptFields is how many fields a call or a connection keeps room for.
const keptFields = 64

// requestHead is the head of a request, for the attempts that follow the first.
type requestHead struct {
	http2.Request
	fields []http2.Field
	has    seen
	path   []byte // that replaces the received one; may be nil
}

// pipe carries the body and the trailers of one message.
type pipe struct {
	c  *call
	up bool // the message is the request

	queue []byte // received data: before from it is passed on, and kept for another attempt
	from  int
	keep  bool

	pace *relay.Pace // nil: the rate is not limited

	repeat int // bytes behind from that an earlier attempt has passed on: their credit is owed, or given back, already

	window int64 // what the receiver still takes on the stream
	credit int64 // what the sender may still send on the stream
	owed   int   // of it, to be given back

	trailers []http2.Field
	done     bool // the end is passed on
	blocked  *leg // the receiver in whose list the pipe is; nil: in none
}

const (
	keptWithoutPolicy = 16 << 10 // of a request, for another attempt after an upstream has refused its stream
	maxResends        = 3
)

func (p *pipe) body() *body {
	if p.up {
		return &p.c.request
	}
	return &p.c.response
}

// sender and receiver return the connections of a message; nil while there is no such connection.
func (p *pipe) sender() *leg {
	if p.up {
		return &p.c.h.down
	}
	return p.c.openLeg()
}

func (p *pipe) receiver() *leg {
	if p.up {
		return p.c.openLeg()
	}
	return &p.c.h.down
}

// number returns the number of the stream on a leg.
func (p *pipe) number(l *leg) uint32 {
	if l == &p.c.h.down {
		return p.c.id
	}
	return p.c.upID
}

// openLeg returns the leg on which the call is open, or nil.
func (c *call) openLeg() *leg {
	if c.upID == 0 {
		return nil
	}
	return c.leg
}

// to returns the message that is sent to l, and from the one that comes from it.
func (c *call) to(l *leg) *pipe {
	if l.isDown() {
		return &c.resp
	}
	return &c.req
}

func (c *call) from(l *leg) *pipe {
	if l.isDown() {
		return &c.req
	}
	return &c.resp
}

// offer passes data on, or keeps it until the receiver takes it.
func (h *hub) offer(p *pipe, data []byte) {
	p.c.moved = h.now()
	h.store(p, data)
	h.pass(p)
}

// store appends data to the queue.
func (h *hub) store(p *pipe, data []byte) {
	if n := len(p.queue) + len(data); n > cap(p.queue) && n > keptScratch {
		longer := append(tcp.TakeSlab(max(n, 2*cap(p.queue))), p.queue...)
		tcp.GiveSlab(p.queue)
		p.queue = longer
	}
	p.queue = append(p.queue, data...)
	h.buffered += len(data)
	if p.up {
		p.c.limitKept()
	}
}

// limitKept gives up other attempts of a request that is too long for them.
func (c *call) limitKept() {
	if c.req.keep && len(c.req.queue) > c.keepLimit() {
		c.req.keep = false
		c.policy = nil
	}
}

// keepLimit is how much of the request is kept for another attempt. Until its question is answered, a policy may follow.
func (c *call) keepLimit() int {
	if c.asking || c.collecting > 0 || c.policy != nil || len(c.decision.Mirrors) > 0 {
		return maxKept
	}
	return keptWithoutPolicy
}

// pass sends what the receiver takes.
func (h *hub) pass(p *pipe) {
	to := p.receiver()
	if to == nil || p.done || p.c.closed {
		return
	}
	id, body := p.number(to), p.body()
	for p.from < len(p.queue) {
		if to.full() || to.window <= 0 {
			to.wait(p)
			break
		}
		n := min(len(p.queue)-p.from, http2.MinFrameSize, int(min(to.window, p.window, http2.MinFrameSize)))
		if p.pace != nil {
			n = min(n, h.allowed(p))
		}
		if n <= 0 {
			break
		}
		last := body.ended && p.from+n == len(p.queue) && p.trailers == nil
		to.sendData(id, p.queue[p.from:p.from+n], last)
		p.c.moved = h.now()
		if p.pace != nil {
			p.pace.Spend(n)
		}
		to.window -= int64(n)
		p.window -= int64(n)
		p.from += n
		again := min(n, p.repeat)
		p.repeat -= again
		p.owed += n - again
		p.done = last
	}
	if body.ended && !p.done && p.from == len(p.queue) {
		switch {
		case p.trailers == nil:
			to.sendData(id, nil, true)
		case to.http1 != nil:
			to.sendTrailers(p.trailers)
		default:
			to.sendFields(id, true, p.trailers)
		}
		p.done = true
	}
	if !p.keep {
		h.drop(p)
	}
	h.giveBack(p)
	if p.done {
		h.passed(p)
	}
}

// allowed returns how many bytes the rate of a message allows. It is passed on again when more are.
func (h *hub) allowed(p *pipe) int {
	n := p.pace.Allowance(h.now())
	if n == 0 {
		h.watch(p.pace.Next())
	}
	return n
}

// sendData appends a DATA frame.
func (l *leg) sendData(id uint32, data []byte, end bool) {
	if l.http1 != nil {
		l.sendBody(data, end)
		return
	}
	frame := http2.Header{Length: len(data), Type: http2.Data, Stream: id}
	if end {
		frame.Flags = http2.EndStream
	}
	l.reserve(http2.HeaderLength + len(data))
	l.out = append(frame.Append(l.out), data...)
	l.idleFrames.earn(idleBonus + len(data)/idleBonusBytes) // a WINDOW_UPDATE for each piece that the peer consumes
}

// drop frees what was passed on.
func (h *hub) drop(p *pipe) {
	switch {
	case p.from == 0:
	case p.from == len(p.queue):
		h.freeQueue(p)
	case p.from > len(p.queue)/2:
		h.buffered -= p.from
		p.queue = p.queue[:copy(p.queue, p.queue[p.from:])]
		p.from = 0
	}
}

func (h *hub) freeQueue(p *pipe) {
	h.buffered -= len(p.queue)
	p.queue, p.from = p.queue[:0], 0
	if cap(p.queue) > keptScratch {
		tcp.GiveSlab(p.queue)
		p.queue = nil
	}
}

// giveBack returns the credit of the stream to the sender, in steps of half of the window.
func (h *hub) giveBack(p *pipe) {
	from := p.sender()
	switch {
	case from == nil:
		return
	case from.http1 != nil:
		from.pending = from.pending || from.in != nil // it has waited for room
		return
	case p.body().ended || p.owed < streamWindow/2:
		return
	}
	from.out = http2.AppendWindowUpdate(from.out, p.number(from), p.owed)
	p.credit += int64(p.owed)
	p.owed = 0
}

// passed notes that the end of a message is passed on.
func (h *hub) passed(p *pipe) {
	c := p.c
	if p.up {
		h.awaitHead(c)
		if len(c.decision.Mirrors) > 0 {
			h.mirrorCall(c)
		}
	}
	h.completed(c)
}

// completed closes a call once both its messages have ended.
func (h *hub) completed(c *call) {
	switch {
	case c.closed || !c.resp.done:
	case c.replied:
		if !c.request.ended {
			h.resetDownstream(c.id, http2.NoError) // stop the rest of the request (RFC 9113 §8.1)
		}
		h.finish(c, c.reason, c.err)
	case c.req.done:
		if !c.request.ended { // upstream has responded, and wants no more of it
			h.resetDownstream(c.id, http2.NoError)
		}
		h.resets.earn(1)
		h.finish(c, flow.Completed, nil)
	}
}

// finish closes a call. Its record closes when all frames queued for downstream are written.
func (h *hub) finish(c *call, reason flow.Reason, err error) {
	c.reason, c.err = reason, err
	c.stopAsking()
	h.detach(c)
	c.endLease(reason)
	c.place.leave()
	h.dropMirrors(c)
	h.streams.remove(c.stream)
	c.closed = true
	h.freeQueue(&c.req)
	h.freeQueue(&c.resp)
	l := &h.down
	l.ended = append(l.ended, endedStream{c.stream, l.written + uint64(len(l.out)-l.sent)})
}

// closeStream closes the record of a stream that has left the table.
func (h *hub) closeStream(s *stream, undelivered error) {
	h.kept -= s.counted
	s.close(h.engine.config.Flows, undelivered)
}

// detach takes a call off its leg. The caller resets the stream there if it is still open.
func (h *hub) detach(c *call) {
	l := c.leg
	if l == nil {
		return
	}
	c.leg = nil
	if c.upID == 0 {
		l.joined--
		if i := slices.Index(l.waiting, c); i >= 0 {
			l.waiting = slices.Delete(l.waiting, i, i+1)
		}
		c.stopWaiting()
		return
	}
	l.leave(c)
	c.upID = 0
	if l.http1 != nil {
		l.freeHTTP1(c)
	}
	if l.open == 0 {
		l.idleAt = h.now()
		h.watch(l.idleAt.Add(l.idleLife()))
	}
	if l.http1 == nil { // otherwise reap does, after the connection was read
		l.openWaiting()
	}
}

// keepCall counts what a call holds besides its queues.
func (h *hub) keepCall(c *call) {
	n := streamSize + c.names.size + c.body.held()
	for i := range c.sent.fields {
		n += fieldSize + len(c.sent.fields[i].Name) + len(c.sent.fields[i].Value)
	}
	h.kept += n - c.counted
	c.counted = n
}

// holdsTooMuch reports whether the streams of the connection have reached their limit.
func (h *hub) holdsTooMuch() bool { return h.kept+h.buffered > h.keptLimit }

// squeeze lets the record of s keep little more if the connection holds too much.
func (h *hub) squeeze(s *stream) {
	if h.holdsTooMuch() {
		s.names.limit = s.names.used + fewNames
	}
}
