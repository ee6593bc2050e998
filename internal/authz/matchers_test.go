package authz

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/match"
	"github.com/pillion-proxy/pillion/internal/mesh"
)

// situation is what a client brings to a matcher, and the matcher's value for it.
type situation struct {
	name   string
	change func(s *Subject)
	want   value
}

// TestEachMatcherInEachSituation has the matchers that istiod writes for the fields of AuthorizationPolicy. The negation of a
// matcher has the opposite value. A policy that allows is met by yes only, one that denies by yes and unknown.
func TestEachMatcherInEachSituation(t *testing.T) {
	names := func(names ...string) func(*Subject) { return func(s *Subject) { s.Secured, s.Names = true, names } }
	plain := func(s *Subject) { s.Secured, s.Names = false, nil }
	silent := func(s *Subject) { s.Request = nil }
	at := func(p string) func(*Subject) { return func(s *Subject) { s.Request.Path = []byte(p) } }
	with := func(f ...[2]string) func(*Subject) { return func(s *Subject) { s.Request.Fields = fields(f) } }
	connect := func(s *Subject) { s.Request.Method, s.Request.Path = []byte("CONNECT"), nil }
	host := func(h string) func(*Subject) { return func(s *Subject) { s.Request.Authority = []byte(h) } }
	method := func(m string) func(*Subject) { return func(s *Subject) { s.Request.Method = []byte(m) } }
	sni := func(n string) func(*Subject) { return func(s *Subject) { s.ServerName = n } }
	peer := func(a string) func(*Subject) { return func(s *Subject) { s.Peer = netip.MustParseAddr(a) } }
	client := func(a string) func(*Subject) { return func(s *Subject) { s.Client = netip.MustParseAddr(a) } }
	to := func(a string) func(*Subject) { return func(s *Subject) { s.Destination = netip.MustParseAddrPort(a) } }
	token := func(claims map[string]any) func(*Subject) {
		return func(s *Subject) { s.Request.Metadata = match.Metadata{"payload": claims} }
	}
	list := func(groups ...any) func(*Subject) { return token(map[string]any{"groups": groups}) }
	value := func(m mesh.ValueMatcher, path ...string) mesh.Condition {
		return mesh.Condition{Kind: mesh.ConditionMetadata, Metadata: &mesh.MetadataMatcher{Path: append([]string{"payload"}, path...), Value: m}}
	}
	text := func(m mesh.StringMatcher) mesh.ValueMatcher { return mesh.ValueMatcher{Kind: mesh.ValueText, Text: m} }
	element := func(m mesh.StringMatcher) mesh.ValueMatcher {
		return mesh.ValueMatcher{Kind: mesh.ValueList, Any: []mesh.ValueMatcher{text(m)}}
	}
	serverName := func(m mesh.StringMatcher) mesh.Condition {
		return mesh.Condition{Kind: mesh.ConditionServerName, Text: &m}
	}
	const sleep = "spiffe://cluster.local/ns/default/sa/sleep"
	paths := func(met string) []situation { // of a matcher of met that is no prefix
		return []situation{
			{"present", at(met), yes}, {"absent", connect, no}, {"not known yet", silent, unknown}, {"empty", at(""), no},
			{"repeated", at(met + met), no}, {"odd case", at(strings.ToUpper(met)), no}, {"encoded", at("/%61" + met[2:]), no},
			{"with a query", at(met + "?x=/other"), yes}, {"in a query", at("/other?x=" + met), no},
			{"with parameters", at(met + ";x"), no}, {"very long", at("/" + long), no},
		}
	}
	for matcher, c := range map[string]struct {
		condition  mesh.Condition
		situations []situation
	}{
		"principals": {name(exact(sleep)), []situation{
			{"present", names(sleep), yes}, {"absent", names(), no}, {"plaintext", plain, no}, {"names without TLS", func(s *Subject) { s.Secured, s.Names = false, []string{sleep} }, no},
			{"repeated", names("spiffe://x", sleep, sleep), yes},
			{"odd case", names("spiffe://Cluster.local/ns/default/sa/sleep"), no}, {"not UTF-8", names(sleep + "\xff"), no},
			{"encoded", names("spiffe://cluster.local/ns/default/sa/%73leep"), no}, {"with port", names("spiffe://cluster.local:80/ns/default/sa/sleep"), no},
			{"very long", names(sleep + long), no}, {"before the request", silent, yes},
		}},
		"principals with a prefix": {name(prefix("spiffe://cluster.local/ns/default/")), []situation{
			{"present", names(sleep), yes}, {"absent", names(), no}, {"repeated", names("x", sleep), yes}, {"odd case", names(strings.ToUpper(sleep)), no},
			{"not UTF-8", names(sleep + "\xff"), yes}, {"very long", names(sleep + long), yes}, {"in the middle", names("x" + sleep), no},
		}},
		"any principal": {name(regex(".+")), []situation{
			{"present", names("x"), yes}, {"absent", names(), no}, {"empty", names(""), no}, {"not UTF-8", names("\xff"), unknown}, {"of two lines", names("a\nb"), unknown},
			{"repeated", names("a\nb", "x"), yes}, {"very long", names(long), yes},
		}},
		"namespaces": {name(regex(".*/ns/default/.*")), []situation{
			{"present", names(sleep), yes}, {"absent", plain, no}, {"repeated", names("x", sleep), yes}, {"odd case", names("spiffe://cluster.local/ns/Default/sa/x"), no},
			{"not UTF-8", names(sleep + "\xff"), unknown}, {"encoded", names("spiffe://cluster.local/ns%2fdefault/sa/x"), no},
			{"with port", names("spiffe://cluster.local:1/ns/default/sa/x"), yes}, {"very long", names(sleep + long), yes}, {"longer", names("spiffe://cluster.local/ns/default-2/sa/x"), no},
		}},
		"ipBlocks": {in(mesh.ConditionPeer, "198.51.100.0/24"), []situation{
			{"present", peer("198.51.100.255"), yes}, {"absent", func(s *Subject) { s.Peer = netip.Addr{} }, unknown}, {"outside", peer("198.51.101.0"), no},
			{"encoded in IPv6", peer("::ffff:198.51.100.1"), yes}, {"IPv6", peer("2001:db8::1"), no}, {"the client's alone", client("198.51.100.1"), yes},
			{"of a connection", silent, yes},
		}},
		"remoteIpBlocks": {in(mesh.ConditionClient, "2001:db8::/32"), []situation{
			{"present", client("2001:db8:ffff::1"), yes}, {"absent", func(s *Subject) { s.Client = netip.Addr{} }, unknown}, {"outside", client("2001:db9::"), no},
			{"the peer's alone", peer("2001:db8::1"), no}, {"with a zone", client("2001:db8::1%eth0"), no},
		}},
		"destination.ip": {in(mesh.ConditionDestination, "192.0.2.10/32"), []situation{
			{"present", to("192.0.2.10:1"), yes}, {"outside", to("192.0.2.11:1"), no}, {"encoded in IPv6", to("[::ffff:192.0.2.10]:1"), yes},
		}},
		"ports": {ports(8080, 8081), []situation{
			{"present", to("192.0.2.1:8080"), yes}, {"below", to("192.0.2.1:8079"), no}, {"above", to("192.0.2.1:8081"), no}, {"absent", to("192.0.2.1:0"), no},
			{"the authority's alone", func(s *Subject) { to("192.0.2.1:80")(s); host("a:8080")(s) }, no}, {"before the request", silent, yes},
		}},
		"hosts": {header(":authority", fold(exact("a.example"))), []situation{
			{"present", host("a.example"), yes}, {"absent", func(s *Subject) { s.Request.Authority = nil }, no}, {"empty", host(""), no},
			{"repeated", host("a.example,a.example"), no}, {"odd case", host("A.eXample"), yes}, {"not UTF-8", host("a.example\xff"), no},
			{"encoded", host("%61.example"), no}, {"with port", host("a.example:80"), no}, {"with a dot", host("a.example."), no}, {"very long", host(long), no},
			{"not known yet", silent, unknown},
		}},
		"hosts with a prefix": {header(":authority", fold(prefix("a.example:"))), []situation{
			{"with port", host("A.example:80"), yes}, {"without port", host("a.example"), no}, {"very long", host("a.example:" + long), yes}, {"not UTF-8", host("a.example:\xff"), yes},
		}},
		"hosts with a suffix": {header("host", fold(suffix(".example"))), []situation{
			{"present", host("x.EXAMPLE"), yes}, {"with port", host("x.example:80"), no}, {"with a dot", host("x.example."), no}, {"very long", host(long + ".example"), yes},
		}},
		"methods": {header(":method", exact("GET")), []situation{
			{"present", method("GET"), yes}, {"absent", func(s *Subject) { s.Request.Method = nil }, no}, {"repeated", method("GET,GET"), no}, {"odd case", method("Get"), no},
			{"not UTF-8", method("GET\xff"), no}, {"encoded", method("%47ET"), no}, {"very long", method("GET" + long), no}, {"not known yet", silent, unknown},
			{"as a field", func(s *Subject) { method("PUT")(s); s.Request.Fields = fields{{":method", "GET"}} }, no},
		}},
		"paths":               {path(exact("/admin")), paths("/admin")},
		"paths with a suffix": {path(suffix("/admin")), append(paths("/admin")[:4], situation{"repeated", at("/admin/admin"), yes}, situation{"a query without a path", at("?/admin"), no}, situation{"not UTF-8", at("/\xff/admin"), yes}, situation{"very long", at("/" + long + "/admin"), yes})},
		"paths with a prefix": {path(prefix("/admin")), []situation{
			{"present", at("/admin/x"), yes}, {"absent", connect, no}, {"repeated", at("/admin/admin"), yes}, {"odd case", at("/Admin"), no}, {"not UTF-8", at("/admin\xff"), yes},
			{"encoded", at("/%61dmin"), no}, {"very long", at("/admin" + long), yes}, {"with a query", at("/admin?"), yes}, {"a query alone", at("/?/admin"), no},
		}},
		"paths with a template": {template("/admin/*/**/x"), []situation{
			{"present", at("/admin/1/2/x"), yes}, {"absent", connect, no}, {"repeated", at("/admin/1/x/x"), yes}, {"odd case", at("/Admin/1/2/x"), no},
			{"not UTF-8", at("/admin/\xff/2/x"), unknown}, {"encoded", at("/admin/%2f/2/x"), yes}, {"a star", at("/admin/*/2/x"), yes}, {"an empty segment", at("/admin//2/x"), no},
			{"very long", at("/admin/" + long + "/2/x"), yes}, {"other bytes", at("/0aAzZ9/1/2/x"), no}, {"not known yet", silent, unknown},
		}},
		"request.headers": {header("x-role", exact("user")), []situation{
			{"present", with([2]string{"x-role", "user"}), yes}, {"absent", with(), no}, {"repeated", with([2]string{"x-role", "user"}, [2]string{"x-role", "user"}), no},
			{"empty", with([2]string{"x-role", ""}), no}, {"odd case of the name", with([2]string{"X-ROLE", "user"}), yes}, {"odd case", with([2]string{"x-role", "User"}), no},
			{"not UTF-8", with([2]string{"x-role", "user\xff"}), no}, {"encoded", with([2]string{"x-role", "%75ser"}), no}, {"very long", with([2]string{"x-role", "user" + long}), no},
			{"a longer name", with([2]string{"x-roles", "user"}), no}, {"not known yet", silent, unknown},
		}},
		"request.headers with any value": {present("x-role", true), []situation{
			{"present", with([2]string{"X-Role", "x"}), yes}, {"empty", with([2]string{"x-role", ""}), yes}, {"absent", with(), no}, {"repeated", with([2]string{"x-role", "a"}, [2]string{"x-role", "b"}), yes},
			{"not UTF-8", with([2]string{"x-role", "\xff"}), yes}, {"very long", with([2]string{"x-role", long}), yes}, {"not known yet", silent, unknown},
		}},
		"request.headers with an expression": {header("x-role", regex("user-[0-9]+")), []situation{
			{"present", with([2]string{"x-role", "user-17"}), yes}, {"absent", with(), no}, {"repeated", with([2]string{"x-role", "user-1"}, [2]string{"x-role", "user-2"}), no},
			{"odd case", with([2]string{"x-role", "User-1"}), no}, {"not UTF-8", with([2]string{"x-role", "user-1\xff"}), unknown}, {"very long", with([2]string{"x-role", "user-" + strings.Repeat("1", 9999)}), yes},
		}},
		"request.auth.claims": {value(element(exact("admin")), "groups"), []situation{
			{"present", list("user", "admin"), yes}, {"absent", token(map[string]any{}), no}, {"without a token", func(s *Subject) { s.Request.Metadata = match.Metadata{} }, no},
			{"without filters", func(s *Subject) { s.Request.Metadata = nil }, no}, {"empty", list(), no}, {"repeated", list("admin", "admin"), yes}, {"odd case", list("Admin"), no},
			{"not UTF-8", list("admin\xff"), no}, {"very long", list("admin" + long), no}, {"of another type", list(true, nil, 1.0, map[string]any{}), no},
			{"not a list", token(map[string]any{"groups": "admin"}), no}, {"not known yet", silent, unknown},
		}},
		"any request.auth.claims": {value(element(regex(".+")), "groups"), []situation{
			{"present", list("x"), yes}, {"absent", token(nil), no}, {"empty", list(""), no}, {"of two lines", list("a\nb"), unknown}, {"not UTF-8", list("\xff"), unknown},
			{"repeated", list("a\nb", "x"), yes}, {"very long", list(long), yes},
		}},
		"requestPrincipals": {all(value(text(exact("me")), "iss"), value(text(regex(".+")), "sub")), []situation{
			{"present", token(map[string]any{"iss": "me", "sub": "x"}), yes}, {"absent", token(map[string]any{"iss": "me"}), no}, {"empty", token(map[string]any{"iss": "me", "sub": ""}), no},
			{"of two lines", token(map[string]any{"iss": "me", "sub": "a\nb"}), unknown}, {"of another issuer", token(map[string]any{"iss": "you", "sub": "a\nb"}), no},
			{"repeated", token(map[string]any{"iss": "me", "sub": []any{"x"}}), no}, {"odd case", token(map[string]any{"iss": "Me", "sub": "x"}), no},
		}},
		"connection.sni": {serverName(suffix(".example")), []situation{
			{"present", sni("a.example"), yes}, {"absent", sni(""), no}, {"encoded", sni("a.%65xample"), no}, {"with port", sni("a.example:1"), no}, {"with a dot", sni("a.example."), no},
			{"very long", sni(long + ".example"), yes}, {"not UTF-8", sni("\xff.example"), yes}, {"before the request", func(s *Subject) { silent(s); sni("a.example")(s) }, yes},
		}},
		"connection.sni with an expression": {serverName(regex("a.*")), []situation{
			{"present", sni("a.example"), yes}, {"absent", sni(""), no}, {"not UTF-8", sni("a\xff"), unknown},
		}},
	} {
		for _, situation := range c.situations {
			s := request()
			situation.change(s)
			for _, negated := range []bool{false, true} {
				condition, want := c.condition, situation.want
				if negated {
					condition, want = not(condition), -want
				}
				compiled := compile(&condition)
				if got := compiled.met(s); got != want {
					t.Errorf("%s, %s, negated %v: %v, want %v", matcher, situation.name, negated, got, want)
				}
				for _, p := range []mesh.AccessPolicy{rule("p", condition, anything), rule("p", anything, condition)} {
					allow := Compile(&mesh.RBAC{Rules: &mesh.Rules{Action: mesh.Allow, Policies: []mesh.AccessPolicy{p}}}).Judge(s)
					deny := Compile(&mesh.RBAC{Rules: &mesh.Rules{Action: mesh.Deny, Policies: []mesh.AccessPolicy{p}}}).Judge(s)
					if allow.Denied != (want != yes) || deny.Denied != (want != no) {
						t.Errorf("%s, %s, negated %v: allowing %+v, denying %+v", matcher, situation.name, negated, allow, deny)
					}
				}
			}
		}
	}
}

// A policy looks at the client's address if it is enforced or only recorded.
func TestLooksAtClient(t *testing.T) {
	looks := &mesh.Rules{Policies: []mesh.AccessPolicy{rule("p", anything, not(in(mesh.ConditionClient, "192.0.2.0/24")))}}
	other := &mesh.Rules{Policies: []mesh.AccessPolicy{rule("p", anything, in(mesh.ConditionPeer, "192.0.2.0/24"))}}
	for _, c := range []struct {
		rbac mesh.RBAC
		want bool
	}{
		{mesh.RBAC{}, false}, {mesh.RBAC{Rules: looks}, true}, {mesh.RBAC{Shadow: looks}, true}, {mesh.RBAC{Rules: other, Shadow: looks}, true},
		{mesh.RBAC{Rules: looks, Shadow: other}, true}, {mesh.RBAC{Rules: other, Shadow: other}, false},
	} {
		if got := Compile(&c.rbac).LooksAtClient(); got != c.want {
			t.Errorf("%+v: %v", c.rbac, got)
		}
	}
}
