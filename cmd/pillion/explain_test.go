package main

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/configview"
	"github.com/pillion-proxy/pillion/internal/mesh"
)

// routed returns an agent with a listener at port 80, whose routes send jason to one cluster, and others to another.
func routed(t *testing.T) *running {
	r := newRunning(t)
	route := func(name, cluster string, headers ...mesh.HeaderMatcher) mesh.Route {
		return mesh.Route{Name: name, Match: mesh.RouteMatch{Path: "/", Headers: headers}, Forward: &mesh.Forward{NotFoundCode: 503, Clusters: []mesh.WeightedCluster{{Name: cluster, Weight: 1}}}}
	}
	jason := mesh.HeaderMatcher{Name: "end-user", Kind: mesh.HeaderText, Text: mesh.StringMatcher{Text: "jason"}}
	routes := &mesh.Routes{Name: "80", Hosts: []mesh.VirtualHost{{
		Name: "web", Domains: []mesh.Domain{{Text: "web"}, {Text: "203.0.113.7"}},
		Routes: []mesh.Route{route("canary", "web-v2", jason), route("main", "web-v1")},
	}}}
	l := &mesh.Listener{Name: "203.0.113.7_80", Virtual: true, Addresses: []netip.AddrPort{netip.MustParseAddrPort("203.0.113.7:80")},
		Chains: []*mesh.FilterChain{{HTTP: &mesh.HTTPManager{RouteName: "80"}}}}
	if err := l.Index(); err != nil {
		t.Fatal(err)
	}
	edit := (*mesh.Snapshot)(nil).Edit()
	edit.SetListener(l.Name, l)
	edit.SetRoutes("80", routes)
	edit.SetCluster("web-v1", &mesh.Cluster{Name: "web-v1"})
	r.snapshot, _ = edit.Snapshot()
	return r
}

func TestExplainFollowsARequest(t *testing.T) {
	r := routed(t)
	for args, parts := range map[string][]string{
		"GET http://web/x": {"GET http://web/x\n  result       sent to web-v1\n", "destination  203.0.113.7:80, outbound", "host         web: its domain is web",
			`not          canary, /*, end-user=jason: header end-user is absent, must be "jason"`, "route        main, /*", "web-v1\n  state        active"},
		"GET http://203.0.113.7/ -H end-user:jason":                      {"answered 503: the cluster does not exist", "route        canary"},
		"GET http://other/ --destination 203.0.113.7:80":                 {"answered 404: no virtual host is for other"},
		"GET http://web:81/":                                             {"carried to its original destination"},
		"GET http://web/ --from inbound --peer spiffe://cluster.local/a": {"destination  203.0.113.7:80, inbound"},
	} {
		out, complaints, err := r.look(t, append([]string{"explain"}, strings.Fields(args)...)...)
		if err != nil || complaints != "" {
			t.Errorf("%s: %v %s", args, err, complaints)
		}
		for _, part := range parts {
			if !strings.Contains(out, part) {
				t.Errorf("%s: %q is not in\n%s", args, part, out)
			}
		}
	}
}

func TestExplainAsJSON(t *testing.T) {
	r := routed(t)
	out, _, err := r.look(t, "explain", "GET", "http://web/x", "-H", "end-user: jason", "-o", "json")
	var e configview.Explanation
	if err != nil || json.Unmarshal([]byte(out), &e) != nil || e.Route == nil || e.Route.Name != "canary" {
		t.Errorf("%v: %s", err, out)
	}
	if _, _, err := r.look(t, "explain", "GET", "web"); err == nil || !strings.Contains(err.Error(), "is not a URL with a host") {
		t.Errorf("%v", err)
	}
}
