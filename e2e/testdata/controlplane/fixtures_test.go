package controlplane

import (
	"archive/tar"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"
	"testing"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	rbac "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/ext_authz/v3" // the fixtures have it
	httprbac "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	router "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/ext_authz/v3" // likewise
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	networkrbac "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/rbac/v3"
	tcpproxy "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	template "github.com/envoyproxy/go-control-plane/envoy/extensions/path/match/uri_template/v3"
	matcher "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/pillion-proxy/pillion/internal/authz"
	"github.com/pillion-proxy/pillion/internal/match"
	"github.com/pillion-proxy/pillion/internal/mesh"
)

// testdata/authz.tgz has the expected results of istiod's own tests of authorization policies, as JSON
// (pilot/pkg/security/authz/builder/testdata of istio eed52ebb66ad). Files that differ in the name only are left out.

// fixtures returns the files of one kind, http or tcp, by their names.
func fixtures(t testing.TB, kind string) map[string][]byte {
	t.Helper()
	file, err := os.Open("testdata/authz.tgz")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	unzipped, err := gzip.NewReader(file)
	if err != nil {
		t.Fatal(err)
	}
	found := map[string][]byte{}
	for archive := tar.NewReader(unzipped); ; {
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return found
		}
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(archive)
		if err != nil {
			t.Fatal(err)
		}
		if path.Dir(h.Name) == kind {
			found[strings.TrimSuffix(path.Base(h.Name), ".json")] = text
		}
	}
}

// parseFixture returns the filter in a file, in a message of its type.
func parseFixture[T proto.Message](t testing.TB, text []byte, filter T) T {
	t.Helper()
	if err := protojson.Unmarshal(text, filter); err != nil {
		t.Fatal(err)
	}
	return filter
}

// decodeRequests returns a policy of requests, and its findings, by way of a whole listener.
func decodeRequests(t *testing.T, f *hcm.HttpFilter) (*mesh.HTTPFilter, []mesh.Finding) {
	t.Helper()
	last := &hcm.HttpFilter{Name: "router", ConfigType: &hcm.HttpFilter_TypedConfig{TypedConfig: packed(&router.Router{})}}
	manager := &hcm.HttpConnectionManager{HttpFilters: []*hcm.HttpFilter{f, last}, RouteSpecifier: &hcm.HttpConnectionManager_RouteConfig{RouteConfig: &route.RouteConfiguration{}}}
	l, findings := decodeFilters(t, &listener.Filter{Name: "http", ConfigType: &listener.Filter_TypedConfig{TypedConfig: packed(manager)}})
	return &l.Chains[0].HTTP.Filters[0], findings
}

// decodeConnections is decodeRequests for a policy of connections.
func decodeConnections(t *testing.T, f *listener.Filter) (*mesh.NetworkFilter, []mesh.Finding) {
	t.Helper()
	l, findings := decodeFilters(t, f, &listener.Filter{Name: "tcp", ConfigType: &listener.Filter_TypedConfig{TypedConfig: packed(&tcpproxy.TcpProxy{ClusterSpecifier: &tcpproxy.TcpProxy_Cluster{Cluster: "c"}})}})
	return &l.Chains[0].Policies[0], findings
}

func decodeFilters(t *testing.T, filters ...*listener.Filter) (*mesh.Listener, []mesh.Finding) {
	t.Helper()
	b, err := proto.Marshal(&listener.Listener{Name: "l", FilterChains: []*listener.FilterChain{{Filters: filters}}})
	if err != nil {
		t.Fatal(err)
	}
	l, findings, err := mesh.DecodeListener(b)
	if err != nil {
		t.Fatal(err)
	}
	return l, findings
}

