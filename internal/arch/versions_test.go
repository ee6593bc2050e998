package arch

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// The first versions of Kubernetes with a feature by default.
const (
	nativeSidecars = "1.29" // restartPolicy: Always of init containers (feature gate SidecarContainers)
	preStopSleep   = "1.30" // lifecycle.preStop.sleep (feature gate PodLifecycleSleepAction); the webhook's pods use it
)

// versionStatements are all places that name a version of Kubernetes. Line breaks and comment marks count as a space.
var versionStatements = []struct{ file, text string }{
	{"README.md", "Kubernetes enables native sidecars since " + nativeSidecars + "; `--classic` supports older versions."},
	{"docs/inject.md", "make the agent an ordinary container, for Kubernetes before " + nativeSidecars},
	{"docs/kubernetes.md", "Kubernetes enables native sidecars since " + nativeSidecars + ". The webhook's own Deployment needs " + preStopSleep + ","},
	{"docs/kubernetes.md", "the classic form, for the webhook on Kubernetes before " + preStopSleep},
	{"cmd/pillionctl/inject.go", "make the agent an ordinary container, for Kubernetes before " + nativeSidecars},
	{"internal/inject/options.go", "Classic makes the agent an ordinary container, for Kubernetes before " + nativeSidecars},
	{"deploy/helm/pillion/values.yaml", "the agent is a native sidecar (enabled by default from Kubernetes " + nativeSidecars + "), and the webhook's pods have a preStop sleep (from " + preStopSleep + ")."},
	{"deploy/helm/pillion/templates/webhook.yaml", `(semverCompare "<` + preStopSleep + `.0-0" .Capabilities.KubeVersion.Version)`},
	{"deploy/helm/pillion/templates/webhook.yaml", "is older than " + preStopSleep + ": use --set classic=true"},
	{"deploy/kustomize/overlays/classic/kustomization.yaml", "For Kubernetes before " + preStopSleep + ": the agent is an ordinary container, and the webhook's pods have no preStop sleep."},
	{"deploy/kustomize/overlays/example-classic/kustomization.yaml", "pillion as a container beside it, for Kubernetes before " + nativeSidecars},
}

var (
	breaks            = regexp.MustCompile(`\s*\n[\s#/]*|\s+`)
	kubernetesVersion = regexp.MustCompile(`(?i)(?:Kubernetes|since|before|from|needs|than|"<) ?v?1\.[23]\d\b`)
)

func TestVersionsOfKubernetesAreTheSameEverywhere(t *testing.T) {
	out, err := exec.Command("git", "-C", root, "ls-files", "-co", "--exclude-standard").Output()
	if err != nil {
		t.Fatalf("listing the files: %v", err)
	}
	texts := make(map[string]string)
	for _, name := range strings.Fields(string(out)) {
		switch filepath.Ext(name) {
		case ".md", ".yaml", ".yml", ".go", ".tpl", ".txt":
		default:
			continue
		}
		if strings.HasSuffix(name, "_test.go") || strings.Contains(name, "testdata/") {
			continue
		}
		text, err := os.ReadFile(filepath.Join(root, name))
		if os.IsNotExist(err) {
			continue // deleted in the work tree
		} else if err != nil {
			t.Fatal(err)
		}
		texts[name] = breaks.ReplaceAllString(string(text), " ")
	}
	for _, s := range versionStatements {
		if !strings.Contains(texts[s.file], s.text) {
			t.Errorf("%s does not state %q", s.file, s.text)
		}
		texts[s.file] = strings.ReplaceAll(texts[s.file], s.text, "")
	}
	for name, text := range texts {
		for _, match := range kubernetesVersion.FindAllString(text, -1) {
			t.Errorf("%s: %q is not in the table of this test; add the statement, with the version of the feature", name, match)
		}
	}
}
