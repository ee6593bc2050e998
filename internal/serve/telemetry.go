package serve

import (
	"sync/atomic"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
)

// Recorder makes the sinks of access logs.
type Recorder interface {
	// Of returns the sinks of logs. It is called for each filter chain, when that is first used.
	Of(logs []mesh.AccessLog) []flow.Sink
}

// recorded returns what is recorded of a chain's connections and requests; nil: nothing in particular. chain may be nil.
func (r *Role) recorded(chain *mesh.FilterChain) *flow.Telemetry {
	if r.recorder == nil || chain == nil {
		return nil
	}
	return r.compiled(&chain.Recorded, chain.AccessLogs)
}

// unmatched returns what is recorded of connections without a chain, to a port of a gateway; 0: it is not known. s may be nil.
func (r *Role) unmatched(s *mesh.Snapshot, port uint16) *flow.Telemetry {
	if r.recorder == nil || s == nil {
		return nil
	}
	l := s.Accepting(r.direction == flow.Inbound)
	if r.gateway {
		l = s.Bound(port)
	}
	if l == nil {
		return nil
	}
	return r.compiled(&l.Recorded, func() []mesh.AccessLog { return l.AccessLogs })
}

// compiled returns the value that is kept in place, and makes it first if need be.
func (r *Role) compiled(place *atomic.Value, logs func() []mesh.AccessLog) *flow.Telemetry {
	if t, ok := place.Load().(*flow.Telemetry); ok {
		return t
	}
	t := flow.NewTelemetry(r.recorder.Of(logs()))
	if !place.CompareAndSwap(nil, t) {
		return place.Load().(*flow.Telemetry)
	}
	return t
}
