// Package flow is the record of one connection or one HTTP request: who, where, what, how much, and why it ended.
//
// The owner of a connection or request opens its record and closes it exactly once, whatever happens. Sinks, such as the
// access log and the metrics, only read it. If requests are seen in a connection, each request has its own record. Only
// the records of requests are reported then; the connection's record is listed in the Table while open.
package flow

import (
	"net/netip"
	"strings"
	"sync/atomic"
	"time"

	"github.com/pillion-proxy/pillion/internal/envoy"
)

// Direction is inbound or outbound, from the point of view of the workload.
type Direction uint8

// The two directions.
const (
	Inbound  Direction = iota // a peer connected to the workload
	Outbound                  // the workload connected to a peer
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

// Protocol is the detected protocol.
type Protocol uint8

// The protocols. Records of Opaque and TLS describe a connection, the others one request.
const (
	Opaque Protocol = iota
	TLS
	HTTP10
	HTTP11
	HTTP2
	UDP // of listed flows of datagrams, and of live records, as DNS
	DNS
)

// String returns the protocol's name. For HTTP it is the value of Envoy's %PROTOCOL%.
func (p Protocol) String() string {
	return [...]string{"opaque", "TLS", "HTTP/1.0", "HTTP/1.1", "HTTP/2", "UDP", "DNS"}[p]
}

// Record describes one connection or request. The goroutine that owns it writes the plain fields before it passes the
// record on. The counters change while it is open and may be read from any goroutine.
type Record struct {
	Direction           Direction
	Protocol            Protocol
	listed, carried     bool  // of the table; here, where they take no memory
	Gateway             bool  // of a connection that a gateway has accepted; its Direction is Outbound
	Attempts            uint8 // to reach upstream: dials, and requests on open connections; 0: no attempt
	Opened              time.Time
	Downstream          netip.AddrPort // who connected; of a request, or the client that trusted proxies forward for, without a port
	OriginalDestination netip.AddrPort // invalid if it could not be read
	Upstream            netip.AddrPort // the address dialled; invalid if no dial was attempted
	UpstreamLocal       netip.AddrPort // our end of the upstream connection; invalid without one
	TransportFailure    string         // why the dial failed, in Envoy's words; empty: it did not
	Cluster             string         // where it was sent, by Envoy's name; empty if nowhere. See package envoy
	Route               string         // the route that chose Cluster: a request's, or all of a connection's requests'
	Security            *Security      // of TLS that the agent speaks with the other side; may be nil
	Client              *Security      // of a gateway's connection: TLS with downstream; nil: none, or not a gateway's
	Workload            SetWorkload    // of the other side, as its proxy describes it
	Received            atomic.Uint64  // bytes from downstream written to upstream; of a request, its body
	Sent                atomic.Uint64  // bytes written to downstream; of a response, its body
	Requests            atomic.Uint64  // of a connection: requests that have ended

	rare *rare    // of a connection; nil: it has nothing of it, as most connections
	HTTP *Request // of a request, never nil. All connections share an empty one, which must not be changed

	// Of a request: its connection, whose counters add up all its requests. nil for a connection.
	Connection *Record

	// Of a connection: what sinks keep with it. See Place.
	bound [maxPlaces]any

	// Set by Close.
	Duration time.Duration
	Reason   Reason
	Err      error // what went wrong, nil for an ordinary end

	next, previous *Record // of the table
}

// Security describes the two ends of TLS that the agent speaks. It is never modified.
type Security struct {
	Peer   string // SPIFFE ID that was verified of the other side; empty: it has none
	Own    string // SPIFFE ID that the agent presents; empty: it has none
	Mutual bool   // both sides have presented certificates

	Exchanges bool // the peer describes its workload in a preamble; see SetWorkload

	Version, Cipher string // names of the version of TLS and of its cipher suite, as OpenSSL has them

	// The certificates, if Fields asks for them; nil otherwise, and of a side without one.
	PeerCertificate, OwnCertificate *Certificate
}

// Certificate is what access logs print of a certificate. Several values are joined by commas. Its owner has chosen its
// text. It is never modified.
type Certificate struct {
	URIs, DNS, IPs, Emails string // names
	Subject, Issuer        string // as text of RFC 2253
	Serial, SHA256, SHA1   string // hexadecimal
	PEM                    string // with the bytes encoded that URLs do not have

	ChainSerials, ChainSHA256, ChainSHA1 string // of it and of the other certificates that were sent

	NotBefore, NotAfter time.Time // in UTC
}

// Workload describes the workload of the other side, as its proxy has sent it. The names are not authenticated. Those that
// are not known are empty. It is never modified.
type Workload struct {
	Name, Namespace, Cluster            string // of the Deployment or the like; the ID of the cluster
	App, Version                        string // labels of these names
	CanonicalService, CanonicalRevision string // the grouping of Istio's dashboards
}

// WorkloadNames are the parts of a workload by the names that Istio's telemetry has for them.
var WorkloadNames = map[string]func(*Workload) string{
	"workload":  func(w *Workload) string { return w.Name },
	"namespace": func(w *Workload) string { return w.Namespace },
	"cluster":   func(w *Workload) string { return w.Cluster },
	"service":   func(w *Workload) string { return w.CanonicalService },
	"revision":  func(w *Workload) string { return w.CanonicalRevision },
	"app":       func(w *Workload) string { return w.App },
	"version":   func(w *Workload) string { return w.Version },
}

// SetWorkload is a *Workload that the owner of a record may set at any time before Close: a peer that waits for the other
// side describes itself late. It may be read from any goroutine.
type SetWorkload struct{ p atomic.Pointer[Workload] }

// Get returns the workload, or nil as long as it is not known.
func (s *SetWorkload) Get() *Workload { return s.p.Load() }

// Set sets the workload.
func (s *SetWorkload) Set(w *Workload) { s.p.Store(w) }

// Peer returns the identity that TLS verified of the other side; empty: it is not authenticated.
func (r *Record) Peer() string {
	if r.Security == nil {
		return ""
	}
	return r.Security.Peer
}

// SecurityOf returns TLS that the agent speaks with one of the two peers: with the one that connected for Inbound, and with
// the one that it connected to for Outbound; nil: none.
func (r *Record) SecurityOf(side Direction) *Security {
	switch {
	case r.Direction == side:
		return r.Security
	case side == Outbound:
		return nil
	case r.Connection != nil:
		return r.Connection.Client
	}
	return r.Client
}

// Agrees reports whether what a peer says about its workload can be true: its verified identity, if it has one, is of the
// same namespace (spiffe://DOMAIN/ns/NAMESPACE/sa/ACCOUNT). s may be nil.
func (s *Security) Agrees(w *Workload) bool {
	if s == nil || s.Peer == "" {
		return true
	}
	_, rest, found := strings.Cut(s.Peer, "/ns/")
	namespace, _, _ := strings.Cut(rest, "/")
	return !found || namespace == w.Namespace
}

// rare is what few connections have.
type rare struct {
	hello  Hello          // of TLS; zero: none
	direct netip.AddrPort // of the load balancer that has named Downstream; invalid: none
}

// Hello is the unencrypted part of a TLS handshake that identifies the server.
type Hello struct {
	ServerName string
	ALPN       []string
}

// What the byte slices of a Request hold at most, because sinks report no more.
const (
	MaxValue  = 8 << 10  // of one value; a longer one is cut to MaxValue+1 bytes, so that a sink sees that it is cut
	MaxValues = 64 << 10 // of all values of a request and its response; a value beyond that is CutMark
	CutMark   = "..."    // ends a value that is cut
)

// Request describes a request and its response. The byte slices belong to the engine and are valid until Sink.Closed
// returns. A header field is nil if the message lacks it; if it occurs several times, the first one counts. Long values
// are cut: see MaxValue.
type Request struct {
	Method, Path, Authority, ID []byte
	UserAgent, ForwardedFor     []byte        // as received; several X-Forwarded-For fields are joined by commas. A long list is cut in its middle
	Head, ResponseHead          []byte        // as received, with Fields.Heads; of HTTP/2, "name: value" lines with pseudo-header fields
	Body, ResponseBody          *Body         // with Fields.Bodies; they may be kept, and are released by a sink
	Fields, ResponseFields      [][]byte      // the fields that Fields names, in its order
	Status                      int           // of the response to downstream; 0 without a response
	GRPC                        bool          // by the request's content-type
	Edge                        bool          // it came from outside of the mesh: Downstream is the client, whatever ForwardedFor has
	Upgraded                    bool          // the connection went on as a relay
	Delayed                     bool          // a fault was injected: the request waited before it was sent
	Exhausted                   bool          // the last attempt failed in a way that is retried, and no retry was left
	Overflowed                  bool          // likewise, and as many retries were in progress as the cluster permits
	GRPCStatus                  []byte        // as received in the response's header or trailers
	Messages, ResponseMessages  uint64        // of gRPC, over HTTP/2
	Flags                       string        // Envoy's response flags, if more precise than those of the reason
	Details                     string        // Envoy's response_code_details, likewise
	Trace                       *Trace        // nil: the request is not traced
	DryRun                      *DryRun       // the first verdict of policies that are not enforced; nil: there was none
	Telemetry                   *Telemetry    // what a control plane asks to be recorded; nil: nothing in particular. Of a connection, see Ask
	ServiceTime                 time.Duration // from the end of the dial to the head of the response; with Status from upstream
}

// DryRun is the verdict about a request of policies that are not enforced, or of those that have denied it. It is never
// modified.
type DryRun struct {
	Prefix string // of the names under which Envoy keeps the verdict in metadata
	Policy string // that decided; empty: no policy did
	Denied bool
	Next   *DryRun // that of a later filter; may be nil

	// Enforced explains a denial by policies that are enforced, a line for each. One verdict has it at most. Its Prefix is
	// empty.
	Enforced string
}

// Explanation returns the Enforced of the verdict that has it; empty: there is none. d may be nil.
func (d *DryRun) Explanation() string {
	for ; d != nil; d = d.Next {
		if d.Enforced != "" {
			return d.Enforced
		}
	}
	return ""
}

// Value returns the first verdict under a key of metadata: its policy, "allowed" or "denied"; empty: there is none. d may be nil.
func (d *DryRun) Value(key string) (value string) {
	for ; d != nil && value == ""; d = d.Next {
		switch name, found := strings.CutPrefix(key, d.Prefix); {
		case !found:
		case name == envoy.DryRunPolicy:
			value = d.Policy
		case name == envoy.DryRunResult && d.Denied:
			value = "denied"
		case name == envoy.DryRunResult:
			value = "allowed"
		}
	}
	return value
}

// DryRunPrefix begins the prefixes of policies with istio.io/dry-run. The action follows, and an underscore.
const DryRunPrefix = "istio_dry_run_"

// SetDryRun records the verdicts about a connection. Call it after Ask, before the connection is carried.
func (r *Record) SetDryRun(d *DryRun) {
	own := *r.HTTP // shared with other connections
	own.DryRun = d
	r.HTTP = &own
}

// SetDenial records how Envoy reports that a policy denies the connection: with response flags, and with details. Call it when no
// table lists the record, or after Ask and before the connection is carried.
func (r *Record) SetDenial(flags, details string) {
	own := *r.HTTP // shared with other connections
	own.Flags, own.Details = flags, details
	r.HTTP = &own
}

// String returns the verdicts in their order, such as "deny: denied by ns[shop]-policy[p]-rule[0]", without those of external
// authorization. d may be nil.
func (d *DryRun) String() string {
	var list []string
	for ; d != nil; d = d.Next {
		action, ok := strings.CutPrefix(d.Prefix, DryRunPrefix)
		if !ok {
			continue
		}
		text := strings.TrimSuffix(action, "_") + ": allowed"
		if d.Denied {
			text = strings.TrimSuffix(action, "_") + ": denied"
		}
		if d.Policy != "" {
			text += " by " + d.Policy
		}
		list = append(list, text)
	}
	return strings.Join(list, ", ")
}

// Trace is the place of a request in a distributed trace. Package tracing makes it, and the engine that serves the request
// owns it: its memory is valid until Sink.Closed returns.
type Trace struct {
	ID           [16]byte
	Span, Parent [8]byte // Parent is zero in the first span of a trace
	Sampled      bool    // the span is exported
	Debug        bool    // it is requested for debugging, in B3
	Restarted    bool    // the context that arrived in a traceparent does not go on
	Forms        uint8   // in which the context goes on: a tracing.Forms
	Operation    string  // name of the span; empty: that of the direction
	State        []byte  // the tracestate that came with Parent
	Attributes   []byte  // of the span, known from the request's header, as package tracing encodes them
	Exporter     TraceExporter
}

// TraceExporter takes the span of a closed record whose trace is sampled. It must not block, nor keep the record.
type TraceExporter interface{ Export(*Record) }

// Fields is what records carry in addition: the values of header fields, whose names are in lower case, the certificates
// of TLS, and whole heads.
type Fields struct {
	Request, Response []string
	Certificates      bool
	Heads             bool    // each is allocated
	Bodies            *Bodies // nil: no bodies
}

// Remote returns the address of the side of a connection that is not this workload; of a gateway's, that of downstream.
func (r *Record) Remote() netip.Addr {
	if r.Direction == Outbound && !r.Gateway {
		return r.OriginalDestination.Addr()
	}
	return r.Downstream.Addr()
}

// DownstreamFailure returns why TLS with downstream failed, in Envoy's manner; empty if it did not.
func (r *Record) DownstreamFailure() string {
	if r.Reason.OfHandshake() && r.Err != nil {
		return "TLS_error: " + r.Err.Error()
	}
	return ""
}

// ServerName returns the server name of the TLS handshake of the record's connection; empty without one.
func (r *Record) ServerName() string {
	if r.rare == nil && r.Connection != nil {
		r = r.Connection
	}
	return r.TLS().ServerName
}

// TLS returns what the client of a TLS connection has asked for; the zero Hello for others.
func (r *Record) TLS() Hello {
	if r.rare == nil {
		return Hello{}
	}
	return r.rare.hello
}

// SetTLS records that a connection is one of TLS, unless h is the zero Hello.
func (r *Record) SetTLS(h Hello) {
	if r.rare != nil {
		r.rare.hello = h
	} else if h.ServerName != "" || h.ALPN != nil {
		r.rare = &rare{hello: h}
	}
}

// SetClient makes client Downstream. The address of the load balancer that has named it is kept for Direct.
func (r *Record) SetClient(client netip.AddrPort) {
	r.rare = &rare{direct: r.Downstream}
	r.Downstream = client
}

// Direct returns the source of the connection's packets: Downstream of a connection, or the load balancer that has named it.
func (r *Record) Direct() netip.AddrPort {
	if r.Connection != nil {
		r = r.Connection
	}
	if r.rare != nil && r.rare.direct.IsValid() {
		return r.rare.direct
	}
	return r.Downstream
}

// GRPCStatus returns the number of the response's status of gRPC. Without a valid one it is the status that stands for that of
// HTTP, as in Envoy. ok is false without a response.
func (r *Record) GRPCStatus() (code int, ok bool) {
	if code, ok := envoy.ParseGRPCCode(r.HTTP.GRPCStatus); ok {
		return int(code), true
	}
	return int(envoy.GRPCCodeOf(r.HTTP.Status)), r.HTTP.Status != 0
}

// IsRequest reports whether the record describes a request, as opposed to a connection.
func (r *Record) IsRequest() bool { return r.Connection != nil }

// Carried reports, inside Table.Each, whether the protocol is known and the connection is being carried.
func (r *Record) Carried() bool { return r.carried }

// Flags returns Envoy's response flags, such as "UF,URX"; empty without flags. Call it on a closed record. The flags of
// faults and retries come first, as in Envoy.
func (r *Record) Flags() string {
	flags := r.ownFlags()
	if r.HTTP.Exhausted {
		flags = joinFlags(envoy.FlagUpstreamRetryLimitExceeded, flags)
	}
	if r.HTTP.Overflowed {
		flags = joinFlags(envoy.FlagUpstreamOverflow, flags)
	}
	if r.HTTP.Delayed {
		flags = joinFlags(envoy.FlagDelayInjected, flags)
	}
	return flags
}

func joinFlags(first, rest string) string {
	if rest == "" {
		return first
	}
	return first + "," + rest
}

// ownFlags returns the flags without those of faults and retries.
func (r *Record) ownFlags() string {
	if r.HTTP.Flags != "" || r.Reason == Completed { // the common case
		return r.HTTP.Flags
	}
	e := explanations[r.Reason]
	switch {
	case e == nil:
		return "" // still open
	case r.IsRequest():
		return e.RequestFlags
	}
	return e.Flags
}

// Details returns Envoy's response_code_details, such as "via_upstream". A connection has none, unless a server of external
// authorization denies it.
func (r *Record) Details() string {
	switch {
	case r.TerminationDetails() != "":
		return ""
	case r.HTTP.Details != "" || !r.IsRequest():
		return r.HTTP.Details
	}
	if e := explanations[r.Reason]; e != nil {
		return e.Details
	}
	return ""
}

// TerminationDetails returns Envoy's connection_termination_details, which name the policy that denies a connection; may be empty
// does.
func (r *Record) TerminationDetails() string {
	if r.IsRequest() || !envoy.IsDenial(r.HTTP.Details) {
		return ""
	}
	return r.HTTP.Details
}

// noRequest stands for the request in the record of a connection. A Request of its own would take 288 bytes of each.
var noRequest Request

// Open returns the record of a connection that begins now.
func Open(direction Direction, downstream netip.AddrPort) *Record {
	return &Record{Direction: direction, Opened: time.Now(), Downstream: downstream, HTTP: &noRequest}
}

// Close ends the record and passes it to sink. A Table first removes the record, so that readers of the open connections
// never see it half closed. A second call panics, because a connection must never be counted twice.
func (r *Record) Close(sink Sink, reason Reason, err error) {
	if r.Reason != "" {
		panic("flow: record closed twice, first as " + string(r.Reason) + ", then as " + string(reason))
	}
	if table, ok := sink.(*Table); ok {
		table.Leave(r)
	}
	r.Duration = time.Since(r.Opened)
	r.Reason, r.Err = reason, err
	if c := r.Connection; c != nil {
		c.Requests.Add(1)
	}
	sink.Closed(r)
}
