package httpforward

import (
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// Router chooses the upstream of each request. It is the one place where that is decided: both engines call it, HTTP/1
// after the framing of the request is known, HTTP/2 after its header block was accepted. They then dial, or take from the
// pool, a connection to the Target of the Decision.
//
// Route is called on the goroutine of the connection and must not block. Routers that serve several connections are called
// concurrently. The Request and the bytes it points to belong to the engine: Route may read them until it returns, and must
// neither change nor keep them. Route must not allocate; a test holds that for both engines.
type Router interface {
	Route(*Request) Decision
}

// Request is what a Router knows of a request.
type Request struct {
	Connection *flow.Record // of the downstream connection: peers and original destination
	Protocol   flow.Protocol
	Method     []byte
	Path       []byte // the request target as received, with its query
	Authority  []byte // nil: the request has none
}

// Decision is where a request goes.
type Decision struct {
	// Target is the upstream. HTTP/1 requests of one connection may have different targets. The HTTP/2 engine carries all
	// streams of a connection on one upstream connection: a Target other than Connection.Target is answered with 421.
	Target upstream.Target

	// Names of the upstream and of the rule that decided, for the request's record, which does not have them yet.
	Cluster, Route string
}

// constant is the Router of a connection whose requests all go to one target.
type constant struct{ decision Decision }

func (c *constant) Route(*Request) Decision { return c.decision }

// router is the connection's Router.
func (c *Connection) router() Router {
	if c.Router != nil {
		return c.Router
	}
	return &constant{Decision{Target: c.Target}}
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
