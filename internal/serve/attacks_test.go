package serve

import (
	"net/netip"
	"testing"

	"github.com/pillion-proxy/pillion/internal/authz"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/httpforward"
	"github.com/pillion-proxy/pillion/internal/mesh"
)

// fieldList are header fields: names and values in turn.
type fieldList []string

func (l fieldList) Len() int                      { return len(l) / 2 }
func (l fieldList) At(i int) (name, value []byte) { return []byte(l[2*i]), []byte(l[2*i+1]) }

func exactly(text string) mesh.StringMatcher { return mesh.StringMatcher{Text: text} }

func onPath(m mesh.StringMatcher) mesh.Condition {
	return mesh.Condition{Kind: mesh.ConditionPath, Text: &m}
}

func onField(name string, m mesh.StringMatcher) mesh.Condition {
	return mesh.Condition{Kind: mesh.ConditionHeader, Header: &mesh.HeaderMatcher{Name: name, Kind: mesh.HeaderText, Text: m}}
}

func negated(c mesh.Condition) mesh.Condition {
	return mesh.Condition{Kind: mesh.ConditionNot, Of: []mesh.Condition{c}}
}

func onName(m mesh.StringMatcher) mesh.Condition {
	return mesh.Condition{Kind: mesh.ConditionPrincipal, Text: &m}
}

var always = mesh.Condition{Kind: mesh.ConditionTrue}

func policyOf(action mesh.Action, permission, principal mesh.Condition) *mesh.RBAC {
	return &mesh.RBAC{Rules: &mesh.Rules{Action: action, Policies: []mesh.AccessPolicy{{Name: "p", Permission: permission, Principal: principal}}}}
}

