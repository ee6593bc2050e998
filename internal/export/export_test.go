package export

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/wire"
)

// sink is a Sender. Each batch is answered with the next result; without one, the sender waits.
type sink struct {
	got     chan int // spans of a batch
	results chan result
	closed  chan struct{} // may be nil
}

type result struct {
	response []byte
	err      error
}

func (s *sink) Close(context.Context) {
	if s.closed != nil {
		s.closed <- struct{}{}
	}
}

func newSink() *sink { return &sink{got: make(chan int), results: make(chan result)} }

func (s *sink) Send(ctx context.Context, request []byte) ([]byte, error) {
	select {
	case s.got <- spansIn(request):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	select {
	case r := <-s.results:
		return r.response, r.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// spansIn counts the spans of a request; -1: it is malformed.
func spansIn(request []byte) (n int) {
	var err error
	for m := wire.Read(request, &err); m.Next(); {
		for m := m.Message(); m.Next(); {
			if m.Number != 2 {
				continue
			}
			for m := m.Message(); m.Next(); {
				if m.Number == OTLPItem {
					n++
				}
			}
		}
	}
	if err != nil {
		return -1
	}
	return n
}

// The queue of the tests.
const (
	batch    = 512
	maxQueue = 2048
)

type log struct{ strings.Builder }

// start starts an exporter that sends at once, or only whole batches.
func start(t *testing.T, s Sender, delay time.Duration) (*Exporter, *Counts, *log) {
	t.Helper()
	l, counts := new(log), new(Counts)
	e := New(Config{Sender: s, Target: "receiver", Counts: counts, Log: slog.New(slog.NewTextHandler(l, nil)),
		What:   "spans",
		Levels: OTLP([]Resource{{"service.name", "a"}}, nil), Field: OTLPItem, Batch: batch, Most: maxQueue, Delay: delay, FirstWait: 2 * time.Millisecond})
	t.Cleanup(func() {
		e.end()
		if !e.isStopped() {
			e.Close(context.Background())
		}
	})
	return e, counts, l
}

func (e *Exporter) isStopped() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.stopped
}

func receive[T any](t *testing.T, c <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-c:
	case <-time.After(nettest.Patience):
		t.Fatal("nothing came")
	}
	return v
}

// A receiver that hangs holds neither requests nor memory: spans beyond the queue are dropped and counted.
func TestAReceiverThatHangsCostsSpansOnly(t *testing.T) {
	s := newSink()
	e, counts, _ := start(t, s, time.Hour)
	for range batch {
		e.Add([]byte{})
	}
	if n := receive(t, s.got); n != batch {
		t.Fatalf("a batch of %d spans", n)
	}
	for range maxQueue + 7 {
		e.Add([]byte{})
	}
	if n := counts.Dropped.Load(); n != 7 {
		t.Errorf("%d spans dropped, want 7", n)
	}
	s.results <- result{}
	if n := receive(t, s.got); n != maxQueue {
		t.Errorf("then %d spans", n)
	}
	s.results <- result{}
}

func TestTheQueueIsBoundedInBytes(t *testing.T) {
	s := newSink()
	e, counts, _ := start(t, s, time.Hour)
	for range maxBytes/MaxItem + 3 {
		e.Add(make([]byte, MaxItem-8))
	}
	e.Add(make([]byte, MaxItem+1))
	e.mu.Lock()
	size := len(e.queue)
	e.mu.Unlock()
	if n := counts.Dropped.Load(); n < 2 || size > maxBytes+MaxItem {
		t.Errorf("%d spans dropped, %d bytes in the queue", n, size)
	}
}

func TestABatchIsSentAgainAfterATemporaryErrorOnly(t *testing.T) {
	s := newSink()
	e, counts, l := start(t, s, time.Millisecond)
	e.Add([]byte{})
	receive(t, s.got)
	s.results <- result{err: &Temporary{Err: errors.New("busy")}}
	receive(t, s.got) // again
	s.results <- result{err: errors.New("forbidden")}
	e.Add([]byte{})
	receive(t, s.got)
	rejected := wire.AppendString(wire.AppendVarint(nil, 1, 1), 2, "bad name")
	s.results <- result{response: wire.AppendBytes(nil, partialSuccess, rejected)}
	e.Add([]byte{})
	receive(t, s.got)
	s.results <- result{}
	e.Close(context.Background())
	if a, b := counts.Failed.Load(), counts.Exported.Load(); a != 2 || b != 1 {
		t.Errorf("%d spans failed, %d exported", a, b)
	}
	if text := l.String(); strings.Count(text, "cannot export spans") != 1 || !strings.Contains(text, "forbidden") || !strings.Contains(text, "exported again") {
		t.Errorf("log:\n%s", text)
	}
}

func TestCloseSendsWhatIsLeft(t *testing.T) {
	s := newSink()
	e, counts, _ := start(t, s, time.Hour)
	e.Add([]byte{})
	e.Add([]byte{})
	closed := make(chan struct{})
	go func() {
		e.Close(context.Background())
		close(closed)
	}()
	if n := receive(t, s.got); n != 2 {
		t.Errorf("%d spans", n)
	}
	s.results <- result{}
	receive(t, closed)
	e.Add([]byte{})
	if counts.Exported.Load() != 2 || counts.Dropped.Load() != 1 {
		t.Errorf("%d exported, %d dropped", counts.Exported.Load(), counts.Dropped.Load())
	}
}

// A retired exporter has no connection while it has nothing to send, but still sends.
func TestARetiredExporterKeepsNoConnection(t *testing.T) {
	s := newSink()
	s.closed = make(chan struct{})
	e, counts, _ := start(t, s, time.Millisecond)
	e.Retire(true) // before anything was sent: there is nothing to close
	if !e.Idle() {
		t.Error("an exporter without items is not idle")
	}
	for range 2 {
		e.Add([]byte{})
		receive(t, s.got)
		s.results <- result{}
		receive(t, s.closed)
	}
	e.Retire(false)
	e.Add([]byte{})
	receive(t, s.got)
	s.results <- result{}
	nettest.Eventually(t, "the item is sent", e.Idle)
	e.Retire(true)
	receive(t, s.closed)
	if n := counts.Exported.Load(); n != 3 {
		t.Errorf("%d items exported, want 3", n)
	}
	go e.Close(context.Background())
	receive(t, s.closed)
}

// Items that find the queue full are logged once for each time that this lasts.
func TestLossesAreLogged(t *testing.T) {
	s := newSink()
	e, _, l := start(t, s, time.Millisecond)
	e.Add([]byte{})
	receive(t, s.got)
	for range maxQueue + 7 {
		e.Add([]byte{})
	}
	s.results <- result{}
	receive(t, s.got)
	s.results <- result{}
	nettest.Eventually(t, "all is sent", e.Idle)
	if text := l.String(); strings.Count(text, "dropping spans") != 1 || !strings.Contains(text, "dropped=7") {
		t.Errorf("log:\n%s", text)
	}
}

// gathering is a Sender that waits until all of them are sending.
type gathering struct {
	*sync.WaitGroup
	met chan struct{}
}

func (g gathering) Send(ctx context.Context, _ []byte) ([]byte, error) {
	g.Done()
	select {
	case <-g.met:
		return nil, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (g gathering) Close(context.Context) {}

// A receiver that hangs takes no time of the others from the last batch.
func TestExportersAreClosedAtTheSameTime(t *testing.T) {
	g, counts := gathering{new(sync.WaitGroup), make(chan struct{})}, new(Counts)
	var all []*Exporter
	for range 3 {
		g.Add(1)
		e := New(Config{Sender: g, Counts: counts, Log: slog.New(slog.DiscardHandler), Field: OTLPItem, Delay: time.Hour, CloseTime: nettest.Patience})
		e.Add([]byte{})
		all = append(all, e)
	}
	go func() {
		g.Wait()
		close(g.met)
	}()
	ctx, cancel := context.WithTimeout(t.Context(), nettest.Patience)
	defer cancel()
	CloseAll(ctx, all)
	if n := counts.Exported.Load(); n != 3 {
		t.Errorf("%d of 3 batches exported", n)
	}
}