// TestFixturesAreUnderstood decodes each fixture without a finding, except those of fields that restrict nothing.
func TestFixturesAreUnderstood(t *testing.T) {
	counted := 0
	for name, text := range fixtures(t, "http") {
		counted++
		if f, findings := decodeRequests(t, parseFixture(t, text, &hcm.HttpFilter{})); len(understood(findings)) > 0 || f.RBAC == nil && f.ExtAuthz == nil {
			t.Errorf("http/%s: %+v", name, understood(findings))
		}
	}
	for name, text := range fixtures(t, "tcp") {
		counted++
		if f, findings := decodeConnections(t, parseFixture(t, text, &listener.Filter{})); len(understood(findings)) > 0 || f.RBAC == nil && f.ExtAuthz == nil {
			t.Errorf("tcp/%s: %+v", name, understood(findings))
		}
	}
	if counted < 30 {
		t.Errorf("%d fixtures", counted)
	}
}

// TestFixturesJudgeRequests compares the verdicts on random requests with a plain reading of Envoy's documentation. Parts of
// the policies are left out at random, because istiod's fullest policy has parts that exclude each other.
func TestFixturesJudgeRequests(t *testing.T) {
	seen, judged := map[string]int{}, 0
	for name, text := range fixtures(t, "http") {
		random := rand.New(rand.NewPCG(7, uint64(len(name))))
		filter := parseFixture(t, text, &hcm.HttpFilter{})
		if !filter.GetTypedConfig().MessageIs(&httprbac.RBAC{}) {
			continue
		}
		judged++
		whole := unpack(filter.GetTypedConfig().Value, &httprbac.RBAC{})
		for i := range 40 {
			policy := proto.CloneOf(whole)
			if i > 0 {
				thin(random, policy.Rules, policy.ShadowRules)
			}
			filter.ConfigType = &hcm.HttpFilter_TypedConfig{TypedConfig: packed(policy)}
			decoded, _ := decodeRequests(t, filter)
			compareVerdicts(t, name, random, authz.Compile(decoded.RBAC), policy.Rules, policy.ShadowRules, true, seen)
		}
	}
	allSeen(t, seen, "allow", "deny", "matched", "dry allow", "dry deny")
	if judged < 26 {
		t.Errorf("%d fixtures are judged", judged)
	}
}

// TestFixturesJudgeConnections is TestFixturesJudgeRequests for connections. Metadata of them is Unknown to pillion, and
// missing to Envoy, so conditions on it are replaced.
func TestFixturesJudgeConnections(t *testing.T) {
	seen, judged := map[string]int{}, 0
	for name, text := range fixtures(t, "tcp") {
		random := rand.New(rand.NewPCG(8, uint64(len(name))))
		filter := parseFixture(t, text, &listener.Filter{})
		if !filter.GetTypedConfig().MessageIs(&networkrbac.RBAC{}) {
			continue
		}
		judged++
		whole := unpack(filter.GetTypedConfig().Value, &networkrbac.RBAC{})
		for _, r := range []*rbac.RBAC{whole.Rules, whole.ShadowRules} {
			for _, p := range r.GetPolicies() {
				withoutMetadata(p.Permissions...)
			}
		}
		for i := range 40 {
			policy := proto.CloneOf(whole)
			if i > 0 {
				thin(random, policy.Rules, policy.ShadowRules)
			}
			filter.ConfigType = &listener.Filter_TypedConfig{TypedConfig: packed(policy)}
			decoded, _ := decodeConnections(t, filter)
			compareVerdicts(t, name, random, authz.Compile(decoded.RBAC), policy.Rules, policy.ShadowRules, false, seen)
		}
	}
	allSeen(t, seen, "allow", "deny", "matched", "dry deny")
	if judged < 6 {
		t.Errorf("%d fixtures are judged", judged)
	}
}

func withoutMetadata(of ...*rbac.Permission) {
	for _, p := range of {
		if p.GetMetadata() != nil {
			p.Rule = &rbac.Permission_Any{Any: true}
		}
		withoutMetadata(p.GetAndRules().GetRules()...)
		withoutMetadata(p.GetOrRules().GetRules()...)
		if p.GetNotRule() != nil {
			withoutMetadata(p.GetNotRule())
		}
	}
}

func allSeen(t *testing.T, seen map[string]int, wanted ...string) {
	t.Helper()
	for _, w := range wanted {
		if seen[w] < 20 {
			t.Errorf("%d times %q: %v", seen[w], w, seen)
		}
	}
}

