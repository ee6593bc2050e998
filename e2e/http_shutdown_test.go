package e2e

import (
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"syscall"
	"testing"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// Requests that arrive during the drain are answered with Connection: close. Idle connections are closed.
func TestKeepAliveEndsWithTheDrain(t *testing.T) {
	t.Parallel()
	s := newStage(t, "--drain-delay", "0s", "--drain-timeout", "60s")
	w := s.inbound()
	const request, answer = "GET / HTTP/1.1\r\nHost: a\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
	idle, idleUpstream := w.ask(t, request)
	readMessage(t, idleUpstream, "")
	writes(t, idleUpstream, answer)
	readMessage(t, idle, "ok")
	busy, busyUpstream := w.ask(t, request)
	readMessage(t, busyUpstream, "")

	s.agent.Signal(syscall.SIGTERM)
	if rest, err := io.ReadAll(idle); err != nil || len(rest) > 0 {
		t.Errorf("the idle connection ends with %q, %v", rest, err)
	}
	nettest.Eventually(t, "new connections are refused", func() bool {
		return isRefused(tryConnection(w.from, netip.AddrPortFrom(w.address, 9).String()))
	})
	writes(t, busyUpstream, answer)
	if got := readMessage(t, busy, "ok"); !carries(got, "Connection", "close") {
		t.Errorf("the last response lacks Connection: close:\n%s", got)
	}
	if rest, err := io.ReadAll(busy); err != nil || len(rest) > 0 {
		t.Errorf("the busy connection ends with %q, %v", rest, err)
	}
	if code := s.agent.ends(t, nettest.Patience); code != 0 {
		t.Errorf("exit code %d, want 0; log:\n%s", code, s.agent.log)
	}
}

// Browsers open connections that they may not use. The drain does not wait for those.
func TestUnusedConnectionDoesNotDelayTheDrain(t *testing.T) {
	t.Parallel()
	s := newStage(t, "--drain-delay", "0s", "--drain-timeout", "60s")
	downstream, upstream := s.inbound().connect(t)
	s.agent.Signal(syscall.SIGTERM)
	if code := s.agent.ends(t, nettest.Patience); code != 0 {
		t.Errorf("exit code %d, want 0; log:\n%s", code, s.agent.log)
	}
	for who, conn := range map[string]net.Conn{"downstream": downstream, "upstream": upstream} {
		if rest, err := io.ReadAll(conn); len(rest) > 0 || err != nil {
			t.Errorf("%s reads %q and %v", who, rest, err)
		}
	}
	s.agent.log.await(t, "reason=drained")
}

// An exchange in progress when the drain begins finishes, in both versions of HTTP.
func TestResponseInProgressFinishesDuringTheDrain(t *testing.T) {
	t.Parallel()
	for _, http2 := range []bool{false, true} {
		t.Run(map[bool]string{false: "HTTP1", true: "h2c"}[http2], func(t *testing.T) {
			t.Parallel()
			s := newStage(t, "--drain-delay", "0s", "--drain-timeout", "60s")
			goOn := make(chan struct{})
			d := newDialogue(t, s.inbound(), http2, func(w http.ResponseWriter, r *http.Request) {
				io.WriteString(w, "first ")
				http.NewResponseController(w).Flush()
				select {
				case <-goOn:
					io.WriteString(w, strings.Repeat("rest", 100_000))
				case <-r.Context().Done():
				}
			})
			response := d.do(t, d.request(t, "GET", "/", nil))
			s.agent.Signal(syscall.SIGTERM)
			nettest.Eventually(t, "new connections are refused", func() bool {
				return isRefused(tryConnection(d.from, netip.AddrPortFrom(d.address, 9).String()))
			})
			close(goOn)
			if got := text(t, response); got != "first "+strings.Repeat("rest", 100_000) {
				t.Errorf("%d bytes of the response arrived", len(got))
			}
			if code := s.agent.ends(t, nettest.Patience); code != 0 {
				t.Errorf("exit code %d, want 0; log:\n%s", code, s.agent.log)
			}
		})
	}
}
