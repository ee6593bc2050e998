package hostility

import (
	"crypto/tls"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// startControlPlane starts testdata/controlplane's stand-in for istiod on the pod's loopback interface. It makes the agent a
// sidecar whose ports are PERMISSIVE: clients may begin TLS and need not. It returns the words before the agent's command,
// which give it the volumes and variables of Istio's injector.
func (w *world) startControlPlane(t testing.TB) (before []string) {
	t.Helper()
	directory := t.TempDir()
	program := filepath.Join(directory, "istiod")
	build := exec.Command("go", "build", "-buildvcs=false", "-o", program, "./istiod")
	build.Dir = "../testdata/controlplane"
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building testdata/controlplane (make modules fetches what it needs): %v\n%s", err, out)
	}
	if out, err := exec.Command(program, "-directory", directory, "-port", "0").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	words := append(w.on(0), program, "-directory", directory, "-mtls", "PERMISSIVE")
	cmd := w.pod.Command(0, 0, words[0], words[1:]...)
	cmd.Stderr = os.Stderr
	w.pod.Start(t, cmd)
	mounts := "mount -t tmpfs tmpfs /run && mkdir -p /run/secrets/tokens /run/secrets/istio && echo secret > /run/secrets/tokens/istio-token" +
		` && cat "$0"/root-cert.pem > /run/secrets/istio/root-cert.pem && exec "$@"` // cp fails if it is replaced meanwhile
	return []string{
		"env", "POD_NAME=reviews-v1", "POD_NAMESPACE=default", "SERVICE_ACCOUNT=reader", "INSTANCE_IP=" + nettest.PodIP4.String(),
		"ISTIO_META_CLUSTER_ID=Kubernetes", `PROXY_CONFIG={"discoveryAddress":"127.0.0.1:15012"}`,
		"unshare", "--mount", "--propagation", "private", "sh", "-c", mounts, directory,
	}
}

var errStalled = errors.New("the client stops here")

// stalledHandshake performs the client's part of a handshake up to its certificate: the server has computed its part, and
// holds it. The last bytes are the beginning of a record that does not end.
func stalledHandshake(conn net.Conn, begun func()) {
	client := tls.Client(&stalling{Conn: conn}, &tls.Config{InsecureSkipVerify: true, VerifyConnection: func(tls.ConnectionState) error {
		conn.Write([]byte{23, 3, 3, 0x40, 0}) // of 16 KiB
		conn.Write(make([]byte, 16_000))
		begun()
		return errStalled
	}})
	if errors.Is(client.Handshake(), errStalled) {
		drain(conn)
	}
}

// stalling does not write the alert with which crypto/tls ends the handshake.
type stalling struct {
	net.Conn
	hello bool
}

func (s *stalling) Write(p []byte) (int, error) {
	if s.hello {
		return len(p), nil
	}
	s.hello = true
	return s.Conn.Write(p)
}
