package main

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/spf13/pflag"

	"github.com/pillion-proxy/pillion/internal/inject"
	"github.com/pillion-proxy/pillion/internal/nettest"
)

var update = flag.Bool("update", false, "write the documents")

// asPillionctl names a variable that makes the test binary behave as pillionctl. Its value is a file that gets the process'
// status at the end.
const asPillionctl = "TEST_AS_PILLIONCTL"

func TestMain(m *testing.M) {
	if name := os.Getenv(asPillionctl); name != "" {
		code := run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
		status, err := os.ReadFile("/proc/self/status")
		if err == nil {
			err = os.WriteFile(name, status, 0o600)
		}
		if err != nil {
			panic(err)
		}
		os.Exit(code)
	}
	os.Exit(nettest.Main(m))
}

const (
	pod     = "apiVersion: v1\nkind: Pod\nmetadata:\n  name: a\nspec:\n  containers:\n  - name: app\n    image: app\n"
	badPod  = "apiVersion: v1\nkind: Pod\nmetadata:\n  name: bad\n  annotations: {pillion.dev/log-level: loud}\nspec:\n  containers:\n  - name: app\n"
	service = "kind: Service # kept"
)

// ran is the result of a run.
type ran struct {
	code           int
	stdout, stderr string
}

func runWith(stdin string, args ...string) ran {
	var stdout, stderr bytes.Buffer
	code := run(args, strings.NewReader(stdin), &stdout, &stderr)
	return ran{code, stdout.String(), stderr.String()}
}

