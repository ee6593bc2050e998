package route

import (
	"math"
	"strconv"
	"time"
)

// Timeouts returns the limits of a request: from its end to the end of the response, of each try, and of the whole stream. 0
// means unlimited. They follow from the plan and the request's fields grpc-timeout, x-envoy-upstream-rq-timeout-ms and
// x-envoy-upstream-rq-per-try-timeout-ms. A limit of a try that is not below that of the request is not used.
func (p *Plan) Timeouts(r *Request) (total, try, stream time.Duration) {
	total = p.Timeout
	if p.Retry != nil {
		try = p.Retry.TryTimeout
	}
	if p.MaxStream != nil {
		stream = *p.MaxStream
	}
	if r.GRPC && (p.GRPCTimeout != nil || p.GRPCStream != nil) {
		total, stream = p.grpcTimeouts(r, total, stream)
	}
	if limit, ok := milliseconds(r, timeoutField); ok {
		total = limit
	}
	if limit, ok := milliseconds(r, tryTimeoutField); ok {
		try = limit
	}
	if total > 0 && try >= total {
		try = 0
	}
	return total, try, stream
}

func (p *Plan) grpcTimeouts(r *Request, total, stream time.Duration) (time.Duration, time.Duration) {
	value, _ := lookup(r.Fields, "grpc-timeout")
	limit, ok := parseGRPCTimeout(value)
	if p.GRPCTimeout != nil {
		total = bounded(limit, *p.GRPCTimeout)
	}
	if p.GRPCStream != nil && ok {
		stream = bounded(limit, *p.GRPCStream)
	}
	return total, stream
}

// bounded returns the smaller of two limits. 0 means unlimited.
func bounded(limit, bound time.Duration) time.Duration {
	if bound != 0 && (limit == 0 || limit > bound) {
		return bound
	}
	return limit
}

func milliseconds(r *Request, field string) (time.Duration, bool) {
	value, n := lookup(r.Fields, field)
	if n == 0 {
		return 0, false
	}
	number, err := strconv.ParseUint(string(value), 10, 32)
	return time.Duration(number) * time.Millisecond, err == nil
}

// grpcUnits are the units of grpc-timeout (grpc/doc/PROTOCOL-HTTP2.md).
var grpcUnits = [...]struct {
	name byte
	unit time.Duration
}{{'H', time.Hour}, {'M', time.Minute}, {'S', time.Second}, {'m', time.Millisecond}, {'u', time.Microsecond}, {'n', time.Nanosecond}}

// maxGRPCDigits bounds the number in grpc-timeout.
const maxGRPCDigits = 8

// parseGRPCTimeout returns the value of grpc-timeout. A timeout of less than a millisecond is one.
func parseGRPCTimeout(value []byte) (time.Duration, bool) {
	if len(value) < 2 || len(value) > maxGRPCDigits+1 {
		return 0, false
	}
	number := time.Duration(0)
	for _, c := range value[:len(value)-1] {
		if c < '0' || c > '9' {
			return 0, false
		}
		number = number*10 + time.Duration(c-'0')
	}
	for _, u := range grpcUnits {
		if u.name == value[len(value)-1] {
			limit := min(number, math.MaxInt64/u.unit) * u.unit
			if number > 0 {
				limit = max(limit, time.Millisecond)
			}
			return limit, true
		}
	}
	return 0, false
}
