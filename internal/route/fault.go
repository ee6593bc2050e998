package route

import (
	"sync/atomic"
	"time"

	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
)

// faults are the compiled faults of a cluster.
type faults struct {
	source  *mesh.Fault
	headers []header
	abort   *Reply       // nil: requests are not aborted
	active  atomic.Int64 // delays in progress
}

// noFaults stands for faults that are turned off.
var noFaults = &faults{source: &mesh.Fault{}}

// compileFaults returns the faults that the most specific of the filters has, or nil.
func compileFaults(filters [4]*mesh.RouteFilters, p *patterns) *faults {
	for _, level := range filters {
		switch f := level.Fault; {
		case f == nil:
			continue
		case f.Disabled:
			return noFaults
		default:
			return compileFault(f, p)
		}
	}
	return nil
}

func compileFault(f *mesh.Fault, p *patterns) *faults {
	compiled := &faults{source: f}
	for i := range f.Headers {
		compiled.headers = append(compiled.headers, compileHeader(&f.Headers[i], p))
	}
	if f.Abort != nil {
		compiled.abort = abortReply(f.Abort)
	}
	return compiled
}

func abortReply(a *mesh.Abort) *Reply {
	reply := &Reply{
		Status: a.Status, Body: a.Body, GRPC: a.GRPC,
		Flags: envoy.FlagFaultInjected, Details: envoy.DetailsFaultAbort, Reason: flow.Completed,
	}
	if a.GRPC != nil {
		reply.Status = 200 // as Envoy's
	}
	if reply.Body == "" {
		reply.Body = "fault filter abort"
	}
	return reply
}

// decide draws the faults of a request to a cluster. A request that is aborted is delayed first.
func (f *faults) decide(r *Request, cluster string, o *Outcome) {
	if f == nil || f.source.Cluster != "" && f.source.Cluster != cluster {
		return
	}
	s := search{Request: r}
	for i := range f.headers {
		if !f.headers[i].match(&s) {
			return
		}
	}
	if f.source.Rate > 0 && r.drawn(f.source.RateFraction) {
		o.ResponseRate = f.source.Rate
	}
	var delay time.Duration
	var abort *Reply
	if f.source.Delay > 0 && r.drawn(f.source.DelayFraction) {
		delay = f.source.Delay
	}
	if f.abort != nil && r.drawn(f.source.AbortFraction) {
		abort = f.abort
	}
	o.Delay, o.Reply = f.limited(delay, abort)
}

// limited returns faults, or no faults if as many as are allowed are active. A fault is active while it delays a request.
func (f *faults) limited(delay time.Duration, abort *Reply) (time.Duration, *Reply) {
	if f.source.MaxActive == nil || delay == 0 && abort == nil {
		return delay, abort
	}
	if f.active.Add(1) > int64(*f.source.MaxActive) {
		f.active.Add(-1)
		return 0, nil
	}
	time.AfterFunc(delay, func() { f.active.Add(-1) })
	return delay, abort
}
