package xds

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pillion-proxy/pillion/internal/wire"
)

// memory is a Stream whose other end is the test.
type memory struct {
	sent   chan []byte
	served chan []byte // closed: the control plane ends the stream in order
	closed chan struct{}
	once   sync.Once
}

func newMemory() *memory {
	return &memory{sent: make(chan []byte), served: make(chan []byte), closed: make(chan struct{})}
}

func (m *memory) Send(message []byte) error {
	select {
	case m.sent <- message:
		return nil
	case <-m.closed:
		return errLost
	}
}

func (m *memory) Receive() ([]byte, error) {
	select {
	case message, ok := <-m.served:
		if !ok {
			return nil, io.EOF
		}
		return message, nil
	case <-m.closed:
		return nil, errLost
	}
}

func (m *memory) Close() { m.once.Do(func() { close(m.closed) }) }

var errLost = errors.New("connection lost")

// handler records updates and returns prepared outcomes.
type handler struct {
	updates  []Update
	outcomes map[Type]Outcome
}

func (h *handler) Update(u Update) Outcome {
	h.updates = append(h.updates, u)
	return h.outcomes[u.Type]
}

// encodeDelta returns a DeltaDiscoveryResponse.
func encodeDelta(t Type, nonce string, names ...string) []byte {
	b := wire.AppendString(wire.AppendString(nil, 1, "push of "+nonce), 4, t.URL())
	b = wire.AppendString(b, 5, nonce)
	for _, name := range names {
		if gone, ok := strings.CutPrefix(name, "-"); ok {
			b = wire.AppendString(b, 6, gone)
			continue
		}
		inner := wire.AppendString(wire.AppendString(nil, 1, t.URL()), 2, "bytes of "+name)
		b = wire.AppendBytes(b, 2, wire.AppendString(wire.AppendBytes(nil, 2, inner), 3, name))
	}
	return b
}

// decodeDelta returns a request in the notation of text.
func decodeDelta(t *testing.T, b []byte) string {
	t.Helper()
	var r request
	var err error
	m := wire.Read(b, &err)
	for m.Next() {
		switch m.Number {
		case 1:
			r.node = m.Bytes()
		case 2:
			if r.typ, err = parseType(m.String()); err != nil {
				t.Fatal(err)
			}
		case 3:
			r.subscribe = append(r.subscribe, m.String())
		case 4:
			r.unsubscribe = append(r.unsubscribe, m.String())
		case 5:
			for entry := m.Message(); entry.Next(); {
				if entry.Number == 1 {
					r.held = append(r.held, entry.String())
				}
			}
		case 6:
			r.nonce = m.String()
		case 7:
			for status := m.Message(); status.Next(); {
				if status.Number == 2 {
					r.err = status.String()
				}
			}
		default:
			t.Fatalf("field %d", m.Number)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	return text([]request{r})
}

// start runs a client whose streams the test receives from the returned channel.
func start(t *testing.T, h Handler) (*Client, chan *memory, context.CancelFunc, *bytes.Buffer) {
	streams := make(chan *memory)
	var log bytes.Buffer
	client := New(Config{
		Delta: true, Node: []byte("node"), Handler: h, Log: slog.New(slog.NewTextHandler(&log, nil)),
		Connect: func(ctx context.Context) (Stream, error) {
			select {
			case stream, ok := <-streams:
				if !ok {
					return nil, errLost
				}
				return stream, nil
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		},
	})
	ctx, cancel := context.WithCancel(t.Context())
	go client.Run(ctx)
	return client, streams, cancel, &log
}

func expect(t *testing.T, stream *memory, want ...string) {
	t.Helper()
	for _, want := range want {
		if got := decodeDelta(t, <-stream.sent); got != want {
			t.Fatalf("request %q, want %q", got, want)
		}
	}
}

func TestAClientSubscribesAnswersAndResumes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &handler{outcomes: map[Type]Outcome{
			Clusters:  {Wanted: map[Type][]string{Endpoints: {"b", "a"}, Listeners: nil, Names: nil}},
			Listeners: {Wanted: map[Type][]string{Routes: {"80"}}, Rejected: []Rejected{{"l2", "a filter chain that is not supported"}}},
		}}
		client, streams, cancel, log := start(t, h)
		first := newMemory()
		streams <- first
		expect(t, first, "CDS node")
		first.served <- encodeDelta(Clusters, "n1", "a", "b")
		expect(t, first, "CDS nonce=n1", "EDS +a,b", "LDS", "NDS")
		first.served <- encodeDelta(Listeners, "n2", "l1", "l2")
		expect(t, first, "LDS nonce=n2 error=l2: a filter chain that is not supported", "RDS +80")
		synctest.Wait()
		status := client.Status()
		if !status.Connected || status.Types[Listeners].Rejected != 1 || status.Types[Listeners].Held != 2 || status.Types[Clusters].Updates != 1 ||
			!strings.HasPrefix(status.Types[Listeners].LastError, "l2: ") || !strings.HasPrefix(status.Types[Listeners].Version, "push of ") || !status.Types[Routes].Asked {
			t.Errorf("status %+v", status)
		}
		if got := h.updates[0]; got.Type != Clusters || len(got.Resources) != 2 || string(got.Resources[1].Value) != "bytes of b" || got.Resources[1].TypeURL != Clusters.URL() {
			t.Errorf("update %+v", got)
		}

		first.Close() // lost: everything stays, and a new stream asks for the same
		synctest.Wait()
		if status := client.Status(); status.Connected || status.LastError == nil || status.Types[Clusters].Held != 2 {
			t.Errorf("status %+v", status)
		}
		second := newMemory()
		streams <- second
		expect(t, second, "CDS node held=a,b", "EDS +a,b", "LDS held=l1,l2", "RDS +80", "NDS")
		second.served <- encodeDelta(Clusters, "m1", "b", "-a")
		expect(t, second, "CDS nonce=m1")
		if got := h.updates[len(h.updates)-1]; !slices.Equal(got.Removed, []string{"a"}) {
			t.Errorf("removed %q, want a", got.Removed)
		}
		synctest.Wait()
		if status := client.Status(); status.Streams != 2 {
			t.Errorf("%d streams, want 2", status.Streams)
		}
		cancel()
		<-second.closed
		if n := strings.Count(log.String(), "control plane connected"); n != 2 {
			t.Errorf("the connection is logged %d times, want 2", n)
		}
		if !strings.Contains(log.String(), "configuration rejected") || !strings.Contains(log.String(), errLost.Error()) {
			t.Errorf("log:\n%s", log)
		}
	})
}

