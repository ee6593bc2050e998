package authz

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

// fields are header fields for tests.
type fields [][2]string

func (f fields) Len() int { return len(f) }
func (f fields) At(i int) (name, value []byte) {
	return []byte(f[i][0]), []byte(f[i][1])
}

// claims is metadata that has the text of a claim.
type claims map[string]string

func (c claims) Match(m *mesh.MetadataMatcher) value {
	return truth((m.Value.Text.Text == c[strings.Join(m.Path, ".")]) != m.Invert)
}

func request() *Subject {
	return &Subject{
		Destination: netip.MustParseAddrPort("192.0.2.10:8080"),
		Peer:        netip.MustParseAddr("198.51.100.7"),
		Client:      netip.MustParseAddr("203.0.113.9"),
		ServerName:  "outbound_.80_._.web.default.svc.cluster.local",
		Secured:     true,
		Names:       []string{"spiffe://cluster.local/ns/default/sa/sleep", "sleep.example", "CN=sleep"},
		Request: &Request{
			Method: []byte("GET"), Authority: []byte("Web:8080"), Scheme: []byte("http"), Path: []byte("/admin/x;y?q=/public"),
			Fields:   fields{{"X-One", "a"}, {"x-many", "a"}, {"X-MANY", "b"}, {"x-empty", ""}, {"x-raw", "a\xffb"}, {"x-n", "17"}},
			Metadata: claims{"payload.iss": "me"},
		},
	}
}

func exact(s string) mesh.StringMatcher  { return mesh.StringMatcher{Text: s} }
func prefix(s string) mesh.StringMatcher { return mesh.StringMatcher{Kind: mesh.MatchPrefix, Text: s} }
func suffix(s string) mesh.StringMatcher { return mesh.StringMatcher{Kind: mesh.MatchSuffix, Text: s} }
func regex(s string) mesh.StringMatcher  { return mesh.StringMatcher{Kind: mesh.MatchRegex, Text: s} }
func fold(m mesh.StringMatcher) mesh.StringMatcher {
	m.IgnoreCase = true
	return m
}

func header(name string, m mesh.StringMatcher) mesh.Condition {
	return mesh.Condition{Kind: mesh.ConditionHeader, Header: &mesh.HeaderMatcher{Name: name, Kind: mesh.HeaderText, Text: m}}
}

func present(name string, want bool) mesh.Condition {
	return mesh.Condition{Kind: mesh.ConditionHeader, Header: &mesh.HeaderMatcher{Name: name, Present: want}}
}

func inverted(c mesh.Condition) mesh.Condition {
	h := *c.Header
	h.Invert = true
	c.Header = &h
	return c
}

func emptyIfMissing(c mesh.Condition) mesh.Condition {
	h := *c.Header
	h.MissingIsEmpty = true
	c.Header = &h
	return c
}

func path(m mesh.StringMatcher) mesh.Condition {
	return mesh.Condition{Kind: mesh.ConditionPath, Text: &m}
}
func name(m mesh.StringMatcher) mesh.Condition {
	return mesh.Condition{Kind: mesh.ConditionPrincipal, Text: &m}
}
func not(c mesh.Condition) mesh.Condition {
	return mesh.Condition{Kind: mesh.ConditionNot, Of: []mesh.Condition{c}}
}
func all(of ...mesh.Condition) mesh.Condition {
	return mesh.Condition{Kind: mesh.ConditionAll, Of: of}
}
func some(of ...mesh.Condition) mesh.Condition {
	return mesh.Condition{Kind: mesh.ConditionAny, Of: of}
}
func template(s string) mesh.Condition {
	return mesh.Condition{Kind: mesh.ConditionTemplate, Template: s}
}

func in(kind mesh.ConditionKind, prefix string) mesh.Condition {
	return mesh.Condition{Kind: kind, Addresses: netip.MustParsePrefix(prefix)}
}

func ports(start, end int32) mesh.Condition {
	return mesh.Condition{Kind: mesh.ConditionPort, Start: start, End: end}
}