// compareVerdicts judges random subjects by both.
func compareVerdicts(t *testing.T, name string, random *rand.Rand, p *authz.Policy, rules, shadow *rbac.RBAC, requests bool, seen map[string]int) {
	t.Helper()
	pool := newWords(rules, shadow)
	for range 25 {
		c := pool.client(random, requests)
		matched, denied := c.judge(rules)
		if got := p.Judge(c.subject()); got != (authz.Verdict{Denied: denied, Matched: matched}) {
			t.Fatalf("%s: %+v: %+v, want denied %v by %q\n%v", name, c, got, denied, matched, rules)
		}
		seen[map[bool]string{true: "deny", false: "allow"}[denied]]++
		if matched != "" {
			seen["matched"]++
		}
		got, ok := p.Shadow(c.subject())
		if ok != (shadow != nil) {
			t.Fatalf("%s: shadow %v", name, ok)
		}
		if matched, denied := c.judge(shadow); ok && (got.Denied != denied || got.Matched != matched) {
			t.Fatalf("%s: %+v: dry run %+v, want denied %v by %q", name, c, got, denied, matched)
		} else if ok {
			seen["dry "+map[bool]string{true: "deny", false: "allow"}[denied]]++
		}
	}
}

// thin leaves out parts of rules.
func thin(random *rand.Rand, rules ...*rbac.RBAC) {
	for _, r := range rules {
		for _, name := range slices.Sorted(keys(r.GetPolicies())) {
			p := r.Policies[name]
			for _, c := range p.Permissions {
				thinPermission(random, c)
			}
			for _, c := range p.Principals {
				thinPrincipal(random, c)
			}
		}
	}
}

