package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// A real curl and a real nginx, each under its own uid, with the rules of both flavours of iptables.
func TestNginxSeesTheExpectedClientAddress(t *testing.T) {
	t.Parallel()
	for _, flavour := range []string{nft, legacy} {
		s := newStageIn(t, flavour)
		logs := map[*nettest.Namespace]string{s.pod: startNginx(t, s.pod), s.peer: startNginx(t, s.peer)}
		for _, w := range s.ways() {
			t.Run(flavour+" "+w.name, func(t *testing.T) {
				path := "/" + strings.ReplaceAll(w.name, " ", "-")
				url := fmt.Sprintf("http://%s%s", netip.AddrPortFrom(w.address, 8080), path)
				out, err := w.from.Run(w.from.Command(workloadUID, workloadUID,
					"curl", "--silent", "--show-error", "--fail", "--noproxy", "*", "--max-time", "60", url))
				if err != nil || out != "hello from "+w.to.Name+"\n" {
					t.Fatalf("curl %s: %q, %v", url, out, err)
				}
				want := fmt.Sprintf("%s %s\n", w.seenAs, path)
				nettest.Eventually(t, "nginx logs "+want, func() bool {
					log, _ := os.ReadFile(logs[w.to])
					return strings.Contains(string(log), want)
				})
				s.agent.log.await(t, "original_destination="+netip.AddrPortFrom(w.address, 8080).String(), "reason=completed")
			})
		}
	}
}

// The workload's connections to localhost and to its own address do not pass through the agent.
func TestLoopbackTrafficBypassesTheAgent(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	for _, address := range []string{"127.0.0.1", "[::1]", nettest.PodIP4.String(), "[" + nettest.PodIP6.String() + "]"} {
		listener := s.pod.Listen(t, "tcp", address+":0")
		conn, err := s.pod.Dial("tcp", listener.Addr().String(), nettest.Patience)
		if err != nil {
			t.Fatal(err)
		}
		far, err := listener.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if far.RemoteAddr().String() != conn.LocalAddr().String() {
			t.Errorf("%s: seen as %v, want %v itself", address, far.RemoteAddr(), conn.LocalAddr())
		}
		conn.Close()
		far.Close()
	}
}

// startNginx runs nginx on port 8080 of both families as the workload's user and returns the path of its access log.
func startNginx(t *testing.T, ns *nettest.Namespace) (accessLog string) {
	t.Helper()
	dir := userDir(t, workloadUID)
	runNginx(t, ns, dir, 8080, fmt.Sprintf(`location / { return 200 "hello from %s\n"; }`, ns.Name))
	return filepath.Join(dir, "access.log")
}

// runNginx runs nginx as the workload's user, with its files in dir and a server with the given directives.
func runNginx(t *testing.T, ns *nettest.Namespace, dir string, port int, directives string) {
	t.Helper()
	program := requireProgram(t, "nginx")
	config := filepath.Join(dir, "nginx.conf")
	writeFile(t, config, strings.NewReplacer("DIR", dir, "PORT", strconv.Itoa(port), "SERVES", directives).Replace(`
		daemon off;
		worker_processes 1;
		pid DIR/nginx.pid;
		error_log DIR/error.log;
		events {}
		http {
			client_body_temp_path DIR; proxy_temp_path DIR; fastcgi_temp_path DIR; uwsgi_temp_path DIR; scgi_temp_path DIR;
			log_format who '$remote_addr $uri';
			access_log DIR/access.log who;
			server {
				listen PORT;
				listen [::]:PORT;
				SERVES
			}
		}
	`))
	ns.Start(t, ns.Command(workloadUID, workloadUID, program, "-c", config))
	awaitListener(t, ns, port)
}
