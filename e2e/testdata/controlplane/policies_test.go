package controlplane

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	rbac "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	httprbac "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	networkrbac "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/rbac/v3"
	tcpproxy "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	template "github.com/envoyproxy/go-control-plane/envoy/extensions/path/match/uri_template/v3"
	matcher "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

// understood returns the findings except those that a policy or a part of it is not carried out yet: its value is complete
// nevertheless.
func understood(findings []mesh.Finding) []mesh.Finding {
	return slices.DeleteFunc(slices.Clone(findings), func(f mesh.Finding) bool {
		return strings.HasSuffix(f.Problem, "are not carried out yet")
	})
}

// unenforced returns the findings of policies that close what they concern.
func unenforced(findings []mesh.Finding) []mesh.Finding {
	return slices.DeleteFunc(slices.Clone(findings), func(f mesh.Finding) bool { return f.Class != mesh.Unenforced })
}

// Rules that are present and empty deny everything, and absent rules allow everything. The dump of a sidecar has rules of
// both actions that are empty, and others.
func TestRecordedPoliciesKeepThePresenceOfRules(t *testing.T) {
	empty, denied := 0, 0
	each(t, "lds.json", func(t *testing.T, place string, b []byte) {
		var judge listener.Listener
		unpack(b, &judge)
		got, _, err := mesh.DecodeListener(b)
		if err != nil {
			t.Fatal(err)
		}
		for i, chain := range judge.FilterChains {
			policies := got.Chains[i].Policies
			for _, filter := range chain.Filters {
				if !filter.GetTypedConfig().MessageIs(&networkrbac.RBAC{}) {
					continue
				}
				rules := unpack(filter.GetTypedConfig().Value, &networkrbac.RBAC{}).Rules
				if (policies[0].RBAC.Rules == nil) != (rules == nil) || len(rules.GetPolicies()) != len(policies[0].RBAC.Rules.Policies) {
					t.Errorf("%s: %+v, want %v", place, policies[0].RBAC.Rules, rules)
				}
				if rules != nil && len(rules.Policies) == 0 {
					empty++
					if !policies[0].RBAC.Restricts() || got.Chains[i].Refused {
						t.Errorf("%s: empty rules restrict nothing", place)
					}
				}
				if rules.GetAction() == rbac.RBAC_DENY {
					denied++
				}
				policies = policies[1:]
			}
		}
	})
	if empty < 10 || denied < 4 {
		t.Errorf("%d rules are empty, %d deny", empty, denied)
	}
}

// A policy that was changed at random is decoded as by the generated types, has findings, or is an error.
func TestDamagedPoliciesOfConnectionsAreNeverMisread(t *testing.T) {
	random := rand.New(rand.NewPCG(5, 1))
	enforced := wideNetworkRBAC()
	enforced.Rules = wideRules()
	wide, err := proto.MarshalOptions{Deterministic: true}.Marshal(enforced)
	if err != nil {
		t.Fatal(err)
	}
	policy := &anypb.Any{TypeUrl: "type.googleapis.com/envoy.extensions.filters.network.rbac.v3.RBAC"}
	l := &listener.Listener{Name: "l", FilterChains: []*listener.FilterChain{{Filters: []*listener.Filter{
		{Name: "rbac", ConfigType: &listener.Filter_TypedConfig{TypedConfig: policy}},
		{Name: "tcp", ConfigType: &listener.Filter_TypedConfig{TypedConfig: packed(&tcpproxy.TcpProxy{ClusterSpecifier: &tcpproxy.TcpProxy_Cluster{Cluster: "c"}})}}}}}}
	same, found, failed := 0, 0, 0
	for range 15000 {
		damaged := damage(random, wide)
		policy.Value = damaged
		b, err := proto.Marshal(l)
		if err != nil {
			t.Fatal(err)
		}
		got, findings, err := mesh.DecodeListener(b)
		var judge networkrbac.RBAC
		switch problem := proto.Unmarshal(damaged, &judge); {
		case err != nil:
			failed++
		case len(understood(findings)) > 0:
			found++
		case problem != nil: // within a field that is ignored
		default:
			same++
			if want, ok := attempt(readListener, l); ok {
				compareListeners(t, "made here", got, want)
			}
		}
	}
	allOccur(t, same, found, failed)
}

