package serve

import (
	"github.com/pillion-proxy/pillion/internal/httpforward"
	"github.com/pillion-proxy/pillion/internal/identity"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/secure"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// watched is the endpoint that all requests of an outbound connection go to. The connection is retired when the endpoint
// has left its cluster, when it is secured otherwise, or when other roots of trust are in force than those that have verified
// it.
type watched struct {
	role   *Role
	config *mesh.Cluster
	target upstream.Target
	inside secure.Inside

	snapshot *mesh.Snapshot     // that was looked at last
	own      *identity.Identity // likewise
	retired  bool               // by these
}

// gone looks at the configuration and the identity in force, if they are others than before.
func (h *watched) gone() bool {
	s, own := h.role.mesh.Snapshot(), h.role.mesh.Identity()
	if s != h.snapshot || own != h.own {
		h.snapshot, h.own = s, own
		h.retired = h.retired || !h.stands(s)
	}
	return h.retired
}

// stands reports whether a new connection to the endpoint would be secured as this one is.
func (h *watched) stands(s *mesh.Snapshot) bool {
	config := s.Cluster(h.config.Name)
	if config == nil || config.Refused || config.Discovery != h.config.Discovery {
		return false
	}
	endpoint := &mesh.Endpoint{}
	switch config.Discovery {
	case mesh.ByEDS, mesh.Static: // hosts by name come and go without a push
		hosts := s.Hosts(config)
		if endpoint = nil; hosts != nil {
			endpoint = hosts.At(h.target.Address)
		}
	}
	if endpoint == nil {
		return false
	}
	t := config.TransportTo(endpoint)
	switch {
	case t == nil || t.TLS == nil && !t.Refused:
		return !h.target.Secured()
	case t.Refused || !h.target.Secured():
		return false
	}
	return h.role.security(t.TLS, h.inside, s, h.role.options(config), "") == h.target.Security
}

// single is the Router of outbound HTTP in a filter chain for TCP: all requests go to the connection's endpoint.
type single struct {
	watched
	allowed httpforward.Decision
}

// single returns the Router of a connection whose endpoint was chosen; nil: it goes to its destination.
func (c *Conn) single(to *upstream.Target) httpforward.Router {
	if c.governed.chosen == nil {
		return nil
	}
	return &single{
		watched{role: c.role, config: c.governed.chosen, target: *to, inside: inside(c.protocol), snapshot: c.governed.snapshot, own: c.role.mesh.Identity()},
		httpforward.Decision{Target: *to, Cluster: c.Record.Cluster, Route: c.Record.Route},
	}
}

// Route implements httpforward.Router.
func (s *single) Route(*httpforward.Request) httpforward.Decision { return s.allowed }

// Retired implements httpforward.Retirement.
func (s *single) Retired() bool { return s.gone() }

// trusted are the roots of an identity, and the value that stands for all equal ones.
type trusted struct{ seen, same *identity.Roots }

// trust returns the roots of trust of an identity. Those of a renewed identity are the same value if they are equal.
func (r *Role) trust(own *identity.Identity) *identity.Roots {
	last := r.trusted.Load()
	if last != nil && last.seen == own.Roots {
		return last.same
	}
	next := &trusted{own.Roots, own.Roots}
	if last != nil && last.same.Equal(own.Roots) {
		next.same = last.same
	}
	r.trusted.Store(next)
	return next.same
}
