package serve

import (
	"slices"
	"strings"

	"github.com/pillion-proxy/pillion/internal/authz"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/httpforward"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/route"
)

// admit applies the policies of a filter chain to the connection, and prepares for those of its requests. At a gateway every
// request is brought into normal form, because routes are its clients' only bounds.
func (r *routing) admit(s *mesh.Snapshot, chain *mesh.FilterChain) {
	judges := s.JudgesRequests(chain.HTTP) || r.role.gateway
	if !judges && len(chain.Policies) == 0 {
		return
	}
	subject := r.subject()
	if policy, denied := authorize(chain.Policies, &subject); denied {
		r.refused = denial(policy)
	} else if judges {
		r.gate = &gate{role: r.role, subject: subject}
	}
}

// explain explains that a policy of connections refuses the requests of the connection; nil: it does not, or records are not followed.
func (r *routing) explain() *flow.DryRun {
	if r.refused.Reason != flow.PolicyDenied || !r.role.flows.Followed() {
		return nil
	}
	var l shadows
	chain, _ := r.role.meet(r.judged, &r.info)
	subject := r.subject()
	l.explain(r.role, &subject, chain.Policies...)
	return l.dryRun()
}

// subject returns the connection as policies see it.
func (r *routing) subject() authz.Subject {
	peer := r.info.DirectSource
	return authz.Subject{
		Destination: r.info.Destination, Peer: peer, Client: peer,
		ServerName: strings.ToLower(r.info.ServerName), Secured: r.role.gateway && r.accepted.ended != nil, Names: r.names,
	}
}

// pass applies the policies to a request, and routes it as they leave it. Routes may match the claims of its token.
func (r *routing) pass(s *mesh.Snapshot, q *httpforward.Request) httpforward.Decision {
	changed, reply, waits := r.gate.pass(r.judged, r.manager, q)
	switch {
	case waits != nil:
		var d httpforward.Decision
		r.gate.await(waits, &d)
		return d
	case reply != nil:
		return httpforward.Decision{
			Reply: reply, Tracing: r.traced, Telemetry: r.recorded, Peers: r.plain, DryRun: r.gate.shadows.dryRun(),
		}
	}
	r.view(q)
	if r.request.Metadata = nil; r.gate.chosen.reroute {
		r.request.Fields, r.request.Metadata = r.gate.fields(q), r.gate
	}
	choice := r.gate.chosen.choice
	if !r.gate.chosen.known {
		choice = r.table.Find(&r.request)
	}
	d := r.forward(s, &choice)
	d.DryRun, d.Forbidden = r.gate.shadows.dryRun(), r.gate.forbidden
	if len(r.gate.edits) > 0 {
		d.Edits = slices.Concat(r.gate.edits, d.Edits)
	}
	if changed || q.Absolute { // a server may go by Host instead of the target that was routed
		d.Path = q.Path
	}
	if len(r.gate.responses) > 0 {
		plan := route.Plan{}
		if d.Plan != nil {
			plan = *d.Plan
		}
		plan.ResponseEdits = slices.Concat(r.gate.responses, plan.ResponseEdits)
		d.Plan = &plan
	}
	return d
}
