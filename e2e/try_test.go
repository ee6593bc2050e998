package e2e

import (
	"bytes"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// scripts/try, from README: it runs a command whose requests appear in the access log, keeps the command's output and exit
// status, and cleans up. 10.0.2.2 is the loopback of the machine.
func TestTryShowsTheTrafficOfACommand(t *testing.T) {
	t.Parallel()
	nettest.RequireRoot(t)
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "yours\n") }))
	defer server.Close()
	_, port, _ := strings.Cut(strings.TrimPrefix(server.URL, "http://"), ":")

	temporary := t.TempDir()
	if err := os.Chmod(temporary, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("../scripts/try", pillion, "sh", "-c", "curl -sS --noproxy '*' http://10.0.2.2:"+port+"/mine; exit 3")
	cmd.Env = append(os.Environ(), "TMPDIR="+temporary)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if code := cmd.ProcessState.ExitCode(); code != 3 || stdout.String() != "yours\n" {
		t.Errorf("exit status %d (%v), output %q, want 3 and the server's answer", code, err, &stdout)
	}
	if want := `"GET /mine HTTP/1.1" 200`; !strings.Contains(stderr.String(), "pillion: [") || !strings.Contains(stderr.String(), want) {
		t.Errorf("the access log lacks %s:\n%s", want, &stderr)
	}
	nettest.Eventually(t, "the temporary directory is removed", func() bool {
		entries, err := os.ReadDir(temporary)
		return err == nil && len(entries) == 0
	})
}
