package outbound

import (
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/serve/servetest"
)

// enforce puts policies before the routes.
func (r *routed) enforce(filters ...mesh.HTTPFilter) {
	r.push(func(e *mesh.Edit) {
		e.SetListener("0.0.0.0_81", &mesh.Listener{
			Name: "0.0.0.0_81", Direction: mesh.Outbound, Virtual: true,
			Addresses: []netip.AddrPort{netip.MustParseAddrPort("0.0.0.0:81")},
			Filters:   []mesh.ListenerFilter{{Kind: mesh.TLSInspector}, {Kind: mesh.HTTPInspector}},
			Default:   &mesh.FilterChain{HTTP: &mesh.HTTPManager{RouteName: "81", NormalizePath: true, MergeSlashes: true, Filters: filters}},
		})
	})
}

// ask sends a request for a path.
func (c *client) ask(t *testing.T, target string) (int, string) {
	t.Helper()
	c.SetDeadline(time.Now().Add(nettest.Patience))
	servetest.Send(t, c, "GET "+target+" HTTP/1.1\r\nHost: web\r\n\r\n")
	response, err := http.ReadResponse(c.read, nil)
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response.StatusCode, string(body)
}

// Policies of a listener are applied to outbound requests before they are routed, in the normal form of their paths.
func TestPoliciesApplyBeforeRoutes(t *testing.T) {
	r := newRouted(t, to("web"))
	r.cluster("web", nil, 82)
	r.handle(t, 82, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.RequestURI) })
	r.enforce(mesh.HTTPFilter{Name: "rbac", RBAC: &mesh.RBAC{Rules: &mesh.Rules{Action: mesh.Deny, Policies: []mesh.AccessPolicy{{
		Name: "p", Principal: mesh.Condition{Kind: mesh.ConditionTrue},
		Permission: mesh.Condition{Kind: mesh.ConditionPath, Text: &mesh.StringMatcher{Kind: mesh.MatchPrefix, Text: "/admin"}},
	}}}}})
	r.Follow(true)
	c := r.client(t)
	for target, want := range map[string]int{"/": 200, "/admin": 403, "//admin": 403, "/x/../admin": 403, "/%61dmin": 403} {
		status, _ := c.ask(t, target)
		got := r.Await(t)
		if status != want || (got.Reason == flow.PolicyDenied) != (want == 403) || strings.HasPrefix(got.Explanation, "p: applies, since path") != (want == 403) {
			t.Errorf("%s: %d, %v, %q; want %d", target, status, got.Reason, got.Explanation, want)
		}
	}
	if status, body := c.ask(t, "/admin/../x//y"); status != 200 || body != "/x/y" {
		t.Errorf("an allowed request: %d, the server saw %q", status, body)
	}
	r.Await(t)
	c.Close()
}

// The record of a request that was sent again has the verdicts of policies that are not enforced.
func TestARetriedRequestHasTheVerdictsOfItsPolicies(t *testing.T) {
	route := to("web")
	route.Forward.Retry = &mesh.RetryPolicy{On: mesh.Retry5xx, Retries: 1}
	r := newRouted(t, route)
	r.cluster("web", nil, 82)
	attempts := 0
	r.handle(t, 82, func(w http.ResponseWriter, r *http.Request) {
		if attempts++; attempts%2 == 1 {
			w.WriteHeader(503)
		}
	})
	r.enforce(mesh.HTTPFilter{Name: "rbac", RBAC: &mesh.RBAC{ShadowPrefix: "istio_dry_run_allow_", Shadow: &mesh.Rules{Action: mesh.Allow}}})
	for _, two := range []bool{false, true} {
		r.asker(t, two).ask(t, "/")
		if got := r.Await(t); got.Attempts != 2 || got.DryRun != "allow: denied" {
			t.Errorf("HTTP/2 %v: the record has the verdict %q after %d attempts", two, got.DryRun, got.Attempts)
		}
	}
}
