package httpforward

import (
	"github.com/pillion-proxy/pillion/internal/budget"
	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/http1"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

// The memory of an exchange. Before a wait it is reported to the process's budget, except for small pieces. An exchange
// that waits for a response, or for more of a body that was forwarded so far, holds no buffer.

// smallPiece is the size up to which a piece of memory is not reported, and kept for the next request.
const smallPiece = 4 << 10

// fieldSize is the size of an http1.Field.
const fieldSize = 28

// replyOverloaded is Envoy's reply when its overload manager has no memory for a request.
var replyOverloaded = reply{503, "envoy overloaded", flow.MemoryBudget, envoy.FlagOverloadManager, envoy.DetailsOverload}

// piece returns the part of a piece of memory of n bytes that is reported.
func piece(n int) int {
	if n <= smallPiece {
		return 0
	}
	return n
}

// buffered returns the part of a buffer that is reported.
func buffered(b *tcp.Buffer) int {
	if b == nil {
		return 0
	}
	return piece(b.Cap())
}

// holdHead reports what a request takes that is not decided about. It returns false if the exchange must end.
func (x *exchange) holdHead() bool {
	x.s.Read.Shrink()
	return x.held.Hold(piece(x.s.Read.Cap()) + piece(cap(x.requestHead.Fields)*fieldSize) + x.body.held())
}

// hold reports what the exchange takes. It returns false if the exchange must end.
func (x *exchange) hold() bool {
	if x.request.shed(); x.started && len(x.kept) == 0 {
		shedFields(&x.requestHead)
	}
	x.response.shed()
	n := piece(cap(x.request.head)) + piece(cap(x.response.head)) + piece(x.names.size) + piece(cap(x.request.nominated)) +
		piece(cap(x.request.kept)) + piece(cap(x.kept)) +
		piece(cap(x.response.nominated)) + piece(cap(x.requestHead.Fields)*fieldSize) + piece(cap(x.responseHead.Fields)*fieldSize) +
		buffered(x.s.Read) + buffered(x.response.in)
	return x.held.Hold(n)
}

// holdDial is hold before a dial. A request without a body is in its rewritten head, and needs no buffer.
func (x *exchange) holdDial() bool {
	if x.request.body.Done() && x.request.held() == 0 {
		x.s.releaseRead()
		x.request.in = nil
	}
	return x.hold()
}

// evicted ends an exchange because the process has no memory for it.
func (x *exchange) evicted() ending {
	x.s.evicted = true
	if x.answered {
		return x.close(flow.MemoryBudget, budget.ErrEvicted, cut)
	}
	s := x.s
	s.w.Continue()
	x.request.out.Reset()
	x.request.freeKept()
	x.request.ready = 0
	x.request.head = x.request.head[:0]
	x.request.shed()
	x.request.in, x.body = nil, nil
	if s.Read != nil {
		s.releaseRead()
	}
	if x.response.in != nil {
		x.response.in.Release()
		x.response.in = nil
	}
	x.held.Hold(0)
	return x.refuse(replyOverloaded, budget.ErrEvicted)
}

// shed frees the pieces of memory that are too large to keep for the next request. Both messages have been released.
func (x *exchange) shed() {
	x.request.shed()
	x.response.shed()
	shedFields(&x.requestHead)
	shedFields(&x.responseHead)
}

// reserve returns the empty memory of the head, with room for n bytes if they are many.
func (m *message) reserve(n int) []byte {
	if n > smallPiece && cap(m.head) < n {
		return tcp.TakeSlab(n)
	}
	return m.head[:0]
}

// shed frees the memory of a large head that was sent.
func (m *message) shed() {
	if len(m.head) == 0 && cap(m.head) > smallPiece {
		tcp.GiveSlab(m.head)
		m.head = nil
	}
}

// shedFields frees the memory of many fields. They are not used any more.
func shedFields(h *http1.Head) {
	if cap(h.Fields)*fieldSize > smallPiece {
		h.Fields = nil
	}
}

// view shows the request to the router: the whole values, of which the record may have kept parts.
func (x *exchange) view(b []byte) *Request {
	h, r := &x.requestHead, &x.routed
	r.view(&x.record)
	r.Method, r.Path = h.Method.In(b), h.Target.In(b)
	r.Authority = h.Authority(b)
	x.fields = headFields{h, b}
	r.Fields = &x.fields
	r.Upgrade = upgradeOf(h, b)
	if r.Path[0] != '/' {
		x.absolute = r.absolute()
	}
	return r
}
