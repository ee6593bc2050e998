package metrics

import (
	"math"
	"sync/atomic"
	"time"

	"github.com/pillion-proxy/pillion/internal/promtext"
)

// buckets are the upper bounds of Istio's histograms, in milliseconds and in bytes.
var buckets = [...]float64{0.5, 1, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10000, 30000, 60000, 300000, 600000,
	1800000, 3600000}

// limits are the buckets in the unit of the observed values, as integers.
type limits [len(buckets)]uint64

var durationLimits, byteLimits = func() (duration, size limits) {
	for i, bound := range buckets {
		duration[i] = uint64(bound * float64(time.Millisecond))
		size[i] = uint64(bound) // 0.5 bytes becomes 0
	}
	return duration, size
}()

// histogram counts integers: nanoseconds or bytes.
type histogram struct {
	counts [len(buckets) + 1]atomic.Uint64
	sum    atomic.Uint64
}

func (h *histogram) observe(value uint64, limits *limits) {
	i := 0
	for i < len(limits) && value > limits[i] {
		i++
	}
	h.counts[i].Add(1)
	h.sum.Add(value)
}

// expose returns the histogram in the unit of buckets. unit is the observed value that corresponds to 1 in buckets.
func (h *histogram) expose(unit float64) promtext.Metric {
	out := promtext.Metric{Buckets: make([]promtext.Bucket, len(h.counts)), Sum: float64(h.sum.Load()) / unit}
	for i := range h.counts {
		out.Count += h.counts[i].Load()
		bound := math.Inf(1)
		if i < len(buckets) {
			bound = buckets[i]
		}
		out.Buckets[i] = promtext.Bucket{Bound: bound, Count: out.Count}
	}
	return out
}