func claim(path, text string, invert bool) mesh.Condition {
	return mesh.Condition{Kind: mesh.ConditionMetadata, Metadata: &mesh.MetadataMatcher{
		Filter: "envoy.filters.http.jwt_authn", Path: strings.Split(path, "."), Invert: invert,
		Value: mesh.ValueMatcher{Kind: mesh.ValueText, Text: exact(text)},
	}}
}

var (
	anything = mesh.Condition{Kind: mesh.ConditionTrue}
	riddle   = mesh.Condition{}
	long     = strings.Repeat("long", 4000)
)

func TestConditions(t *testing.T) {
	plain := func(s *Subject) { s.Secured, s.Names, s.ServerName = false, nil, "" }
	connection := func(s *Subject) { s.Request = nil }
	connect := func(s *Subject) { s.Request.Path = nil }
	at := func(path string) func(*Subject) { return func(s *Subject) { s.Request.Path = []byte(path) } }
	with := func(f ...[2]string) func(*Subject) { return func(s *Subject) { s.Request.Fields = fields(f) } }
	for _, c := range []struct {
		condition mesh.Condition
		change    func(*Subject)
		want      value
	}{
		{anything, nil, yes},
		{riddle, nil, unknown},
		{not(riddle), nil, unknown},
		{not(anything), nil, no},
		{all(anything, anything), nil, yes},
		{all(anything, riddle), nil, unknown},
		{all(riddle, not(anything)), nil, no},
		{some(riddle, anything), nil, yes},
		{some(not(anything), riddle), nil, unknown},
		{some(not(anything), not(anything)), nil, no},
		{mesh.Condition{Kind: mesh.ConditionNot}, nil, unknown},
		{mesh.Condition{Kind: 200}, nil, unknown},

		{in(mesh.ConditionDestination, "192.0.2.0/24"), nil, yes},
		{in(mesh.ConditionDestination, "198.51.100.0/24"), nil, no},
		{in(mesh.ConditionPeer, "198.51.100.7/32"), nil, yes},
		{in(mesh.ConditionPeer, "203.0.113.0/24"), nil, no},
		{in(mesh.ConditionClient, "203.0.113.0/24"), nil, yes},
		{in(mesh.ConditionClient, "198.51.100.0/24"), nil, no},
		{in(mesh.ConditionPeer, "198.51.100.0/24"), func(s *Subject) { s.Peer = netip.MustParseAddr("::ffff:198.51.100.7") }, yes},
		{mesh.Condition{Kind: mesh.ConditionPeer}, nil, no},
		{ports(8080, 8081), nil, yes},
		{ports(80, 8080), nil, no},
		{ports(8081, 9000), nil, no},

		{mesh.Condition{Kind: mesh.ConditionServerName, Text: new(suffix(".cluster.local"))}, nil, yes},
		{mesh.Condition{Kind: mesh.ConditionServerName, Text: new(suffix(".cluster.local"))}, plain, no},
		{mesh.Condition{Kind: mesh.ConditionPrincipal}, nil, yes},
		{mesh.Condition{Kind: mesh.ConditionPrincipal}, plain, no},
		{name(exact("spiffe://cluster.local/ns/default/sa/sleep")), nil, yes},
		{name(exact("cluster.local/ns/default/sa/sleep")), nil, no},
		{name(exact("sleep.example")), nil, yes},
		{name(exact("CN=sleep")), nil, yes},
		{name(regex(".*/ns/default/.*")), nil, yes},
		{name(regex("ns/default")), nil, no},
		{name(regex(".+")), nil, yes},
		{name(regex(".+")), plain, no},
		{not(name(exact("x"))), plain, yes}, // a policy that denies notPrincipals denies plaintext
		{name(suffix("/sa/sleep")), connection, yes},
		{name(regex("(")), nil, unknown},
		{name(regex(".+")), func(s *Subject) { s.Names = []string{"a\nb"} }, unknown},

		{header(":method", exact("GET")), nil, yes},
		{header(":method", exact("get")), nil, no},
		{header(":authority", exact("web:8080")), nil, no},
		{header(":authority", fold(exact("web:8080"))), nil, yes},
		{header("Host", fold(prefix("WEB:"))), nil, yes},
		{header(":authority", fold(exact("web"))), nil, no},
		{header(":scheme", exact("http")), nil, yes},
		{header(":path", exact("/admin/x;y?q=/public")), nil, yes},
		{header("x-one", exact("a")), nil, yes},
		{header("X-one", exact("A")), nil, no},
		{header("x-many", exact("a")), nil, no},
		{header("x-many", exact("a,b")), nil, yes},
		{header("x-many", suffix("b")), nil, yes},
		{header("x-empty", exact("")), nil, yes},
		{header("x-none", exact("")), nil, no},
		{header("x-none", exact("")), connection, unknown},
		{inverted(header("x-none", exact("a"))), nil, no},
		{inverted(header("x-one", exact("b"))), nil, yes},
		{emptyIfMissing(header("x-none", exact(""))), nil, yes},
		{inverted(emptyIfMissing(header("x-none", exact("a")))), nil, yes},
		{not(header("x-none", exact("a"))), nil, yes},
		{present("x-one", true), nil, yes},
		{present("x-none", true), nil, no},
		{inverted(present("x-none", true)), nil, yes},
		{present("x-none", false), nil, yes},
		{present("x-one", false), nil, no},
		{header("x-raw", regex("a.b")), nil, unknown},
		{not(header("x-raw", regex("a.b"))), nil, unknown},
		{header("x-raw", prefix("a\xff")), nil, yes},
		{header("x", exact("a")), with([2]string{"x", "a"}, [2]string{"y", "b"}, [2]string{"X", "c"}), no},
		{header("x", exact("a,c,d")), with([2]string{"x", "a"}, [2]string{"x", "c"}, [2]string{"X", "d"}), yes},
		{header("x", suffix("long")), with([2]string{"x", long}, [2]string{"x", long}), yes},
		{header("x", mesh.StringMatcher{Kind: mesh.MatchContains, Text: "glong"}), with([2]string{"x", long}), yes},
		{header("x", fold(mesh.StringMatcher{Kind: mesh.MatchContains, Text: "GLONG"})), with([2]string{"x", long}), yes},
		{header("x", mesh.StringMatcher{Kind: mesh.MatchContains, Text: "short"}), with([2]string{"x", long}), no},
		{mesh.Condition{Kind: mesh.ConditionHeader, Header: &mesh.HeaderMatcher{Name: "x-n", Kind: mesh.HeaderRange, Start: 17, End: 18}}, nil, yes},
		{mesh.Condition{Kind: mesh.ConditionHeader, Header: &mesh.HeaderMatcher{Name: "x-n", Kind: mesh.HeaderRange, Start: 1, End: 17}}, nil, no},
		{mesh.Condition{Kind: mesh.ConditionHeader, Header: &mesh.HeaderMatcher{Name: "x-one", Kind: mesh.HeaderRange, Start: 0, End: 99}}, nil, no},

		{path(exact("/admin/x;y")), nil, yes},
		{path(exact("/ADMIN/x;y")), nil, no},
		{path(prefix("/public")), nil, no},
		{path(suffix("/public")), nil, no},
		{path(prefix("/")), connect, no},
		{not(path(prefix("/"))), connect, yes},
		{path(exact("/a")), at("/a?"), yes},
		{path(exact("/a")), at("/a#b?c"), yes},
		{path(regex("/a.*")), at("/a/\xff"), unknown},
		{template("/admin/*"), nil, yes},
		{template("/*"), nil, no},
		{template("/**"), nil, yes},
		{template("/a/*/b"), at("/a/*/b"), yes},
		{template("/a/*/b"), at("/a//b"), no},
		{template("/a/*/b"), at("/a/x/y/b"), no},
		{template("/a/**/b"), at("/a/x/y/b"), yes},
		{template("/a/**"), at("/a"), no},
		{template("/a/**"), at("/a/"), yes},
		{template("/a.b/*"), at("/aXb/c"), no},
		{template("/a/*"), at("/a/\"b"), unknown},
		{template("/a/*"), connect, no},

		{claim("payload.iss", "me", false), nil, yes},
		{claim("payload.iss", "you", false), nil, no},
		{claim("payload.iss", "you", true), nil, yes},
		{claim("payload.iss", "me", false), func(s *Subject) { s.Request.Metadata = nil }, no},
		{claim("payload.iss", "me", true), func(s *Subject) { s.Request.Metadata = nil }, yes},
	} {
		s := request()
		if c.change != nil {
			c.change(s)
		}
		compiled := compile(&c.condition)
		if got := compiled.met(s); got != c.want {
			t.Errorf("%s: %v, want %v", compiled.why(s), got, c.want)
		}
	}
}

