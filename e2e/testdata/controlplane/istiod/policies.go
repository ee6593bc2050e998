package main

import (
	"fmt"

	rbac "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	httprbac "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	matcher "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
)

// rulesEach is the number of rules of a policy.
const rulesEach = 10

// policyFilters returns the filters that istiod makes of AuthorizationPolicies with 10 rules each: the first half of them
// deny, the others allow. A request of workload.pem passes if its method is GET: no rule that denies matches it, and of the
// rules that allow the last one only.
func policyFilters(policies int) []*hcm.HttpFilter {
	deny, allow := &rbac.RBAC{Action: rbac.RBAC_DENY, Policies: map[string]*rbac.Policy{}}, &rbac.RBAC{Policies: map[string]*rbac.Policy{}}
	for i := range policies {
		rules := allow
		if i < policies/2 {
			rules = deny
		}
		for k := range rulesEach {
			p := policyRule(i, k)
			if i == policies-1 && k == rulesEach-1 {
				p = accessRule(anyMethod("GET", "HEAD"), principal("cluster.local/ns/default/sa/another"))
			}
			rules.Policies[fmt.Sprintf("ns[shop]-policy[policy-%02d]-rule[%d]", i, k)] = p
		}
	}
	var filters []*hcm.HttpFilter
	for _, rules := range []*rbac.RBAC{deny, allow} {
		if len(rules.Policies) > 0 {
			filters = append(filters, &hcm.HttpFilter{
				Name: "envoy.filters.http.rbac", ConfigType: &hcm.HttpFilter_TypedConfig{TypedConfig: packed(&httprbac.RBAC{Rules: rules})},
			})
		}
	}
	return filters
}

// policyRule is a rule of one of five shapes that users write. The request lacks only one of its conditions, often the last one.
func policyRule(policy, rule int) *rbac.Policy {
	app := fmt.Sprintf("app-%02d-%d", policy, rule)
	self := principal("cluster.local/ns/default/sa/another")
	switch rule % 5 {
	case 0: // the methods of an API below a path, by two service accounts
		return accessRule(allOf(anyPath(prefix("/"+app+"/api/"), exact("/"+app)), anyMethod("GET", "POST")),
			anyPrincipal(principal("cluster.local/ns/shop/sa/"+app), principal("cluster.local/ns/shop/sa/"+app+"-canary")))
	case 1: // all of another namespace
		return accessRule(anyMethod("GET"), namespace("ns-"+app))
	case 2: // a host for one client
		return accessRule(anyHeader(":authority", &matcher.StringMatcher{MatchPattern: &matcher.StringMatcher_Exact{Exact: app + ".example"}, IgnoreCase: true}), self)
	case 3: // a field, whatever the path
		return accessRule(anyMethod("GET", "PUT"), allIDs(self, headerID("x-"+app, exact("yes"))))
	}
	return accessRule(allOf(anyPath(suffix("/"+app+"/metrics")), anyMethod("GET")), anyPrincipal(namespace("monitoring"), self))
}

func accessRule(permission *rbac.Permission, id *rbac.Principal) *rbac.Policy {
	return &rbac.Policy{Permissions: []*rbac.Permission{allOf(permission)}, Principals: []*rbac.Principal{allIDs(id)}}
}

func exact(text string) *matcher.StringMatcher {
	return &matcher.StringMatcher{MatchPattern: &matcher.StringMatcher_Exact{Exact: text}}
}

func prefix(text string) *matcher.StringMatcher {
	return &matcher.StringMatcher{MatchPattern: &matcher.StringMatcher_Prefix{Prefix: text}}
}

func suffix(text string) *matcher.StringMatcher {
	return &matcher.StringMatcher{MatchPattern: &matcher.StringMatcher_Suffix{Suffix: text}}
}

func allOf(of ...*rbac.Permission) *rbac.Permission {
	return &rbac.Permission{Rule: &rbac.Permission_AndRules{AndRules: &rbac.Permission_Set{Rules: of}}}
}

func anyOf(of ...*rbac.Permission) *rbac.Permission {
	return &rbac.Permission{Rule: &rbac.Permission_OrRules{OrRules: &rbac.Permission_Set{Rules: of}}}
}

func anyPath(of ...*matcher.StringMatcher) *rbac.Permission {
	var paths []*rbac.Permission
	for _, m := range of {
		paths = append(paths, &rbac.Permission{Rule: &rbac.Permission_UrlPath{UrlPath: &matcher.PathMatcher{Rule: &matcher.PathMatcher_Path{Path: m}}}})
	}
	return anyOf(paths...)
}

func anyHeader(name string, of ...*matcher.StringMatcher) *rbac.Permission {
	var fields []*rbac.Permission
	for _, m := range of {
		fields = append(fields, &rbac.Permission{Rule: &rbac.Permission_Header{Header: field(name, m)}})
	}
	return anyOf(fields...)
}

func anyMethod(methods ...string) *rbac.Permission {
	var of []*matcher.StringMatcher
	for _, method := range methods {
		of = append(of, exact(method))
	}
	return anyHeader(":method", of...)
}

func field(name string, m *matcher.StringMatcher) *route.HeaderMatcher {
	return &route.HeaderMatcher{Name: name, HeaderMatchSpecifier: &route.HeaderMatcher_StringMatch{StringMatch: m}}
}

func allIDs(of ...*rbac.Principal) *rbac.Principal {
	return &rbac.Principal{Identifier: &rbac.Principal_AndIds{AndIds: &rbac.Principal_Set{Ids: of}}}
}

func anyPrincipal(of ...*rbac.Principal) *rbac.Principal {
	return &rbac.Principal{Identifier: &rbac.Principal_OrIds{OrIds: &rbac.Principal_Set{Ids: of}}}
}

func authenticated(m *matcher.StringMatcher) *rbac.Principal {
	return anyPrincipal(&rbac.Principal{Identifier: &rbac.Principal_Authenticated_{Authenticated: &rbac.Principal_Authenticated{PrincipalName: m}}})
}

func principal(name string) *rbac.Principal { return authenticated(exact("spiffe://" + name)) }

func namespace(name string) *rbac.Principal {
	return authenticated(&matcher.StringMatcher{MatchPattern: &matcher.StringMatcher_SafeRegex{SafeRegex: &matcher.RegexMatcher{Regex: ".*/ns/" + name + "/.*"}}})
}

func headerID(name string, m *matcher.StringMatcher) *rbac.Principal {
	return anyPrincipal(&rbac.Principal{Identifier: &rbac.Principal_Header{Header: field(name, m)}})
}
