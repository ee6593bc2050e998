// Package live shows current traffic: rates, latencies and errors by destination, the last hundred records, the open
// connections, and each record as it closes, as JSON, as a stream and as a page for people.
//
// It costs little without readers. A closed record is counted and copied into memory that exists already, without an
// allocation. There is no timer: each reader computes sums, rates and percentiles for itself. Everything that traffic can
// make it keep is bounded: destinations, peers, records, followers and their queues. It keeps only the header fields that
// Record names, and writes nothing to disk.
package live

import (
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
)

// The bounds of what is kept. Each direction has its own bound of destinations, so that invented host names inbound do not
// displace the hosts that the workload calls.
const (
	maxDestinations = 250 // of a direction
	maxPeers        = 100 // addresses of inbound clients
	maxHost         = 100 // bytes of a name
)

// Config configures a View.
type Config struct {
	Version        string // of the program
	Pod, Namespace string // of the workload; empty: unknown

	// SettingName returns how readers spell a setting, such as --connect-timeout for ConnectTimeout. nil: unchanged.
	SettingName func(setting string) string
}

// View shows current traffic. Make it with New and pass it to flow.NewTable. It is safe for concurrent use.
type View struct {
	config  Config
	started time.Time

	destinations [2]book  // by direction
	peers        book     // inbound clients, by address
	connections  [2]tally // by direction: connections only, counted when they open

	last      ring
	following following
	ended     chan struct{} // closed by Close
	endOnce   sync.Once
}

// New returns an empty view.
func New(config Config) *View {
	v := &View{config: config, started: time.Now(), ended: make(chan struct{})}
	for i := range v.destinations {
		v.destinations[i].limit = maxDestinations
	}
	v.peers.limit = maxPeers
	return v
}

// Close ends every stream of the handlers. An http.Server that shuts down waits for streams, so call Close first:
// server.RegisterOnShutdown(view.Close).
func (v *View) Close() { v.endOnce.Do(func() { close(v.ended) }) }

// place is where a connection keeps its *binding.
var place = flow.NewPlace()

// binding is kept with a connection: the tallies in which its flows are counted.
type binding struct {
	destination *tally // nil until the first request
	peer        *tally // nil for an outbound connection, whose peer is the workload
}

// Opened counts a connection. An opaque connection is assigned to its destination now, one of requests with its first
// request.
func (v *View) Opened(r *flow.Record) {
	second := v.second(time.Now()) // detection or dialling may have taken long
	b := v.arrive(r, second)
	if r.Protocol == flow.Opaque || r.Protocol == flow.TLS {
		b.destination = v.byAddress(r)
		b.destination.opened(second)
	}
	place.Set(r, b)
}

// arrive counts a connection on first sight.
func (v *View) arrive(r *flow.Record, second uint32) *binding {
	v.connections[r.Direction].opened(second)
	b := &binding{}
	if r.Direction == flow.Inbound {
		var buffer [64]byte
		b.peer = v.peers.find(r.Downstream.Addr().Unmap().AppendTo(buffer[:0]))
		b.peer.opened(second)
	}
	return b
}

// Closed counts a record and keeps a copy among the last.
func (v *View) Closed(r *flow.Record) {
	second := v.second(r.Opened.Add(r.Duration)) // now, without reading the clock
	b := v.bound(r, second)
	e := end{
		second:   second,
		reason:   failure(r),
		request:  r.IsRequest(),
		timed:    r.IsRequest() && !r.HTTP.Upgraded, // the time of a relay is not a latency
		duration: r.Duration,
		bytes:    r.Received.Load() + r.Sent.Load(),
	}
	b.destination.add(&e)
	if b.peer != nil {
		b.peer.add(&e)
	}
	kept := v.last.claim()
	kept.fill(r)
	v.following.send(kept, second)
	kept.mu.Unlock()
}

// Note counts a record that is not of a connection, such as a flow of datagrams, and keeps it among the last.
func (v *View) Note(protocol flow.Protocol, r *Record) {
	second := v.second(r.Time)
	e := end{second: second, reason: noFailure, bytes: r.Received + r.Sent}
	if reason, known := reasonIndex[r.Reason]; known && r.Failed {
		e.reason = reason
	}
	name := r.Authority
	if name == "" {
		name = r.Destination
	}
	v.destinations[flow.Outbound].find([]byte(name)).add(&e)
	kept := v.last.claim()
	kept.note(protocol, r)
	v.following.send(kept, second)
	kept.mu.Unlock()
}

// bound returns the tallies of a record. It looks a name up only if it differs from that of the last request on the same
// connection.
func (v *View) bound(r *flow.Record, second uint32) *binding {
	connection := r
	if r.IsRequest() {
		connection = r.Connection
	}
	b, _ := place.Get(connection).(*binding)
	if b == nil { // refused, or closed before it was carried
		b = v.arrive(connection, second)
		place.Set(connection, b)
	}
	if b.destination != nil && (!r.IsRequest() || b.destination.name == string(r.HTTP.Authority)) {
		return b
	}
	first := b.destination == nil
	b.destination = v.destination(r)
	if first {
		b.destination.opened(second)
	}
	return b
}

func (v *View) destination(r *flow.Record) *tally {
	var buffer [maxHost]byte
	if host := hostName(buffer[:0], r.HTTP.Authority); len(host) > 0 {
		return v.destinations[r.Direction].find(host)
	}
	return v.byAddress(r)
}

func (v *View) byAddress(r *flow.Record) *tally {
	address := r.OriginalDestination
	if !address.IsValid() && r.Connection != nil {
		address = r.Connection.OriginalDestination
	}
	if !address.IsValid() {
		return v.destinations[r.Direction].find([]byte(unknownName))
	}
	var buffer [64]byte
	return v.destinations[r.Direction].find(unmap(address).AppendTo(buffer[:0]))
}

// hostName appends an authority in lower case to dst. It returns nil for text that cannot be an authority.
func hostName(dst, authority []byte) []byte {
	if len(authority) > maxHost {
		return nil
	}
	for _, c := range authority {
		switch {
		case 'A' <= c && c <= 'Z':
			c += 'a' - 'A'
		case 'a' <= c && c <= 'z', '0' <= c && c <= '9', c == '.', c == '-', c == '_', c == ':', c == '[', c == ']':
		default:
			return nil
		}
		dst = append(dst, c)
	}
	return dst
}

// second is the time since the view was made, in whole seconds.
func (v *View) second(t time.Time) uint32 { return uint32(max(0, t.Sub(v.started)) / time.Second) }

func unmap(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }

// ring holds copies of the last records. Entries are reused.
type ring struct {
	next    atomic.Uint64
	entries [lastRecords]entry
}

const lastRecords = 100

// claim returns the entry of the next record, locked. It waits only if a hundred records close while one is copied.
func (l *ring) claim() *entry {
	number := l.next.Add(1)
	e := &l.entries[number%lastRecords]
	e.mu.Lock()
	e.number = number
	return e
}
