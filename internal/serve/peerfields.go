package serve

import (
	"cmp"
	"sync"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/httpforward"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/secure"
)

// The treatment without an HTTP manager.
var removedClientCert = &httpforward.PeerFields{ClientCert: httpforward.RemoveClientCert}

// shared has the treatments without a field of the connection's own. The names of servers in them are those of configurations,
// so they are few.
var shared sync.Map

// treatment returns the shared treatment with an action and the server's name of an HTTP manager.
func treatment(action httpforward.ClientCert, h *mesh.HTTPManager) *httpforward.PeerFields {
	return share(named(httpforward.PeerFields{ClientCert: action}, h))
}

// share returns p, once for all connections.
func share(p httpforward.PeerFields) *httpforward.PeerFields {
	if known, ok := shared.Load(p); ok {
		return known.(*httpforward.PeerFields)
	}
	known, _ := shared.LoadOrStore(p, &p)
	return known.(*httpforward.PeerFields)
}

// named sets the server's name in responses.
func named(p httpforward.PeerFields, h *mesh.HTTPManager) httpforward.PeerFields {
	if h.ServerHeader != mesh.PassServer {
		p.Server, p.IfAbsent = cmp.Or(h.ServerName, defaultServerName), h.ServerHeader == mesh.AppendServerIfAbsent
	}
	return p
}

// defaultServerName is Envoy's. Istio leaves it to outbound HTTP managers (util/proxy_headers.go), so the clients of a mesh
// see it.
const defaultServerName = "envoy"

// peers returns the treatment of fields about peers in the HTTP of a connection. Without a control plane, and in a filter
// chain for TCP, they are fields like any other.
func (c *Conn) peers() *httpforward.PeerFields {
	p := c.clientFields()
	if p == nil || !c.exchanges() {
		return p
	}
	return c.role.exchanging(p)
}

// exchanging returns p with the exchange of metadata.
func (r *Role) exchanging(p *httpforward.PeerFields) *httpforward.PeerFields {
	described := *p
	described.Exchange, described.Introduces = r.peers, r.direction == flow.Outbound
	if p.Element == "" {
		return share(described)
	}
	return &described
}

// exchanges reports whether metadata is exchanged with the peer of a connection of HTTP, as far as its filters and its
// cluster decide that. Servers outside of the mesh do not receive it.
func (c *Conn) exchanges() bool {
	g := c.governed
	switch {
	case c.role.peers == nil:
		return false
	case c.role.direction == flow.Outbound:
		return false // the decision for each request has it
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
	if h == nil {
		return nil
	}
	return managedOf(h).plain
}

// showsOtherwise reports whether a chain shows the certificate of a client otherwise than shown does, the manager by which its
// connection does. shown may be nil.
func showsOtherwise(shown *mesh.HTTPManager, chain *mesh.FilterChain) bool {
	if shown == nil || chain == nil || chain.HTTP == nil {
		return false
	}
	return shown.ClientCert != chain.HTTP.ClientCert || shown.ClientCertDetails != chain.HTTP.ClientCertDetails
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
		return treatment(httpforward.KeepClientCert, h), nil
	case mesh.AppendClientCert:
	case mesh.ReplaceClientCert:
		action = httpforward.ReplaceClientCert
	default:
		return treatment(httpforward.RemoveClientCert, h), nil
	}
	element, err := secure.ClientCertElement(session, h.ClientCertDetails)
	if err != nil {
		return nil, &secure.Error{Failure: secure.Malformed, Detail: err.Error(), Err: err}
	}
	p := named(httpforward.PeerFields{ClientCert: action, Element: element}, h)
	return &p, nil
}
