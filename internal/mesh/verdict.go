package mesh

import (
	"cmp"
	"math/rand/v2"
	"net/netip"
	"slices"
)

// Names that istiod gives to the listeners that accept redirected connections.
const (
	virtualInbound  = "virtualInbound"
	virtualOutbound = "virtualOutbound"
)

// Inbound returns the filter chain that an inbound connection meets, or why it is refused: the configuration refuses it, or
// restricts it in a way that is not carried out. Both are empty if there is no listener: the connection is carried. The
// caller ends TLS if the chain has it, and applies the chain's RBAC and JWT to the connection and to
// each request.
func (s *Snapshot) Inbound(c *ConnInfo) (chain *FilterChain, refusal string) {
	l := s.Listener(virtualInbound)
	if l == nil {
		return nil, ""
	}
	chain, refusal = l.judge(s, c)
	if refusal != "" {
		return nil, refusal
	}
	return chain, s.unsupported(chain, true)
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

// InboundChanged reports whether another inbound listener is in force than before.
func (s *Snapshot) InboundChanged(before *Snapshot) bool {
	return s.Listener(virtualInbound) != before.Listener(virtualInbound)
}

// Way is how an outbound connection is made. The zero value goes to the original destination without TLS.
type Way struct {
	Cluster *Cluster     // nil: of none
	TLS     *UpstreamTLS // nil: plain
	HTTP    *HTTPManager // of the filter chain that the connection meets; nil: it has none

	// Endpoint is dialled instead of the original destination if the endpoints of the cluster are reached in different ways.
	Endpoint netip.AddrPort
}

// Outbound returns the way of an outbound connection, or why it is refused: the configuration refuses it, or restricts it
// in a way that is not carried out. A destination that no listener is for is carried as it is. Routes are not followed yet:
// if the routes of a destination lead to several clusters, and to one of them by TLS, the connection is refused.
func (s *Snapshot) Outbound(c *ConnInfo) (way Way, refusal string) {
	l := s.Destination(c.Destination)
	if l == nil {
		l = s.Listener(virtualOutbound)
	}
	if l == nil {
		return Way{}, ""
	}
	chain, refusal := l.judge(s, c)
	if refusal == "" {
		refusal = s.unsupported(chain, false)
	}
	switch {
	case refusal != "":
		return Way{}, refusal
	case chain.TLS != nil:
		return Way{}, "its filter chain in " + l.Name + " ends TLS, which is not supported yet"
	}
	j := journey{snapshot: s}
	switch {
	case chain.TCP != nil:
		for _, cluster := range chain.TCP.Clusters {
			j.visit(cluster.Name)
		}
	case chain.HTTP != nil:
		j.routes(s.Routes(chain.HTTP), c.Destination)
	}
	j.way.HTTP = chain.HTTP
	if !j.visited && j.missing != "" {
		j.refuse("the cluster " + j.missing + " is not configured") // it may have required TLS
	}
	return j.way, j.refusal
}

// judge returns the filter chain of a connection, or why it is refused.
func (l *Listener) judge(s *Snapshot, c *ConnInfo) (*FilterChain, string) {
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
	}
	return chain, ""
}

// unsupported returns why a chain is closed: it has restrictions that are not carried out. With enforced, the
// caller applies RBAC and JWT.
func (s *Snapshot) unsupported(chain *FilterChain, enforced bool) string {
	for _, f := range chain.Policies {
		if f.Restricts() && (f.RBAC == nil || !enforced) {
			return "its filter chain has the policy " + f.Name + ", which is not supported"
		}
	}
	return s.judgeHTTP(chain.HTTP, enforced)
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
		case f.Restricts() && (f.RBAC == nil && f.JWT == nil || !enforced):
			return "the HTTP filter " + f.Name + " is not supported yet"
		}
	}
	if h.Routes != nil && (h.Routes.Refused || slices.ContainsFunc(h.Routes.Hosts, func(v VirtualHost) bool { return v.Refused })) {
		return "routes are refused"
	}
	return ""
}

// journey collects the ways of the clusters that a connection may go to.
type journey struct {
	snapshot *Snapshot
	way      Way
	visited  bool   // way is that of a cluster
	missing  string // a cluster that does not exist
	refusal  string // the first one
}

// routes visits the clusters in the virtual host of an original destination: istiod lists a service's addresses among its
// domains. Without such a host the destination may be an endpoint of a headless service, or another address.
func (j *journey) routes(routes *Routes, destination netip.AddrPort) {
	switch {
	case routes == nil:
		j.refuse("the listener's routes are missing")
		return
	case routes.Refused:
		j.refuse("the routes " + routes.Name + " are refused")
		return
	}
	found := false
	for i := range routes.Hosts {
		host := &routes.Hosts[i]
		if !host.has(destination) {
			continue
		}
		found = true
		if host.Refused {
			j.refuse("the virtual host " + host.Name + " is refused")
		}
		for k := range host.Routes {
			j.route(&host.Routes[k])
		}
	}
	if !found {
		j.unlisted(routes, destination)
	}
}

