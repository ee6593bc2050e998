package serve

import (
	"context"
	"errors"
	"net"

	"github.com/pillion-proxy/pillion/internal/callout"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/secure"
)

// calloutSecurity is how connections of the agent's own requests are secured. It is comparable, and names the roots of trust,
// so that connections that others have verified are not used any more.
type calloutSecurity struct {
	role *Role
	secured
}

// calloutSecurity returns how connections to the endpoints of a cluster are secured.
func (r *Role) calloutSecurity(t *mesh.UpstreamTLS, http2 bool, host string) (callout.Security, error) {
	s := r.mesh.Snapshot()
	if s == nil {
		return nil, errors.New("the control plane has sent no configuration yet")
	}
	key := secured{by: t, inside: secure.HTTP1, roots: r.verifiedBy(t, s)}
	if http2 {
		key.inside = secure.HTTP2
	}
	if secure.NeedsHost(t, key.inside) {
		key.host = secure.HostOf([]byte(host))
	}
	return calloutSecurity{r, key}, nil
}

// Handshake implements callout.Security.
func (c calloutSecurity) Handshake(ctx context.Context, conn net.Conn) (net.Conn, error) {
	context, err := c.role.contexts.Client(c.by, c.inside, c.host)
	if err != nil {
		return nil, err
	}
	secured := context.Conn(conn)
	if err := secured.HandshakeContext(ctx); err != nil {
		return nil, err
	}
	return secured, nil
}
