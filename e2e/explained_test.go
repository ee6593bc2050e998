package e2e

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// tap starts to follow records, and returns what waits for n of them and returns what was printed.
func (s *stage) tap(t *testing.T, n int, form string) (wait func() string) {
	t.Helper()
	var out bytes.Buffer
	cmd := s.pod.Command(workloadUID, workloadUID, pillion, "tap", "-n", fmt.Sprint(n), "-o", form, "--status", "403")
	cmd.Stdout = &out
	process := s.pod.Start(t, cmd)
	nettest.Eventually(t, "tap follows the records", func() bool {
		_, live := s.admin(t, "GET", "/live")
		return strings.Contains(live, `"followers":1`)
	})
	return func() string {
		if code, err := process.Wait(nettest.Patience); err != nil || code != 0 {
			t.Fatalf("tap: exit code %d, %v", code, err)
		}
		return out.String()
	}
}

// meshRequest sends a request inside mutual TLS, with the certificate of the control plane's workload, and returns the status.
func (s *stage) meshRequest(t *testing.T, control *istiod, address, head string) int {
	t.Helper()
	file := filepath.Join(control.directory, "workload.pem")
	certificate, err := tls.LoadX509KeyPair(file, file)
	if err != nil {
		t.Fatal(err)
	}
	raw := s.inbound().dial(t, address)
	defer raw.Close()
	raw.SetDeadline(time.Now().Add(nettest.Patience))
	conn := tls.Client(raw, &tls.Config{
		Certificates: []tls.Certificate{certificate}, InsecureSkipVerify: true, NextProtos: []string{"istio-http/1.1", "istio"},
	})
	if _, err := conn.Write([]byte(head)); err != nil {
		t.Fatal(err)
	}
	response, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	return response.StatusCode
}

// A request that policies deny is explained to those who follow records: why no policy of the control plane applies.
func TestTapExplainsDenials(t *testing.T) {
	t.Parallel()
	s, control := newMeshStage(t)
	control.start(t, "STRICT", "-policies", "2")
	awaitReady(t, s.pod, s.agent)
	listener := s.inbound().listen(t)
	go http.Serve(listener, http.NotFoundHandler())
	t.Cleanup(func() { listener.Close() })
	deny := func() {
		head := "DELETE /admin HTTP/1.1\r\nHost: shop\r\nAuthorization: Bearer hidden\r\nConnection: close\r\n\r\n"
		if status := s.meshRequest(t, control, net.JoinHostPort(nettest.PodIP4.String(), port(listener)), head); status != 403 {
			t.Fatalf("status %d, want 403", status)
		}
	}
	deny()
	nettest.Eventually(t, "the first record to be closed, before anybody follows", func() bool {
		_, records := s.admin(t, "GET", "/live/records")
		return strings.Contains(records, `"status":403`)
	})
	const last = `ns[shop]-policy[policy-01]-rule[9]: does not apply, since header :method "DELETE" is not equal to "GET"`
	wait := s.tap(t, 1, "json")
	deny()
	var record struct{ Details, Policies string }
	if err := json.Unmarshal([]byte(wait()), &record); err != nil {
		t.Fatal(err)
	}
	if lines := strings.Split(record.Policies, "\n"); len(lines) != 10 || !strings.HasPrefix(lines[9], last) || strings.Contains(record.Policies, "hidden") {
		t.Errorf("the policies are\n%s", record.Policies)
	}
	nettest.Eventually(t, "tap has left", func() bool {
		_, live := s.admin(t, "GET", "/live")
		return strings.Contains(live, `"followers":0`)
	})
	wait = s.tap(t, 1, "text")
	deny()
	if text := wait(); strings.Count(text, "\n") != 11 || !strings.Contains(text, " policy_denied") || !strings.Contains(text, "\n    "+last) {
		t.Errorf("tap printed\n%s", text)
	}
	if _, records := s.admin(t, "GET", "/live/records"); strings.Count(records, `"policies"`) != 2 || strings.Count(records, `"status":403`) != 3 {
		t.Errorf("explained otherwise than while tapped:\n%s", records)
	}
}

func port(listener net.Listener) string {
	_, port, _ := net.SplitHostPort(listener.Addr().String())
	return port
}
