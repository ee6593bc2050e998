package e2e

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// With REDIRECT the workload sees connections from 127.0.0.6. By the PROXY protocol it can receive the client's address.
func TestWorkloadReceivesClientAddressByPROXYProtocol(t *testing.T) {
	t.Parallel()
	s := newStage(t, "--inbound-proxy-protocol-ports", "9000:9005,8081")
	startProxyProtocolNginx(t, s.pod)
	for _, w := range s.ways()[:2] {
		t.Run(w.name, func(t *testing.T) {
			address := netip.AddrPortFrom(w.address, 8081).String()
			out, err := w.from.Run(w.from.Command(workloadUID, workloadUID,
				"curl", "--silent", "--show-error", "--fail", "--noproxy", "*", "--max-time", "60", "http://"+address))
			peer := nettest.PeerIP4
			if w.address.Is6() {
				peer = nettest.PeerIP6
			}
			if want := fmt.Sprintf("from %v to %v\n", peer, w.address); err != nil || out != want {
				t.Fatalf("%q, %v; want %q", out, err, want)
			}
			line := s.agent.log.await(t, "original_destination="+address)
			if attribute(t, line, "protocol") != "opaque" {
				t.Errorf("the connection is not opaque: %s", line)
			}
		})
	}
}

// startProxyProtocolNginx runs nginx on port 8081, where it requires a PROXY protocol header.
func startProxyProtocolNginx(t *testing.T, ns *nettest.Namespace) {
	t.Helper()
	program := requireProgram(t, "nginx")
	dir := userDir(t, workloadUID)
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
			server {
				listen 8081 proxy_protocol;
				listen [::]:8081 proxy_protocol;
				location / { return 200 "from $proxy_protocol_addr to $proxy_protocol_server_addr\n"; }
			}
		}
	`, "DIR", dir))
	ns.Start(t, ns.Command(workloadUID, workloadUID, program, "-c", config))
	awaitListener(t, ns, 8081)
}