// wideRules has each matcher of policies.
func wideRules() *rbac.RBAC {
	exact := &matcher.StringMatcher{MatchPattern: &matcher.StringMatcher_Exact{Exact: "a"}, IgnoreCase: true}
	regex := &matcher.StringMatcher{MatchPattern: &matcher.StringMatcher_SafeRegex{SafeRegex: &matcher.RegexMatcher{Regex: ".*/ns/default/.*"}}}
	header := &route.HeaderMatcher{Name: ":authority", HeaderMatchSpecifier: &route.HeaderMatcher_StringMatch{StringMatch: exact}, InvertMatch: true}
	path := &matcher.PathMatcher{Rule: &matcher.PathMatcher_Path{Path: exact}}
	cidr := &core.CidrRange{AddressPrefix: "2001:db8::", PrefixLen: wrapperspb.UInt32(32)}
	claim := &matcher.MetadataMatcher{Filter: "envoy.filters.http.jwt_authn", Path: []*matcher.MetadataMatcher_PathSegment{{Segment: &matcher.MetadataMatcher_PathSegment_Key{Key: "payload"}}},
		Value: &matcher.ValueMatcher{MatchPattern: &matcher.ValueMatcher_StringMatch{StringMatch: regex}}, Invert: true}
	yes := &rbac.Permission{Rule: &rbac.Permission_Any{Any: true}}
	permissions := []*rbac.Permission{
		{Rule: &rbac.Permission_AndRules{AndRules: &rbac.Permission_Set{Rules: []*rbac.Permission{yes, {Rule: &rbac.Permission_NotRule{NotRule: yes}}}}}},
		{Rule: &rbac.Permission_OrRules{OrRules: &rbac.Permission_Set{Rules: []*rbac.Permission{{Rule: &rbac.Permission_Header{Header: header}}}}}},
		{Rule: &rbac.Permission_UrlPath{UrlPath: path}},
		{Rule: &rbac.Permission_DestinationIp{DestinationIp: cidr}},
		{Rule: &rbac.Permission_DestinationPort{DestinationPort: 8080}},
		{Rule: &rbac.Permission_DestinationPortRange{DestinationPortRange: &typev3.Int32Range{Start: -1, End: 70000}}},
		{Rule: &rbac.Permission_Metadata{Metadata: claim}},
		{Rule: &rbac.Permission_RequestedServerName{RequestedServerName: exact}},
		{Rule: &rbac.Permission_UriTemplate{UriTemplate: &core.TypedExtensionConfig{Name: "t", TypedConfig: packed(&template.UriTemplateMatchConfig{PathTemplate: "/a/*/**"})}}},
	}
	name := func(m *matcher.StringMatcher) *rbac.Principal {
		return &rbac.Principal{Identifier: &rbac.Principal_Authenticated_{Authenticated: &rbac.Principal_Authenticated{PrincipalName: m}}}
	}
	principals := []*rbac.Principal{
		{Identifier: &rbac.Principal_AndIds{AndIds: &rbac.Principal_Set{Ids: []*rbac.Principal{name(exact), name(regex)}}}},
		{Identifier: &rbac.Principal_OrIds{OrIds: &rbac.Principal_Set{Ids: []*rbac.Principal{name(exact), {Identifier: &rbac.Principal_Any{Any: true}}}}}},
		{Identifier: &rbac.Principal_NotId{NotId: name(nil)}},
		{Identifier: &rbac.Principal_DirectRemoteIp{DirectRemoteIp: cidr}},
		{Identifier: &rbac.Principal_RemoteIp{RemoteIp: cidr}},
		{Identifier: &rbac.Principal_Header{Header: header}},
		{Identifier: &rbac.Principal_UrlPath{UrlPath: path}},
		{Identifier: &rbac.Principal_Metadata{Metadata: claim}},
	}
	return &rbac.RBAC{Action: rbac.RBAC_DENY, Policies: map[string]*rbac.Policy{
		"b": {Permissions: permissions, Principals: principals[:1]},
		"a": {Permissions: permissions[:1], Principals: principals},
	}}
}

// wideNetworkRBAC enforces nothing, so it is not a finding.
func wideNetworkRBAC() *networkrbac.RBAC {
	return &networkrbac.RBAC{Rules: &rbac.RBAC{Action: rbac.RBAC_LOG}, ShadowRules: wideRules(), ShadowRulesStatPrefix: "s", StatPrefix: "tcp."}
}

func wideHTTPRBAC() *httprbac.RBAC {
	return &httprbac.RBAC{ShadowRules: wideRules(), ShadowRulesStatPrefix: "s"}
}

func readNetworkRBAC(r *networkrbac.RBAC) *mesh.RBAC {
	return &mesh.RBAC{Rules: readRules(r.Rules), Shadow: readRules(r.ShadowRules), ShadowPrefix: r.ShadowRulesStatPrefix}
}

func readHTTPRBAC(r *httprbac.RBAC) *mesh.RBAC {
	return &mesh.RBAC{Rules: readRules(r.Rules), Shadow: readRules(r.ShadowRules), ShadowPrefix: r.ShadowRulesStatPrefix}
}

func readRules(r *rbac.RBAC) *mesh.Rules {
	if r == nil {
		return nil
	}
	want := &mesh.Rules{Action: mesh.Action(r.Action)}
	for name, p := range r.Policies {
		policy := mesh.AccessPolicy{Name: name, Permission: readPermissions(mesh.ConditionAny, p.Permissions), Principal: readPrincipals(mesh.ConditionAny, p.Principals)}
		want.Policies = append(want.Policies, policy)
	}
	slices.SortFunc(want.Policies, func(a, b mesh.AccessPolicy) int { return strings.Compare(a.Name, b.Name) })
	return want
}

