package controlplane

import (
	"maps"
	"math/rand/v2"
	"net/netip"
	"path"
	"slices"
	"strings"
	"testing"

	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	rbac "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	httprbac "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	router "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	networkrbac "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/rbac/v3"
	tcpproxy "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/pillion-proxy/pillion/internal/authz"
	"github.com/pillion-proxy/pillion/internal/mesh"
)

// sentPolicy is a policy of istiod's, of requests or of connections.
type sentPolicy struct {
	requests bool
	config   []byte // an RBAC of the filters for HTTP or for networks
}

// sentPolicies returns the policies of the fixtures and of the recorded listeners, each of them once, in a fixed order.
func sentPolicies(t testing.TB) (all []sentPolicy) {
	t.Helper()
	found := map[string]sentPolicy{}
	keep := func(config *anypb.Any) {
		requests := config.MessageIs(&httprbac.RBAC{})
		if p := (sentPolicy{requests, config.GetValue()}); requests || config.MessageIs(&networkrbac.RBAC{}) {
			found[config.TypeUrl+string(config.Value)] = p
		}
	}
	for _, text := range fixtures(t, "http") {
		keep(packed(unpackAny(parseFixture(t, text, &hcm.HttpFilter{}).GetTypedConfig())))
	}
	for _, text := range fixtures(t, "tcp") {
		keep(packed(unpackAny(parseFixture(t, text, &listener.Filter{}).GetTypedConfig())))
	}
	for _, l := range sentListeners(t) {
		for _, chain := range unpack(l.bytes, &listener.Listener{}).FilterChains {
			for _, f := range chain.Filters {
				keep(f.GetTypedConfig())
				if f.GetTypedConfig().MessageIs(&hcm.HttpConnectionManager{}) {
					for _, f := range unpack(f.GetTypedConfig().Value, &hcm.HttpConnectionManager{}).HttpFilters {
						keep(f.GetTypedConfig())
					}
				}
			}
		}
	}
	for _, key := range slices.Sorted(maps.Keys(found)) {
		all = append(all, found[key])
	}
	return all
}

func unpackAny(a *anypb.Any) proto.Message {
	m, err := a.UnmarshalNew()
	if err != nil {
		panic(err)
	}
	return m
}

// parse returns the policy as the generated types read it.
func (p sentPolicy) parse() (m proto.Message, rules, shadow *rbac.RBAC, err error) {
	if p.requests {
		r := &httprbac.RBAC{}
		err = proto.Unmarshal(p.config, r)
		return r, r.GetRules(), r.GetShadowRules(), err
	}
	r := &networkrbac.RBAC{}
	err = proto.Unmarshal(p.config, r)
	return r, r.GetRules(), r.GetShadowRules(), err
}

// passing reports which of the clients a listener with the policy lets pass. A listener that is rejected lets none pass. The
// policy has to deny alone as well, because a filter may come without its listener.
func (p sentPolicy) passing(t testing.TB, clients []client) (within, alone []bool) {
	t.Helper()
	policy := &anypb.Any{TypeUrl: "type.googleapis.com/envoy.extensions.filters.network.rbac.v3.RBAC", Value: p.config}
	filters := []*listener.Filter{
		{Name: "rbac", ConfigType: &listener.Filter_TypedConfig{TypedConfig: policy}},
		{Name: "tcp", ConfigType: &listener.Filter_TypedConfig{TypedConfig: packed(&tcpproxy.TcpProxy{ClusterSpecifier: &tcpproxy.TcpProxy_Cluster{Cluster: "c"}})}},
	}
	if p.requests {
		policy.TypeUrl = "type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC"
		manager := &hcm.HttpConnectionManager{RouteSpecifier: &hcm.HttpConnectionManager_RouteConfig{RouteConfig: &route.RouteConfiguration{}}, HttpFilters: []*hcm.HttpFilter{
			{Name: "rbac", ConfigType: &hcm.HttpFilter_TypedConfig{TypedConfig: policy}},
			{Name: "router", ConfigType: &hcm.HttpFilter_TypedConfig{TypedConfig: packed(&router.Router{})}},
		}}
		filters = []*listener.Filter{{Name: "http", ConfigType: &listener.Filter_TypedConfig{TypedConfig: packed(manager)}}}
	}
	b, err := proto.Marshal(&listener.Listener{Name: "virtualInbound", FilterChains: []*listener.FilterChain{{Filters: filters}}})
	if err != nil {
		t.Fatal(err)
	}
	within, alone = make([]bool, len(clients)), make([]bool, len(clients))
	l, _, err := mesh.DecodeListener(b)
	if err != nil {
		return within, alone
	}
	var policies []*mesh.RBAC
	for _, f := range l.Chains[0].Policies {
		policies = append(policies, f.RBAC)
	}
	if h := l.Chains[0].HTTP; h != nil {
		policies = append(policies, h.Filters[0].RBAC)
	}
	for i, c := range clients {
		alone[i] = !slices.ContainsFunc(policies, c.deniedBy)
	}
	if chain, refusal := snapshotOf(l).Inbound(&mesh.ConnInfo{}); refusal == "" {
		for i, c := range clients {
			within[i] = admits(chain, c)
		}
	}
	return within, alone
}

