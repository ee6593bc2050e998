package httpforward

import (
	"errors"

	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// Router chooses the upstream of each request. It is the only place where that is decided. HTTP/1 calls it once the
// framing of the request is known, HTTP/2 once the header block is accepted. HTTP/1 then takes a connection to the
// Decision's Target from the pool or dials one.
//
// Route runs on the goroutine of the connection and must not block. A Router that serves several connections is called
// concurrently. The Request and the bytes it points to belong to the engine: Route may read them until it returns, and
// must neither change nor keep them. Route must not allocate; a test checks that for both engines.
type Router interface {
	Route(*Request) Decision
}

// Request is the part of a request that a Router sees.
type Request struct {
	Connection *flow.Record // of the downstream connection: peers and original destination
	Protocol   flow.Protocol
	Method     []byte
	Path       []byte // the request target as received, with its query
	Authority  []byte // nil if the request has no authority
}

// Decision is where a request goes.
type Decision struct {
	// Target is the upstream. HTTP/1 requests of one connection may have different targets. The HTTP/2 engine carries
	// all streams of a connection on one upstream connection: a Target other than Connection.Target is answered with
	// 421.
	Target upstream.Target

	// Cluster and Route are Envoy's names of the upstream and of the rule that chose it, for the request's record.
	Cluster, Route string
}

// route returns the decision for a request: the Router's, or the connection's own Target.
func (c *Connection) route(r *Request) Decision {
	if c.Router != nil {
		return c.Router.Route(r)
	}
	return Decision{Target: c.Target, Cluster: c.Record.Cluster, Route: c.Record.Route}
}

// view sets r to the request that record describes.
func (r *Request) view(record *flow.Record) {
	*r = Request{
		Connection: record.Connection,
		Protocol:   record.Protocol,
		Method:     record.HTTP.Method,
		Path:       record.HTTP.Path,
		Authority:  record.HTTP.Authority,
	}
}

// noRoute reports whether the decision names no upstream.
func (d *Decision) noRoute() bool { return !d.Target.Address.IsValid() }

// replyNoRoute is Envoy's reply to a request for which it has no route.
var replyNoRoute = reply{404, "", flow.UpstreamUnreachable, envoy.FlagNoRouteFound, envoy.DetailsRouteNotFound}

var errNoRoute = errors.New("the router returned no upstream for the request")
