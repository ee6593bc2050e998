package route

import (
	"fmt"
	"sync"
	"testing"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

// domain parses a domain as mesh does.
func domain(text string) mesh.Domain {
	switch {
	case text == "*":
		return mesh.Domain{Kind: mesh.DomainAny}
	case text[0] == '*':
		return mesh.Domain{Kind: mesh.DomainSuffix, Text: text[1:]}
	case text[len(text)-1] == '*':
		return mesh.Domain{Kind: mesh.DomainPrefix, Text: text[:len(text)-1]}
	}
	return mesh.Domain{Text: text}
}

// to is a route of all requests to a cluster.
func to(cluster string) mesh.Route {
	return mesh.Route{Forward: &mesh.Forward{Clusters: []mesh.WeightedCluster{{Name: cluster, Weight: 1}}, NotFoundCode: 503}, Match: mesh.RouteMatch{Path: "/"}}
}

// hosts returns a table with a virtual host for each domain. Each has one route, to a cluster with the domain's name.
func hosts(domains ...string) *mesh.Routes {
	r := &mesh.Routes{}
	for _, text := range domains {
		r.Hosts = append(r.Hosts, mesh.VirtualHost{Name: text, Domains: []mesh.Domain{domain(text)}, Routes: []mesh.Route{to(text)}})
	}
	return r
}

// result is what becomes of a request, in short.
func result(c Choice) string {
	switch {
	case c.Reply == NoRoute:
		return "no route"
	case c.Reply == Refused:
		return "refused"
	case c.Reply != nil:
		return fmt.Sprint(c.Reply.Status, c.Reply.Fields)
	}
	return c.Cluster.Name
}

// The requests of a connection are described in one Request, which remembers the host of the one before.
func TestARequestThatIsUsedAgainFindsItsOwnHost(t *testing.T) {
	one, two := Of(hosts("a.example", "b.example", "*.example")), Of(hosts("*.example", "a.example"))
	ported := hosts("a.example", "*")
	ported.IgnorePort = true
	r := &Request{Path: []byte("/")}
	for _, test := range []struct {
		table      *Table
		host, want string
	}{
		{one, "a.example", "a.example"},
		{one, "a.example", "a.example"},
		{one, "A.example", "a.example"},
		{one, "b.example", "b.example"},
		{one, "a.example", "a.example"},
		{one, "ba.example", "*.example"},
		{one, "a.exampl", "no route"},
		{one, "", "no route"},
		{two, "b.example", "*.example"},
		{one, "b.example", "b.example"},
		{two, "b.example", "*.example"},
		{Of(ported), "b.example:80", "*"},
		{Of(ported), "a.example:80", "a.example"},
		{Of(ported), "a.example:81", "a.example"},
		{Of(ported), "", "*"},
	} {
		r.Authority = []byte(test.host)
		if got := result(test.table.Find(r)); got != test.want {
			t.Errorf("%s: %s, want %s", test.host, got, test.want)
		}
	}
}

func TestAVirtualHostIsFoundByItsMostSpecificDomain(t *testing.T) {
	table := hosts("a.example", "*.example", "*b.example", "*.c.example", "a.*", "a.b.*", "[2001:db8::1]", "x:81", "*")
	ported := hosts("a.example", "[2001:db8::1]", "x:81", "*")
	ported.IgnorePort = true
	for _, test := range []struct {
		table      *mesh.Routes
		host, want string
	}{
		{table, "a.example", "a.example"},
		{table, "A.EXAMPLE", "a.example"},
		{table, "b.example", "*.example"},
		{table, "ab.example", "*b.example"},
		{table, "x.c.example", "*.c.example"},
		{table, "x.y.C.example", "*.c.example"},
		{table, ".c.example", "*.example"}, // the star stands for at least one byte
		{table, ".example", "*"},
		{table, "a.test", "a.*"},
		{table, "a.b.test", "a.b.*"},
		{table, "a.", "*"},
		{table, "a.example:80", "a.*"},
		{table, "[2001:db8::1]", "[2001:db8::1]"},
		{table, "x:81", "x:81"},
		{table, "", "*"},
		{ported, "a.example:80", "a.example"},
		{ported, "[2001:DB8::1]:80", "[2001:db8::1]"},
		{ported, "[2001:db8::1]", "[2001:db8::1]"},
		{ported, "x:81", "*"},
		{hosts("a"), "b", "no route"},
		{hosts(), "b", "no route"},
	} {
		r := request("GET /")
		r.Authority = []byte(test.host)
		if got := result(Of(test.table).Find(r)); got != test.want {
			t.Errorf("%q is of %q, want %q", test.host, got, test.want)
		}
	}
}

func TestATableIsCompiledOnce(t *testing.T) {
	r := hosts("a")
	first, second := Of(r), Of(r)
	if first != second || first == Of(hosts("a")) {
		t.Error("the table is not that of the routes")
	}
}

// Many connections may be the first to need a part of a table.
func TestTablesAreCompiledConcurrently(t *testing.T) {
	routes := pushes(t)["02-header-match/9080"]
	var all sync.WaitGroup
	var tables [8]*Table
	for i := range tables {
		all.Go(func() {
			tables[i] = Of(routes)
			r := request("GET http://reviews/v1/a", "x-canary", "v1")
			c := tables[i].Find(r)
			if o := c.Outcome(r, true); o.Plan != c.Cluster.plan(0) {
				t.Error("two plans")
			}
		})
	}
	all.Wait()
	for _, table := range tables {
		if table != tables[0] {
			t.Error("two tables")
		}
	}
}
