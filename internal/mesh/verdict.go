package mesh

import (
	"net/netip"
	"slices"
	"time"
)

// Names that istiod gives to the listeners that accept redirected connections.
const (
	virtualInbound  = "virtualInbound"
	virtualOutbound = "virtualOutbound"
)

// Inbound returns the filter chain that an inbound connection meets, or why it is refused: the configuration refuses it, or
// restricts it in a way that is not carried out. Both are empty if there is no listener: the connection is carried. The
// caller ends TLS if the chain has it, and applies the policies of the chain to the connection and to
// each request.
func (s *Snapshot) Inbound(c *ConnInfo) (chain *FilterChain, refusal string) {
	l := s.Listener(virtualInbound)
	if l == nil {
		return nil, ""
	}
	chain, refusal = l.judge(s, c, false)
	if refusal != "" {
		return nil, refusal
	}
	if chain.HTTP.refusesRoute() {
		return chain, "a route is refused"
	}
	return chain, s.unsupported(chain)
}

// Accepting returns the listener that accepts the redirected connections of a direction, or nil.
func (s *Snapshot) Accepting(inbound bool) *Listener {
	if inbound {
		return s.Listener(virtualInbound)
	}
	return s.Listener(virtualOutbound)
}

// InboundMode reports whether the configuration has a filter chain for an inbound connection, and whether that ends TLS.
// Without a listener it is carried as it is. What the chain itself refuses is not looked at.
func (s *Snapshot) InboundMode(c *ConnInfo) (ended, ok bool) {
	l := s.Listener(virtualInbound)
	if l == nil {
		return false, true
	}
	info := l.inspected(c)
	chain, ok := l.Match(&info)
	return ok && chain.TLS != nil, ok
}

// InboundInspectsTLS reports whether inbound connections to a port are looked at for TLS.
func (s *Snapshot) InboundInspectsTLS(port uint16) bool {
	l := s.Listener(virtualInbound)
	return l != nil && l.inspects(TLSInspector, port)
}

// Outbound returns the filter chain that an outbound connection meets, or why it is refused. Both are empty if no listener is
// for its destination: it is carried there as it is.
func (s *Snapshot) Outbound(c *ConnInfo) (chain *FilterChain, refusal string) {
	l := s.Destination(c.Destination)
	if l == nil {
		l = s.Listener(virtualOutbound)
	}
	if l == nil {
		return nil, ""
	}
	chain, refusal = l.judge(s, c, false)
	if refusal == "" {
		refusal = s.unsupported(chain)
	}
	switch {
	case refusal != "":
		return nil, refusal
	case chain.TLS != nil:
		return nil, "its filter chain in " + l.Name + " ends TLS, which is not supported yet"
	}
	return chain, refusal
}

// Gateway returns the filter chain that a connection meets which was accepted at its destination, or why it is refused. The
// caller ends TLS if the chain has it.
func (s *Snapshot) Gateway(c *ConnInfo) (chain *FilterChain, refusal string) {
	l := s.accepts(c)
	if l == nil {
		return nil, "no listener accepts connections to its destination"
	}
	if chain, refusal = l.judge(s, c, true); refusal == "" {
		refusal = s.unsupported(chain)
	}
	if refusal != "" {
		return nil, refusal
	}
	return chain, ""
}

// GatewayChain returns the filter chain of a connection that a gateway has accepted, also if that is refused. It returns nil
// if the configuration has no chain for it.
func (s *Snapshot) GatewayChain(c *ConnInfo) *FilterChain {
	if l := s.accepts(c); l != nil {
		return l.Meet(c)
	}
	return nil
}

// GatewayInspectsTLS reports whether connections that a gateway has accepted at an address are looked at for TLS.
func (s *Snapshot) GatewayInspectsTLS(at netip.AddrPort) bool {
	l := s.accepts(&ConnInfo{Destination: at})
	return l != nil && l.inspects(TLSInspector, at.Port())
}

// ProxyFilter returns the filter by which connections that a gateway has accepted at an address begin with a header of the
// PROXY protocol, and how long that may take (zero: no limit); nil: they do not.
func (s *Snapshot) ProxyFilter(at netip.AddrPort) (f *ListenerFilter, limit time.Duration) {
	l := s.accepts(&ConnInfo{Destination: at})
	if l == nil {
		return nil, 0
	}
	for i := range l.Filters {
		if l.Filters[i].Kind == ProxyProtocol && l.Filters[i].Applies(at.Port()) {
			return &l.Filters[i], l.FiltersTimeout
		}
	}
	return nil, 0
}

