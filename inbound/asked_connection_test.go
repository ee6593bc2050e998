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
