package controlplane

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/envoyproxy/go-control-plane/pkg/cache/v3"

	"github.com/pillion-proxy/pillion/e2e/testdata/controlplane/ca"
	"github.com/pillion-proxy/pillion/internal/controlplane"
	"github.com/pillion-proxy/pillion/internal/istiod"
	"github.com/pillion-proxy/pillion/internal/xds"
)

// injected returns the directory of a pod with the volumes that the injector mounts, and its variables.
func injected(t *testing.T, authority *ca.Authority) *istiod.Environment {
	t.Helper()
	e := &istiod.Environment{Directory: t.TempDir(), Variables: []string{
		"POD_NAME=web-1", "POD_NAMESPACE=shop", "INSTANCE_IP=192.0.2.1", "SERVICE_ACCOUNT=web", "ISTIO_META_CLUSTER_ID=Kubernetes",
	}}
	for path, text := range map[string]string{istiod.TokenFile: "secret\n", "var/run/secrets/istio/root-cert.pem": string(authority.RootPEM())} {
		path = filepath.Join(e.Directory, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return e
}

// hold starts a session of an injected pod with p.
func hold(t *testing.T, p *plane, e *istiod.Environment) *controlplane.Session {
	t.Helper()
	pod, err := istiod.ReadPod(t.Context(), p.address, e)
	if err != nil {
		t.Fatal(err)
	}
	store, err := controlplane.NewStore(controlplane.StoreConfig{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	session, err := controlplane.NewSession(controlplane.SessionConfig{Pod: pod, Store: store, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { session.Run(ctx); close(done) }()
	t.Cleanup(func() { cancel(); <-done })
	return session
}

// awaitStatus waits until the session's status is as wanted.
func awaitStatus(t *testing.T, session *controlplane.Session, what string, is func(*controlplane.Status) bool) controlplane.Status {
	t.Helper()
	ticker := time.NewTicker(10 * time.Millisecond)
	defer ticker.Stop()
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); <-ticker.C {
		if status := session.Status(); is(&status) {
			return status
		}
	}
	t.Fatalf("%s: %+v", what, session.Status())
	panic("unreachable")
}

// awaitClusters waits until the configuration in force has the clusters with these names.
func awaitClusters(t *testing.T, session *controlplane.Session, names ...string) {
	t.Helper()
	awaitStatus(t, session, strings.Join(names, " and "), func(*controlplane.Status) bool {
		if session.Snapshot() == nil {
			return false
		}
		var got []string
		for name := range session.Snapshot().Clusters() {
			got = append(got, name)
		}
		return slices.Equal(got, names)
	})
}

func newAuthority(t *testing.T, token string) *ca.Authority {
	t.Helper()
	authority, err := ca.New(token)
	if err != nil {
		t.Fatal(err)
	}
	return authority
}

// secured starts a plane with TLS and a CA.
func secured(t *testing.T) *plane {
	t.Helper()
	p := &plane{cache: cache.NewSnapshotCache(true, cache.IDHash{}, nil), address: "127.0.0.1:0", wake: make(chan struct{}, 1), ca: newAuthority(t, "secret")}
	p.start(t)
	t.Cleanup(func() { p.server.Stop() })
	return p
}

func TestAnInjectedPodGetsItsIdentityAndItsConfiguration(t *testing.T) {
	bothProtocols(t, testInjectedPod)
}

func testInjectedPod(t *testing.T, delta bool) {
	p := secured(t)
	p.serve(t, "1", "cart", "web")
	environment := injected(t, p.ca)
	environment.Variables = append(environment.Variables, "ISTIO_DELTA_XDS="+strconv.FormatBool(delta))
	session := hold(t, p, environment)
	awaitClusters(t, session, "cart", "web")
	status := awaitStatus(t, session, "an identity", func(s *controlplane.Status) bool { return s.Identity.SPIFFE != "" && s.Initialized })
	if got := status.Identity; got.SPIFFE != "spiffe://cluster.local/ns/shop/sa/web" || got.Source != "CA" || got.Renewals != 1 || got.NotAfter.IsZero() {
		t.Errorf("identity %+v", got)
	}
	if status.Address != p.address || !status.Stream.Connected || status.LastPush.IsZero() {
		t.Errorf("status %+v", status)
	}
	if clusters := status.Stream.Types[xds.Clusters]; clusters.Held != 2 || status.Counts[xds.Clusters].Bytes == 0 {
		t.Errorf("clusters %+v, counts %+v", clusters, status.Counts[xds.Clusters])
	}
	if session.Identity() == nil || session.Identity().SPIFFE != status.Identity.SPIFFE {
		t.Errorf("identity %v", session.Identity())
	}
}

func TestAConfigurationArrivesWithoutTheCA(t *testing.T) {
	p := secured(t)
	p.ca.SetAway(true)
	p.serve(t, "1", "web")
	session := hold(t, p, injected(t, p.ca))
	awaitClusters(t, session, "web")
	if session.Identity() != nil {
		t.Error("an identity without a CA")
	}
	p.ca.SetAway(false)
	awaitStatus(t, session, "an identity", func(s *controlplane.Status) bool { return s.Identity.SPIFFE != "" })
}

func TestALostControlPlaneLeavesEverythingInForce(t *testing.T) {
	p := secured(t)
	p.serve(t, "1", "web")
	session := hold(t, p, injected(t, p.ca))
	awaitClusters(t, session, "web")
	awaitStatus(t, session, "an identity", func(s *controlplane.Status) bool { return s.Identity.SPIFFE != "" })
	p.server.Stop()
	status := awaitStatus(t, session, "a lost stream", func(s *controlplane.Status) bool { return !s.Stream.Connected })
	if status.Stream.LastError == nil || !status.Initialized || status.Identity.SPIFFE == "" || status.Stream.Types[xds.Clusters].Held != 1 {
		t.Errorf("status %+v", status)
	}
	p.start(t)
	p.serve(t, "2", "cart")
	awaitClusters(t, session, "cart")
}

// A root that is not istiod's is found in a file that is read for each stream, so that a mended one is used.
func TestAnIstiodThatTheRootsDoNotVerifyIsRefused(t *testing.T) {
	p := secured(t)
	p.serve(t, "1", "web")
	e := injected(t, newAuthority(t, ""))
	session := hold(t, p, e)
	awaitStatus(t, session, "a failure", func(s *controlplane.Status) bool { return s.Stream.LastError != nil && s.Stream.Failures > 0 })
	if err := os.WriteFile(filepath.Join(e.Directory, "var/run/secrets/istio/root-cert.pem"), p.ca.RootPEM(), 0o600); err != nil {
		t.Fatal(err)
	}
	awaitClusters(t, session, "web")
}
