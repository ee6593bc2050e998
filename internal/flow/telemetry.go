package flow

import (
	"errors"
	"slices"
	"sync"
	"sync/atomic"
)

// Telemetry is what a control plane asks to be recorded of the connections or requests of one filter chain. It is never
// modified.
type Telemetry struct {
	Logs       []Sink // access logs
	Metrics    any    // of package metrics; nil: Istio's metrics as usual
	Unmeasured bool   // Istio's metrics do not count them

	connection Request // of the records of connections: a pointer in each would take more memory
}

// NewTelemetry returns a value that records may refer to. The arguments are the fields.
func NewTelemetry(logs []Sink, metrics any, unmeasured bool) *Telemetry {
	t := &Telemetry{Logs: logs, Metrics: metrics, Unmeasured: unmeasured}
	t.connection.Telemetry = t
	return t
}

// Ask sets what is to be recorded of a connection; nil: nothing in particular. Call it before the connection is carried.
func (r *Record) Ask(t *Telemetry) {
	if r.HTTP = &noRequest; t != nil {
		r.HTTP = &t.connection
	}
}

// Noted has the header fields that engines record. It only grows, so that the place of a field in a record stays. The zero
// value has no fields. It is safe for concurrent use; a nil one cannot grow.
type Noted struct {
	fields atomic.Pointer[Fields]
	mu     sync.Mutex // held to grow
}

// MaxNoted is how many fields of requests are recorded, and how many of responses. Each request keeps their values.
const MaxNoted = 64

var errNoted = errors.New("too many different header fields are recorded: at most 64 of requests and 64 of responses")

// NewNoted returns the fields that are recorded from the beginning.
func NewNoted(f Fields) *Noted {
	n := &Noted{}
	n.fields.Store(&f)
	return n
}

// Request returns the fields of requests, in their order. n may be nil.
func (n *Noted) Request() []string { return n.load().Request }

// Response returns the fields of responses. n may be nil.
func (n *Noted) Response() []string { return n.load().Response }

// Load returns what is recorded. n may be nil.
func (n *Noted) Load() Fields { return *n.load() }

var noFields Fields

func (n *Noted) load() *Fields {
	if n != nil {
		if f := n.fields.Load(); f != nil {
			return f
		}
	}
	return &noFields
}

// Add returns the place of a field, whose name is in lower case, in the records of messages from now on.
func (n *Noted) Add(name string, response bool) (place int, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	f := n.Load()
	list := &f.Request
	if response {
		list = &f.Response
	}
	if place = slices.Index(*list, name); place >= 0 {
		return place, nil
	}
	if place = len(*list); place >= MaxNoted {
		return -1, errNoted
	}
	*list = append(slices.Clip(*list), name)
	n.fields.Store(&f)
	return place, nil
}

// AddCertificates makes the certificates of TLS part of the records of later connections.
func (n *Noted) AddCertificates() {
	n.mu.Lock()
	defer n.mu.Unlock()
	f := n.Load()
	f.Certificates = true
	n.fields.Store(&f)
}