func rule(name string, permission, principal mesh.Condition) mesh.AccessPolicy {
	return mesh.AccessPolicy{Name: name, Permission: permission, Principal: principal}
}

func TestJudge(t *testing.T) {
	unsure := rule("unsure", anything, anything)
	unsure.Unknown = true
	met, unmet := rule("met", anything, anything), rule("unmet", anything, not(anything))
	for _, c := range []struct {
		name string
		rbac mesh.RBAC
		want Verdict
	}{
		{"no rules", mesh.RBAC{}, Verdict{}},
		{"refused", mesh.RBAC{Refused: true}, Verdict{Denied: true, Refused: true}},
		{"refused with an allowing policy", mesh.RBAC{Refused: true, Rules: &mesh.Rules{Policies: []mesh.AccessPolicy{met}}}, Verdict{Denied: true, Refused: true}},
		{"allow without policies", mesh.RBAC{Rules: &mesh.Rules{}}, Verdict{Denied: true}},
		{"allow, not met", mesh.RBAC{Rules: &mesh.Rules{Policies: []mesh.AccessPolicy{unmet}}}, Verdict{Denied: true}},
		{"allow, perhaps met", mesh.RBAC{Rules: &mesh.Rules{Policies: []mesh.AccessPolicy{unsure, rule("x", riddle, anything)}}}, Verdict{Denied: true}},
		{"allow, met", mesh.RBAC{Rules: &mesh.Rules{Policies: []mesh.AccessPolicy{unmet, unsure, met}}}, Verdict{Matched: "met"}},
		{"allow, refused rules", mesh.RBAC{Rules: &mesh.Rules{Refused: true, Policies: []mesh.AccessPolicy{met}}}, Verdict{Denied: true, Refused: true}},
		{"deny without policies", mesh.RBAC{Rules: &mesh.Rules{Action: mesh.Deny}}, Verdict{}},
		{"deny, not met", mesh.RBAC{Rules: &mesh.Rules{Action: mesh.Deny, Policies: []mesh.AccessPolicy{unmet}}}, Verdict{}},
		{"deny, perhaps met", mesh.RBAC{Rules: &mesh.Rules{Action: mesh.Deny, Policies: []mesh.AccessPolicy{unmet, unsure, met}}}, Verdict{Denied: true, Matched: "unsure"}},
		{"deny, met", mesh.RBAC{Rules: &mesh.Rules{Action: mesh.Deny, Policies: []mesh.AccessPolicy{unmet, met}}}, Verdict{Denied: true, Matched: "met"}},
		{"deny, refused rules", mesh.RBAC{Rules: &mesh.Rules{Action: mesh.Deny, Refused: true}}, Verdict{Denied: true, Refused: true}},
		{"log", mesh.RBAC{Rules: &mesh.Rules{Action: mesh.Log, Policies: []mesh.AccessPolicy{met}}}, Verdict{Matched: "met"}},
		{"log, not met", mesh.RBAC{Rules: &mesh.Rules{Action: mesh.Log}}, Verdict{}},
		{"an action that is not known", mesh.RBAC{Rules: &mesh.Rules{Action: 9}}, Verdict{Denied: true}},
	} {
		got := Compile(&c.rbac).Judge(request())
		if got != c.want {
			t.Errorf("%s: %+v, want %+v", c.name, got, c.want)
		}
	}
}

