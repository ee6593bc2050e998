package route

import (
	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
)

// Outcome returns what becomes of a request, in Envoy's order: faults, cross-origin requests, then the route's action. Call it
// once for each request, because faults are drawn. hashed reports whether the cluster chooses its hosts by Cluster.Hash; only
// then cookies are set that the hash is made of.
func (c *Choice) Outcome(r *Request, hashed bool) Outcome {
	if c.Cluster == nil {
		return Outcome{Reply: c.Reply}
	}
	var o Outcome
	f := c.Cluster.faults
	if f == nil && c.Fault != nil && (c.Fault.Delay > 0 || c.Fault.Abort != nil || c.Fault.Rate > 0) {
		f = compileFault(c.Fault, new(patterns)) // istiod's filter has no faults, so this is rare
	}
	f.decide(r, c.Cluster.Name, &o)
	var kind planKind
	if hashed {
		kind = withCookies
	}
	allowed, preflight := c.Cluster.cors.decide(r)
	if allowed {
		kind |= crossOrigin
	}
	o.Plan = c.Cluster.plan(kind)
	switch {
	case o.Reply != nil:
	case preflight != nil:
		o.Reply = preflight
	case c.Route.Redirect != nil:
		o.Reply = c.Cluster.redirect(r)
	case c.Route.Respond != nil:
		o.Reply = directReply(c.Route.Respond)
	}
	return o
}

func directReply(r *mesh.Response) *Reply {
	return &Reply{Status: r.Status, Body: string(r.Body), Details: envoy.DetailsDirectResponse, Reason: flow.Completed, Edited: true}
}

// Drawn reports whether a request is copied to a mirror. Each mirror is drawn on its own.
func (r *Request) Drawn(m *mesh.Mirror) bool { return m.Cluster != "" && r.drawn(m.Fraction) }
