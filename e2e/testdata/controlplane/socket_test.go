package controlplane

import (
	"context"
	"encoding/pem"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	secret "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/types"
	"github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"github.com/envoyproxy/go-control-plane/pkg/server/v3"
	"google.golang.org/grpc"

	"github.com/pillion-proxy/pillion/e2e/testdata/controlplane/ca"
	"github.com/pillion-proxy/pillion/internal/identity"
)

// workloadAPI is a SPIFFE workload socket: go-control-plane's secret discovery service.
type workloadAPI struct {
	path   string
	cache  cache.SnapshotCache
	server *grpc.Server
}

func startWorkloadAPI(t *testing.T, root string) *workloadAPI {
	t.Helper()
	w := &workloadAPI{path: filepath.Join(root, "var/run/secrets/workload-spiffe-uds/socket"), cache: cache.NewSnapshotCache(false, cache.IDHash{}, nil)}
	if err := os.MkdirAll(filepath.Dir(w.path), 0o755); err != nil {
		t.Fatal(err)
	}
	w.start(t)
	t.Cleanup(func() { w.server.Stop() })
	return w
}

func (w *workloadAPI) start(t *testing.T) {
	t.Helper()
	socket, err := net.Listen("unix", w.path)
	if err != nil {
		t.Fatal(err)
	}
	w.server = grpc.NewServer()
	secret.RegisterSecretDiscoveryServiceServer(w.server, server.NewServer(context.Background(), w.cache, nil))
	go w.server.Serve(socket)
}

func inline(text []byte) *core.DataSource {
	return &core.DataSource{Specifier: &core.DataSource_InlineBytes{InlineBytes: text}}
}

// issue serves a new certificate, and returns it.
func (w *workloadAPI) issue(t *testing.T, version string, authority *ca.Authority) (chain []byte) {
	t.Helper()
	id, err := url.Parse("spiffe://cluster.local/ns/shop/sa/web")
	if err != nil {
		t.Fatal(err)
	}
	chain, key, err := authority.Issue(id)
	if err != nil {
		t.Fatal(err)
	}
	snapshot, err := cache.NewSnapshot(version, map[resource.Type][]types.Resource{resource.SecretType: {
		&tls.Secret{Name: "default", Type: &tls.Secret_TlsCertificate{TlsCertificate: &tls.TlsCertificate{CertificateChain: inline(chain), PrivateKey: inline(key)}}},
		&tls.Secret{Name: "ROOTCA", Type: &tls.Secret_ValidationContext{ValidationContext: &tls.CertificateValidationContext{TrustedCa: inline(authority.RootPEM())}}},
	}})
	if err == nil {
		err = w.cache.SetSnapshot(t.Context(), nodeID, snapshot)
	}
	if err != nil {
		t.Fatal(err)
	}
	return chain
}

func TestAWorkloadSocketRenewsTheIdentity(t *testing.T) {
	root, err := os.MkdirTemp("", "") // the path of a Unix socket has at most 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(root) })
	authority, next := newAuthority(t, ""), newAuthority(t, "")
	api := startWorkloadAPI(t, root)
	socket, err := identity.FindSocket(t.Context(), root, "")
	if err != nil || socket == nil {
		t.Fatalf("socket %v, error %v", socket, err)
	}
	if socket.Node, err = node.Encode(); err != nil {
		t.Fatal(err)
	}
	changed := make(chan *identity.Identity, 10)
	keeper := identity.NewKeeper(identity.Config{Source: socket, Log: slog.New(slog.DiscardHandler), Changed: func(i *identity.Identity) { changed <- i }})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	first := api.issue(t, "1", authority)
	go func() { keeper.Run(ctx); close(done) }()
	defer func() { cancel(); <-done }()
	await := func(what string, chain []byte, roots []byte) {
		t.Helper()
		deadline := time.NewTimer(patience)
		defer deadline.Stop()
		select {
		case got := <-changed:
			if string(pemOf(got)) != string(chain) || string(got.Roots.PEM) != string(roots) {
				t.Errorf("%s: another identity", what)
			}
		case <-deadline.C:
			t.Fatalf("%s did not come", what)
		}
	}
	await("the first", first, authority.RootPEM())
	await("a renewed one", api.issue(t, "2", authority), authority.RootPEM())
	await("one of another root", api.issue(t, "3", next), next.RootPEM())
	api.server.Stop()
	fourth := api.issue(t, "4", next)
	api.start(t)
	await("one after the server was away", fourth, next.RootPEM())
}

func pemOf(i *identity.Identity) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: i.Certificate.Certificate[0]})
}
