package httpforward

import (
	"errors"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/tcp"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// Retries by the policy of a route. The safe resend (see mayRepeat) comes before them: the policy does not count it.

// errRetry is the error of a response that is not forwarded, because the policy retries its request.
var errRetry = errors.New("the response is retried")

// failed goes on after an attempt that got no response: with the next attempt, or with the reply.
func (x *exchange) failed(f failure, r reply, err error) (ending, bool) {
	if x.policy != nil && x.mayRetry(f) {
		return x.attemptAgain(r.reason)
	}
	return x.refuse(x.retried(r), err), true
}

// retried returns a reply for the last of several attempts, in Envoy's words.
func (x *exchange) retried(r reply) reply {
	if x.retries > 0 {
		r.body = strings.Replace(r.body, "headers. reset reason", "headers. retried and the latest reset reason", 1)
	}
	return r
}

// mayRetry reports whether the policy retries after a failure.
//
//go:noinline
func (x *exchange) mayRetry(f failure) bool {
	untouched := x.request.dst == nil || x.request.untouched()
	if !x.repeatable() || !retriesFailure(x.policy, f, untouched) {
		return false
	}
	return x.permitsRetry()
}

// permitsRetry reports whether an attempt is left, and a place for it. The record has what is not.
func (x *exchange) permitsRetry() bool {
	x.http.Exhausted = x.left == 0
	if x.left == 0 {
		return false
	}
	x.http.Overflowed = !x.place.take(x.decision.Lease)
	return !x.http.Overflowed
}

// repeatable reports whether the request can be sent again: all of it is kept, and downstream got no byte of a response.
func (x *exchange) repeatable() bool {
	return x.request.retain && !x.s.bound && !x.answered && x.interims == 0 && !x.s.w.Canceled()
}

// retriesResponse reports whether the policy retries after the response whose head has arrived. Otherwise that is the last
// attempt.
//
//go:noinline
func (x *exchange) retriesResponse() bool {
	x.answer = headFields{&x.responseHead, x.response.in.Bytes()}
	if x.repeatable() && retriesResponse(x.policy, x.responseHead.Status, &x.answer) && x.permitsRetry() {
		return true
	}
	x.policy = nil
	x.place.leave()
	return false
}

// noteResponse keeps the parts of a response that the lease of the attempt ends with.
//
//go:noinline
func (x *exchange) noteResponse(b []byte) {
	x.status = x.responseHead.Status
	x.answer = headFields{&x.responseHead, b}
	x.grpc = grpcStatusOf(&x.answer)
}

// attemptAgain makes further attempts until one has a connection, or the policy allows no more.
//
//go:noinline
func (x *exchange) attemptAgain(reason flow.Reason) (ending, bool) {
	for {
		if end, over := x.nextAttempt(reason); over {
			return end, true
		}
		attempts, err := x.s.connect(x.wanted, x.settings, time.Now(), x.dialLimit(), idempotent(x.http.Method))
		x.countDials(attempts)
		if err == nil {
			x.request.resend(x.s.up)
			x.send()
			if x.request.taken() { // otherwise it starts with the end of the request
				x.startTry(time.Now())
			}
			x.redialled = true
			return 0, false
		}
		if errors.Is(err, tcp.ErrCanceled) || errors.Is(err, tcp.ErrInterrupted) {
			return x.noUpstream(err)
		}
		r := dialReply(err, false)
		x.record.Upstream, x.record.TransportFailure = x.wanted.Address, upstream.TransportFailure(err)
		if end, over := x.dialOverdue(err); over {
			return end, true
		}
		if !x.mayRetry(failedConnect) {
			return x.refuse(x.retried(r), err), true
		}
		reason = r.reason
	}
}

// nextAttempt ends an attempt, and decides where the next one goes, after the pause that the policy asks for.
func (x *exchange) nextAttempt(reason flow.Reason) (ending, bool) {
	s := x.s
	x.endLease(reason)
	s.dropUpstream()
	x.forgetAttempt()
	x.left--
	x.retries++
	if end, over := x.pause(backOff(x.policy, x.retries), false); over {
		return end, true
	}
	s.engine.config.Pool.Stats.Retried.Add(1)
	x.began = time.Now()
	x.previous = x.decision
	if x.view(x.kept); len(x.kept) > x.requestHead.Length {
		x.routed.Path = x.kept[x.requestHead.Length:]
	}
	x.routed.Attempt, x.routed.Previous, x.routed.Check = x.retries, &x.previous, x.check
	x.decision = s.route(&x.routed)
	endMirrors(x.decision.Mirrors, flow.Overload)                                                   // the first attempt's are sent
	x.decision.Plan, x.decision.Mirrors, x.decision.Path = x.previous.Plan, x.previous.Mirrors, nil // the head is made
	x.decision.Forbidden = x.previous.Forbidden
	switch {
	case x.decision.waits(): // the policies have changed
		if x.decision.Check != nil {
			x.decision.Check.Cancel()
		}
		return x.refuse(replyUnchecked, errUnchecked), true
	case x.decision.Reply != nil:
		return x.replyHere(x.decision.Reply), true
	case x.decision.noRoute():
		return x.refuse(replyNoRoute, errNoRoute), true
	}
	x.wanted = &x.decision.Target
	x.wanted.HTTP2 = x.decision.Translate
	s.turnTo(x.wanted)
	x.countAttempt()
	return 0, false
}

// countDials counts attempts in the record.
func (x *exchange) countDials(n int) {
	x.record.Attempts = uint8(min(int(x.record.Attempts)+n, math.MaxUint8))
}

// forgetAttempt removes what an attempt has left of its connection and of its response.
func (x *exchange) forgetAttempt() {
	m := &x.response
	m.in.Release()
	m.in, m.src, m.srcErr, m.bad = nil, nil, nil, nil
	m.out.Reset()
	m.head = m.head[:0]
	x.responseHead.Reset()
	x.request.out.Reset()
	x.request.dst, x.request.dstErr = nil, nil
	x.repeated, x.status, x.grpc = false, 0, -1
	x.tryEnd = time.Time{}
}

// countAttempt writes the number of the attempt into the request head, where it is the last field.
func (x *exchange) countAttempt() {
	if x.attemptAt > 0 {
		head := strconv.AppendInt(x.request.head[:x.attemptAt], int64(x.retries+1), 10)
		x.request.head = append(head, "\r\n\r\n"...)
	}
}

// endLease ends the place of the attempt at its endpoint.
func (x *exchange) endLease(reason flow.Reason) {
	lease := x.decision.Lease
	if lease == nil {
		return
	}
	x.decision.Lease = nil
	began := x.began
	if began.IsZero() {
		began = x.record.Opened
	}
	outcome := Outcome{Status: x.status, GRPC: -1, Reason: reason, Connected: x.request.dst != nil, Duration: time.Since(began)}
	if x.status != 0 {
		outcome.GRPC = x.grpc
	}
	lease.End(outcome)
}