func file(t *testing.T, name, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestFilesBecomeOneStreamAndAreRestored(t *testing.T) {
	first, second := file(t, "service.yaml", service), file(t, "pod.yaml", pod)
	in := runWith(pod, "inject", "-f", first, "-f", second, "-f", "-", "--image=registry.example/pillion:1")
	if in.code != 0 || in.stderr != "Pod a: injected\nPod a: injected\n" || strings.Count(in.stdout, "name: pillion-init") != 2 || !strings.HasPrefix(in.stdout, service+"\n---\n") {
		t.Fatalf("%+v", in)
	}
	out := runWith(in.stdout, "uninject", "-f", "-")
	if want := service + "\n---\n" + pod + "---\n" + pod; out.stdout != want || out.code != 0 || out.stderr != "Pod a: uninjected\nPod a: uninjected\n" {
		t.Errorf("%+v", out)
	}
}

func TestOneBadObjectIsNamedAndNothingIsWritten(t *testing.T) {
	good, bad := file(t, "good.yaml", pod), file(t, "bad.yaml", badPod)
	to := filepath.Join(t.TempDir(), "out.yaml")
	got := runWith("", "inject", "-f", good, "-f", bad, "-o", to, "--image=registry.example/pillion:1")
	if _, err := os.Stat(to); err == nil || got.code != 1 || got.stdout != "" ||
		got.stderr != `pillionctl: error: Pod bad (line 1 of `+bad+`): annotation pillion.dev/log-level: "loud" is not a level: use debug, info, warn or error`+"\n" {
		t.Errorf("%v %+v", err, got)
	}
	got = runWith("", "inject", "-f", good, "-o", to)
	if text, err := os.ReadFile(to); err != nil || got.code != 0 || !strings.Contains(string(text), "istio-proxy") {
		t.Errorf("%v %+v", err, got)
	}
}

// The report has one line for each object with a pod. Other objects are not mentioned.
func TestInjectReportsEachObject(t *testing.T) {
	objects := "---\nkind: Service\nmetadata: {name: none}\n---\n" + pod + "---\n" + strings.Replace(pod, "spec:\n", "spec:\n  hostNetwork: true\n", 1) +
		"---\n" + strings.Replace(pod, "image: app", "image: app\n    ports: [{containerPort: 15090}]", 1)
	got := runWith(objects, "inject", "-f", "-", "--image", "registry.example/pillion:1")
	want := "Pod a: injected\nPod a: left alone: it uses the node's network (hostNetwork)\nPod a: injected\n" +
		"Pod a: warning: container app declares port 15090, a port of the sidecar: one of them cannot listen; use another port\n"
	if got.code != 0 || got.stderr != want {
		t.Errorf("exit status %d, report\n%swant\n%s", got.code, got.stderr, want)
	}

	got = runWith("kind: Service\n", "inject", "-f", "-")
	if got.code != 0 || got.stdout != "kind: Service\n" || got.stderr != "pillionctl: warning: no object has a pod\n" {
		t.Errorf("without a pod: %+v", got)
	}
	got = runWith(pod, "inject", "-f", "-")
	if want := "Pod a: injected\npillionctl: warning: the image \"pillion\" names no registry: set --image, unless the nodes have it\n"; got.stderr != want {
		t.Errorf("without --image: %q, want %q", got.stderr, want)
	}
}

func TestTheReportInJSONTakesThePlaceOfTheManifests(t *testing.T) {
	name := file(t, "in.yaml", "kind: Service\n---\n"+pod+"---\n"+badPod)
	got := runWith("", "inject", "-f", name, "-o", "json", "--image", "i:1")
	var report struct{ Objects []inject.Outcome }
	if err := json.Unmarshal([]byte(got.stdout), &report); err != nil {
		t.Fatalf("%v: %+v", err, got)
	}
	want := []inject.Outcome{
		{File: name, Line: 3, Kind: "Pod", Name: "a", Action: inject.Injected, Image: "i:1"},
		{File: name, Line: 12, Kind: "Pod", Name: "bad", Action: inject.Failed, Reason: `annotation pillion.dev/log-level: "loud" is not a level: use debug, info, warn or error`},
	}
	if got.code != 1 || !reflect.DeepEqual(report.Objects, want) {
		t.Errorf("exit status %d, %+v, want %+v", got.code, report.Objects, want)
	}
	if got = runWith("kind: Service\n", "inject", "-f", "-", "-o", "json"); got.code != 0 || !strings.Contains(got.stdout, `"objects": []`) || got.stderr != "" {
		t.Errorf("without a pod: %+v", got)
	}
}

func TestDefaultsApplyUnlessAPodHasItsOwn(t *testing.T) {
	own := strings.Replace(pod, "  name: a\n", "  name: a\n  annotations: {pillion.dev/log-level: warn, sidecar.istio.io/proxyMemoryLimit: 24Mi}\n", 1)
	got := runWith(pod+"---\n"+own, "inject", "-f", "-", "--sidecar-log-level=error", "--sidecar-memory=32Mi", "--sidecar-cpu=50m", "--sidecar-dns-capture=true")
	first, second, _ := strings.Cut(got.stdout, "\n---\n")
	for text, want := range map[string][]string{
		first:  {"PILLION_LOG_LEVEL\n      value: error", "cpu: 50m\n        memory: 32Mi\n      limits:\n        memory: 128Mi", "- \"--redirect-dns\"", "PILLION_DNS_CAPTURE\n      value: \"true\""},
		second: {"PILLION_LOG_LEVEL\n      value: warn", "cpu: 50m\n        memory: 24Mi\n      limits:\n        memory: 24Mi"},
	} {
		for _, want := range want {
			if !strings.Contains(text, want) {
				t.Errorf("%+v\nlacks %q", text, want)
			}
		}
	}
}

func TestTheCommandLineIsChecked(t *testing.T) {
	for _, c := range []struct {
		args string
		code int
		want string
	}{
		{"inject", 2, "no input: name a file with -f; - is standard input"},
		{"inject -f x y", 2, `unexpected argument "y": values belong to flags`},
		{"inject --nonsense", 2, "unknown flag: --nonsense"},
		{"inject -f /nonexistent", 1, "-f /nonexistent: open /nonexistent: no such file"},
		{"inject -f - --image=", 2, `--image: "" is not an image`},
		{"inject -f - --image-pull-policy=Often", 2, `--image-pull-policy "Often": use Always, IfNotPresent or Never`},
		{"inject -f - --sidecar-name=A_b", 2, `--sidecar-name "A_b": use`},
		{"inject -f - --namespace=A_b", 2, `--namespace "A_b" is not a namespace`},
		{"inject -f - --sidecar-memory=lots", 2, `--sidecar-memory: "lots" is not a quantity`},
		{"inject -f - --sidecar-memory=2Gi --sidecar-memory-limit=1Gi", 2, `--sidecar-memory: "2Gi" is more than the limit of 1Gi`},
		{"inject -f - --sidecar-access-log-format=%NONE%", 2, `--sidecar-access-log-format: access log format: `},
		{"webhook --log-level=loud", 2, `--log-level "loud": use debug, info, warn or error`},
		{"webhook --listen=nowhere", 2, `--listen nowhere: `},
		{"webhook --listen=:99999", 2, `--listen :99999: `},
		{"webhook --sidecar-cpu=banana", 2, `--sidecar-cpu: "banana" is not a quantity`},
		{"webhook --pod-security=foo", 2, `--pod-security "foo": use restricted, baseline or privileged`},
		{"webhook --service=a/b", 2, `--service "a/b" is not the name of an object`},
		{"webhook --authority-secret=", 2, `--authority-secret "" is not the name of an object`},
		{"webhook --configuration=..", 2, `--configuration ".." is not the name of an object`},
		{"webhook --listen=127.0.0.1:0 --tls-cert=/nonexistent", 1, "--tls-cert /nonexistent"},
		{"webhook --listen=127.0.0.1:0 --issue-certificate", 1, "--issue-certificate: KUBERNETES_SERVICE_HOST or KUBERNETES_SERVICE_PORT is not set: run it in a pod"},
	} {
		got := runWith("", strings.Fields(c.args)...)
		if got.code != c.code || !strings.Contains(got.stderr, "pillionctl: error: "+c.want) {
			t.Errorf("%s: %+v", c.args, got)
		}
	}
}

func TestCompletionKnowsTheValuesOfFlags(t *testing.T) {
	for args, want := range map[string]string{
		"inject --image-pull-policy":           "Always IfNotPresent Never",
		"webhook --image-pull-policy":          "Always IfNotPresent Never",
		"inject --sidecar-log-level":           "debug info warn error",
		"inject --sidecar-interception-mode":   "REDIRECT TPROXY",
		"inject --sidecar-access-log-encoding": "text json",
		"inject --sidecar-dns-capture":         "true false",
		"inject --sidecar-opaque-ports":        "",
		"inject --sidecar-access-log":          "",
		"check --output":                       "text json",
	} {
		got := runWith("", append(append([]string{"__complete"}, strings.Fields(args)...), "")...)
		words, _, _ := strings.Cut(got.stdout, ":")
		if words = strings.Join(strings.Fields(words), " "); words != want {
			t.Errorf("%s: %q, want %q", args, words, want)
		}
	}
}

func TestHelpNamesTheNearestCommand(t *testing.T) {
	if got := runWith("", "help", "injct"); got.code != 2 || got.stdout != "" || got.stderr != "pillionctl: error: unknown command \"injct\" for \"pillionctl\": did you mean \"inject\"?\n" {
		t.Errorf("%+v", got)
	}
}

func TestTheDocumentNamesEveryFlag(t *testing.T) {
	for _, cmd := range newRoot().Commands() {
		document := "../../docs/inject.md"
		switch cmd.Name() {
		case "check", "completion", "version":
			document = "../../docs/commands.md"
		}
		text, err := os.ReadFile(document)
		if err != nil {
			t.Fatal(err)
		}
		cmd.Flags().VisitAll(func(flag *pflag.Flag) {
			if !strings.Contains(string(text), "`--"+flag.Name+"`") {
				t.Errorf("%s does not name %s --%s", document, cmd.Name(), flag.Name)
			}
		})
	}
}

// The command that README shows works unchanged.
func TestTheCommandOfREADMEWorks(t *testing.T) {
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, command, found := strings.Cut(string(readme), "    bin/pillionctl ")
	if !found {
		t.Fatal("README shows no such command")
	}
	command, _, _ = strings.Cut(command, "\n")
	to := filepath.Join(t.TempDir(), "nginx.yaml")
	t.Chdir("../..")
	got := runWith("", strings.Fields(strings.Replace(command, "-o nginx.yaml", "-o "+to, 1))...)
	made, err := os.ReadFile(to)
	if err != nil || got.code != 0 || strings.Count(string(made), `image: "registry.example/pillion:1"`) != 2 {
		t.Errorf("%+v, %v\n%s", got, err, made)
	}
}

// The injected pod that the document shows is the output of inject: go test ./cmd/pillionctl -run Document -update
func TestTheDocumentShowsTheOutputOfInject(t *testing.T) {
	const document = "../../docs/inject.md"
	text, err := os.ReadFile(document)
	if err != nil {
		t.Fatal(err)
	}
	parts := strings.Split(string(text), "```")
	if len(parts) != 5 {
		t.Fatalf("%s has %d fenced blocks, want the pod and the injected pod", document, len(parts)/2)
	}
	got := runWith(strings.TrimPrefix(parts[1], "yaml\n"), "inject", "-f", "-")
	if got.code != 0 {
		t.Fatalf("%+v", got)
	}
	if want := "yaml\n" + got.stdout; parts[3] != want {
		if *update {
			parts[3] = want
			err = os.WriteFile(document, []byte(strings.Join(parts, "```")), 0o644)
		} else {
			t.Errorf("%s shows another pod; go test ./cmd/pillionctl -run Document -update writes\n%s", document, want)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
}
