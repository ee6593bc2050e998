package inject

import (
	"bytes"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/yamledit"
)

var update = flag.Bool("update", false, "write the golden files")

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(nettest.Main(m))
}

// inputs are the manifests of testdata/in by their names.
func inputs(t testing.TB) map[string][]byte {
	t.Helper()
	names, err := filepath.Glob("testdata/in/*")
	if err != nil || len(names) < 25 {
		t.Fatalf("%d inputs: %v", len(names), err)
	}
	all := make(map[string][]byte)
	for _, name := range names {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		all[filepath.Base(name)] = text
	}
	return all
}

// optionsOf are those for an input.
func optionsOf(name string) Options {
	return Options{Image: "pillion", Classic: strings.HasPrefix(name, "classic")}
}

// injected injects, with the warnings as text.
func injected(t testing.TB, name string, text []byte) (out []byte, warnings string) {
	t.Helper()
	out, err := Inject(text, name, optionsOf(name), func(w string) { warnings += w + "\n" })
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return out, warnings
}

func uninjected(t testing.TB, name string, text []byte) []byte {
	t.Helper()
	out, err := Uninject(text, name, func(w string) { t.Errorf("%s: %s", name, w) })
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return out
}

func TestManifestsAreInjectedAsTheGoldenFilesHaveIt(t *testing.T) {
	for name, text := range inputs(t) {
		out, warnings := injected(t, name, text)
		for golden, got := range map[string]string{"testdata/out/" + name: string(out), "testdata/warnings/" + name: warnings} {
			if *update {
				os.Remove(golden)
				if got != "" {
					if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
						t.Fatal(err)
					}
				}
				continue
			}
			want, err := os.ReadFile(golden)
			if err != nil && got != "" {
				t.Fatal(err)
			}
			if string(want) != got {
				t.Errorf("%s is not what it was; -update writes it. Now:\n%s", golden, got)
			}
		}
	}
}

// restyled are other ways to write a manifest.
func restyled(t testing.TB, text []byte) map[string][]byte {
	t.Helper()
	all := map[string][]byte{
		"as it is":       text,
		"CRLF":           bytes.ReplaceAll(bytes.ReplaceAll(text, []byte("\r\n"), []byte("\n")), []byte("\n"), []byte("\r\n")),
		"no last break":  bytes.TrimRight(text, "\r\n"),
		"after a marker": append([]byte("---\n"), text...),
	}
	if !bytes.HasPrefix(text, []byte("%")) && !bytes.HasPrefix(text, []byte(byteOrderMark)) {
		all["behind another"] = append([]byte("kind: Other\n---\n"), text...)
	} else {
		delete(all, "after a marker")
	}
	// Each line gets a comment where one may be.
	var commented []string
	for line := range strings.Lines(string(text)) {
		if bare := strings.TrimRight(line, "\r\n"); strings.HasSuffix(bare, ":") || strings.HasSuffix(bare, "}") {
			line = bare + " # here\n" + strings.Repeat(" ", len(bare)-len(strings.TrimLeft(bare, " -"))) + "# and there\n"
		}
		commented = append(commented, line)
	}
	if text[0] != '{' && text[0] != '%' {
		all["with comments"] = []byte(strings.Join(commented, ""))
	}
	// As other programs would write it: everything in order of keys, in JSON or in block style.
	if d, err := yamledit.Parse(string(text)); err == nil && d.Tree() != nil && len(yamledit.Split(text)) == 1 {
		if tree, ok := d.Tree().(map[string]any); ok {
			all["JSON"] = []byte(yamledit.JSON(tree))
			for _, indent := range []int{2, 4} {
				all[fmt.Sprintf("indented by %d", indent)] = encoded(t, yamledit.JSON(tree), indent)
				all[fmt.Sprintf("in its order, indented by %d", indent)] = encoded(t, string(text), indent)
			}
		}
	}
	return all
}

