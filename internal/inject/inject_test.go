package inject

import (
	"bytes"
	"errors"
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

// inputs returns the manifests of testdata/in by their names.
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

// optionsOf returns the options for an input.
func optionsOf(name string) Options {
	return Options{Image: "pillion", Classic: strings.HasPrefix(name, "classic")}
}

// memory is an Output.
type memory struct{ strings.Builder }

func (m *memory) Size() int64 { return int64(m.Len()) }

func (m *memory) Truncate(size int64) error {
	kept := m.String()[:size]
	m.Reset()
	m.WriteString(kept)
	return nil
}

// inject and uninject return the text, or "" after an error.
func inject(text, name string, options Options, report func(Outcome)) (string, error) {
	var out memory
	if err := Inject(text, name, options, report, &out); err != nil {
		return "", err
	}
	return out.String(), nil
}

func uninject(text, name string, report func(Outcome)) (string, error) {
	var out memory
	if err := Uninject(text, name, report, &out); err != nil {
		return "", err
	}
	return out.String(), nil
}

// injected returns the injected text, and what is reported of each object.
func injected(t testing.TB, name string, text []byte) (out []byte, reported string) {
	t.Helper()
	injected, err := inject(string(text), name, optionsOf(name), func(o Outcome) {
		reported += fmt.Sprintf("line %d: %s: %s", o.Line, o.Object(), o.Action)
		if o.Reason != "" {
			reported += ": " + o.Reason
		}
		for _, warning := range o.Warnings {
			reported += "\n\twarning: " + warning
		}
		reported += "\n"
	})
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return []byte(injected), reported
}

// ignore is a report that is not of interest.
func ignore(Outcome) {}

func uninjected(t testing.TB, name string, text []byte) []byte {
	t.Helper()
	out, err := uninject(string(text), name, func(o Outcome) {
		if len(o.Warnings) > 0 {
			t.Errorf("%s: %v", name, o.Warnings)
		}
	})
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return []byte(out)
}

func TestInjectedManifestsEqualTheGoldenFiles(t *testing.T) {
	for name, text := range inputs(t) {
		out, reported := injected(t, name, text)
		for golden, got := range map[string]string{"testdata/out/" + name: string(out), "testdata/reports/" + name: reported} {
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
				t.Errorf("%s differs; -update writes it. Now:\n%s", golden, got)
			}
		}
	}
}

