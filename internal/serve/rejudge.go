package serve

import (
	"errors"
	"net/http"
	"time"

	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/httpforward"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/route"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// rejudge is the Router of inbound HTTP connections with a control plane: requests go to the connection's target as long as
// the configuration in force lets the connection and the request pass. A push cuts no connection, and its next request is
// judged again: it is refused if its chain or a policy does.
//
// A connection whose mode is no longer allowed is retired: no chain is left for it, or TLS is to end where it does not, or
// the other way round. Until it has ended, its requests are judged by the last configuration that allowed it. A connection is
// also retired when the certificate of its client is shown in another way: until it has ended, its requests have the field of
// before, as Envoy's have while it drains their filter chain.
type rejudge struct {
	role    *Role
	info    mesh.ConnInfo
	secured bool
	shown   *mesh.HTTPManager // as in governed
	seen    *mesh.Snapshot    // by the last request
	judged  *mesh.Snapshot    // the last one that allows the mode of the connection
	chain   *mesh.FilterChain // that judged has for the connection; may be nil
	refusal *route.Reply      // to all requests, by judged; nil: they are judged one by one
	retired bool              // by seen
	gate    gate

	allowed httpforward.Decision
}

// router returns the Router of a connection; nil: all requests go to its target.
func (c *Conn) router(to *upstream.Target) httpforward.Router {
	router := c.routerOf(to)
	if len(c.role.faults) > 0 {
		router = c.withFaults(router, to)
	}
	if c.role.egress != nil {
		return c.permitted(router, to)
	}
	return router
}

// routerOf returns the Router by the configuration of a control plane.
func (c *Conn) routerOf(to *upstream.Target) httpforward.Router {
	g := c.governed
	switch {
	case g == nil:
		return nil
	case g.routing != nil:
		return g.routing
	case c.role.direction == flow.Outbound:
		return c.single(to)
	}
	r := c.rejudge()
	r.allowed = httpforward.Decision{Target: *to, Cluster: c.Record.Cluster, Route: c.Record.Route}
	return r
}

// rejudge returns what judges an inbound connection again.
func (c *Conn) rejudge() *rejudge {
	g, info := c.governed, c.info()
	if g.secured {
		info = c.infoInside()
	}
	r := &rejudge{role: c.role, info: info, secured: g.secured, shown: g.shown, seen: g.snapshot, judged: g.snapshot, chain: g.chain, gate: gate{role: c.role, subject: c.subject()}}
	r.gate.follow(g.snapshot, g.chain)
	if showsOtherwise(r.shown, r.chain) {
		r.seen = nil // Retired looks again
	}
	return r
}

// Route implements httpforward.Router.
func (r *rejudge) Route(request *httpforward.Request) (decision httpforward.Decision) {
	r.look()
	reply, changed := r.refusal, false
	if reply != nil {
		r.gate.shadows.clear()
		r.explain(&r.gate.shadows)
	} else if r.chain != nil && r.chain.HTTP != nil {
		var waits *question
		if changed, reply, waits = r.gate.pass(r.judged, r.chain.HTTP, request); waits != nil {
			r.gate.await(waits, &decision)
			return decision
		}
	}
	decision = r.allowed // the result, so that no copy takes more of a small stack
	if r.chain != nil && r.chain.HTTP != nil {
		decision.Tracing, decision.Operation = r.role.tracing(r.chain.HTTP), onlyOperation(r.chain.HTTP.Routes)
	}
	decision.Telemetry = r.role.recorded(r.judged, r.chain)
	decision.DryRun = r.gate.shadows.dryRun()
	if reply != nil {
		decision.Reply, decision.Target = reply, upstream.Target{}
		return decision
	}
	decision.Edits, decision.Forbidden = r.gate.edits, r.gate.forbidden
	if len(r.gate.responses) > 0 {
		decision.Plan = &route.Plan{ResponseEdits: r.gate.responses}
	}
	if changed || request.Absolute && r.OnlyHTTP() { // a workload may go by Host instead of the target that was judged
		decision.Path = request.Path
	}
	return decision
}

// Retired implements httpforward.Retirement.
func (r *rejudge) Retired() bool {
	r.look()
	return r.retired
}

// denied reports whether a connection without requests is to end: it is retired, or would be refused now.
func (r *rejudge) denied() bool { return r.Retired() || r.refusal != nil }

// deniedByPolicy reports whether a policy of connections in force denies the connection.
func (r *rejudge) deniedByPolicy() bool {
	r.look()
	return r.refusal != nil && r.refusal.Reason == flow.PolicyDenied
}

// explain explains that a policy of connections denies the connection, and returns Envoy's details of that.
func (r *rejudge) explain(l *shadows) (details string) {
	if r.refusal == nil || r.refusal.Reason != flow.PolicyDenied {
		return ""
	}
	l.explain(r.role, &r.gate.subject, r.chain.Policies...)
	return r.refusal.Details
}

var errDeniedLater = errors.New("a policy that has changed since the connection began denies it")

// OnlyHTTP implements httpforward.OnlyHTTP. In a filter chain for TCP the HTTP of a connection was only detected.
func (r *rejudge) OnlyHTTP() bool { return r.chain != nil && r.chain.HTTP != nil }

// look judges the connection by the snapshot in force, if that is another one.
func (r *rejudge) look() {
	s := r.role.mesh.Snapshot()
	if s == r.seen {
		return
	}
	r.seen = s
	ended, ok := s.InboundMode(&r.info)
	if r.retired = !ok || ended != r.secured; !r.retired {
		r.judge(s)
	}
}

// judge judges the connection by a snapshot. Policies of connections apply to its next requests as well.
func (r *rejudge) judge(s *mesh.Snapshot) {
	chain, refusal := s.Inbound(&r.info)
	r.judged, r.chain, r.refusal = s, chain, nil
	if refusal != "" {
		r.refusal = refusedChain
		return
	}
	r.gate.follow(s, chain)
	r.retired = showsOtherwise(r.shown, chain)
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

// opaqueRetirement is how long a retired connection of an unknown protocol goes on: Envoy's time to drain one, as Istio sets
// it.
const opaqueRetirement = 45 * time.Second

var errRetired = errors.New("the configuration no longer allows connections of its kind, and the time to end it has passed")
