package mesh

import (
	"net/netip"
	"slices"
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
		case *HTTPFilter:
			edit.SetExtension(value.Name, value)
		case *Listener:
			if err := value.Index(); err != nil {
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
		tls      bool   // is ended
	}{
		"no listener":                         {nil, ConnInfo{}, "", false},
		"STRICT and plain":                    {accepting(secure(ChainMatch{})), ConnInfo{}, "accepts it without TLS", false},
		"STRICT and TLS":                      {accepting(secure(ChainMatch{})), over("istio"), "", true},
		"PERMISSIVE and plain":                {accepting(permissive...), ConnInfo{}, "", false},
		"PERMISSIVE and TLS of the mesh":      {accepting(permissive...), over("istio"), "", true},
		"PERMISSIVE and TLS of the workload":  {accepting(permissive...), over("h2"), "", false},
		"PERMISSIVE and TLS without ALPN":     {accepting(permissive...), over(), "", false},
		"another port is STRICT":              {accepting(secure(ChainMatch{Port: 9}), plain(ChainMatch{})), ConnInfo{}, "", false},
		"no chain for the port":               {accepting(plain(ChainMatch{Port: 9})), ConnInfo{}, "no filter chain of virtualInbound accepts it", false},
		"a refused chain":                     {accepting(&FilterChain{Refused: true}), ConnInfo{}, "is refused", false},
		"a refused listener":                  {&Listener{Name: virtualInbound, Refused: true, Default: plain(ChainMatch{})}, ConnInfo{}, "the listener virtualInbound is refused", false},
		"a default chain":                     {&Listener{Name: virtualInbound, Default: plain(ChainMatch{})}, ConnInfo{}, "", false},
		"network policies":                    {accepting(&FilterChain{TCP: forwarding("inbound"), Policies: []NetworkFilter{{Name: "authz"}}}), ConnInfo{}, "has the policy authz", false},
		"network policies of RBAC":            {accepting(&FilterChain{TCP: forwarding("inbound"), Policies: []NetworkFilter{{Name: "rbac", RBAC: &RBAC{Rules: &Rules{}}}}}), ConnInfo{}, "", false},
		"HTTP policies of RBAC":               {accepting(&FilterChain{HTTP: &HTTPManager{Filters: []HTTPFilter{{Name: "rbac", Type: rbacType, RBAC: &RBAC{Rules: &Rules{}}}}}}), ConnInfo{}, "", false},
		"network policies that allow all":     {accepting(&FilterChain{TCP: forwarding("inbound"), Policies: []NetworkFilter{{Name: "rbac", RBAC: &RBAC{}}}}), ConnInfo{}, "", false},
		"HTTP policies that allow all":        {accepting(&FilterChain{HTTP: &HTTPManager{Filters: []HTTPFilter{{Name: "rbac", Type: rbacType, RBAC: &RBAC{}}}}}), ConnInfo{}, "", false},
		"HTTP policies":                       {accepting(&FilterChain{HTTP: &HTTPManager{Filters: []HTTPFilter{{Name: "authz", Type: extAuthzType}}}}), ConnInfo{}, "the HTTP filter authz", false},
		"other HTTP filters":                  {accepting(&FilterChain{HTTP: &HTTPManager{Filters: []HTTPFilter{{Type: routerType}}, Routes: &Routes{}}}), ConnInfo{}, "", false},
		"refused routes":                      {accepting(&FilterChain{HTTP: &HTTPManager{Routes: &Routes{Refused: true}}}), ConnInfo{}, "routes are refused", false},
		"a refused virtual host":              {accepting(&FilterChain{HTTP: &HTTPManager{Routes: &Routes{Hosts: []VirtualHost{{}, {Refused: true}}}}}), ConnInfo{}, "routes are refused", false},
		"TLS that the listener does not look": {&Listener{Name: virtualInbound, Chains: permissive}, over("istio"), "", false},
	} {
		t.Run(name, func(t *testing.T) {
			s := snapshotOf(t)
			if c.listener != nil {
				s = snapshotOf(t, c.listener)
			}
			c.conn.Destination, c.conn.Source = netip.MustParseAddrPort("192.0.2.7:8080"), netip.MustParseAddrPort("192.0.2.9:40000")
			chain, refusal := s.Inbound(&c.conn)
			judged(t, refusal, c.refusal)
			if ended := chain != nil && chain.TLS != nil; ended != c.tls {
				t.Errorf("TLS is ended: %v", ended)
			}
		})
	}
}

