package inbound

import (
	"io"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/serve/servetest"
)

// A server decides by gRPC about connections.
func TestAServerDecidesAboutConnections(t *testing.T) {
	m := newMeshRig(t, "STRICT, TCP")
	dialled := m.Listen(t, "82")
	var code atomic.Uint64
	at := checker(t, func(request string) []byte {
		if !strings.Contains(request, "spiffe://") || !strings.Contains(request, m.At(82).Addr().String()) {
			t.Errorf("the question is %q", request)
		}
		return checked(code.Load(), 0, nil)
	})
	for name, c := range map[string]struct {
		cluster string
		code    uint64
		open    bool
		passes  bool
	}{
		"allowed":            {"checker", codeOK, false, true},
		"denied":             {"checker", codePermissionDenied, true, false},
		"nobody":             {"none", codeOK, false, false},
		"nobody, fails open": {"none", codeOK, true, true},
	} {
		code.Store(c.code)
		m.configure(t, "STRICT, TCP", nil, []mesh.NetworkFilter{{Name: "envoy.filters.network.ext_authz", ExtAuthz: &mesh.ExtAuthz{
			AllowFailure: c.open, Enabled: mesh.Fraction{Numerator: 100, Denominator: 100},
			GRPC: &mesh.GRPCService{Cluster: c.cluster, Timeout: nettest.Patience},
		}}}, map[string]netip.AddrPort{"checker": at})
		conn, err := m.handshake(t, m.Dial(t, m.At(82)), m.client, meshTCP...)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		io.WriteString(conn, "question")
		if c.passes {
			workload := servetest.Take(t, dialled)
			servetest.Expect(t, workload, "question")
			workload.Close()
		} else if _, err := conn.Read(make([]byte, 1)); err == nil {
			t.Errorf("%s: the connection passes", name)
		}
		conn.Close()
		if got := m.Await(t); (got.Reason == flow.PolicyDenied) == c.passes {
			t.Errorf("%s: the record has %v, %v", name, got.Reason, got.Err)
		}
	}
}

// A connection is not asked about only if the policies before the filter certainly do not select it. A filter that is not supported
// refuses all connections, also if it fails open.
func TestConnectionsThatMayBeSelectedAreAskedAbout(t *testing.T) {
	const mode = "STRICT, TCP"
	m := newMeshRig(t, mode)
	dialled := m.Listen(t, "82")
	shadow := func(rules mesh.Rules) mesh.NetworkFilter {
		return mesh.NetworkFilter{Name: "envoy.filters.network.rbac", RBAC: &mesh.RBAC{ShadowPrefix: "istio_ext_authz_", Shadow: &rules}}
	}
	selects := mesh.Rules{Action: mesh.Deny, Policies: []mesh.AccessPolicy{{Name: "istio-ext-authz-p", Permission: anything, Principal: anything}}}
	ask := func(filter string) mesh.NetworkFilter {
		return mesh.NetworkFilter{Name: "ask", ExtAuthz: &mesh.ExtAuthz{
			Enabled: mesh.Fraction{Numerator: 1, Denominator: 1}, GRPC: &mesh.GRPCService{Cluster: "none"},
			When: &mesh.MetadataMatcher{
				Filter: filter, Path: []string{"istio_ext_authz_shadow_effective_policy_id"},
				Value: mesh.ValueMatcher{Kind: mesh.ValueText, Text: mesh.StringMatcher{Kind: mesh.MatchPrefix, Text: "istio-ext-authz"}},
			},
		}}
	}
	const network = "envoy.filters.network.rbac"
	for name, c := range map[string]struct {
		policies []mesh.NetworkFilter
		want     flow.Reason // PolicyDenied: it was asked about, and there is no server
	}{
		"a policy selects it":              {[]mesh.NetworkFilter{shadow(selects), ask(network)}, flow.PolicyDenied},
		"no policy selects it":             {[]mesh.NetworkFilter{shadow(mesh.Rules{Action: mesh.Deny}), ask(network)}, flow.Completed},
		"there is no policy":               {[]mesh.NetworkFilter{ask(network)}, flow.Completed},
		"a policy is not understood":       {[]mesh.NetworkFilter{shadow(mesh.Rules{Refused: true}), ask(network)}, flow.PolicyDenied},
		"a filter that is not carried out": {[]mesh.NetworkFilter{shadow(mesh.Rules{Action: mesh.Deny}), ask("envoy.filters.network.mysql_proxy")}, flow.PolicyDenied},
		"it is not supported":              {[]mesh.NetworkFilter{{Name: "ask", ExtAuthz: &mesh.ExtAuthz{Refused: true, AllowFailure: true, GRPC: &mesh.GRPCService{Cluster: "none"}}}}, flow.MeshRefused},
	} {
		m.configure(t, mode, nil, c.policies, nil)
		conn, err := m.handshake(t, m.Dial(t, m.At(82)), m.client, meshTCP...)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		io.WriteString(conn, "question")
		if c.want == flow.Completed {
			workload := servetest.Take(t, dialled)
			servetest.Expect(t, workload, "question")
			conn.Close()
			workload.Close()
		} else if _, err := conn.Read(make([]byte, 1)); err == nil {
			t.Errorf("%s: the connection passes", name)
		}
		conn.Close()
		if got := m.Await(t); got.Upstream.IsValid() != (c.want == flow.Completed) || c.want != flow.Completed && got.Reason != c.want || len(dialled) > 0 {
			t.Errorf("%s: the record has %v, %v, upstream %v", name, got.Reason, got.Err, got.Upstream)
		}
	}
}
