package tracing

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pillion-proxy/pillion/internal/wire"
)

// Bounds of an exporter, those of OpenTelemetry's SDKs unless the memory of a sidecar requires less.
const (
	maxQueue  = 2048     // spans
	maxBytes  = 1 << 20  // of them
	batch     = 512      // spans that are sent without waiting for others
	maxSpan   = 64 << 10 // bytes of a span; a larger one is dropped
	delay     = time.Second
	firstWait = time.Second // before a batch is sent again
	lastWait  = 16 * time.Second
	patience  = time.Minute // after which a batch is dropped
)

// Sender sends a batch: a message of type opentelemetry.proto.collector.trace.v1.ExportTraceServiceRequest. It returns the
// response's message. An error that is not temporary drops the batch.
type Sender interface {
	Send(ctx context.Context, request []byte) (response []byte, err error)
}

// Temporary is an error of a Sender after which the same batch may be sent again.
type Temporary struct {
	Err   error
	After time.Duration // that the receiver asks for; 0: it asks for none
}

func (t *Temporary) Error() string { return t.Err.Error() }
func (t *Temporary) Unwrap() error { return t.Err }

// Exporter sends spans to one receiver. Make it with NewExporter.
type Exporter struct {
	sender Sender
	head   []byte // of a ResourceSpans: the resource
	log    *slog.Logger
	target string

	mu      sync.Mutex
	queue   []byte // spans, as fields of a ScopeSpans
	count   int    // of them
	stopped bool

	wake   chan struct{}      // there are spans
	full   chan struct{}      // there is a batch of them
	stop   chan struct{}      // closed by Close: nothing is waited for any more
	end    context.CancelFunc // of a batch that is being sent
	ended  chan struct{}
	counts *Counts
	failed bool // the last batch was not sent, and that is logged

	delay, firstWait time.Duration

	closed func() // is called by Close; nil: nothing is left to close
}

// Counts counts spans. Several exporters may share it.
type Counts struct {
	Exported atomic.Uint64 // that a receiver has taken
	Dropped  atomic.Uint64 // that found the queue full
	Failed   atomic.Uint64 // that could not be sent, or were refused by the receiver
}

// ExporterConfig is what an Exporter needs. All fields are required.
type ExporterConfig struct {
	Sender   Sender
	Target   string     // of the sender, in logs
	Resource []Resource // attributes of all spans
	Counts   *Counts
	Log      *slog.Logger

	delay, firstWait time.Duration // zero: the constants of these names. Tests change them
}

// Resource is an attribute of the process.
type Resource struct{ Name, Value string }

// NewExporter starts an exporter. Close it.
func NewExporter(config ExporterConfig) *Exporter {
	ctx, cancel := context.WithCancel(context.Background())
	e := &Exporter{
		sender: config.Sender, target: config.Target, log: config.Log, counts: config.Counts,
		wake: make(chan struct{}, 1), full: make(chan struct{}, 1), stop: make(chan struct{}), end: cancel, ended: make(chan struct{}),
	}
	e.delay, e.firstWait = cmp.Or(config.delay, delay), cmp.Or(config.firstWait, firstWait)
	var resource []byte
	for _, a := range config.Resource {
		value := wire.AppendString(nil, 1, a.Value)
		attribute := wire.AppendBytes(wire.AppendString(nil, 1, a.Name), 2, value)
		resource = wire.AppendBytes(resource, resourceFields, attribute)
	}
	e.head = wire.AppendBytes(nil, resourceFields, resource)
	go e.run(ctx)
	return e
}

// add puts a span into the queue, unless that is full. It never waits.
func (e *Exporter) add(span []byte) {
	e.mu.Lock()
	if e.stopped || len(span) > maxSpan || e.count >= maxQueue || len(e.queue)+len(span) > maxBytes {
		e.mu.Unlock()
		e.counts.Dropped.Add(1)
		return
	}
	e.queue = wire.AppendBytes(e.queue, spansOfScope, span)
	e.count++
	first, whole := e.count == 1, e.count == batch
	e.mu.Unlock()
	if first {
		notify(e.wake)
	}
	if whole {
		notify(e.full)
	}
}

