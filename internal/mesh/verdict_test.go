package mesh

import (
	"net/netip"
	"strings"
	"testing"
)

// snapshotOf returns a snapshot with values of any kind.
func snapshotOf(t *testing.T, values ...any) *Snapshot {
	t.Helper()
	edit := (*Snapshot)(nil).Edit()
	for _, value := range values {
		switch value := value.(type) {
		case *Cluster:
			edit.SetCluster(value.Name, value)
		case *Assignment:
			edit.SetAssignment(value.Name, value)
		case *Routes:
			edit.SetRoutes(value.Name, value)
		case *Listener:
			if err := value.index.build(value.Chains); err != nil {
				t.Fatal(err)
			}
			edit.SetListener(value.Name, value)
		default:
			t.Fatalf("a %T", value)
		}
	}
	s, _ := edit.Snapshot()
	return s
}

// Inspectors, as istiod configures them.
var inspectors = []ListenerFilter{{Kind: TLSInspector}, {Kind: HTTPInspector}}

// accepting is an inbound listener with chains.
func accepting(chains ...*FilterChain) *Listener {
	return &Listener{Name: virtualInbound, Direction: Inbound, UseOriginalDst: true, Filters: inspectors, Chains: chains}
}

// forwarding is what a chain does that forwards to a cluster.
func forwarding(name string) *TCPProxy { return &TCPProxy{Clusters: []TCPCluster{{name, 1}}} }

func TestWhatConcernsSecurityAndIsNotCarriedOutIsClosed(t *testing.T) {
	mutual := &DownstreamTLS{RequireClient: true}
	plain := func(match ChainMatch) *FilterChain {
		return &FilterChain{Name: "plain", Match: match, TCP: forwarding("inbound")}
	}
	secure := func(match ChainMatch) *FilterChain {
		match.Transport = tlsTransport
		return &FilterChain{Name: "secure", Match: match, TLS: mutual, TCP: forwarding("inbound")}
	}
	permissive := []*FilterChain{
		plain(ChainMatch{Transport: plainTransport}), secure(ChainMatch{Protocols: []string{"istio"}}),
		{Match: ChainMatch{Transport: tlsTransport}, TCP: forwarding("inbound")},
	}
	over := func(alpn ...string) ConnInfo { return ConnInfo{TLS: true, Protocols: alpn} }
	for name, c := range map[string]struct {
		listener *Listener // nil: there is none
		conn     ConnInfo
		refusal  string // empty: it is carried
	}{
		"no listener":                         {nil, ConnInfo{}, ""},
		"STRICT and plain":                    {accepting(secure(ChainMatch{})), ConnInfo{}, "accepts it without TLS"},
		"STRICT and TLS":                      {accepting(secure(ChainMatch{})), over("istio"), "ends TLS, which is not supported yet"},
		"PERMISSIVE and plain":                {accepting(permissive...), ConnInfo{}, ""},
		"PERMISSIVE and TLS of the mesh":      {accepting(permissive...), over("istio"), "ends TLS"},
		"PERMISSIVE and TLS of the workload":  {accepting(permissive...), over("h2"), ""},
		"PERMISSIVE and TLS without ALPN":     {accepting(permissive...), over(), ""},
		"another port is STRICT":              {accepting(secure(ChainMatch{Port: 9}), plain(ChainMatch{})), ConnInfo{}, ""},
		"no chain for the port":               {accepting(plain(ChainMatch{Port: 9})), ConnInfo{}, "no filter chain of virtualInbound accepts it"},
		"a refused chain":                     {accepting(&FilterChain{Refused: true}), ConnInfo{}, "is refused"},
		"a refused listener":                  {&Listener{Name: virtualInbound, Refused: true, Default: plain(ChainMatch{})}, ConnInfo{}, "the listener virtualInbound is refused"},
		"a default chain":                     {&Listener{Name: virtualInbound, Default: plain(ChainMatch{})}, ConnInfo{}, ""},
		"network policies":                    {accepting(&FilterChain{TCP: forwarding("inbound"), Policies: []NetworkFilter{{Name: "rbac"}}}), ConnInfo{}, "has policies"},
		"HTTP policies":                       {accepting(&FilterChain{HTTP: &HTTPManager{Filters: []HTTPFilter{{Name: "jwt", Type: jwtType}}}}), ConnInfo{}, "the HTTP filter jwt"},
		"other HTTP filters":                  {accepting(&FilterChain{HTTP: &HTTPManager{Filters: []HTTPFilter{{Type: routerType}}, Routes: &Routes{}}}), ConnInfo{}, ""},
		"refused routes":                      {accepting(&FilterChain{HTTP: &HTTPManager{Routes: &Routes{Refused: true}}}), ConnInfo{}, "routes are refused"},
		"a refused virtual host":              {accepting(&FilterChain{HTTP: &HTTPManager{Routes: &Routes{Hosts: []VirtualHost{{}, {Refused: true}}}}}), ConnInfo{}, "routes are refused"},
		"TLS that the listener does not look": {&Listener{Name: virtualInbound, Chains: permissive}, over("istio"), ""},
	} {
		t.Run(name, func(t *testing.T) {
			s := snapshotOf(t)
			if c.listener != nil {
				s = snapshotOf(t, c.listener)
			}
			c.conn.Destination, c.conn.Source = netip.MustParseAddrPort("192.0.2.7:8080"), netip.MustParseAddrPort("192.0.2.9:40000")
			judged(t, s.Verdict(Inbound, &c.conn), c.refusal)
		})
	}
}