// TestAttacksThatOthersHaveAllowed sends requests that went past the policies of Envoy or Istio once. Each is named by its CVE.
// Those of tokens, certificates and HTTP/2 are in the tests of their packages: CVE-2021-21378 in inbound.TestTokens,
// CVE-2023-27493 in secure.TestNamesOfAClientCannotAddParts, CVE-2022-21657 in secure.TestClientsAreRejectedByName, CVE-2022-21679 in
// mesh.TestPartsOfPoliciesThatAreNotUnderstood, CVE-2021-32777 in inbound.TestAServerDecidesByHTTP, CVE-2023-44487 and
// CVE-2024-30255 in httpforward.TestFloodsEndAConnection, CVE-2021-31921 in gateway.TestAServerNameChoosesServicesOnly and
// CVE-2020-16844 below. CVE-2022-21654 is in gateway.TestSessionsAreNotResumed. CVE-2021-34824 has no place: the control plane decides
// which secrets a proxy gets.
func TestAttacksThatOthersHaveAllowed(t *testing.T) {
	admin := policyOf(mesh.Deny, onPath(mesh.StringMatcher{Kind: mesh.MatchPrefix, Text: "/admin"}), always)
	exact := policyOf(mesh.Deny, onPath(exactly("/admin")), always)
	unescape := func(h *mesh.HTTPManager) { h.EscapedSlashes = mesh.UnescapeSlashes }
	template := mesh.Condition{Kind: mesh.ConditionTemplate, Template: "/admin/*/x"}
	for _, c := range []struct {
		cve    string
		policy *mesh.RBAC
		change func(*mesh.HTTPManager)
		path   string
		host   string
		fields fieldList
		want   int // status of the reply; 0: the request passes
	}{
		{"CVE-2021-31920", admin, nil, "//admin", "a", nil, 403},
		{"CVE-2021-31920", admin, nil, "/x/..//admin", "a", nil, 403},
		{"CVE-2021-31920", admin, nil, `\admin`, "a", nil, 400},
		{"CVE-2021-31920", admin, nil, `/\admin`, "a", nil, 403},
		{"CVE-2021-29492", admin, unescape, "/x%2f..%2Fadmin", "a", nil, 403},
		{"CVE-2021-29492", admin, unescape, "/%5cadmin", "a", nil, 403},
		{"CVE-2021-29492", admin, unescape, "%2fadmin", "a", nil, 400},
		{"CVE-2021-39156", exact, nil, "/admin#fragment", "a", nil, 400},
		{"CVE-2021-32779", exact, nil, "/admin#/../x", "a", nil, 400},
		{"CVE-2020-8595", exact, nil, "/admin?x", "a", nil, 403},
		{"CVE-2021-39155", policyOf(mesh.Deny, onField(":authority", mesh.StringMatcher{Text: "admin.example", IgnoreCase: true}), always), nil, "/", "Admin.EXAMPLE", nil, 403},
		{"CVE-2020-25017", policyOf(mesh.Allow, onField("x-role", exactly("user")), always), nil, "/", "a", fieldList{"x-role", "user", "X-Role", "admin"}, 403},
		{"CVE-2020-25017", policyOf(mesh.Deny, negated(onField("x-role", exactly("user"))), always), nil, "/", "a", fieldList{"x-role", "user", "X-Role", "admin"}, 403},
		{"CVE-2026-73552", policyOf(mesh.Deny, negated(onField("x-role", mesh.StringMatcher{Kind: mesh.MatchRegex, Text: "user.*"})), always), nil, "/", "a", fieldList{"x-role", "user\xff"}, 403},
		{"CVE-2026-73552", policyOf(mesh.Deny, onField("x-role", mesh.StringMatcher{Kind: mesh.MatchRegex, Text: "admin.*"}), always), nil, "/", "a", fieldList{"x-role", "admin\xff"}, 403},
		{"CVE-2025-46821", policyOf(mesh.Deny, template, always), nil, "/admin/*/x", "a", nil, 403},
		{"CVE-2025-46821", policyOf(mesh.Deny, template, always), nil, "/admin/a*b/x", "a", nil, 403},
		{"CVE-2026-73553", exact, nil, "/admin;x=y", "a", nil, 0}, // and CVE-2026-73511: the workload gets the very path that was judged; --strict-paths rejects it
		{"CVE-2026-39350", policyOf(mesh.Allow, onField(":authority", mesh.StringMatcher{Kind: mesh.MatchRegex, Text: `a\.b`}), always), nil, "/", "a.bc", nil, 403},
		{"CVE-2023-27487", admin, nil, "/admin", "a", fieldList{"x-envoy-original-path", "/"}, 403},
		{"CVE-2023-27487", policyOf(mesh.Allow, onPath(exactly("/public")), always), nil, "/admin", "a", fieldList{"x-envoy-original-path", "/public"}, 403},
		{"CVE-2024-45806", policyOf(mesh.Deny, always, always), nil, "/", "a", fieldList{"x-envoy-internal", "true"}, 403},
	} {
		h := &mesh.HTTPManager{Filters: []mesh.HTTPFilter{{Name: "rbac", RBAC: c.policy}}, NormalizePath: true, MergeSlashes: true}
		if c.change != nil {
			c.change(h)
		}
		r := &httpforward.Request{Connection: &flow.Record{}, Method: []byte("GET"), Path: []byte(c.path), Authority: []byte(c.host), Fields: c.fields}
		got := 0
		if _, reply, _ := new(gate).pass(&mesh.Snapshot{}, h, r); reply != nil {
			got = reply.Status
		}
		if got != c.want {
			t.Errorf("%s: %s at %s with %q: %d, want %d", c.cve, c.path, c.host, c.fields, got, c.want)
		}
	}
}

// A policy of connections that denies names by their ends looks at whole names (CVE-2020-16844).
func TestPoliciesOfConnectionsDenyNamesByTheirEnds(t *testing.T) {
	const name = "spiffe://cluster.local/ns/shop/sa/admin"
	s := &authz.Subject{Secured: true, Names: []string{name}, Destination: netip.MustParseAddrPort("192.0.2.1:80")}
	for _, m := range []mesh.StringMatcher{
		{Kind: mesh.MatchSuffix, Text: "/sa/admin"}, {Kind: mesh.MatchPrefix, Text: "spiffe://cluster.local/ns/shop"}, exactly(name), {Kind: mesh.MatchRegex, Text: ".*/ns/shop/.*"},
	} {
		if _, denied := authorize([]mesh.NetworkFilter{{RBAC: policyOf(mesh.Deny, always, onName(m))}}, s); !denied {
			t.Errorf("%+v allows", m)
		}
	}
}
