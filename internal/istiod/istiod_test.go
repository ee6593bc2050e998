package istiod

import (
	"context"
	"crypto/tls"
	"encoding/pem"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/pillion-proxy/pillion/internal/wire"
)

func TestTheRootsOfIstiodAreFoundInIstiosOrder(t *testing.T) {
	empty, vm := t.TempDir(), t.TempDir()
	if err := os.MkdirAll(filepath.Join(vm, "etc/certs"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(vm, certsFile), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct{ directory, explicit, provisioned, mounted, want string }{
		{empty, "", "", "", filepath.Join(empty, "var/run/secrets/istio/root-cert.pem")},
		{empty, "", "", "/tls/ca.pem", "/tls/ca.pem"},
		{empty, "", "/provisioned", "/tls/ca.pem", "/provisioned/root-cert.pem"},
		{vm, "", "/provisioned", "/tls/ca.pem", filepath.Join(vm, "etc/certs/root-cert.pem")},
		{vm, "SYSTEM", "/provisioned", "/tls/ca.pem", SystemRoots},
		{vm, "/explicit.pem", "", "", "/explicit.pem"},
	} {
		if got := FindRoots(test.directory, test.explicit, test.provisioned, test.mounted); got != test.want {
			t.Errorf("%+v: %s", test, got)
		}
	}
}

func TestTheServerNameIsTheHostUnlessOverridden(t *testing.T) {
	for _, test := range []struct{ address, override, want string }{
		{"istiod.istio-system.svc:15012", "", "istiod.istio-system.svc"},
		{"istiod-canary.mesh.svc:443", "", "istiod-canary.mesh.svc"},
		{"istiod.istio-system.svc:15012", "istiod.example.com", "istiod.example.com"},
		{"localhost:15012", "", "istiod.istio-system.svc"},
		{"[2001:db8::1]:15012", "", "2001:db8::1"},
		{"istiod", "", "istiod"},
	} {
		if got := ServerName(test.address, test.override); got != test.want {
			t.Errorf("%+v: %s", test, got)
		}
	}
}

// server starts an HTTP/2 server that answers each call with the token that it got.
func server(t *testing.T, secure bool) (*httptest.Server, *Server) {
	t.Helper()
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/grpc")
		w.Header().Set("Trailer", "Grpc-Status")
		text := r.Header.Get("Authorization") + "|" + r.Header.Get("Clusterid")
		w.Write(append([]byte{0, 0, 0, 0, byte(len(text))}, text...))
		w.Header().Set("Grpc-Status", "0")
	}))
	directory := t.TempDir()
	client := &Server{Plaintext: !secure, ServerName: "example.com", Roots: filepath.Join(directory, "roots.pem"), Token: filepath.Join(directory, "token"),
		Header: http.Header{"Clusterid": {"Kubernetes"}}}
	if secure {
		s.EnableHTTP2 = true
		s.StartTLS()
		text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
		if err := os.WriteFile(client.Roots, text, 0o600); err != nil {
			t.Fatal(err)
		}
	} else {
		s.Config.Protocols = new(http.Protocols)
		s.Config.Protocols.SetUnencryptedHTTP2(true)
		s.Start()
	}
	t.Cleanup(s.Close)
	client.Address = s.Listener.Addr().String()
	return s, client
}

func call(t *testing.T, s *Server) (string, error) {
	t.Helper()
	connection, err := s.Connect()
	if err != nil {
		return "", err
	}
	defer connection.Close()
	reply, err := connection.Call(t.Context(), "/s/m", nil)
	return string(reply), err
}