func TestShadowIsNotEnforced(t *testing.T) {
	p := Compile(&mesh.RBAC{
		Shadow: &mesh.Rules{Action: mesh.Deny, Policies: []mesh.AccessPolicy{rule("dry", anything, anything)}}, ShadowPrefix: "istio_dry_run_deny_",
	})
	if v := p.Judge(request()); v.Denied {
		t.Errorf("judged %+v", v)
	}
	want := Shadow{Verdict{Denied: true, Matched: "dry"}, "istio_dry_run_deny_"}
	if shadow, ok := p.Shadow(request()); !ok || shadow != want {
		t.Errorf("shadow: %+v, %v; want %+v", shadow, ok, want)
	}
	if _, ok := Compile(&mesh.RBAC{}).Shadow(request()); ok {
		t.Error("a shadow without shadow rules")
	}
}

// TestStrictness changes random policies in ways that must never allow more.
func TestStrictness(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	allowed := 0
	for range 20_000 {
		rbac := mesh.RBAC{Rules: &mesh.Rules{Action: mesh.Action(random.IntN(2)), Policies: randomPolicies(random)}}
		s := randomSubject(random)
		before := Compile(&rbac).Judge(s)
		if !before.Denied {
			allowed++
			continue
		}
		stricter := rbac
		rules := *rbac.Rules
		rules.Policies = slices.Clone(rules.Policies)
		stricter.Rules = &rules
		i := random.IntN(len(rules.Policies))
		change := ""
		switch random.IntN(4) {
		case 0:
			if change = "a removed policy"; rules.Action == mesh.Deny {
				change = "an added policy"
				rules.Policies = append(rules.Policies, randomPolicies(random)...)
			} else {
				rules.Policies = slices.Delete(rules.Policies, i, i+1)
			}
		case 1:
			change = "an unknown part of a policy"
			rules.Policies[i].Unknown = true
		case 2:
			change = "a condition that is not understood"
			obscure(random, &rules.Policies[i].Permission)
			obscure(random, &rules.Policies[i].Principal)
		case 3:
			change = "an unknown part of the rules"
			rules.Refused = true
		}
		if after := Compile(&stricter).Judge(s); !after.Denied {
			t.Fatalf("with %s, %+v is allowed: %+v, before %+v", change, s, after, before)
		}
	}
	if allowed < 1000 || allowed > 19_000 {
		t.Errorf("%d of 20000 are allowed", allowed)
	}
}

