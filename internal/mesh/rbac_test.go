package mesh

import (
	"fmt"
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/wire"
)

// Parts of policies. Permissions and principals have the same numbers for what they have in common.
var (
	anyRule = number(3, 1)
)

// accessPolicy is an entry of the policies in a set of rules, for the field 1 of an RBAC.
func accessPolicy(name string, permission, principal []byte) []byte {
	return nest(join(text(1, name), nest(join(nest(permission, 1), nest(principal, 2)), 2)), 2)
}

// decodeRBAC decodes a policy of connections in a listener. Findings are "class path: problem", with paths in the policy.
// That it is not carried out is left out.
func decodeRBAC(t *testing.T, config ...[]byte) (*RBAC, string, *FilterChain) {
	t.Helper()
	l, findings, err := DecodeListener(join(chain(nest(packed(networkRBACType, join(config...)), 3, 4), tcpFilter()), field1(lName)))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, f := range findings {
		if !strings.Contains(f.Problem, "carried out") {
			got = append(got, fmt.Sprintf("%v %s: %s", f.Class, strings.TrimPrefix(strings.TrimPrefix(f.Path, "filter_chains.filters.typed_config"), "."), f.Problem))
		}
	}
	return l.Chains[0].Policies[0].RBAC, strings.Join(got, "; "), l.Chains[0]
}

// Rules that are present and empty deny everything; absent rules allow everything.
func TestAbsentRulesAllowAndEmptyRulesDeny(t *testing.T) {
	all := accessPolicy("p", anyRule, anyRule)
	for _, test := range []struct {
		name      string
		config    []byte
		want      *Rules
		restricts bool
	}{
		{"absent", nil, nil, false},
		{"empty", nest(nil, 1), &Rules{}, true},
		{"ALLOW", nest(all, 1), &Rules{Policies: []AccessPolicy{{"p", Condition{Kind: ConditionTrue}, Condition{Kind: ConditionTrue}, false}}}, true},
		{"DENY without policies", nest(number(1, 1), 1), &Rules{Action: Deny}, false},
		{"DENY", nest(join(number(1, 1), all), 1), &Rules{Action: Deny, Policies: []AccessPolicy{{"p", Condition{Kind: ConditionTrue}, Condition{Kind: ConditionTrue}, false}}}, true},
		{"LOG", nest(number(1, 2), 1), &Rules{Action: Log}, false},
		{"shadow rules", join(nest(nil, 2), text(5, "prefix")), nil, false},
	} {
		for network, url := range map[bool]string{true: networkRBACType, false: rbacType} {
			config := test.config
			if !network && test.name == "shadow rules" {
				config = join(nest(nil, 2), text(3, "prefix"))
			}
			b := chain(nest(packed(url, config), 3, 4), tcpFilter())
			if !network {
				b = chain(httpManager(nest(packed(url, config), 5, 4)))
			}
			l, findings, err := DecodeListener(join(b, field1(lName)))
			if err != nil {
				t.Fatal(err)
			}
			var got *RBAC
			if c := l.Chains[0]; network {
				got = c.Policies[0].RBAC
			} else {
				got = c.HTTP.Filters[0].RBAC
			}
			if !reflect.DeepEqual(got.Rules, test.want) || got.Restricts() != test.restricts {
				t.Errorf("%s of %s: %+v, restricts: %v", test.name, url, got.Rules, got.Restricts())
			}
			if test.name == "shadow rules" && (got.Shadow == nil || got.ShadowPrefix != "prefix") {
				t.Errorf("%s of %s: %+v", test.name, url, got)
			}
			if l.Chains[0].Refused || l.Refused || len(findings) > 0 {
				t.Errorf("%s of %s: findings %v, refused %v", test.name, url, findings, l.Chains[0].Refused)
			}
		}
	}
}

// A filter that is turned off restricts nothing.
func TestADisabledPolicyIsNoFinding(t *testing.T) {
	l, findings, err := DecodeListener(join(chain(httpManager(nest(join(nest(packed(rbacType, nest(nil, 1)), 4), number(7, 1)), 5))), field1(lName)))
	if err != nil || len(findings) > 0 || l.Chains[0].Refused {
		t.Errorf("error %v, findings %v, refused %v", err, findings, l.Chains[0].Refused)
	}
}