func TestTheTokenIsReadForEachCall(t *testing.T) {
	for _, secure := range []bool{true, false} {
		_, client := server(t, secure)
		for token, want := range map[string]string{"": "|Kubernetes", " first\n": "Bearer first|Kubernetes", "second": "Bearer second|Kubernetes"} {
			os.Remove(client.Token)
			if token != "" {
				if err := os.WriteFile(client.Token, []byte(token), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if got, err := call(t, client); err != nil || got != want {
				t.Errorf("token %q: %q, error %v, want %q", token, got, err, want)
			}
		}
	}
}

func TestIstiodIsVerified(t *testing.T) {
	_, client := server(t, true)
	client.ServerName = "istiod.istio-system.svc"
	if _, err := call(t, client); err == nil || !strings.Contains(err.Error(), "istiod.istio-system.svc") {
		t.Errorf("another name: error %v", err)
	}
	_, client = server(t, true)
	client.Roots = SystemRoots
	if _, err := call(t, client); err == nil || !strings.Contains(err.Error(), "unknown authority") {
		t.Errorf("other roots: error %v", err)
	}
	client.Roots = filepath.Join(t.TempDir(), "none.pem")
	if _, err := call(t, client); err == nil || !strings.Contains(err.Error(), "none.pem") {
		t.Errorf("no roots: error %v", err)
	}
	if err := os.WriteFile(client.Roots, []byte("text"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := call(t, client); err == nil || !strings.Contains(err.Error(), "no certificate") {
		t.Errorf("roots without a certificate: error %v", err)
	}
}

func TestRootsAreReadForEachConnection(t *testing.T) {
	_, first := server(t, true)
	_, second := server(t, true)
	if _, err := call(t, first); err != nil {
		t.Fatal(err)
	}
	var dialled []string
	first.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
		dialled = append(dialled, address)
		return new(net.Dialer).DialContext(ctx, network, second.Address)
	}
	first.Roots = second.Roots
	if _, err := call(t, first); err != nil || len(dialled) != 1 || dialled[0] != first.Address {
		t.Errorf("error %v, dialled %q", err, dialled)
	}
}

func TestAClientCertificateIsPresentedWhenThereIsOne(t *testing.T) {
	s, client := server(t, true)
	asked := false
	s.TLS.ClientAuth = tls.RequestClientCert
	client.Certificate = func() (*tls.Certificate, error) { asked = true; return &s.TLS.Certificates[0], nil }
	if _, err := call(t, client); err != nil || !asked {
		t.Errorf("error %v, certificate asked for: %v", err, asked)
	}
}

func TestANodeIsEncodedAsIstiodReadsIt(t *testing.T) {
	node := Node{Type: "sidecar", IP: "192.0.2.7", Pod: "web-1", Namespace: "shop", Cluster: "web.shop", Metadata: map[string]any{
		"NAMESPACE": "shop", "LABELS": map[string]any{"app": "web"}, "ENABLED": true, "DISABLED": false, "NUMBER": 1.5, "NONE": nil, "LIST": []any{"a", true},
	}}
	if want := "sidecar~192.0.2.7~web-1.shop~shop.svc.cluster.local"; node.ID() != want {
		t.Errorf("ID %s, want %s", node.ID(), want)
	}
	encoded, err := node.Encode()
	if err != nil {
		t.Fatal(err)
	}
	var metadata structpb.Struct
	m := wire.Read(encoded, &err)
	for m.Next() {
		switch m.Number {
		case 1, 2, 6:
			if m.String() == "" {
				t.Errorf("field %d is empty", m.Number)
			}
		case 3:
			if err := proto.Unmarshal(m.Bytes(), &metadata); err != nil {
				t.Fatal(err)
			}
		default:
			t.Errorf("field %d", m.Number)
		}
	}
	want, problem := structpb.NewStruct(node.Metadata)
	if err != nil || problem != nil || !proto.Equal(want, &metadata) {
		t.Errorf("errors %v, %v; metadata %v", err, problem, &metadata)
	}
	node.Metadata["BAD"] = []any{map[string]any{"x": 5}}
	if _, err := node.Encode(); err == nil || !strings.Contains(err.Error(), "BAD: element 0: x: a value of type int") {
		t.Errorf("error %v", err)
	}
}
