package outbound

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
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

// A request is not asked about only if the policies before the filter certainly do not select it.
func TestRequestsThatMayBeSelectedAreAskedAbout(t *testing.T) {
	r := newRouted(t, to("web"))
	r.cluster("web", nil, 82)
	r.handle(t, 82, func(http.ResponseWriter, *http.Request) {})
	always := mesh.Condition{Kind: mesh.ConditionTrue}
	shadow := func(rules mesh.Rules) mesh.HTTPFilter {
		return mesh.HTTPFilter{Name: "envoy.filters.http.rbac", RBAC: &mesh.RBAC{ShadowPrefix: "istio_ext_authz_", Shadow: &rules}}
	}
	selects := mesh.Rules{Action: mesh.Deny, Policies: []mesh.AccessPolicy{{Name: "istio-ext-authz-p", Permission: always, Principal: always}}}
	ask := func(filter string) mesh.HTTPFilter {
		return mesh.HTTPFilter{Name: "ask", ExtAuthz: &mesh.ExtAuthz{
			Enabled: mesh.Fraction{Numerator: 1, Denominator: 1}, StatusOnError: 503, GRPC: &mesh.GRPCService{Cluster: "none"},
			When: &mesh.MetadataMatcher{
				Filter: filter, Path: []string{"istio_ext_authz_shadow_effective_policy_id"},
				Value: mesh.ValueMatcher{Kind: mesh.ValueText, Text: mesh.StringMatcher{Kind: mesh.MatchPrefix, Text: "istio-ext-authz"}},
			},
		}}
	}
	const own = "envoy.filters.http.rbac"
	for name, c := range map[string]struct {
		filters []mesh.HTTPFilter
		want    int // 503: it was asked about, and there is no server
	}{
		"a policy selects it":              {[]mesh.HTTPFilter{shadow(selects), ask(own)}, 503},
		"no policy selects it":             {[]mesh.HTTPFilter{shadow(mesh.Rules{Action: mesh.Deny}), ask(own)}, 200},
		"there is no policy":               {[]mesh.HTTPFilter{ask(own)}, 200},
		"a policy is not understood":       {[]mesh.HTTPFilter{shadow(mesh.Rules{Refused: true}), ask(own)}, 503},
		"a filter that is not carried out": {[]mesh.HTTPFilter{shadow(mesh.Rules{Action: mesh.Deny}), ask("envoy.filters.http.lua")}, 503},
	} {
		r.enforce(c.filters...)
		r.Follow(true)
		conn := r.client(t)
		if status, _ := conn.ask(t, "/"); status != c.want {
			t.Errorf("%s: %d, want %d", name, status, c.want)
		}
		r.Await(t)
		conn.Close()
	}
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

// A server of external authorization that is asked about outbound requests sees their bodies as far as it is configured, over both
// versions of HTTP. The server of an allowed request gets the same bytes as without it, and no other request.
func TestAServerSeesTheBodiesOfOutboundRequests(t *testing.T) {
	r := newRouted(t, to("web"))
	r.cluster("web", nil, 82)
	var arrived, asked atomic.Int32
	r.handle(t, 82, func(w http.ResponseWriter, q *http.Request) {
		arrived.Add(1)
		body, err := io.ReadAll(q.Body)
		if err != nil || q.Header.Get("X-Role") != "from the checker" {
			t.Errorf("the server reads %d bytes, %v, role %q", len(body), err, q.Header.Get("X-Role"))
		}
		w.Write(body)
	})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	const limit = 1000
	checker := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		asked.Add(1)
		w.Header().Set("X-Role", "from the checker")
		body, err := io.ReadAll(q.Body)
		partial := ""
		if len(body) > 0 {
			partial = fmt.Sprint(string(body) == strings.Repeat("b", limit))
		}
		switch {
		case err != nil, q.Header.Get("X-Envoy-Auth-Partial-Body") != partial:
			w.WriteHeader(http.StatusTeapot)
		case strings.Contains(string(body), "evil"):
			w.WriteHeader(http.StatusForbidden)
		}
	})}
	served := make(chan struct{})
	go func() {
		defer close(served)
		checker.Serve(l)
	}()
	t.Cleanup(func() { checker.Close(); <-served })
	r.push(func(e *mesh.Edit) {
		e.SetCluster("checker", &mesh.Cluster{
			Name: "checker", Discovery: mesh.Static, Breakers: unlimited, ConnectTimeout: nettest.Patience,
			Hosts: &mesh.Assignment{Localities: []mesh.Locality{{Endpoints: []mesh.Endpoint{{Address: l.Addr().(*net.TCPAddr).AddrPort(), Weight: 1}}}}},
		})
	})
	ask := func(body *mesh.AuthzBody) {
		r.enforce(mesh.HTTPFilter{Name: "authz", ExtAuthz: &mesh.ExtAuthz{
			Enabled: mesh.Fraction{Numerator: 1, Denominator: 1}, StatusOnError: 503, Body: body,
			HTTP: &mesh.HTTPAuthz{
				Service:  mesh.HTTPService{Cluster: "checker", Timeout: nettest.Patience},
				Upstream: []mesh.StringMatcher{{Text: "x-role"}},
			},
		}})
	}
	ask(nil)
	for _, http2 := range []bool{false, true} {
		client := r.twoClient(t)
		if !http2 {
			transport := &http.Transport{DialContext: r.dialContext()}
			t.Cleanup(transport.CloseIdleConnections)
			client = &http.Client{Transport: transport}
		}
		client.Timeout = nettest.Patience
		for _, partial := range []bool{false, true} {
			ask(&mesh.AuthzBody{MaxBytes: limit, AllowPartial: partial}) // the same connection goes on
			for body, want := range map[string]int{
				"": 200, "good": 200, "evil": 403, strings.Repeat("a", limit): 200,
				strings.Repeat("b", 200*limit): map[bool]int{false: 413, true: 200}[partial],
			} {
				for _, known := range []bool{false, true} {
					about := fmt.Sprintf("%d bytes, HTTP/2 %v, in part %v, length known %v", len(body), http2, partial, known)
					var content io.Reader = strings.NewReader(body)
					if !known {
						content = io.MultiReader(content)
					}
					arrived.Store(0)
					asked.Store(0)
					response, err := client.Post("http://web/", "text/plain", content)
					if err != nil {
						t.Fatalf("%s: %v", about, err)
					}
					got, err := io.ReadAll(response.Body)
					response.Body.Close()
					if response.StatusCode != want || err != nil || want == 200 && string(got) != body {
						t.Errorf("%s: %d, %d bytes, %v; want %d", about, response.StatusCode, len(got), err, want)
					}
					record := r.Await(t)
					if n := asked.Load(); (n == 1) != (want != 413) || (arrived.Load() == 1) != (want == 200) || (record.Reason == flow.PolicyDenied) != (want != 200) {
						t.Errorf("%s: asked %d times, arrived %d times, %v, %s", about, n, arrived.Load(), record.Reason, record.Details)
					}
				}
			}
		}
	}
}

// dialContext connects clients to the routed port.
func (r *routed) dialContext() func(context.Context, string, string) (net.Conn, error) {
	return func(context.Context, string, string) (net.Conn, error) { return r.TryDial(r.At(81)) }
}
