package istiod

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"istio.io/istio/pilot/pkg/model"
	"istio.io/istio/pilot/pkg/simulation"

	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/route"
)

// TestRequestsGoWhereIstiodSimulates compares the way of requests, and of connections with and without TLS, with istiod's own
// simulation of Envoy, for each case of configuration. The simulation looks at paths only, so the first route whose path matches is
// compared.
func TestRequestsGoWhereIstiodSimulates(t *testing.T) {
	files, err := filepath.Glob("testdata/cases/*.yaml")
	if err != nil || len(files) < 15 {
		t.Fatalf("%d cases, error %v", len(files), err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".yaml"), func(t *testing.T) {
			t.Parallel()
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			p := startPlane(t, string(text), gatewayCertificate(t))
			for kind, proxy := range map[model.NodeType]*model.Proxy{
				model.SidecarProxy: {Labels: map[string]string{"app": "nginx"}, IPAddresses: []string{"203.0.113.4"}},
				model.Router:       {Labels: map[string]string{"istio": "ingressgateway"}, IPAddresses: []string{"203.0.113.250"}},
			} {
				proxy.Type, proxy.ConfigNamespace = kind, "default"
				proxy.Metadata = &model.NodeMetadata{Namespace: "default", Labels: proxy.Labels, ClusterID: clusterID}
				compareWays(t, simulation.NewSimulation(t, p.FakeDiscoveryServer, p.SetupProxy(proxy)), kind, gatewayRequests[strings.TrimSuffix(filepath.Base(file), ".yaml")])
			}
		})
	}
}

// gatewayRequests is how many requests are compared at the gateway at least, for each case that has a Gateway. Without one, a
// gateway has no listener, and the simulation no way to follow.
var gatewayRequests = map[string]int{"10-gateway": 1, "11-gateway-tls": 1, "15-ext-authz": 1, "20-gateway-modes": 10}

func compareWays(t *testing.T, sim *simulation.Simulation, kind model.NodeType, atGateway int) {
	snapshot := simulated(t, sim)
	calls := callsTo(snapshot, kind)
	compared := 0
	for _, call := range calls {
		want := sim.Run(call)
		got, comparable := follow(snapshot, call)
		if !comparable {
			continue
		}
		compared++
		if text := fmt.Sprint(want.ListenerMatched, " ", want.VirtualHostMatched, " ", want.RouteMatched, " ", want.ClusterMatched); got != text {
			t.Errorf("%s %s%s at %s:%d: %q, istiod has %q (%v)", call.CallMode, call.HostHeader, call.Path, call.Address, call.Port, got, text, want.Error)
		}
	}
	t.Logf("%s: %d of %d requests were compared", kind, compared, len(calls))
	least := atGateway
	if kind == model.SidecarProxy {
		least = 200
	} else if atGateway == 0 && len(calls) > 0 {
		t.Errorf("%d requests to a gateway of which this table does not have the case", len(calls))
	}
	if compared < least {
		t.Errorf("%s: only %d of %d requests were compared, want at least %d", kind, compared, len(calls), least)
	}
	compareChains(t, sim, snapshot, calls)
}

