// Package flow is the record of one connection, or of one HTTP request: who, where, what, how much, and why it ended.
//
// A connection in which requests are seen has a record for each of them, and none of its own. Whoever owns the
// connection or the request opens its record and closes it exactly once, whatever happens. Logs and metrics only read
// it.
package flow

import (
	"net/netip"
	"sync/atomic"
	"time"
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
// record on; Received and Sent move while it is open and may be read from anywhere.
type Record struct {
	Direction           Direction
	Protocol            Protocol
	Opened              time.Time
	Downstream          netip.AddrPort // who connected
	OriginalDestination netip.AddrPort // invalid when it could not be read
	UpstreamLocal       netip.AddrPort // our end of the upstream connection; invalid when there is none
	Received            atomic.Uint64  // bytes from downstream that upstream's socket took; of a request, its body's
	Sent                atomic.Uint64  // bytes that downstream's socket took; of a response, its body's

	TLS  Hello   // of a TLS connection
	HTTP Request // of a request

	// Set by Close.
	Duration time.Duration
	Reason   Reason
	Err      error // what went wrong, nil for an ordinary end
}

// Hello is what a TLS client says in the clear before the rest is secret.
type Hello struct {
	ServerName string
	ALPN       []string
}

// Request is what is seen of a request and its response. The byte slices belong to the engine: they are valid until
// Sink.Closed returns.
type Request struct {
	Method, Path, Authority, ID []byte
	Status                      int           // of the response that downstream got; 0 when it got none
	GRPCStatus                  []byte        // as it stood in the response's fields; nil when it did not
	Flags                       string        // Envoy's response flags, such as "UF"; empty for none
	Details                     string        // Envoy's response_code_details, such as "via_upstream"
	Upgraded                    bool          // the connection went on as a relay
	ServiceTime                 time.Duration // from the end of dialling to the head of the response
}

// Sink takes records that are closed. Closed is called once for each record, from the goroutine that owned the
// connection; it must not block and must not keep the record after it returns.
type Sink interface {
	Closed(*Record)
}

// Open begins a record now.
func Open(direction Direction, downstream netip.AddrPort) *Record {
	return &Record{Direction: direction, Opened: time.Now(), Downstream: downstream}
}

// Close ends the record and hands it to sink. A second call is a mistake of the caller and panics: one connection must
// never be counted twice.
func (r *Record) Close(sink Sink, reason Reason, err error) {
	if r.Reason != "" {
		panic("flow: record closed twice, first as " + string(r.Reason) + ", then as " + string(reason))
	}
	r.Duration = time.Since(r.Opened)
	r.Reason, r.Err = reason, err
	sink.Closed(r)
}
