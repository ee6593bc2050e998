package xds

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pillion-proxy/pillion/internal/wire"
)

// mirror is a Handler that holds what it is given, and asks for endpoints of each cluster and routes of each listener.
// Resources with "bad" in their content are rejected.
type mirror struct {
	held   [Types]map[string]string
	wanted [Types][]string
}

func newMirror() *mirror {
	m := new(mirror)
	for t := range m.held {
		m.held[t] = map[string]string{}
	}
	return m
}

func (m *mirror) Update(u Update) Outcome {
	var outcome Outcome
	for _, r := range u.Resources {
		if strings.Contains(string(r.Value), "bad") {
			outcome.Rejected = append(outcome.Rejected, Rejected{r.Name, "bad"})
			if _, ok := m.held[u.Type][r.Name]; ok {
				continue
			}
		}
		m.held[u.Type][r.Name] = string(r.Value)
	}
	for _, name := range u.Removed {
		delete(m.held[u.Type], name)
	}
	outcome.Wanted = map[Type][]string{}
	want := func(t Type, of Type) {
		m.wanted[t] = slices.Sorted(maps.Keys(m.held[of]))
		outcome.Wanted[t] = m.wanted[t]
		maps.DeleteFunc(m.held[t], func(name, _ string) bool { return !slices.Contains(m.wanted[t], name) })
	}
	switch u.Type {
	case Clusters:
		want(Endpoints, Clusters)
		outcome.Wanted[Listeners] = nil
	case Listeners:
		want(Routes, Listeners)
		outcome.Wanted[Names] = nil
	}
	return outcome
}

// model is a control plane, as istiod serves both protocols: resources that are asked for by name always exist.
type model struct {
	delta   bool
	content [Types]map[string]string
	nonce   int

	// Of the stream.
	asked   [Types]map[string]bool // nil: not asked for. For wildcard types it is empty
	sent    [Types]map[string]string
	nonces  [Types]string
	pending []message
}

// message is a response on its way.
type message struct {
	typ   Type
	bytes []byte
}

func newModel(delta bool) *model {
	m := &model{delta: delta}
	for t := range m.content {
		m.content[t] = map[string]string{}
	}
	return m
}

func (m *model) connect() {
	m.asked, m.sent, m.nonces, m.pending = [Types]map[string]bool{}, [Types]map[string]string{}, [Types]string{}, nil
}

// named returns the content of a resource that is asked for by name.
func (m *model) named(t Type, name string) string {
	if value, ok := m.content[t][name]; ok {
		return value
	}
	return "first"
}

// view returns what a client should hold of a type.
func (m *model) view(t Type) map[string]string {
	if t.Wildcard() {
		return m.content[t]
	}
	view := map[string]string{}
	for name := range m.asked[t] {
		view[name] = m.named(t, name)
	}
	return view
}

// request takes a request of the client.
func (m *model) request(b []byte) {
	r := parseRequest(b, m.delta)
	first := m.asked[r.typ] == nil
	if first {
		m.asked[r.typ], m.sent[r.typ] = map[string]bool{}, map[string]string{}
	}
	changed := first
	if m.delta {
		for _, name := range r.held {
			m.sent[r.typ][name] = "unknown"
		}
		for _, name := range r.unsubscribe {
			delete(m.asked[r.typ], name)
			delete(m.sent[r.typ], name)
		}
		for _, name := range r.subscribe {
			m.asked[r.typ][name] = true
			m.sent[r.typ][name] = "unknown" // it is sent, whether it is held or not
		}
		changed = changed || len(r.subscribe) > 0
	} else if r.nonce == m.nonces[r.typ] {
		asked := map[string]bool{}
		for _, name := range r.names {
			asked[name] = true
		}
		changed = changed || !maps.Equal(asked, m.asked[r.typ])
		m.asked[r.typ] = asked
	}
	if changed {
		m.push(r.typ)
	}
}

// push queues a response with what has changed.
func (m *model) push(t Type) {
	if m.asked[t] == nil {
		return
	}
	view := m.view(t)
	var names []string
	for name, value := range view {
		if !m.delta || m.sent[t][name] != value {
			names = append(names, name)
		}
	}
	if m.delta {
		for name := range m.sent[t] {
			if _, ok := view[name]; !ok {
				names = append(names, "-"+name)
			}
		}
	}
	slices.Sort(names)
	m.sent[t] = maps.Clone(view)
	m.nonce++
	m.nonces[t] = fmt.Sprint(m.nonce)
	m.pending = append(m.pending, message{t, m.encode(t, m.nonces[t], names)})
}

