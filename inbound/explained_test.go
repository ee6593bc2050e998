package inbound

import (
	"io"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/serve/servetest"
)

const deniedAdmin = `ns[shop]-policy[p]-rule[0]: applies, since path "/admin" is with prefix "/admin" and anything`

// The record of a request that a policy denies has the reason in full while records are followed, over both versions of HTTP.
func TestDeniedRequestsAreExplained(t *testing.T) {
	m := newMeshRig(t, "STRICT, HTTP")
	m.enforce(t, "STRICT, HTTP", rbac(mesh.Deny, ofAdmin, anything))
	one, two := m.connect(t, 81), m.http2(t, 81)
	for _, followed := range []bool{false, true, false} {
		m.Follow(followed)
		for _, over := range []string{"HTTP/1.1", "HTTP/2"} {
			for path, want := range map[string]string{"/": "", "/admin": deniedAdmin} {
				if over == "HTTP/2" {
					response, err := two.Get("http://web" + path)
					if err != nil {
						t.Fatal(err)
					}
					io.Copy(io.Discard, response.Body)
					response.Body.Close()
				} else {
					one.get(t, path)
				}
				if !followed {
					want = ""
				}
				if got := m.Await(t); got.Explanation != want || (got.Reason == flow.PolicyDenied) != (path == "/admin") || got.DryRun != "" {
					t.Errorf("%s, followed %v, %s: %v, %q, want %q", over, followed, path, got.Reason, got.Explanation, want)
				}
			}
		}
	}
	one.Close()
	two.CloseIdleConnections()
}

// Requests of an open connection that a policy of connections denies later are explained by that policy.
func TestRequestsOfADeniedConnectionAreExplained(t *testing.T) {
	m := newMeshRig(t, "STRICT, HTTP")
	c := m.connect(t, 81)
	c.get(t, "/")
	m.Await(t)
	chains := modes["STRICT, HTTP"]
	changed := make([]*mesh.FilterChain, len(chains))
	for i := range chains {
		chain := *chains[i]
		chain.Policies = []mesh.NetworkFilter{{Name: "rbac", RBAC: rbac(mesh.Deny, anything, ofClient)}}
		changed[i] = &chain
	}
	m.plane.InForce.Store(snapshotOf(t, changed, true))
	m.Follow(true)
	c.get(t, "/")
	if got := m.Await(t); got.Reason != flow.PolicyDenied || !strings.HasPrefix(got.Explanation, "ns[shop]-policy[p]-rule[0]: applies, since anything and principal") {
		t.Errorf("%v, %q", got.Reason, got.Explanation)
	}
	c.Close()
}

// The record of a connection of bytes that a policy denies has the reason in full, whether it is denied at once or later, and
// keeps its dry run.
func TestDeniedConnectionsAreExplained(t *testing.T) {
	everything := mesh.AccessPolicy{Name: "q", Permission: anything, Principal: anything}
	dry := &mesh.RBAC{Shadow: &mesh.Rules{Action: mesh.Deny, Policies: []mesh.AccessPolicy{everything}}, ShadowPrefix: "istio_dry_run_deny_"}
	for _, later := range []bool{false, true} {
		m := newMeshRigOf(t, "STRICT, TCP", detectionDelay, func(c *Config) { c.Rejudge = true })
		m.Follow(true)
		dialled := m.Listen(t, "82")
		denied := []*mesh.RBAC{dry, rbac(mesh.Allow, anything, ofOthers)}
		m.enforce(t, "STRICT, TCP", dry)
		if !later {
			m.enforce(t, "STRICT, TCP", denied...)
		}
		conn, err := m.handshake(t, m.Dial(t, m.At(82)), m.client, meshTCP...)
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(conn, "question")
		if later {
			workload := servetest.Take(t, dialled)
			servetest.Expect(t, workload, "question")
			m.enforce(t, "STRICT, TCP", denied...)
			m.Wake()
			defer workload.Close()
		}
		if _, err := conn.Read(make([]byte, 1)); err == nil {
			t.Error("the connection goes on")
		}
		got := m.Await(t)
		if got.Reason != flow.PolicyDenied || got.DryRun != "deny: denied by q" ||
			!strings.HasPrefix(got.Explanation, "ns[shop]-policy[p]-rule[0]: does not apply, since principal [") || !strings.Contains(got.Explanation, idOfClient) {
			t.Errorf("later %v: %v, %q, %q", later, got.Reason, got.DryRun, got.Explanation)
		}
		conn.Close()
	}
}