func TestAResponseThatCannotBeReadEndsTheStream(t *testing.T) {
	for name, message := range map[string][]byte{
		"malformed": {0xff},
		"no type":   wire.AppendString(nil, 5, "n"),
		"a type that was not asked for by this client": wire.AppendString(wire.AppendString(nil, 4, "type.googleapis.com/foreign.Type"), 5, "n"),
	} {
		synctest.Test(t, func(t *testing.T) {
			client, streams, cancel, _ := start(t, &handler{})
			defer cancel()
			stream := newMemory()
			streams <- stream
			<-stream.sent
			stream.served <- message
			<-stream.closed
			synctest.Wait()
			if status := client.Status(); status.Connected || status.LastError == nil {
				t.Errorf("%s: status %+v", name, status)
			}
			next := newMemory()
			streams <- next
			expect(t, next, "CDS node")
		})
	}
}

// The pause before a new stream is random below a bound that doubles from 500 ms to 30 s, and begins again at 500 ms after
// a stream that brought a response.
func TestTheClientBacksOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		attempts := make(chan chan Stream)
		client := New(Config{Delta: true, Handler: &handler{}, Log: slog.New(slog.DiscardHandler), Connect: func(context.Context) (Stream, error) {
			attempt := make(chan Stream)
			attempts <- attempt
			if stream, ok := <-attempt; ok {
				return stream, nil
			}
			return nil, errLost
		}})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { client.Run(ctx); close(done) }()
		close(<-attempts)
		const pauses = 300
		longest, total, last := time.Duration(0), time.Duration(0), time.Now()
		for i := range pauses {
			attempt := <-attempts
			pause := time.Since(last)
			last = time.Now()
			close(attempt)
			if bound := min(500*time.Millisecond<<min(i, 10), 30*time.Second); pause > bound {
				t.Errorf("pause %d is %v, want at most %v", i+1, pause, bound)
			}
			longest, total = max(longest, pause), total+pause
		}
		// Of 290 pauses between 0 and 30 s, the longest is below 25 s with a probability of 10⁻²³.
		if mean := total / pauses; longest < 25*time.Second || mean < 10*time.Second || mean > 20*time.Second {
			t.Errorf("the longest pause is %v, their mean %v; want full jitter below 30 s", longest, mean)
		}
		synctest.Wait() // until the last attempt has failed
		if status := client.Status(); status.Failures != pauses+1 {
			t.Errorf("%d failures, want %d", status.Failures, pauses+1)
		}
		stream := newMemory()
		<-attempts <- stream
		<-stream.sent
		stream.served <- encodeDelta(Clusters, "n")
		<-stream.sent
		last = time.Now()
		stream.Close()
		close(<-attempts)
		if pause := time.Since(last); pause > 500*time.Millisecond {
			t.Errorf("the pause after a good stream is %v, want at most 500 ms", pause)
		}
		cancel()
		<-done
	})
}

// The status of the server is the reason of a stream that fails while the client sends. Without one it is that of sending.
func TestTheServersStatusIsTheReason(t *testing.T) {
	for status, want := range map[error]error{errDenied: errDenied, io.EOF: io.ErrClosedPipe, nil: io.ErrClosedPipe} {
		if err := reason(refusing{status}, io.ErrClosedPipe); !errors.Is(err, want) {
			t.Errorf("status %v: error %v, want %v", status, err, want)
		}
	}
	synctest.Test(t, func(t *testing.T) {
		denied := errDenied
		client := New(Config{Delta: true, Handler: &handler{}, Log: slog.New(slog.DiscardHandler),
			Connect: func(context.Context) (Stream, error) { return refusing{denied}, nil }})
		ctx, cancel := context.WithCancel(t.Context())
		go client.Run(ctx)
		synctest.Wait()
		if err := client.Status().LastError; !errors.Is(err, denied) {
			t.Errorf("last error %v, want %v", err, denied)
		}
		cancel()
	})
}

var errDenied = errors.New("PERMISSION_DENIED: wrong namespace")

type refusing struct{ err error }

func (r refusing) Send([]byte) error        { return io.ErrClosedPipe }
func (r refusing) Receive() ([]byte, error) { return nil, r.err }
func (r refusing) Close()                   {}
