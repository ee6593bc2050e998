package serve

import (
	"github.com/pillion-proxy/pillion/internal/httpforward"
	"github.com/pillion-proxy/pillion/internal/identity"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/secure"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// verified is the Router of outbound HTTP inside TLS: all requests go to the connection's target. The connection is retired
// when the roots of trust that have verified its endpoint are replaced, or when the configuration secures the destination
// otherwise.
type verified struct {
	role    *Role
	info    mesh.ConnInfo
	way     mesh.Way
	roots   *identity.Roots // nil: not those of the mesh
	allowed httpforward.Decision

	snapshot *mesh.Snapshot                       // that was looked at last
	own      *identity.Identity                   // likewise
	secure   func(host string) *upstream.Security // nil: the host of a request does not matter
	host     string                               // of the last request
	retired  bool                                 // by these
}

// verified returns nil if the connection is not secured, or if its endpoint was chosen among others: another look may choose
// another one.
func (c *Conn) verified(to *upstream.Target) httpforward.Router {
	way := c.governed.way
	if way.TLS == nil || way.Endpoint.IsValid() {
		return nil
	}
	r := &verified{
		role: c.role, info: c.info(), way: way, snapshot: c.governed.snapshot, own: c.role.mesh.Identity(),
		allowed: httpforward.Decision{Target: *to, Cluster: c.Record.Cluster, Route: c.Record.Route},
	}
	if inside := c.inside(); secure.NeedsHost(way.TLS, inside) {
		r.secure = func(host string) *upstream.Security {
			return &upstream.Security{Handshake: c.handshake(way.TLS, inside, host)}
		}
	}
	if r.own != nil && way.TLS.Roots == secure.OwnRoots {
		r.roots = r.own.Roots
	}
	return r
}

// Route implements httpforward.Router. Requests with different hosts do not share a connection if the host decides which
// server is expected.
func (r *verified) Route(request *httpforward.Request) httpforward.Decision {
	if r.secure != nil {
		if host := secure.HostOf(request.Authority); host != r.host {
			r.host, r.allowed.Target.Security = host, r.secure(host)
		}
	}
	return r.allowed
}

// Retired implements httpforward.Retirement.
func (r *verified) Retired() bool {
	s, own := r.role.mesh.Snapshot(), r.role.mesh.Identity()
	if s != r.snapshot || own != r.own {
		r.snapshot, r.own = s, own
		way, refusal := s.Outbound(&r.info)
		r.retired = refusal != "" || way.TLS != r.way.TLS || r.roots != nil && !r.roots.Equal(own.Roots)
	}
	return r.retired
}
