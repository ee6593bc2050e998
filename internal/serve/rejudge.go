package serve

import (
	"net/http"

	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/httpforward"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/route"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// rejudge is the Router of inbound HTTP connections with a control plane: requests go to the connection's target as long as
// the configuration in force lets the connection and the request pass. A push ends no connection, and its next request is
// judged again: it is refused if no chain is left for the connection, or TLS is to end where it does not, or the other way
// round, or a policy denies it.
type rejudge struct {
	role    *Role
	info    mesh.ConnInfo
	secured bool
	judged  *mesh.Snapshot    // by the last request
	chain   *mesh.FilterChain // that judged has for the connection; nil: none
	refusal *route.Reply      // to all requests, by judged; nil: they are judged one by one
	gate    gate

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
		role: c.role, info: info, secured: g.secured, judged: g.snapshot, chain: g.chain, gate: gate{subject: c.subject()},
		allowed: httpforward.Decision{Target: *to, Cluster: c.Record.Cluster, Route: c.Record.Route},
	}
}

// Route implements httpforward.Router.
func (r *rejudge) Route(request *httpforward.Request) httpforward.Decision {
	if s := r.role.mesh.Snapshot(); s != r.judged {
		r.judge(s)
	}
	reply, changed := r.refusal, false
	if reply == nil && r.chain != nil && r.chain.HTTP != nil {
		changed, reply = r.gate.pass(r.judged, r.chain.HTTP, request)
	}
	decision := r.allowed
	if reply != nil {
		decision.Reply, decision.Target = reply, upstream.Target{}
		return decision
	}
	decision.Edits = r.gate.edits
	if changed {
		decision.Path = request.Path
	}
	return decision
}

// judge judges the connection by a snapshot. Policies of connections apply to its next requests as well.
func (r *rejudge) judge(s *mesh.Snapshot) {
	chain, refusal := s.Inbound(&r.info)
	r.judged, r.chain, r.refusal = s, chain, nil
	if refusal != "" || (chain != nil && chain.TLS != nil) != r.secured {
		r.refusal = refusedChain
		return
	}
	if chain != nil {
		r.gate.subject.Request = nil
		if policy, denied := authorize(chain.Policies, &r.gate.subject); denied {
			r.refusal = denial(policy)
		}
	}
}

// refusedChain is the reply to requests of a connection that the configuration does not let pass any more, as it was before
// a router could reply: Envoy closes such a connection.
var refusedChain = &route.Reply{
	Status: http.StatusNotFound, Flags: envoy.FlagNoRouteFound, Details: envoy.DetailsRouteNotFound, Reason: flow.MeshRefused,
}
