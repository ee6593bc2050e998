package serve

import "github.com/pillion-proxy/pillion/internal/mesh"

// accepted is a connection that a gateway has accepted. It is retired when its listener is removed, when no filter chain is
// left for it, or when another handshake or another protocol is asked of its client. Until it has ended, it follows the last
// filter chain that it has met.
type accepted struct {
	role    *Role
	info    mesh.ConnInfo
	ended   *mesh.DownstreamTLS // as in governed
	http    bool
	seen    *mesh.Snapshot
	retired bool // by seen
}

func (c *Conn) accepted() accepted {
	g, info := c.governed, c.info()
	if g.ended != nil {
		info = c.infoInside()
	}
	return accepted{role: c.role, info: info, ended: g.ended, http: g.chain.HTTP != nil, seen: g.snapshot}
}

// gone looks at the configuration in force, if that is another one than before.
func (a *accepted) gone() bool {
	if s := a.role.mesh.Snapshot(); s != a.seen {
		chain := s.GatewayChain(&a.info)
		a.seen, a.retired = s, chain == nil || !chain.TLS.Admits(a.ended) || (chain.HTTP != nil) != a.http
	}
	return a.retired
}

// Retired implements httpforward.Retirement.
func (r *routing) Retired() bool { return r.role.gateway && r.accepted.gone() }