// An HTTP filter whose configuration is a resource of its own refuses requests until it comes, unless it has a default.
func TestConfigurationsOfFiltersThatComeOnTheirOwn(t *testing.T) {
	waits := HTTPFilter{Name: "e", OnItsOwn: true, Refused: true}
	byDefault := HTTPFilter{Name: "e", OnItsOwn: true, Type: rbacType, RBAC: &RBAC{}}
	optional := HTTPFilter{Name: "e", OnItsOwn: true, Optional: true}
	before := HTTPFilter{Name: "e", OnItsOwn: true, Refused: true, BeforePolicy: true}
	for name, c := range map[string]struct {
		filter    HTTPFilter
		extension *HTTPFilter // nil: it has not come
		refusal   string      // empty: requests pass
	}{
		"it has not come":                            {waits, nil, "the configuration of the HTTP filter e has not come"},
		"it has come":                                {waits, &HTTPFilter{Name: "e", Type: rbacType, RBAC: &RBAC{}}, ""},
		"another one has come":                       {waits, &HTTPFilter{Name: "f", Type: rbacType, RBAC: &RBAC{}}, "has not come"},
		"it restricts":                               {waits, &HTTPFilter{Name: "e", Type: rbacType, RBAC: &RBAC{Rules: &Rules{}}}, ""},
		"it restricts otherwise":                     {waits, &HTTPFilter{Name: "e", Type: extAuthzType}, "is not supported yet"},
		"it is refused":                              {waits, &HTTPFilter{Name: "e", Refused: true}, "is refused"},
		"its default":                                {byDefault, nil, ""},
		"it takes the place of the default":          {byDefault, &HTTPFilter{Name: "e", Refused: true}, "is refused"},
		"it may be left out":                         {optional, nil, ""},
		"a program":                                  {waits, &HTTPFilter{Name: "e", Type: wasmType}, ""},
		"a program that may prepare a policy":        {before, &HTTPFilter{Name: "e", Type: wasmType}, "is refused"},
		"a configuration before a policy":            {before, &HTTPFilter{Name: "e", Type: rbacType, RBAC: &RBAC{}}, ""},
		"a filter that is not a resource of its own": {HTTPFilter{Name: "e", Type: routerType}, &HTTPFilter{Name: "e", Refused: true}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			values := []any{accepting(&FilterChain{HTTP: &HTTPManager{Filters: []HTTPFilter{c.filter}, Routes: &Routes{}}})}
			if c.extension != nil {
				values = append(values, c.extension)
			}
			s := snapshotOf(t, values...)
			conn := ConnInfo{Destination: netip.MustParseAddrPort("192.0.2.7:8080"), Source: netip.MustParseAddrPort("192.0.2.9:40000")}
			_, refusal := s.Inbound(&conn)
			judged(t, refusal, c.refusal)
		})
	}
}

