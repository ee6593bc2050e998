package e2e

import (
	"crypto/sha256"
	"io"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

func TestReadinessFailsBeforeListenersClose(t *testing.T) {
	t.Parallel()
	s := newStage(t, endless...)
	s.agent.Signal(syscall.SIGTERM)
	nettest.Eventually(t, "readiness is 503", func() bool {
		status, body := ask(t, s, "/healthz/ready")
		return status == 503 && strings.Contains(body, "drain")
	})
	if status, _ := ask(t, s, "/healthz/live"); status != 200 {
		t.Errorf("liveness = %d while draining: the kubelet would kill the pod", status)
	}
	s.everyWay(t, func(t *testing.T, w way) {
		downstream, upstream := w.connect(t)
		converse(t, downstream, upstream)
		downstream.Close()
		upstream.Close()
	})
	// A signal now would reset connections whose ends the agent has not read yet. It reports open connections once a second.
	idle := func() int { return len(s.agent.log.lines("msg=draining", "inbound_left=0", "outbound_left=0")) }
	before := idle()
	nettest.Eventually(t, "no connection is left", func() bool { return idle() > before })
	s.agent.Signal(syscall.SIGTERM)
	if code := s.agent.ends(t, nettest.Patience); code != 0 {
		t.Errorf("exit code %d, want 0", code)
	}
}

// endless are delays longer than any test: an agent that ends nevertheless did not wait for them.
var endless = []string{"--drain-delay", "1h", "--drain-timeout", "2h"}

func TestDrainFinishesTransfersAndRefusesNewConnections(t *testing.T) {
	t.Parallel()
	s := newStage(t, "--drain-delay", "200ms", "--drain-timeout", "1h")
	const size = 64 << 20
	w := s.inbound()
	downstream, upstream := w.connect(t)
	converse(t, downstream, upstream)
	s.agent.Signal(syscall.SIGTERM)
	nettest.Eventually(t, "new connections are refused", func() bool {
		return isRefused(tryConnection(w.from, netip.AddrPortFrom(w.address, 9).String()))
	})
	sent, got := sha256.New(), sha256.New()
	go sendBulk(t, upstream, sent, size)
	n, err := io.Copy(got, onlyReader{downstream})
	if err != nil || n != size || string(sent.Sum(nil)) != string(got.Sum(nil)) {
		t.Errorf("%d bytes of %d arrived, error %v", n, size, err)
	}
	select {
	case <-s.agent.Exited():
		t.Error("the agent ended while the connection was half open")
	default:
	}
	downstream.Close()
	if code := s.agent.ends(t, nettest.Patience); code != 0 {
		t.Errorf("exit code %d, want 0; log:\n%s", code, s.agent.log)
	}
}

func TestConnectionsAreResetAtTheDrainTimeout(t *testing.T) {
	t.Parallel()
	s := newStage(t, "--drain-delay", "0s", "--drain-timeout", "3s")
	var ends []io.Reader
	for _, w := range s.ways() {
		downstream, upstream := w.connect(t)
		converse(t, downstream, upstream)
		ends = append(ends, downstream, upstream)
	}
	begin := time.Now()
	s.agent.Signal(syscall.SIGTERM)
	if code := s.agent.ends(t, nettest.Patience); code != 1 {
		t.Errorf("exit code %d, want 1", code)
	}
	took := time.Since(begin)
	if took < 2900*time.Millisecond {
		t.Errorf("the agent cut connections after %v, before the drain timeout of 3s", took)
	}
	for i, end := range ends {
		if _, err := end.Read(make([]byte, 1)); !isReset(err) {
			t.Errorf("end %d sees %v, want a reset", i, err)
		}
	}
	if lines := s.agent.log.lines("msg=draining", "inbound_left=2", "outbound_left=2"); len(lines) == 0 || len(lines) > 1+int(took.Seconds()) {
		t.Errorf("%d progress lines in %v, want one a second:\n%s", len(lines), took, s.agent.log)
	}
	if got := len(s.agent.log.lines("reason=drain_deadline")); got != 4 {
		t.Errorf("%d connections were logged as cut, want 4", got)
	}
}

func TestSecondSignalEndsTheAgentAtOnce(t *testing.T) {
	t.Parallel()
	s := newStage(t, "--drain-timeout", "1h") // the agent ends only because of the second signal
	downstream, upstream := s.inbound().connect(t)
	converse(t, downstream, upstream)
	s.agent.Signal(syscall.SIGTERM)
	s.agent.log.await(t, "msg=draining")
	s.agent.Signal(syscall.SIGINT)
	if code := s.agent.ends(t, nettest.Patience); code != 1 {
		t.Errorf("exit code %d, want 1", code)
	}
	if _, err := downstream.Read(make([]byte, 1)); !isReset(err) {
		t.Errorf("downstream sees %v, want a reset", err)
	}
}

// The workload may need outbound connections to finish its inbound requests.
func TestInboundDrainsBeforeOutbound(t *testing.T) {
	t.Parallel()
	s := newStage(t, "--drain-delay", "0s", "--drain-timeout", "60s")
	in, out := s.inbound(), s.outbound()
	asked, workload := in.connect(t)
	writes(t, asked, "question")
	reads(t, workload, "question")
	s.agent.Signal(syscall.SIGTERM)
	nettest.Eventually(t, "inbound is closed", func() bool {
		return isRefused(tryConnection(in.from, netip.AddrPortFrom(in.address, 9).String()))
	})
	calledOut, database := out.connect(t) // a new connection, while inbound drains
	converse(t, calledOut, database)
	calledOut.Close()
	database.Close()
	writes(t, workload, "answer")
	workload.Close()
	reads(t, asked, "answer")
	asked.Close()
	if code := s.agent.ends(t, nettest.Patience); code != 0 {
		t.Errorf("exit code %d, want 0; log:\n%s", code, s.agent.log)
	}
}

func TestAgentWithoutConnectionsEndsAfterTheDrainDelay(t *testing.T) {
	t.Parallel()
	s := newStage(t, "--drain-delay", "500ms", "--drain-timeout", "1h")
	begin := time.Now()
	s.agent.Signal(syscall.SIGTERM)
	if code := s.agent.ends(t, nettest.Patience); code != 0 {
		t.Errorf("exit code %d, want 0", code)
	}
	if took := time.Since(begin); took < 500*time.Millisecond {
		t.Errorf("the agent ended after %v, before the delay of 500ms", took)
	}
}

// ask sends a GET to the readiness port, from the peer, as the kubelet does.
func ask(t *testing.T, s *stage, path string) (status int, body string) {
	t.Helper()
	return get(t, s.peer, "http://"+netip.AddrPortFrom(nettest.PodIP4, 15021).String()+path)
}