func (m *model) encode(t Type, nonce string, names []string) []byte {
	b := wire.AppendString(nil, 4, t.URL())
	b = wire.AppendString(b, 5, nonce)
	for _, name := range names {
		if gone, ok := strings.CutPrefix(name, "-"); ok {
			b = wire.AppendString(b, 6, gone)
			continue
		}
		value := m.content[t][name]
		if !t.Wildcard() {
			value = m.named(t, name)
		}
		b = m.appendResource(b, t, name, value)
	}
	return b
}

// appendResource appends a resource. In the state of the world its name is its first field.
func (m *model) appendResource(b []byte, t Type, name, value string) []byte {
	if m.delta {
		inner := wire.AppendString(wire.AppendString(nil, 1, t.URL()), 2, value)
		return wire.AppendBytes(b, 2, wire.AppendString(wire.AppendBytes(nil, 2, inner), 3, name))
	}
	content := wire.AppendString(wire.AppendString(nil, 1, name), 2, value)
	return wire.AppendBytes(b, 2, wire.AppendBytes(wire.AppendString(nil, 1, t.URL()), 2, content))
}

// parseRequest decodes a request of either protocol.
func parseRequest(b []byte, delta bool) (r request) {
	var err error
	for m := wire.Read(b, &err); m.Next(); {
		switch {
		case delta && m.Number == deltaType, !delta && m.Number == worldType:
			r.typ, _ = parseType(m.String())
		case delta && m.Number == deltaSubscribe:
			r.subscribe = append(r.subscribe, m.String())
		case delta && m.Number == deltaUnsubscribe:
			r.unsubscribe = append(r.unsubscribe, m.String())
		case delta && m.Number == deltaInitial:
			for entry := m.Message(); entry.Next(); {
				if entry.Number == 1 {
					r.held = append(r.held, entry.String())
				}
			}
		case delta && m.Number == deltaNonce, !delta && m.Number == worldNonce:
			r.nonce = m.String()
		case !delta && m.Number == worldNames:
			r.names = append(r.names, m.String())
		}
	}
	return r
}

// history drives a client and a model by a sequence of bytes.
type history struct {
	*model
	t       *testing.T
	streams chan *memory
	stream  *memory // nil: none is open
	last    []message
	stale   bool // an old response was repeated: only a new stream mends that
}

// settle reads the client's requests until it sends no more.
func (h *history) settle() {
	for h.stream != nil {
		synctest.Wait()
		select {
		case b := <-h.stream.sent:
			h.request(b)
		case <-h.stream.closed:
			h.stream = nil
		default:
			return
		}
	}
}

func (h *history) open() {
	if h.stream == nil {
		h.stream = newMemory()
		h.connect()
		h.streams <- h.stream
	}
	h.settle()
}

// deliver passes on a response.
func (h *history) deliver(b []byte) {
	if h.settle(); h.stream == nil {
		return
	}
	select {
	case h.stream.served <- b:
	case <-h.stream.closed:
	}
	h.settle()
}

// next delivers the response at a place of the queue. Those of one type stay in order.
func (h *history) next(place int) {
	if len(h.pending) == 0 {
		return
	}
	i := place % len(h.pending)
	i = slices.IndexFunc(h.pending, func(m message) bool { return m.typ == h.pending[i].typ })
	m := h.pending[i]
	h.pending = slices.Delete(h.pending, i, i+1)
	h.last = append(h.last, m)
	h.deliver(m.bytes)
}

