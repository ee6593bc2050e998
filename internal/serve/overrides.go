package serve

import (
	"github.com/pillion-proxy/pillion/internal/httpforward"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/route"
)

// chosen is the route of a request, whose parts may change the policies for it. It is chosen before the first filter, and
// again after one that says so, by what the filters have left then.
type chosen struct {
	table   *route.Table // nil: routes change no policy, and are not looked at
	choice  route.Choice
	known   bool // choice is that of the request
	reroute bool // a filter has the route chosen again
	request route.Request
}

// begin forgets the route of the last request.
func (c *chosen) begin() { c.choice, c.known, c.reroute = route.Choice{}, false, false }

// again has the route chosen again.
func (c *chosen) again() { c.known, c.reroute = false, true }

// rules returns what the route of a request changes of a filter, or nil. It returns a reply if the request has no route: which
// policies are for it is not known then.
func (g *gate) rules(r *httpforward.Request, filter string) (*mesh.RoutePolicy, *route.Reply) {
	c := &g.chosen
	if c.table == nil {
		return nil, nil
	}
	if !c.known {
		c.request = route.Request{
			Method: r.Method, Path: r.Path, Authority: r.Authority, Scheme: r.Scheme, Fields: r.Fields,
			Downstream: r.Client, Local: r.Connection.OriginalDestination,
		}
		c.request.GRPC, _ = inspect(r.Fields)
		if c.reroute {
			c.request.Fields, c.request.Metadata = g.fields(r), g
		}
		c.choice, c.known = c.table.Find(&c.request), true
	}
	if c.choice.Cluster == nil {
		return nil, c.choice.Reply
	}
	return c.choice.Policy(filter), nil
}

// apply applies one filter to a request, as its route has it.
func (g *gate) apply(h *mesh.HTTPManager, r *httpforward.Request, f *mesh.HTTPFilter) (judged bool, reply *route.Reply, waits *question) {
	if f.RBAC == nil && f.JWT == nil && f.ExtAuthz == nil {
		return false, nil, nil
	}
	own, reply := g.rules(r, f.Name)
	switch {
	case reply != nil:
		return true, reply, nil
	case own == nil && f.Disabled, own != nil && own.Disabled && f.JWT == nil:
		return false, nil, nil
	case f.RBAC != nil && own == nil:
		return true, g.authorize(h, r, f.RBAC), nil
	case f.RBAC != nil && own.RBAC != nil:
		return true, g.authorize(h, r, own.RBAC), nil
	case f.JWT != nil && own == nil:
		reply, waits = g.authenticate(r, f.JWT, nil)
	case f.JWT != nil && (own.Disabled || own.Requirement != ""): // without a requirement, fields for claims are removed all the same
		reply, waits = g.authenticate(r, f.JWT, own)
	case f.ExtAuthz != nil && own == nil:
		reply, waits = g.ext(r, f.ExtAuthz, nil)
	case f.ExtAuthz != nil && own.Check != nil:
		reply, waits = g.ext(r, f.ExtAuthz, g.chosen.choice.Check(f.Name))
	default:
		reply = route.Refused // what the route has is for a filter of another type
	}
	return true, reply, waits
}

// follow has the routes of an inbound connection change the policies for its requests, which do not follow them otherwise.
func (g *gate) follow(s *mesh.Snapshot, chain *mesh.FilterChain) {
	g.chosen.table = nil
	if chain == nil || chain.HTTP == nil {
		return
	}
	if routes := s.Routes(chain.HTTP); routes != nil {
		if table := route.Of(routes); table.ChangesPolicies() {
			g.chosen.table = table
		}
	}
}