// unlisted judges a destination that is no domain of the routes. Which host a request names is not looked at yet, so the
// destination decides: an endpoint of a cluster is reached as the cluster says. It is refused if the routes answer all
// other hosts themselves, as they do with REGISTRY_ONLY, or if it may belong to a cluster whose hosts are found by name and
// reached by TLS.
func (j *journey) unlisted(routes *Routes, destination netip.AddrPort) {
	for i := range routes.Hosts {
		host := &routes.Hosts[i]
		if slices.ContainsFunc(host.Domains, func(d Domain) bool { return d.Kind == DomainAny }) {
			if len(host.Routes) > 0 && host.Routes[0].Respond != nil {
				j.refuse("the routes " + routes.Name + " have no host for it")
			}
			continue
		}
		for k := range host.Routes {
			if f := host.Routes[k].Forward; f != nil {
				j.endpoint(f.Clusters, destination)
			}
		}
	}
}

// endpoint visits the clusters that a destination is an endpoint of, or may be one of.
func (j *journey) endpoint(clusters []WeightedCluster, destination netip.AddrPort) {
	for i := range clusters {
		c := j.snapshot.Cluster(clusters[i].Name)
		if c == nil {
			continue
		}
		endpoints, _ := j.snapshot.transports(c)
		switch byName := c.Discovery == StrictDNS || c.Discovery == LogicalDNS; {
		case slices.ContainsFunc(endpoints, func(e *Endpoint) bool { return e.Address == destination }):
			j.visit(c.Name)
		case byName && slices.ContainsFunc(c.Transports, func(t Transport) bool { return !t.plain() }):
			j.refuse("it may be a host of the cluster " + c.Name + ", which requires TLS; routes by host are not supported yet")
		}
	}
}

func (j *journey) route(r *Route) {
	if r.Refused {
		j.refuse("the route " + r.Name + " is refused")
	}
	if r.Forward == nil {
		return
	}
	for i := range r.Forward.Clusters {
		j.visit(r.Forward.Clusters[i].Name)
	}
}

func (j *journey) refuse(why string) { j.refusal = cmp.Or(j.refusal, why) }

// visit adds a cluster. All clusters must be reached in the same way.
func (j *journey) visit(name string) {
	c := j.snapshot.Cluster(name)
	if c == nil {
		j.missing = name
		return
	}
	way, refusal := j.snapshot.to(c)
	j.refuse(refusal)
	switch {
	case !j.visited:
		j.way, j.visited = way, true
	case j.way.Cluster != c && (j.way.TLS != nil || way.TLS != nil):
		j.refuse("its routes lead to several clusters, and to one of them by TLS, which is not supported yet")
	}
}

// to returns the way to a cluster. If its endpoints are reached in different ways, one of those that are healthy is chosen
// by weight. Endpoints that are not known might require TLS, so a cluster that may do so is refused without any.
func (s *Snapshot) to(c *Cluster) (way Way, refusal string) {
	if c.Refused {
		return Way{}, "the cluster " + c.Name + " is refused"
	}
	endpoints, mixed := s.transports(c)
	t := c.TransportTo(&Endpoint{})
	switch {
	case endpoints == nil && (c.Discovery == Static || c.Discovery == ByEDS && slices.ContainsFunc(c.Transports, func(t Transport) bool { return !t.plain() })):
		return Way{}, "the cluster " + c.Name + " has no endpoints"
	case endpoints != nil && !mixed:
		t = c.TransportTo(endpoints[0])
	case mixed:
		chosen := choose(endpoints)
		if chosen == nil || !chosen.Address.IsValid() {
			return Way{}, "the cluster " + c.Name + " has no healthy endpoints"
		}
		t, way.Endpoint = c.TransportTo(chosen), chosen.Address
	}
	if way.Cluster = c; t == nil {
		return way, ""
	}
	if t.Refused {
		return Way{}, "the transport " + t.Name + " of the cluster " + c.Name + " is not supported"
	}
	way.TLS = t.TLS
	return way, ""
}

// transports returns the endpoints of a cluster, and whether they are reached by different transports.
func (s *Snapshot) transports(c *Cluster) (endpoints []*Endpoint, mixed bool) {
	hosts := s.Hosts(c)
	if hosts == nil {
		return nil, false
	}
	for i := range hosts.Localities {
		for k := range hosts.Localities[i].Endpoints {
			e := &hosts.Localities[i].Endpoints[k]
			mixed = mixed || endpoints != nil && c.TransportTo(e) != c.TransportTo(endpoints[0])
			endpoints = append(endpoints, e)
		}
	}
	return endpoints, mixed
}

// choose returns a healthy endpoint by weight, or nil.
func choose(endpoints []*Endpoint) (chosen *Endpoint) {
	var sum uint64
	for _, e := range endpoints {
		if !e.Health.Usable() {
			continue
		}
		if sum += uint64(e.Weight); chosen == nil || sum > 0 && rand.Uint64N(sum) < uint64(e.Weight) {
			chosen = e
		}
	}
	return chosen
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

// TransportTo returns the transport of connections to an endpoint; nil is plain.
func (c *Cluster) TransportTo(e *Endpoint) *Transport {
	for i := range c.Transports {
		if t := &c.Transports[i]; t.TLSMode == "" || t.TLSMode == e.TLSMode {
			return t
		}
	}
	return nil
}

func (t *Transport) plain() bool { return t.TLS == nil && !t.Refused }
