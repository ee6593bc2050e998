package serve

import (
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/secure"
	"github.com/pillion-proxy/pillion/internal/secure/securetest"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// Roots of trust in a file verify the servers of a DestinationRule. When the file changes, new requests do not use connections
// that other roots have verified, and a connection to one endpoint is retired.
func TestRootsInAFileSeparateConnections(t *testing.T) {
	path := filepath.Join(t.TempDir(), "roots.pem")
	write := func(name string) {
		if err := os.WriteFile(path, securetest.New(t, name).Roots.PEM, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("one")
	synctest.Test(t, func(t *testing.T) {
		address := netip.MustParseAddrPort("192.0.2.1:443")
		tls := &mesh.UpstreamTLS{Roots: "file-root:" + path}
		edit := (*mesh.Snapshot)(nil).Edit()
		edit.SetCluster("far", &mesh.Cluster{Name: "far", Discovery: mesh.ByEDS, Assignment: "far", Transports: []mesh.Transport{{TLS: tls}}})
		edit.SetAssignment("far", &mesh.Assignment{Name: "far", Localities: []mesh.Locality{{Endpoints: []mesh.Endpoint{{Address: address, Weight: 1}}}}})
		snapshot, _ := edit.Snapshot()
		r := &Role{mesh: &inForce{snapshot}, plains: map[upstream.Options]*upstream.Security{}}
		r.contexts = secure.NewContexts(r.mesh, nil)
		r.securities.Store(&map[secured]*upstream.Security{})
		plain := new(upstream.Security)
		secures := func() *upstream.Security { return r.security(tls, secure.HTTP1, snapshot, plain, "") }

		first := secures()
		pinned := r.watch(snapshot, snapshot.Cluster("far"), &upstream.Target{Address: address, Security: r.security(tls, secure.HTTP2, snapshot, r.plain(snapshot.Cluster("far")), "")}, secure.HTTP2)
		time.Sleep(time.Minute)
		if secures() != first || pinned.gone() {
			t.Error("an unchanged file separates connections")
		}
		write("another")
		time.Sleep(time.Minute)
		if secures() == first {
			t.Error("connections that the roots of before have verified are used")
		}
		if !pinned.gone() {
			t.Error("a connection that the roots of before have verified is not retired")
		}
	})
}