// compareChains compares the filter chains that connections to the destinations of the calls meet, and the clusters of those of
// bytes: connections of each protocol, without TLS, with it and with that of the mesh, for each server name.
func compareChains(t *testing.T, sim *simulation.Simulation, snapshot *mesh.Snapshot, calls []simulation.Call) {
	names := map[string]bool{"": true, "other.example.test": true}
	for _, l := range snapshot.Listeners() {
		for _, c := range l.Chains {
			for _, name := range c.Match.ServerNames {
				names[strings.Replace(name, "*", "x", 1)] = true
			}
		}
	}
	compared, met := 0, map[string]bool{}
	seen := map[string]bool{}
	for _, call := range calls {
		to := fmt.Sprint(call.CallMode, call.Address, " ", call.Port)
		if seen[to] {
			continue
		}
		seen[to] = true
		for _, protocol := range []simulation.Protocol{simulation.HTTP, simulation.HTTP2, simulation.TCP} {
			for _, tls := range []simulation.TLSMode{simulation.Plaintext, simulation.TLS, simulation.MTLS} {
				for _, name := range slices.Sorted(maps.Keys(names)) {
					if tls == simulation.Plaintext && name != "" {
						continue
					}
					c := simulation.Call{Address: call.Address, Port: call.Port, Protocol: protocol, TLS: tls, Sni: name, CallMode: call.CallMode}
					want := sim.Run(c)
					l, chain := chainOf(snapshot, &c)
					if l != nil && l.Refused || errors.Is(want.Error, simulation.ErrMultipleFilterChain) {
						continue
					}
					if call.CallMode == simulation.CallModeOutbound && want.ListenerMatched == model.VirtualInboundListenerName {
						continue // Envoy looks for listeners of other directions only at their own sockets
					}
					got := result(l, chain, want.Error == nil)
					wanted := want.ListenerMatched + " " + want.FilterChainMatched + " "
					if want.Error == nil && want.RouteConfigMatched == "" && want.VirtualHostMatched == "" {
						wanted += want.ClusterMatched
					}
					if got != wanted {
						t.Errorf("%s %s of TLS %q at %s: %q, istiod has %q (%v)", to, protocol, tls, name, got, wanted, want.Error)
					}
					compared++
					met[got] = true
				}
			}
		}
	}
	t.Logf("%d connections were compared, which meet %d filter chains", compared, len(met))
	if len(calls) > 0 && (compared < 10 || len(met) == 0) {
		t.Errorf("%d connections were compared, which meet %q", compared, slices.Sorted(maps.Keys(met)))
	}
}

// chainOf returns the listener and the filter chain that a call meets. They may be nil.
func chainOf(s *mesh.Snapshot, call *simulation.Call) (*mesh.Listener, *mesh.FilterChain) {
	protocols := map[simulation.TLSMode]map[simulation.Protocol]string{
		simulation.Plaintext: {simulation.HTTP: "http/1.1", simulation.HTTP2: "h2c"},
		simulation.TLS:       {simulation.HTTP: "http/1.1", simulation.HTTP2: "h2"},
		simulation.MTLS:      {simulation.HTTP: "istio-http/1.1", simulation.HTTP2: "istio-h2", simulation.TCP: "istio"},
	}
	info := mesh.ConnInfo{
		Destination: netip.AddrPortFrom(netip.MustParseAddr(call.Address), uint16(call.Port)), TLS: call.TLS != simulation.Plaintext, ServerName: call.Sni,
	}
	if protocol := protocols[call.TLS][call.Protocol]; protocol != "" {
		info.Protocols = []string{protocol}
	}
	l := s.VirtualListener(call.CallMode == simulation.CallModeInbound)
	if call.CallMode != simulation.CallModeInbound {
		if found := s.Destination(info.Destination); found != nil {
			l = found
		}
	}
	if l == nil {
		return nil, nil
	}
	return l, l.Meet(&info)
}

// result returns the names of a listener and its filter chain, and of the cluster if it is one for all connections of bytes.
func result(l *mesh.Listener, chain *mesh.FilterChain, carried bool) string {
	switch {
	case l == nil:
		return "  "
	case chain == nil:
		return l.Name + "  "
	case carried && chain.TCP != nil && len(chain.TCP.Clusters) == 1: // the simulation does not draw weights
		return l.Name + " " + chain.Name + " " + chain.TCP.Clusters[0].Name
	}
	return l.Name + " " + chain.Name + " "
}

