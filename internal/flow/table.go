package flow

import "sync"

// Table is where the agent's open connections stand, and from where its sinks are told. Make it with NewTable; it is safe
// for use from anywhere. It is a Sink itself, which passes on what it is told.
type Table struct {
	sinks   []Sink
	openers []Opener

	mu    sync.Mutex
	first *Record
	count int
}

// Sink takes records that are closed. Closed is called once for each record, from the goroutine that owned the
// connection; it must not block and must not keep the record after it returns.
type Sink interface {
	Closed(*Record)
}

// Opener is a Sink that is also told when a connection begins to be carried: its protocol is known, and an opaque one has
// its upstream. It is called from the goroutine that owns the connection, and may keep in Bound what it will want at the
// end.
type Opener interface {
	Sink
	Opened(*Record)
}

// NewTable makes a table whose sinks are told in the order given.
func NewTable(sinks ...Sink) *Table {
	t := &Table{sinks: sinks}
	for _, sink := range sinks {
		if opener, ok := sink.(Opener); ok {
			t.openers = append(t.openers, opener)
		}
	}
	return t
}

// List shows a connection to Each, from now until it is closed or leaves. Its owner has set Direction, Opened,
// Downstream and OriginalDestination, and does not change them any more.
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

// Carry says what a listed connection speaks: it begins to be carried. From here on its owner changes no plain field
// until it is closed.
func (t *Table) Carry(r *Record, protocol Protocol, hello Hello) {
	r.Protocol, r.TLS = protocol, hello // nobody reads them before the connection is carried
	for _, opener := range t.openers {
		opener.Opened(r)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	r.carried = true
}

// Leave takes a connection of requests out. It has no end of its own that sinks are told: each request had one.
func (t *Table) Leave(r *Record) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !r.listed {
		return
	}
	r.listed = false
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

// Closed tells the sinks. Record.Close has taken the record out.
func (t *Table) Closed(r *Record) {
	for _, sink := range t.sinks {
		sink.Closed(r)
	}
}

// Open is how many connections are listed.
func (t *Table) Open() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.count
}

// Each calls f for each listed connection, the youngest first, until f returns false. f may read what List names, and the
// counters; when the connection is Carried, all of it: what Close sets is not set yet. It must be quick, as nobody opens or
// closes a connection meanwhile, and must not keep the record.
func (t *Table) Each(f func(*Record) bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for r := t.first; r != nil; r = r.next {
		if !f(r) {
			return
		}
	}
}
