package e2e

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

func TestRequestsAndResponsesArriveWhole(t *testing.T) {
	t.Parallel()
	handler := func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		w.Header()["X-Several"] = []string{"one", "two", ""}
		w.Header().Set("Server", "the workload's own")
		w.Header().Set("Date", "the workload's own, too")
		w.WriteHeader(299)
		fmt.Fprintf(w, "%s %s %s %q %s", r.Method, r.Host, r.RequestURI, r.Header["X-Many"], body)
	}
	newStage(t).everyDialogue(t, handler, func(t *testing.T, d *dialogue) {
		for _, method := range []string{"GET", "POST", "PUT", "PATCH", "DELETE", "PROPFIND"} {
			body := ""
			if method != "GET" {
				body = "what " + method + " sends"
			}
			request := d.request(t, method, "/a%2Fb/../c//d?x=1&&y=%20;z", strings.NewReader(body))
			request.Host = "some.example"
			request.Header["X-Many"] = []string{"first", "second, third", ""}
			response := d.do(t, request)
			want := method + ` some.example /a%2Fb/../c//d?x=1&&y=%20;z ["first" "second, third" ""] ` + body
			if got := text(t, response); got != want || response.StatusCode != 299 {
				t.Errorf("%s: status %d, %q, want %q", method, response.StatusCode, got, want)
			}
			if got := response.Header["X-Several"]; fmt.Sprint(got) != "[one two ]" {
				t.Errorf("%s: X-Several is %q", method, got)
			}
			if response.Header.Get("Server") != "the workload's own" || response.Header.Get("Date") != "the workload's own, too" {
				t.Errorf("%s: Server and Date are %q and %q", method, response.Header["Server"], response.Header["Date"])
			}
		}
	})
}

// bulk returns a body of pseudo-random bytes for a seed.
func bulk(seed byte, size int64) io.Reader {
	return io.LimitReader(rand.NewChaCha8([32]byte{seed}), size)
}

// digest reads to the end and returns the number of bytes and their hash.
func digest(t testing.TB, body io.Reader) string {
	t.Helper()
	sum := sha256.New()
	n, err := io.Copy(sum, body)
	if err != nil {
		t.Errorf("after %d bytes: %v", n, err)
	}
	return fmt.Sprint(n, " ", hex.EncodeToString(sum.Sum(nil)))
}

// Bodies of 64 MiB in both directions, with and without Content-Length.
func TestLargeBodiesArriveWhole(t *testing.T) {
	t.Parallel()
	const size = 64 << 20
	handler := func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Digest", digest(t, r.Body))
		if r.ContentLength >= 0 {
			w.Header().Set("Content-Length", fmt.Sprint(size))
		}
		io.Copy(w, bulk('s', size))
	}
	sent, want := digest(t, bulk('c', size)), digest(t, bulk('s', size))
	newStage(t).everyDialogue(t, handler, func(t *testing.T, d *dialogue) {
		d.client.Timeout = 10 * nettest.Patience // the machine is busy with other tests, and there is much to carry
		for _, length := range []int64{size, -1} {
			request := d.request(t, "POST", "/", bulk('c', size))
			request.ContentLength = length
			response := d.do(t, request)
			if got := response.Header.Get("X-Digest"); got != sent {
				t.Errorf("length %d: the server got %s, want %s", length, got, sent)
			}
			if got := digest(t, response.Body); got != want {
				t.Errorf("length %d: the client got %s, want %s", length, got, want)
			}
		}
	})
}

// echo responds with the request's body. With HTTP/1, package net/http reads all of it first.
func echo(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	w.Write(body)
}

func TestSequentialRequestsUseOneConnection(t *testing.T) {
	t.Parallel()
	newStage(t).everyDialogue(t, echo, func(t *testing.T, d *dialogue) {
		opened, counted := countingConnections()
		for serial := range 300 {
			want := strings.Repeat(fmt.Sprint(serial, " "), serial)
			request := d.request(t, "POST", "/", strings.NewReader(want))
			if got := text(t, d.do(t, counted(request))); got != want {
				t.Fatalf("request %d was answered %.100q", serial, got)
			}
		}
		if got := d.connections.Load(); got > *opened {
			t.Errorf("the server saw %d connections, the client opened %d", got, *opened)
		}
	})
}

// countingConnections returns what counts the connections that a client opens for requests, which must follow each other. A
// client of package net/http gives a connection up when its own goroutines are slow on a busy machine.
func countingConnections() (opened *int64, counted func(*http.Request) *http.Request) {
	opened = new(int64)
	trace := &httptrace.ClientTrace{GotConn: func(got httptrace.GotConnInfo) {
		if !got.Reused {
			*opened++
		}
	}}
	return opened, func(r *http.Request) *http.Request {
		return r.WithContext(httptrace.WithClientTrace(r.Context(), trace))
	}
}