func snapshotOf(l *mesh.Listener) *mesh.Snapshot {
	edit := (*mesh.Snapshot)(nil).Edit()
	edit.SetListener(l.Name, l)
	s, _ := edit.Snapshot()
	return s
}

func (c client) deniedBy(r *mesh.RBAC) bool {
	return r != nil && authz.Of(r).Judge(c.subject()).Denied
}

// admits reports whether the RBAC policies of a chain let a client pass.
func admits(chain *mesh.FilterChain, c client) bool {
	if slices.ContainsFunc(chain.Policies, func(f mesh.NetworkFilter) bool { return c.deniedBy(f.RBAC) }) {
		return false
	}
	return chain.HTTP == nil || !slices.ContainsFunc(chain.HTTP.Filters, func(f mesh.HTTPFilter) bool {
		return f.Refused || !f.Disabled && c.deniedBy(f.RBAC)
	})
}

// newClients returns random ones whose texts occur in rules.
func (p sentPolicy) newClients(random *rand.Rand, count int, rules ...*rbac.RBAC) (clients []client) {
	pool := newWords(rules...)
	for range count {
		clients = append(clients, pool.client(random, p.requests))
	}
	return clients
}

// withUnknownField returns the bytes of copies of m. In each of them another one of its messages has a field that no type has,
// as one of a later version may have: in the first ones in turn, then in one of step.
func withUnknownField(m proto.Message, step int) (all [][]byte) {
	for n := 0; ; {
		edited, left := proto.Clone(m), n
		if !obscure(edited.ProtoReflect(), &left) {
			return all
		}
		b, err := proto.MarshalOptions{Deterministic: true}.Marshal(edited)
		if err != nil {
			panic(err)
		}
		all = append(all, b)
		if n++; n > 6 {
			n += step - 1
		}
	}
}

// obscure adds an unknown field to the message with the number left below m, in the order of their fields.
func obscure(m protoreflect.Message, left *int) (done bool) {
	if *left == 0 {
		m.SetUnknown(protowire.AppendVarint(protowire.AppendTag(nil, 1000, protowire.VarintType), 1))
		return true
	}
	*left--
	if config, ok := m.Interface().(*anypb.Any); ok {
		inner, err := config.UnmarshalNew()
		if err != nil || !obscure(inner.ProtoReflect(), left) {
			return false
		}
		config.Value = packed(inner).Value
		return true
	}
	fields := m.Descriptor().Fields()
	for i := 0; i < fields.Len() && !done; i++ {
		f := fields.Get(i)
		switch {
		case !m.Has(f) || f.Message() == nil:
		case f.IsMap():
			if f.MapValue().Message() == nil {
				continue
			}
			entries := m.Get(f).Map()
			var names []protoreflect.MapKey
			entries.Range(func(k protoreflect.MapKey, _ protoreflect.Value) bool { names = append(names, k); return true })
			slices.SortFunc(names, func(a, b protoreflect.MapKey) int { return strings.Compare(a.String(), b.String()) })
			for _, name := range names {
				done = done || obscure(entries.Mutable(name).Message(), left)
			}
		case f.IsList():
			for list, k := m.Mutable(f).List(), 0; k < list.Len() && !done; k++ {
				done = obscure(list.Get(k).Message(), left)
			}
		default:
			done = obscure(m.Mutable(f).Message(), left)
		}
	}
	return done
}

