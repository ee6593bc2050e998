package serve

import (
	"errors"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/httpforward"
	"github.com/pillion-proxy/pillion/internal/identity"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/secure"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// rejudge compares an open connection with the configuration and the identity in force. A push cuts no connection:
//
//   - Inbound, a connection whose mode is no longer allowed is retired: no filter chain is left for it, or TLS is to end
//     where it does not, or the other way round. HTTP ends as in a drain, and other connections after opaqueRetirement.
//   - Inbound, a request is refused if its filter chain is.
//   - Outbound, HTTP inside TLS is retired when the roots that have verified the endpoint are replaced, or when the
//     configuration secures the destination otherwise. Other connections stay.
type rejudge struct {
	role    *Role
	info    mesh.ConnInfo
	secured bool                 // TLS with downstream is ended here
	way     mesh.Way             // of an outbound connection
	roots   *identity.Roots      // that have verified the endpoint; nil: not the mesh's
	allowed httpforward.Decision // for every request

	snapshot *mesh.Snapshot // that was judged by last
	own      *identity.Identity
	refused  bool // by these
	retired  bool // by these
}

// rejudge returns what judges the connection again, or nil if nothing does.
func (c *Conn) rejudge(to *upstream.Target) *rejudge {
	g := c.governed
	switch {
	case g == nil, c.role.direction == flow.Outbound && (g.way.TLS == nil || g.way.Endpoint.IsValid()):
		return nil
	}
	r := &rejudge{role: c.role, info: c.info(), secured: g.secured, way: g.way, snapshot: g.snapshot, own: c.role.mesh.Identity()}
	if g.secured {
		r.info.TLS, r.info.ServerName, r.info.Protocols = true, c.Record.TLS.ServerName, c.Record.TLS.ALPN
	}
	if r.own != nil && g.way.TLS != nil && g.way.TLS.Roots == secure.OwnRoots {
		r.roots = r.own.Roots
	}
	r.allowed = httpforward.Decision{Target: *to, Cluster: c.Record.Cluster, Route: c.Record.Route}
	return r
}

// Route implements httpforward.Router.
func (r *rejudge) Route(*httpforward.Request) httpforward.Decision {
	if r.judge(); r.refused {
		return httpforward.Decision{}
	}
	return r.allowed
}

// Retired implements httpforward.Retirement.
func (r *rejudge) Retired() bool {
	r.judge()
	return r.retired
}

// judge does nothing if nothing has changed.
func (r *rejudge) judge() {
	s, own := r.role.mesh.Snapshot(), r.role.mesh.Identity()
	if s == r.snapshot && own == r.own {
		return
	}
	r.snapshot, r.own = s, own
	if r.role.direction == flow.Outbound {
		way, refusal := s.Outbound(&r.info)
		r.retired = refusal != "" || way.TLS != r.way.TLS || r.roots != nil && !r.roots.Equal(own.Roots)
		return
	}
	if ended, ok := s.InboundMode(&r.info); !ok || ended != r.secured {
		r.retired, r.refused = true, false
		return
	}
	_, refusal := s.Inbound(&r.info)
	r.retired, r.refused = false, refusal != ""
}

// opaqueRetirement is how long a connection of an unknown protocol may go on: Envoy's time to drain one, as Istio sets it.
const opaqueRetirement = 45 * time.Second

var errRetired = errors.New("the configuration allows connections of its kind no longer, and the time to end it has passed")
