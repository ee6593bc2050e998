package e2e

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"
)

// A server closes a kept-alive connection at the moment of the next request. The request is safe and got no response, so the
// agent sends it again, and the client sees no error.
func TestRequestIsRetriedWhenTheServerCloses(t *testing.T) {
	t.Parallel()
	const requests = 40
	newStage(t).eachDirection(t, func(t *testing.T, w way) {
		for _, origin := range []struct {
			name  string
			serve func(conn net.Conn, r *bufio.Reader, serial int) bool // false: close now
		}{
			{"closes when the third request comes", func(conn net.Conn, r *bufio.Reader, serial int) bool {
				if serial == 2 {
					r.Peek(1)
					return false
				}
				return answerOne(conn, r)
			}},
			{"closes when the second request has come whole", func(conn net.Conn, r *bufio.Reader, serial int) bool {
				if serial == 1 {
					readRequest(r)
					return false
				}
				return answerOne(conn, r)
			}},
			{"resets when the second request comes", func(conn net.Conn, r *bufio.Reader, serial int) bool {
				if serial == 1 {
					r.Peek(1)
					conn.(*net.TCPConn).SetLinger(0)
					return false
				}
				return answerOne(conn, r)
			}},
		} {
			t.Run(origin.name, func(t *testing.T) {
				listener := w.to.Listen(t, "tcp", netip.AddrPortFrom(w.address, 0).String())
				serveEach(t, listener, func(conn net.Conn) {
					r := bufio.NewReader(conn)
					for serial := 0; origin.serve(conn, r, serial); serial++ {
					}
				})
				downstream := w.dial(t, listener.Addr().String())
				r := bufio.NewReader(downstream)
				for serial := range requests {
					writes(t, downstream, fmt.Sprintf("GET /%d HTTP/1.1\r\nHost: a\r\n\r\n", serial))
					if status, body := readAnswer(t, r); status != "200" || body != fmt.Sprint("/", serial) {
						t.Fatalf("request %d was answered %s %q", serial, status, body)
					}
				}
			})
		}
	})
}

// A server closes a kept-alive connection at once or while it is idle. A client that repeats requests must not fail.
func TestGetsDoNotFailAtServersThatCloseIdleConnections(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	s.eachDirection(t, func(t *testing.T, w way) {
		for _, patience := range []time.Duration{0, time.Millisecond, 2 * time.Millisecond} {
			listener := w.to.Listen(t, "tcp", netip.AddrPortFrom(w.address, 0).String())
			serveEach(t, listener, func(conn net.Conn) {
				for r := bufio.NewReader(conn); answerOne(conn, r) && patience > 0; conn.SetReadDeadline(time.Now().Add(patience)) {
				}
			})
			client := w.client(t, false)
			for serial := range 100 {
				response, err := client.Get(fmt.Sprintf("http://%s/%d", listener.Addr(), serial))
				if err != nil {
					t.Fatalf("patience %v: %v", patience, err)
				}
				if body := text(t, response); response.StatusCode != 200 || body != fmt.Sprint("/", serial) {
					t.Fatalf("patience %v: request %d was answered %d %q", patience, serial, response.StatusCode, body)
				}
				<-time.After(time.Duration(serial%4) * time.Millisecond) // around the time at which the server closes
			}
		}
	})
}

// A workload that closes after each response without announcing it. Its clients keep their connection, also those that do
// not repeat a request.
func TestClientsKeepTheirConnectionWhenTheWorkloadCloses(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	w := s.inbound()
	listener := w.to.Listen(t, "tcp", netip.AddrPortFrom(w.address, 0).String())
	serveEach(t, listener, func(conn net.Conn) { answerOne(conn, bufio.NewReader(conn)) })
	downstream := w.dial(t, listener.Addr().String())
	r := bufio.NewReader(downstream)
	for serial := range 50 {
		method := []string{"GET", "POST"}[serial%2]
		writes(t, downstream, fmt.Sprintf("%s /%d HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n", method, serial))
		status, body := readAnswer(t, r)
		if status == "503" && method == "POST" {
			continue // it reached the connection that was about to close, as it may without the agent
		}
		if status != "200" || body != fmt.Sprint("/", serial) {
			t.Fatalf("request %d was answered %s %q", serial, status, body)
		}
	}
}

// answerOne answers a request with its target and keeps the connection.
func answerOne(conn net.Conn, r *bufio.Reader) bool {
	target, err := readRequest(r)
	if err == nil {
		_, err = fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(target), target)
	}
	return err == nil
}

// A request that is not idempotent is not repeated: if the server closes after it received a POST, the answer is 503.
func TestNonIdempotentRequestIsNotRetried(t *testing.T) {
	t.Parallel()
	newStage(t).eachDirection(t, func(t *testing.T, w way) {
		var posts atomic.Int64
		listener := w.to.Listen(t, "tcp", netip.AddrPortFrom(w.address, 0).String())
		serveEach(t, listener, func(conn net.Conn) {
			r := bufio.NewReader(conn)
			for {
				first, fields, err := readHead(r)
				if err != nil {
					return
				}
				io.CopyN(io.Discard, r, length(fields))
				if first[:4] == "POST" {
					posts.Add(1)
					return
				}
				io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
			}
		})
		downstream := w.dial(t, listener.Addr().String())
		r := bufio.NewReader(downstream)
		writes(t, downstream, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
		readAnswer(t, r)
		writes(t, downstream, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nbody")
		if status, body := readAnswer(t, r); status != "503" {
			t.Errorf("answered %s %q, want 503", status, body)
		}
		if got := posts.Load(); got != 1 {
			t.Errorf("the server saw the POST %d times", got)
		}
	})
}

// NTLM and Negotiate authenticate the connection, not the request: another client on it would have the first one's identity.
func TestAuthenticatedConnectionIsNotShared(t *testing.T) {
	t.Parallel()
	newStage(t).eachDirection(t, func(t *testing.T, w way) {
		for _, scheme := range []string{"NTLM", "Negotiate"} {
			address := w.serveScript(t, func(conn net.Conn, r *bufio.Reader) error {
				_, fields, err := readHead(r)
				if err != nil {
					return err
				}
				seen := conn.RemoteAddr().String()
				if fields.Get("Authorization") == "" {
					_, err = fmt.Fprintf(conn, "HTTP/1.1 401 No\r\nWWW-Authenticate: %s\r\nContent-Length: %d\r\n\r\n%s", scheme, len(seen), seen)
				} else {
					_, err = fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(seen), seen)
				}
				return err
			})
			first := w.dial(t, address)
			r := bufio.NewReader(first)
			on := make(map[string]bool)
			for _, authorization := range []string{"", "Authorization: " + scheme + " TlRMTVNTUAAB\r\n", "Authorization: " + scheme + " TlRMTVNTUAAD\r\n", ""} {
				writes(t, first, "GET / HTTP/1.1\r\nHost: a\r\n"+authorization+"\r\n")
				_, seen := readAnswer(t, r)
				on[seen] = true
			}
			if len(on) != 1 {
				t.Errorf("%s: one client's handshake went over %d connections", scheme, len(on))
			}
			second := w.dial(t, address)
			writes(t, second, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
			if _, seen := readAnswer(t, bufio.NewReader(second)); on[seen] {
				t.Errorf("%s: another client's request went over the connection", scheme)
			}
			first.Close()
			third := w.dial(t, address)
			writes(t, third, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
			if _, seen := readAnswer(t, bufio.NewReader(third)); on[seen] {
				t.Errorf("%s: another client's request went over the connection that the first one left", scheme)
			}
		}
	})
}