// restyled returns a manifest in other styles.
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
	// A comment on each line that may have one.
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
	// As other programs write it: keys sorted, in JSON or in block style.
	if d, err := yamledit.Parse(string(text)); err == nil && d.Tree() != nil && len(yamledit.Split(string(text))) == 1 {
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

func TestUninjectionRestoresEveryByteAndASecondInjectionChangesNothing(t *testing.T) {
	for name, text := range inputs(t) {
		for style, text := range restyled(t, text) {
			what := name + ", " + style
			if (name == "job.yaml" || name == "classic-job.yaml") && style == "no last break" {
				_, err := inject(string(text), name, optionsOf(name), ignore)
				if err == nil || !strings.Contains(err.Error(), "end the text with a line break") {
					t.Errorf("%s: %v", what, err) // adding text would change the script
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
				t.Errorf("%s:\n%q\nbecame\n%q\nby way of\n%s", what, text, back, out)
			}
			if back := uninjected(t, what, text); !bytes.Equal(back, text) {
				t.Errorf("%s: a text without injection was changed:\n%s", what, back)
			}
		}
	}
}

// A List is edited item by item. The result is the same as that of parsing it as a whole.
func TestTheItemsOfAListAreEditedAsInTheWhole(t *testing.T) {
	var items []string
	for name, text := range inputs(t) {
		d, err := yamledit.Parse(strings.TrimPrefix(string(text), byteOrderMark))
		if err != nil || d.Tree() == nil || len(yamledit.Split(string(text))) > 1 || strings.HasPrefix(name, "classic") {
			continue
		}
		items = append(items, yamledit.JSON(d.Tree()))
	}
	slices.Sort(items)
	list := `{"apiVersion": "v1", "items": [` + strings.Join(items, ",\n ") + `], "kind": "List"}`
	texts := []string{list, string(encoded(t, list, 2)), string(encoded(t, list, 4)),
		strings.ReplaceAll(string(encoded(t, list, 2)), "\n    - ", "\n    # next\n\n    - ")}
	for _, text := range texts {
		edit := func(by func(*editor)) (string, []Outcome) {
			var outcomes []Outcome
			var out memory
			e := &editor{name: "list", report: func(o Outcome) { outcomes = append(outcomes, o) }, out: &out,
				decide: func(o *found) ([]yamledit.Change, error) { return o.inject(Options{Image: "pillion"}) }}
			by(e)
			if err := errors.Join(append(e.failed, e.broken)...); err != nil {
				t.Fatal(err)
			}
			return out.String(), outcomes
		}
		got, reported := edit(func(e *editor) {
			if !e.list(text, 1) {
				t.Fatalf("the list is parsed as a whole:\n%.500s", text)
			}
		})
		want, reports := edit(func(e *editor) {
			whole, err := e.part(text, 1, nil)
			if err != nil {
				t.Fatal(err)
			}
			e.write(whole)
		})
		if got != want || !reflect.DeepEqual(reported, reports) || len(reports) < 30 {
			t.Errorf("by item:\n%s\nas a whole:\n%s\n%+v\n%+v", got, want, reported, reports)
		}
	}
}

// An alias of an anchor in another item is only known in the whole document. Items that are already written are taken back.
func TestAListWithSharedAnchorsIsEditedAsAWhole(t *testing.T) {
	pod := func(name, labels string) string {
		return "- apiVersion: v1\n  kind: Pod\n  metadata: {name: " + name + ", labels: " + labels + "}\n  spec:\n    containers:\n    - name: app\n      image: x\n"
	}
	head := "apiVersion: v1\nkind: List\nitems:\n"
	reported := 0
	out, err := inject("---\n"+head+pod("a", "&l {x: y}")+pod("b", "*l")+pod("c", "{}"), "in", Options{Image: "pillion"}, func(Outcome) { reported++ })
	if err != nil || reported != 3 || strings.Count(out, "kind: List") != 1 || strings.Count(out, "name: pillion-init") != 3 {
		t.Errorf("%v, %d outcomes:\n%s", err, reported, out)
	}
}

// An error in an item has the line of the file, and is reported once.
func TestAnErrorInAListHasItsLine(t *testing.T) {
	list := func(item string) string {
		return "---\nkind: List\napiVersion: v1\nitems:\n- kind: Service\n- apiVersion: v1\n  kind: Pod\n  metadata:\n    name: bad\n" + item + "  spec: {containers: [{name: a}]}\n- kind: Service\n"
	}
	for text, want := range map[string]string{
		list("    annotations: {pillion.dev/log-level: loud}\n"): "Pod bad (line 6 of in.yaml): annotation pillion.dev/log-level: ",
		list("    name: twice\n"):                                "in.yaml: line 10: duplicate key",
		list("    x: [\n"):                                       "in.yaml: line 1",
		list("    x: *y\n"):                                      "in.yaml: line 10: unknown anchor",
	} {
		reported := 0
		_, err := inject(text, "in.yaml", Options{Image: "pillion"}, func(Outcome) { reported++ })
		if err == nil || !strings.HasPrefix(err.Error(), want) || strings.Contains(err.Error(), "\n") || reported > 1 {
			t.Errorf("%v, %d outcomes, want %s", err, reported, want)
		}
	}
}

// Every line of the input is in the output, in the same order, except lines of probes and Prometheus' annotations.
func TestUnchangedLinesKeepTheirOrder(t *testing.T) {
	for name, text := range inputs(t) {
		if !strings.HasSuffix(name, ".yaml") || strings.Contains(name, "override") || strings.Contains("conflicts.yaml flow.yaml daemonset.yaml unicode.yaml empty-collections.yaml null-metadata.yaml replicaset.yaml", name) {
			continue // changed within their lines
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
			t.Errorf("%s: the line %q is missing or out of order", name, kept[0])
		}
	}
}

// An API server returns an object in another form.
func TestUninjectionWorksOnRewrittenObjects(t *testing.T) {
	for name, text := range inputs(t) {
		if len(yamledit.Split(string(text))) > 1 {
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

func TestUninjectionKeepsLaterChanges(t *testing.T) {
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

func TestAnErrorNamesItsRemedyAndNothingIsWritten(t *testing.T) {
	pod := func(annotations, spec string) string {
		return "apiVersion: v1\nkind: Pod\nmetadata:\n  name: bad\n  annotations: {" + annotations + "}\nspec: {" + spec + "}\n"
	}
	app := "containers: [{name: app, image: x}]"
	for _, c := range []struct{ text, want string }{
		{pod(`sidecar.istio.io/inject: "yes"`, app), `Pod bad (line 3 of in.yaml): annotation sidecar.istio.io/inject: "yes" is not a boolean: use "true" or "false"`},
		{pod(`sidecar.istio.io/interceptionMode: NONE`, app), `annotation sidecar.istio.io/interceptionMode: "NONE" is not a mode: use REDIRECT or TPROXY`},
		{pod(`traffic.sidecar.istio.io/excludeInboundPorts: "80x"`, app), `annotation traffic.sidecar.istio.io/excludeInboundPorts: "80x" is not a port: use a number from 1 to 65535`},
		{pod(`traffic.sidecar.istio.io/excludeInboundPorts: 80`, app), `annotation traffic.sidecar.istio.io/excludeInboundPorts is not a string: put quotes around the value`},
		{pod(`traffic.sidecar.istio.io/includeOutboundIPRanges: "10.0.0.0"`, app), `"10.0.0.0" is not a network`},
		{pod(`traffic.sidecar.istio.io/kubevirtInterfaces: "a b;c"`, app), `is not an interface`},
		{pod(`sidecar.istio.io/proxyCPU: lots`, app), `"lots" is not a quantity: use one such as 100m or 64Mi`},
		{pod(`sidecar.istio.io/proxyCPU: "2", sidecar.istio.io/proxyCPULimit: "1"`, app), `"2" is more than the limit of 1`},
		{pod(`status.sidecar.istio.io/port: "15021"`, app), `the sidecar uses port 15021 otherwise`},
		{pod(`proxy.istio.io/config: "a: ["`, app), `annotation proxy.istio.io/config: not valid YAML`},
		{pod(`proxy.istio.io/config: "concurrency: many"`, app), `concurrency: many is not a count`},
		{pod(`proxy.istio.io/config: "terminationDrainDuration: 60s"`, app), `1m0s is longer than terminationGracePeriodSeconds (30s)`},
		{pod(`proxy.istio.io/config: "terminationDrainDuration: 0s"`, app), `terminationDrainDuration: 0s resets every open connection`},
		{pod(`proxy.istio.io/config: "terminationDrainDuration: soon"`, app), `terminationDrainDuration: "soon" is not a time span`},
		{pod(`proxy.istio.io/config: "concurrency: 1025"`, app), `concurrency: 1025 is not a count`},
		{pod(`proxy.istio.io/config: "[1]"`, app), `is not a mapping`},
		{pod(`proxy.istio.io/config: "proxyMetadata: [1]"`, app), `proxyMetadata: not a mapping`},
		{pod(`proxy.istio.io/config: "proxyMetadata: {A: [1]}"`, app), `A: the value is not text`},
		{pod(`proxy.istio.io/config: "proxyMetadata: {POD_NAME: x}"`, app), `"POD_NAME" cannot be set`},
		{pod(`pillion.dev/opaque-port: "1"`, app), `annotation pillion.dev/opaque-port is unknown: use one of pillion.dev/inject, pillion.dev/image, pillion.dev/opaque-ports`},
		{pod(`pillion.dev/drain-delay: 29s`, app), `29s is longer than the drain itself (25s`},
		{pod(`pillion.dev/log-level: loud`, app), `use debug, info, warn or error`},
		{pod(`pillion.dev/access-log: out`, app), `use off, or a path`},
		{pod(`pillion.dev/access-log-encoding: xml`, app), `"xml" is not an encoding: use text or json`},
		{pod(`pillion.dev/access-log-encoding: json, pillion.dev/access-log-format: "%PROTOCOL%"`, app), `annotation pillion.dev/access-log-format: access log format: JSON lines need an object`},
		{pod(`pillion.dev/access-log-filter: sometimes`, app), `annotation pillion.dev/access-log-filter: access log filter: `},
		{pod(`pillion.dev/image: ""`, app), `"" is not an image`},
		{pod(`prometheus.io/port: "15090"`, app), `port 15090 is the agent's own`},
		{pod(`prometheus.io/port: "many"`, app), `invalid port "many"`},
		{pod(`pillion.dev/status: "{}"`, app), `marks the pod as injected, but there is no container pillion-init: remove the annotation`},
		{pod(``, `containers: []`), `spec.containers is empty`},
		{pod(``, `containers: {}`), `spec.containers is not a list`},
		{pod(``, `containers: [{image: x}]`), `spec.containers[0] has no name`},
		{pod(``, `containers: [{name: a}, {name: a}]`), `spec.containers has the name "a" twice`},
		{pod(``, app+`, volumes: [{name: istio-podinfo}]`), `spec.volumes already has "istio-podinfo": rename it`},
		{pod(``, app+`, securityContext: {runAsUser: 1337}`), `securityContext.runAsUser is 1337, which is reserved for the sidecar`},
		{pod(``, app+`, terminationGracePeriodSeconds: -1`), `terminationGracePeriodSeconds: -1 is not a number of seconds`},
		{pod(``, `containers: [{name: a, readinessProbe: {httpGet: {port: 80, scheme: FTP}}}]`), `scheme "FTP": must be HTTP or HTTPS`},
		{"apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: d, namespace: ns}\n", `Deployment ns/d (line 3 of in.yaml): it has no spec.template`},
		{"kind: Pod\nkind: Pod\n", `in.yaml: line 4: duplicate key "kind": remove one`},
		{"a: [\n", `in.yaml: line 3: `},
		{"{{ template }}\n", `in.yaml: line 3: `},
		{"\xff\xfe", `in.yaml is not UTF-8: convert it`},
		{"apiVersion: v1\nkind: Pod\nspec: &s {" + app + "}\ncopy: *s\n", `uses anchors`},
		{"a: &a [x,x,x,x,x,x,x,x,x]\n" + bomb(), `aliases stand for more than 100000 values`},
		{"a: &a [*a]\n", `aliases stand for more than 100000 values`},
	} {
		out, err := inject("kind: Good\n---\n"+c.text, "in.yaml", Options{Image: "pillion"}, ignore)
		if err == nil || !strings.Contains(err.Error(), c.want) || out != "" {
			t.Errorf("%s\nfails with\n%v\nwant\n%s", c.text, err, c.want)
		}
	}
}

// bomb returns a few lines of aliases that expand to a billion values.
func bomb() string {
	var b strings.Builder
	for c := 'b'; c <= 'j'; c++ {
		fmt.Fprintf(&b, "%c: &%c [%s]\n", c, c, strings.TrimSuffix(strings.Repeat(fmt.Sprintf("*%c,", c-1), 9), ","))
	}
	return b.String()
}

func TestAForgedStatusIsRefused(t *testing.T) {
	for _, status := range []string{
		``, `{}`, `{"version":2}`, `{"version":1,"more":1}`, `[]`, `{"version":1} x`,
		`{"version":1,"replaced":[{"path":"/metadata/annotations","was":"a: [","column":0}]}`,
		`{"version":1,"replaced":[{"path":"/metadata/annotations","was":"a: 1","column":1000000000}]}`,
		`{"version":1,"replaced":[{"path":"/metadata/annotations","was":"a: 1\nb: 2","column":0}]}`,
	} {
		text := "apiVersion: v1\nkind: Pod\nmetadata:\n  annotations:\n    pillion.dev/status: " + yamledit.JSON(status) + "\nspec: {}\n"
		if out, err := uninject(string(text), "x", ignore); err == nil || !strings.Contains(err.Error(), statusAnnotation) {
			t.Errorf("%s: %v\n%s", status, err, out)
		}
	}
}

func TestInputHasABound(t *testing.T) {
	if _, err := Read(io.LimitReader(zeros{}, MaxInput+1), "big", 0); err == nil || !strings.Contains(err.Error(), "big is larger than 64 MiB") {
		t.Error(err)
	}
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

// decodes reports the errors of Kubernetes' strict decoder.
func decodes(t *testing.T, program, name string, text []byte) {
	t.Helper()
	cmd := exec.Command(program)
	cmd.Stdin = bytes.NewReader(text)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%s: %v: %s", name, err, out)
	}
}

func TestKubernetesDecodesTheOutput(t *testing.T) {
	strict := filepath.Join(t.TempDir(), "strict")
	build := exec.Command("go", "build", "-buildvcs=false", "-o", strict, "./strict")
	build.Dir = "../../e2e/testdata/kubernetes"
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building e2e/testdata/kubernetes (make modules fetches what it needs): %v\n%s", err, out)
	}
	for name, text := range inputs(t) {
		if name == "directives.yaml" {
			continue // kubectl cannot read directives
		}
		out, _ := injected(t, name, text)
		decodes(t, strict, name, out)
	}
}

func TestTheExamplesInDeployAreTheOutputOfInject(t *testing.T) {
	const overlays = "../../deploy/kustomize/overlays/"
	text, err := os.ReadFile(overlays + "example/nginx.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for golden, options := range map[string]Options{
		overlays + "example/injected.yaml":         {Image: "pillion"},
		overlays + "example-classic/injected.yaml": {Image: "pillion", Classic: true},
	} {
		out, err := inject(string(text), "nginx.yaml", options, func(o Outcome) {
			if len(o.Warnings) > 0 {
				t.Error(o.Warnings)
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		got := []byte(out)
		if *update {
			if err := os.WriteFile(golden, got, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if want, err := os.ReadFile(golden); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s is not the output of inject (%v); -update writes it. Now:\n%s", golden, err, got)
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
		if back, err := uninject(string(text), "in", ignore); err == nil {
			_, _ = inject(back, "in", options, ignore)
		}
		made, err := inject(string(text), "in", options, ignore)
		if err != nil {
			return
		}
		out := made
		again, err := inject(out, "out", options, ignore)
		if err != nil || again != out {
			t.Errorf("a second injection: %v\n%q\n%q", err, out, again)
		}
		if bytes.Contains(text, []byte("status")) || bytes.Contains(text, []byte(`\`)) {
			return // perhaps injected already
		}
		back, err := uninject(out, "out", ignore)
		if err != nil || back != string(text) {
			t.Errorf("%v:\n%q\nbecame\n%q\nby way of\n%q", err, text, back, out)
		}
	})
}