// play does what one byte stands for; more is a second one.
func (h *history) play(event, more byte) {
	typ := []Type{Clusters, Listeners, Endpoints, Routes}[more&3]
	name := string('a' + rune(more>>2&3))
	switch event % 16 {
	case 0, 1, 2: // a change
		h.content[typ][name] = fmt.Sprintf("v%d", h.nonce+int(more))
		h.push(typ)
	case 3:
		h.content[typ][name] = fmt.Sprintf("bad%d", h.nonce)
		h.push(typ)
	case 4, 5: // a removal
		if typ.Wildcard() {
			delete(h.content[typ], name)
		}
		h.push(typ)
	case 6: // a change that is pushed later
		h.content[typ][name] = "quiet"
	case 7, 8, 9, 10:
		h.next(int(more))
	case 11: // the last response once more
		if len(h.last) > 0 {
			h.deliver(h.last[len(h.last)-1].bytes)
		}
	case 12: // an old response once more
		if len(h.last) > 0 {
			h.stale = true
			h.deliver(h.last[int(more)%len(h.last)].bytes)
		}
	case 13: // the stream is lost, or ends in order
		if h.stream != nil {
			if more&1 == 0 {
				h.stream.Close()
			} else {
				close(h.stream.served)
			}
			h.settle()
		}
		if more&2 != 0 {
			h.open()
		}
	case 14: // hostile responses
		h.deliver([][]byte{
			{0xff}, nil, wire.AppendString(nil, 4, "type.googleapis.com/foreign"), wire.AppendString(nil, 4, Extensions.URL()),
			h.appendResource(wire.AppendString(wire.AppendString(nil, 4, Endpoints.URL()), 5, "x"), Endpoints, "foreign", "y"),
			wire.AppendString(wire.AppendString(wire.AppendString(nil, 4, Endpoints.URL()), 6, "foreign"), 6, ""),
			wire.AppendString(wire.AppendString(wire.AppendString(nil, 4, Clusters.URL()), 6, "foreign"), 5, strings.Repeat("nonce", 1000)),
		}[int(more)%7])
		h.stale = true // a response of the state of the world without a resource removes all
	case 15:
		h.open()
	}
}

// end makes an undisturbed end: all that is on its way arrives, over a new stream if an old response was repeated.
func (h *history) end() {
	for t := range h.content {
		maps.DeleteFunc(h.content[t], func(_, value string) bool { return strings.HasPrefix(value, "bad") })
	}
	if h.stale && h.stream != nil {
		h.stream.Close()
		h.settle()
	}
	h.open()
	for _, t := range []Type{Clusters, Endpoints, Listeners, Routes} {
		h.push(t)
		for len(h.pending) > 0 {
			h.next(0)
		}
	}
}

// runHistory plays events, and checks that the client and its handler hold at the end what the control plane has.
func runHistory(t *testing.T, delta bool, events []byte) {
	synctest.Test(t, func(t *testing.T) {
		handler := newMirror()
		h := &history{model: newModel(delta), t: t, streams: make(chan *memory)}
		client := New(Config{
			Delta: delta, Node: []byte("node"), Handler: handler, Log: slog.New(slog.DiscardHandler), MinBackoff: 1, MaxBackoff: 1,
			Connect: func(ctx context.Context) (Stream, error) {
				select {
				case stream := <-h.streams:
					return stream, nil
				case <-ctx.Done():
					return nil, ctx.Err()
				}
			},
		})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { client.Run(ctx); close(done) }()
		h.open()
		for i := 0; i+1 < len(events); i += 2 {
			h.play(events[i], events[i+1])
		}
		h.end()
		for _, typ := range []Type{Clusters, Endpoints, Listeners, Routes} {
			want := maps.Clone(h.content[typ])
			if !typ.Wildcard() {
				want = map[string]string{}
				of := map[Type]Type{Endpoints: Clusters, Routes: Listeners}[typ]
				for name := range h.content[of] {
					want[name] = h.named(typ, name)
				}
			}
			got := map[string]string{}
			for name, value := range handler.held[typ] {
				if !delta {
					var err error
					for m := wire.Read([]byte(value), &err); m.Next(); {
						value = m.String()
					}
				}
				got[name] = value
			}
			held := sorted(client.session.types[typ].held)
			if !maps.Equal(got, want) || !slices.Equal(held, slices.Sorted(maps.Keys(want))) {
				t.Errorf("%v: handler has %v, session has %q, want %v", typ, got, held, want)
			}
		}
		if !client.Status().Connected {
			t.Error("not connected")
		}
		cancel()
		<-done
	})
}

// After any history of changes, losses, repetitions and hostile responses, an undisturbed stream leads to the same state.
func TestAnyHistoryLeadsToTheControlPlanesState(t *testing.T) {
	for seed := range uint64(400) {
		random := rand.New(rand.NewPCG(seed, 0))
		events := make([]byte, 2*random.IntN(60))
		for i := range events {
			events[i] = byte(random.Uint32())
		}
		if runHistory(t, seed%2 == 0, events); t.Failed() {
			t.Fatalf("seed %d: delta %v, events %v", seed, seed%2 == 0, events)
		}
	}
}

