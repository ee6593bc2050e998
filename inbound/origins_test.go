package inbound

import (
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/nettest"
)

// confusions are targets under /admin for some servers, and controls.
var confusions = []string{
	"/admin", "/admin/x?y", "//admin", "/./admin", "/.//admin", "/x/../admin", "/x/..//admin", "/x/../../admin", "/a/b/../../admin",
	"/%61dmin", "/%61%64%6d%69%6e", "/%2e/admin", "/x/%2e%2e/admin", "/x/.%2e/admin", "/x/%2E./admin", "/x%2f..%2fadmin", "/x/..%2fadmin", "/x%2F../admin",
	"/%2fadmin", "/%2f%2fadmin", "/x/..%5cadmin", `/x\..\admin`, `/\admin`, "/%5cadmin", "/%5c/../admin", "/x/..;/admin", "/;/admin", "/admin;x", "/admin/;x",
	"/admin%00", "/admin%20", "/admin%3f", "/admin%23", "/%252e%252e/admin", "/x/..%252fadmin", "/%2561dmin", "/admin#x", "/x#/../admin", "/?/../admin", "/x?/../../admin",
	"http://a/admin", "http://a//x/../admin", "http://a/x%2f..%2fadmin", "http://admin/", "/public",
}

// served is what an origin answers for a path under /admin.
const served = "ADMIN"

// startOrigins starts servers at ports of the pod, each with its own reading of paths.
func (m *meshRig) startOrigins(t *testing.T) map[string]uint16 {
	t.Helper()
	listener := m.Pod.Listen(t, "tcp4", m.At(82).String())
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(path.Clean(r.URL.Path), "/admin") {
			io.WriteString(w, served)
		}
	})}
	done := make(chan struct{})
	go func() { defer close(done); server.Serve(listener) }()
	t.Cleanup(func() { server.Close(); <-done })

	dir := t.TempDir()
	config := filepath.Join(dir, "nginx.conf")
	text := strings.ReplaceAll(`daemon off; worker_processes 1; user root; pid DIR/pid; error_log DIR/error.log; events {}
http {
	client_body_temp_path DIR; proxy_temp_path DIR; fastcgi_temp_path DIR; uwsgi_temp_path DIR; scgi_temp_path DIR; access_log off;
	server { listen 83; location / { return 200 open; } location /admin { return 200 ADMIN; } }
}`, "DIR", dir)
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	const script = `require("http").createServer((q, r) => {
	let p = q.url.split("?")[0]
	try { p = new URL(p, "http://a").pathname; p = decodeURIComponent(p) } catch {}
	r.end(require("path").posix.normalize(p.replaceAll("\\", "/")).startsWith("/admin") ? "ADMIN" : "open")
}).listen(84)`
	for _, command := range [][]string{{"nginx", "-c", config}, {"node", "-e", script}} {
		if _, err := exec.LookPath(command[0]); err != nil {
			t.Fatal(err) // make test installs it
		}
		m.Pod.Start(t, m.Pod.Command(0, 0, command[0], command[1:]...))
	}
	for _, port := range []uint16{83, 84} {
		nettest.Eventually(t, fmt.Sprint("a server listens at ", port), func() bool {
			conn, err := m.Pod.Dial("tcp4", m.At(port).String(), nettest.Patience)
			if err == nil {
				conn.Close()
			}
			return err == nil
		})
	}
	return map[string]uint16{"Go": 82, "nginx": 83, "Node": 84}
}

// Parts of random targets.
var (
	confusedStarts = []string{
		"/", "//", "/./", "/%2e/", "/x/../", "/x/%2e%2e/", "/x/.%2E/", "/x/..%2f", "/x%2F..%2f", "/x/..%5c", `/x\..\`, `/\`, "/%5C", "/%2f", "/;/", "/x;y/../",
		"/..;/", "/%00/../", "/%c0%af", "/%c0%ae%c0%ae/", "/x/%252e%252e/", "/?/../", "/x#/../", "/x/y/..//../", "http://a/", "http://a//", "http://a/x/../", "http://a/%2e/",
	}
	confusedEnds = []string{
		"", "", "/", "//", "/.", "/..", "/%2e%2e", "/x/..", "/../admin", "%2f", "%5cx", `\`, ".", "..", ";x", "/;x", "%3bx", "%00", "%20", "%09", "%c0%80", "?", "?x=/../", "%3f", "#", "#/..", "%23",
	}
)

// confused returns a random target: starts, the name of the path with some of its letters escaped, and ends.
func confused(random *rand.Rand) string {
	target := confusedStarts[random.IntN(len(confusedStarts))]
	for random.IntN(3) == 0 {
		target += confusedStarts[random.IntN(len(confusedStarts)-4)][1:] // the last ones have a scheme
	}
	escaped := random.IntN(3)
	for _, c := range []byte("admin") {
		switch form := random.IntN(12); {
		case escaped == 0, form > 3:
			target += string(rune(c))
		case form == 3 && escaped == 1:
			target += fmt.Sprintf("%%25%02x", c)
		case form == 2 && escaped == 1:
			target += strings.ToUpper(string(rune(c)))
		default:
			target += fmt.Sprintf([]string{"%%%02x", "%%%02X"}[form&1], c)
		}
	}
	for range 1 + random.IntN(2) {
		target += confusedEnds[random.IntN(len(confusedEnds))]
	}
	return target
}

// confuse sends each target, and returns those that the origin has served as one under /admin.
func (m *meshRig) confuse(t *testing.T, port uint16, targets []string) (reached []string) {
	t.Helper()
	var c *client
	for _, target := range targets {
		if c == nil {
			c = m.connect(t, port)
		}
		io.WriteString(c, "GET "+target+" HTTP/1.1\r\nHost: a\r\n\r\n")
		response, err := http.ReadResponse(c.in, nil)
		if err != nil {
			t.Fatalf("%s: %v", target, err)
		}
		body, err := io.ReadAll(response.Body)
		if err != nil {
			t.Fatalf("%s: %v", target, err)
		}
		if response.StatusCode == 200 && string(body) == served {
			reached = append(reached, target)
		}
		m.Await(t)
		if response.Close {
			c.Close()
			c = nil
		}
	}
	if c != nil {
		c.Close()
	}
	return reached
}

// A request for which an origin would serve what a policy denies does not arrive, however its path is written: with escaped
// slashes decoded, and with StrictPaths.
func TestNoOriginServesADeniedPath(t *testing.T) {
	random := rand.New(rand.NewPCG(15, 6))
	targets := slices.Clone(confusions)
	for range 300 {
		targets = append(targets, confused(random))
	}
	for name, change := range map[string]struct {
		strict  bool
		slashes mesh.EscapedSlashes
	}{"decoded slashes": {false, mesh.UnescapeSlashes}, "strict paths": {true, mesh.KeepEscapedSlashes}} {
		m := newMeshRigOf(t, "STRICT, HTTP", detectionDelay, func(c *Config) { c.StrictPaths = change.strict })
		for origin, port := range m.startOrigins(t) {
			m.slashes = change.slashes
			m.enforce(t, "STRICT, HTTP")
			if reached := m.confuse(t, port, targets); len(reached) < 50 {
				t.Errorf("%s, %s: without a policy, only %q are served", name, origin, reached)
			}
			m.enforce(t, "STRICT, HTTP", rbac(mesh.Deny, ofAdmin, anything))
			if reached := m.confuse(t, port, targets); len(reached) > 0 {
				t.Errorf("%s, %s: the origin serves %q", name, origin, reached)
			}
		}
	}
}
