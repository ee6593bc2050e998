package serve

import (
	"slices"
	"time"

	"github.com/pillion-proxy/pillion/internal/authz"
	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/mesh"
)

// accepted is a connection that a gateway has accepted. It is retired when its listener is removed: for a short time it follows
// the last filter chain that it has met. It is barred as well when a new connection of its kind would be treated otherwise: no
// filter chain is left for it, or another handshake, another protocol or an answer of a server is asked of its client. It is
// only retired when the certificate of its client is shown in another way: see rejudge.
type accepted struct {
	role    *Role
	info    mesh.ConnInfo
	ended   *mesh.DownstreamTLS // as in governed
	shown   *mesh.HTTPManager   // likewise
	http    bool
	asked   bool           // servers were asked about it, if there are any in its chain
	subject *authz.Subject // of a connection of bytes
	seen    *mesh.Snapshot
	retired bool      // by seen
	barred  bool      // likewise
	denied  bool      // likewise, by a policy; of a connection of bytes
	removed time.Time // when the listener was; zero: it is there
}

func (c *Conn) accepted() accepted {
	g, info := c.governed, c.info()
	if g.ended != nil {
		info = c.infoInside()
	}
	a := accepted{
		role: c.role, info: info, ended: g.ended, shown: g.shown, http: g.chain.HTTP != nil, asked: asksAbout(g.chain), seen: g.snapshot,
	}
	if showsOtherwise(a.shown, g.chain) {
		a.seen = nil // Retired looks again
	}
	if !a.http {
		subject := c.subject()
		a.subject = &subject
	}
	return a
}

// asksAbout reports whether servers are asked about connections of a chain.
func asksAbout(chain *mesh.FilterChain) bool {
	return slices.ContainsFunc(chain.Policies, func(f mesh.NetworkFilter) bool { return f.ExtAuthz != nil && f.ExtAuthz.Restricts() })
}

// gone looks at the configuration in force, if that is another one than before.
func (a *accepted) gone() bool {
	s := a.role.mesh.Snapshot()
	if s == a.seen {
		return a.retired
	}
	a.seen, a.retired, a.barred, a.denied = s, true, false, false
	switch {
	case s.Accepts(a.info.Destination):
		a.removed = time.Time{}
		a.judge(s)
	case a.removed.IsZero():
		a.removed = time.Now()
	}
	return a.retired
}

// judge judges a connection whose listener is in s.
func (a *accepted) judge(s *mesh.Snapshot) {
	chain := s.GatewayChain(&a.info)
	switch {
	case chain == nil, !chain.TLS.Admits(a.ended), (chain.HTTP != nil) != a.http, asksAbout(chain) && !a.asked:
		a.barred = true
	case a.http:
		a.retired = showsOtherwise(a.shown, chain) // all else is judged for each request
		return
	default:
		_, a.denied = authorize(chain.Policies, a.subject)
		_, refusal := s.Gateway(&a.info)
		a.barred = a.denied || refusal != ""
	}
	a.retired = a.barred
}

// bars reports whether the configuration in force bars the connection.
func (a *accepted) bars() bool { return a.gone() && a.barred }

// deniedByPolicy reports whether a policy of connections in force denies the connection.
func (a *accepted) deniedByPolicy() bool { return a.gone() && a.denied }

// explain explains that a policy of connections denies the connection, and returns Envoy's details of that.
func (a *accepted) explain(l *shadows) (details string) {
	chain := a.role.mesh.Snapshot().GatewayChain(&a.info)
	if chain == nil {
		return ""
	}
	l.explain(a.role, a.subject, chain.Policies...)
	policy, denied := authorize(chain.Policies, a.subject)
	if !denied {
		return "" // a push has changed it meanwhile
	}
	return envoy.DeniedByPolicy(policy)
}

// late reports whether a connection whose listener is removed follows it no longer.
func (a *accepted) late() bool {
	a.gone()
	return !a.removed.IsZero() && time.Since(a.removed) > removalGrace
}

// removalGrace is how long requests are still served after their listener was removed: as long as httpforward serves those of a
// retired connection.
const removalGrace = time.Second

// Retired implements httpforward.Retirement.
func (r *routing) Retired() bool {
	if r.role.gateway {
		return r.accepted.gone()
	}
	r.look()
	return r.retired
}