func keys[V any](m map[string]V) func(func(string) bool) {
	return func(yield func(string) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}

// fewer returns some elements of a list, at least one.
func fewer[T any](random *rand.Rand, list []T) []T {
	kept := slices.DeleteFunc(slices.Clone(list), func(T) bool { return random.IntN(8) > 0 })
	if len(kept) == 0 {
		return []T{list[random.IntN(len(list))]}
	}
	return kept
}

func thinPermission(random *rand.Rand, p *rbac.Permission) {
	if set := p.GetAndRules(); set != nil {
		set.Rules = fewer(random, set.Rules)
	}
	for _, c := range slices.Concat(p.GetAndRules().GetRules(), p.GetOrRules().GetRules(), []*rbac.Permission{p.GetNotRule()}) {
		if c != nil {
			thinPermission(random, c)
		}
	}
}

func thinPrincipal(random *rand.Rand, p *rbac.Principal) {
	if set := p.GetAndIds(); set != nil && len(set.Ids) > 2 {
		set.Ids = fewer(random, set.Ids)
	}
	for _, c := range slices.Concat(p.GetAndIds().GetIds(), p.GetOrIds().GetIds(), []*rbac.Principal{p.GetNotId()}) {
		if c != nil {
			thinPrincipal(random, c)
		}
	}
}

// words has the texts that occur in a policy, from which subjects are made.
type words struct {
	names, paths, hosts, sni, values []string
	addresses                        []netip.Addr
	ports                            []uint16
}

func newWords(rules ...*rbac.RBAC) *words {
	w := &words{
		names: []string{"spiffe://cluster.local/ns/default/sa/other"}, paths: []string{"/", "/other"}, hosts: []string{"other.com"}, sni: []string{""},
		values: []string{"GET", "other"}, addresses: []netip.Addr{netip.MustParseAddr("203.0.113.9")}, ports: []uint16{80, 8080},
	}
	for _, r := range rules {
		for _, name := range slices.Sorted(keys(r.GetPolicies())) {
			for _, c := range r.Policies[name].Permissions {
				w.permission(c)
			}
			for _, c := range r.Policies[name].Principals {
				w.principal(c)
			}
		}
	}
	return w
}

// example returns a text that a matcher accepts, if that is simple.
func example(m *matcher.StringMatcher) string {
	switch p := m.GetMatchPattern().(type) {
	case *matcher.StringMatcher_Exact:
		return p.Exact
	case *matcher.StringMatcher_Prefix:
		return p.Prefix + "1"
	case *matcher.StringMatcher_Suffix:
		return "1" + p.Suffix
	case *matcher.StringMatcher_SafeRegex:
		return strings.NewReplacer(".+", "1", ".*", "x", "[^/]*", "2", "(", "", "/|)", "/", ")?", "", "|", "", `\`, "").Replace(p.SafeRegex.Regex)
	}
	return "x"
}

func (w *words) permission(p *rbac.Permission) {
	switch rule := p.Rule.(type) {
	case *rbac.Permission_Header:
		if w.values = append(w.values, example(rule.Header.GetStringMatch())); rule.Header.Name == ":authority" {
			w.hosts = append(w.hosts, example(rule.Header.GetStringMatch()), strings.ToUpper(example(rule.Header.GetStringMatch())), example(rule.Header.GetStringMatch())+":80")
		}
	case *rbac.Permission_UrlPath:
		w.paths = append(w.paths, example(rule.UrlPath.GetPath()), example(rule.UrlPath.GetPath())+"?query")
	case *rbac.Permission_UriTemplate:
		text := unpack(rule.UriTemplate.TypedConfig.Value, &template.UriTemplateMatchConfig{}).PathTemplate
		w.paths = append(w.paths, strings.ReplaceAll(strings.ReplaceAll(text, "**", "a/b"), "*", "c"))
	case *rbac.Permission_DestinationIp:
		w.addresses = append(w.addresses, readRange(rule.DestinationIp).Addr())
	case *rbac.Permission_DestinationPort:
		w.ports = append(w.ports, uint16(rule.DestinationPort))
	case *rbac.Permission_RequestedServerName:
		w.sni = append(w.sni, example(rule.RequestedServerName))
	case *rbac.Permission_Metadata:
		w.value(rule.Metadata.Value)
	}
	for _, c := range slices.Concat(p.GetAndRules().GetRules(), p.GetOrRules().GetRules(), []*rbac.Permission{p.GetNotRule()}) {
		if c != nil {
			w.permission(c)
		}
	}
}

func (w *words) principal(p *rbac.Principal) {
	switch id := p.Identifier.(type) {
	case *rbac.Principal_Authenticated_:
		w.names = append(w.names, example(id.Authenticated.PrincipalName))
	case *rbac.Principal_DirectRemoteIp:
		w.addresses = append(w.addresses, readRange(id.DirectRemoteIp).Addr())
	case *rbac.Principal_RemoteIp:
		w.addresses = append(w.addresses, readRange(id.RemoteIp).Addr())
	case *rbac.Principal_Header:
		w.values = append(w.values, example(id.Header.GetStringMatch()))
	case *rbac.Principal_Metadata:
		w.value(id.Metadata.Value)
	}
	for _, c := range slices.Concat(p.GetAndIds().GetIds(), p.GetOrIds().GetIds(), []*rbac.Principal{p.GetNotId()}) {
		if c != nil {
			w.principal(c)
		}
	}
}

func (w *words) value(v *matcher.ValueMatcher) {
	for _, v := range append(slices.Clone(v.GetOrMatch().GetValueMatchers()), v, v.GetListMatch().GetOneOf()) {
		if v.GetStringMatch() != nil {
			w.values = append(w.values, example(v.GetStringMatch()))
		}
	}
}

// client is a connection, or a request.
type client struct {
	names                   []string // nil: without TLS
	peer, from, destination netip.Addr
	port                    uint16
	sni                     string

	requests             bool
	method, host, target string
	header               [][2]string
	claims               map[string]any
}

func one[T any](random *rand.Rand, list []T) T { return list[random.IntN(len(list))] }

// client returns a random one. Its claims have texts and lists.
func (w *words) client(random *rand.Rand, requests bool) client {
	c := client{
		peer: one(random, w.addresses), from: one(random, w.addresses), destination: one(random, w.addresses),
		port: one(random, w.ports), sni: one(random, w.sni), requests: requests,
	}
	if random.IntN(4) > 0 {
		c.names = []string{one(random, w.names), "dns.example"}
	}
	if !requests {
		return c
	}
	c.method, c.host, c.target = one(random, w.values), one(random, w.hosts), one(random, w.paths)
	for range random.IntN(3) {
		c.header = append(c.header, [2]string{one(random, []string{"x-header", "X-Header", "X-HEADER"}), one(random, w.values)})
	}
	if random.IntN(4) > 0 {
		text := func() any { return one(random, w.values) }
		c.claims = map[string]any{"payload": map[string]any{
			"iss": text(), "sub": one(random, []any{"", "sub", text()}), "aud": []any{text(), text()}, "azp": text(),
			"nested1": map[string]any{"nested2": one(random, []any{text(), []any{text()}})},
		}}
	}
	return c
}

// Len implements authz.Fields.
func (c client) Len() int { return len(c.header) }

// At implements authz.Fields.
func (c client) At(i int) (name, value []byte) { return []byte(c.header[i][0]), []byte(c.header[i][1]) }

// Match implements authz.Metadata.
func (c client) Match(m *mesh.MetadataMatcher) match.Value {
	if m.Filter != "envoy.filters.http.jwt_authn" {
		return match.Metadata(nil).Match(m)
	}
	return match.Metadata(c.claims).Match(m)
}

func (c client) subject() *authz.Subject {
	s := &authz.Subject{Destination: netip.AddrPortFrom(c.destination, c.port), Peer: c.peer, Client: c.from, ServerName: c.sni, Secured: c.names != nil, Names: c.names}
	if c.requests {
		s.Request = &authz.Request{Method: []byte(c.method), Authority: []byte(c.host), Scheme: []byte("http"), Path: []byte(c.target), Fields: c, Metadata: c}
	}
	return s
}

// judge returns what Envoy decides.
func (c client) judge(r *rbac.RBAC) (matched string, denied bool) {
	if r == nil {
		return "", false
	}
	for _, name := range slices.Sorted(keys(r.Policies)) {
		p := r.Policies[name]
		if slices.ContainsFunc(p.Permissions, c.permitted) && slices.ContainsFunc(p.Principals, c.identified) {
			return name, r.Action == rbac.RBAC_DENY
		}
	}
	return "", r.Action == rbac.RBAC_ALLOW
}

func every[T any](list []T, holds func(T) bool) bool {
	return !slices.ContainsFunc(list, func(e T) bool { return !holds(e) })
}

func (c client) permitted(p *rbac.Permission) bool {
	switch rule := p.Rule.(type) {
	case *rbac.Permission_AndRules:
		return every(rule.AndRules.Rules, c.permitted)
	case *rbac.Permission_OrRules:
		return slices.ContainsFunc(rule.OrRules.Rules, c.permitted)
	case *rbac.Permission_NotRule:
		return !c.permitted(rule.NotRule)
	case *rbac.Permission_Any:
		return true
	case *rbac.Permission_Header:
		return c.hasHeader(rule.Header)
	case *rbac.Permission_UrlPath:
		return accepts(rule.UrlPath.GetPath(), c.path())
	case *rbac.Permission_UriTemplate:
		text := unpack(rule.UriTemplate.TypedConfig.Value, &template.UriTemplateMatchConfig{}).PathTemplate
		return regexp.MustCompile("^" + strings.NewReplacer("**", ".*", "*", "[^/]+").Replace(text) + "$").MatchString(c.path())
	case *rbac.Permission_DestinationIp:
		return within(rule.DestinationIp, c.destination)
	case *rbac.Permission_DestinationPort:
		return uint16(rule.DestinationPort) == c.port
	case *rbac.Permission_RequestedServerName:
		return accepts(rule.RequestedServerName, c.sni)
	case *rbac.Permission_Metadata:
		return c.claimed(rule.Metadata)
	}
	panic(fmt.Sprint("a permission that is not expected: ", p))
}

func (c client) identified(p *rbac.Principal) bool {
	switch id := p.Identifier.(type) {
	case *rbac.Principal_AndIds:
		return every(id.AndIds.Ids, c.identified)
	case *rbac.Principal_OrIds:
		return slices.ContainsFunc(id.OrIds.Ids, c.identified)
	case *rbac.Principal_NotId:
		return !c.identified(id.NotId)
	case *rbac.Principal_Any:
		return true
	case *rbac.Principal_Authenticated_:
		return c.names != nil && slices.ContainsFunc(c.names, func(n string) bool { return accepts(id.Authenticated.PrincipalName, n) })
	case *rbac.Principal_DirectRemoteIp:
		return within(id.DirectRemoteIp, c.peer)
	case *rbac.Principal_RemoteIp:
		return within(id.RemoteIp, c.from)
	case *rbac.Principal_Header:
		return c.hasHeader(id.Header)
	case *rbac.Principal_Metadata:
		return c.claimed(id.Metadata)
	}
	panic(fmt.Sprint("a principal that is not expected: ", p))
}

func within(r *core.CidrRange, a netip.Addr) bool {
	return netip.PrefixFrom(netip.MustParseAddr(r.AddressPrefix), int(r.PrefixLen.GetValue())).Masked().Contains(a)
}

func (c client) path() string {
	before, _, _ := strings.Cut(c.target, "?")
	return before
}

func (c client) hasHeader(m *route.HeaderMatcher) bool {
	var values []string
	switch m.Name {
	case ":method":
		values = []string{c.method}
	case ":authority":
		values = []string{c.host}
	default:
		for _, f := range c.header {
			if strings.EqualFold(f[0], m.Name) {
				values = append(values, f[1])
			}
		}
	}
	if p, ok := m.HeaderMatchSpecifier.(*route.HeaderMatcher_PresentMatch); ok {
		return (len(values) > 0) == p.PresentMatch
	}
	pattern := m.GetStringMatch()
	if old, ok := m.HeaderMatchSpecifier.(*route.HeaderMatcher_SafeRegexMatch); ok {
		pattern = &matcher.StringMatcher{MatchPattern: &matcher.StringMatcher_SafeRegex{SafeRegex: old.SafeRegexMatch}}
	}
	return len(values) > 0 && accepts(pattern, strings.Join(values, ","))
}

func accepts(m *matcher.StringMatcher, text string) bool {
	fold := func(s string) string {
		if m.IgnoreCase {
			return strings.ToLower(s)
		}
		return s
	}
	switch p := m.MatchPattern.(type) {
	case *matcher.StringMatcher_Exact:
		return fold(text) == fold(p.Exact)
	case *matcher.StringMatcher_Prefix:
		return strings.HasPrefix(fold(text), fold(p.Prefix))
	case *matcher.StringMatcher_Suffix:
		return strings.HasSuffix(fold(text), fold(p.Suffix))
	case *matcher.StringMatcher_Contains:
		return strings.Contains(fold(text), fold(p.Contains))
	case *matcher.StringMatcher_SafeRegex:
		return regexp.MustCompile("^(" + p.SafeRegex.Regex + ")$").MatchString(text)
	}
	panic(fmt.Sprint("a matcher that is not expected: ", m))
}

func (c client) claimed(m *matcher.MetadataMatcher) bool {
	var value any = c.claims
	if m.Filter != "envoy.filters.http.jwt_authn" {
		return m.Invert
	}
	for _, segment := range m.Path {
		object, _ := value.(map[string]any)
		value = object[segment.GetKey()]
	}
	return hasValue(m.Value, value) != m.Invert
}

func hasValue(m *matcher.ValueMatcher, value any) bool {
	switch p := m.MatchPattern.(type) {
	case *matcher.ValueMatcher_StringMatch:
		text, ok := value.(string)
		return ok && accepts(p.StringMatch, text)
	case *matcher.ValueMatcher_ListMatch:
		list, _ := value.([]any)
		return slices.ContainsFunc(list, func(e any) bool { return hasValue(p.ListMatch.GetOneOf(), e) })
	case *matcher.ValueMatcher_OrMatch:
		return slices.ContainsFunc(p.OrMatch.ValueMatchers, func(m *matcher.ValueMatcher) bool { return hasValue(m, value) })
	}
	panic(fmt.Sprint("a matcher that is not expected: ", m))
}

// TestUnknownFieldsNeverAllowMore puts fields that are not known into random places of istiod's policies, of fixtures and of
// recorded pushes. What a policy denied stays denied.
func TestUnknownFieldsNeverAllowMore(t *testing.T) {
	random := rand.New(rand.NewPCG(9, 1))
	denied, refused := 0, 0
	check := func(name string, before *httprbac.RBAC, changed []byte) {
		c := newWords(before.Rules).client(random, true)
		if _, was := c.judge(before.Rules); !was {
			return
		}
		denied++
		f := &hcm.HttpFilter{Name: "rbac", ConfigType: &hcm.HttpFilter_TypedConfig{TypedConfig: packed(before)}}
		f.GetTypedConfig().Value = changed
		decoded, _ := decodeRequests(t, f)
		if decoded.Refused {
			refused++
		}
		if decoded.RBAC == nil || !authz.Compile(decoded.RBAC).Judge(c.subject()).Denied && !decoded.Refused {
			t.Errorf("%s: %+v is allowed by %x, and was denied by %v", name, c, changed, before)
		}
	}
	for name, policy := range recordedPolicies(t) {
		for range 60 {
			changed := proto.CloneOf(policy)
			places := messagesOf(changed.ProtoReflect(), nil)
			place := places[random.IntN(len(places))]
			place.SetUnknown(append(place.GetUnknown(), 0xf8, 0x3f, byte(random.IntN(128)))) // field 1023
			b, err := proto.Marshal(changed)
			if err != nil {
				t.Fatal(err)
			}
			check(name, policy, b)
		}
	}
	if denied < 500 || refused < 100 {
		t.Errorf("%d were denied, of which %d are refused", denied, refused)
	}
}

// messagesOf returns m and the messages in it.
func messagesOf(m protoreflect.Message, to []protoreflect.Message) []protoreflect.Message {
	to = append(to, m)
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case f.IsMap() && f.MapValue().Message() != nil:
			v.Map().Range(func(_ protoreflect.MapKey, v protoreflect.Value) bool {
				to = messagesOf(v.Message(), to)
				return true
			})
		case f.IsList() && f.Message() != nil:
			for i := range v.List().Len() {
				to = messagesOf(v.List().Get(i).Message(), to)
			}
		case !f.IsList() && !f.IsMap() && f.Message() != nil:
			to = messagesOf(v.Message(), to)
		}
		return true
	})
	return to
}

// recordedPolicies returns the policies of requests in the fixtures and in the recorded pushes.
func recordedPolicies(t *testing.T) map[string]*httprbac.RBAC {
	found := map[string]*httprbac.RBAC{}
	for name, text := range fixtures(t, "http") {
		if f := parseFixture(t, text, &hcm.HttpFilter{}); f.GetTypedConfig().MessageIs(&httprbac.RBAC{}) {
			found[name] = unpack(f.GetTypedConfig().Value, &httprbac.RBAC{})
		}
	}
	each(t, "lds.json", func(t *testing.T, place string, b []byte) {
		for _, chain := range unpack(b, &listener.Listener{}).FilterChains {
			for _, filter := range chain.Filters {
				if !filter.GetTypedConfig().MessageIs(&hcm.HttpConnectionManager{}) {
					continue
				}
				for _, f := range unpack(filter.GetTypedConfig().Value, &hcm.HttpConnectionManager{}).HttpFilters {
					if f.GetTypedConfig().MessageIs(&httprbac.RBAC{}) {
						policy := unpack(f.GetTypedConfig().Value, &httprbac.RBAC{})
						found[fmt.Sprint(place, " ", policy.Rules.GetAction(), len(policy.Rules.GetPolicies()))] = policy
					}
				}
			}
		}
	})
	if len(found) < 25 {
		t.Errorf("%d policies", len(found))
	}
	return found
}
