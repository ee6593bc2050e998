// Package export sends what the agent records, spans and entries of access logs, to receivers over the network. An Exporter
// never makes traffic wait: it has a bounded queue, and drops and counts what does not fit. Batches are sent again after
// temporary failures, with growing pauses and for a bounded time.
package export

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"math/bits"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pillion-proxy/pillion/internal/wire"
)

// Bounds of an exporter, those of OpenTelemetry's SDKs unless the memory of a sidecar requires less.
const (
	maxBytes  = 1 << 20 // of the queue; a batch in transit may take as much
	delay     = time.Second
	firstWait = time.Second // before a batch is sent again
	lastWait  = 16 * time.Second
	patience  = time.Minute // after which a batch is dropped
	closeTime = time.Second
)

// MaxItem is the limit of an item, in bytes. A larger one is dropped.
const MaxItem = 64 << 10

// Sender sends a batch, a message. It returns the message of the response, or nil if there was no response. An error that is not
// temporary drops the batch. Its methods are not called at the same time.
type Sender interface {
	Send(ctx context.Context, request []byte) (response []byte, err error)

	// Close waits until ctx ends for the receiver to have the batches, and closes what is open. Send may be called again.
	Close(ctx context.Context)
}

// Temporary is an error of a Sender after which the same batch may be sent again.
type Temporary struct {
	Err   error
	After time.Duration // that the receiver asks for; 0: not asked for
}

func (t *Temporary) Error() string { return t.Err.Error() }
func (t *Temporary) Unwrap() error { return t.Err }

// Exporter sends items to one receiver. Make it with New. It has a goroutine only while there is something to send.
type Exporter struct {
	Config

	mu      sync.Mutex
	queue   []byte // items, as fields of the innermost message
	count   int    // of them
	lost    int    // items that were dropped since the last batch
	retired bool
	open    bool          // the sender may have a connection
	closing bool          // no goroutine is started any more
	stopped bool          // items are dropped
	running chan struct{} // closed when the goroutine ends; nil: it does not run

	full chan struct{} // there is a batch
	stop chan struct{} // closed by Close: waits end
	ctx  context.Context
	end  context.CancelFunc // of ctx, and of a batch that is being sent

	failed bool // the last batch was not sent, and that is logged
	losing bool // items were lost before the last batch, and that is logged
}

// Counts counts items. Several exporters may share it.
type Counts struct {
	Exported atomic.Uint64 // that a receiver has taken
	Dropped  atomic.Uint64 // that found the queue full
	Failed   atomic.Uint64 // that could not be sent, or were refused by the receiver
}

// Config is what an Exporter needs. Fields are required unless they have a default.
type Config struct {
	Sender Sender
	Target string // of the sender, in logs
	What   string // the items, in logs
	Counts *Counts
	Log    *slog.Logger

	Levels     []Level // the messages around the items, outermost first
	Field      int     // number of an item in the innermost of them; below 16
	Batch      int     // items that are sent without waiting for others; 0: not limited
	BatchBytes int     // likewise; 0: not limited
	Most       int     // items in the queue; 0: only their bytes are limited

	Delay     time.Duration // after which an item is sent; 0: one second
	FirstWait time.Duration // before a batch is sent again; 0: one second
	CloseTime time.Duration // for the last batch, and for the receiver to confirm what it has got when it is left; 0: one second
}

// Level is a field with a message: its number, below 16, and the fields that precede the items.
type Level struct {
	Number int
	Head   []byte
}

// New returns an exporter. Close it.
func New(config Config) *Exporter {
	config.Delay, config.FirstWait = cmp.Or(config.Delay, delay), cmp.Or(config.FirstWait, firstWait)
	config.CloseTime = cmp.Or(config.CloseTime, closeTime)
	e := &Exporter{Config: config, full: make(chan struct{}, 1), stop: make(chan struct{})}
	e.ctx, e.end = context.WithCancel(context.Background())
	return e
}

// Add puts an item into the queue, unless that is full. It never waits, and does not keep item.
func (e *Exporter) Add(item []byte) {
	e.mu.Lock()
	if e.stopped || len(item) > MaxItem || e.Most > 0 && e.count >= e.Most || len(e.queue)+len(item) > maxBytes {
		e.lost++
		e.mu.Unlock()
		e.Counts.Dropped.Add(1)
		return
	}
	before := len(e.queue)
	e.queue = wire.AppendBytes(e.queue, e.Field, item)
	e.count++
	whole := e.count == e.Batch || before < e.BatchBytes && len(e.queue) >= e.BatchBytes
	if e.running == nil && !e.closing {
		e.running = make(chan struct{})
		go e.run(e.running)
	}
	e.mu.Unlock()
	if whole {
		select {
		case e.full <- struct{}{}:
		default:
		}
	}
}

// run sends what is in the queue a while after its first item, or as soon as there is a batch, until the queue is empty.
func (e *Exporter) run(ended chan struct{}) {
	defer close(ended)
	for {
		timer := time.NewTimer(e.Delay)
		select {
		case <-e.stop:
			timer.Stop()
			return
		case <-e.full:
			timer.Stop()
		case <-timer.C:
		}
		e.send(patience)
		if e.rest() {
			return
		}
	}
}

