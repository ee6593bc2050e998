package run

import (
	"cmp"
	"fmt"
	"io"
	"math/bits"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/pillion-proxy/pillion/internal/live"
	"github.com/pillion-proxy/pillion/internal/terminal"
)

// maxDestinations bounds the rows of the table; the rest is summed up in one.
const maxDestinations = 500

// summary sums records up by destination. The zero value is empty.
type summary struct {
	mu           sync.Mutex
	destinations map[string]*destination
}

// destination is a row of the table.
type destination struct {
	name        string
	flows       int    // requests and connections without requests
	statuses    [6]int // by class; 0: without a response
	bytes       uint64
	durations   histogram
	failures    map[string]int // by reason
	connections bool           // some flows are connections
}

// other is the row of the destinations beyond the bound.
const other = "(other)"

func (s *summary) add(r *live.Record) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.destinations == nil {
		s.destinations = make(map[string]*destination)
	}
	name := cmp.Or(r.Authority, r.SNI, r.Destination, "-")
	if r.Direction == "inbound" {
		name = "← " + name
	}
	d := s.destinations[name]
	if d == nil && len(s.destinations) >= maxDestinations {
		name = other
		d = s.destinations[name]
	}
	if d == nil {
		d = &destination{name: name, failures: make(map[string]int)}
		s.destinations[name] = d
	}
	d.add(r)
}

func (d *destination) add(r *live.Record) {
	d.flows++
	d.bytes += r.Received + r.Sent
	if class := r.Status / 100; class < len(d.statuses) {
		d.statuses[class]++
	}
	d.connections = d.connections || !r.Request
	d.durations.add(time.Duration(r.DurationMS * float64(time.Millisecond)))
	if cause := r.Cause(); cause != "" {
		d.failures[cause]++
	}
}

// print writes the table, the busiest destination first. It writes nothing if there was no traffic.
func (s *summary) print(out io.Writer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	rows := make([]*destination, 0, len(s.destinations))
	for _, d := range s.destinations {
		rows = append(rows, d)
	}
	if len(rows) == 0 {
		return
	}
	slices.SortFunc(rows, func(a, b *destination) int {
		return cmp.Or(cmp.Compare(b.flows, a.flows), cmp.Compare(b.bytes, a.bytes), cmp.Compare(a.name, b.name))
	})
	cells := [][]string{{"destination", "flows", "statuses", "p50", "p99", "bytes", "failures"}}
	for _, d := range rows {
		cells = append(cells, []string{
			d.name, fmt.Sprint(d.flows), d.statusText(), terminal.Milliseconds(d.durations.percentile(0.5)),
			terminal.Milliseconds(d.durations.percentile(0.99)), terminal.Bytes(d.bytes), d.failureText(),
		})
	}
	io.WriteString(out, terminal.Table(cells, terminal.NewPainter(out)))
}

// statusText is the classes of statuses with their numbers, such as "2xx:3 4xx:1".
func (d *destination) statusText() string {
	var words []string
	for class, n := range d.statuses {
		if class > 0 && n > 0 {
			words = append(words, fmt.Sprintf("%dxx:%d", class, n))
		}
	}
	return cmp.Or(strings.Join(words, " "), "-")
}

func (d *destination) failureText() string {
	var words []string
	for reason, n := range d.failures {
		words = append(words, fmt.Sprintf("%s:%d", reason, n))
	}
	slices.Sort(words)
	return cmp.Or(strings.Join(words, " "), "-")
}

// histogram counts durations in buckets that are at most a sixteenth of a duration wide.
type histogram struct {
	total   int
	buckets map[int]int
}

const perDoubling = 16

func (h *histogram) add(d time.Duration) {
	if h.buckets == nil {
		h.buckets = make(map[int]int)
	}
	h.total++
	h.buckets[bucketOf(uint64(max(0, d/time.Microsecond)))]++
}

func bucketOf(n uint64) int {
	if n < perDoubling {
		return int(n)
	}
	shift := bits.Len64(n) - 5
	return shift*perDoubling + int(n>>shift)
}

// upperBound is the largest number of microseconds in a bucket.
func upperBound(bucket int) uint64 {
	if bucket < 2*perDoubling {
		return uint64(bucket)
	}
	shift := bucket/perDoubling - 1
	return uint64(bucket-shift*perDoubling+1)<<shift - 1
}

// percentile returns the duration that a share of the durations does not exceed, in milliseconds.
func (h *histogram) percentile(share float64) float64 {
	wanted := int(float64(h.total)*share + 0.999999)
	buckets := make([]int, 0, len(h.buckets))
	for b := range h.buckets {
		buckets = append(buckets, b)
	}
	slices.Sort(buckets)
	for _, b := range buckets {
		if wanted -= h.buckets[b]; wanted <= 0 {
			return float64(upperBound(b)) / 1000
		}
	}
	return 0
}