// Each matcher is decoded. A matcher that is not understood is unknown at its own place in the tree, and reported.
func TestConditions(t *testing.T) {
	set := func(of ...[]byte) (b []byte) {
		for _, part := range of {
			b = append(b, nest(part, 1)...)
		}
		return b
	}
	isTrue, bad := Condition{Kind: ConditionTrue}, nest(nil, 12) // another kind of matcher
	exact := func(s string) *StringMatcher { return &StringMatcher{Text: s} }
	where := "rules.policies.value.permissions"
	template := func(s string) []byte { return nest(packed(uriTemplateFields.name, text(1, s)), 13, 2) }
	badTemplate := "security " + where + ".uri_template: a template of paths that is not supported"
	net := netip.MustParsePrefix("203.0.113.0/24")
	for _, test := range []struct {
		name       string
		permission []byte
		want       Condition
		findings   string
	}{
		{"any", anyRule, isTrue, ""},
		{"all", nest(set(anyRule, number(6, 80)), 1), Condition{Kind: ConditionAll, Of: []Condition{isTrue, {Kind: ConditionPort, Start: 80, End: 81}}}, ""},
		{"any of two", nest(set(anyRule, number(6, 65535)), 2), Condition{Kind: ConditionAny, Of: []Condition{isTrue, {Kind: ConditionPort, Start: 65535, End: 65536}}}, ""},
		{"a set of one is its element", nest(set(nest(set(anyRule), 2)), 1), isTrue, ""},
		{"not", nest(anyRule, 8), Condition{Kind: ConditionNot, Of: []Condition{isTrue}}, ""},
		{"a header", nest(join(text(1, ":method"), nest(text(1, "GET"), 13)), 4), Condition{Kind: ConditionHeader, Header: &HeaderMatcher{Name: ":method", Kind: HeaderText, Text: StringMatcher{Text: "GET"}}}, ""},
		{"an address", nest(join(text(1, "203.0.113.0"), nest(number(1, 24), 2)), 5), Condition{Kind: ConditionDestination, Addresses: net}, ""},
		{"ports", nest(join(number(1, 80), number(2, 90)), 11), Condition{Kind: ConditionPort, Start: 80, End: 90}, ""},
		{"metadata", nest(join(text(1, "f"), nest(text(1, "k"), 2), nest(number(5, 1), 3)), 7), Condition{Kind: ConditionMetadata, Metadata: &MetadataMatcher{Filter: "f", Path: []string{"k"}, Value: ValueMatcher{Kind: ValuePresence, Bool: true}}}, ""},
		{"a server name", nest(text(1, "a"), 9), Condition{Kind: ConditionServerName, Text: exact("a")}, ""},
		{"a path", nest(text(1, "/a"), 10, 1), Condition{Kind: ConditionPath, Text: exact("/a")}, ""},
		{"a template", template("/a/*/**/b"), Condition{Kind: ConditionTemplate, Template: "/a/*/**/b"}, ""},

		{"nothing", nil, Condition{}, "security " + where + ": a condition without a matcher"},
		{"never", number(3, 0), Condition{}, "security " + where + ".any: false, which Envoy rejects"},
		{"a matcher that is not supported", bad, Condition{}, "security " + where + ".matcher: not supported"},
		{"an unknown matcher", nest(nil, 77), Condition{}, "security " + where + ": unknown field 77 of envoy.config.rbac.v3.Permission"},
		{"two matchers", join(anyRule, number(6, 80)), Condition{}, "security " + where + ".destination_port: more than one member of a oneof"},
		{"the same matcher twice", join(nest(set(anyRule), 1), nest(set(anyRule), 1)), Condition{}, "security " + where + ".and_rules[1]: more than one member of a oneof"},
		{"a matcher and an unknown one", join(anyRule, nest(nil, 77)), Condition{}, "security " + where + ": unknown field 77 of envoy.config.rbac.v3.Permission"},
		{"an empty set", nest(nil, 1), Condition{}, "security " + where + ".and_rules: an empty set of conditions"},
		{"an unknown field of a set", nest(join(set(anyRule), number(9, 1)), 1), Condition{}, "security " + where + ".and_rules: unknown field 9 of envoy.config.rbac.v3.Permission.Set"},
		{"unknown within all", nest(set(anyRule, bad), 1), Condition{Kind: ConditionAll, Of: []Condition{isTrue, {}}}, "security " + where + ".and_rules.rules[1].matcher: not supported"},
		{"unknown within any", nest(set(bad, anyRule), 2), Condition{Kind: ConditionAny, Of: []Condition{{}, isTrue}}, "security " + where + ".or_rules.rules.matcher: not supported"},
		{"unknown within not", nest(bad, 8), Condition{Kind: ConditionNot, Of: []Condition{{}}}, "security " + where + ".not_rule.matcher: not supported"},
		{"nothing within not", nest(nil, 8), Condition{Kind: ConditionNot, Of: []Condition{{}}}, "security " + where + ".not_rule: a condition without a matcher"},
		{"nothing within a set", nest(set(nil, anyRule), 1), Condition{Kind: ConditionAll, Of: []Condition{{}, isTrue}}, "security " + where + ".and_rules.rules: a condition without a matcher"},
		{"not, and unknown", join(nest(anyRule, 8), nest(nil, 77)), Condition{}, "security " + where + ": unknown field 77 of envoy.config.rbac.v3.Permission"},
		{"an unknown field of a header", nest(join(text(1, "x"), nest(nil, 99)), 4), Condition{}, "security " + where + ".header: unknown field 99 of envoy.config.route.v3.HeaderMatcher"},
		{"a header without a name", nest(number(7, 1), 4), Condition{}, "security " + where + ".header: a header matcher without a name"},
		{"a header with two patterns", nest(join(text(1, "x"), text(4, "a"), number(7, 1)), 4), Condition{}, "security " + where + ".header.present_match: more than one member of a oneof"},
		{"no address", nest(text(1, "x"), 5), Condition{}, "security " + where + ".destination_ip: not a range of addresses"},
		{"no port", number(6, 65536), Condition{}, "security " + where + ".destination_port: not a port"},
		{"a path without a pattern", nest(nil, 10), Condition{}, "security " + where + ".url_path: a matcher of paths without a pattern"},
		{"not a regular expression", nest(nest(text(2, "("), 5), 9), Condition{}, "security " + where + ".requested_server_name.safe_regex: not a regular expression: error parsing regexp: missing closing ): `(`"},
		{"a regular expression that is too long", nest(nest(text(2, strings.Repeat("a", maxRegexLength+1)), 5), 9), Condition{}, "security " + where + ".requested_server_name.safe_regex: a regular expression that is too long"},
		{"a regular expression that is too large", nest(nest(text(2, "(a{1000}b){40}"), 5), 9), Condition{}, "security " + where + ".requested_server_name.safe_regex: not a regular expression: error parsing regexp: invalid repeat count: `{40}`"},
		{"a program that is too large", nest(nest(text(2, strings.Repeat("x{1000}", 40)), 5), 9), Condition{}, "security " + where + ".requested_server_name.safe_regex: a regular expression whose program is too large"},
		{"another template", nest(packed("x.Y", nil), 13, 2), Condition{}, "security " + where + ".uri_template.typed_config: matchers of type x.Y are not supported; " + badTemplate},
		{"an empty template", template(""), Condition{}, badTemplate},
		{"a template of another root", template("a"), Condition{}, badTemplate},
		{"a variable in a template", template("/{a}"), Condition{}, badTemplate},
		{"a part of a segment in a template", template("/a*"), Condition{}, badTemplate},
		{"an operator after the last", template("/**/*"), Condition{}, badTemplate},
	} {
		r, findings, chain := decodeRBAC(t, nest(accessPolicy("p", test.permission, anyRule), 1))
		p := r.Rules.Policies[0]
		if !reflect.DeepEqual(p.Permission, test.want) || p.Unknown || p.Principal.Kind != ConditionTrue || r.Refused || r.Rules.Refused {
			t.Errorf("%s: got %+v\nwant %+v", test.name, r.Rules, test.want)
		}
		if findings != test.findings || chain.Refused != (test.findings != "") {
			t.Errorf("%s: findings %s\nwant %s", test.name, findings, test.findings)
		}
	}
}

