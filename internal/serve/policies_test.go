package serve

import (
	"net/netip"
	"testing"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/httpforward"
	"github.com/pillion-proxy/pillion/internal/mesh"
)

// oneField is a header with one field.
type oneField struct{ name, value string }

func (oneField) Len() int { return 1 }

func (f oneField) At(int) (name, value []byte) { return []byte(f.name), []byte(f.value) }

// A request of HTTP/2 with two hosts is rejected before a policy judges one of them.
func TestTwoHostsAreRejected(t *testing.T) {
	h := &mesh.HTTPManager{Filters: []mesh.HTTPFilter{{Name: "rbac", RBAC: &mesh.RBAC{}}}}
	for _, c := range []struct {
		host     string
		rejected bool
	}{{"public", false}, {"private", true}} {
		r := &httpforward.Request{
			Connection: &flow.Record{}, Method: []byte("GET"), Path: []byte("/"), Authority: []byte("public"), Fields: oneField{"host", c.host},
		}
		if _, reply, _ := new(gate).pass(&mesh.Snapshot{}, h, r); (reply != nil && reply.Status == 400) != c.rejected {
			t.Errorf("host %s: %+v", c.host, reply)
		}
	}
}

// A filter whose configuration has not come, or is not supported, refuses all requests, whatever follows it.
func TestAFilterThatIsNotInForceRefusesRequests(t *testing.T) {
	for name, f := range map[string]mesh.HTTPFilter{"has not come": {Name: "f", OnItsOwn: true}, "is not supported": {Name: "f", Refused: true}} {
		h := &mesh.HTTPManager{Filters: []mesh.HTTPFilter{f, {Name: "rbac", RBAC: &mesh.RBAC{}}}}
		r := &httpforward.Request{Connection: &flow.Record{}, Method: []byte("GET"), Path: []byte("/"), Fields: fieldList{}}
		if _, reply, _ := new(gate).pass(&mesh.Snapshot{}, h, r); reply == nil {
			t.Errorf("a request passes a filter that %s", name)
		}
	}
}

// At the edge, a client does not choose its address by x-forwarded-for: it is the one that the edge has found.
func TestTheAddressOfAClientAtTheEdgeIsNotItsOwnWord(t *testing.T) {
	found, peer := netip.MustParseAddrPort("192.0.2.1:9"), netip.MustParseAddr("192.0.2.2")
	r := &httpforward.Request{Connection: &flow.Record{}, Client: found, Fields: fieldList{"x-forwarded-for", "192.0.2.3"}}
	for edge, want := range map[bool]string{true: "192.0.2.1", false: "192.0.2.3"} {
		if got := clientAddress(&mesh.HTTPManager{UseRemoteAddress: edge}, r, peer); got.String() != want {
			t.Errorf("at the edge %v: %v, want %s", edge, got, want)
		}
	}
}

// Verdicts of policies that are not enforced are recorded in the order of their filters, for requests that pass as well as for
// those that are denied.
func TestDryRunsAreRecorded(t *testing.T) {
	everything := mesh.AccessPolicy{Name: "p", Permission: mesh.Condition{Kind: mesh.ConditionTrue}, Principal: mesh.Condition{Kind: mesh.ConditionTrue}}
	shadow := func(prefix string, action mesh.Action, policies ...mesh.AccessPolicy) mesh.HTTPFilter {
		return mesh.HTTPFilter{RBAC: &mesh.RBAC{Shadow: &mesh.Rules{Action: action, Policies: policies}, ShadowPrefix: prefix}}
	}
	h := &mesh.HTTPManager{Filters: []mesh.HTTPFilter{
		shadow("istio_dry_run_deny_", mesh.Deny, everything), shadow("istio_dry_run_allow_", mesh.Allow),
		{RBAC: &mesh.RBAC{Rules: &mesh.Rules{Action: mesh.Allow}}},
	}}
	for _, enforced := range []bool{false, true} {
		g := gate{}
		if !enforced {
			h.Filters = h.Filters[:2]
		}
		request := &httpforward.Request{Connection: &flow.Record{}, Method: []byte("GET"), Path: []byte("/"), Fields: fieldList{}}
		if _, reply, _ := g.pass(&mesh.Snapshot{}, h, request); (reply != nil) != enforced {
			t.Errorf("enforced %v: reply %+v", enforced, reply)
		}
		first := g.shadows.dryRun()
		if first == nil || *first != (flow.DryRun{Prefix: "istio_dry_run_deny_", Policy: "p", Denied: true, Next: first.Next}) {
			t.Fatalf("the first verdict is %+v", first)
		}
		if first.Next == nil || *first.Next != (flow.DryRun{Prefix: "istio_dry_run_allow_", Denied: true}) {
			t.Errorf("the second verdict is %+v", first.Next)
		}
		g.begin()
		if left := g.shadows.dryRun(); left != nil {
			t.Errorf("the next request has the verdict %+v", left)
		}
		h.Filters = append(h.Filters, mesh.HTTPFilter{RBAC: &mesh.RBAC{Rules: &mesh.Rules{Action: mesh.Allow}}})
	}
}

// A policy may look at metadata of a filter that is not carried out, such as experimental.envoy.filters.network.mysql_proxy[a.b] of
// Istio. Its value is not known, also if the condition is inverted: a policy that denies applies, and one that allows does not.
func TestMetadataOfOtherFiltersIsNotKnown(t *testing.T) {
	anything := mesh.Condition{Kind: mesh.ConditionTrue}
	judged := func(action mesh.Action, filter string, inverted bool) (denied bool) {
		condition := mesh.Condition{Kind: mesh.ConditionMetadata, Metadata: &mesh.MetadataMatcher{
			Filter: filter, Path: []string{"k"}, Value: mesh.ValueMatcher{Kind: mesh.ValueText, Text: mesh.StringMatcher{Text: "v"}}, Invert: inverted,
		}}
		rules := &mesh.Rules{Action: action, Policies: []mesh.AccessPolicy{{Name: "p", Permission: condition, Principal: anything}}}
		h := &mesh.HTTPManager{Filters: []mesh.HTTPFilter{{RBAC: &mesh.RBAC{Rules: rules}}}}
		r := &httpforward.Request{Connection: &flow.Record{}, Method: []byte("GET"), Path: []byte("/"), Fields: fieldList{}}
		_, reply, _ := new(gate).pass(&mesh.Snapshot{}, h, r)
		return reply != nil
	}
	for _, inverted := range []bool{false, true} {
		for filter, known := range map[string]bool{
			jwtFilter: true, rbacFilter: true, extAuthzFilter: true, networkRBACFilter: false,
			"istio_authn": false, "envoy.filters.network.mysql_proxy": false, "": false,
		} {
			// Of those that are known, there is no value.
			if got := judged(mesh.Deny, filter, inverted); got != (!known || inverted) {
				t.Errorf("a policy that denies by %q, inverted %v: denied %v", filter, inverted, got)
			}
			if got := judged(mesh.Allow, filter, inverted); got != (!known || !inverted) {
				t.Errorf("a policy that allows by %q, inverted %v: denied %v", filter, inverted, got)
			}
		}
	}
}
