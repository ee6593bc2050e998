package route

import (
	"math/rand/v2"
	"testing"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

// The steps end with the route that Find finds, and each route before it misses a condition.
func TestStepsLeadToTheRouteThatIsFound(t *testing.T) {
	seed := rand.Uint64()
	c := chooser{rand.New(rand.NewPCG(seed, 0))}
	for range 1000 {
		routes := c.routes()
		r := c.request()
		choice, steps := Of(routes).Explain(r)
		if found := Of(routes).Find(r); found != choice {
			t.Fatalf("seed %d: %+v, want %+v", seed, choice, found)
		}
		for i, step := range steps {
			last := i == len(steps)-1
			if matched := step.Why == ""; matched && (!last || choice.Route != step.Route && !step.Route.Refused) || !matched && last && choice.Route != nil {
				t.Fatalf("seed %d: step %d of %d: %+v", seed, i, len(steps), step)
			}
		}
		if choice.Route != nil && len(steps) == 0 {
			t.Fatalf("seed %d: no steps", seed)
		}
	}
}

func TestAMissedConditionIsNamed(t *testing.T) {
	exact := func(text string) mesh.StringMatcher { return mesh.StringMatcher{Text: text} }
	header := func(h mesh.HeaderMatcher) mesh.RouteMatch {
		return mesh.RouteMatch{Path: "/", Headers: []mesh.HeaderMatcher{h}}
	}
	query := func(q mesh.QueryMatcher) mesh.RouteMatch {
		return mesh.RouteMatch{Path: "/", Query: []mesh.QueryMatcher{q}}
	}
	r := request("GET http://host/path?q=1", "x", "a", "y", "1", "Y", "2")
	for _, test := range []struct {
		match mesh.RouteMatch
		want  string
	}{
		{mesh.RouteMatch{Path: "/api/"}, "path /path does not begin with /api/"},
		{mesh.RouteMatch{Path: "/api", Kind: mesh.PathExact}, "path /path is not /api"},
		{mesh.RouteMatch{Path: "/pat", Kind: mesh.PathSeparatedPrefix}, "path /path is not below /pat"},
		{mesh.RouteMatch{Path: "/p", Kind: mesh.PathRegex}, "path /path does not match /p"},
		{header(mesh.HeaderMatcher{Name: "z", Kind: mesh.HeaderText, Text: exact("b")}), `header z is absent, must be "b"`},
		{header(mesh.HeaderMatcher{Name: "x", Kind: mesh.HeaderText, Text: exact("b")}), `header x is "a", must be "b"`},
		{header(mesh.HeaderMatcher{Name: "x", Kind: mesh.HeaderText, Text: exact("a"), Invert: true}), `header x is "a", must be present and not "a"`},
		{header(mesh.HeaderMatcher{Name: "y", Kind: mesh.HeaderText, Text: mesh.StringMatcher{Kind: mesh.MatchPrefix, Text: "b", IgnoreCase: true}}), `header y has 2 values, must be a text that begins with "b" in any case`},
		{header(mesh.HeaderMatcher{Name: "x", Kind: mesh.HeaderRange, Start: 1, End: 3}), `header x is "a", must be from 1 to 2`},
		{header(mesh.HeaderMatcher{Name: "x", Present: true, Invert: true}), `header x is "a", must be absent`},
		{header(mesh.HeaderMatcher{Name: "z", Present: true}), `header z is absent, must be present`},
		{query(mesh.QueryMatcher{Name: "q"}), `parameter q must be absent`},
		{query(mesh.QueryMatcher{Name: "p", Present: true}), `parameter p must be present`},
		{query(mesh.QueryMatcher{Name: "p", Text: new(exact("1"))}), `parameter p is absent, must be "1"`},
		{query(mesh.QueryMatcher{Name: "q", Text: new(mesh.StringMatcher{Kind: mesh.MatchRegex, Text: "2+"})}), `parameter q is "1", must be a match of "2+"`},
		{mesh.RouteMatch{Path: "/", Metadata: []mesh.MetadataMatcher{{Filter: "jwt"}}}, "metadata of jwt does not match"},
	} {
		route := to("c")
		route.Match = test.match
		_, steps := Of(everything(mesh.VirtualHost{Routes: []mesh.Route{route}})).Explain(r)
		if steps[0].Why != test.want || steps[0].Close != (test.match.Path == "/") {
			t.Errorf("%+v, want %s", steps[0], test.want)
		}
	}
}

func TestTheDomainOfAHostIsNamed(t *testing.T) {
	routes := everything(mesh.VirtualHost{Routes: []mesh.Route{to("c")}})
	routes.IgnorePort = true
	for _, text := range []string{"a", "*.b", "*c.b", "d.*"} {
		routes.Hosts[0].Domains = append(routes.Hosts[0].Domains, domain(text))
	}
	for host, want := range map[string]string{"A:80": "a", "x.b": "*.b", "xc.b": "*c.b", "d.x": "d.*", "x": "*"} {
		r := request("GET http://" + host + "/")
		c := Of(routes).Find(r)
		if got := c.Domain(r); got != want {
			t.Errorf("%s: %s, want %s", host, got, want)
		}
	}
}
