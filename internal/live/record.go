package live

import (
	"cmp"
	"net/netip"
	"sync"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
)

// Record is a closed connection or request, in JSON. The names are stable. Fields that do not apply are absent.
type Record struct {
	Number      uint64    `json:"number"`    // of this agent's records, from 1
	Time        time.Time `json:"time"`      // when it ended
	Direction   string    `json:"direction"` // inbound or outbound
	Protocol    string    `json:"protocol"`  // opaque, TLS, HTTP/1.0, HTTP/1.1 or HTTP/2
	Request     bool      `json:"request"`   // a request, as opposed to a connection
	Downstream  string    `json:"downstream,omitempty"`
	Destination string    `json:"destination,omitempty"` // the original destination
	Upstream    string    `json:"upstream,omitempty"`    // the address dialled
	Cluster     string    `json:"cluster,omitempty"`     // where it was sent, by Envoy's name
	Route       string    `json:"route,omitempty"`       // that chose the cluster
	Method      string    `json:"method,omitempty"`
	Path        string    `json:"path,omitempty"` // with its query
	Authority   string    `json:"authority,omitempty"`
	Status      int       `json:"status,omitempty"`     // of the response to downstream
	GRPCStatus  string    `json:"grpcStatus,omitempty"` // as received
	Flags       string    `json:"flags,omitempty"`      // Envoy's response flags
	Details     string    `json:"details,omitempty"`    // Envoy's response_code_details, or connection_termination_details
	DryRun      string    `json:"dryRun,omitempty"`     // what policies that are not enforced would do
	Policies    string    `json:"policies,omitempty"`   // why they deny it, a line for each, if a reader followed records then
	Reason      string    `json:"reason"`               // a flow.Reason
	Failed      bool      `json:"failed,omitempty"`     // it counts as an error
	Failure     string    `json:"failure,omitempty"`    // why the dial failed
	DurationMS  float64   `json:"durationMs"`           // from begin to end
	ServiceMS   float64   `json:"serviceMs,omitempty"`  // until the head of upstream's response
	Received    uint64    `json:"received"`             // bytes from downstream; of a request, its body's
	Sent        uint64    `json:"sent"`                 // bytes to downstream; of a response, its body's
	RequestID   string    `json:"requestId,omitempty"`
	UserAgent   string    `json:"userAgent,omitempty"`
	SNI         string    `json:"sni,omitempty"`   // of a TLS connection
	Error       string    `json:"error,omitempty"` // in full, of a record by Of
}

// Cause returns the reason of a record that counts as an error, or "" if only its status makes it one.
func (r *Record) Cause() string {
	if !r.Failed || r.Reason == string(flow.Completed) {
		return ""
	}
	return r.Reason
}

// entry is a copy of a flow.Record in reused memory.
type entry struct {
	mu     sync.Mutex
	number uint64 // 0: empty

	closed                            time.Time
	direction                         flow.Direction
	protocol                          flow.Protocol
	request, failed                   bool
	downstream, destination, upstream netip.AddrPort
	status                            int
	flags, details, failure, sni      string
	cluster, route                    string
	reason                            flow.Reason
	duration, service                 time.Duration
	received, sent                    uint64
	dryRun                            *flow.DryRun

	text [words]span
	used int
	room [textBytes]byte
}

// span is a part of an entry's room.
type span struct{ from, to uint16 }

// The copied values, and the maximum number of bytes of each.
const (
	method = iota
	path
	authority
	requestID
	userAgent
	grpcStatus
	words
)

var longest = [words]int{method: 24, path: 256, authority: maxHost, requestID: 64, userAgent: 128, grpcStatus: 8}

const (
	cutMark   = "…" // end of a value that was too long
	textBytes = 24 + 256 + maxHost + 64 + 128 + 8 + words*len(cutMark)
)

// fill copies a record. Its byte slices are only valid during the call.
func (e *entry) fill(r *flow.Record) {
	connection := r
	if r.IsRequest() {
		connection = r.Connection
	}
	h := r.HTTP
	e.closed = r.Opened.Add(r.Duration)
	e.direction, e.protocol = r.Direction, r.Protocol
	e.request, e.failed = r.IsRequest(), failure(r) != noFailure
	e.downstream, e.destination, e.upstream = r.Downstream, r.OriginalDestination, r.Upstream
	if !e.destination.IsValid() {
		e.destination = connection.OriginalDestination
	}
	e.status, e.flags, e.details = h.Status, r.Flags(), cmp.Or(r.Details(), r.TerminationDetails())
	e.reason, e.failure, e.sni = r.Reason, r.TransportFailure, connection.TLS().ServerName
	e.cluster, e.route, e.dryRun = r.Cluster, r.Route, h.DryRun
	e.duration, e.service = r.Duration, h.ServiceTime
	e.received, e.sent = r.Received.Load(), r.Sent.Load()
	e.used = 0
	e.put(method, h.Method)
	e.put(path, h.Path)
	e.put(authority, h.Authority)
	e.put(requestID, h.ID)
	e.put(userAgent, h.UserAgent)
	e.put(grpcStatus, h.GRPCStatus)
}

