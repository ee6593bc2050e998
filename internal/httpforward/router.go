package httpforward

import (
	"bytes"
	"errors"
	"net/netip"
	"time"
	"unsafe"

	"github.com/pillion-proxy/pillion/internal/balance"
	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/http1"
	"github.com/pillion-proxy/pillion/internal/http2"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/route"
	"github.com/pillion-proxy/pillion/internal/tcp"
	"github.com/pillion-proxy/pillion/internal/tracing"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// Router chooses the upstream of each request. It is the only place where that is decided. HTTP/1 calls it once the
// framing of the request is known, HTTP/2 once the header block is accepted, and both again before a retry. HTTP/1 then
// takes a connection to the Decision's Target from the pool or dials one.
//
// Route runs on the goroutine of the connection and must not block. A Router that serves several connections is called
// concurrently. The Request and the bytes it points to belong to the engine: Route may read them until it returns, and
// must neither change nor keep them. Route must not allocate for an ordinary request; a test checks that for both engines.
type Router interface {
	Route(*Request) Decision
}

// Request is the part of a request that a Router sees.
type Request struct {
	Connection *flow.Record   // of the downstream connection: peers and original destination
	Client     netip.AddrPort // the peer, or the client that trusted proxies forward for, without a port: see Edge
	Protocol   flow.Protocol
	Method     []byte
	Path       []byte       // with its query; of a target in absolute form, what follows the authority. Of a retry, Decision.Path, if that was set
	Authority  []byte       // nil if the request has no authority
	Scheme     []byte       // of the request's target; of a target without one, that of the connection
	Absolute   bool         // the target is in absolute form, as in requests to proxies
	Fields     HeaderFields // never nil when a Router is called
	Entered    bool         // an Edge has prepared the request
	Upgrade    []byte       // the protocol that the request asks for, as it is forwarded; may be empty

	// Check is that of the last Decision about this request, with its answer; nil: there was none.
	Check Check

	Collected *Collected // by the last Decision with Collect, until the first attempt; may be nil

	// Seed is the same whenever a Router is called about the request, and different for other requests of the connection, so that
	// a random choice can be repeated. It is not secret.
	Seed uint64

	Attempt  int       // 0: the first; n: the n-th retry
	Previous *Decision // of the attempt before; nil for the first. Its cluster and route stand, and its Lease has ended
}

// Check is a question whose answer a Router needs, such as one to a server of external authorization. The engine waits for
// the answer without holding back other connections, with Connection.Many without holding back other requests, and calls
// Route again with it.
type Check interface {
	// Notify has ready called, from any goroutine, when there is an answer; at once if there is one already.
	Notify(ready func())

	// Answered reports whether there is an answer. One that could not be had is an answer as well.
	Answered() bool

	// Cancel gives the question up.
	Cancel()
}

// Collected is the beginning of a request's body, without the framing of chunks.
type Collected struct {
	Bytes  []byte // never changed, and may be kept
	Whole  bool   // the body has no more bytes
	Wanted uint32 // Decision.Collect
}

// HeaderFields are header fields by index, so that a reader needs no closure: that would be allocated.
type HeaderFields = route.Fields

// Decision is what becomes of a request. One of Target, Reply, Check and Collect is set.
type Decision struct {
	// Check is a question that has to be answered first. nil: the decision is made.
	Check Check

	// Collect has the request's body collected first, until it has ended or is longer than this, and Route called again with
	// it. Zero: the body is not needed. In HTTP/2, without Connection.Many, a body cannot be collected: the client sends the
	// request again on another connection, or, if Target.Borrowed is set, is answered 503.
	Collect uint32

	// Target is the upstream. HTTP/1 requests of one connection may have different targets. The HTTP/2 engine carries
	// all streams of a connection on one upstream connection: a Target other than Connection.Target is answered with
	// 421.
	Target upstream.Target

	// Cluster and Route are Envoy's names of the upstream and of the rule that chose it, for the request's record.
	Cluster, Route string

	// Path is the path of the request, with its query, by which the Router has decided; nil: as it was received. It is sent
	// upstream in the place of the one that was received, before Plan rewrites it. It is valid until the next call of Route.
	Path []byte

	// Edits are changes of the request's header besides the Plan's, which are made after them. They may be of this request
	// only.
	Edits []route.Edit

	// Forbidden are fields that the request's trailers must not have, in lower case: applications may read those like a head,
	// and these fields are made here. Over HTTP/1 such a trailer is malformed, over HTTP/2 it is removed. The list is not changed.
	Forbidden []string

	Reply *route.Reply  // is sent in place of a response; nil: the request is forwarded
	Plan  *route.Plan   // what the route changes; nil: the request passes as it is
	Delay time.Duration // before anything is dialled or replied, by fault injection

	// RequestRate and ResponseRate limit how fast bodies pass, in bytes for each second; zero: they do not. In HTTP/2, only with
	// Connection.Many.
	RequestRate, ResponseRate uint64

	Lease Lease // the request's place at the endpoint; nil: its place is not counted

	HTTP2        bool // the protocol of the endpoint is HTTP/2; without it HTTP/1.1
	AsDownstream bool // the protocol of the endpoint is downstream's

	// Translate sends a request to an endpoint that speaks the other version of HTTP than downstream: one of HTTP/1 as
	// HTTP/2, and with Connection.Many, one of HTTP/2 as HTTP/1.
	Translate bool

	// Tracing replaces Settings.Tracing; nil: it does not. Operation is the name of the span unless Plan has one; empty: that
	// of the direction.
	Tracing   *tracing.Policy
	Operation string

	Telemetry *flow.Telemetry // of the request's record; nil: that of the connection
	DryRun    *flow.DryRun    // of the request's record

	// Peers replaces Connection.Peers from this request on, with HTTP/1, or for this request, with Connection.Many; nil: it
	// stays. The treatment depends on the cluster: only those of the mesh receive metadata.
	Peers *PeerFields

	// Tried are the endpoints of the attempts before this one, and Hash what an endpoint is chosen by, for the Router that chooses
	// the next.
	Tried  []netip.AddrPort
	Hash   uint64
	Hashed bool // Hash is set

	Mirrors []Mirror // where copies of the request go, at most MaxMirrors
}

// record sets the parts of the decision that belong in the request's record.
func (d *Decision) record(r *flow.Record) {
	r.Cluster, r.Route, r.HTTP.DryRun = d.Cluster, d.Route, d.DryRun
	if d.Telemetry != nil {
		r.HTTP.Telemetry = d.Telemetry
	}
}

// MaxMirrors is how many copies of a request are sent at most. Others are left out.
const MaxMirrors = 4

// Mirror is where a copy of a request goes.
type Mirror struct {
	Target upstream.Target
	Policy *mesh.Mirror // never nil
	Lease  Lease        // as in Decision
	HTTP2  bool         // as in Decision
}

// Lease is the place that an attempt of a request takes at its endpoint. The engine ends it exactly once, on the goroutine
// of the connection or of the copy.
type Lease = balance.Lease

// Outcome is the result of an attempt.
type Outcome = balance.Outcome

// route returns the decision for a request: the Router's, or the connection's own Target.
func (c *Connection) route(r *Request) Decision {
	if c.Router != nil {
		return c.Router.Route(r)
	}
	return Decision{Target: c.Target, Cluster: c.Record.Cluster, Route: c.Record.Route}
}

// view sets r to the request that record describes. The caller sets Fields.
func (r *Request) view(record *flow.Record) {
	*r = Request{
		Connection: record.Connection,
		Client:     record.Downstream,
		Protocol:   record.Protocol,
		Method:     record.HTTP.Method,
		Path:       record.HTTP.Path,
		Authority:  record.HTTP.Authority,
		Scheme:     schemeOf(record.Connection),
		Entered:    record.HTTP.Edge,
		Seed:       uint64(record.Opened.UnixNano()),
	}
}

// absolute sets Scheme and Path from a target in absolute form. It reports false for other targets, such as that of CONNECT.
func (r *Request) absolute() bool {
	scheme, rest, found := bytes.Cut(r.Path, []byte("://"))
	if !found || len(scheme) > len("https") {
		return false
	}
	r.Scheme, r.Path, r.Absolute = scheme, rootPath, true
	switch i := bytes.IndexAny(rest, "/?#"); {
	case i < 0:
	case rest[i] == '/':
		r.Path = rest[i:]
	default:
		r.Path = append([]byte("/"), rest[i:]...) // so rare that it may be allocated
	}
	return true
}

var rootPath = []byte("/")

var schemeHTTP, schemeHTTPS = []byte("http"), []byte("https")

// schemeOf returns the scheme of requests whose target is without one.
func schemeOf(connection *flow.Record) []byte {
	if connection.SecurityOf(flow.Inbound) != nil {
		return schemeHTTPS
	}
	return schemeHTTP
}

// headFields are the fields of an HTTP/1 head.
type headFields struct {
	head *http1.Head
	b    []byte // of head
}

func (f *headFields) Len() int { return len(f.head.Fields) }

func (f *headFields) At(i int) (name, value []byte) {
	field := &f.head.Fields[i]
	return field.Name.In(f.b), field.Value.In(f.b)
}

// blockFields are the fields of an HTTP/2 header block.
type blockFields struct{ list []http2.Field }

// ofBlock returns the fields behind the pseudo-fields.
func ofBlock(list []http2.Field) blockFields {
	for len(list) > 0 && list[0].IsPseudo() {
		list = list[1:]
	}
	return blockFields{list}
}

func (f *blockFields) Len() int { return len(f.list) }

func (f *blockFields) At(i int) (name, value []byte) {
	return readOnly(f.list[i].Name), readOnly(f.list[i].Value)
}

// readOnly returns the bytes of text. They must not be changed.
func readOnly(text string) []byte { return unsafe.Slice(unsafe.StringData(text), len(text)) }

// waits reports whether the Router is called again before there is a decision.
func (d *Decision) waits() bool { return d.Check != nil || d.Collect > 0 }

// refusesTrailer reports whether the request's trailers must not have a field.
func (d *Decision) refusesTrailer(name []byte) bool { return forbids(d.Forbidden, name) }

func forbids(names []string, name []byte) bool {
	for _, forbidden := range names {
		if sameName(name, forbidden) {
			return true
		}
	}
	return false
}

// asks reports whether the decision asks for more than a target.
func (d *Decision) asks() bool { return d.Reply != nil || d.Delay > 0 || len(d.Mirrors) > 0 }

// security describes the TLS that up speaks; without any, that of the connection's record.
func (c *Connection) security(up *tcp.Conn) *flow.Security {
	if s, secured := up.Label().(*flow.Security); secured {
		return s
	}
	return c.Record.Security
}

// noRoute reports whether the decision names no upstream.
func (d *Decision) noRoute() bool { return !d.Target.Address.IsValid() }

// replyNoRoute is Envoy's reply to a request for which it has no route.
var replyNoRoute = reply{404, "", flow.UpstreamUnreachable, envoy.FlagNoRouteFound, envoy.DetailsRouteNotFound}

var errNoRoute = errors.New("the router returned no upstream for the request")
