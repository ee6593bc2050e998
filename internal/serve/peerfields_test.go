package serve

import (
	"crypto/x509"
	"testing"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/httpforward"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/peers"
	"github.com/pillion-proxy/pillion/internal/secure"
)

// Every mode of Envoy's, for clients without and with a certificate.
func TestAClientWithoutACertificateClaimsNoIdentity(t *testing.T) {
	const keep, remove = httpforward.KeepClientCert, httpforward.RemoveClientCert
	for mode, want := range map[mesh.ClientCertAction][2]httpforward.ClientCert{
		mesh.RemoveClientCert:        {remove, remove},
		mesh.ForwardClientCert:       {remove, keep},
		mesh.AppendClientCert:        {remove, httpforward.AppendClientCert},
		mesh.ReplaceClientCert:       {remove, httpforward.ReplaceClientCert},
		mesh.AlwaysForwardClientCert: {keep, keep},
	} {
		for i, peer := range []*x509.Certificate{nil, {}} {
			h := &mesh.HTTPManager{ClientCert: mode}
			got, err := peerFields(h, &secure.Session{Peer: peer})
			if err != nil || got.ClientCert != want[i] || (got.Element != "") != (want[i] > remove) {
				t.Errorf("mode %d, certificate %v: %+v, %v, want %d", mode, peer != nil, got, err, want[i])
			}
			plain := (&Conn{role: &Role{direction: flow.Inbound}, governed: &governed{chain: &mesh.FilterChain{HTTP: h}}}).peers()
			if plain.ClientCert != want[0] {
				t.Errorf("mode %d, without TLS: %+v", mode, plain)
			}
		}
	}
}

func TestWhichConnectionsHaveFieldsAboutPeers(t *testing.T) {
	inMesh := treatment(httpforward.RemoveClientCert, &mesh.HTTPManager{})
	http, opaque := &mesh.FilterChain{HTTP: &mesh.HTTPManager{}}, &mesh.FilterChain{TCP: &mesh.TCPProxy{}}
	for name, c := range map[string]struct {
		direction flow.Direction
		governed  *governed
		want      *httpforward.PeerFields
	}{
		"no control plane":         {flow.Inbound, nil, nil},
		"inbound HTTP":             {flow.Inbound, &governed{chain: http}, inMesh},
		"inbound TCP":              {flow.Inbound, &governed{chain: opaque}, nil},
		"inbound without a chain":  {flow.Inbound, &governed{}, removedClientCert},
		"outbound HTTP":            {flow.Outbound, &governed{chain: http}, inMesh},
		"outbound TCP or no chain": {flow.Outbound, &governed{}, nil},
		"outbound, no plane":       {flow.Outbound, nil, nil},
	} {
		if got := (&Conn{role: &Role{direction: c.direction}, governed: c.governed}).peers(); got != c.want {
			t.Errorf("%s: %+v, want %+v", name, got, c.want)
		}
	}
}

// Metadata is exchanged where the configuration has the filter for it, and with no server outside of the mesh.
func TestWhereMetadataIsExchanged(t *testing.T) {
	config := mesh.HTTPFilter{Type: "io.istio.http.peer_metadata.Config"}
	http, off := &mesh.HTTPManager{Filters: []mesh.HTTPFilter{config}}, &mesh.HTTPManager{Filters: []mesh.HTTPFilter{{Type: config.Type, Disabled: true}}}
	clusters := make(map[*governed]*mesh.Cluster)
	way := func(h *mesh.HTTPManager, c *mesh.Cluster) *governed {
		g := &governed{chain: &mesh.FilterChain{HTTP: h}, routing: &routing{manager: h}}
		clusters[g] = c
		return g
	}
	for name, c := range map[string]struct {
		direction flow.Direction
		governed  *governed
		want      bool
	}{
		"inbound":                     {flow.Inbound, &governed{chain: &mesh.FilterChain{HTTP: http}}, true},
		"inbound, with a certificate": {flow.Inbound, &governed{chain: &mesh.FilterChain{HTTP: http}, peers: &httpforward.PeerFields{ClientCert: httpforward.AppendClientCert}}, true},
		"inbound without the filter":  {flow.Inbound, &governed{chain: &mesh.FilterChain{HTTP: &mesh.HTTPManager{}}}, false},
		"inbound, disabled":           {flow.Inbound, &governed{chain: &mesh.FilterChain{HTTP: off}}, false},
		"inbound without a chain":     {flow.Inbound, &governed{}, false},
		"outbound":                    {flow.Outbound, way(http, &mesh.Cluster{Discovery: mesh.ByEDS}), true},
		"outbound without the filter": {flow.Outbound, way(&mesh.HTTPManager{}, &mesh.Cluster{}), false},
		"outbound of the mesh":        {flow.Outbound, way(http, &mesh.Cluster{External: true}), false},
		"outbound, passed through":    {flow.Outbound, way(http, &mesh.Cluster{Discovery: mesh.OriginalDestination}), false},
	} {
		exchange := peers.New("id", nil)
		role := &Role{direction: c.direction, peers: exchange}
		if r := c.governed.routing; r != nil && r.manager.ExchangesMetadata() {
			r.described = role.exchanging(withoutClient(r.manager))
		}
		got := (&Conn{role: role, governed: c.governed}).peers()
		if r := c.governed.routing; r != nil && r.exchanges(clusters[c.governed]) {
			got = r.described // by the decision for each request
		}
		if (got.Exchange != nil) != c.want || c.want && got.Introduces != (c.direction == flow.Outbound) {
			t.Errorf("%s: %+v", name, got)
		}
		if role.peers = nil; (&Conn{role: role, governed: c.governed}).exchanges() {
			t.Errorf("%s: without a description of its own, it is exchanged", name)
		}
	}
}

// The names are those of Envoy: its own if the configuration has none, as for the clients in a mesh.
func TestTheNameOfTheServerInResponses(t *testing.T) {
	for _, test := range []struct {
		h        mesh.HTTPManager
		name     string
		ifAbsent bool
	}{
		{mesh.HTTPManager{}, "envoy", false},
		{mesh.HTTPManager{ServerName: "istio-envoy"}, "istio-envoy", false},
		{mesh.HTTPManager{ServerName: "istio-envoy", ServerHeader: mesh.AppendServerIfAbsent}, "istio-envoy", true},
		{mesh.HTTPManager{ServerName: "istio-envoy", ServerHeader: mesh.PassServer}, "", false},
	} {
		test.h.ClientCert = mesh.AppendClientCert
		for _, peer := range []*x509.Certificate{nil, {}} {
			got, err := peerFields(&test.h, &secure.Session{Peer: peer})
			if err != nil || got.Server != test.name || got.IfAbsent != test.ifAbsent {
				t.Errorf("%+v: %+v and %v, want %q, %v", test.h, got, err, test.name, test.ifAbsent)
			}
		}
		if first, second := withoutClient(&test.h), withoutClient(&test.h); first != second {
			t.Error("connections without a certificate do not share their treatment")
		}
	}
}
