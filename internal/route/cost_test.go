//go:build !race

package route

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

// large returns a table of 10,000 virtual hosts with ten domains each, of which one has 1,000 routes.
func large() *mesh.Routes {
	r := &mesh.Routes{IgnorePort: true}
	for i := range 10_000 {
		h := mesh.VirtualHost{Routes: []mesh.Route{to("c")}}
		for _, form := range []string{"s%d.default.svc.cluster.local", "s%d.default.svc.cluster.local.", "s%d", "s%d.default", "s%d.default.svc", "*.s%d.example", "a%d.*", "b%d", "c%d", "d%d"} {
			h.Domains = append(h.Domains, domain(fmt.Sprintf(form, i)))
		}
		r.Hosts = append(r.Hosts, h)
	}
	var routes []mesh.Route
	for i := range 1000 {
		route := to(fmt.Sprint(i))
		route.Match.Path = fmt.Sprintf("/service/%03d/items", i)
		route.Match.Kind = []mesh.PathMatchKind{mesh.PathExact, mesh.PathPrefix, mesh.PathSeparatedPrefix}[i%3]
		routes = append(routes, route)
	}
	r.Hosts[5000].Routes = routes
	return r
}

// searches are requests to the table of large, and the clusters that they go to.
var searches = []struct {
	name    string
	request *Request
	want    string
}{
	{"Exact", request("GET http://s5000.default.svc.cluster.local:80/service/999/items"), "999"},
	{"Prefix", request("GET http://S5000.default/service/997/items/17?q=1"), "997"},
	{"Suffix", request("GET http://x.s5000.example/service/001/items", "end-user", "jason", "x-canary", "v1"), "1"},
	{"None", request("GET http://s5000/other"), "no route"},
}

func TestSearchesDoNotAllocate(t *testing.T) {
	table := Of(large())
	for _, search := range searches {
		r := *search.request
		r.Fields = &rawFields{r.Fields.(fieldList)}
		if got := result(table.Find(&r)); got != search.want {
			t.Errorf("%s: %s, want %s", search.name, got, search.want)
		}
		allocs := testing.AllocsPerRun(100, func() {
			if c := table.Find(&r); c.Cluster != nil {
				_ = c.Outcome(&r, false)
			}
		})
		if allocs != 0 {
			t.Errorf("%s: %v allocations", search.name, allocs)
		}
	}
}

// The regular expression of a redirect is compiled once. To compile it costs more allocations than there are alternatives in it.
func TestARedirectDoesNotCompile(t *testing.T) {
	const alternatives = 100
	pattern := strings.Builder{}
	for i := range alternatives {
		fmt.Fprintf(&pattern, "(/%c%d+)|", 'a'+i%26, i)
	}
	redirect := mesh.Redirect{Code: 301, Host: "b", Regex: &mesh.RegexRewrite{Pattern: pattern.String() + "^/x", Substitution: "/y"}}
	table := Of(everything(mesh.VirtualHost{Routes: []mesh.Route{{Match: mesh.RouteMatch{Path: "/"}, Redirect: &redirect}}}))
	r := request("GET http://a/x?q")
	n := testing.AllocsPerRun(100, func() {
		c := table.Find(r)
		if o := c.Outcome(r, false); o.Reply.Fields[0].Value != "http://b/y?q" {
			t.Fatalf("redirected to %+v", o.Reply)
		}
	})
	if t.Logf("%v allocations", n); n >= alternatives {
		t.Errorf("%v allocations", n)
	}
}

// All changes that a route can make cost no allocation, except rewrites by regular expressions. Replies may allocate.
func TestPlansDoNotAllocate(t *testing.T) {
	ttl := time.Hour
	route := to("c")
	route.Edits.Request = add("x", "%REQ(end-user)% %PROTOCOL% %REQ(:path)%", mesh.OverwriteOrAdd)
	route.Forward.PrefixRewrite, route.Forward.HostRewrite, route.Forward.ForwardedHost = "/new", "host", true
	route.Forward.MaxGRPCTimeout = new(time.Duration(0))
	route.Forward.Hash = []mesh.HashPolicy{{Kind: mesh.HashHeader, Name: "end-user"}, {Kind: mesh.HashCookie, Name: "c", TTL: &ttl}, {Kind: mesh.HashSourceIP}, {Kind: mesh.HashQuery, Name: "q"}}
	route.Filters.Fault = &mesh.Fault{Abort: &mesh.Abort{Status: 503}, AbortFraction: mesh.Fraction{Denominator: 100}, Headers: []mesh.HeaderMatcher{{Name: "end-user", Present: true}}}
	route.Filters.CORS = &mesh.CORS{Enabled: mesh.Fraction{Numerator: 100, Denominator: 100}, Origins: []mesh.StringMatcher{{Text: "x"}}}
	route.Match.Headers = []mesh.HeaderMatcher{{Name: "end-user", Kind: mesh.HeaderText, Text: mesh.StringMatcher{Kind: mesh.MatchRegex, Text: "j.*"}}, {Name: ":method", Kind: mesh.HeaderText, Text: mesh.StringMatcher{Text: "GET"}}}
	route.Match.Query = []mesh.QueryMatcher{{Name: "q", Present: true}}
	table := Of(everything(mesh.VirtualHost{Routes: []mesh.Route{route}}))
	r := *request("GET http://a/x?q=1")
	r.Fields, r.GRPC = &rawFields{fieldList{"end-user", "jason", "x-canary", "v1"}}, true
	var with Context = &context{request: &r, missing: true}
	buffer := make([]byte, 0, 4096)
	allocs := testing.AllocsPerRun(100, func() {
		c := table.Find(&r)
		o := c.Outcome(&r, true)
		if o.Reply != nil {
			t.Fatal("a reply")
		}
		b := o.Plan.AppendHost(o.Plan.AppendPath(buffer, r.Path), r.Authority)
		for _, edits := range [...][]Edit{o.Plan.RequestEdits, o.Plan.ResponseEdits} {
			for i := range edits {
				b = edits[i].AppendValue(b, with)
			}
		}
		c.Cluster.Hash(&r)
		o.Plan.Timeouts(&r)
	})
	if allocs != 0 {
		t.Errorf("%v allocations", allocs)
	}
}

// rawFields are fields that are read without allocation.
type rawFields struct{ list fieldList }

func (f *rawFields) Len() int { return f.list.Len() }

func (f *rawFields) At(i int) (name, value []byte) { return raw[f.list[2*i]], raw[f.list[2*i+1]] }

var raw = func() map[string][]byte {
	m := map[string][]byte{}
	for _, search := range searches {
		for _, text := range search.request.Fields.(fieldList) {
			m[text] = []byte(text)
		}
	}
	return m
}()

// Routes that differ in their headers only are compared one by one.
func BenchmarkThousandHeaders(b *testing.B) {
	var routes []mesh.Route
	for i := range 1000 {
		r := to(fmt.Sprint(i))
		r.Match.Headers = []mesh.HeaderMatcher{{Name: "end-user", Kind: mesh.HeaderText, Text: mesh.StringMatcher{Text: fmt.Sprint("user", i)}}}
		routes = append(routes, r)
	}
	t := Of(everything(mesh.VirtualHost{Routes: routes}))
	r := *request("GET http://a/x")
	r.Fields = &rawFields{fieldList{"x-canary", "v1", "end-user", "jason"}}
	b.ReportAllocs()
	for b.Loop() {
		t.Find(&r)
	}
}

func BenchmarkFind(b *testing.B) {
	table := Of(large())
	for _, search := range searches {
		b.Run(search.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				table.Find(search.request)
			}
		})
	}
}
