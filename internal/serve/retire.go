package serve

import (
	"slices"

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
	files    string             // names roots in a file that verify the endpoint; empty: others do, or none
	roots    *identity.Roots    // of files
	retired  bool               // by these
	refused  *failure           // of the cluster in force or its transport; nil: requests may be sent while the connection ends
}

// watch returns the endpoint of a connection that s has secured.
func (r *Role) watch(s *mesh.Snapshot, config *mesh.Cluster, target *upstream.Target, inside secure.Inside) *watched {
	h := &watched{role: r, config: config, target: *target, inside: inside, snapshot: s, own: r.mesh.Identity()}
	if t := h.transport(s, config); t != nil && t.TLS != nil && identity.IsFileSecret(t.TLS.Roots) {
		h.files, h.roots = t.TLS.Roots, r.contexts.FileRoots(t.TLS.Roots)
	}
	return h
}

// gone looks at the configuration and the identity in force, if they are others than before.
func (h *watched) gone() bool {
	s, own := h.role.mesh.Snapshot(), h.role.mesh.Identity()
	roots := h.roots
	if h.files != "" {
		roots = h.role.contexts.FileRoots(h.files)
	}
	if s != h.snapshot || own != h.own || roots != h.roots {
		h.snapshot, h.own, h.roots = s, own, roots
		h.retired = h.retired || !h.stands(s)
	}
	return h.retired
}

// stands reports whether a new connection to the endpoint would be secured as this one is.
func (h *watched) stands(s *mesh.Snapshot) bool {
	h.refused = nil
	config := s.Cluster(h.config.Name)
	switch {
	case config == nil || config.Discovery != h.config.Discovery:
		return false
	case config.Refused:
		h.refused = refusedCluster
		return false
	}
	endpoint := h.endpoint(s, config)
	if endpoint == nil {
		return false
	}
	t := config.TransportTo(endpoint)
	switch {
	case t == nil || t.TLS == nil && !t.Refused:
		return !h.target.Secured()
	case t.Refused:
		h.refused = refusedTransport
		return false
	case !h.target.Secured():
		return false
	}
	return h.role.security(t.TLS, h.inside, s, h.role.plain(config), "") == h.target.Security
}

// endpoint returns the endpoint in a configuration; nil: it has left the cluster. Hosts by name come and go without a push.
func (h *watched) endpoint(s *mesh.Snapshot, config *mesh.Cluster) *mesh.Endpoint {
	if config.Discovery != mesh.ByEDS && config.Discovery != mesh.Static {
		return &mesh.Endpoint{}
	}
	if hosts := s.Hosts(config); hosts != nil {
		return hosts.At(h.target.Address)
	}
	return nil
}

// transport returns how the endpoint is reached; nil: without TLS, or it has left the cluster.
func (h *watched) transport(s *mesh.Snapshot, config *mesh.Cluster) *mesh.Transport {
	if endpoint := h.endpoint(s, config); endpoint != nil {
		return config.TransportTo(endpoint)
	}
	return nil
}

// single is the Router of outbound HTTP in a filter chain for TCP: all requests go to the connection's endpoint. The connection is
// also retired when a push has brought routes for it or another cluster, so that its client's next connection goes there.
type single struct {
	watched
	allowed httpforward.Decision
	info    mesh.ConnInfo
	met     *mesh.Snapshot // by whose filter chains moved is
	moved   bool           // a new connection would not go to the cluster
}

// single returns the Router of a connection whose endpoint was chosen; nil: it goes to its destination.
func (c *Conn) single(to *upstream.Target) httpforward.Router {
	if c.governed.chosen == nil {
		return nil
	}
	g := c.governed
	return &single{
		watched: *c.role.watch(g.snapshot, g.chosen, to, inside(c.protocol)),
		allowed: httpforward.Decision{Target: *to, Cluster: c.Record.Cluster, Route: c.Record.Route},
		info:    c.info(), met: g.snapshot,
	}
}

// Route implements httpforward.Router.
func (s *single) Route(*httpforward.Request) httpforward.Decision {
	if s.gone() && s.refused != nil {
		return httpforward.Decision{Reply: s.refused.reply, Cluster: s.allowed.Cluster, Route: s.allowed.Route}
	}
	return s.allowed
}

// Retired implements httpforward.Retirement.
func (s *single) Retired() bool { return s.gone() || s.hasMoved() }

// hasMoved looks at the configuration in force, if that is another one than before.
func (s *single) hasMoved() bool {
	if now := s.role.mesh.Snapshot(); now != s.met {
		chain, refusal := s.role.meet(now, &s.info)
		s.met, s.moved = now, refusal != "" || chain != nil && !s.serves(chain)
	}
	return s.moved
}

// serves reports whether connections in a filter chain may go to the cluster.
func (s *single) serves(chain *mesh.FilterChain) bool {
	switch {
	case chain.HTTP != nil:
		return false
	case chain.ClusterIsSNI:
		return true
	}
	return chain.TCP != nil && slices.ContainsFunc(chain.TCP.Clusters, func(c mesh.TCPCluster) bool { return c.Name == s.config.Name })
}

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
