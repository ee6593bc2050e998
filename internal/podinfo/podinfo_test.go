package podinfo

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

// read calls Read with these variables and a file of labels; with "none" the file does not exist.
func read(t *testing.T, env map[string]string, labels string) (Pod, error) {
	t.Helper()
	name := filepath.Join(t.TempDir(), "labels")
	if labels != "none" {
		if err := os.WriteFile(name, []byte(labels), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return Read(func(name string) string { return env[name] }, name)
}

func TestAnInjectedPodIsIdentified(t *testing.T) {
	got, err := read(t, map[string]string{
		"POD_NAME": "reviews-v1-6d4b75cb6d-hswz6", "POD_NAMESPACE": "shop", "INSTANCE_IP": "198.51.100.7",
		"SERVICE_ACCOUNT": "reader", "ISTIO_META_WORKLOAD_NAME": "reviews-v1",
		"ISTIO_META_OWNER":      "kubernetes://apis/apps/v1/namespaces/shop/deployments/reviews-v1",
		"ISTIO_META_CLUSTER_ID": "Kubernetes", "ISTIO_META_MESH_ID": "cluster.local", "TRUST_DOMAIN": "td",
	}, `app="reviews"
pod-template-hash="6d4b75cb6d"
service.istio.io/canonical-name="reviews-service"
service.istio.io/canonical-revision="v1"
version="v1.2"
`)
	want := Pod{"reviews-v1-6d4b75cb6d-hswz6", "shop", "198.51.100.7", "reader", "reviews-v1", "reviews", "v1.2",
		"reviews-service", "v1", "Kubernetes", "cluster.local"}
	if err != nil || got != want {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestWithoutAPodAllIsUnknown(t *testing.T) {
	got, err := read(t, nil, "none")
	u := Unknown
	if want := (Pod{u, u, u, u, u, u, u, u, Latest, u, u}); err != nil || got != want {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestCanonicalNames(t *testing.T) {
	env := map[string]string{"ISTIO_META_WORKLOAD_NAME": "w"}
	for _, c := range []struct{ labels, service, revision string }{
		{``, "w", "latest"},
		{"app=\"a\"\nversion=\"1\"", "a", "1"},
		{"app=\"a\"\napp.kubernetes.io/name=\"k\"\nversion=\"1\"\napp.kubernetes.io/version=\"2\"", "k", "2"},
		{"app.kubernetes.io/name=\"k\"\nservice.istio.io/canonical-name=\"c\"\nservice.istio.io/canonical-revision=\"3\"", "c", "3"},
		{`app=""`, "w", "latest"},
	} {
		if got, err := read(t, env, c.labels); err != nil || got.CanonicalService != c.service || got.CanonicalRevision != c.revision {
			t.Errorf("%q: %+v, %v", c.labels, got, err)
		}
	}
	env["CANONICAL_SERVICE"], env["CANONICAL_REVISION"] = "e", "4"
	if got, _ := read(t, env, `app="a"`); got.CanonicalService != "e" || got.CanonicalRevision != "4" {
		t.Errorf("from the environment: %+v", got)
	}
}

func TestWorkloads(t *testing.T) {
	for _, c := range []struct{ owner, pod, want string }{
		{"kubernetes://apis/apps/v1/namespaces/shop/deployments/reviews", "x", "reviews"},
		{"", "reviews-6d4b75cb6d-hswz6", "reviews"},
		{"", "reviews-v1-6d4b75cb6d-hswz6", "reviews-v1"},
		{"", "db-0", "db"},
		{"", "agent-hswz6", "agent"},               // a DaemonSet or a Job
		{"", "report-29017320-hswz6", "report"},    // a CronJob
		{"", "long-name-proxy", "long-name-proxy"}, // words have vowels
		{"", "app-inj", "app-inj"},
		{"", "-hswz6", "-hswz6"},
		{"", "app", "app"},
		{"", "", Unknown},
	} {
		got, _ := read(t, map[string]string{"ISTIO_META_OWNER": c.owner, "POD_NAME": c.pod}, "none")
		if got.Workload != c.want {
			t.Errorf("%q, %q: workload %q, want %q", c.owner, c.pod, got.Workload, c.want)
		}
	}
}

func TestAMalformedFileReturnsItsValidLinesAndAnError(t *testing.T) {
	for _, c := range []struct{ labels, message string }{
		{"app=\"a\"\nversion", "line 2"},
		{"junk\napp=\"a\"\nmore junk", "line 1"},
		{"version='1'\napp=\"a\"", "line 1"},
		{"=\"1\"\napp=\"a\"", "line 1"},
		{"app=\"a\"\nversion=\"" + strings.Repeat("v", 2*maxLabels), `line 2 is not key="value"`},
	} {
		got, err := read(t, nil, c.labels)
		if err == nil || !strings.Contains(err.Error(), c.message) || len(err.Error()) > 1000 {
			t.Errorf("%.50q: error %v", c.labels, err)
		}
		if got.App != "a" || got.Version != Unknown {
			t.Errorf("%.50q: %+v", c.labels, got)
		}
	}
	if got, err := Read(func(string) string { return "" }, t.TempDir()); err == nil || got.App != Unknown {
		t.Errorf("a directory: %+v, %v", got, err)
	}
}

func FuzzLabels(f *testing.F) {
	f.Add("app=\"a\\nb\"\nversion=\"\\xff\"\n")
	f.Add("=\n\"=\"\n\na=\"")
	f.Fuzz(func(t *testing.T, text string) {
		labels, _ := parseLabels(strings.NewReader(text))
		for key, value := range labels {
			if key == "" || !utf8.ValidString(value) {
				t.Errorf("%q=%q", key, value)
			}
		}
	})
}