// Clusters that policies ask stay in force as long as the listener names them.
func TestAListenerNamesTheClustersOfItsPolicies(t *testing.T) {
	l := accepting(&FilterChain{
		Policies: []NetworkFilter{{RBAC: &RBAC{}}, {ExtAuthz: &ExtAuthz{GRPC: &GRPCService{Cluster: "a"}}}},
		HTTP: &HTTPManager{Filters: []HTTPFilter{
			{ExtAuthz: &ExtAuthz{HTTP: &HTTPAuthz{Service: HTTPService{Cluster: "b"}}}},
			{JWT: &JWT{Providers: []JWTProvider{{Keys: []byte("{}")}, {Remote: &RemoteKeys{Service: HTTPService{Cluster: "c"}}}}}},
			{Name: "e", OnItsOwn: true, Type: rbacType},
		}},
	})
	if names := slices.Collect(l.ClusterNames()); !slices.Equal(names, []string{"a", "b", "c"}) {
		t.Errorf("clusters %v", names)
	}
	if names := slices.Collect(l.ExtensionNames()); !slices.Equal(names, []string{"e"}) {
		t.Errorf("extensions %v", names)
	}
}

func judged(t *testing.T, refusal, want string) {
	t.Helper()
	if want == "" && refusal != "" || !strings.Contains(refusal, want) {
		t.Errorf("refused %q, want %q", refusal, want)
	}
}

