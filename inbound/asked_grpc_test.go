package inbound

import (
	"encoding/binary"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/wire"
)

// checker serves the gRPC method Check. decide returns the CheckResponse to a CheckRequest.
func checker(t *testing.T, decide func(request string) []byte) netip.AddrPort {
	t.Helper()
	return listenLocally(t, func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil || len(body) < 5 || r.URL.Path != "/envoy.service.auth.v3.Authorization/Check" {
			w.WriteHeader(404)
			return
		}
		answer := decide(string(body[5:]))
		w.Header().Set("Content-Type", "application/grpc")
		w.Write(append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(answer))), answer...))
		w.Header().Set(http.TrailerPrefix+"Grpc-Status", "0")
	})
}

// checked returns a CheckResponse with a code of google.rpc.Code. part is field number of it; number 0: there is none.
func checked(code uint64, number int, part []byte) []byte {
	b := wire.AppendBytes(nil, 1, wire.AppendVarint(nil, 1, code))
	if number == 0 {
		return b
	}
	return wire.AppendBytes(b, number, part)
}

// setting returns a HeaderValueOption.
func setting(name, value string) []byte {
	return wire.AppendBytes(nil, 1, wire.AppendString(wire.AppendString(nil, 1, name), 2, value))
}

// Codes of google.rpc.Code.
const (
	codeOK               = 0
	codePermissionDenied = 7
)

// A server decides by gRPC about the requests that a policy with the action CUSTOM matches.
func TestAServerDecidesByGRPC(t *testing.T) {
	m := newMeshRig(t, "STRICT, HTTP")
	at := checker(t, func(request string) []byte {
		switch {
		case !strings.Contains(request, "shop.example") || !strings.Contains(request, "spiffe://"):
			t.Errorf("the question is %q", request)
		case strings.Contains(request, "/admin/good"):
			allowed := wire.AppendBytes(nil, 2, setting("Seen-Sub", "from the server"))
			allowed = wire.AppendString(allowed, 5, "Authorization")
			return checked(codeOK, 3, wire.AppendBytes(allowed, 6, setting("x-checked", "yes")))
		case strings.Contains(request, "/admin/rewritten"):
			return checked(codeOK, 3, wire.AppendBytes(nil, 2, setting(":path", "/")))
		case strings.Contains(request, "/admin/login"):
			denied := wire.AppendBytes(nil, 1, wire.AppendVarint(nil, 1, 401))
			denied = wire.AppendBytes(denied, 2, setting("www-authenticate", "Basic"))
			return checked(codePermissionDenied, 2, wire.AppendString(denied, 3, "log in"))
		}
		return checked(codePermissionDenied, 0, nil)
	})
	m.configure(t, "STRICT, HTTP", custom(&mesh.ExtAuthz{
		StatusOnError: 503, GRPC: &mesh.GRPCService{Cluster: "checker", Timeout: nettest.Patience},
	}), nil, map[string]netip.AddrPort{"checker": at})
	c := m.connect(t, 81)
	for _, want := range []struct {
		path    string
		status  int
		body    string
		details string
	}{
		{"/admin/login", 401, "log in", "ext_authz_denied"},
		{"/admin/other", 403, "", "ext_authz_denied"},
		{"/admin/rewritten", 503, "", "ext_authz_error"},
	} {
		response, body := c.ask(t, want.path, "Seen-Sub: forged\r\n")
		got := m.Await(t)
		if response.StatusCode != want.status || body != want.body || response.Header.Get("Seen-Target") != "" {
			t.Errorf("%s: %d, %q, %v", want.path, response.StatusCode, body, response.Header)
		}
		if challenge := response.Header.Get("Www-Authenticate"); (challenge == "Basic") != (want.status == 401) {
			t.Errorf("%s: the challenge is %q", want.path, challenge)
		}
		if got.Reason != flow.PolicyDenied || got.Details != want.details || got.Flags != "UAEX" {
			t.Errorf("%s: the record has %v, %s, %s", want.path, got.Reason, got.Details, got.Flags)
		}
	}
	response, _ := c.ask(t, "/admin/good", "Authorization: x\r\nSeen-Sub: forged\r\n")
	if got := m.Await(t); response.StatusCode != 200 || got.Reason != flow.Completed {
		t.Errorf("an allowed request: %d, %v", response.StatusCode, got.Reason)
	}
	if seen := response.Header.Get("Seen-Claims"); seen != "from the server, false, false" || response.Header.Get("X-Checked") != "yes" {
		t.Errorf("the workload saw %q, and the client sees %v", seen, response.Header)
	}
	c.Close()
}
