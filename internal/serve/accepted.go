package serve

import "github.com/pillion-proxy/pillion/internal/mesh"

// accepted is a connection that a gateway has accepted. It is retired when its listener is removed, when no filter chain is
// left for it, or when that is of another kind: TLS is to end where it does not, or requests are routed where bytes are carried,
// or the other way round. Until it has ended, it follows the last filter chain that it has met.
type accepted struct {
	role              *Role
	info              mesh.ConnInfo
	secured, requests bool
	seen              *mesh.Snapshot
	retired           bool // by seen
}

func (c *Conn) accepted() accepted {
	g, info := c.governed, c.info()
	if g.secured {
		info = c.infoInside()
	}
	return accepted{role: c.role, info: info, secured: g.secured, requests: g.routing != nil, seen: g.snapshot}
}

// gone looks at the configuration in force, if that is another one than before.
func (a *accepted) gone() bool {
	if s := a.role.mesh.Snapshot(); s != a.seen {
		ended, requests, ok := s.GatewayMode(&a.info)
		a.seen, a.retired = s, !ok || ended != a.secured || requests != a.requests
	}
	return a.retired
}

// Retired implements httpforward.Retirement.
func (r *routing) Retired() bool { return r.role.gateway && r.accepted.gone() }