// encoded returns a document as yaml.v3 writes it in block style.
func encoded(t testing.TB, text string, indent int) []byte {
	t.Helper()
	var n yaml.Node
	if err := yaml.Unmarshal([]byte(text), &n); err != nil {
		t.Fatal(err)
	}
	if text[0] == '{' {
		inBlockStyle(&n)
	}
	var out bytes.Buffer
	encoder := yaml.NewEncoder(&out)
	encoder.SetIndent(indent)
	if err := encoder.Encode(n.Content[0]); err != nil {
		t.Fatal(err)
	}
	encoder.Close()
	return out.Bytes()
}

func inBlockStyle(n *yaml.Node) {
	n.Style &^= yaml.FlowStyle
	for _, child := range n.Content {
		inBlockStyle(child)
	}
}

func TestUninjectionGivesEveryByteBackAndASecondInjectionChangesNothing(t *testing.T) {
	for name, text := range inputs(t) {
		for style, text := range restyled(t, text) {
			what := name + ", " + style
			if (name == "job.yaml" || name == "classic-job.yaml") && style == "no last break" {
				_, err := Inject(text, name, optionsOf(name), func(string) {})
				if err == nil || !strings.Contains(err.Error(), "end the text with a line break") {
					t.Errorf("%s: %v", what, err) // it would be another script
				}
				continue
			}
			out, _ := injected(t, name, text)
			if bytes.Equal(out, text) != strings.Contains("daemonset-host-network.yaml left-alone.yaml", name) {
				t.Errorf("%s: changed: %v", what, !bytes.Equal(out, text))
			}
			if again, _ := injected(t, name, out); !bytes.Equal(again, out) {
				t.Errorf("%s: a second injection changes something:\n%s", what, again)
			}
			if back := uninjected(t, what, out); !bytes.Equal(back, text) {
				t.Errorf("%s: it was\n%q\nand became\n%q\nby way of\n%s", what, text, back, out)
			}
			if back := uninjected(t, what, text); !bytes.Equal(back, text) {
				t.Errorf("%s: what was not injected is changed:\n%s", what, back)
			}
		}
	}
}

// Every line of the input is in the output, in the same order, but for those of probes and Prometheus' annotations.
func TestLinesThatNeedNotChangeStayInTheirOrder(t *testing.T) {
	for name, text := range inputs(t) {
		if !strings.HasSuffix(name, ".yaml") || strings.Contains("flow.yaml daemonset.yaml unicode.yaml empty-collections.yaml null-metadata.yaml replicaset.yaml", name) {
			continue // these are changed within their lines
		}
		out, _ := injected(t, name, text)
		var kept []string
		for line := range strings.Lines(string(text)) {
			if !strings.Contains(line, "prometheus.io/port") && !strings.Contains(name, "probes") && !strings.Contains(name, "lifecycle") {
				kept = append(kept, strings.TrimRight(line, "\r\n"))
			}
		}
		if name == "deployment.yaml" || name == "classic.yaml" {
			kept = slices.DeleteFunc(kept, func(line string) bool {
				return strings.Contains(line, "path: /ready") || strings.Contains(line, "port: http") || strings.Contains(line, "livenessProbe")
			})
		}
		if name == "cronjob.yaml" {
			kept = slices.DeleteFunc(kept, func(line string) bool { return strings.Contains(line, "annotations:") })
		}
		for line := range strings.Lines(string(out)) {
			if len(kept) > 0 && strings.TrimRight(line, "\r\n") == kept[0] {
				kept = kept[1:]
			}
		}
		if len(kept) > 0 {
			t.Errorf("%s: the line %q, or the order of lines, is lost", name, kept[0])
		}
	}
}