// obscure replaces random parts of a condition by ones that are not understood.
func obscure(random *rand.Rand, c *mesh.Condition) {
	if random.IntN(3) == 0 {
		*c = riddle
		return
	}
	c.Of = slices.Clone(c.Of)
	for i := range c.Of {
		obscure(random, &c.Of[i])
	}
}

func randomPolicies(random *rand.Rand) (policies []mesh.AccessPolicy) {
	for i := range 1 + random.IntN(4) {
		policies = append(policies, rule(fmt.Sprint(i), randomCondition(random, 3), randomCondition(random, 3)))
	}
	return policies
}

func randomCondition(random *rand.Rand, depth int) mesh.Condition {
	kind := random.IntN(8)
	if depth == 0 {
		kind %= 5
	}
	switch kind {
	case 0:
		return anything
	case 1:
		return ports(8080, 8080+random.Int32N(2))
	case 2:
		return header("x", exact([]string{"a", "b"}[random.IntN(2)]))
	case 3:
		return path(prefix([]string{"/a", "/b"}[random.IntN(2)]))
	case 4:
		return name(exact([]string{"a", "b"}[random.IntN(2)]))
	case 5:
		return not(randomCondition(random, depth-1))
	}
	c := mesh.Condition{Kind: []mesh.ConditionKind{mesh.ConditionAll, mesh.ConditionAny}[kind-6]}
	for range 2 + random.IntN(2) {
		c.Of = append(c.Of, randomCondition(random, depth-1))
	}
	return c
}

func randomSubject(random *rand.Rand) *Subject {
	s := request()
	s.Names = []string{[]string{"a", "b", "c"}[random.IntN(3)]}
	s.Request.Path = []byte([]string{"/a", "/b", "/c"}[random.IntN(3)])
	s.Request.Fields = fields{{"x", []string{"a", "b", "c"}[random.IntN(3)]}}
	return s
}

// TestConditionsByTruthTables compares conditions of random shape with the truth tables of Kleene's logic.
func TestConditionsByTruthTables(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	seen := map[value]int{}
	for range 20_000 {
		c := randomCondition(random, 4)
		obscureSome(random, &c)
		s := randomSubject(random)
		compiled := compile(&c)
		got, want := compiled.met(s), kleene(&c, s)
		if got != want {
			t.Fatalf("%s: %v, want %v", compiled.why(s), got, want)
		}
		seen[got]++
	}
	if seen[no] < 1000 || seen[unknown] < 1000 || seen[yes] < 1000 {
		t.Errorf("values are not all common: %v", seen)
	}
}

