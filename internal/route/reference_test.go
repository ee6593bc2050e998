package route

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

// The functions below find the route of a request as the facts about Envoy have it: slowly, in the plainest way, and with
// nothing in common with Table.

// referenceFind returns the first cluster of a request's route, "refused" or "no route". Of a route that answers it returns
// an empty name.
func referenceFind(routes *mesh.Routes, r *Request) string {
	if routes.Refused {
		return "refused"
	}
	name := referenceLower(string(r.Authority))
	if routes.IgnorePort {
		name = regexp.MustCompile(`:[^:\]]*$`).ReplaceAllString(name, "")
	}
	host := referenceHost(routes, name)
	switch {
	case host == nil:
		return "no route"
	case host.Refused:
		return "refused"
	}
	for _, route := range host.Routes {
		if !referenceMatch(routes, &route, r) {
			continue
		}
		if route.Refused {
			return "refused"
		}
		if route.Forward == nil {
			return ""
		}
		return route.Forward.Clusters[0].Name
	}
	return "no route"
}

// referenceLower returns text with ASCII in lower case.
func referenceLower(text string) string {
	return strings.Map(func(r rune) rune {
		if r < utf8.RuneSelf {
			return unicode.ToLower(r)
		}
		return r
	}, text)
}

func referenceHost(routes *mesh.Routes, name string) *mesh.VirtualHost {
	type candidate struct {
		kind   mesh.DomainKind
		length int
		host   *mesh.VirtualHost
	}
	var found []candidate
	for i := range routes.Hosts {
		for _, d := range routes.Hosts[i].Domains {
			fits := d.Kind == mesh.DomainAny ||
				d.Kind == mesh.DomainExact && name == d.Text ||
				d.Kind == mesh.DomainSuffix && strings.HasSuffix(name, d.Text) && name != d.Text ||
				d.Kind == mesh.DomainPrefix && strings.HasPrefix(name, d.Text) && name != d.Text
			if fits {
				found = append(found, candidate{d.Kind, len(d.Text), &routes.Hosts[i]})
			}
		}
	}
	if len(found) == 0 {
		return nil
	}
	return slices.MinFunc(found, func(a, b candidate) int {
		return cmp.Or(cmp.Compare(a.kind, b.kind), cmp.Compare(b.length, a.length))
	}).host
}

func referenceMatch(routes *mesh.Routes, route *mesh.Route, r *Request) bool {
	path := string(r.Path)
	path, _, _ = strings.Cut(path, "#")
	path, query, _ := strings.Cut(path, "?")
	if _, q, found := strings.Cut(string(r.Path), "?"); found {
		query = q
	}
	if routes.IgnorePathParameters {
		path, _, _ = strings.Cut(path, ";")
	}
	m := &route.Match
	want := m.Path
	if m.IgnoreCase && m.Kind != mesh.PathRegex {
		path, want = referenceLower(path), referenceLower(want)
	}
	if path == "" {
		return false
	}
	var fits bool
	switch m.Kind {
	case mesh.PathExact:
		fits = path == want
	case mesh.PathPrefix:
		fits = strings.HasPrefix(path, want)
	case mesh.PathSeparatedPrefix:
		fits = path == want || strings.HasPrefix(path, want+"/")
	case mesh.PathRegex:
		fits = m.Refused || wholly(want, path)
	}
	if !fits || m.Refused {
		return fits
	}
	for i := range m.Headers {
		if !referenceHeader(&m.Headers[i], r) {
			return false
		}
	}
	for i := range m.Query {
		if !referenceQuery(&m.Query[i], query) {
			return false
		}
	}
	return true
}

func wholly(expression, text string) bool {
	return regexp.MustCompile(`^(?:` + expression + `)$`).MatchString(text)
}

