package e2e

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// agent is a `pillion agent` that runs in a pod.
type agent struct {
	*nettest.Process
	log    *logBook
	access *logBook // standard output, where the access log goes by default
}

// unprivileged is the beginning of a command line that runs a command as in a container without privileges: with a uid of
// its own, no capability, and no way to get one.
func unprivileged(uid int) []string {
	id := strconv.Itoa(uid)
	return []string{
		"setpriv", "--reuid", id, "--regid", id, "--clear-groups", "--bounding-set", "-all", "--inh-caps=-all", "--no-new-privs",
	}
}

// startAgent starts an agent that logs each connection, and returns when it is ready.
func startAgent(t testing.TB, pod *nettest.Namespace, flags ...string) *agent {
	t.Helper()
	a := launchAgent(t, pod, nil, flags...)
	awaitReady(t, pod, a)
	return a
}

// launchAgent starts an agent through wrapper, a command that executes its last arguments. It does not wait for readiness.
func launchAgent(t testing.TB, pod *nettest.Namespace, wrapper []string, flags ...string) *agent {
	t.Helper()
	return launchAgentBy(t, pod, append(append([]string{}, wrapper...), unprivileged(agentUID)...), flags...)
}

// launchAgentBy is launchAgent with a complete beginning of the command line.
func launchAgentBy(t testing.TB, pod *nettest.Namespace, wrapper []string, flags ...string) *agent {
	t.Helper()
	words := append(append([]string{}, wrapper...), pillion, "agent", "--log-level", "debug")
	return launchCommand(t, pod, append(words, flags...))
}

// launchCommand starts an agent by a whole command line.
func launchCommand(t testing.TB, pod *nettest.Namespace, words []string) *agent {
	t.Helper()
	a := &agent{log: &logBook{}, access: &logBook{}}
	// Registered before the start, so that it runs after the agent has ended.
	t.Cleanup(func() { a.log.checkHealth(t) })
	cmd := pod.Command(0, 0, words[0], words[1:]...)
	cmd.Stderr, cmd.Stdout = a.log, a.access
	cmd.Env = append(os.Environ(), "GORACE=halt_on_error=0")
	a.Process = pod.Start(t, cmd)
	return a
}

func awaitReady(t testing.TB, pod *nettest.Namespace, a *agent) {
	t.Helper()
	out, err := pod.Run(pod.Command(agentUID, agentUID, pillion, "wait", "--timeoutSeconds", "120", "--periodMillis", "20"))
	if err != nil {
		t.Fatalf("the agent is not ready: %v\n%s\nlog:\n%s", err, out, a.log)
	}
}

// descriptors returns the number of open descriptors.
func (a *agent) descriptors(t testing.TB) int {
	t.Helper()
	entries, err := os.ReadDir(a.proc("fd"))
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// cpu returns the CPU time that the agent has used.
func (a *agent) cpu(t testing.TB) time.Duration {
	t.Helper()
	stat, err := os.ReadFile(a.proc("stat"))
	if err != nil {
		t.Fatal(err)
	}
	// The name in parentheses may contain blanks; user and system time are the 12th and 13th field after it.
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	var ticks int
	for _, field := range fields[11:13] {
		n, err := strconv.Atoi(field)
		if err != nil {
			t.Fatal(err)
		}
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond
}

// resident returns the agent's resident memory in bytes.
func (a *agent) resident(t testing.TB) int {
	t.Helper()
	kib, err := strconv.Atoi(strings.TrimSuffix(a.status(t, "VmRSS"), " kB"))
	if err != nil {
		t.Fatal(err)
	}
	return kib << 10
}

// status returns one line of the agent's /proc/PID/status.
func (a *agent) status(t testing.TB, key string) string {
	t.Helper()
	status, err := os.ReadFile(a.proc("status"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if name, value, _ := strings.Cut(line, ":"); name == key {
			return strings.TrimSpace(value)
		}
	}
	t.Fatalf("/proc/PID/status has no %s", key)
	return ""
}

func (a *agent) proc(name string) string {
	return filepath.Join("/proc", strconv.Itoa(a.Cmd.Process.Pid), name)
}

// ends waits until the agent exits and returns its exit code.
func (a *agent) ends(t testing.TB, within time.Duration) int {
	t.Helper()
	code, err := a.Wait(within)
	if err != nil {
		t.Fatalf("%v; log:\n%s", err, a.log)
	}
	return code
}

// logBook collects the lines that an agent writes.
type logBook struct {
	mu   sync.Mutex
	text []byte
}

func (l *logBook) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text = append(l.text, p...)
	return len(p), nil
}

func (l *logBook) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(l.text)
}

// lines returns the lines that contain all of parts.
func (l *logBook) lines(parts ...string) []string {
	var found []string
next:
	for line := range strings.Lines(l.String()) {
		for _, part := range parts {
			if !strings.Contains(line, part) {
				continue next
			}
		}
		found = append(found, strings.TrimSpace(line))
	}
	return found
}

// await waits for a line that contains all of parts and returns the first.
func (l *logBook) await(t testing.TB, parts ...string) string {
	t.Helper()
	if !nettest.Within(nettest.Patience, func() bool { return len(l.lines(parts...)) > 0 }) {
		t.Fatalf("the agent logged no line with %q:\n%s", parts, l)
	}
	return l.lines(parts...)[0]
}

// checkHealth fails the test if the log has signs of a crash or of a programming error.
func (l *logBook) checkHealth(t testing.TB) {
	for _, mark := range []string{"DATA RACE", "panic:", "fatal error:"} {
		if strings.Contains(l.String(), mark) {
			t.Errorf("unexpected log output %q:\n%s", mark, l)
		}
	}
}

// attribute returns the value of key in a line of the agent's log.
func attribute(t testing.TB, line, key string) string {
	t.Helper()
	for _, field := range strings.Fields(line) {
		if name, value, ok := strings.Cut(field, "="); ok && name == key {
			return value
		}
	}
	t.Fatalf("no %s in: %s", key, line)
	return ""
}

// execute runs pillion in the pod and returns its output and exit code.
func execute(t testing.TB, pod *nettest.Namespace, env []string, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	var out, complaint bytes.Buffer
	cmd := pod.Command(0, 0, pillion, args...)
	cmd.Env = append(os.Environ(), env...)
	cmd.Stdout, cmd.Stderr = &out, &complaint
	_, err := pod.Run(cmd)
	if cmd.ProcessState == nil {
		t.Fatal(err)
	}
	if strings.Contains(complaint.String(), "DATA RACE") {
		t.Errorf("pillion %s: %s", strings.Join(args, " "), &complaint)
	}
	return out.String(), complaint.String(), cmd.ProcessState.ExitCode()
}

// requireProgram fails the test if a program is missing, because `make test` installs it.
func requireProgram(t testing.TB, name string) string {
	t.Helper()
	for _, candidate := range []string{name, "/usr/sbin/" + name, "/sbin/" + name} {
		if path, err := exec.LookPath(candidate); err == nil {
			return path
		}
	}
	t.Fatalf("%s is missing; make test installs it", name)
	return ""
}
