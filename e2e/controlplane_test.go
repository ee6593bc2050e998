package e2e

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// buildIstiod builds testdata/controlplane's stand-in for istiod, a program in a separate module like those of peer.
var buildIstiod = sync.OnceValues(func() (path string, err error) {
	path = filepath.Join(filepath.Dir(pillion), "istiod")
	cmd := exec.Command("go", "build", "-buildvcs=false", "-o", path, "./istiod")
	cmd.Dir = "testdata/controlplane"
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building testdata/controlplane (make modules fetches what it needs): %w\n%s", err, out)
	}
	return path, nil
})

// istiod is a control plane on the pod's loopback interface, with a directory that it keeps over restarts.
type istiod struct {
	pod       *nettest.Namespace
	program   string
	directory string
	process   *nettest.Process
}

// start starts istiod, and returns when it listens. mtls is the mode of inbound ports.
func (i *istiod) start(t *testing.T, mtls string, flags ...string) {
	t.Helper()
	cmd := i.pod.Command(0, 0, i.program, append([]string{"-directory", i.directory, "-mtls", mtls}, flags...)...)
	cmd.Stderr = os.Stderr
	i.process = i.pod.Start(t, cmd)
	awaitListener(t, i.pod, 15012)
}

// newMeshStage returns a stage whose agent is a client of an istiod that does not run yet. The agent has the volumes of
// Istio's injector, and is not ready.
func newMeshStage(t *testing.T, flags ...string) (*stage, *istiod) {
	t.Helper()
	nettest.RequireRoot(t)
	program, err := buildIstiod()
	if err != nil {
		t.Fatal(err)
	}
	s := &stage{}
	s.pod, s.peer = nettest.PodAndPeer(t)
	initPod(t, s.pod, nft)
	i := &istiod{pod: s.pod, program: program, directory: t.TempDir()}
	if out, err := exec.Command(program, "-directory", i.directory, "-port", "0").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	s.launchMeshAgent(t, i, flags...)
	return s, i
}

// launchMeshAgent starts an agent with the volumes of Istio's injector.
func (s *stage) launchMeshAgent(t *testing.T, i *istiod, flags ...string) {
	t.Helper()
	mount := "mount -t tmpfs tmpfs /run && mkdir -p /run/secrets/tokens /run/secrets/istio && echo secret > /run/secrets/tokens/istio-token" +
		" && cp " + i.directory + "/root-cert.pem /run/secrets/istio/ && exec \"$@\""
	wrapper := append([]string{"env"}, injected...)
	wrapper = append(wrapper, `PROXY_CONFIG={"discoveryAddress":"127.0.0.1:15012"}`, "unshare", "--mount", "--propagation", "private", "sh", "-c", mount, "sh")
	s.agent = launchAgent(t, s.pod, wrapper, append([]string{"--control-plane", "auto"}, flags...)...)
	awaitListener(t, s.pod, 15006)
	awaitListener(t, s.pod, 15021)
}

// closedGates returns what readiness answers.
func (s *stage) closedGates(t *testing.T) string {
	t.Helper()
	_, body := get(t, s.peer, "http://"+nettest.PodIP4.String()+":15021/healthz/ready")
	return body
}

// listen listens at the way's end.
func (w way) listen(t *testing.T) *net.TCPListener {
	t.Helper()
	return w.to.Listen(t, "tcp", netip.AddrPortFrom(w.address, 0).String()).(*net.TCPListener)
}

// awaitHeld waits until n connections are open at the agent.
func (s *stage) awaitHeld(t *testing.T, n int) {
	t.Helper()
	nettest.Eventually(t, "the connections to be accepted", func() bool {
		return sample(s.scrape(t), "pillion_open_connections") == float64(n)
	})
}

func TestConnectionsAreHeldUntilTheFirstConfiguration(t *testing.T) {
	t.Parallel()
	s, control := newMeshStage(t, "--configuration-wait", "1h")
	if gates := s.closedGates(t); !strings.Contains(gates, "configuration: no configuration from 127.0.0.1:15012") {
		t.Errorf("readiness: %s", gates)
	}
	ways := []way{s.inbound(), s.outbound()}
	var listeners []*net.TCPListener
	var clients []*net.TCPConn
	for _, w := range ways {
		listeners = append(listeners, w.listen(t))
		clients = append(clients, w.dial(t, listeners[len(listeners)-1].Addr().String()))
		clients[len(clients)-1].Write([]byte("early"))
	}
	s.awaitHeld(t, 2)
	control.start(t, "PERMISSIVE")
	for i, listener := range listeners {
		served, err := listener.AcceptTCP()
		if err != nil {
			t.Fatal(err)
		}
		prepare(t, served)
		early := make([]byte, len("early"))
		if _, err := served.Read(early); err != nil || string(early) != "early" {
			t.Errorf("%s: %q, %v", ways[i].name, early, err)
		}
		converse(t, clients[i], served)
	}
	awaitReady(t, s.pod, s.agent)
	s.agent.log.await(t, "workload certificate renewed", "spiffe_id=spiffe://cluster.local/ns/shop/sa/reader")
	status, _, _ := execute(t, s.pod, nil, "status")
	for _, want := range []string{"istiod       127.0.0.1:15012, connected for", "2 CDS, 1 EDS, 1 LDS", "identity     spiffe://cluster.local/ns/shop/sa/reader, expires in"} {
		if !strings.Contains(status, want) {
			t.Errorf("pillion status does not have %q:\n%s", want, status)
		}
	}
}