func TestConcurrentRequestsAreNotMixedUp(t *testing.T) {
	t.Parallel()
	newStage(t).everyDialogue(t, echo, func(t *testing.T, d *dialogue) {
		var clients sync.WaitGroup
		for serial := range 50 {
			clients.Go(func() {
				for turn := range 5 {
					want := strings.Repeat(fmt.Sprint(serial, "/", turn, " "), 5000)
					request := d.request(t, "POST", "/", strings.NewReader(want))
					response, err := d.client.Do(request)
					if err != nil {
						t.Errorf("client %d: %v", serial, err)
						return
					}
					if got, err := io.ReadAll(response.Body); err != nil || string(got) != want {
						t.Errorf("client %d was answered %.20q, %v", serial, got, err)
					}
					response.Body.Close()
				}
			})
		}
		clients.Wait()
	})
}

func TestTrailersPassBothWays(t *testing.T) {
	t.Parallel()
	handler := func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		w.Header().Set("Trailer", "X-After")
		fmt.Fprintf(w, "%s %s", body, r.Trailer.Get("X-Behind"))
		w.Header().Set("X-After", "trailer value")
	}
	newStage(t).everyDialogue(t, handler, func(t *testing.T, d *dialogue) {
		request := d.request(t, "POST", "/", io.NopCloser(strings.NewReader("body")))
		request.ContentLength = -1
		request.Trailer = http.Header{"X-Behind": {"the body"}}
		response := d.do(t, request)
		if got := text(t, response); got != "body the body" {
			t.Errorf("the server got %q", got)
		}
		if got := response.Trailer.Get("X-After"); got != "trailer value" {
			t.Errorf("the client got the trailer %q", got)
		}
	})
}

// A response that has no body by definition ends with its head, and the connection is reused.
func TestResponsesWithoutBodyDoNotStall(t *testing.T) {
	t.Parallel()
	handler := func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/head":
			w.Header().Set("Content-Length", "12345")
		case "/204":
			w.WriteHeader(http.StatusNoContent)
		case "/304":
			w.Header().Set("Etag", `"abc"`)
			w.WriteHeader(http.StatusNotModified)
		case "/empty":
			w.Header().Set("Content-Length", "0")
		}
	}
	newStage(t).everyDialogue(t, handler, func(t *testing.T, d *dialogue) {
		opened, counted := countingConnections()
		for _, c := range []struct {
			method, path string
			status       int
			length       int64
		}{
			{"HEAD", "/head", 200, 12345},
			{"GET", "/204", 204, 0},
			{"GET", "/304", 304, 0},
			{"GET", "/empty", 200, 0},
			{"HEAD", "/304", 304, 0},
			{"GET", "/empty", 200, 0},
		} {
			response := d.do(t, counted(d.request(t, c.method, c.path, nil)))
			body := text(t, response)
			if response.StatusCode != c.status || body != "" || max(response.ContentLength, 0) != c.length {
				t.Errorf("%s %s: status %d, length %d, body %q, want %d and %d", c.method, c.path,
					response.StatusCode, response.ContentLength, body, c.status, c.length)
			}
		}
		if got := d.connections.Load(); got == 0 || got > *opened {
			t.Errorf("the server saw %d connections, the client opened %d", got, *opened)
		}
	})
}

func TestExpectContinueIsAnswered100(t *testing.T) {
	t.Parallel()
	handler := func(w http.ResponseWriter, r *http.Request) {
		if r.ProtoMajor == 1 && r.Header.Get("Expect") != "100-continue" {
			t.Errorf("Expect is %q", r.Header.Get("Expect"))
		}
		echo(w, r) // whose first read sends 100 Continue
	}
	newStage(t).everyDialogue(t, handler, func(t *testing.T, d *dialogue) {
		var continued bool
		request := d.request(t, "POST", "/", strings.NewReader("body"))
		request.Header.Set("Expect", "100-continue")
		request = request.WithContext(httptrace.WithClientTrace(request.Context(), &httptrace.ClientTrace{
			Got100Continue: func() { continued = true },
		}))
		if got := text(t, d.do(t, request)); got != "body" || !continued {
			t.Errorf("answered %q, 100 received: %v", got, continued)
		}
	})
}

func TestExpectContinueIsAnswered417(t *testing.T) {
	t.Parallel()
	refuse := func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusExpectationFailed) }
	newStage(t).everyDialogue(t, refuse, func(t *testing.T, d *dialogue) {
		body := &watchedReader{}
		request := d.request(t, "POST", "/", body)
		request.Header.Set("Expect", "100-continue")
		response := d.do(t, request)
		if got := text(t, response); got != "" || response.StatusCode != http.StatusExpectationFailed {
			t.Errorf("status %d, %q, want 417", response.StatusCode, got)
		}
		if body.read {
			t.Error("the body was sent nevertheless")
		}
	})
}

// watchedReader is an endless body that records whether it was read.
type watchedReader struct{ read bool }

func (w *watchedReader) Read(p []byte) (int, error) {
	w.read = true
	return len(p), nil
}