// rest reports whether the goroutine is to end: the queue is empty. A retired exporter lets go of its receiver.
func (e *Exporter) rest() bool {
	e.mu.Lock()
	if e.count > 0 {
		e.mu.Unlock()
		return false
	}
	if !e.retired || e.closing {
		e.running = nil
		e.mu.Unlock()
		return true
	}
	e.open = false
	e.mu.Unlock()
	e.closeSender(e.ctx)
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.count > 0 {
		return false
	}
	e.running = nil
	return true
}

func (e *Exporter) closeSender(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, e.CloseTime)
	defer cancel()
	e.Sender.Close(ctx)
}

// Retire sets whether the exporter closes its connection whenever its queue is empty: items are rare or come no more.
func (e *Exporter) Retire(retired bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.retired = retired; retired && e.open && e.running == nil && !e.closing {
		e.running = make(chan struct{})
		go func(ended chan struct{}) {
			if !e.rest() {
				e.run(ended)
				return
			}
			close(ended)
		}(e.running)
	}
}

// Idle reports whether everything is sent.
func (e *Exporter) Idle() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.running == nil
}

// take returns the queue as a request, and the number of its items.
func (e *Exporter) take() (request []byte, items int) {
	e.mu.Lock()
	queue, count, lost := e.queue, e.count, e.lost
	e.queue, e.count, e.lost, e.open = nil, 0, 0, true
	e.mu.Unlock()
	if lost > 0 && !e.losing {
		e.Log.Warn("dropping "+e.What+": the receiver is too slow", "target", e.Target, "dropped", lost)
	}
	e.losing = lost > 0
	if count == 0 {
		return nil, 0
	}
	return appendLevels(nil, e.Levels, queue), count
}

// appendLevels appends items with the messages around them.
func appendLevels(b []byte, levels []Level, items []byte) []byte {
	for i, l := range levels {
		n := len(items)
		for j := len(levels) - 1; j > i; j-- {
			n = SizeOfField(n + len(levels[j].Head))
		}
		b = append(wire.AppendTag(b, l.Number, n+len(l.Head)), l.Head...)
	}
	return append(b, items...)
}

// SizeOfField is the size of a field with n bytes, whose number is below 16.
func SizeOfField(n int) int { return 1 + (bits.Len64(uint64(n)|1)+6)/7 + n }

// send sends the queue, for as long as the receiver can be expected to take it later.
func (e *Exporter) send(patience time.Duration) {
	request, items := e.take()
	if items == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(e.ctx, patience)
	defer cancel()
	var temporary *Temporary
	for wait := e.FirstWait; ; wait = min(2*wait, lastWait) {
		response, err := e.Sender.Send(ctx, request)
		if err == nil {
			e.sent(response, items)
			return
		}
		if !errors.As(err, &temporary) || !e.sleep(ctx, max(temporary.After, wait/2+rand.N(wait/2))) {
			e.Counts.Failed.Add(uint64(items))
			if !e.failed {
				e.Log.Warn("cannot export "+e.What, "target", e.Target, "error", err)
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

// sent counts a batch that the receiver has taken, except for the items that it rejects.
func (e *Exporter) sent(response []byte, items int) {
	rejected, text := rejection(response)
	rejected = min(rejected, uint64(items))
	e.Counts.Exported.Add(uint64(items) - rejected)
	e.Counts.Failed.Add(rejected)
	switch {
	case rejected > 0 && !e.failed:
		e.Log.Warn(e.What+" rejected", "target", e.Target, "rejected", rejected, "error", text)
	case rejected == 0 && e.failed:
		e.Log.Info(e.What+" are exported again", "target", e.Target)
	}
	e.failed = rejected > 0
}

// partialSuccess is the field of the responses of OTLP with the items that the receiver rejects.
const partialSuccess = 1

// rejection reads the number of items that a receiver of OTLP rejects, and its reason. All items of an
// unreadable response count as taken.
func rejection(response []byte) (items uint64, text string) {
	var err error
	for m := wire.Read(response, &err); m.Next(); {
		if m.Number != partialSuccess {
			continue
		}
		for m := m.Message(); m.Next(); {
			switch m.Number {
			case 1:
				items = m.Uint64()
			case 2:
				text = m.String()
			}
		}
	}
	if err != nil {
		return 0, ""
	}
	return items, text
}

// Close sends what is in the queue, once and until ctx ends, and stops. Later items are dropped.
func (e *Exporter) Close(ctx context.Context) {
	e.mu.Lock()
	e.closing = true
	running := e.running
	e.mu.Unlock()
	close(e.stop)
	defer e.end()
	if running != nil {
		select {
		case <-running:
		case <-ctx.Done():
			e.end()
			<-running
		}
	}
	e.mu.Lock()
	e.stopped = true
	e.mu.Unlock()
	stop := context.AfterFunc(ctx, e.end)
	defer stop()
	e.send(e.CloseTime)
	e.closeSender(e.ctx)
}

// CloseAll closes exporters at the same time, so that a receiver that hangs takes no time from the others.
func CloseAll(ctx context.Context, all []*Exporter) {
	var closing sync.WaitGroup
	for _, e := range all {
		closing.Go(func() { e.Close(ctx) })
	}
	closing.Wait()
}