func TestPrincipals(t *testing.T) {
	net, cidr := netip.MustParsePrefix("203.0.113.7/32"), join(text(1, "203.0.113.7"), nest(number(1, 32), 2))
	where := "rules.policies.value.principals"
	for _, test := range []struct {
		name      string
		principal []byte
		want      Condition
		findings  string
	}{
		{"any TLS", nest(nil, 4), Condition{Kind: ConditionPrincipal}, ""},
		{"a name", nest(text(2, "spiffe://"), 4, 2), Condition{Kind: ConditionPrincipal, Text: &StringMatcher{Kind: MatchPrefix, Text: "spiffe://"}}, ""},
		{"the peer", nest(cidr, 10), Condition{Kind: ConditionPeer, Addresses: net}, ""},
		{"the client", nest(cidr, 11), Condition{Kind: ConditionClient, Addresses: net}, ""},
		{"a header", nest(join(text(1, "x"), number(7, 0)), 6), Condition{Kind: ConditionHeader, Header: &HeaderMatcher{Name: "x"}}, ""},
		{"a path", nest(text(3, "a"), 9, 1), Condition{Kind: ConditionPath, Text: &StringMatcher{Kind: MatchSuffix, Text: "a"}}, ""},
		{"not", nest(anyRule, 8), Condition{Kind: ConditionNot, Of: []Condition{{Kind: ConditionTrue}}}, ""},
		{"all", nest(join(nest(anyRule, 1), nest(nest(nil, 4), 1)), 1), Condition{Kind: ConditionAll, Of: []Condition{{Kind: ConditionTrue}, {Kind: ConditionPrincipal}}}, ""},

		{"a name without a pattern", nest(nil, 4, 2), Condition{}, "security " + where + ".authenticated.principal_name: a matcher without a pattern"},
		{"an unknown field", nest(nest(nil, 1), 4), Condition{}, "security " + where + ".authenticated: unknown field 1 of envoy.config.rbac.v3.Principal.Authenticated"},
		{"the address of before", nest(cidr, 5), Condition{}, "security " + where + ".source_ip: not supported"},
		{"the state of a filter", nest(nil, 12), Condition{}, "security " + where + ".filter_state: not supported"},
		{"metadata of a route", nest(nil, 13), Condition{}, "security " + where + ".sourced_metadata: not supported"},
		{"a principal of an extension", nest(nil, 14), Condition{}, "security " + where + ".custom: not supported"},
		{"nothing", nil, Condition{}, "security " + where + ": a condition without a matcher"},
	} {
		r, findings, _ := decodeRBAC(t, nest(accessPolicy("p", anyRule, test.principal), 1))
		if p := r.Rules.Policies[0]; !reflect.DeepEqual(p.Principal, test.want) || p.Unknown || p.Permission.Kind != ConditionTrue {
			t.Errorf("%s: got %+v\nwant %+v", test.name, p, test.want)
		}
		if findings != test.findings {
			t.Errorf("%s: findings %s\nwant %s", test.name, findings, test.findings)
		}
	}
}

