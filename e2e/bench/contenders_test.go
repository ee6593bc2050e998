package bench

import (
	_ "embed"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
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

// kit holds the programs and settings that all measurements share.
type kit struct {
	cores   cores
	dir     string // of built programs
	pillion string
	control controlPrograms // zero: not built yet
	// Contenders by kind of traffic. HAProxy has a configuration for each kind.
	opaque    []contender
	bulk      []contender // opaque connections with much data
	http      []contender
	http1     []contender // small requests; the relay shows the minimum cost of a proxy
	latency   []contender
	telemetry []contender // the agent with and without telemetry
}

// contender is a proxy under test: a command that runs as proxyUser, accepts captured connections on 15006 and answers
// readiness on 15021. An empty command stands for a direct connection.
type contender struct {
	name    string
	command []string
	root    bool                                      // the command itself changes to proxyUser
	before  func(t testing.TB, ns *nettest.Namespace) // starts what the proxy needs; may be nil

	// Of proxies that carry what the pod opens.
	to           netip.AddrPort // where the load connects to; invalid: the proxy is inbound
	certificates string         // directory with those of the endpoints; empty: they have no TLS

	edge bool // a gateway: nothing is captured, and the load connects to edgePort
}

// The contenders' names are the table's columns.
const (
	namePillion       = "pillion"
	nameHAProxy       = "HAProxy"
	nameHAProxySplice = "HAProxy splice"
	nameReverseProxy  = "ReverseProxy"
	namePlain         = "io.Copy"
	nameDirect        = "direct"
	nameGenerated     = "generated types" // go-control-plane's decode the control plane's resources
	nameSilent        = "silent pillion"  // no access log, metrics, status and admin ports
	nameUnrouted      = "unrouted"        // pillion without a control plane
)

var columns = []string{namePillion, nameHAProxy, nameHAProxySplice, nameReverseProxy, namePlain, nameDirect, nameSilent, nameUntraced, nameUnrouted, namePermissive, nameGenerated}

var (
	//go:embed testdata/haproxy-tcp.cfg
	haproxyTCP string
	//go:embed testdata/haproxy-http.cfg
	haproxyHTTP string
)

// newKit builds pillion and the two plain proxies and finds HAProxy. If HAProxy is missing, the test fails if haproxyNeeded
// is set; otherwise its columns are missing.
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
	k.dir = dir
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil { // the proxies' user must be able to read the files
		t.Fatal(err)
	}
	k.pillion = buildPillion(t, dir)
	pillion := contender{name: namePillion, command: []string{k.pillion, "agent",
		"--outbound-port", "15001", "--inbound-port", "15006", "--readiness-port", "15021",
		"--log-level", "warn", "--drain-delay", "0s"}}
	relay := contender{name: namePlain, command: []string{build(t, dir, "relay", "./testdata/relay"), "0.0.0.0:15006", "0.0.0.0:15021"}}
	reverseProxy := contender{name: nameReverseProxy,
		command: []string{build(t, dir, "reverseproxy", "./testdata/reverseproxy"), "0.0.0.0:15006", "0.0.0.0:15021"}}
	tcp, splicing, http := findHAProxy(t, dir, haproxyNeeded)
	k.opaque = append([]contender{pillion, relay}, tcp...)
	k.bulk = slices.Concat(k.opaque, splicing)
	k.http = append([]contender{pillion, reverseProxy}, http...)
	k.http1 = slices.Concat(k.http, []contender{relay})
	silent := contender{name: nameSilent, command: append(slices.Clone(pillion.command),
		"--access-log", "off", "--status-port", "0", "--metrics-port", "0", "--admin-port", "0")}
	k.telemetry = []contender{pillion, silent}
	k.latency = slices.Concat(k.http, []contender{{name: nameDirect}})
	return k
}

// findHAProxy returns HAProxy for opaque connections, the same with splice, and HAProxy for HTTP. The slices are empty if it
// is not installed.
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
		return []contender{{name: name, command: []string{program, "-q", "-db", "-f", writeConfig(t, dir, file, config)}}}
	}
	splice := func(options string) string { return strings.ReplaceAll(haproxyTCP, "    SPLICE\n", options) }
	return configured(nameHAProxy, "tcp.cfg", splice("")),
		configured(nameHAProxySplice, "splice.cfg", splice("    option splice-request\n    option splice-response\n")),
		configured(nameHAProxy, "http.cfg", haproxyHTTP)
}

func (c contender) direct() bool { return c.command == nil }

// buildPillion builds pillion as `make build` does and returns its path.
func buildPillion(t testing.TB, dir string) string {
	t.Helper()
	path := filepath.Join(dir, "pillion")
	if out, err := exec.Command("make", "-s", "-C", "../..", "program", "OUT="+path).CombinedOutput(); err != nil {
		t.Fatalf("building pillion: %v\n%s", err, out)
	}
	return path
}

// build builds another program with the flags of a release and returns its path.
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

// haproxyVersion returns HAProxy's version for the table's last line.
func haproxyVersion() string {
	out, _ := exec.Command("haproxy", "-v").Output()
	return string(regexp.MustCompile(`\d+\.\d+\.\d+`).Find(out))
}

// start runs a contender in the pod, on the proxy's core, until the scope ends, and returns it when it is ready. It returns
// nil for the direct connection.
func (c contender) start(t testing.TB, w *world) *proxy {
	t.Helper()
	if c.direct() {
		return nil
	}
	return c.startIn(t, w.pod, w.cores.proxy)
}

func (c contender) startIn(t testing.TB, ns *nettest.Namespace, core int) *proxy {
	t.Helper()
	if c.before != nil {
		c.before(t, ns)
	}
	var user uint32 = proxyUser
	if c.root {
		user = 0
	}
	process := ns.Start(t, pinned(ns, core, user, c.command[0], c.command[1:]...))
	awaitReady(t, ns, c.name, process)
	return &proxy{pid: process.Cmd.Process.Pid}
}

// startupTime runs a contender without limits on cores and threads, as in a pod, and returns the time from exec to its first
// positive answer.
func (c contender) startupTime(t testing.TB, pod *nettest.Namespace) (time.Duration, *proxy) {
	t.Helper()
	cmd := pod.Command(proxyUser, proxyUser, c.command[0], c.command[1:]...)
	cmd.Stderr = os.Stderr
	begin := time.Now()
	process := pod.Start(t, cmd)
	awaitReady(t, pod, c.name, process)
	return time.Since(begin), &proxy{pid: process.Cmd.Process.Pid}
}

// awaitReady polls readiness from inside the pod, on loopback, every half millisecond.
func awaitReady(t testing.TB, pod *nettest.Namespace, name string, process *nettest.Process) {
	t.Helper()
	pod.Do(t, func() error { // one Do for all attempts: entering the namespace costs more than a request
		deadline := time.Now().Add(nettest.Patience)
		for {
			err := askReady()
			if err == nil {
				return nil
			}
			select {
			case <-process.Exited():
				return fmt.Errorf("%s exited before it was ready: %v", name, process.Cmd.ProcessState)
			case <-time.After(500 * time.Microsecond):
			}
			if time.Now().After(deadline) {
				return fmt.Errorf("%s not ready after %v: %w", name, nettest.Patience, err)
			}
		}
	})
}

// askReady does not use net/http, because that dials on another goroutine, whose thread is outside the namespace.
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
		return fmt.Errorf("unexpected answer %q", answer)
	}
	return nil
}
