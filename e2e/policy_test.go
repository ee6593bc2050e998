package e2e

import (
	"context"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// With a policy the agent refuses what is not listed, and shows it as Istio's REGISTRY_ONLY does. A file of rules applies when
// it changes; one with an error does not.
func TestAgentDeniesUnlistedDestinations(t *testing.T) {
	t.Parallel()
	nettest.RequireRoot(t)
	dir := t.TempDir()
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "rules")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file+".new", []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(file+".new", file); err != nil {
			t.Fatal(err)
		}
	}
	write("# nothing yet\n")
	log := filepath.Join(dir, "log")
	if err := os.WriteFile(log, nil, 0o666); err != nil {
		t.Fatal(err)
	}
	os.Chmod(log, 0o666)
	s := newStage(t, "--outbound-policy", "deny-unlisted", "--outbound-policy-file", file, "--allow", nettest.Elsewhere4.String()+":82,"+nettest.Elsewhere4.String()+":83",
		"--deny", nettest.Elsewhere4.String()+":83", "--access-log", log, "--log-level", "info")
	w := s.outbound()
	address := w.address.String() + ":80"
	serveHTTP(t, w.to.Listen(t, "tcp", address), http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "served") }))

	get := func(port ...string) string {
		address := net.JoinHostPort(w.address.String(), append(port, "80")[0])
		dial := func(_ context.Context, network, address string) (net.Conn, error) {
			return w.from.Dial(network, address, nettest.Patience)
		}
		client := &http.Client{Timeout: nettest.Patience, Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}
		response, err := client.Get("http://" + address + "/")
		if err != nil {
			return err.Error()
		}
		defer response.Body.Close()
		body, _ := io.ReadAll(response.Body)
		return response.Status + " " + string(body)
	}
	if got, want := get(), "403 Forbidden pillion: "+address+" is not allowed by a rule\n"; got != want {
		t.Errorf("before: %q, want %q", got, want)
	}
	for port, want := range map[string]string{"82": "200 OK served", "83": "403 Forbidden pillion: " + w.address.String() + ":83 is denied by the rule \"" + w.address.String() + ":83\"\n"} {
		serveHTTP(t, w.to.Listen(t, "tcp", w.address.String()+":"+port), http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "served") }))
		if got := get(port); got != want {
			t.Errorf("port %s, by the flags: %q, want %q", port, got, want)
		}
	}
	if err := tryConnection(w.from, w.address.String()+":81"); !isReset(err) {
		t.Errorf("an opaque connection ends with %v, want a reset", err)
	}
	nettest.Eventually(t, "the access log has the refusals", func() bool {
		text, _ := os.ReadFile(log)
		return strings.Count(string(text), "BlackHoleCluster") == 3
	})
	write("allow " + w.address.String() + ":80\n")
	nettest.Eventually(t, "the new rules apply", func() bool { return get() == "200 OK served" })
	write("allow everything and more\n")
	s.agent.log.await(t, "new outbound policy rejected", "line 1: 4 words")
	if got := get(); got != "200 OK served" {
		t.Errorf("after bad rules: %q", got)
	}
	write("")
	nettest.Eventually(t, "the rules are withdrawn", func() bool { return strings.HasPrefix(get(), "403 ") })
}