// A field that is not known, in any part of a policy, lets no further client pass.
func TestUnknownFieldsOfPoliciesAllowNoMore(t *testing.T) {
	changed, closed, opened := 0, 0, 0
	for i, p := range sentPolicies(t) {
		random := rand.New(rand.NewPCG(11, uint64(i)))
		m, rules, shadow, err := p.parse()
		if err != nil {
			t.Fatal(err)
		}
		clients := p.newClients(random, 8, rules, shadow)
		_, before := p.passing(t, clients)
		for _, config := range withUnknownField(m, 9+i%5) {
			changed++
			within, alone := sentPolicy{p.requests, config}.passing(t, clients)
			for k, passes := range alone {
				switch {
				case (passes || within[k]) && !before[k]:
					t.Fatalf("with an unknown field the policy lets %+v pass:\n%v", clients[k], rules)
				case passes:
					opened++
				case before[k]:
					closed++
				}
			}
		}
	}
	if changed < 200 || closed < 50 || opened < 200 {
		t.Errorf("%d policies were changed; of the clients that pass without the change %d do, %d do not", changed, opened, closed)
	}
}

// checkDamaged fails if a client passes a policy that denies it as the generated types read it. It reports the clients that both
// deny, and those that the policy denies only because it is damaged.
func checkDamaged(t testing.TB, p sentPolicy, clients []client) (denied, closed int) {
	t.Helper()
	_, rules, _, err := p.parse()
	if err != nil {
		return 0, 0 // Envoy rejects it
	}
	within, alone := p.passing(t, clients)
	for i := range clients {
		passes := within[i] || alone[i]
		want, understood := attempt(func(c client) bool { _, denied := c.judge(rules); return denied }, clients[i])
		switch {
		case passes && understood && want:
			t.Fatalf("a damaged policy lets %+v pass:\n%v\n%x", clients[i], rules, p.config)
		case !passes && understood && want:
			denied++
		case !passes:
			closed++
		}
	}
	return denied, closed
}

// Policies that were changed at random never let a client pass that they deny.
func TestDamagedPoliciesAllowNoMore(t *testing.T) {
	random := rand.New(rand.NewPCG(12, 1))
	all := sentPolicies(t)
	denied, closed := 0, 0
	for range 1500 {
		p := all[random.IntN(len(all))]
		if len(p.config) == 0 {
			continue
		}
		_, rules, shadow, _ := p.parse()
		clients := p.newClients(random, 4, rules, shadow)
		p.config = damage(random, p.config)
		d, c := checkDamaged(t, p, clients)
		denied, closed = denied+d, closed+c
	}
	if denied < 200 || closed < 20 {
		t.Errorf("%d clients are denied, and %d because the policy is damaged", denied, closed)
	}
}

// FuzzDamagedPolicies begins with the policies of istiod.
func FuzzDamagedPolicies(f *testing.F) {
	for i, p := range sentPolicies(f) {
		f.Add(p.config, p.requests, uint64(i))
	}
	f.Fuzz(func(t *testing.T, config []byte, requests bool, seed uint64) {
		p := sentPolicy{requests, config}
		if _, rules, shadow, err := p.parse(); err == nil {
			clients, ok := attempt(func(r *rbac.RBAC) []client { return p.newClients(rand.New(rand.NewPCG(seed, 0)), 8, r, shadow) }, rules)
			if ok {
				checkDamaged(t, p, clients)
			}
			return
		}
		p.passing(t, nil)
	})
}

// sentListener is a recorded listener. Its gateways accept connections themselves.
type sentListener struct {
	gateway bool
	bytes   []byte
}

