package authz

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

// demanding is a policy whose condition is of a header field.
func demanding(name, field, value string) mesh.AccessPolicy {
	return mesh.AccessPolicy{Name: name, Principal: mesh.Condition{Kind: mesh.ConditionTrue}, Permission: mesh.Condition{
		Kind: mesh.ConditionHeader, Header: &mesh.HeaderMatcher{Kind: mesh.HeaderText, Name: field, Text: mesh.StringMatcher{Kind: mesh.MatchExact, Text: value}},
	}}
}

func requestWith(field, value string) *Subject {
	return &Subject{Destination: netip.MustParseAddrPort("192.0.2.1:80"), Request: &Request{
		Method: []byte("GET"), Authority: []byte("web"), Path: []byte("/"), Fields: denialFields{{field, value}},
	}}
}

type denialFields [][2]string

func (f denialFields) Len() int                      { return len(f) }
func (f denialFields) At(i int) (name, value []byte) { return []byte(f[i][0]), []byte(f[i][1]) }

func denialOf(s *Subject, action mesh.Action, policies ...mesh.AccessPolicy) string {
	return Compile(&mesh.RBAC{Rules: &mesh.Rules{Action: action, Policies: policies}}).Denial(s)
}

// A denial names the policy that matches first, and of the others the first condition that is not met, with what was seen.
func TestADenialNamesEachPolicy(t *testing.T) {
	s := requestWith("x-team", "blue")
	for got, want := range map[string]string{
		denialOf(s, mesh.Allow, demanding("a", "x-team", "red"), demanding("b", ":method", "POST")): `a: does not apply, since header x-team "blue" is not equal to "red"` +
			"\n" + `b: does not apply, since header :method "GET" is not equal to "POST"`,
		denialOf(s, mesh.Deny, demanding("a", "x-team", "red"), demanding("b", "x-team", "blue")): `b: applies, since header x-team "blue" is equal to "blue" and anything` +
			"\n" + `a: does not apply, since header x-team "blue" is not equal to "red"`,
		denialOf(s, mesh.Allow):                                          "there is no policy that allows anything",
		Compile(&mesh.RBAC{Refused: true}).Denial(s):                     "the policies have a part that is not supported",
		Compile(&mesh.RBAC{Rules: &mesh.Rules{Refused: true}}).Denial(s): "the policies have a part that is not supported",
	} {
		if got != want {
			t.Errorf("got\n%s\nwant\n%s", got, want)
		}
	}
}

// Values of fields that may have credentials are shown neither as they came nor as a policy has them.
func TestADenialHasNoCredentials(t *testing.T) {
	for _, field := range []string{"Authorization", "cookie", "x-api-key", "X-Auth-Token", "proxy-authorization"} {
		got := denialOf(requestWith(field, "received"), mesh.Allow, demanding("p", field, "wanted"))
		if strings.Contains(got, "received") || strings.Contains(got, "wanted") || !strings.Contains(got, field) {
			t.Errorf("%s: %s", field, got)
		}
	}
	if got := denialOf(requestWith("a", "b"), mesh.Allow, demanding("p", ":authority", "shop")); !strings.Contains(got, `"web"`) {
		t.Errorf(":authority is not shown: %s", got)
	}
}

// However many and long policies and values are, the explanation is short. The policy that matches is in it.
func TestADenialIsBounded(t *testing.T) {
	long := strings.Repeat("x", 60<<10)
	s := requestWith("x-team", long)
	var many []mesh.AccessPolicy
	for i := range 40 {
		p := demanding(fmt.Sprint("p", i), "x-team", "red")
		p.Permission = mesh.Condition{Kind: mesh.ConditionAny}
		for range 50 {
			p.Permission.Of = append(p.Permission.Of, demanding("", "x-team", long+"x").Permission)
		}
		many = append(many, p)
	}
	for name, c := range map[string]struct {
		policies []mesh.AccessPolicy
		lines    int
		last     string
	}{
		"long ones": {many, 5, "and 36 more"},
		"16":        {short(16), 16, "p15: does not apply"},
		"17":        {short(17), 17, "and 1 more"},
	} {
		got := denialOf(s, mesh.Allow, c.policies...)
		lines := strings.Split(got, "\n")
		if len(got) > maxDenial+20 || len(lines) != c.lines || !strings.HasPrefix(lines[len(lines)-1], c.last) {
			t.Errorf("%s: %d bytes in %d lines, the last one is %.60q", name, len(got), len(lines), lines[len(lines)-1])
		}
	}
	got := denialOf(s, mesh.Deny, append(short(40), demanding("last", "x-team", long))...)
	if !strings.HasPrefix(got, "last: applies") || !strings.HasSuffix(got, "\nand 25 more") {
		t.Errorf("the policy that denies is not named: %s", got)
	}
}

// short returns policies that do not match.
func short(n int) (list []mesh.AccessPolicy) {
	for i := range n {
		list = append(list, demanding(fmt.Sprint("p", i), ":method", "POST"))
	}
	return list
}
