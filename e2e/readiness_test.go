package e2e

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

func TestReadinessAndLivenessAnswerAllClients(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	for name, from := range map[string]*nettest.Namespace{"kubelet": s.peer, "workload": s.pod} {
		for _, address := range []string{nettest.PodIP4.String(), "[" + nettest.PodIP6.String() + "]"} {
			for path, want := range map[string]int{"/healthz/ready": 200, "/healthz/live": 200, "/other": 404} {
				if status, body := get(t, from, "http://"+address+":15021"+path); status != want {
					t.Errorf("%s asks %s for %s: %d %q, want %d", name, address, path, status, body, want)
				}
			}
		}
	}
}

func TestWaitSucceedsOnceTheAgentIsReady(t *testing.T) {
	t.Parallel()
	nettest.RequireRoot(t)
	pod, _ := nettest.PodAndPeer(t)
	notYet := pod.Listen(t, "tcp", "127.0.0.1:15021")
	cmd := pod.Command(agentUID, agentUID, pillion, "wait", "--timeoutSeconds", "120", "--periodMillis", "20")
	waiting := pod.Start(t, cmd)
	for range 3 { // each failed attempt is followed by another
		conn, err := notYet.Accept()
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
	}
	notYet.Close()
	launchAgent(t, pod, nil)
	if code, err := waiting.Wait(nettest.Patience); err != nil || code != 0 {
		t.Errorf("wait: exit code %d, %v", code, err)
	}
}

func TestWaitReportsTheLastAnswerAtItsTimeout(t *testing.T) {
	t.Parallel()
	nettest.RequireRoot(t)
	pod, _ := nettest.PodAndPeer(t)
	mute := pod.Listen(t, "tcp", "127.0.0.1:4000") // connects, never answers
	sad := pod.Listen(t, "tcp", "127.0.0.1:4001")
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "not ready\nrules: not yet", http.StatusServiceUnavailable)
	})}
	go server.Serve(sad)
	t.Cleanup(func() { server.Close() })
	for _, c := range []struct{ name, url, want string }{
		{"port closed", "http://127.0.0.1:4002/healthz/ready", "refused"},
		{"no answer", "http://" + mute.Addr().String() + "/healthz/ready", "http://127.0.0.1:4000"},
		{"not ready", "http://" + sad.Addr().String() + "/healthz/ready", "rules: not yet"},
	} {
		t.Run(c.name, func(t *testing.T) {
			nettest.UnderLimit(t, 2*time.Second, func(t testing.TB, limit time.Duration) { // in which an answer comes
				begin := time.Now()
				_, stderr, code := execute(t, pod, nil, "wait", "--timeoutSeconds", fmt.Sprint(limit.Seconds()),
					"--requestTimeoutMillis", fmt.Sprint(2*limit.Milliseconds()), "--periodMillis", "50", "--url", c.url)
				if code != 1 || !strings.Contains(stderr, c.want) || strings.Count(stderr, "\n") != 1 {
					t.Errorf("exit code %d, want 1 and one line with %q:\n%s", code, c.want, stderr)
				}
				if took := time.Since(begin); took < limit-limit/20 {
					t.Errorf("wait gave up after %v, before its timeout of %v", took, limit)
				}
			})
		})
	}
}

// get asks url from inside the namespace. The status is 0 when there is no answer.
func get(t *testing.T, from *nettest.Namespace, url string) (status int, body string) {
	t.Helper()
	client := http.Client{
		Timeout: nettest.Patience,
		Transport: &http.Transport{
			DisableKeepAlives: true,
			DialContext: func(_ context.Context, network, address string) (net.Conn, error) {
				return from.Dial(network, address, nettest.Patience)
			},
		},
	}
	response, err := client.Get(url)
	if err != nil {
		return 0, err.Error()
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response.StatusCode, string(text)
}