func referenceHeader(m *mesh.HeaderMatcher, r *Request) bool {
	var values []string
	switch referenceLower(m.Name) {
	case ":method":
		values = []string{string(r.Method)}
	case ":path":
		values = []string{string(r.Path)}
	case ":authority", "host":
		values = []string{string(r.Authority)}
	}
	fields := r.Fields.(fieldList)
	for i := 0; i < len(fields); i += 2 {
		if referenceLower(fields[i]) == referenceLower(m.Name) {
			values = append(values, fields[i+1])
		}
	}
	if m.Kind == mesh.HeaderPresence {
		fits := len(values) > 0
		if !m.Present {
			fits = !fits
		}
		return fits != m.Invert
	}
	if len(values) == 0 && !m.MissingIsEmpty {
		return false
	}
	value := strings.Join(values, ",")
	if m.Kind == mesh.HeaderRange {
		number, err := strconv.ParseInt(value, 10, 64)
		return (err == nil && number >= m.Start && number < m.End) != m.Invert
	}
	return referenceText(&m.Text, value) != m.Invert
}

func referenceText(m *mesh.StringMatcher, value string) bool {
	want := m.Text
	if m.IgnoreCase && m.Kind != mesh.MatchRegex {
		value, want = referenceLower(value), referenceLower(want)
	}
	return [...]bool{
		mesh.MatchExact: value == want, mesh.MatchPrefix: strings.HasPrefix(value, want), mesh.MatchSuffix: strings.HasSuffix(value, want),
		mesh.MatchContains: strings.Contains(value, want), mesh.MatchRegex: m.Kind == mesh.MatchRegex && wholly(want, value),
	}[m.Kind]
}

func referenceQuery(m *mesh.QueryMatcher, query string) bool {
	for _, pair := range strings.Split(query, "&") {
		name, value, _ := strings.Cut(pair, "=")
		if name != m.Name {
			continue
		}
		if m.Text == nil {
			return m.Present
		}
		return referenceText(m.Text, value)
	}
	return m.Text == nil && !m.Present
}

// chooser draws random routes and requests. Their parts come from few words, so that requests often match.
type chooser struct{ *rand.Rand }

func one[T any](c chooser, of ...T) T { return of[c.IntN(len(of))] }

func (c chooser) often() bool { return c.IntN(3) > 0 }

func (c chooser) rarely() bool { return c.IntN(12) == 0 }

func (c chooser) word() string { return one(c, "a", "b", "A", "ab", "v1", "12", "") }

func (c chooser) path() string {
	path := ""
	for range c.IntN(4) {
		path += "/" + one(c, "a", "b", "A", "ab", "v1", "")
	}
	return cmp.Or(path, "/")
}

func (c chooser) expression() string {
	return one(c, "a.*", "/a(/b)?", "/.*", "a|ab", "[a-b]+", "(?i)/A.*", "v[0-9]+", ".*")
}

func (c chooser) text() mesh.StringMatcher {
	m := mesh.StringMatcher{Kind: one(c, mesh.MatchExact, mesh.MatchPrefix, mesh.MatchSuffix, mesh.MatchContains, mesh.MatchRegex), IgnoreCase: c.rarely()}
	m.Text = c.word()
	if m.Kind == mesh.MatchRegex {
		m.Text = c.expression()
	}
	return m
}

func (c chooser) header() mesh.HeaderMatcher {
	h := mesh.HeaderMatcher{Name: one(c, "x", "Y", ":method", ":path", "host", ":authority"), Invert: c.rarely(), MissingIsEmpty: c.rarely()}
	switch c.IntN(3) {
	case 0:
		h.Present = c.often()
	case 1:
		h.Kind, h.Text = mesh.HeaderText, c.text()
	default:
		h.Kind, h.Start, h.End = mesh.HeaderRange, int64(c.IntN(5)), int64(c.IntN(20))
	}
	return h
}