// Accepts reports whether a gateway's listener accepts connections at an address.
func (s *Snapshot) Accepts(at netip.AddrPort) bool {
	return s.accepts(&ConnInfo{Destination: at}) != nil
}

// accepts returns the listener that accepts connections at their destination, or nil.
func (s *Snapshot) accepts(c *ConnInfo) *Listener {
	if l := s.Destination(c.Destination); l != nil && !l.Virtual {
		return l
	}
	return nil
}

// judge returns the filter chain of a connection, or why it is refused. A gateway takes PROXY headers.
func (l *Listener) judge(s *Snapshot, c *ConnInfo, gateway bool) (*FilterChain, string) {
	info := l.inspected(c)
	chain, ok := l.Match(&info)
	switch {
	case l.Refused:
		return nil, "the listener " + l.Name + " is refused"
	case !gateway && l.inspects(ProxyProtocol, c.Destination.Port()):
		return nil, "the listener " + l.Name + " takes the addresses of clients from the PROXY protocol, which is supported at gateways only"
	case !ok && !info.TLS:
		return nil, "no filter chain of " + l.Name + " accepts it without TLS"
	case !ok:
		return nil, "no filter chain of " + l.Name + " accepts it"
	case chain.Refused:
		return nil, "its filter chain in " + l.Name + " is refused"
	}
	return chain, ""
}

// unsupported returns why a chain is closed: it has restrictions that are not carried out. The caller applies RBAC, JWT and
// external authorization.
func (s *Snapshot) unsupported(chain *FilterChain) string {
	for _, f := range chain.Policies {
		if f.Restricts() && f.RBAC == nil && f.ExtAuthz == nil {
			return "its filter chain has the policy " + f.Name + ", which is not supported"
		}
	}
	return s.judgeHTTP(chain.HTTP, true)
}

// inspected returns what the listener's filters find out about a connection.
func (l *Listener) inspected(c *ConnInfo) ConnInfo {
	info := *c
	kind := HTTPInspector
	if c.TLS {
		kind = TLSInspector
	}
	if !l.inspects(kind, c.Destination.Port()) {
		info.TLS, info.ServerName, info.Protocols = false, "", nil
	}
	return info
}

// RestrictsRequests reports whether policies of a chain may deny single requests.
func (s *Snapshot) RestrictsRequests(chain *FilterChain) bool {
	return s.judgeHTTP(chain.HTTP, false) != ""
}

// JudgesRequests reports whether h has policies that look at requests, also if they only log: their verdicts are recorded, and
// routes may depend on them.
func (s *Snapshot) JudgesRequests(h *HTTPManager) bool {
	for i := range h.Filters {
		if now := s.Filter(&h.Filters[i]); now == nil || now.RBAC != nil || now.JWT != nil || now.ExtAuthz != nil {
			return true
		}
	}
	return false
}

func (l *Listener) inspects(kind ListenerFilterKind, port uint16) bool {
	return slices.ContainsFunc(l.Filters, func(f ListenerFilter) bool { return f.Kind == kind && f.Applies(port) })
}

// judgeHTTP returns why no request may pass. A part of the routes that is refused closes the connection: which requests it
// concerns is seen only later.
func (s *Snapshot) judgeHTTP(h *HTTPManager, enforced bool) string {
	if h == nil {
		return ""
	}
	for i := range h.Filters {
		switch f := s.Filter(&h.Filters[i]); {
		case f == nil:
			return "the configuration of the HTTP filter " + h.Filters[i].Name + " has not come"
		case f.Refused:
			return "the HTTP filter " + h.Filters[i].Name + " is refused"
		case f.Restricts() && (f.RBAC == nil && f.JWT == nil && f.ExtAuthz == nil || !enforced):
			return "the HTTP filter " + f.Name + " is not supported yet"
		}
	}
	if h.Routes != nil && (h.Routes.Refused || slices.ContainsFunc(h.Routes.Hosts, func(v VirtualHost) bool { return v.Refused })) {
		return "routes are refused"
	}
	return ""
}

// refusesRoute reports whether a route of h is refused. Inbound, requests do not follow the routes, so the one that a policy
// of its own concerns is not known.
func (h *HTTPManager) refusesRoute() bool {
	return h != nil && h.Routes != nil && slices.ContainsFunc(h.Routes.Hosts, func(v VirtualHost) bool {
		return slices.ContainsFunc(v.Routes, func(r Route) bool { return r.Refused })
	})
}

// TransportTo returns the transport of connections to an endpoint; nil is plain.
func (c *Cluster) TransportTo(e *Endpoint) *Transport {
	for i := range c.Transports {
		if t := &c.Transports[i]; t.TLSMode == "" || t.TLSMode == e.TLSMode {
			return t
		}
	}
	return nil
}
