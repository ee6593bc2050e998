package mesh

import (
	"net/netip"
	"slices"
)

// Names that istiod gives to the listeners that accept redirected connections.
const (
	virtualInbound  = "virtualInbound"
	virtualOutbound = "virtualOutbound"
)

// Verdict returns why a connection must not be carried to its original destination, and nothing if it may be. It closes
// whatever the configuration refuses, and whatever it secures in a way that is not carried out: TLS with the client or
// with the endpoint, and policies. A destination that no listener is for is carried.
func (s *Snapshot) Verdict(direction Direction, c *ConnInfo) (refusal string) {
	if direction == Inbound {
		return s.inbound(c)
	}
	return s.outbound(c)
}

func (s *Snapshot) inbound(c *ConnInfo) string {
	l := s.Listener(virtualInbound)
	if l == nil {
		return ""
	}
	_, refusal := l.judge(c)
	return refusal
}

// judge returns the filter chain of a connection, or why it is refused.
func (l *Listener) judge(c *ConnInfo) (*FilterChain, string) {
	info := l.inspected(c)
	chain, ok := l.Match(&info)
	switch {
	case l.Refused:
		return nil, "the listener " + l.Name + " is refused"
	case !ok && !info.TLS:
		return nil, "no filter chain of " + l.Name + " accepts it without TLS"
	case !ok:
		return nil, "no filter chain of " + l.Name + " accepts it"
	case chain.Refused:
		return nil, "its filter chain in " + l.Name + " is refused"
	case chain.TLS != nil:
		return nil, "its filter chain in " + l.Name + " ends TLS, which is not supported yet"
	case len(chain.Policies) > 0:
		return nil, "its filter chain in " + l.Name + " has policies, which are not supported yet"
	}
	return chain, judgeHTTP(chain.HTTP)
}

// inspected returns what the listener's filters find out about a connection.
func (l *Listener) inspected(c *ConnInfo) ConnInfo {
	info := *c
	kind := HTTPInspector
	if c.TLS {
		kind = TLSInspector
	}
	if !slices.ContainsFunc(l.Filters, func(f ListenerFilter) bool { return f.Kind == kind && f.Applies(c.Destination.Port()) }) {
		info.TLS, info.ServerName, info.Protocols = false, "", nil
	}
	return info
}

// judgeHTTP returns why no request may pass. A part of the routes that is refused closes the connection: which requests it
// concerns is seen only later.
func judgeHTTP(h *HTTPManager) string {
	if h == nil {
		return ""
	}
	for _, f := range h.Filters {
		if slices.Contains(policyFilters, f.Type) {
			return "the HTTP filter " + f.Name + " is not supported yet"
		}
	}
	if h.Routes != nil && (h.Routes.Refused || slices.ContainsFunc(h.Routes.Hosts, func(v VirtualHost) bool { return v.Refused })) {
		return "routes are refused"
	}
	return ""
}

func (s *Snapshot) outbound(c *ConnInfo) string {
	l := s.Destination(c.Destination)
	if l == nil {
		l = s.Listener(virtualOutbound)
	}
	if l == nil {
		return ""
	}
	chain, refusal := l.judge(c)
	switch {
	case refusal != "":
		return refusal
	case chain.TCP != nil:
		for _, cluster := range chain.TCP.Clusters {
			if refusal := s.secured(cluster.Name); refusal != "" {
				return refusal
			}
		}
	case chain.HTTP != nil:
		return s.judgeRoutes(s.Routes(chain.HTTP), c.Destination)
	}
	return ""
}

// judgeRoutes judges the virtual host of an original destination: istiod lists a service's addresses among its domains.
// Without such a host the connection goes to no service of the mesh.
func (s *Snapshot) judgeRoutes(routes *Routes, destination netip.AddrPort) string {
	switch {
	case routes == nil:
		return "the listener's routes are missing"
	case routes.Refused:
		return "the routes " + routes.Name + " are refused"
	}
	for i := range routes.Hosts {
		host := &routes.Hosts[i]
		if !host.has(destination) {
			continue
		}
		if host.Refused {
			return "the virtual host " + host.Name + " is refused"
		}
		for j := range host.Routes {
			if refusal := s.judgeRoute(&host.Routes[j]); refusal != "" {
				return refusal
			}
		}
	}
	return ""
}

func (s *Snapshot) judgeRoute(r *Route) string {
	if r.Refused {
		return "the route " + r.Name + " is refused"
	}
	if r.Forward == nil {
		return ""
	}
	for i := range r.Forward.Clusters {
		if refusal := s.secured(r.Forward.Clusters[i].Name); refusal != "" {
			return refusal
		}
	}
	return ""
}

// has reports whether an address is one of the host's domains, with or without the port.
func (v *VirtualHost) has(address netip.AddrPort) bool {
	var buffer [64]byte
	whole := address.AppendTo(buffer[:0])
	alone := address.Addr().AppendTo(whole[len(whole):])
	return slices.ContainsFunc(v.Domains, func(d Domain) bool {
		return d.Kind == DomainExact && (d.Text == string(whole) || d.Text == string(alone))
	})
}

// secured returns why plain connections to a cluster are refused, if they are: one of its endpoints must be reached by
// TLS, or the cluster has no endpoint at all by configuration.
func (s *Snapshot) secured(name string) string {
	c := s.Cluster(name)
	if c == nil {
		return ""
	}
	if len(c.Transports) > 0 && !c.Transports[0].plain() && c.Transports[0].TLSMode == "" {
		return "the cluster " + name + " requires TLS, which is not supported yet"
	}
	hosts := s.Hosts(c)
	if hosts == nil {
		return ""
	}
	endpoints := 0
	for i := range hosts.Localities {
		for j := range hosts.Localities[i].Endpoints {
			endpoints++
			if t := c.transport(&hosts.Localities[i].Endpoints[j]); t != nil && !t.plain() {
				return "endpoints of the cluster " + name + " require TLS, which is not supported yet"
			}
		}
	}
	if c.Discovery == Static && endpoints == 0 {
		return "the cluster " + name + " has no endpoints"
	}
	return ""
}

func (t *Transport) plain() bool { return t.TLS == nil && !t.Refused }

// transport returns the transport to an endpoint; nil is plain.
func (c *Cluster) transport(e *Endpoint) *Transport {
	for i := range c.Transports {
		if t := &c.Transports[i]; t.TLSMode == "" || t.TLSMode == e.TLSMode {
			return t
		}
	}
	return nil
}
