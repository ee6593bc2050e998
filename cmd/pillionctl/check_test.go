package main

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The command reads the kubeconfig, checks its namespace, and ends with 1 if a check failed.
func TestCheckAsksTheClusterOfTheKubeconfig(t *testing.T) {
	level := "privileged"
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/version":
			io.WriteString(w, `{"gitVersion":"v1.31.0"}`)
		case "/api/v1/namespaces/shop":
			fmt.Fprintf(w, `{"metadata":{"labels":{"pod-security.kubernetes.io/enforce":%q}}}`, level)
		default:
			io.WriteString(w, `{}`)
		}
	}))
	defer server.Close()
	config := filepath.Join(t.TempDir(), "config")
	text := fmt.Sprintf("current-context: a\ncontexts: [{name: a, context: {cluster: a, namespace: shop}}]\nclusters: [{name: a, cluster: {server: %q}}]\n", server.URL)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	got := runWith("", "check", "--kubeconfig", config)
	if got.code != 0 || !strings.Contains(got.stdout, "ok   Pod Security  namespace shop enforces privileged\n") || got.stderr != "" {
		t.Errorf("%+v", got)
	}
	level = "restricted"
	got = runWith("", "check", "--kubeconfig", config, "-o", "json")
	if got.code != 1 || !strings.Contains(got.stdout, `"failed": true`) || got.stderr != "" {
		t.Errorf("%+v", got)
	}
	if got := runWith("", "check", "--kubeconfig", config, "--context", "b"); got.code != 1 || got.stderr != "pillionctl: error: the kubeconfig has no context \"b\"\n" {
		t.Errorf("%+v", got)
	}
	if got := runWith("", "check", "--output", "yaml"); got.code != 2 || got.stderr != "pillionctl: error: --output \"yaml\": use text or json\n" {
		t.Errorf("%+v", got)
	}
	if got := runWith("", "version", "--short"); got.code != 0 || got.stdout != "devel\n" {
		t.Errorf("%+v", got)
	}
	if got := runWith("", "completion", "bash"); got.code != 0 || !strings.Contains(got.stdout, "__start_pillionctl") {
		t.Errorf("%+v", got)
	}
}