// What has been through an API server comes back in another form.
func TestUninjectionWorksOnWhatOthersHaveRewritten(t *testing.T) {
	for name, text := range inputs(t) {
		if len(yamledit.Split(text)) > 1 {
			continue
		}
		before, err := yamledit.Parse(strings.TrimPrefix(string(text), byteOrderMark))
		if err != nil {
			t.Fatal(err)
		}
		out, _ := injected(t, name, text)
		after, err := yamledit.Parse(strings.TrimPrefix(string(out), byteOrderMark))
		if err != nil {
			t.Fatal(err)
		}
		for _, form := range []string{yamledit.JSON(after.Tree()), string(encoded(t, yamledit.JSON(after.Tree()), 2))} {
			back, err := yamledit.Parse(string(uninjected(t, name, []byte(form))))
			if err != nil || !reflect.DeepEqual(back.Tree(), before.Tree()) {
				t.Errorf("%s: %v\n%s", name, err, uninjected(t, name, []byte(form)))
			}
		}
	}
}

func TestUninjectionLeavesWhatOthersHaveChanged(t *testing.T) {
	out, _ := injected(t, "pod.yaml", inputs(t)["pod.yaml"])
	edited := strings.NewReplacer(
		"  annotations:\n", "  annotations:\n    restarted: now\n",
		"  volumes:\n", "  volumes:\n  - name: mine\n    emptyDir: {}\n",
		"  initContainers:\n", "  initContainers:\n  - name: mine\n    image: x\n",
	).Replace(string(out))
	back := uninjected(t, "edited", []byte(edited))
	want := `apiVersion: v1
kind: Pod
metadata:
  name: one
  annotations:
    restarted: now
spec:
  containers:
  - name: app
    image: app:1
  initContainers:
  - name: mine
    image: x
  volumes:
  - name: mine
    emptyDir: {}
`
	if string(back) != want {
		t.Errorf("%s", back)
	}
}

