package serve

import (
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/httpforward"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/secure"
)

// The treatments without a field of the connection's own.
var (
	keptClientCert    = &httpforward.PeerFields{ClientCert: httpforward.KeepClientCert}
	removedClientCert = &httpforward.PeerFields{ClientCert: httpforward.RemoveClientCert}
)

// peers returns the treatment of fields about peers in the HTTP of a connection. Without a control plane, and in a filter
// chain for TCP, they are fields like any other.
func (c *Conn) peers() *httpforward.PeerFields {
	switch p := c.clientFields(); {
	case p == nil || !c.exchanges():
		return p
	case p == keptClientCert || p == removedClientCert:
		return c.role.exchanging[p.ClientCert]
	default:
		p.Exchange = c.role.peers // p is the connection's own
		return p
	}
}

// exchanges reports whether metadata is exchanged with the peer of a connection of HTTP, as far as its filters and its
// cluster decide that. Servers outside of the mesh do not receive it.
func (c *Conn) exchanges() bool {
	g := c.governed
	switch {
	case c.role.peers == nil:
		return false
	case c.role.direction == flow.Outbound:
		return g.routing != nil && g.routing.pinned != nil && g.routing.exchanges(g.routing.pinned.config)
	}
	return g.chain != nil && g.chain.HTTP.ExchangesMetadata()
}

// clientFields is peers without the exchange of metadata.
func (c *Conn) clientFields() *httpforward.PeerFields {
	g := c.governed
	switch {
	case g == nil:
		return nil
	case g.peers != nil:
		return g.peers
	case g.chain != nil:
		return withoutClient(g.chain.HTTP)
	case c.role.direction == flow.Outbound:
		return nil
	}
	return removedClientCert
}

// withoutClient is peerFields for clients without a certificate. h may be nil.
func withoutClient(h *mesh.HTTPManager) *httpforward.PeerFields {
	switch {
	case h == nil:
		return nil
	case h.ClientCert == mesh.AlwaysForwardClientCert:
		return keptClientCert
	}
	return removedClientCert
}

// peerFields returns the treatment of the requests of a client: an x-forwarded-client-cert that it sends is kept only if
// it has a certificate, or if the configuration keeps it in any case (mutateXfccRequestHeader of Envoy).
func peerFields(h *mesh.HTTPManager, session *secure.Session) (*httpforward.PeerFields, error) {
	if session.Peer == nil {
		return withoutClient(h), nil
	}
	action := httpforward.AppendClientCert
	switch h.ClientCert {
	case mesh.ForwardClientCert, mesh.AlwaysForwardClientCert:
		return keptClientCert, nil
	case mesh.AppendClientCert:
	case mesh.ReplaceClientCert:
		action = httpforward.ReplaceClientCert
	default:
		return removedClientCert, nil
	}
	element, err := secure.ClientCertElement(session, h.ClientCertDetails)
	if err != nil {
		return nil, &secure.Error{Failure: secure.Malformed, Detail: err.Error(), Err: err}
	}
	return &httpforward.PeerFields{ClientCert: action, Element: element}, nil
}
