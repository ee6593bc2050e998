package serve

import (
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/httpforward"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// rejudge is the Router of inbound HTTP connections with a control plane: requests go to the connection's target as long as
// the configuration in force lets the connection pass. A push ends no connection, and its next request is judged anew: it
// is refused if no chain is left for the connection, or TLS is to end where it does not, or the other way round.
type rejudge struct {
	role    *Role
	info    mesh.ConnInfo
	secured bool
	judged  *mesh.Snapshot // by the last request
	refused bool           // by judged

	allowed httpforward.Decision
}

// router returns the Router of a connection; nil: all requests go to its target.
func (c *Conn) router(to *upstream.Target) httpforward.Router {
	if c.role.egress != nil {
		return c.permitted(c.routerOf(to), to)
	}
	return c.routerOf(to)
}

// routerOf returns the Router by the configuration of a control plane.
func (c *Conn) routerOf(to *upstream.Target) httpforward.Router {
	g := c.governed
	if g == nil || c.role.direction == flow.Outbound {
		return nil
	}
	info := c.info()
	if g.secured {
		info.TLS, info.ServerName, info.Protocols = true, c.Record.TLS.ServerName, c.Record.TLS.ALPN
	}
	return &rejudge{
		role: c.role, info: info, secured: g.secured, judged: g.snapshot,
		allowed: httpforward.Decision{Target: *to, Cluster: c.Record.Cluster, Route: c.Record.Route},
	}
}

// Route implements httpforward.Router.
func (r *rejudge) Route(*httpforward.Request) httpforward.Decision {
	if s := r.role.mesh.Snapshot(); s != r.judged {
		chain, refusal := s.Inbound(&r.info)
		r.judged = s
		r.refused = refusal != "" || (chain != nil && chain.TLS != nil) != r.secured
	}
	if r.refused {
		return httpforward.Decision{}
	}
	return r.allowed
}