func TestWhatCannotBeInjectedIsSaidWithItsRemedyAndNothingIsWritten(t *testing.T) {
	pod := func(annotations, spec string) string {
		return "apiVersion: v1\nkind: Pod\nmetadata:\n  name: bad\n  annotations: {" + annotations + "}\nspec: {" + spec + "}\n"
	}
	app := "containers: [{name: app, image: x}]"
	for _, c := range []struct{ text, want string }{
		{pod(`sidecar.istio.io/inject: "yes"`, app), `Pod bad (document 1 of in.yaml): annotation sidecar.istio.io/inject: "yes" is neither on nor off: use "true" or "false"`},
		{pod(`sidecar.istio.io/interceptionMode: NONE`, app), `annotation sidecar.istio.io/interceptionMode: "NONE" is not a mode: use REDIRECT or TPROXY`},
		{pod(`traffic.sidecar.istio.io/excludeInboundPorts: "80x"`, app), `annotation traffic.sidecar.istio.io/excludeInboundPorts: "80x" is not a port: use a number from 1 to 65535`},
		{pod(`traffic.sidecar.istio.io/excludeInboundPorts: 80`, app), `annotation traffic.sidecar.istio.io/excludeInboundPorts: it is no string: put quotes around the value`},
		{pod(`traffic.sidecar.istio.io/includeOutboundIPRanges: "10.0.0.0"`, app), `"10.0.0.0" is not a network`},
		{pod(`traffic.sidecar.istio.io/kubevirtInterfaces: "a b;c"`, app), `is not an interface`},
		{pod(`sidecar.istio.io/proxyCPU: lots`, app), `"lots" is not a quantity: use one such as 100m or 64Mi`},
		{pod(`sidecar.istio.io/proxyCPU: "2", sidecar.istio.io/proxyCPULimit: "1"`, app), `"2" is more than the limit of 1`},
		{pod(`status.sidecar.istio.io/port: "15021"`, app), `the sidecar has another use for port 15021`},
		{pod(`proxy.istio.io/config: "a: ["`, app), `annotation proxy.istio.io/config: not valid YAML`},
		{pod(`proxy.istio.io/config: "concurrency: many"`, app), `concurrency: many is not a count`},
		{pod(`proxy.istio.io/config: "terminationDrainDuration: 60s"`, app), `1m0s is longer than terminationGracePeriodSeconds (30s)`},
		{pod(`proxy.istio.io/config: "proxyMetadata: {POD_NAME: x}"`, app), `"POD_NAME" cannot be set`},
		{pod(`pillion.dev/opaque-port: "1"`, app), `annotation pillion.dev/opaque-port is unknown: there are pillion.dev/inject, pillion.dev/image, pillion.dev/opaque-ports`},
		{pod(`pillion.dev/drain-delay: 29s`, app), `29s is longer than the drain itself (25s`},
		{pod(`pillion.dev/log-level: loud`, app), `use debug, info, warn or error`},
		{pod(`pillion.dev/access-log: out`, app), `use off, or a path`},
		{pod(`pillion.dev/image: ""`, app), `"" is not an image`},
		{pod(`prometheus.io/port: "15090"`, app), `port 15090 is the agent's own`},
		{pod(`prometheus.io/port: "many"`, app), `port "many" is none`},
		{pod(`pillion.dev/status: "{}"`, app), `says that it has been injected, but there is no container pillion-init: take the annotation out`},
		{pod(``, `containers: []`), `spec.containers is empty`},
		{pod(``, `containers: {}`), `spec.containers is no list`},
		{pod(``, `containers: [{image: x}]`), `spec.containers[0] has no name`},
		{pod(``, `containers: [{name: a}, {name: a}]`), `spec.containers has the name "a" twice`},
		{pod(``, app+`, volumes: [{name: istio-podinfo}]`), `spec.volumes has "istio-podinfo" already: give it another name`},
		{pod(``, app+`, securityContext: {runAsUser: 1337}`), `securityContext.runAsUser is 1337, the sidecar's own`},
		{pod(``, app+`, terminationGracePeriodSeconds: -1`), `terminationGracePeriodSeconds: -1 is no number of seconds`},
		{pod(``, `containers: [{name: a, readinessProbe: {httpGet: {port: 80, scheme: FTP}}}]`), `scheme "FTP": must be HTTP or HTTPS`},
		{"apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: d, namespace: ns}\n", `Deployment ns/d (document 1 of in.yaml): it has no spec.template`},
		{"kind: Pod\nkind: Pod\n", `(document 1 of in.yaml): line 3: duplicate key "kind": remove one`},
		{"a: [\n", `(document 1 of in.yaml): yaml: line`},
		{"{{ template }}\n", `(document 1 of in.yaml): `},
		{"\xff\xfe", `in.yaml is no UTF-8: convert it`},
		{"apiVersion: v1\nkind: Pod\nspec: &s {" + app + "}\ncopy: *s\n", `uses anchors`},
		{"a: &a [x,x,x,x,x,x,x,x,x]\n" + bomb(), `aliases stand for more than 100000 values`},
		{"a: &a [*a]\n", `aliases stand for more than 100000 values`},
	} {
		out, err := Inject([]byte("kind: Good\n---\n"+c.text), "in.yaml", Options{Image: "pillion"}, func(string) {})
		want := strings.NewReplacer("document 1 of in.yaml", "document 2 of in.yaml, from line 2").Replace(c.want)
		if err == nil || !strings.Contains(err.Error(), want) || out != nil {
			t.Errorf("%s\nfails with\n%v\nand not with\n%s", c.text, err, want)
		}
	}
}

// bomb is a few lines that say a billion things.
func bomb() string {
	var b strings.Builder
	for c := 'b'; c <= 'j'; c++ {
		fmt.Fprintf(&b, "%c: &%c [%s]\n", c, c, strings.TrimSuffix(strings.Repeat(fmt.Sprintf("*%c,", c-1), 9), ","))
	}
	return b.String()
}