func judged(t *testing.T, refusal, want string) {
	t.Helper()
	if want == "" && refusal != "" || !strings.Contains(refusal, want) {
		t.Errorf("refused %q, want %q", refusal, want)
	}
}

func TestOutboundConnectionsThatNeedTLSAreClosed(t *testing.T) {
	service := netip.MustParseAddrPort("198.51.100.1:80")
	listener := func(chain *FilterChain) *Listener {
		return &Listener{Name: "198.51.100.1_80", Direction: Outbound, Virtual: true, Addresses: []netip.AddrPort{service}, Default: chain}
	}
	tcp := listener(&FilterChain{TCP: forwarding("c")})
	wildcard := &Listener{Name: "0.0.0.0_80", Direction: Outbound, Virtual: true, Addresses: []netip.AddrPort{netip.MustParseAddrPort("0.0.0.0:80")},
		Default: &FilterChain{HTTP: &HTTPManager{RouteName: "80"}}}
	routes := func(host VirtualHost) *Routes {
		return &Routes{Name: "80", Hosts: []VirtualHost{{Name: "other"}, host}}
	}
	to := []Route{{Forward: &Forward{Clusters: []WeightedCluster{{Name: "d", Weight: 1}, {Name: "c", Weight: 1}}}}}
	at := func(text string) []Domain { return []Domain{{DomainExact, "web"}, {DomainExact, text}} }
	auto := []Transport{{TLSMode: "istio", TLS: &UpstreamTLS{}}, {}}
	cluster := func(transports ...Transport) *Cluster {
		return &Cluster{Name: "c", Discovery: ByEDS, Assignment: "c", Transports: transports}
	}
	hosts := func(modes ...string) *Assignment {
		a := &Assignment{Name: "c", Localities: []Locality{{}}}
		for _, mode := range modes {
			a.Localities[0].Endpoints = append(a.Localities[0].Endpoints, Endpoint{TLSMode: mode})
		}
		return a
	}
	passthrough := &Listener{Name: virtualOutbound, UseOriginalDst: true, Default: &FilterChain{TCP: forwarding("PassthroughCluster")}}
	blackHole := &Listener{Name: virtualOutbound, UseOriginalDst: true, Default: &FilterChain{TCP: forwarding("c")}}
	for name, c := range map[string]struct {
		values  []any
		refusal string
	}{
		"no listener":                        {nil, ""},
		"no listener but the catch-all":      {[]any{passthrough}, ""},
		"no listener and no other traffic":   {[]any{blackHole, &Cluster{Name: "c", Hosts: &Assignment{}}}, "the cluster c has no endpoints"},
		"an unknown cluster":                 {[]any{tcp}, ""},
		"a plain cluster":                    {[]any{tcp, cluster(), hosts("")}, ""},
		"endpoints without a sidecar":        {[]any{tcp, cluster(auto...), hosts("", "")}, ""},
		"an endpoint with a sidecar":         {[]any{tcp, cluster(auto...), hosts("", "istio")}, "endpoints of the cluster c require TLS"},
		"no endpoints yet":                   {[]any{tcp, cluster(auto...)}, ""},
		"TLS in any case":                    {[]any{tcp, cluster(Transport{TLS: &UpstreamTLS{}})}, "the cluster c requires TLS"},
		"a transport that is not understood": {[]any{tcp, cluster(Transport{Refused: true})}, "the cluster c requires TLS"},
		"a refused chain":                    {[]any{listener(&FilterChain{Refused: true})}, "is refused"},
		"TLS in a route to the service":      {[]any{wildcard, routes(VirtualHost{Domains: at("198.51.100.1"), Routes: to}), cluster(auto...), hosts("istio")}, "endpoints of the cluster c"},
		"TLS in a route to the service's port": {[]any{wildcard, routes(VirtualHost{Domains: at("198.51.100.1:80"), Routes: to}), cluster(auto...), hosts("istio")},
			"endpoints of the cluster c"},
		"TLS in a route to another service": {[]any{wildcard, routes(VirtualHost{Domains: at("198.51.100.2"), Routes: to}), cluster(auto...), hosts("istio")}, ""},
		"a refused host":                    {[]any{wildcard, routes(VirtualHost{Name: "h", Domains: at("198.51.100.1"), Refused: true})}, "the virtual host h is refused"},
		"a refused route":                   {[]any{wildcard, routes(VirtualHost{Domains: at("198.51.100.1"), Routes: []Route{{Name: "r", Refused: true}}})}, "the route r is refused"},
		"refused routes":                    {[]any{wildcard, &Routes{Name: "80", Refused: true}}, "the routes 80 are refused"},
		"no routes":                         {[]any{wildcard}, "routes are missing"},
	} {
		t.Run(name, func(t *testing.T) {
			conn := ConnInfo{Destination: service, Source: netip.MustParseAddrPort("192.0.2.7:40000")}
			judged(t, snapshotOf(t, c.values...).Verdict(Outbound, &conn), c.refusal)
		})
	}
}