// note copies a record that is not of a connection.
func (e *entry) note(protocol flow.Protocol, r *Record) {
	var none flow.Record
	none.HTTP, none.Direction, none.Protocol = new(flow.Request), flow.Outbound, protocol
	e.fill(&none)
	e.closed, e.failed, e.reason, e.failure = r.Time, r.Failed, flow.Reason(r.Reason), r.Failure
	e.downstream, _ = netip.ParseAddrPort(r.Downstream)
	e.destination, _ = netip.ParseAddrPort(r.Destination)
	e.duration = time.Duration(r.DurationMS * float64(time.Millisecond))
	e.received, e.sent = r.Received, r.Sent
	e.used = 0
	e.put(authority, []byte(r.Authority))
}

func (e *entry) put(word int, value []byte) {
	from := e.used
	if limit := longest[word]; len(value) > limit {
		e.used += copy(e.room[e.used:], value[:limit])
		e.used += copy(e.room[e.used:], cutMark)
	} else {
		e.used += copy(e.room[e.used:], value)
	}
	e.text[word] = span{uint16(from), uint16(e.used)}
}

func (e *entry) get(word int) []byte { return e.room[e.text[word].from:e.text[word].to] }

// record returns a copy of an entry as a Record.
func (e *entry) record() Record {
	return Record{
		Number:      e.number,
		Time:        e.closed.Round(0),
		Direction:   e.direction.String(),
		Protocol:    e.protocol.String(),
		Request:     e.request,
		Downstream:  show(e.downstream),
		Destination: show(e.destination),
		Upstream:    show(e.upstream),
		Cluster:     e.cluster,
		Route:       e.route,
		Method:      string(e.get(method)),
		Path:        string(e.get(path)),
		Authority:   string(e.get(authority)),
		Status:      e.status,
		GRPCStatus:  string(e.get(grpcStatus)),
		Flags:       e.flags,
		Details:     e.details,
		DryRun:      e.dryRun.String(),
		Policies:    e.dryRun.Explanation(),
		Reason:      string(e.reason),
		Failed:      e.failed,
		Failure:     e.failure,
		DurationMS:  milliseconds(e.duration),
		ServiceMS:   milliseconds(e.service),
		Received:    e.received,
		Sent:        e.sent,
		RequestID:   string(e.get(requestID)),
		UserAgent:   string(e.get(userAgent)),
		SNI:         e.sni,
	}
}

// records returns the last records that match a filter, the oldest first.
func (l *ring) records(filter *Filter) []Record {
	list := []Record{}
	newest := l.next.Load()
	for number := max(lastRecords, newest) - lastRecords + 1; number <= newest; number++ {
		e := &l.entries[number%lastRecords]
		e.mu.Lock()
		if e.number == number && filter.matches(e) { // else a younger record has overwritten it
			list = append(list, e.record())
		}
		e.mu.Unlock()
	}
	return list
}

func show(a netip.AddrPort) string {
	if !a.IsValid() {
		return ""
	}
	return unmap(a).String()
}

// milliseconds returns d with a precision of a microsecond.
func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// Of returns a closed record with all values in full. Its number is 0. It allocates.
func Of(r *flow.Record) Record {
	connection := r
	if r.IsRequest() {
		connection = r.Connection
	}
	destination := r.OriginalDestination
	if !destination.IsValid() {
		destination = connection.OriginalDestination
	}
	message := ""
	if r.Err != nil {
		message = r.Err.Error()
	}
	return Record{
		Time:        r.Opened.Add(r.Duration).Round(0),
		Direction:   r.Direction.String(),
		Protocol:    r.Protocol.String(),
		Request:     r.IsRequest(),
		Downstream:  show(r.Downstream),
		Destination: show(destination),
		Upstream:    show(r.Upstream),
		Cluster:     r.Cluster,
		Route:       r.Route,
		Method:      string(r.HTTP.Method),
		Path:        string(r.HTTP.Path),
		Authority:   string(r.HTTP.Authority),
		Status:      r.HTTP.Status,
		GRPCStatus:  string(r.HTTP.GRPCStatus),
		Flags:       r.Flags(),
		Details:     r.Details(),
		DryRun:      r.HTTP.DryRun.String(),
		Policies:    r.HTTP.DryRun.Explanation(),
		Reason:      string(r.Reason),
		Failed:      failure(r) != noFailure,
		Failure:     r.TransportFailure,
		DurationMS:  milliseconds(r.Duration),
		ServiceMS:   milliseconds(r.HTTP.ServiceTime),
		Received:    r.Received.Load(),
		Sent:        r.Sent.Load(),
		RequestID:   string(r.HTTP.ID),
		UserAgent:   string(r.HTTP.UserAgent),
		SNI:         connection.TLS().ServerName,
		Error:       message,
	}
}