func (c chooser) route(cluster string) mesh.Route {
	r := to(cluster)
	r.Refused = c.rarely()
	m := mesh.RouteMatch{Kind: one(c, mesh.PathPrefix, mesh.PathExact, mesh.PathRegex, mesh.PathSeparatedPrefix), Path: c.path(), IgnoreCase: c.rarely()}
	m.Refused = r.Refused && c.rarely()
	if m.Kind == mesh.PathRegex {
		m.Path = c.expression()
	}
	for !c.often() {
		m.Headers = append(m.Headers, c.header())
	}
	for c.rarely() {
		q := mesh.QueryMatcher{Name: one(c, "q", "p"), Present: c.often()}
		if c.often() {
			q.Text, q.Present = new(c.text()), false
		}
		m.Query = append(m.Query, q)
	}
	r.Match = m
	return r
}

func (c chooser) routes() *mesh.Routes {
	routes := &mesh.Routes{IgnorePort: c.often(), IgnorePathParameters: c.rarely()}
	if c.rarely() {
		routes.Refused = c.rarely()
	}
	taken := map[mesh.Domain]bool{}
	for i := range 1 + c.IntN(5) {
		h := mesh.VirtualHost{Refused: c.rarely()}
		for range 1 + c.IntN(4) {
			d := domain(one(c, "*", "a", "*.a", "*b.a", "a.*", "a.b", "b.a.*", "*a", "b.a", "[::1]", "a:80", "c.*"))
			if !taken[d] {
				taken[d] = true
				h.Domains = append(h.Domains, d)
			}
		}
		for j := range c.IntN(40) {
			h.Routes = append(h.Routes, c.route(fmt.Sprintf("%d-%d", i, j)))
		}
		routes.Hosts = append(routes.Hosts, h)
	}
	return routes
}

func (c chooser) request() *Request {
	r := request(one(c, "GET", "POST") + " " + c.path())
	r.Authority = []byte(one(c, "a", "A", "b.a", "x.a", "xb.a", "a.b", "b.a.c", "a.x", "[::1]", "[::1]:80", "a:80", "a:90", "c", "c.d:1"))
	for !c.often() {
		r.Path = append(r.Path, one(c, "?q=a", "?p", "?q=12&q=b&p=ab", "#f", "?q=v1#f", ";a=b", "&p=a")...)
	}
	var fields fieldList
	for range c.IntN(4) {
		fields = append(fields, one(c, "x", "X", "y", "z"), c.word())
	}
	r.Fields = fields
	return r
}

// A header and a parameter are two conditions.
func TestAllConditionsHaveToBeMet(t *testing.T) {
	r := to("c")
	r.Match.Headers = []mesh.HeaderMatcher{{Name: "x", Present: true}}
	r.Match.Query = []mesh.QueryMatcher{{Name: "q", Present: true}}
	for target, fields := range map[string][]string{"/": nil, "/?q": nil, "/?p": {"x", ""}} {
		if got := result(find(r, request("GET "+target, fields...))); got != "no route" {
			t.Errorf("%s with %q: %s", target, fields, got)
		}
	}
	if got := result(find(r, request("GET /?q", "x", ""))); got != "c" {
		t.Errorf("%s", got)
	}
}

// Routes are found as the reference finds them.
func TestRoutesAreThoseOfTheReference(t *testing.T) {
	seed := rand.Uint64()
	c := chooser{rand.New(rand.NewPCG(seed, 0))}
	counts := map[string]int{}
	for range 2000 {
		routes := c.routes()
		for range 20 {
			r := c.request()
			got, want := result(Of(routes).Find(r)), referenceFind(routes, r)
			if got != want {
				t.Fatalf("seed %d: %s %s of %s with %q goes to %s, want %s", seed, r.Method, r.Path, r.Authority, r.Fields, got, want)
			}
			if want != "refused" && want != "no route" {
				want = "cluster"
			}
			counts[want]++
		}
	}
	for _, kind := range []string{"refused", "no route", "cluster"} {
		if counts[kind] < 1000 {
			t.Errorf("of %v requests, few are of the kind %q", counts, kind)
		}
	}
}