func TestEarlyHintsPass(t *testing.T) {
	t.Parallel()
	handler := func(w http.ResponseWriter, r *http.Request) {
		for _, link := range []string{"</style.css>", "</script.js>"} {
			w.Header().Set("Link", link)
			w.WriteHeader(http.StatusEarlyHints)
		}
		w.Header().Del("Link")
		io.WriteString(w, "page")
	}
	newStage(t).everyDialogue(t, handler, func(t *testing.T, d *dialogue) {
		var hints []string
		request := d.request(t, "GET", "/", nil)
		request = request.WithContext(httptrace.WithClientTrace(request.Context(), &httptrace.ClientTrace{
			Got1xxResponse: func(code int, header textproto.MIMEHeader) error {
				hints = append(hints, fmt.Sprint(code, " ", header.Get("Link")))
				return nil
			},
		}))
		response := d.do(t, request)
		if got := text(t, response); got != "page" || response.StatusCode != 200 {
			t.Errorf("status %d, %q", response.StatusCode, got)
		}
		if got := fmt.Sprint(hints); got != "[103 </style.css> 103 </script.js>]" {
			t.Errorf("hints: %s", got)
		}
	})
}

// Bytes are forwarded without waiting for more: each side sends only after it has received from the other.
func TestPartOfABodyIsForwardedAtOnce(t *testing.T) {
	t.Parallel()
	received := make(chan string, 1) // so that a handler ends when the test has failed
	handler := func(w http.ResponseWriter, r *http.Request) {
		piece := make([]byte, len("piece 0"))
		for {
			if _, err := io.ReadFull(r.Body, piece); err != nil {
				break
			}
			received <- string(piece)
		}
		for serial := range 3 {
			fmt.Fprintf(w, "piece %d", serial)
			http.NewResponseController(w).Flush()
			select {
			case <-received:
			case <-r.Context().Done():
				return
			}
		}
	}
	newStage(t).everyDialogue(t, handler, func(t *testing.T, d *dialogue) {
		body, writer := io.Pipe()
		var speaking sync.WaitGroup
		defer speaking.Wait()
		speaking.Go(func() {
			defer writer.Close()
			for serial := range 3 {
				want := fmt.Sprintf("piece %d", serial)
				io.WriteString(writer, want)
				if got := receive(t, received); got != want {
					t.Errorf("the server received %q, want %q", got, want)
					return
				}
			}
		})
		response := d.do(t, d.request(t, "POST", "/", body))
		for serial := range 3 {
			piece := make([]byte, len("piece 0"))
			if _, err := io.ReadFull(response.Body, piece); err != nil || string(piece) != fmt.Sprint("piece ", serial) {
				t.Fatalf("the client received %q, %v", piece, err)
			}
			received <- "and I received it"
		}
		text(t, response)
	})
}

// receive receives from a channel. It fails the test after nettest.Patience.
func receive[T any](t testing.TB, from <-chan T) (value T) {
	t.Helper()
	select {
	case value = <-from:
	case <-time.After(nettest.Patience):
		t.Error("timeout: no value received")
	}
	return value
}

func TestEarlyResponseArrives(t *testing.T) {
	t.Parallel()
	handler := func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusRequestEntityTooLarge)
		io.WriteString(w, "too much")
	}
	newStage(t).everyDialogue(t, handler, func(t *testing.T, d *dialogue) {
		response := d.do(t, d.request(t, "POST", "/", &watchedReader{}))
		if got := text(t, response); got != "too much" || response.StatusCode != http.StatusRequestEntityTooLarge {
			t.Errorf("status %d, %q", response.StatusCode, got)
		}
	})
}

func TestServerNoticesClientAbort(t *testing.T) {
	t.Parallel()
	asked, gone := make(chan struct{}, 1), make(chan struct{}, 1) // so that a handler ends when the test has failed
	handler := func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/begun" {
			io.WriteString(w, "a beginning")
			http.NewResponseController(w).Flush()
		}
		asked <- struct{}{}
		<-r.Context().Done()
		gone <- struct{}{}
	}
	newStage(t).everyDialogue(t, handler, func(t *testing.T, d *dialogue) {
		for _, path := range []string{"/silent", "/begun"} {
			ctx, giveUp := context.WithCancel(t.Context())
			failed := make(chan error, 1)
			go func() {
				response, err := d.client.Do(d.request(t, "GET", path, nil).WithContext(ctx))
				if err == nil {
					_, err = io.ReadAll(response.Body)
					response.Body.Close()
				}
				failed <- err
			}()
			receive(t, asked)
			giveUp()
			receive(t, gone)
			if err := receive(t, failed); !errors.Is(err, context.Canceled) {
				t.Errorf("%s: the client ended with %v", path, err)
			}
		}
	})
}

// A truncated body must not look complete.
func TestClientNoticesServerAbort(t *testing.T) {
	t.Parallel()
	handler := func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/sized" {
			w.Header().Set("Content-Length", "1000")
		}
		io.WriteString(w, "a beginning")
		http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	}
	newStage(t).everyDialogue(t, handler, func(t *testing.T, d *dialogue) {
		for _, path := range []string{"/sized", "/unsized"} {
			response := d.do(t, d.request(t, "GET", path, nil))
			body, err := io.ReadAll(response.Body)
			if err == nil || !strings.HasPrefix("a beginning", string(body)) {
				t.Errorf("%s: the client read %q, %v", path, body, err)
			}
			response.Body.Close()
		}
	})
}