// A part outside of the conditions that is not understood refuses the rules or the filter, or makes the policy unknown.
func TestPartsOfPoliciesThatAreNotUnderstood(t *testing.T) {
	all := join(nest(anyRule, 1), nest(anyRule, 2)) // the value of a policy
	named := func(name string, value []byte) []byte { return nest(join(text(1, name), nest(value, 2)), 2) }
	for _, test := range []struct {
		name     string
		config   []byte
		where    string // "filter", "rules", "policy", "" if everything is understood
		findings string
	}{
		{"a matching tree", nest(nil, 6), "filter", "security matcher: not supported"},
		{"a shadow matching tree", nest(nil, 7), "filter", "security shadow_matcher: not supported"},
		{"an unknown field of the filter", nest(nil, 99), "filter", "security : unknown field 99 of " + networkRBACType},
		{"rules twice", join(nest(nil, 1), nest(nil, 1)), "filter", "security rules[1]: more than once"},
		{"continuous enforcement", number(4, 1), "filter", "security enforcement_type: connections are judged once only"},
		{"a delay", nest(nil, 8), "", "traffic delay_deny: not supported"},
		{"an unknown action", nest(number(1, 3), 1), "rules", "security rules.action: unknown value 3"},
		{"an unknown field of the rules", nest(nest(nil, 9), 1), "rules", "security rules: unknown field 9 of envoy.config.rbac.v3.RBAC"},
		{"audit logs", nest(nest(nil, 3), 1), "", "traffic rules.audit_logging_options: not supported"},
		{"two policies with a name", nest(join(named("p", all), named("q", all), named("p", all)), 1), "rules", "security rules: two policies with the name p"},
		{"an expression", nest(named("p", join(all, nest(nil, 3))), 1), "policy", "security rules.policies.value.condition: not supported"},
		{"a checked expression", nest(named("p", join(all, nest(nil, 4))), 1), "policy", "security rules.policies.value.checked_condition: not supported"},
		{"an unknown field of a policy", nest(named("p", join(all, nest(nil, 9))), 1), "policy", "security rules.policies.value: unknown field 9 of envoy.config.rbac.v3.Policy"},
		{"an unknown field of an entry", nest(nest(join(text(1, "p"), nest(all, 2), nest(nil, 3)), 2), 1), "policy", "security rules.policies: unknown field 3 of envoy.config.rbac.v3.RBAC.PoliciesEntry"},
		{"two policies in an entry", nest(nest(join(text(1, "p"), nest(all, 2), nest(all, 2)), 2), 1), "policy", "security rules.policies.value[1]: more than once"},
		{"no permissions", nest(named("p", nest(anyRule, 2)), 1), "", "security rules.policies: a policy without permissions or principals"},
		{"no policy", nest(named("p", nil), 1), "", "security rules.policies: a policy without permissions or principals"},
	} {
		r, findings, chain := decodeRBAC(t, test.config)
		where := ""
		switch {
		case r.Refused:
			where = "filter"
		case r.Rules != nil && r.Rules.Refused:
			where = "rules"
		case r.Rules != nil && len(r.Rules.Policies) > 0 && r.Rules.Policies[0].Unknown:
			where = "policy"
		}
		if where != test.where || findings != test.findings || chain.Refused != strings.HasPrefix(findings, "security") {
			t.Errorf("%s: not understood: %q, want %q; findings %s\nwant %s", test.name, where, test.where, findings, test.findings)
		}
		if test.where != "" && test.where != "policy" && !r.Restricts() {
			t.Errorf("%s: restricts nothing", test.name)
		}
	}
}

