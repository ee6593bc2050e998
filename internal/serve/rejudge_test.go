package serve

import (
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pillion-proxy/pillion/internal/authz"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/identity"
	"github.com/pillion-proxy/pillion/internal/mesh"
)

// inForce is a Mesh with one configuration.
type inForce struct{ snapshot *mesh.Snapshot }

func (m *inForce) Snapshot() *mesh.Snapshot     { return m.snapshot }
func (m *inForce) Identity() *identity.Identity { return nil }

// A connection of bytes is to end when it would be refused now, and not while a policy lets it pass.
func TestAConnectionOfBytesEndsWhenItIsDenied(t *testing.T) {
	config := func(change func(*mesh.FilterChain)) *mesh.Snapshot {
		chain := &mesh.FilterChain{TCP: &mesh.TCPProxy{Clusters: []mesh.TCPCluster{{Name: "inbound|81||", Weight: 1}}}}
		change(chain)
		edit := (*mesh.Snapshot)(nil).Edit()
		edit.SetListener("bound", &mesh.Listener{
			Name: "bound", Direction: mesh.Outbound, Addresses: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:81")}, Default: chain,
		})
		edit.SetListener("virtualInbound", &mesh.Listener{Name: "virtualInbound", Direction: mesh.Inbound, UseOriginalDst: true, Default: chain})
		snapshot, _ := edit.Snapshot()
		return snapshot
	}
	plane := &inForce{config(func(*mesh.FilterChain) {})}
	r := &rejudge{role: &Role{mesh: plane}, info: mesh.ConnInfo{Destination: netip.MustParseAddrPort("192.0.2.1:81")}, seen: plane.snapshot}
	a := &accepted{role: &Role{mesh: plane, gateway: true, direction: flow.Outbound}, info: r.info, subject: &authz.Subject{}, seen: plane.snapshot}
	for _, step := range []struct {
		name   string
		change func(*mesh.FilterChain)
		denied bool
	}{
		{"no policy", func(*mesh.FilterChain) {}, false},
		{"a policy that denies all", func(c *mesh.FilterChain) {
			c.Policies = []mesh.NetworkFilter{{Name: "rbac", RBAC: &mesh.RBAC{Rules: &mesh.Rules{}}}}
		}, true},
		{"one that allows all", func(c *mesh.FilterChain) {
			c.Policies = []mesh.NetworkFilter{{Name: "rbac", RBAC: &mesh.RBAC{}}}
		}, false},
		{"a chain that is refused", func(c *mesh.FilterChain) { c.Refused = true }, true},
		{"a chain that ends TLS", func(c *mesh.FilterChain) { c.TLS = &mesh.DownstreamTLS{} }, true},
	} {
		plane.snapshot = config(step.change)
		if got := r.denied(); got != step.denied {
			t.Errorf("%s: it is to end: %v, want %v", step.name, got, step.denied)
		}
		if got := a.gone(); got != step.denied {
			t.Errorf("%s: at a gateway, it is to end: %v, want %v", step.name, got, step.denied)
		}
	}
}

// A client cannot hold a request for longer than its removed listener serves others.
func TestARemovedListenerServesForAShortTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		empty, _ := (*mesh.Snapshot)(nil).Edit().Snapshot()
		a := &accepted{role: &Role{mesh: &inForce{empty}, gateway: true}, info: mesh.ConnInfo{Destination: netip.MustParseAddrPort("192.0.2.1:81")}}
		if !a.gone() || a.barred || a.late() {
			t.Errorf("at once: %+v", a)
		}
		time.Sleep(removalGrace + 1)
		if !a.late() {
			t.Error("it is still served")
		}
	})
}
