package flow

import (
	"slices"
	"sync"
)

// Table lists the open connections and passes each closed record to the sinks. Make it with NewTable. It is safe for
// concurrent use.
type Table struct {
	sinks   []Sink
	openers []Opener
	watched []watched

	mu    sync.Mutex
	first *Record
	count int
}

// Sink receives closed records. Closed is called once for each record, from the goroutine that owned the connection. It
// must not block, and must not keep the record after it returns.
type Sink interface {
	Closed(*Record)
}

// Opener is a Sink that is also notified when a connection begins to be carried. The protocol is known by then, and an
// opaque connection has its upstream. Opened is called from the goroutine that owns the connection. It may keep a value
// with the connection, in a Place.
type Opener interface {
	Sink
	Opened(*Record)
}

// watched is a Sink whose readers may follow records. Followed may be called from any goroutine.
type watched interface{ Followed() bool }

// NewTable returns a table that calls the sinks in the given order.
func NewTable(sinks ...Sink) *Table {
	t := &Table{sinks: sinks}
	for _, sink := range sinks {
		if opener, ok := sink.(Opener); ok {
			t.openers = append(t.openers, opener)
		}
		if w, ok := sink.(watched); ok {
			t.watched = append(t.watched, w)
		}
	}
	return t
}

// Followed reports whether a reader follows records as they close: explanations are made only then.
func (t *Table) Followed() bool {
	return slices.ContainsFunc(t.watched, watched.Followed)
}

// List makes a connection visible to Each until it is closed or leaves. Its owner has set Direction, Opened, Downstream
// and OriginalDestination, and must not change them afterwards.
func (t *Table) List(r *Record) {
	t.mu.Lock()
	defer t.mu.Unlock()
	r.listed = true
	if r.next = t.first; r.next != nil {
		r.next.previous = r
	}
	t.first = r
	t.count++
}

// Carry sets the protocol of a listed connection when its bytes begin to be carried. From here until Close its owner must
// not change plain fields.
func (t *Table) Carry(r *Record, protocol Protocol, hello Hello) {
	r.Protocol = protocol // like hello, not read before carried is set
	r.SetTLS(hello)
	for _, opener := range t.openers {
		opener.Opened(r)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	r.carried = true
}

// Leave removes a connection of requests. Sinks do not receive its record: each request had its own.
func (t *Table) Leave(r *Record) {
	if !r.listed { // only the owner writes listed; requests are never listed and need no lock
		return
	}
	r.listed = false
	t.mu.Lock()
	defer t.mu.Unlock()
	if r.next != nil {
		r.next.previous = r.previous
	}
	if r.previous != nil {
		r.previous.next = r.next
	} else {
		t.first = r.next
	}
	r.next, r.previous = nil, nil
	t.count--
}

// Closed passes the record to the sinks, those of its Telemetry first. Record.Close has removed it from the table.
func (t *Table) Closed(r *Record) {
	if t := r.HTTP.Telemetry; t != nil {
		for _, log := range t.Logs {
			log.Closed(r)
		}
	}
	for _, sink := range t.sinks {
		sink.Closed(r)
	}
}

// Open returns the number of listed connections.
func (t *Table) Open() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.count
}

// Each calls f for each listed connection, the youngest first, until f returns false. f may read the fields that List
// names and the counters, and every field if the connection is Carried; the fields that Close sets are zero. f must be
// quick, because no connection can be opened or closed meanwhile, and must not keep the record.
func (t *Table) Each(f func(*Record) bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for r := t.first; r != nil; r = r.next {
		if !f(r) {
			return
		}
	}
}
