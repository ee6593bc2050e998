package podinfo

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func TestClusterDomain(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{"search shop.svc.cluster.local svc.cluster.local cluster.local\nnameserver 10.96.0.10\noptions ndots:5\n", "cluster.local"},
		{"nameserver 10.96.0.10\nsearch shop.svc.k8s.example svc.k8s.example k8s.example corp.example\n", "k8s.example"},
		{"search\tSHOP.svc.K8S.example.\tsvc.K8S.example.\n", "k8s.example"},
		{"search svc.old.example\nsearch svc.new.example\n", "new.example"}, // the last list counts
		{"search svc.old.example\nsearch corp.example\n", "cluster.local"},
		{"search corp.example lan\nnameserver 203.0.113.1\n", "cluster.local"},
		{"# search svc.k8s.example\nsearch svc.\n", "cluster.local"},
		{"", "cluster.local"},
	} {
		path := filepath.Join(t.TempDir(), "resolv.conf")
		if err := os.WriteFile(path, []byte(c.text), 0o644); err != nil {
			t.Fatal(err)
		}
		if got := ClusterDomain(path); got != c.want {
			t.Errorf("%q: %q, want %q", c.text, got, c.want)
		}
	}
	path := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(path, []byte("search old\nnameserver 203.0.113.1\nsearch Shop.svc.k8s.example. svc.k8s.example\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if got := SearchList(path); !slices.Equal(got, []string{"shop.svc.k8s.example", "svc.k8s.example"}) {
		t.Errorf("search list %q", got)
	}
	if got := ClusterDomain(filepath.Join(t.TempDir(), "missing")); got != "cluster.local" {
		t.Errorf("without a file: %q", got)
	}
}