// readSet returns all or any of conditions; a single condition is returned as it is.
func readSet[T any](kind mesh.ConditionKind, of []T, read func(T) mesh.Condition) mesh.Condition {
	if len(of) == 1 {
		return read(of[0])
	}
	want := mesh.Condition{Kind: kind}
	for _, c := range of {
		want.Of = append(want.Of, read(c))
	}
	return want
}

func readPermissions(kind mesh.ConditionKind, of []*rbac.Permission) mesh.Condition {
	return readSet(kind, of, readPermission)
}

func readPrincipals(kind mesh.ConditionKind, of []*rbac.Principal) mesh.Condition {
	return readSet(kind, of, readPrincipal)
}

func readPermission(p *rbac.Permission) mesh.Condition {
	switch rule := p.Rule.(type) {
	case *rbac.Permission_AndRules:
		return readPermissions(mesh.ConditionAll, rule.AndRules.Rules)
	case *rbac.Permission_OrRules:
		return readPermissions(mesh.ConditionAny, rule.OrRules.Rules)
	case *rbac.Permission_NotRule:
		return mesh.Condition{Kind: mesh.ConditionNot, Of: []mesh.Condition{readPermission(rule.NotRule)}}
	case *rbac.Permission_Any:
		return mesh.Condition{Kind: mesh.ConditionTrue}
	case *rbac.Permission_Header:
		return mesh.Condition{Kind: mesh.ConditionHeader, Header: &readHeaders([]*route.HeaderMatcher{rule.Header})[0]}
	case *rbac.Permission_UrlPath:
		return mesh.Condition{Kind: mesh.ConditionPath, Text: new(readMatcher(rule.UrlPath.GetPath()))}
	case *rbac.Permission_DestinationIp:
		return mesh.Condition{Kind: mesh.ConditionDestination, Addresses: readRange(rule.DestinationIp)}
	case *rbac.Permission_DestinationPort:
		return mesh.Condition{Kind: mesh.ConditionPort, Start: int32(rule.DestinationPort), End: int32(rule.DestinationPort) + 1}
	case *rbac.Permission_DestinationPortRange:
		return mesh.Condition{Kind: mesh.ConditionPort, Start: rule.DestinationPortRange.Start, End: rule.DestinationPortRange.End}
	case *rbac.Permission_Metadata:
		return mesh.Condition{Kind: mesh.ConditionMetadata, Metadata: readMetadata(rule.Metadata)}
	case *rbac.Permission_RequestedServerName:
		return mesh.Condition{Kind: mesh.ConditionServerName, Text: new(readMatcher(rule.RequestedServerName))}
	case *rbac.Permission_UriTemplate:
		return mesh.Condition{Kind: mesh.ConditionTemplate, Template: unpack(rule.UriTemplate.TypedConfig.Value, &template.UriTemplateMatchConfig{}).PathTemplate}
	}
	panic(p)
}

func readPrincipal(p *rbac.Principal) mesh.Condition {
	switch id := p.Identifier.(type) {
	case *rbac.Principal_AndIds:
		return readPrincipals(mesh.ConditionAll, id.AndIds.Ids)
	case *rbac.Principal_OrIds:
		return readPrincipals(mesh.ConditionAny, id.OrIds.Ids)
	case *rbac.Principal_NotId:
		return mesh.Condition{Kind: mesh.ConditionNot, Of: []mesh.Condition{readPrincipal(id.NotId)}}
	case *rbac.Principal_Any:
		return mesh.Condition{Kind: mesh.ConditionTrue}
	case *rbac.Principal_Authenticated_:
		want := mesh.Condition{Kind: mesh.ConditionPrincipal}
		if name := id.Authenticated.PrincipalName; name != nil {
			want.Text = new(readMatcher(name))
		}
		return want
	case *rbac.Principal_DirectRemoteIp:
		return mesh.Condition{Kind: mesh.ConditionPeer, Addresses: readRange(id.DirectRemoteIp)}
	case *rbac.Principal_RemoteIp:
		return mesh.Condition{Kind: mesh.ConditionClient, Addresses: readRange(id.RemoteIp)}
	case *rbac.Principal_Header:
		return mesh.Condition{Kind: mesh.ConditionHeader, Header: &readHeaders([]*route.HeaderMatcher{id.Header})[0]}
	case *rbac.Principal_UrlPath:
		return mesh.Condition{Kind: mesh.ConditionPath, Text: new(readMatcher(id.UrlPath.GetPath()))}
	case *rbac.Principal_Metadata:
		return mesh.Condition{Kind: mesh.ConditionMetadata, Metadata: readMetadata(id.Metadata)}
	}
	panic(p)
}

func readRange(c *core.CidrRange) netip.Prefix { return readRanges([]*core.CidrRange{c})[0] }

func readMetadata(m *matcher.MetadataMatcher) *mesh.MetadataMatcher {
	want := &mesh.MetadataMatcher{Filter: m.Filter, Value: readValue(m.Value), Invert: m.Invert}
	for _, segment := range m.Path {
		want.Path = append(want.Path, segment.GetKey())
	}
	return want
}