func FuzzHistory(f *testing.F) {
	f.Add(true, []byte{0, 0, 7, 0, 7, 0, 13, 2, 4, 0, 7, 0})
	f.Add(false, []byte{0, 0, 7, 0, 0, 1, 7, 0, 11, 0, 13, 3, 12, 0, 14, 3})
	f.Fuzz(func(t *testing.T, delta bool, events []byte) {
		if len(events) > 400 {
			return
		}
		runHistory(t, delta, events)
	})
}

// Responses with too many names end the stream; what was held stays.
func TestTheNamesOfAResponseAreBounded(t *testing.T) {
	for _, field := range []int{2, 6} {
		many := wire.AppendString(wire.AppendString(nil, 4, Clusters.URL()), 5, "n")
		for range maxNames + 1 {
			many = wire.AppendString(many, field, "")
		}
		if _, err := decode(many, true); err == nil || !strings.Contains(err.Error(), "more than 250000 resources") {
			t.Errorf("field %d: error %v", field, err)
		}
	}
	s := newSession(true, nil)
	full := &response{typ: Clusters}
	for i := range maxNames {
		full.resources = append(full.resources, Resource{Name: fmt.Sprint(i)})
	}
	if err := s.receive(full); err != nil {
		t.Fatal(err)
	}
	if err := s.receive(&response{typ: Clusters, resources: resources("0", "1")}); err != nil {
		t.Errorf("resources that are held: error %v", err)
	}
	if err := s.receive(&response{typ: Clusters, resources: resources("another")}); err == nil || len(s.types[Clusters].held) != maxNames {
		t.Errorf("error %v with %d resources", err, len(s.types[Clusters].held))
	}
	if err := s.receive(&response{typ: Clusters, removed: []string{"0", "0", "foreign"}}); err != nil {
		t.Error(err)
	}
	if err := s.receive(&response{typ: Clusters, resources: resources("another")}); err != nil {
		t.Error(err)
	}
}

// A control plane that accepts the stream and does not answer may be busy with others: istiod admits a few streams a second.
// The client waits, and does not count as connected.
func TestASilentControlPlaneIsNotConnected(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, streams, cancel, log := start(t, &handler{})
		stream := newMemory()
		streams <- stream
		expect(t, stream, "CDS node")
		time.Sleep(time.Hour)
		synctest.Wait()
		if status := client.Status(); status.Connected || !status.Since.IsZero() || strings.Contains(log.String(), "connected") {
			t.Errorf("status %+v, log\n%s", status, log)
		}
		cancel()
		<-stream.closed
	})
}

func TestTheMethodIsThatOfTheProtocol(t *testing.T) {
	const service = "/envoy.service.discovery.v3.AggregatedDiscoveryService/"
	if delta, world := Method(true), Method(false); delta != service+"DeltaAggregatedResources" || world != service+"StreamAggregatedResources" {
		t.Errorf("%s, %s", delta, world)
	}
}

// The control plane identifies itself in responses, and is shown by its last identifier.
func TestTheControlPlaneIsShownByItsIdentifier(t *testing.T) {
	identified := func(number int, name string) []byte {
		b := wire.AppendString(wire.AppendString(nil, 4, Clusters.URL()), 5, "n")
		if name == "" {
			return b
		}
		return wire.AppendBytes(b, number, wire.AppendString(nil, 1, name))
	}
	for delta, number := range map[bool]int{true: 7, false: 6} {
		for name, want := range map[string]string{"istiod-1": "istiod-1", "": "", strings.Repeat("n", maxServer+1): strings.Repeat("n", maxServer)} {
			if r, err := decode(identified(number, name), delta); err != nil || r.server != want {
				t.Errorf("delta %v, %.10s: server %.10s, error %v", delta, name, r.server, err)
			}
		}
	}
	synctest.Test(t, func(t *testing.T) {
		client, streams, cancel, _ := start(t, &handler{})
		defer cancel()
		stream := newMemory()
		streams <- stream
		<-stream.sent
		for _, name := range []string{"istiod-1", ""} {
			stream.served <- identified(7, name)
			<-stream.sent
		}
		synctest.Wait()
		if server := client.Status().Server; server != "istiod-1" {
			t.Errorf("server %q", server)
		}
	})
}
