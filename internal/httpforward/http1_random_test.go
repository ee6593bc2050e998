package httpforward

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// Clients and an upstream behave at random, and break off at random: messages are never mixed up, and no connection or
// record remains open at the end.
func TestRandomPeersNeverMixUpMessagesOrLeakConnections(t *testing.T) {
	t.Parallel()
	o := newOrigin(t)
	r := newRig(t, o.address, false, plain)
	var upstreams, clients sync.WaitGroup
	upstreams.Go(func() {
		for seed := uint64(0); ; seed++ {
			conn, err := o.listener.AcceptTCP()
			if err != nil {
				return
			}
			upstreams.Go(func() { (&whim{t, rand.New(rand.NewPCG(seed, 1)), conn}).serve() })
		}
	})
	for worker := range uint64(8) {
		clients.Go(func() {
			for round := range uint64(60) {
				conn, err := net.Dial("tcp", r.address)
				if err != nil {
					t.Error(err)
					return
				}
				(&whim{t, rand.New(rand.NewPCG(worker, round)), conn.(*net.TCPConn)}).ask()
			}
		})
	}
	clients.Wait()
	o.listener.Close()
	within(t, "the sessions end", func() bool { return r.open.Load() == 0 })
	r.pool.Close()
	upstreams.Wait()
}

// whim is one end of a connection that does as it likes.
type whim struct {
	t      *testing.T
	random *rand.Rand
	conn   *net.TCPConn
}

// chance is true once in n times.
func (w *whim) chance(n int) bool { return w.random.IntN(n) == 0 }

// leave closes in some way.
func (w *whim) leave() {
	if w.chance(2) {
		w.conn.SetLinger(0)
	}
	w.conn.Close()
}

// write sends in pieces, and reports false when it broke off.
func (w *whim) write(message []byte) bool {
	for len(message) > 0 {
		n := len(message)
		if w.chance(3) {
			n = 1 + w.random.IntN(len(message))
		}
		if w.chance(60) {
			return false
		}
		if _, err := w.conn.Write(message[:n]); err != nil {
			return false
		}
		message = message[n:]
	}
	return true
}

// body is made of the letter alone, framed in one of two ways.
func (w *whim) body(letter byte) (field string, framed []byte) {
	size := w.random.IntN(1 << (1 + w.random.IntN(19)))
	body := bytes.Repeat([]byte{letter}, size)
	if w.chance(2) {
		return fmt.Sprintf("Content-Length: %d\r\n", size), body
	}
	for rest := body; ; {
		n := min(len(rest), 1+w.random.IntN(40000))
		framed = append(fmt.Appendf(framed, "%x\r\n", n), rest[:n]...)
		framed = append(framed, "\r\n"...)
		if n == 0 {
			return "Transfer-Encoding: chunked\r\n", framed
		}
		rest = rest[n:]
	}
}

// ask sends requests, one behind the other or in a row, and reads the responses as long as it likes.
func (w *whim) ask() {
	defer w.leave()
	w.conn.SetDeadline(time.Now().Add(nettest.Patience))
	var letters []byte
	var written sync.WaitGroup
	defer written.Wait()
	var requests []byte
	for range 1 + w.random.IntN(4) {
		letter := byte('a' + w.random.IntN(26))
		letters = append(letters, letter)
		method, field, body := "GET", "", []byte(nil)
		if w.chance(2) {
			method = [...]string{"POST", "PUT"}[w.random.IntN(2)]
			field, body = w.body(letter)
		}
		requests = append(fmt.Appendf(requests, "%s /%c HTTP/1.1\r\nHost: a\r\n%s\r\n", method, letter, field), body...)
	}
	readsNothing := w.chance(10)
	reader := &whim{w.t, rand.New(rand.NewPCG(w.random.Uint64(), 0)), w.conn}
	halfCloses := w.chance(3)
	written.Go(func() {
		if !w.write(requests) {
			w.leave()
		} else if halfCloses {
			w.conn.CloseWrite()
		}
	})
	if !readsNothing {
		reader.readResponses(letters)
	}
	w.conn.SetDeadline(time.Now())
}

func (w *whim) readResponses(letters []byte) {
	r := bufio.NewReader(w.conn)
	for _, letter := range letters {
		response, err := http.ReadResponse(r, nil)
		if err != nil {
			return
		}
		w.check("response", response.Body, letter, response.StatusCode == 200)
		if w.chance(30) || response.Close || response.StatusCode != 200 {
			return
		}
	}
}

// check reads a body to its end, or a part, and wants nothing but the letter.
func (w *whim) check(what string, body io.Reader, letter byte, good bool) {
	if w.chance(20) {
		body = io.LimitReader(body, 1000)
	}
	all, err := io.ReadAll(body)
	if rest := bytes.Trim(all, string(letter)); good && len(rest) > 0 {
		w.t.Errorf("the %s for %c has %.100q and %v", what, letter, rest, err)
	}
}

func (w *whim) serve() {
	defer w.leave()
	w.conn.SetDeadline(time.Now().Add(nettest.Patience))
	r := bufio.NewReader(w.conn)
	for {
		request, err := http.ReadRequest(r)
		if err != nil {
			if !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) && !strings.Contains(err.Error(), "reset") {
				w.t.Errorf("upstream reads a request that is none: %v", err)
			}
			return
		}
		letter := request.URL.Path[1]
		early := w.chance(8)
		if !early {
			w.check("request", request.Body, letter, true)
		}
		if w.chance(30) {
			return
		}
		field, body := w.body(letter)
		interim := ""
		if w.chance(5) {
			interim = "HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
		}
		closes := w.chance(10)
		if closes {
			field += "Connection: close\r\n"
		}
		head := fmt.Sprintf("%sHTTP/1.1 200 OK\r\n%s\r\n", interim, field)
		if !w.write(append([]byte(head), body...)) || closes {
			return
		}
		if early {
			w.check("request", request.Body, letter, true)
		}
		if _, err := io.Copy(io.Discard, request.Body); err != nil {
			return
		}
	}
}