func TestStatusThatNobodyWroteIsRefused(t *testing.T) {
	for _, status := range []string{
		``, `{}`, `{"version":2}`, `{"version":1,"more":1}`, `[]`, `{"version":1} x`,
		`{"version":1,"replaced":[{"path":"/metadata/annotations","was":"a: [","column":0}]}`,
		`{"version":1,"replaced":[{"path":"/metadata/annotations","was":"a: 1","column":1000000000}]}`,
		`{"version":1,"replaced":[{"path":"/metadata/annotations","was":"a: 1\nb: 2","column":0}]}`,
	} {
		text := "apiVersion: v1\nkind: Pod\nmetadata:\n  annotations:\n    pillion.dev/status: " + yamledit.JSON(status) + "\nspec: {}\n"
		if out, err := Uninject([]byte(text), "x", func(string) {}); err == nil || !strings.Contains(err.Error(), statusAnnotation) {
			t.Errorf("%s: %v\n%s", status, err, out)
		}
	}
}

func TestInputHasABound(t *testing.T) {
	if _, err := Read(io.LimitReader(zeros{}, MaxInput+1), "big"); err == nil || !strings.Contains(err.Error(), "big is larger than 64 MiB") {
		t.Error(err)
	}
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

// decodes reports what Kubernetes' strict decoder does not like.
func decodes(t *testing.T, program, name string, text []byte) {
	t.Helper()
	cmd := exec.Command(program)
	cmd.Stdin = bytes.NewReader(text)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%s: %v: %s", name, err, out)
	}
}

func TestKubernetesReadsWhatIsWritten(t *testing.T) {
	strict := filepath.Join(t.TempDir(), "strict")
	build := exec.Command("go", "build", "-buildvcs=false", "-o", strict, "./strict")
	build.Dir = "../../e2e/testdata/kubernetes"
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building e2e/testdata/kubernetes (make modules fetches what it needs): %v\n%s", err, out)
	}
	for name, text := range inputs(t) {
		if name == "directives.yaml" {
			continue // kubectl cannot read that at all
		}
		out, _ := injected(t, name, text)
		decodes(t, strict, name, out)
	}
}

func TestTheExamplesOfDeployAreWhatInjectWrites(t *testing.T) {
	const overlays = "../../deploy/kustomize/overlays/"
	text, err := os.ReadFile(overlays + "example/nginx.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for golden, options := range map[string]Options{
		overlays + "example/injected.yaml":         {Image: "pillion"},
		overlays + "example-classic/injected.yaml": {Image: "pillion", Classic: true},
	} {
		got, err := Inject(text, "nginx.yaml", options, func(w string) { t.Error(w) })
		if err != nil {
			t.Fatal(err)
		}
		if *update {
			if err := os.WriteFile(golden, got, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if want, err := os.ReadFile(golden); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s is not what inject writes (%v); -update writes it. Now:\n%s", golden, err, got)
		}
	}
}

func FuzzInject(f *testing.F) {
	for name, text := range inputs(f) {
		f.Add(text, strings.HasPrefix(name, "classic"))
		out, _ := injected(f, name, text)
		f.Add(out, false)
	}
	f.Add([]byte(bomb()), true)
	f.Fuzz(func(t *testing.T, text []byte, classic bool) {
		options := Options{Image: "pillion", Classic: classic}
		if back, err := Uninject(text, "in", func(string) {}); err == nil {
			_, _ = Inject(back, "in", options, func(string) {})
		}
		out, err := Inject(text, "in", options, func(string) {})
		if err != nil {
			return
		}
		again, err := Inject(out, "out", options, func(string) {})
		if err != nil || !bytes.Equal(again, out) {
			t.Errorf("a second injection: %v\n%q\n%q", err, out, again)
		}
		if bytes.Contains(text, []byte("status")) || bytes.Contains(text, []byte(`\`)) {
			return // it may be injected already
		}
		back, err := Uninject(out, "out", func(string) {})
		if err != nil || !bytes.Equal(back, text) {
			t.Errorf("%v: it was\n%q\nand became\n%q\nby way of\n%q", err, text, back, out)
		}
	})
}