func TestTheWayOfAnOutboundConnection(t *testing.T) {
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
	one := []Route{{Forward: &Forward{Clusters: []WeightedCluster{{Name: "c", Weight: 1}}}}}
	at := func(text string) []Domain { return []Domain{{DomainExact, "web"}, {DomainExact, text}} }
	auto := []Transport{{TLSMode: "istio", TLS: &UpstreamTLS{}}, {}}
	cluster := func(transports ...Transport) *Cluster {
		return &Cluster{Name: "c", Discovery: ByEDS, Assignment: "c", Transports: transports}
	}
	hosts := func(modes ...string) *Assignment {
		a := &Assignment{Name: "c", Localities: []Locality{{}}}
		for _, mode := range modes {
			a.Localities[0].Endpoints = append(a.Localities[0].Endpoints, Endpoint{TLSMode: mode, Weight: 1, Address: netip.AddrPortFrom(netip.MustParseAddr("192.0.2.1"), uint16(len(a.Localities[0].Endpoints)+1))})
		}
		return a
	}
	down := hosts("", "istio")
	down.Localities[0].Endpoints[0].Health = Unhealthy
	headless := hosts("istio", "istio")
	headless.Localities[0].Endpoints[1].Address = service
	passthrough := &Listener{Name: virtualOutbound, UseOriginalDst: true, Default: &FilterChain{TCP: forwarding("PassthroughCluster")}}
	blackHole := &Listener{Name: virtualOutbound, UseOriginalDst: true, Default: &FilterChain{TCP: forwarding("c")}}
	const plain, secured, byEndpoint = "", "TLS", "TLS to 192.0.2.1:2"
	for name, c := range map[string]struct {
		values  []any
		refusal string
		way     string
	}{
		"no listener":                          {nil, "", plain},
		"no listener but the catch-all":        {[]any{passthrough, &Cluster{Name: "PassthroughCluster", Discovery: OriginalDestination}}, "", plain},
		"no listener and no other traffic":     {[]any{blackHole, &Cluster{Name: "c", Hosts: &Assignment{}}}, "the cluster c has no endpoints", plain},
		"an unknown cluster":                   {[]any{tcp}, "the cluster c is not configured", plain},
		"a plain cluster":                      {[]any{tcp, cluster(), hosts("")}, "", plain},
		"a plain cluster without endpoints":    {[]any{tcp, cluster()}, "", plain},
		"endpoints without a sidecar":          {[]any{tcp, cluster(auto...), hosts("", "")}, "", plain},
		"endpoints with sidecars":              {[]any{tcp, cluster(auto...), hosts("istio", "istio")}, "", secured},
		"one of two endpoints has a sidecar":   {[]any{tcp, cluster(auto...), down}, "", byEndpoint},
		"no endpoints yet":                     {[]any{tcp, cluster(auto...)}, "the cluster c has no endpoints", plain},
		"TLS in any case":                      {[]any{tcp, cluster(Transport{TLS: &UpstreamTLS{}}), hosts("")}, "", secured},
		"a transport that is not understood":   {[]any{tcp, cluster(Transport{Name: "t", Refused: true}), hosts("")}, "the transport t of the cluster c", plain},
		"a refused cluster":                    {[]any{tcp, &Cluster{Name: "c", Refused: true}}, "the cluster c is refused", plain},
		"a refused chain":                      {[]any{listener(&FilterChain{Refused: true})}, "is refused", plain},
		"TLS in a route to the service":        {[]any{wildcard, routes(VirtualHost{Domains: at("198.51.100.1"), Routes: one}), cluster(auto...), hosts("istio")}, "", secured},
		"TLS in a route to the service's port": {[]any{wildcard, routes(VirtualHost{Domains: at("198.51.100.1:80"), Routes: one}), cluster(auto...), hosts("istio")}, "", secured},
		"two clusters, one with TLS":           {[]any{wildcard, routes(VirtualHost{Domains: at("198.51.100.1"), Routes: to}), &Cluster{Name: "d", Discovery: ByEDS}, cluster(auto...), hosts("istio")}, "lead to several clusters", plain},
		"two clusters without TLS":             {[]any{wildcard, routes(VirtualHost{Domains: at("198.51.100.1"), Routes: to}), &Cluster{Name: "d", Discovery: ByEDS}, cluster(), hosts("istio")}, "", plain},
		"TLS in a route to another service":    {[]any{wildcard, routes(VirtualHost{Domains: at("198.51.100.2"), Routes: one}), cluster(auto...), hosts("istio")}, "", plain},
		"an endpoint of a headless service":    {[]any{wildcard, routes(VirtualHost{Domains: at("web"), Routes: one}), cluster(auto...), headless}, "", secured},
		"an address that is no endpoint":       {[]any{wildcard, routes(VirtualHost{Domains: at("web"), Routes: one}), cluster(auto...), hosts("istio")}, "", plain},
		"a host by name that requires TLS":     {[]any{wildcard, routes(VirtualHost{Domains: at("web"), Routes: one}), &Cluster{Name: "c", Discovery: StrictDNS, Hosts: &Assignment{}, Transports: []Transport{{TLS: &UpstreamTLS{}}}}}, "it may be a host of the cluster c", plain},
		"no other traffic":                     {[]any{wildcard, routes(VirtualHost{Domains: []Domain{{Kind: DomainAny}}, Routes: []Route{{Respond: &Response{Status: 502}}}})}, "have no host for it", plain},
		"other traffic":                        {[]any{wildcard, routes(VirtualHost{Domains: []Domain{{Kind: DomainAny}}, Routes: []Route{{Forward: &Forward{Clusters: []WeightedCluster{{Name: "PassthroughCluster"}}}}}})}, "", plain},
		"a refused host":                       {[]any{wildcard, routes(VirtualHost{Name: "h", Domains: at("198.51.100.1"), Refused: true})}, "the virtual host h is refused", plain},
		"a refused route":                      {[]any{wildcard, routes(VirtualHost{Domains: at("198.51.100.1"), Routes: []Route{{Name: "r", Refused: true}}})}, "the route r is refused", plain},
		"refused routes":                       {[]any{wildcard, &Routes{Name: "80", Refused: true}}, "the routes 80 are refused", plain},
		"no routes":                            {[]any{wildcard}, "routes are missing", plain},
	} {
		t.Run(name, func(t *testing.T) {
			conn := ConnInfo{Destination: service, Source: netip.MustParseAddrPort("192.0.2.7:40000")}
			way, refusal := snapshotOf(t, c.values...).Outbound(&conn)
			judged(t, refusal, c.refusal)
			got := plain
			if refusal == "" && way.TLS != nil {
				got = secured
			}
			if way.Endpoint.IsValid() {
				got += " to " + way.Endpoint.String()
			}
			if got != c.way {
				t.Errorf("the way is %q, want %q", got, c.way)
			}
		})
	}
}
