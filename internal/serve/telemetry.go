package serve

import (
	"sync/atomic"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
)

// Recorder makes what records refer to. It is called for each filter chain, when that is first used.
type Recorder interface {
	Logs(logs []mesh.AccessLog) []flow.Sink
	Metrics(s *mesh.Stats) any // see flow.Telemetry
}

// recordings are what is recorded of a chain's connections and requests, with and without Istio's metrics.
type recordings struct{ measured, unmeasured *flow.Telemetry }

// recorded returns what is recorded of a chain's connections and requests in a snapshot; nil: nothing in particular. chain may
// be nil.
func (r *Role) recorded(s *mesh.Snapshot, chain *mesh.FilterChain) *flow.Telemetry {
	if r.recorder == nil || chain == nil {
		return nil
	}
	all, ok := chain.Recorded.Load().(*recordings)
	if !ok {
		all = r.record(&chain.Recorded, chain.AccessLogs(), chain.Metrics())
	}
	if s.Measures(chain) {
		return all.measured
	}
	return all.unmeasured
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
	all, ok := l.Recorded.Load().(*recordings)
	if !ok {
		all = r.record(&l.Recorded, l.AccessLogs, nil)
	}
	return all.measured
}

// record makes the value that is kept in place.
func (r *Role) record(place *atomic.Value, logs []mesh.AccessLog, s *mesh.Stats) *recordings {
	sinks, metrics := r.recorder.Logs(logs), r.recorder.Metrics(s)
	all := &recordings{flow.NewTelemetry(sinks, metrics, false), flow.NewTelemetry(sinks, metrics, true)}
	if !place.CompareAndSwap(nil, all) {
		return place.Load().(*recordings)
	}
	return all
}
