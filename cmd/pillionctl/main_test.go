package main

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/pflag"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

var update = flag.Bool("update", false, "write the documents")

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

const (
	pod     = "apiVersion: v1\nkind: Pod\nmetadata:\n  name: a\nspec:\n  containers:\n  - name: app\n    image: app\n"
	badPod  = "apiVersion: v1\nkind: Pod\nmetadata:\n  name: bad\n  annotations: {pillion.dev/log-level: loud}\nspec:\n  containers:\n  - name: app\n"
	service = "kind: Service # kept"
)

// ran is what a run has left.
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

func TestFilesBecomeOneStreamAndBack(t *testing.T) {
	first, second := file(t, "service.yaml", service), file(t, "pod.yaml", pod)
	in := runWith(pod, "inject", "-f", first, "-f", second, "-f", "-")
	if in.code != 0 || in.stderr != "" || strings.Count(in.stdout, "name: pillion-init") != 2 || !strings.HasPrefix(in.stdout, service+"\n---\n") {
		t.Fatalf("%+v", in)
	}
	out := runWith(in.stdout, "uninject", "-f", "-")
	if want := service + "\n---\n" + pod + "---\n" + pod; out.stdout != want || out.code != 0 {
		t.Errorf("%+v", out)
	}
}

func TestOneBadObjectIsNamedAndNothingIsWritten(t *testing.T) {
	good, bad := file(t, "good.yaml", pod), file(t, "bad.yaml", badPod)
	to := filepath.Join(t.TempDir(), "out.yaml")
	got := runWith("", "inject", "-f", good, "-f", bad, "-o", to)
	if _, err := os.Stat(to); err == nil || got.code != 1 || got.stdout != "" ||
		got.stderr != `pillionctl: error: Pod bad (document 1 of `+bad+`): annotation pillion.dev/log-level: "loud" is not a level: use debug, info, warn or error`+"\n" {
		t.Errorf("%v %+v", err, got)
	}
	got = runWith("", "inject", "-f", good, "-o", to)
	if text, err := os.ReadFile(to); err != nil || got.code != 0 || !strings.Contains(string(text), "istio-proxy") {
		t.Errorf("%v %+v", err, got)
	}
}

func TestTheCommandLineIsChecked(t *testing.T) {
	for _, c := range []struct {
		args string
		code int
		want string
	}{
		{"inject", 2, "no input: name a file by -f, or - for standard input"},
		{"inject -f x y", 2, `unexpected argument "y": values belong to flags`},
		{"inject --nonsense", 2, "unknown flag: --nonsense"},
		{"inject -f /nonexistent", 1, "-f /nonexistent: open /nonexistent: no such file"},
		{"inject -f - --image=", 1, `--image: "" is not an image`},
		{"inject -f - --image-pull-policy=Often", 1, `--image-pull-policy "Often": use Always, IfNotPresent or Never`},
		{"inject -f - --sidecar-name=A_b", 1, `--sidecar-name "A_b": use`},
		{"inject -f - --namespace=A_b", 1, `--namespace "A_b" is not a namespace`},
		{"webhook --log-level=loud", 1, `--log-level "loud": use debug, info, warn or error`},
		{"webhook --listen=nowhere", 1, `--listen nowhere: `},
		{"webhook --listen=127.0.0.1:0 --tls-cert=/nonexistent", 1, "--tls-cert /nonexistent"},
	} {
		got := runWith("", strings.Fields(c.args)...)
		if got.code != c.code || !strings.Contains(got.stderr, "pillionctl: error: "+c.want) {
			t.Errorf("%s: %+v", c.args, got)
		}
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

// README shows how to inject: its command works as it stands.
func TestTheCommandOfREADMEWorks(t *testing.T) {
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, command, found := strings.Cut(string(readme), "    bin/pillionctl ")
	if !found {
		t.Fatal("README shows none")
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