func TestALostControlPlaneDisturbsNoConnection(t *testing.T) {
	t.Parallel()
	s, control := newMeshStage(t)
	control.start(t, "PERMISSIVE")
	awaitReady(t, s.pod, s.agent)
	w := s.inbound()
	downstream, upstream := w.connect(t)
	converse(t, downstream, upstream)
	control.process.Kill()
	s.agent.log.await(t, "control plane stream ended")
	converse(t, downstream, upstream)
	for _, w := range s.ways() {
		downstream, upstream := w.connect(t)
		converse(t, downstream, upstream)
	}
	awaitReady(t, s.pod, s.agent)
	connected := len(s.agent.log.lines("control plane connected"))
	control.start(t, "STRICT") // a change is obeyed by new connections, and leaves open ones alone
	nettest.Eventually(t, "the stream to come back", func() bool { return len(s.agent.log.lines("control plane connected")) > connected })
	// One that is accepted before the change has no answer. The open connection ends 45 s after the change, so it is not waited for.
	nettest.Eventually(t, "plain connections to be refused", func() bool { return refusedWithin(t, s.inbound(), time.Second) })
	converse(t, downstream, upstream)
}

// refusedAtOnce reports whether the agent resets a plain connection that sends.
func refusedAtOnce(t *testing.T, w way) bool {
	t.Helper()
	return refusedWithin(t, w, nettest.Patience)
}

func refusedWithin(t *testing.T, w way, patience time.Duration) bool {
	t.Helper()
	client := w.dial(t, w.listen(t).Addr().String())
	client.SetReadDeadline(time.Now().Add(patience))
	client.Write([]byte("plain\n"))
	_, err := client.Read(make([]byte, 1))
	return isReset(err)
}

func TestARestartedAgentIsReadyWithoutItsControlPlane(t *testing.T) {
	t.Parallel()
	kept, err := os.MkdirTemp("/dev/shm", "pillion-kept-") // in memory, as the injector's volume is
	if err == nil {
		t.Cleanup(func() { os.RemoveAll(kept) })
		err = os.Chmod(kept, 0o777)
	}
	if err != nil {
		t.Fatal(err)
	}
	flags := []string{"--kept-configuration", kept, "--drain-delay", "0s"}
	s, control := newMeshStage(t, flags...)
	control.start(t, "STRICT")
	awaitReady(t, s.pod, s.agent)
	s.agent.Signal(syscall.SIGTERM)
	if code := s.agent.ends(t, nettest.Patience); code != 0 {
		t.Fatalf("exit code %d\n%s", code, s.agent.log)
	}
	control.process.Kill()
	s.launchMeshAgent(t, control, flags...)
	awaitReady(t, s.pod, s.agent)
	s.agent.log.await(t, "kept configuration in force")
	if !refusedAtOnce(t, s.inbound()) {
		t.Error("the kept configuration is not obeyed")
	}
	s.agent.log.await(t, "kept workload certificate in use")
	for _, name := range []string{"pillion-configuration", "pillion-identity/key.pem"} {
		info, err := os.Stat(filepath.Join(kept, name))
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v", name, info.Mode())
		}
	}
}

func TestStrictPortsRefusePlainConnectionsByName(t *testing.T) {
	t.Parallel()
	s, control := newMeshStage(t)
	control.start(t, "STRICT")
	awaitReady(t, s.pod, s.agent)
	if !refusedAtOnce(t, s.inbound()) {
		t.Error("a plain connection to a STRICT port was not refused")
	}
	s.agent.log.await(t, "tls_required", "no filter chain of virtualInbound accepts it without TLS: it requires mutual TLS")
	downstream, upstream := s.outbound().connect(t)
	converse(t, downstream, upstream)
}

func TestConnectionsAreRefusedByNameAfterTheWait(t *testing.T) {
	t.Parallel()
	s, _ := newMeshStage(t, "--configuration-wait", "200ms")
	for _, w := range []way{s.inbound(), s.outbound()} {
		conn, err := w.from.Dial("tcp", w.listen(t).Addr().String(), nettest.Patience)
		if err == nil { // otherwise the reset has come before Dial returned
			prepare(t, conn.(*net.TCPConn))
			_, err = conn.Read(make([]byte, 1))
		}
		if !isReset(err) {
			t.Errorf("%s: %v, want a reset", w.name, err)
		}
	}
	s.agent.log.await(t, "connection refused", "reason=no_configuration")
	for _, direction := range []string{"inbound", "outbound"} {
		nettest.Eventually(t, "the refusal to be counted", func() bool {
			return sample(s.scrape(t), "pillion_flows_total", "direction="+direction, "reason=no_configuration") == 1
		})
	}
}

func TestAHeldConnectionEndsWithTheAgent(t *testing.T) {
	t.Parallel()
	s, _ := newMeshStage(t, "--configuration-wait", "1h", "--drain-delay", "0s", "--drain-timeout", "1h")
	w := s.inbound()
	client := w.dial(t, w.listen(t).Addr().String())
	s.awaitHeld(t, 1)
	s.agent.Signal(syscall.SIGTERM)
	if n, err := client.Read(make([]byte, 1)); n != 0 || err == nil || isReset(err) {
		t.Errorf("%d bytes and %v, want an orderly end", n, err)
	}
	if code := s.agent.ends(t, nettest.Patience); code != 0 {
		t.Errorf("exit code %d\n%s", code, s.agent.log)
	}
}