func sentListeners(t testing.TB) (list []sentListener) {
	t.Helper()
	all, err := pushes()
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, name := range slices.Sorted(maps.Keys(all)) {
		if path.Base(name) != "lds.json" {
			continue
		}
		for _, l := range all[name] {
			if !seen[string(l.Value)] {
				seen[string(l.Value)] = true
				list = append(list, sentListener{strings.Contains(name, "/gateway"), l.Value})
			}
		}
	}
	return list
}

// meets returns the chain that a connection meets, or nil if it is refused.
func (s sentListener) meets(b []byte, c *mesh.ConnInfo) *mesh.FilterChain {
	l, _, err := mesh.DecodeListener(b)
	if err != nil {
		return nil // the one before stays in force
	}
	find := snapshotOf(l).Outbound
	switch {
	case s.gateway:
		find = snapshotOf(l).Gateway
	case l.Name == "virtualInbound":
		find = snapshotOf(l).Inbound
	}
	if chain, refusal := find(c); refusal == "" {
		return chain
	}
	return nil
}

// connections returns one for each chain of a listener, with and without TLS.
func connections(l *listener.Listener) (all []mesh.ConnInfo) {
	address := l.GetAddress().GetSocketAddress()
	at, err := netip.ParseAddr(address.GetAddress())
	if err != nil || at.IsUnspecified() {
		at = netip.MustParseAddr("203.0.113.9")
	}
	for _, chain := range l.FilterChains {
		port, name := uint16(address.GetPortValue()), ""
		if to := chain.GetFilterChainMatch().GetDestinationPort(); to != nil {
			port = uint16(to.Value)
		}
		for _, name = range chain.GetFilterChainMatch().GetServerNames() {
			break
		}
		info := mesh.ConnInfo{Destination: netip.AddrPortFrom(at, port), ServerName: strings.Replace(name, "*", "x", 1)}
		plain := info
		plain.ServerName = ""
		info.TLS, info.Protocols = true, slices.Concat([]string{"istio"}, chain.GetFilterChainMatch().GetApplicationProtocols())
		all = append(all, info, plain)
	}
	return all
}

// A field that is not known, in any part of a listener, accepts no connection that is refused without it, and lets no further
// client pass on a connection that is accepted.
func TestUnknownFieldsOfListenersAllowNoMore(t *testing.T) {
	random := rand.New(rand.NewPCG(13, 1))
	list := sentListeners(t)
	refused, opened, closed := 0, map[string]int{}, map[string]int{}
	for range 60 {
		s := list[random.IntN(len(list))]
		judge := unpack(s.bytes, &listener.Listener{})
		infos := connections(judge)
		random.Shuffle(len(infos), func(i, k int) { infos[i], infos[k] = infos[k], infos[i] })
		infos = infos[:min(len(infos), 4)]
		kind := map[bool]string{true: "gateway", false: "sidecar"}[s.gateway] + judge.TrafficDirection.String()
		client := sentPolicy{requests: true}.newClients(random, 1)[0]
		copies := withUnknownField(judge, 6+random.IntN(5))
		for _, b := range copies[:min(len(copies), 16)] {
			for i := range infos {
				before, after := s.meets(s.bytes, &infos[i]), s.meets(b, &infos[i])
				passed, passes := before != nil && admits(before, client), after != nil && admits(after, client)
				switch {
				case passes && !passed:
					t.Fatalf("%s: with an unknown field the listener accepts %+v", judge.Name, infos[i])
				case passes && before.Name == after.Name && (before.TLS == nil) != (after.TLS == nil):
					t.Fatalf("%s: an unknown field turns TLS off for %+v", judge.Name, infos[i])
				case passes:
					opened[kind]++
				case passed:
					closed[kind]++
				default:
					refused++
				}
			}
		}
	}
	for _, kind := range []string{"gatewayOUTBOUND", "sidecarOUTBOUND", "sidecarINBOUND"} {
		if opened[kind] < 5 || closed[kind] < 5 {
			t.Errorf("%s: %d connections pass, %d are refused for the field", kind, opened[kind], closed[kind])
		}
	}
	if refused < 5 {
		t.Errorf("%d are refused by both", refused)
	}
}
