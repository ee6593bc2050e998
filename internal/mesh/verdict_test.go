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
		"no listener":                        {nil, ConnInfo{}, "", false},
		"STRICT and plain":                   {accepting(secure(ChainMatch{})), ConnInfo{}, "accepts it without TLS", false},
		"STRICT and TLS":                     {accepting(secure(ChainMatch{})), over("istio"), "", true},
		"PERMISSIVE and plain":               {accepting(permissive...), ConnInfo{}, "", false},
		"PERMISSIVE and TLS of the mesh":     {accepting(permissive...), over("istio"), "", true},
		"PERMISSIVE and TLS of the workload": {accepting(permissive...), over("h2"), "", false},
		"PERMISSIVE and TLS without ALPN":    {accepting(permissive...), over(), "", false},
		"another port is STRICT":             {accepting(secure(ChainMatch{Port: 9}), plain(ChainMatch{})), ConnInfo{}, "", false},
		"no chain for the port":              {accepting(plain(ChainMatch{Port: 9})), ConnInfo{}, "no filter chain of virtualInbound accepts it", false},
		"a refused chain":                    {accepting(&FilterChain{Refused: true}), ConnInfo{}, "is refused", false},
		"a refused listener":                 {&Listener{Name: virtualInbound, Refused: true, Default: plain(ChainMatch{})}, ConnInfo{}, "the listener virtualInbound is refused", false},
		"a listener of the PROXY protocol": {&Listener{Name: virtualInbound, Filters: []ListenerFilter{{Kind: ProxyProtocol}}, Default: plain(ChainMatch{})}, ConnInfo{},
			"the listener virtualInbound takes the addresses of clients from the PROXY protocol", false},
		"a default chain":                     {&Listener{Name: virtualInbound, Default: plain(ChainMatch{})}, ConnInfo{}, "", false},
		"network policies":                    {accepting(&FilterChain{TCP: forwarding("inbound"), Policies: []NetworkFilter{{Name: "authz"}}}), ConnInfo{}, "has the policy authz", false},
		"network policies of RBAC":            {accepting(&FilterChain{TCP: forwarding("inbound"), Policies: []NetworkFilter{{Name: "rbac", RBAC: &RBAC{Rules: &Rules{}}}}}), ConnInfo{}, "", false},
		"HTTP policies of RBAC":               {accepting(&FilterChain{HTTP: &HTTPManager{Filters: []HTTPFilter{{Name: "rbac", Type: rbacType, RBAC: &RBAC{Rules: &Rules{}}}}}}), ConnInfo{}, "", false},
		"network policies that allow all":     {accepting(&FilterChain{TCP: forwarding("inbound"), Policies: []NetworkFilter{{Name: "rbac", RBAC: &RBAC{}}}}), ConnInfo{}, "", false},
		"HTTP policies that allow all":        {accepting(&FilterChain{HTTP: &HTTPManager{Filters: []HTTPFilter{{Name: "rbac", Type: rbacType, RBAC: &RBAC{}}}}}), ConnInfo{}, "", false},
		"HTTP policies":                       {accepting(&FilterChain{HTTP: &HTTPManager{Filters: []HTTPFilter{{Name: "authz", Type: extAuthzType}}}}), ConnInfo{}, "the HTTP filter authz", false},
		"other HTTP filters":                  {accepting(&FilterChain{HTTP: &HTTPManager{Filters: []HTTPFilter{{Type: routerType}}, Routes: &Routes{}}}), ConnInfo{}, "", false},
		"refused routes":                      {accepting(&FilterChain{HTTP: &HTTPManager{Routes: &Routes{Refused: true}}}), ConnInfo{}, "routes are refused", false},
		"a refused route":                     {accepting(&FilterChain{HTTP: &HTTPManager{Routes: &Routes{Hosts: []VirtualHost{{Routes: []Route{{}, {Refused: true}}}}}}}), ConnInfo{}, "a route is refused", false},
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

func TestTheChainOfAnOutboundConnection(t *testing.T) {
	service := netip.MustParseAddrPort("198.51.100.1:80")
	at := func(name, address string, chain *FilterChain) *Listener {
		return &Listener{Name: name, Direction: Outbound, Virtual: true, Addresses: []netip.AddrPort{netip.MustParseAddrPort(address)}, Filters: inspectors, Default: chain}
	}
	named := func(name string) *FilterChain { return &FilterChain{Name: name, TCP: forwarding("c")} }
	exact, wildcard := at("exact", "198.51.100.1:80", named("exact")), at("wildcard", "0.0.0.0:80", named("wildcard"))
	other := at("other", "198.51.100.2:80", named("other"))
	passthrough := &Listener{Name: virtualOutbound, UseOriginalDst: true, Default: named("passthrough")}
	for name, c := range map[string]struct {
		values  []any
		chain   string // empty: none
		refusal string
	}{
		"no listener":                  {nil, "", ""},
		"another address":              {[]any{other}, "", ""},
		"the address":                  {[]any{other, exact, wildcard, passthrough}, "exact", ""},
		"the port":                     {[]any{other, wildcard, passthrough}, "wildcard", ""},
		"the rest":                     {[]any{other, passthrough}, "passthrough", ""},
		"a refused chain":              {[]any{at("l", "198.51.100.1:80", &FilterChain{Refused: true})}, "", "is refused"},
		"a chain that ends TLS":        {[]any{at("l", "198.51.100.1:80", &FilterChain{TLS: &DownstreamTLS{}})}, "", "ends TLS"},
		"no chain for this connection": {[]any{&Listener{Name: "l", Addresses: []netip.AddrPort{service}, Virtual: true}}, "", "no filter chain of l accepts it"},
	} {
		t.Run(name, func(t *testing.T) {
			conn := ConnInfo{Destination: service, Source: netip.MustParseAddrPort("192.0.2.7:40000")}
			chain, refusal := snapshotOf(t, c.values...).Outbound(&conn)
			judged(t, refusal, c.refusal)
			got := ""
			if chain != nil {
				got = chain.Name
			}
			if got != c.chain {
				t.Errorf("the chain is %q, want %q", got, c.chain)
			}
		})
	}
}