// Shadow rules enforce nothing. A part of them that is not understood is unknown, and closes nothing.
func TestFindingsInShadowRulesCloseNothing(t *testing.T) {
	r, findings, chain := decodeRBAC(t, nest(join(number(1, 9), accessPolicy("p", nest(nil, 12), anyRule)), 2))
	want := "traffic shadow_rules.action: unknown value 9; traffic shadow_rules.policies.value.permissions.matcher: not supported"
	if findings != want || chain.Refused || r.Refused || !r.Shadow.Refused || r.Shadow.Policies[0].Permission.Kind != ConditionUnknown {
		t.Errorf("findings %s\nwant %s\nrefused %v, %+v", findings, want, chain.Refused, r)
	}
	// The same goes for rules that only log.
	r, findings, chain = decodeRBAC(t, nest(join(accessPolicy("p", nest(nil, 12), anyRule), number(1, 2)), 1))
	if findings != "traffic rules.policies.value.permissions.matcher: not supported" || chain.Refused || r.Restricts() {
		t.Errorf("findings %s, refused %v, %+v", findings, chain.Refused, r)
	}
	// Nor do those in the policy of a route, or in a configuration that comes on its own.
	bad := nest(accessPolicy("p", nest(nil, 12), anyRule), 2)
	table, routeFindings, err := DecodeRoutes(route(filter("rbac", rbacPerRoute, nest(bad, 2))))
	if err != nil || len(routeFindings) != 1 || table.Hosts[0].Routes[0].Refused {
		t.Errorf("error %v, findings %v, route refused %v", err, routeFindings, table.Hosts[0].Routes[0].Refused)
	}
	if f, findings := decodeExtension(t, rbacType, bad); f.Refused || !strings.HasPrefix(findings, "traffic") {
		t.Errorf("findings %s, refused %v", findings, f.Refused)
	}
	// Findings after them are of their own class again.
	if _, findings, chain = decodeRBAC(t, nest(nil, 2), nest(nil, 6)); findings != "security matcher: not supported" || !chain.Refused {
		t.Errorf("findings %s, refused %v", findings, chain.Refused)
	}
}

