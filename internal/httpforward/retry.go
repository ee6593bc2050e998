package httpforward

import (
	"math/rand/v2"
	"slices"
	"time"

	"github.com/pillion-proxy/pillion/internal/balance"
	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/route"
)

// The parts of retries that both engines share (Envoy's source/common/router/retry_state_impl.cc).

// maxKept is how much of a request is kept for a retry or a copy. Envoy's default limit of a request's buffer is the same.
const maxKept = 1 << 20

// retryPlace is the place of a request among those of its cluster that are sent again. The zero value is none.
type retryPlace struct{ at balance.Retrier }

// take reports whether the cluster of an attempt permits another one. The place is kept for those that follow.
func (p *retryPlace) take(l Lease) bool {
	limited, ok := l.(balance.Retrier)
	switch {
	case !ok || p.at != nil:
		return true
	case !limited.Retry():
		return false
	}
	p.at = limited
	return true
}

// leave gives the place back.
func (p *retryPlace) leave() {
	if p.at != nil {
		p.at.EndRetry()
		p.at = nil
	}
}

// failure is how an attempt failed before the head of a response.
type failure uint8

const (
	failedConnect failure = iota // no connection, or its TLS failed
	failedReset                  // the connection or the stream ended, or the response was malformed
	failedRefused                // the stream was refused before it was processed
	failedTimeout                // the time of one attempt has passed
)

// retriesFailure reports whether a policy retries after a failure. untouched is whether no byte of the request was sent.
func retriesFailure(p *mesh.RetryPolicy, f failure, untouched bool) bool {
	on := p.On
	switch {
	case on&(mesh.Retry5xx|mesh.RetryGatewayError|mesh.RetryReset) != 0:
		return true
	case f == failedConnect:
		return on&(mesh.RetryConnectFailure|mesh.RetryResetBeforeRequest) != 0
	case f == failedRefused:
		return on&mesh.RetryRefusedStream != 0
	case f == failedReset && untouched:
		return on&mesh.RetryResetBeforeRequest != 0
	}
	return false
}

// retriesResponse reports whether a policy retries after a response with this status and these fields. Overload is never
// retried, and neither is a limited rate unless the policy names it.
func retriesResponse(p *mesh.RetryPolicy, status int, fields HeaderFields) bool {
	named := retriesOutcome(p, status, fields)
	switch {
	case !named && p.On&mesh.RetryRateLimited == 0, lookup(fields, overloadedField) != nil:
		return false
	case lookup(fields, rateLimitedField) != nil:
		return p.On&mesh.RetryRateLimited != 0
	}
	return named
}

// retriesOutcome reports whether a policy names this status or these fields, which most responses decide without their fields.
func retriesOutcome(p *mesh.RetryPolicy, status int, fields HeaderFields) bool {
	on := p.On
	switch {
	case on&mesh.RetryHeaders != 0 && route.RetriesFields(p, fields):
		return true
	case on&mesh.Retry5xx != 0 && status/100 == 5,
		on&mesh.RetryGatewayError != 0 && status >= 502 && status <= 504,
		on&mesh.Retry4xx != 0 && status == 409,
		on&mesh.RetryStatusCodes != 0 && slices.Contains(p.Codes, uint32(status)):
		return true
	}
	if on&mesh.RetryOfGRPC == 0 {
		return false
	}
	code := grpcStatusOf(fields)
	return code >= 0 && on&retryCodes[code] != 0
}

// Names of fields that forbid retries.
const (
	overloadedField  = "x-envoy-overloaded"
	rateLimitedField = "x-envoy-ratelimited"
	grpcStatusField  = "grpc-status"
)

// retryCodes has the conditions by the codes of gRPC.
var retryCodes = [envoy.GRPCCodes]mesh.RetryConditions{
	envoy.GRPCCanceled:          mesh.RetryCancelled,
	envoy.GRPCDeadlineExceeded:  mesh.RetryDeadlineExceeded,
	envoy.GRPCInternal:          mesh.RetryInternal,
	envoy.GRPCResourceExhausted: mesh.RetryResourceExhausted,
	envoy.GRPCUnavailable:       mesh.RetryUnavailable,
}

// grpcStatusOf returns the value of grpc-status in the head of a response, -1 without one.
func grpcStatusOf(fields HeaderFields) int {
	if value := lookup(fields, grpcStatusField); value != nil {
		if code, ok := envoy.ParseGRPCCode(value); ok {
			return int(code)
		}
	}
	return -1
}

// lookup returns the value of the first field with a name in lower case, or nil.
func lookup(fields HeaderFields, lower string) []byte {
	for i := range fields.Len() {
		if name, value := fields.At(i); sameName(name, lower) {
			return value
		}
	}
	return nil
}

// backOff returns how long to wait before the n-th retry, from 1: a random part of base·(2ⁿ-1) or of
// the policy's bound, if that is less.
func backOff(p *mesh.RetryPolicy, n int) time.Duration {
	limit := p.MaxBackOff
	if n < 32 && p.BackOff <= limit>>n {
		limit = min(limit, p.BackOff*(1<<n-1))
	}
	if limit <= 0 {
		return 0
	}
	return rand.N(limit)
}

// limits are the times that a route allows a request. Zero does not limit.
type limits struct {
	total  time.Duration // from the end of the request to the end of the response
	try    time.Duration // of one attempt, from the end of the request to the head of the response
	stream time.Duration // of the whole
	idle   time.Duration // without a byte
	own    bool          // idle takes the place of Settings.IdleTimeout
}

// limitsOf returns the limits that a plan has for a request.
func limitsOf(p *route.Plan, r *route.Request) (l limits) {
	l.total, l.try, l.stream = p.Timeouts(r)
	if p.Idle != nil {
		l.idle, l.own = *p.Idle, true
	}
	return l
}

// any reports whether there is a limit that is watched while the request is carried.
func (l *limits) any() bool { return l.total > 0 || l.try > 0 || l.stream > 0 }

// expected returns the value of expectedTimeoutField, zero without a limit: the time that the next hop has at most.
func (l *limits) expected() time.Duration {
	if l.try > 0 {
		return l.try
	}
	return l.total
}