func obscureSome(random *rand.Rand, c *mesh.Condition) {
	if random.IntN(8) == 0 {
		*c = riddle
	}
	for i := range c.Of {
		obscureSome(random, &c.Of[i])
	}
}

// kleene evaluates a condition for every assignment of what is not understood: the value is certain if all agree.
func kleene(c *mesh.Condition, s *Subject) value {
	switch c.Kind {
	case mesh.ConditionUnknown:
		return unknown
	case mesh.ConditionNot:
		return map[value]value{yes: no, no: yes, unknown: unknown}[kleene(&c.Of[0], s)]
	case mesh.ConditionAll, mesh.ConditionAny:
		count := map[value]int{}
		for i := range c.Of {
			count[kleene(&c.Of[i], s)]++
		}
		switch {
		case c.Kind == mesh.ConditionAll && count[no] > 0:
			return no
		case c.Kind == mesh.ConditionAny && count[yes] > 0:
			return yes
		case count[unknown] > 0:
			return unknown
		case c.Kind == mesh.ConditionAll:
			return yes
		}
		return no
	case mesh.ConditionTrue:
		return yes
	case mesh.ConditionPort:
		return truth(int32(s.Destination.Port()) >= c.Start && int32(s.Destination.Port()) < c.End)
	case mesh.ConditionHeader:
		return truth(c.Header.Text.Text == s.Request.Fields.(fields)[0][1])
	case mesh.ConditionPath:
		return truth(strings.HasPrefix(string(s.Request.Path), c.Text.Text))
	case mesh.ConditionPrincipal:
		return truth(c.Text.Text == s.Names[0])
	}
	panic("a kind that the test does not use")
}

func TestExplain(t *testing.T) {
	p := Compile(&mesh.RBAC{Rules: &mesh.Rules{Policies: []mesh.AccessPolicy{
		rule("a", all(header(":method", exact("POST")), path(prefix("/admin"))), anything),
		rule("b", anything, not(name(prefix("spiffe://cluster.local/")))),
		rule("c", some(ports(80, 81), ports(443, 444)), anything),
		rule("d", some(path(prefix("/x")), riddle), in(mesh.ConditionClient, "203.0.113.0/24")),
		rule("e", path(prefix("/admin")), in(mesh.ConditionClient, "203.0.113.0/24")),
		rule("f", present("x-one", false), present("x-none", true)),
		rule("g", mesh.Condition{Kind: mesh.ConditionHeader, Header: &mesh.HeaderMatcher{Name: "x-n", Kind: mesh.HeaderRange, Start: 1, End: 17}}, anything),
		rule("h", inverted(present("x-one", true)), anything),
	}}})
	want := []Reason{
		{"a", "no", `header :method "GET" is not equal to "POST"`},
		{"b", "no", `not (principal ["spiffe://cluster.local/ns/default/sa/sleep" "sleep.example" "CN=sleep"] is with prefix "spiffe://cluster.local/")`},
		{"c", "no", `destination port 8080 is not 80 and destination port 8080 is not 443`},
		{"d", "unknown", `a condition is not understood`},
		{"e", "yes", `path "/admin/x;y" is with prefix "/admin" and client address 203.0.113.9 is in 203.0.113.0/24`},
		{"f", "no", `header x-one "a" is not absent`},
		{"g", "no", `header x-n "17" is not in 1-16`},
		{"h", "no", `header x-one "a" is not other than present`},
	}
	if got := p.Explain(request()); !slices.Equal(got, want) {
		t.Errorf("got\n%+v, want\n%+v", got, want)
	}
	unnamed := request()
	unnamed.Client = netip.Addr{}
	if got := p.Explain(unnamed)[4]; got != (Reason{"e", "unknown", "client address that is not given may be in 203.0.113.0/24"}) {
		t.Errorf("without an address: %+v", got)
	}
	if got := Compile(&mesh.RBAC{}).Explain(request()); got != nil {
		t.Errorf("without rules: %+v", got)
	}
}