func TestPoliciesAreInTheOrderOfTheirNames(t *testing.T) {
	r, findings, _ := decodeRBAC(t, nest(join(accessPolicy("b", anyRule, anyRule), accessPolicy("c", anyRule, anyRule), accessPolicy("a", anyRule, anyRule)), 1))
	names := ""
	for _, p := range r.Rules.Policies {
		names += p.Name
	}
	if names != "abc" || findings != "" {
		t.Errorf("%s, findings %s", names, findings)
	}
}

// A listener has the same policies in each chain of a port. They are kept once, unless they have findings.
func TestChainsShareTheirPolicies(t *testing.T) {
	two := func(config []byte, refused bool) (*Listener, []Finding) {
		rbac := nest(packed(networkRBACType, config), 3, 4)
		l, findings, err := DecodeListener(join(chain(nest(portIs(1), 1), rbac, tcpFilter()), chain(nest(portIs(2), 1), rbac, tcpFilter()), field1(lName)))
		if err != nil || l.Chains[0].Refused != refused || l.Chains[1].Refused != refused {
			t.Error(err, l.Chains[0].Refused, l.Chains[1].Refused)
		}
		return l, findings
	}
	l, findings := two(nest(accessPolicy("p", anyRule, anyRule), 1), false)
	if l.Chains[0].Policies[0].RBAC != l.Chains[1].Policies[0].RBAC || len(findings) != 0 {
		t.Errorf("kept twice; findings %v", findings)
	}
	if _, findings = two(nest(nil, 6), true); len(findings) != 2 {
		t.Errorf("findings %v", findings)
	}
	// The same bytes are something else to a filter of another type.
	config := text(3, "prefix")
	l, _, err := DecodeListener(join(chain(nest(packed(networkRBACType, config), 3, 4), httpManager(nest(packed(rbacType, config), 5, 4))), field1(lName)))
	if err != nil || l.Chains[0].Policies[0].RBAC.ShadowPrefix != "" || l.Chains[0].HTTP.Filters[0].RBAC.ShadowPrefix != "prefix" {
		t.Error(err, l.Chains[0].Policies, l.Chains[0].HTTP.Filters)
	}
}

func TestConditionsAreBounded(t *testing.T) {
	deep := anyRule
	for range wire.MaxDepth {
		deep = nest(deep, 8)
	}
	if _, _, err := DecodeListener(join(chain(nest(packed(networkRBACType, nest(accessPolicy("p", deep, anyRule), 1)), 3, 4), tcpFilter()), field1(lName))); err == nil {
		t.Error("conditions are nested without a bound")
	}
	var many []byte
	for range maxConditions {
		many = append(many, nest(anyRule, 1)...)
	}
	r, findings, chain := decodeRBAC(t, nest(accessPolicy("p", nest(many, 2), anyRule), 1))
	of := r.Rules.Policies[0].Permission.Of
	if !strings.HasSuffix(findings, "more conditions than are supported") || !chain.Refused || len(of) != maxConditions || of[maxConditions-1].Kind != ConditionUnknown || of[0].Kind != ConditionTrue {
		t.Errorf("findings %s, refused %v, %d conditions", findings, chain.Refused, len(of))
	}
}

// FuzzRBAC decodes policies of connections and of requests.
func FuzzRBAC(f *testing.F) {
	f.Add(nest(accessPolicy("p", nest(nest(anyRule, 1), 1), nest(anyRule, 8)), 1))
	f.Add(nest(join(number(1, 1), accessPolicy("p", nest(join(text(1, "x"), number(7, 1)), 4), nest(text(2, "a"), 4, 2))), 2))
	f.Fuzz(func(t *testing.T, config []byte) {
		network := chain(nest(packed(networkRBACType, config), 3, 4), httpManager(nest(packed(rbacType, config), 5, 4)))
		l, findings, err := DecodeListener(join(network, field1(lName)))
		if err != nil {
			return
		}
		if r := l.Chains[0].HTTP.Filters[0].RBAC; (r.Refused || l.Chains[0].Policies[0].RBAC.Refused) && !l.Chains[0].Refused || l.Chains[0].Refused && len(findings) == 0 {
			t.Errorf("refused %v, findings %v", l.Chains[0].Refused, findings)
		}
	})
}
