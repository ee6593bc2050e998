package e2e

import (
	"bytes"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
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

// A compound command runs in the namespace as a whole, as one shell reads it: what follows the first part must not escape
// to the machine.
func TestMakeTryRunsACompoundCommandInTheNamespace(t *testing.T) {
	t.Parallel()
	nettest.RequireRoot(t)
	checkout, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	directory := t.TempDir()
	if err := os.Chmod(directory, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, target := range map[string]string{"scripts": filepath.Join(checkout, "scripts"), "bin/pillion": pillion} {
		link := filepath.Join(directory, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(link), 0o755), os.Symlink(target, link)); err != nil {
			t.Fatal(err)
		}
	}
	outside, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	const where = "readlink /proc/self/ns/net"
	cmd := exec.Command("make", "--no-print-directory", "--file", filepath.Join(checkout, "Makefile"),
		"--old-file", "tools-try", "--old-file", "build", "try",
		"CMD="+where+" && "+where+"; word=\"it's one\"; "+where+" | cat; echo \"$word $(echo word)\"; exit 3")
	cmd.Dir, cmd.Env = directory, append(os.Environ(), "TMPDIR="+directory)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	_ = cmd.Run() // make's own exit status is 2
	lines := strings.Split(stdout.String(), "\n")
	if len(lines) != 5 || lines[0] == outside || lines[1] != lines[0] || lines[2] != lines[0] || lines[3] != "it's one word" {
		t.Errorf("in %s: %q, want three times one other namespace and the words\n%s", outside, lines, &stderr)
	}
	if !strings.Contains(stderr.String(), "Error 3") {
		t.Errorf("make does not report the command's exit status: %s", &stderr)
	}
}
