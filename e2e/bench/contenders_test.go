package bench

import (
	_ "embed"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// kit is what has to be built or found before anything can be measured.
type kit struct {
	cores   cores
	pillion string
	// Who is measured side by side. HAProxy is set up for the kind of traffic, so it stands here as more than one.
	opaque  []contender
	bulk    []contender // opaque connections with much to move
	http    []contender
	http1   []contender // small requests, where a relay is the least that a proxy can cost
	latency []contender
	telling []contender // the same agent, telling of what it sees and not
}

// contender is a proxy under test: what to run, as proxyUser, so that it captures on 15006 and answers on 15021. With
// nothing to run it is the direct connection.
type contender struct {
	name    string
	command []string
}

// The contenders' names are the table's columns.
const (
	namePillion       = "pillion"
	nameHAProxy       = "HAProxy"
	nameHAProxySplice = "HAProxy splice"
	nameReverseProxy  = "ReverseProxy"
	namePlain         = "io.Copy"
	nameDirect        = "direct"
	nameSilent        = "silent pillion" // without access log, metrics, status and admin
)

var columns = []string{namePillion, nameHAProxy, nameHAProxySplice, nameReverseProxy, namePlain, nameDirect, nameSilent}

var (
	//go:embed testdata/haproxy-tcp.cfg
	haproxyTCP string
	//go:embed testdata/haproxy-http.cfg
	haproxyHTTP string
)

// newKit builds pillion and the two plain proxies and finds HAProxy. Without HAProxy there is little to compare with: that
// is an error if haproxyNeeded and a missing column otherwise.
func newKit(t testing.TB, haproxyNeeded bool) *kit {
	t.Helper()
	nettest.RequireRoot(t)
	k := &kit{}
	var err error
	if k.cores, err = chooseCores(); err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "pillion-bench-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil { // the proxies' user has to reach what is inside
		t.Fatal(err)
	}
	k.pillion = build(t, dir, "pillion", "../../cmd/pillion")
	pillion := contender{namePillion, []string{k.pillion, "agent",
		"--outbound-port", "15001", "--inbound-port", "15006", "--readiness-port", "15021",
		"--log-level", "warn", "--drain-delay", "0s"}}
	relay := contender{namePlain, []string{build(t, dir, "relay", "./testdata/relay"), "0.0.0.0:15006", "0.0.0.0:15021"}}
	reverseProxy := contender{nameReverseProxy,
		[]string{build(t, dir, "reverseproxy", "./testdata/reverseproxy"), "0.0.0.0:15006", "0.0.0.0:15021"}}
	tcp, splicing, http := findHAProxy(t, dir, haproxyNeeded)
	k.opaque = append([]contender{pillion, relay}, tcp...)
	k.bulk = slices.Concat(k.opaque, splicing)
	k.http = append([]contender{pillion, reverseProxy}, http...)
	k.http1 = slices.Concat(k.http, []contender{relay})
	silent := contender{nameSilent, append(slices.Clone(pillion.command),
		"--access-log", "off", "--status-port", "0", "--metrics-port", "0", "--admin-port", "0")}
	k.telling = []contender{pillion, silent}
	k.latency = slices.Concat(k.http, []contender{{name: nameDirect}})
	return k
}

// findHAProxy returns HAProxy for opaque connections, the same with splice, and HAProxy for HTTP; none where it is not
// installed.
func findHAProxy(t testing.TB, dir string, needed bool) (tcp, splicing, http []contender) {
	t.Helper()
	program, err := exec.LookPath("haproxy")
	if err != nil && needed {
		t.Fatalf("the figures are relative to HAProxy (apt-get install haproxy): %v", err)
	}
	if err != nil {
		t.Logf("without HAProxy: %v", err)
		return nil, nil, nil
	}
	configured := func(name, file, config string) []contender {
		return []contender{{name, []string{program, "-q", "-db", "-f", writeConfig(t, dir, file, config)}}}
	}
	splice := func(options string) string { return strings.ReplaceAll(haproxyTCP, "    SPLICE\n", options) }
	return configured(nameHAProxy, "tcp.cfg", splice("")),
		configured(nameHAProxySplice, "splice.cfg", splice("    option splice-request\n    option splice-response\n")),
		configured(nameHAProxy, "http.cfg", haproxyHTTP)
}

func (c contender) direct() bool { return c.command == nil }

// build builds a program as it is released and returns where it is.
func build(t testing.TB, dir, name, pkg string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", path, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("building %s: %v\n%s", pkg, err, out)
	}
	return path
}

func writeConfig(t testing.TB, dir, name, config string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// haproxyVersion is for the table's last line.
func haproxyVersion() string {
	out, _ := exec.Command("haproxy", "-v").Output()
	return string(regexp.MustCompile(`\d+\.\d+\.\d+`).Find(out))
}

// start runs a contender in the pod, on the proxy's core, until the scope ends, and returns it ready. For the direct
// connection there is nothing to start.
func (c contender) start(t testing.TB, w *world) *proxy {
	t.Helper()
	if c.direct() {
		return nil
	}
	process := w.pod.Start(t, pinned(w.pod, w.cores.proxy, proxyUser, c.command[0], c.command[1:]...))
	awaitReady(t, w.pod, c.name, process)
	return &proxy{pid: process.Cmd.Process.Pid}
}

// startupTime runs a contender on any core with as many threads as it likes, as a pod would, and returns the time from
// before exec to its first positive answer.
func (c contender) startupTime(t testing.TB, pod *nettest.Namespace) (time.Duration, *proxy) {
	t.Helper()
	cmd := pod.Command(proxyUser, proxyUser, c.command[0], c.command[1:]...)
	cmd.Stderr = os.Stderr
	begin := time.Now()
	process := pod.Start(t, cmd)
	awaitReady(t, pod, c.name, process)
	return time.Since(begin), &proxy{pid: process.Cmd.Process.Pid}
}

// awaitReady asks for readiness from inside the pod, on the loopback, at most every half millisecond.
func awaitReady(t testing.TB, pod *nettest.Namespace, name string, process *nettest.Process) {
	t.Helper()
	pod.Do(t, func() error { // the thread stays inside for all attempts: entering costs more than asking
		deadline := time.Now().Add(5 * time.Second)
		for {
			err := askReady()
			if err == nil {
				return nil
			}
			select {
			case <-process.Exited():
				return fmt.Errorf("%s ended instead of getting ready: %v", name, process.Cmd.ProcessState)
			case <-time.After(500 * time.Microsecond):
			}
			if time.Now().After(deadline) {
				return fmt.Errorf("%s is not ready after 5 s: %w", name, err)
			}
		}
	})
}

// askReady speaks HTTP by hand: net/http would dial on another goroutine, which is outside the namespace.
func askReady() error {
	conn, err := net.DialTimeout("tcp4", "127.0.0.1:15021", time.Second)
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(time.Second))
	io.WriteString(conn, "GET /healthz/ready HTTP/1.1\r\nHost: pod\r\nConnection: close\r\n\r\n")
	answer, err := io.ReadAll(conn)
	if err != nil {
		return err
	}
	head, _, _ := strings.Cut(string(answer), "\r\n")
	if fields := strings.Fields(head); len(fields) < 2 || fields[1] != fmt.Sprint(http.StatusOK) {
		return fmt.Errorf("it answers %q", answer)
	}
	return nil
}