func notify(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// run sends what is in the queue a while after its first span, or as soon as there is a batch.
func (e *Exporter) run(ctx context.Context) {
	defer close(e.ended)
	for {
		select {
		case <-e.stop:
			return
		case <-e.wake:
		}
		timer := time.NewTimer(e.delay)
		select {
		case <-e.stop:
			timer.Stop()
			return
		case <-e.full:
			timer.Stop()
		case <-timer.C:
		}
		e.send(ctx, patience)
	}
}

// take returns the queue as a request, and the number of its spans.
func (e *Exporter) take() (request []byte, spans int) {
	e.mu.Lock()
	queue, count := e.queue, e.count
	e.queue, e.count = nil, 0
	e.mu.Unlock()
	if count == 0 {
		return nil, 0
	}
	scope := wire.AppendBytes(nil, 1, wire.AppendString(nil, 1, "pillion"))
	inner := sizeOfField(len(scope)+len(queue)) + len(e.head)
	request = wire.AppendTag(make([]byte, 0, sizeOfField(inner)), requestSpans, inner)
	request = wire.AppendTag(append(request, e.head...), scopeSpans, len(scope)+len(queue))
	return append(append(request, scope...), queue...), count
}

// send sends the queue, for as long as the receiver can be expected to take it later.
func (e *Exporter) send(ctx context.Context, patience time.Duration) {
	request, spans := e.take()
	if spans == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	var temporary *Temporary
	for wait := e.firstWait; ; wait = min(2*wait, lastWait) {
		response, err := e.sender.Send(ctx, request)
		if err == nil {
			e.sent(response, spans)
			return
		}
		if !errors.As(err, &temporary) || !e.sleep(ctx, max(temporary.After, wait/2+rand.N(wait/2))) {
			e.counts.Failed.Add(uint64(spans))
			if !e.failed {
				e.log.Warn("cannot export spans", "target", e.target, "error", err)
			}
			e.failed = true
			return
		}
	}
}

// sleep reports whether the time has passed before ctx and the exporter have ended.
func (e *Exporter) sleep(ctx context.Context, d time.Duration) bool {
	if until, ok := ctx.Deadline(); ok && time.Until(until) < d {
		return false
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-e.stop:
		return false
	case <-timer.C:
		return true
	}
}

// sent counts a batch that the receiver has taken, except for the spans that it rejects.
func (e *Exporter) sent(response []byte, spans int) {
	rejected, text := rejection(response)
	rejected = min(rejected, uint64(spans))
	e.counts.Exported.Add(uint64(spans) - rejected)
	e.counts.Failed.Add(rejected)
	switch {
	case rejected > 0 && !e.failed:
		e.log.Warn("spans rejected", "target", e.target, "spans", rejected, "error", text)
	case rejected == 0 && e.failed:
		e.log.Info("spans are exported again", "target", e.target)
	}
	e.failed = rejected > 0
}

// rejection reads the number of spans that a receiver rejects, and its reason. A response that cannot be read rejects none.
func rejection(response []byte) (spans uint64, text string) {
	var err error
	for m := wire.Read(response, &err); m.Next(); {
		if m.Number != partialSuccess {
			continue
		}
		for m := m.Message(); m.Next(); {
			switch m.Number {
			case 1:
				spans = m.Uint64()
			case 2:
				text = m.String()
			}
		}
	}
	if err != nil {
		return 0, ""
	}
	return spans, text
}

// Close sends what is in the queue, once and until ctx ends, and stops. Later spans are dropped.
func (e *Exporter) Close(ctx context.Context) {
	close(e.stop)
	defer e.end()
	select {
	case <-e.ended:
	case <-ctx.Done():
		e.end()
		<-e.ended
	}
	e.mu.Lock()
	e.stopped = true
	e.mu.Unlock()
	e.send(ctx, time.Second)
	if e.closed != nil {
		e.closed()
	}
}
