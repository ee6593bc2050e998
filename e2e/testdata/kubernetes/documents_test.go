package kubernetes

import (
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"helm.sh/helm/v3/pkg/strvals"
	"sigs.k8s.io/yaml"

	"github.com/pillion-proxy/pillion/e2e/testdata/kubernetes/decode"
)

// shown returns the YAML blocks of a document.
func shown(t *testing.T, document string) (texts []string) {
	t.Helper()
	for _, m := range regexp.MustCompile("(?s)```yaml\n(.*?)```").FindAllStringSubmatch(read(t, document), -1) {
		texts = append(texts, m[1])
	}
	if len(texts) == 0 {
		t.Fatalf("%s has no YAML block", document)
	}
	return texts
}

func read(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(root + "/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestManifestsInDocumentsAreValid(t *testing.T) {
	for _, text := range shown(t, "docs/inject.md") {
		typed, err := decode.Stream(strings.NewReader(text))
		if err != nil || len(typed) != 1 {
			t.Errorf("%v\n%s", err, text)
		}
	}
	for _, text := range shown(t, "docs/kubernetes.md") {
		built := build(t, checkout(t, text))
		all := objects(t, built)
		if all["Deployment istio-ingress/istio-ingressgateway"] != nil {
			if !strings.Contains(string(built), "image: registry.example/pillion:1\n") {
				t.Errorf("the gateway has another image:\n%s", built)
			}
			continue
		}
		for _, want := range []string{"image: registry.example/pillionctl:1\n", "- --image=registry.example/pillion:1\n", "- --issue-certificate\n"} {
			if !strings.Contains(string(built), want) {
				t.Errorf("its output has no %q", want)
			}
		}
		for _, want := range []string{"PodMonitor", "PrometheusRule", "ConfigMap", "Deployment", "Namespace"} {
			if !slices.ContainsFunc(slices.Collect(maps.Keys(all)), func(name string) bool { return strings.HasPrefix(name, want+" ") }) {
				t.Errorf("it makes no %s", want)
			}
		}
	}
}

func TestCommandsInDocumentsInstallTheChart(t *testing.T) {
	commands := regexp.MustCompile(`(?m)^    helm install pillion deploy/helm/pillion -n pillion-system --create-namespace (.*)$`).FindAllStringSubmatch(read(t, "docs/kubernetes.md"), -1)
	if len(commands) == 0 {
		t.Fatal("docs/kubernetes.md has no helm command")
	}
	for _, command := range commands {
		v := values{}
		for setting := range strings.SplitSeq(command[1], "--set ") {
			if err := strvals.ParseInto(strings.TrimSpace(setting), v); err != nil {
				t.Fatal(err)
			}
		}
		if text := string(rendered(t, v)); !strings.Contains(text, `"registry.example/pillionctl:1"`) || !strings.Contains(text, `"--image=registry.example/pillion:1"`) {
			t.Errorf("%v makes\n%s", v, text)
		}
	}
}

func TestTheDocumentHasEachValue(t *testing.T) {
	tables := strings.Split(read(t, "docs/kubernetes.md"), "| Value | Default | Meaning |\n")
	compareValues(t, "deploy/helm/pillion/values.yaml", tables[1], "tls", "podMonitor", "prometheusRule", "dashboard", "networkPolicy", "sidecar")
	compareValues(t, "deploy/helm/pillion-gateway/values.yaml", tables[2])
}

// compareValues compares the values of a chart with a table of the document. Those of nested have rows of their own.
func compareValues(t *testing.T, file, table string, nested ...string) {
	t.Helper()
	var all values
	if err := yaml.UnmarshalStrict([]byte(read(t, file)), &all); err != nil {
		t.Fatal(err)
	}
	var want []string
	for name, value := range all {
		if parts, ok := value.(values); ok && slices.Contains(nested, name) {
			for part := range parts {
				want = append(want, name+"."+part)
			}
		} else {
			want = append(want, name)
		}
	}
	var got []string
	table, _, _ = strings.Cut(table, "\n\n")
	for row := range strings.Lines(table) {
		first, _, _ := strings.Cut(strings.TrimPrefix(row, "| "), " | ")
		for _, name := range regexp.MustCompile("`([^`]*)`").FindAllStringSubmatch(first, -1) {
			got = append(got, name[1])
		}
	}
	slices.Sort(want)
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Errorf("the table has\n%v\n%s has\n%v", got, file, want)
	}
}
