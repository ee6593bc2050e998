package controlplane

import (
	"log/slog"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/controlplane"
	"github.com/pillion-proxy/pillion/internal/mesh"
)

func newStore(t *testing.T) *controlplane.Store {
	t.Helper()
	s, err := controlplane.NewStore(controlplane.StoreConfig{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// awaitInForce waits until the clusters in force are those with the names, each with its endpoints.
func awaitInForce(t *testing.T, s *controlplane.Store, want ...string) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		got := clustersOf(s.Snapshot())
		if got == strings.Join(want, " ") {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("in force: %s, want %q", got, want)
		}
		time.Sleep(time.Millisecond)
	}
}

func clustersOf(s *mesh.Snapshot) string {
	if s == nil {
		return "nothing"
	}
	var names []string
	for name, c := range s.Clusters() {
		if s.Hosts(c) == nil {
			name += " without endpoints"
		}
		names = append(names, name)
	}
	return strings.Join(names, " ")
}

func TestAStoreFollowsTheControlPlane(t *testing.T) {
	bothProtocols(t, func(t *testing.T, delta bool) {
		p, s := startPlane(t), newStore(t)
		p.serve(t, "1", "cart", "web")
		run(t, p, delta, s)
		awaitInForce(t, s, "cart", "web")
		p.serve(t, "2", "pay", "web")
		awaitInForce(t, s, "pay", "web")
		p.server.Stop()
		p.start(t)
		p.serve(t, "3", "pay")
		awaitInForce(t, s, "pay")
		p.mu.Lock()
		defer p.mu.Unlock()
		if len(p.rejected) > 0 {
			t.Errorf("rejected: %q", p.rejected)
		}
	})
}

// An agent that is restarted has the last configuration while the control plane is away. Whatever was removed in the
// meantime goes with the first answers: the agent asks as one that holds nothing.
func TestAKeptConfigurationBridgesARestart(t *testing.T) {
	bothProtocols(t, func(t *testing.T, delta bool) {
		p, before := startPlane(t), newStore(t)
		p.serve(t, "1", "cart", "web")
		t.Run("before", func(t *testing.T) {
			run(t, p, delta, before)
			awaitInForce(t, before, "cart", "web")
		})
		kept := &controlplane.Kept{Path: filepath.Join(t.TempDir(), "kept"), Node: nodeID, Cluster: "Kubernetes"}
		if err := kept.Save(before.LastGood()); err != nil {
			t.Fatal(err)
		}
		p.server.Stop()
		after := newStore(t)
		if !kept.Restore(after, slog.New(slog.DiscardHandler)) {
			t.Fatal("not restored")
		}
		run(t, p, delta, after)
		awaitInForce(t, after, "cart", "web")
		p.serve(t, "2", "pay", "web")
		p.start(t)
		awaitInForce(t, after, "pay", "web")
	})
}
