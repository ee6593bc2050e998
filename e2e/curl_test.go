package e2e

import (
	"bytes"
	"crypto/rand"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// version is one version of HTTP in the clear: the option of curl, the port of nginx, and the version of the answer.
type version struct {
	flag   string
	port   uint16
	answer string
}

var versions = []version{{"--http1.0", 8080, "1.1"}, {"--http1.1", 8080, "1.1"}, {"--http2-prior-knowledge", 8081, "2"}}

// part is the number of bytes of the large file that are uploaded.
const part = 8 << 20

// A real curl, with every version of HTTP that it supports without TLS, and a real nginx.
func TestCurlAndNginx(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	large := make([]byte, 64<<20)
	rand.Read(large)
	trees := map[*nettest.Namespace]string{s.pod: serveFiles(t, s.pod, large), s.peer: serveFiles(t, s.peer, large)}
	s.eachDirection(t, func(t *testing.T, w way) {
		for _, v := range versions {
			t.Run(v.flag, func(t *testing.T) { curlAndNginx(t, w, v, trees[w.to], large) })
		}
		t.Run("ignored upgrade to h2c", func(t *testing.T) {
			url := "http://" + netip.AddrPortFrom(w.address, 8080).String() + "/small"
			if got := curl(t, w, "--http2", url, "--output", "-"); got != "small\n200 1.1 1\n" {
				t.Errorf("curl reports %q", got)
			}
		})
	})
}

func curlAndNginx(t *testing.T, w way, v version, tree string, large []byte) {
	url := "http://" + netip.AddrPortFrom(w.address, v.port).String()
	for _, c := range []struct {
		name   string
		args   []string
		status string
		body   []byte
	}{
		{"small", []string{url + "/small"}, "200", []byte("small\n")},
		{"large", []string{url + "/large"}, "200", large},
		{"range", []string{"--range", "1-3", url + "/small"}, "206", []byte("mal")},
		{"not modified", []string{"--header", "If-Modified-Since: Fri, 01 Jan 2100 00:00:00 GMT", url + "/small"}, "304", nil},
		{"missing", []string{url + "/missing"}, "404", []byte("no such file\n")},
		{"HEAD", []string{"--head", "--dump-header", "/dev/null", url + "/large"}, "200", nil},
	} {
		target := filepath.Join(userDir(t, workloadUID), "body")
		output := curl(t, w, append([]string{v.flag, "--output", target}, c.args...)...)
		if want := c.status + " " + v.answer + " 1\n"; output != want {
			t.Errorf("%s: curl reports %q, want %q", c.name, output, want)
		}
		if got, _ := os.ReadFile(target); c.name != "HEAD" && !bytes.Equal(got, c.body) {
			t.Errorf("%s: the body is %d bytes, %.40q, want %d", c.name, len(got), got, len(c.body))
		}
	}
	uploads := map[string][]string{"sized": nil, "asked": {"--header", "Expect: 100-continue"}}
	if v.flag == "--http1.1" {
		uploads["chunked"] = []string{"--header", "Transfer-Encoding: chunked"}
	}
	for name, args := range uploads {
		name += v.flag
		output := curl(t, w, append(args, v.flag, "--output", "/dev/null", "--upload-file", filepath.Join(tree, "part"), url+"/"+name)...)
		if want := "201 " + v.answer + " 1\n"; output != want {
			t.Errorf("upload %s: curl reports %q, want %q", name, output, want)
		}
		if got, _ := os.ReadFile(filepath.Join(tree, name)); !bytes.Equal(got, large[:part]) {
			t.Errorf("upload %s: nginx stored %d bytes that differ from those sent", name, len(got))
		}
	}
	if v.flag != "--http1.1" { // curl 7.88 fails to send a second request by prior knowledge, without an agent too
		return
	}
	output := curl(t, w, v.flag, "--output", "/dev/null", url+"/small?[1-100]")
	if want := "200 " + v.answer + " 1\n" + strings.Repeat("200 "+v.answer+" 0\n", 99); output != want {
		t.Errorf("a hundred requests on one connection: curl reports\n%s", output)
	}
}

// curl runs it at the way's beginning and returns its output: behind each answer a line with the status, the version,
// and how many connections it had to make.
func curl(t *testing.T, w way, args ...string) string {
	t.Helper()
	fixed := []string{"--silent", "--show-error", "--noproxy", "*", "--max-time", "60",
		"--write-out", "%{http_code} %{http_version} %{num_connects}\n"}
	return w.runPeer(t, "curl", append(fixed, args...)...)
}

// serveFiles runs nginx as the workload's user, on port 8080 with HTTP/1 and on 8081 with HTTP/2, and returns the
// directory of its files: small, large, and part of the large one. Uploads are stored there.
func serveFiles(t *testing.T, ns *nettest.Namespace, large []byte) (tree string) {
	t.Helper()
	program := requireProgram(t, "nginx")
	dir := userDir(t, workloadUID)
	writeFile(t, filepath.Join(dir, "small"), "small\n")
	writeFile(t, filepath.Join(dir, "large"), string(large))
	writeFile(t, filepath.Join(dir, "part"), string(large[:part]))
	config := filepath.Join(dir, "nginx.conf")
	writeFile(t, config, strings.ReplaceAll(`
		daemon off;
		worker_processes 1;
		pid DIR/nginx.pid;
		error_log DIR/error.log;
		events {}
		http {
			client_body_temp_path DIR; proxy_temp_path DIR; fastcgi_temp_path DIR; uwsgi_temp_path DIR; scgi_temp_path DIR;
			access_log off;
			if_modified_since before;
			client_max_body_size 0;
			server {
				listen 8080;
				listen 8081 http2;
				root DIR;
				error_page 404 @missing;
				location / { dav_methods PUT; }
				location @missing { return 404 "no such file\n"; }
			}
		}
	`, "DIR", dir))
	ns.Start(t, ns.Command(workloadUID, workloadUID, program, "-c", config))
	awaitListener(t, ns, 8080)
	return dir
}
