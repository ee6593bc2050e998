package istiod

import (
	"fmt"
	"slices"
	"testing"

	pilot "istio.io/istio/pilot/pkg/xds"

	"github.com/pillion-proxy/pillion/internal/istiod"
	"github.com/pillion-proxy/pillion/internal/xds"
)

// protocols runs a test by both protocols.
func protocols(t *testing.T, test func(t *testing.T, delta bool)) {
	for _, delta := range []bool{true, false} {
		name := "delta"
		if !delta {
			name = "state of the world"
		}
		t.Run(name, func(t *testing.T) { test(t, delta) })
	}
}

func TestASidecarIsSynced(t *testing.T) {
	p := startPlane(t, "")
	protocols(t, func(t *testing.T, delta bool) {
		x := startProxy(t, p, sidecar(), delta)
		await(t, func() error { return x.synced(p) })
		var status pilot.SyncStatus
		await(t, func() (err error) { // istiod may push once more
			if status, err = p.status(sidecarPod + ".default"); err != nil {
				return err
			}
			for _, asked := range []xds.Type{xds.Clusters, xds.Endpoints, xds.Listeners, xds.Routes, xds.Names, xds.ProxyConfigs} {
				if shown := status.Resources[asked.URL()]; shown.Sent == "" || shown.Sent != shown.Acked {
					return fmt.Errorf("%v: %+v", asked, shown)
				}
			}
			return nil
		})
		if status.IstioVersion != istioVersion || status.ProxyID != sidecarPod+".default" || status.ClusterID != clusterID || status.ProxyType != "sidecar" {
			t.Errorf("istiod shows %+v", status)
		}
		for want, of := range map[string]xds.Type{
			"outbound|9080||reviews.default.svc.cluster.local": xds.Endpoints, "inbound|8080||": xds.Clusters, "virtualInbound": xds.Listeners, "9080": xds.Routes, "": xds.Names,
		} {
			if names := x.names(of); !slices.Contains(names, want) {
				t.Errorf("%v %q is not among %q", of, want, names)
			}
		}
		x.stop()
		await(t, func() error {
			if _, err := p.status(sidecarPod + ".default"); err != errNotConnected {
				return fmt.Errorf("istiod still lists a node that has gone: %v", err)
			}
			return nil
		})
	})
}

func TestTheIdentityIsThatOfTheToken(t *testing.T) {
	p := startPlane(t, "")
	for _, node := range []istiod.Node{sidecar(), gateway()} {
		x := startProxy(t, p, node, true)
		want := "spiffe://cluster.local/ns/default/sa/" + node.Metadata["SERVICE_ACCOUNT"].(string)
		await(t, func() error {
			if current := x.keeper.Current(); current == nil || current.SPIFFE != want {
				return fmt.Errorf("identity %+v, want %s; status %+v", current, want, x.keeper.Status())
			}
			return nil
		})
	}
}