// simulated returns the simulation's resources as a snapshot.
func simulated(t *testing.T, sim *simulation.Simulation) *mesh.Snapshot {
	t.Helper()
	edit := (*mesh.Snapshot)(nil).Edit()
	bytes := func(m proto.Message) []byte {
		b, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	for _, l := range sim.Listeners {
		decoded, _, err := mesh.DecodeListener(bytes(l))
		if err != nil {
			t.Fatal(err)
		}
		edit.SetListener(l.Name, decoded)
	}
	for _, r := range sim.Routes {
		decoded, _, err := mesh.DecodeRoutes(bytes(r))
		if err != nil {
			t.Fatal(err)
		}
		edit.SetRoutes(r.Name, decoded)
	}
	snapshot, _ := edit.Snapshot()
	return snapshot
}

// callsTo returns requests of plain HTTP to each listener, for the hosts and paths that the routes have, and others.
func callsTo(s *mesh.Snapshot, kind model.NodeType) (calls []simulation.Call) {
	hosts, paths := map[string]bool{"other.example.test": true, "reviews.other": true}, map[string]bool{"/": true, "/other": true}
	collect := func(r *mesh.Routes) {
		for i := range r.Hosts {
			for _, d := range r.Hosts[i].Domains {
				hosts[strings.ReplaceAll(d.String(), "*", "x")] = true
			}
			for j := range r.Hosts[i].Routes {
				if m := r.Hosts[i].Routes[j].Match; m.Kind != mesh.PathRegex {
					paths[m.Path], paths[m.Path+"x"] = true, true
				}
			}
		}
	}
	for _, r := range s.RouteTables() {
		collect(r)
	}
	var at []netip.AddrPort
	for _, l := range s.Listeners() {
		at = append(at, l.Addresses...)
		for _, c := range l.Chains {
			if c.HTTP != nil && c.HTTP.Routes != nil {
				collect(c.HTTP.Routes)
				at = append(at, netip.AddrPortFrom(netip.MustParseAddr("203.0.113.4"), uint16(c.Match.Port)))
			}
		}
	}
	mode := simulation.CallModeOutbound
	if kind == model.Router {
		mode = simulation.CallModeGateway
	}
	delete(paths, "")
	delete(hosts, "x") // of *
	slices.SortFunc(at, netip.AddrPort.Compare)
	for _, a := range slices.Compact(at) {
		address := a.Addr()
		if address.IsUnspecified() {
			address = netip.MustParseAddr("203.0.113.99")
		}
		for _, host := range slices.Sorted(maps.Keys(hosts)) {
			for _, path := range slices.Sorted(maps.Keys(paths)) {
				call := simulation.Call{Address: address.String(), Port: int(a.Port()), HostHeader: host, Path: path, Protocol: simulation.HTTP, CallMode: mode}
				calls = append(calls, call)
				if kind == model.SidecarProxy && len(calls)%7 == 0 {
					call.CallMode = simulation.CallModeInbound
					calls = append(calls, call)
				}
			}
		}
	}
	return calls
}

// follow returns the way of a call. It returns false if the simulation does not follow it, or not as Envoy does.
func follow(s *mesh.Snapshot, call simulation.Call) (way string, comparable bool) {
	info := mesh.ConnInfo{Destination: netip.AddrPortFrom(netip.MustParseAddr(call.Address), uint16(call.Port)), Protocols: []string{"http/1.1"}}
	l := s.VirtualListener(call.CallMode == simulation.CallModeInbound)
	if call.CallMode != simulation.CallModeInbound {
		if found := s.Destination(info.Destination); found != nil {
			l = found
		}
	}
	if l == nil || l.Refused {
		return "", false
	}
	chain := l.Meet(&info)
	switch {
	case chain == nil || chain.TLS != nil || chain.HTTP == nil:
		return "", false // protocols that are not HTTP are compared by the tests of chains
	case s.Routes(chain.HTTP) == nil:
		return "", false
	}
	r := route.Request{Method: []byte("GET"), Path: []byte(call.Path), Authority: []byte(call.HostHeader), Scheme: []byte("http")}
	choice, steps := route.Of(s.Routes(chain.HTTP)).Explain(&r)
	if choice.Host == nil {
		return l.Name + "   ", true
	}
	found := steps
	for len(found) > 0 && !found[0].Close && found[0].Why != "" {
		if m := found[0].Route.Match; m.IgnoreCase || m.Kind == mesh.PathRegex || m.Kind == mesh.PathSeparatedPrefix {
			return "", false // the simulation matches a part, or regards the case
		}
		found = found[1:]
	}
	if len(found) == 0 {
		return l.Name + " " + choice.Host.Name + "  ", true
	}
	first := found[0].Route
	cluster := ""
	if first.Forward != nil && len(first.Forward.Clusters) == 1 { // it does not draw weights
		cluster = first.Forward.Clusters[0].Name
	}
	return l.Name + " " + choice.Host.Name + " " + first.Name + " " + cluster, !first.Match.IgnoreCase
}
