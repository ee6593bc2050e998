package httpforward

import (
	"math"
	"time"

	"github.com/pillion-proxy/pillion/internal/relay"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

// pace limits the rate of a message. Its head is not counted, as in Envoy.
type pace struct {
	relay.Pace
	free int       // bytes to be written first that are not counted
	next time.Time // when the rate allows more; zero: it does not hold the message back
}

// newPace returns the limit for a rate in bytes for each second, nil for zero.
func newPace(rate uint64) *pace {
	if rate == 0 {
		return nil
	}
	return &pace{Pace: *relay.NewPace(rate), free: math.MaxInt}
}

// write writes as much of out as the rate allows and dst takes. If that is nothing without an error, the rate allows nothing
// before next.
func (p *pace) write(dst *tcp.Conn, out *tcp.Vector) (int, error) {
	most := p.free
	if most == 0 {
		most = p.Allowance(time.Now())
	}
	if most == 0 {
		p.next = p.Next()
		return 0, nil
	}
	n, err := dst.WriteAtMost(out, most)
	if p.free > 0 {
		p.free -= n
	} else {
		p.Spend(n)
	}
	return n, err
}

// relay returns the limit of a message for the tunnel that follows it.
func (p *pace) relay() *relay.Pace {
	if p == nil {
		return nil
	}
	return &p.Pace
}

// takeRates limits the rates of the request and its response.
//
//go:noinline
func (x *exchange) takeRates() {
	x.request.pace, x.response.pace = newPace(x.decision.RequestRate), newPace(x.decision.ResponseRate)
	x.limited = true
}

// paced returns the time at which a message that its rate holds back goes on, or at if that is sooner. A zero time does not limit.
func (x *exchange) paced(at time.Time) time.Time {
	for _, p := range [...]*pace{x.request.pace, x.response.pace} {
		if p != nil && !p.next.IsZero() && (at.IsZero() || p.next.Before(at)) {
			at = p.next
		}
	}
	return at
}
