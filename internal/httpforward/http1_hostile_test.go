package httpforward

import (
	"bytes"
	"io"
	"net"
	"net/netip"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/http1"
	"github.com/pillion-proxy/pillion/internal/http1/http1test"
	"github.com/pillion-proxy/pillion/internal/nettest"
)

// witness is an upstream that answers every request and records every byte.
type witness struct {
	address netip.AddrPort
	mu      sync.Mutex
	seen    bytes.Buffer
}

func newWitness(t testing.TB) *witness {
	t.Helper()
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w := &witness{address: listener.Addr().(*net.TCPAddr).AddrPort()}
	var conns sync.WaitGroup
	conns.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			conns.Go(func() { w.serve(conn) })
		}
	})
	t.Cleanup(func() {
		listener.Close()
		conns.Wait()
	})
	return w
}

func (w *witness) serve(conn net.Conn) {
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(nettest.Patience))
	limits := http1.Limits{Head: 64 << 10, Fields: 300}
	var held []byte
	var head http1.Head
	var body http1.Body
	inBody := false
	for {
		done, n := false, 0
		var err error
		if !inBody {
			if done, err = head.ParseRequest(held, limits); done {
				framing, _ := head.RequestFraming(held)
				body.Start(framing, limits)
				held, inBody = held[head.Length:], true
				continue
			}
		} else {
			n, err = body.Scan(held)
			held = held[n:]
			if body.Done() {
				io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
				head.Reset()
				inBody = false
				continue
			}
		}
		fresh := make([]byte, 4096)
		if err == nil {
			n, err = conn.Read(fresh)
		}
		if err != nil {
			return
		}
		w.Write(fresh[:n])
		held = append(held, fresh[:n]...)
	}
}

func (w *witness) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.seen.Write(p)
}

func (w *witness) text() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.seen.String()
}

// upgradeLine is a hop-by-hop field that the codec drops and the engine sends on.
var upgradeLine = regexp.MustCompile(`(?i)Upgrade: websocket\r\n`)

// The engine handles every request of the table. A malformed one is rejected and ends the connection, and upstream
// receives no request from it or from the bytes after it. A valid one arrives as the table expects.
func TestHostileRequests(t *testing.T) {
	for _, m := range http1test.Requests {
		t.Run(m.Name, func(t *testing.T) {
			t.Parallel()
			up := newWitness(t)
			r := newRig(t, up.address, false, plain, func(c *Config) { c.MaxHeadFields = 256 })
			client := r.dial(t)
			send(t, client, m.Bytes)
			client.CloseWrite()
			answer, err := io.ReadAll(client)
			if err != nil {
				t.Fatalf("the answer ends with %v", err)
			}
			status := ""
			if len(answer) > 12 {
				status = string(answer[9:12])
			}
			switch {
			case m.Want == http1test.Incomplete:
				if status != "" {
					t.Errorf("an incomplete request is answered %q", answer)
				}
			case m.Good():
				if status != "200" {
					t.Errorf("answered %q, want a success", answer)
				}
				if got := upgradeLine.ReplaceAllString(up.text(), ""); !strings.HasPrefix(got, m.Forwarded()) {
					t.Errorf("upstream got %q, want %q", up.text(), m.Forwarded())
				}
			default:
				if status != "400" && status != "431" {
					t.Errorf("answered %q, want 400 or 431", answer)
				}
				if got := r.records.await(t, 0).reason; got != flow.BadFraming && got != flow.HeadTooLarge {
					t.Errorf("the record is %s", got)
				}
				if strings.Count(up.text(), "HTTP/1.") > 1 || strings.Contains(up.text(), "/admin") {
					t.Errorf("upstream got %q", up.text())
				}
			}
		})
	}
}
