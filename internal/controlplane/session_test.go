package controlplane

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"log/slog"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/identity"
	"github.com/pillion-proxy/pillion/internal/istiod"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/wire"
	"github.com/pillion-proxy/pillion/internal/xds"
)

// selfSigned returns a certificate that is its own root, and its key, as PEM.
func selfSigned(t *testing.T, name string) (certificate, key []byte) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	id, err := url.Parse("spiffe://cluster.local/ns/shop/sa/" + name)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), URIs: []*url.URL{id}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	encoded, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: encoded})
}

// writeFiles writes an identity that is its own root.
func writeFiles(t *testing.T, certificate, key []byte) *identity.Files {
	t.Helper()
	directory := t.TempDir()
	files := &identity.Files{Certificate: filepath.Join(directory, "c"), Key: filepath.Join(directory, "k"), Roots: filepath.Join(directory, "r")}
	for path, text := range map[string][]byte{files.Certificate: certificate, files.Key: key, files.Roots: certificate} {
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return files
}

// withFiles returns a session whose identity is in files, and whose istiod is away.
func withFiles(t *testing.T) *Session {
	t.Helper()
	certificate, key := selfSigned(t, "web")
	files := writeFiles(t, certificate, key)
	log := slog.New(slog.DiscardHandler)
	store, err := NewStore(StoreConfig{Log: log})
	if err != nil {
		t.Fatal(err)
	}
	pod := &istiod.Pod{Files: files, Discovery: istiod.Server{Address: "127.0.0.1:1", Plaintext: true}, Node: istiod.Node{Type: "sidecar", Namespace: "shop"}}
	session, err := NewSession(SessionConfig{Pod: pod, Store: store, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	return session
}

// run runs a session until the test ends.
func run(t *testing.T, session *Session) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { session.Run(ctx); close(done) }()
	t.Cleanup(func() { cancel(); <-done })
}

// announced is an update with the roots that istiod announces for the mesh.
func announced(roots ...[]byte) xds.Update {
	var message []byte
	for _, root := range roots {
		message = wire.AppendBytes(message, 34, root)
	}
	return xds.Update{Type: xds.ProxyConfigs, Resources: []xds.Resource{{TypeURL: xds.ProxyConfigs.URL(), Value: message}}}
}

func TestRootsThatIstiodAnnouncesAreTrusted(t *testing.T) {
	session := withFiles(t)
	run(t, session)
	nettest.Eventually(t, "an identity", func() bool { return session.Identity() != nil })
	other, _ := selfSigned(t, "other")
	trusts := func() bool {
		block, _ := pem.Decode(other)
		certificate, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		_, err = certificate.Verify(x509.VerifyOptions{Roots: session.Identity().Roots.Pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
		return err == nil
	}
	if trusts() {
		t.Fatal("the root is trusted before it was announced")
	}
	(*handler)(session).Update(announced(other))
	nettest.Eventually(t, "the root to be trusted", trusts)
	(*handler)(session).Update(announced([]byte("not a certificate"))) // changes nothing
	if !trusts() {
		t.Error("the root is not trusted any more")
	}
}

func TestTheStatusHasWhatAPodHas(t *testing.T) {
	session := withFiles(t)
	if got := session.Status(); got.Identity.Source != "files" || got.Identity.SPIFFE != "" || got.Initialized || got.Address != "127.0.0.1:1" {
		t.Errorf("before the start: %+v", got)
	}
	run(t, session)
	nettest.Eventually(t, "the identity and a failed stream", func() bool {
		s := session.Status()
		return s.Identity.SPIFFE == "spiffe://cluster.local/ns/shop/sa/web" && s.Stream.LastError != nil && s.Stream.Failed > 0
	})
	(*handler)(session).Update(xds.Update{Type: xds.Clusters, Resources: []xds.Resource{{Name: "c", TypeURL: xds.Clusters.URL(), Value: wire.AppendString(nil, 1, "c")}}})
	if got := session.Status().Counts[xds.Clusters]; got.Bytes != 3 || got.Last != 3 || got.Decoded <= 0 {
		t.Errorf("counts %+v", got)
	}
}

// Parts of resources are shared until updates have paused.
func TestWhatIsSharedIsForgottenWhenUpdatesPause(t *testing.T) {
	freed := 0
	session := withFiles(t)
	session.config.FreeMemory = func() { freed++ }
	outliers := func(name string) *mesh.Outliers {
		value := join(text(1, name), number(2, uint64(mesh.OriginalDestination)), nest(nest(number(1, 7), 1), 19))
		(*handler)(session).Update(xds.Update{Type: xds.Clusters, Resources: []xds.Resource{{Name: name, TypeURL: xds.Clusters.URL(), Value: value}}})
		return session.config.Store.current.Cluster(name).Outliers
	}
	first := outliers("a")
	if outliers("b") != first || first.Consecutive5xx != 7 {
		t.Error("equal parts are not shared")
	}
	session.tidy()
	if outliers("c") == first || freed != 1 {
		t.Errorf("parts are remembered; memory was freed %d times", freed)
	}
}
