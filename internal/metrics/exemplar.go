package metrics

import (
	"encoding/hex"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/promtext"
)

// exemplar is a request of a histogram of durations, whose trace is sampled. It is never modified.
type exemplar struct {
	trace    [16]byte
	span     [8]byte
	duration time.Duration
	ended    time.Time
}

// exemplarEvery is how often the exemplar of a histogram is replaced at most, because each is allocated.
const exemplarEvery = time.Second

// exemplify makes a request the exemplar of its durations. Two requests may do so at once; either remains.
func (s *requestSet) exemplify(r *flow.Record) {
	ended := r.Opened.Add(r.Duration)
	if before := s.exemplar.Load(); before != nil && ended.Sub(before.ended) < exemplarEvery {
		return
	}
	s.exemplar.Store(&exemplar{r.HTTP.Trace.ID, r.HTTP.Trace.Span, max(r.Duration, 0), ended})
}

// mark adds the exemplar to the bucket of h that has its request. e may be nil.
func (e *exemplar) mark(h *promtext.Metric) {
	if e == nil {
		return
	}
	value := float64(e.duration) / float64(time.Millisecond)
	for i := range h.Buckets {
		if b := &h.Buckets[i]; value <= b.Bound {
			b.Exemplar = &promtext.MetricExemplar{
				Labels: []promtext.Label{label("trace_id", hex.EncodeToString(e.trace[:])), label("span_id", hex.EncodeToString(e.span[:]))},
				Value:  value, Time: e.ended,
			}
			return
		}
	}
}
