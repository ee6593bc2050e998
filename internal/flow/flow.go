// Package flow is the record of one connection, or of one HTTP request: who, where, what, how much, and why it ended.
//
// Whoever owns the connection or the request opens its record and closes it exactly once, whatever happens. Logs and
// metrics only read it. A connection in which requests are seen has a record for each of them, which is told; its own
// stands in the Table while it is open and then leaves untold.
package flow

import (
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/pillion-proxy/pillion/internal/envoy"
)

// Direction is the way in which a connection was opened, seen from the workload.
type Direction uint8

// The two directions.
const (
	Inbound  Direction = iota // others opened it to the workload
	Outbound                  // the workload opened it
)

func (d Direction) String() string {
	if d == Inbound {
		return "inbound"
	}
	return "outbound"
}

// Passthrough returns the cluster that stands for everything the direction carries to its original destination.
func (d Direction) Passthrough() string {
	if d == Inbound {
		return envoy.InboundPassthroughCluster
	}
	return envoy.PassthroughCluster
}

// Protocol is what was seen in the bytes.
type Protocol uint8

// The protocols. Opaque and TLS records tell of a connection, the others of one request.
const (
	Opaque Protocol = iota
	TLS
	HTTP10
	HTTP11
	HTTP2
)

// String is the protocol's name, as Envoy's %PROTOCOL% has it where it has one.
func (p Protocol) String() string {
	return [...]string{"opaque", "TLS", "HTTP/1.0", "HTTP/1.1", "HTTP/2"}[p]
}

// Record tells of one connection or request. The goroutine that owns it writes the plain fields before it hands the
// record on; the counters move while it is open and may be read from anywhere.
type Record struct {
	Direction           Direction
	Protocol            Protocol
	listed, carried     bool // of the table; here, where they take no memory
	Opened              time.Time
	Downstream          netip.AddrPort // who connected
	OriginalDestination netip.AddrPort // invalid when it could not be read
	Upstream            netip.AddrPort // where a connection was made, or tried; invalid when that was not come to
	UpstreamLocal       netip.AddrPort // our end of the upstream connection; invalid when there is none
	TransportFailure    string         // why there is none, in Envoy's words; empty for no failure
	Cluster             string         // where it was sent, by Envoy's name; empty if nowhere. See package envoy
	Route               string         // the route that chose Cluster: a request's, or all of a connection's requests'
	Peer                string         // identity that TLS verified of the other side; empty: not authenticated
	Received            atomic.Uint64  // bytes from downstream that upstream's socket took; of a request, its body's
	Sent                atomic.Uint64  // bytes that downstream's socket took; of a response, its body's
	Requests            atomic.Uint64  // of a connection: requests that have ended

	TLS  Hello   // of a TLS connection
	HTTP Request // of a request

	// Of a request: the connection on which it came, which counts the bytes of all of them. nil for a connection.
	Connection *Record

	// Of a connection: what sinks keep with it. See Place.
	bound [maxPlaces]any

	// Set by Close.
	Duration time.Duration
	Reason   Reason
	Err      error // what went wrong, nil for an ordinary end

	next, previous *Record // of the table
}

// Hello is what a TLS client says in the clear before the rest is secret.
type Hello struct {
	ServerName string
	ALPN       []string
}

// Request is what is seen of a request and its response. The byte slices belong to the engine: they are valid until
// Sink.Closed returns. Those of fields are nil when the message has no such field, and its first one otherwise.
type Request struct {
	Method, Path, Authority, ID []byte
	UserAgent, ForwardedFor     []byte        // as downstream sent them; several lines of the second, joined by commas
	Fields, ResponseFields      [][]byte      // what Fields names, in its order
	Status                      int           // of the response that downstream got; 0 when it got none
	GRPC                        bool          // by the request's content-type
	Upgraded                    bool          // the connection went on as a relay
	GRPCStatus                  []byte        // as it stood in the response's fields or trailers
	Messages, ResponseMessages  uint64        // of gRPC, over HTTP/2
	Flags                       string        // Envoy's response flags, where the engine knows more than the reason says
	Details                     string        // Envoy's response_code_details, likewise
	ServiceTime                 time.Duration // from the end of dialling to the head of the response; with Status from upstream
}

// Fields names the fields, in lower case, whose values records carry beside those that a Request always has.
type Fields struct{ Request, Response []string }

// IsRequest reports whether the record tells of a request, and not of a connection.
func (r *Record) IsRequest() bool { return r.Connection != nil }

// Carried reports, inside Table.Each, whether the protocol is known and bytes move.
func (r *Record) Carried() bool { return r.carried }

// Flags returns Envoy's response flags, such as "UF,URX"; empty for none. They are there when the record is closed.
func (r *Record) Flags() string {
	if r.HTTP.Flags != "" || r.Reason == Completed { // which has none, and is what nearly all are
		return r.HTTP.Flags
	}
	e := explanations[r.Reason]
	switch {
	case e == nil:
		return "" // it has not ended
	case r.IsRequest():
		return e.RequestFlags
	}
	return e.Flags
}

// Details returns Envoy's response_code_details, such as "via_upstream"; empty for a connection, which has none.
func (r *Record) Details() string {
	if r.HTTP.Details != "" || !r.IsRequest() {
		return r.HTTP.Details
	}
	if e := explanations[r.Reason]; e != nil {
		return e.Details
	}
	return ""
}

// Open begins a record now.
func Open(direction Direction, downstream netip.AddrPort) *Record {
	return &Record{Direction: direction, Opened: time.Now(), Downstream: downstream}
}

// Close ends the record and hands it to sink; a Table first takes it out, so that nobody who looks at what is open sees it
// half closed. A second call is a mistake of the caller and panics: one connection must
// never be counted twice.
func (r *Record) Close(sink Sink, reason Reason, err error) {
	if r.Reason != "" {
		panic("flow: record closed twice, first as " + string(r.Reason) + ", then as " + string(reason))
	}
	if table, ok := sink.(*Table); ok {
		table.Leave(r) // whoever looks at the open ones must not see an end that is being written
	}
	r.Duration = time.Since(r.Opened)
	r.Reason, r.Err = reason, err
	if c := r.Connection; c != nil {
		c.Requests.Add(1)
	}
	sink.Closed(r)
}
