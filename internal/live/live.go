// Package live shows what is happening now: rates, latencies and errors by destination, the last hundred records, the
// open connections, and each record as it closes, as JSON, as a stream and as a page for people.
//
// It costs little when nobody looks. A record that closes is counted and copied into places that exist already, without
// an allocation; nothing ticks, and sums, rates and percentiles are made by whoever asks for them. All that traffic can
// make it keep has a bound: names of destinations, peers, records, followers and their queues. It keeps no field values
// but those which Record names, and it forgets everything when the agent ends.
package live

import (
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
)

// The bounds of what is kept. Destinations are bounded for each direction apart, so that strangers who invent host names
// inbound do not take the places of where the workload calls.
const (
	maxDestinations = 250 // of a direction
	maxPeers        = 100 // addresses from which the workload is called
	maxHost         = 100 // bytes of a name
)

// Config is what a View is made with.
type Config struct {
	Version string // of the program

	// SettingName spells a setting for people, such as --connect-timeout for ConnectTimeout. nil: as it is.
	SettingName func(setting string) string
}

// View shows current traffic. Make it with New and pass it to flow.NewTable. It is safe for concurrent use.
type View struct {
	version string
	started time.Time
	setting func(string) string

	destinations [2]book  // by direction
	peers        book     // who calls the workload, by address
	connections  [2]tally // by direction: connections only, counted when they open

	last      ring
	following following
	ended     chan struct{} // closed by Close
	endOnce   sync.Once
}

// New returns an empty view.
func New(config Config) *View {
	v := &View{version: config.Version, setting: config.SettingName, started: time.Now(), ended: make(chan struct{})}
	for i := range v.destinations {
		v.destinations[i].limit = maxDestinations
	}
	v.peers.limit = maxPeers
	return v
}

// Close ends every stream that the handlers serve. An http.Server that is shut down waits for them:
// server.RegisterOnShutdown(view.Close).
func (v *View) Close() { v.endOnce.Do(func() { close(v.ended) }) }

// place is where a connection keeps its *binding.
var place = flow.NewPlace()

// binding is kept with a connection: the tallies in which its flows are counted.
type binding struct {
	destination *tally // nil until the first request
	peer        *tally // nil for an outbound connection: that is the workload
}

// Opened counts a connection. An opaque one is its destination's from now on; one of requests, with its first request.
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
	second := v.second(r.Opened.Add(r.Duration)) // now, without asking the clock again
	b := v.bound(r, second)
	e := end{
		second:   second,
		reason:   failure(r),
		request:  r.IsRequest(),
		timed:    r.IsRequest() && !r.HTTP.Upgraded, // a relay's time is no latency
		duration: r.Duration,
		bytes:    r.Received.Load() + r.Sent.Load(),
	}
	b.destination.add(&e)
	if b.peer != nil {
		b.peer.add(&e)
	}
	kept := v.last.claim()
	kept.fill(r)
	v.following.tell(kept, second)
	kept.mu.Unlock()
}

// bound returns where the record is counted. It looks a name up only when the one of the last request on the same
// connection does not fit.
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

// hostName appends an authority in lower case to dst; nothing if it does not look like one.
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

// ring holds copies of the last records, in places that are used again and again.
type ring struct {
	next    atomic.Uint64
	entries [lastRecords]entry
}

const lastRecords = 100

// claim returns the place of the next record, locked. Two hundred records would have to close meanwhile for two to meet.
func (l *ring) claim() *entry {
	number := l.next.Add(1)
	e := &l.entries[number%lastRecords]
	e.mu.Lock()
	e.number = number
	return e
}
