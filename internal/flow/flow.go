// Package flow is the record of one connection: who, where, how much, and why it ended.
//
// A room opens a record when it owns a connection and closes it exactly once, whatever happens. Logs and metrics only
// read it.
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

// Record tells of one connection. The goroutine that owns the connection writes the plain fields before it hands the
// record on; Received and Sent move while the connection is open and may be read from anywhere.
type Record struct {
	Direction           Direction
	Opened              time.Time
	Downstream          netip.AddrPort // who connected
	OriginalDestination netip.AddrPort // invalid when it could not be read
	UpstreamLocal       netip.AddrPort // our end of the upstream connection; invalid when there is none
	Received            atomic.Uint64  // bytes from downstream that upstream's socket took
	Sent                atomic.Uint64  // bytes from upstream that downstream's socket took

	// Set by Close.
	Duration time.Duration
	Reason   Reason
	Err      error // what went wrong, nil for an ordinary end
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
