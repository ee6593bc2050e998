package httpforward

import (
	"bytes"
	"context"
	"crypto/sha256"
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

	"golang.org/x/net/http/httpguts"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// choppy is a connection that writes in pieces of any size, small ones most of all.
type choppy struct {
	net.Conn
	mu     sync.Mutex
	random *rand.Rand
}

func (c *choppy) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	written := 0
	for len(p) > 0 {
		n := min(len(p), 1+c.random.IntN(1<<c.random.IntN(12)))
		n, err := c.Conn.Write(p[:n])
		written += n
		if err != nil {
			return written, err
		}
		p = p[n:]
	}
	return written, nil
}

type choppyListener struct{ net.Listener }

func (l choppyListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &choppy{Conn: conn, random: rand.New(rand.NewPCG(1, 2))}, nil
}

func TestHTTP2FramesMayComeInAnyPieces(t *testing.T) {
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Protocols: new(http.Protocols), Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		hash := sha256.New()
		n, _ := io.Copy(io.MultiWriter(w, hash), r.Body)
		w.Header().Set(http.TrailerPrefix+"hash", fmt.Sprintf("%d %x %s", n, hash.Sum(nil), r.Header.Get("large")))
	})}
	server.Protocols.SetUnencryptedHTTP2(true)
	served := make(chan struct{})
	go func() {
		defer close(served)
		server.Serve(choppyListener{listener})
	}()
	t.Cleanup(func() { server.Close(); <-served })

	r := newRig(t, listener.Addr().(*net.TCPAddr).AddrPort(), true, func(c *Config) { c.MaxHeadBytes = 128 << 10 })
	client := http2Client(t)
	client.Transport.(*http.Transport).DialContext = func(context.Context, string, string) (net.Conn, error) {
		conn, err := net.Dial("tcp", r.address)
		if err != nil {
			return nil, err
		}
		return &choppy{Conn: conn, random: rand.New(rand.NewPCG(3, 4))}, nil
	}
	var clients sync.WaitGroup
	for i := range 8 {
		clients.Go(func() {
			random := rand.New(rand.NewPCG(5, uint64(i)))
			for range 12 {
				body := make([]byte, random.IntN(1<<random.IntN(18)))
				rand.NewChaCha8([32]byte{byte(i)}).Read(body)
				// A head that needs CONTINUATION frames now and then.
				large := fmt.Sprintf("%x", bytes.Repeat([]byte{byte(i)}, random.IntN(1<<random.IntN(15))))
				request, _ := http.NewRequest("POST", "http://"+r.address+"/", bytes.NewReader(body))
				request.Header.Set("large", large)
				response, err := client.Do(request)
				if err != nil {
					t.Error(err)
					return
				}
				got, err := io.ReadAll(response.Body)
				response.Body.Close()
				want := fmt.Sprintf("%d %x %s", len(body), sha256.Sum256(body), large)
				if err != nil || !bytes.Equal(got, body) || response.Trailer.Get("hash") != want {
					t.Errorf("of %d bytes came %d, and %v", len(body), len(got), err)
				}
			}
		})
	}
	clients.Wait()
}

// FuzzHTTP2 lets a peer send arbitrary bytes after a valid beginning. The other side must receive only valid frames and
// header blocks, of open streams, and the connection must end.
func FuzzHTTP2(f *testing.F) {
	get := rawFrame(1, 5, 1, "\x82\x86\x84\x41\x01a")
	post := rawFrame(1, 4, 1, "\x83\x86\x84\x41\x01a")
	ok := rawFrame(1, 4, 1, "\x88")
	for _, seed := range []string{
		get, post + rawFrame(0, 1, 1, "body"), post + rawFrame(1, 5, 1, "\x40\x01a\x01\x10"), post + rawFrame(1, 5, 1, "\x40\x01a\x01\x00"),
		post + rawFrame(0, 8, 1, "\x02ab..") + rawFrame(1, 5, 1, "\x40\x01a\x01b"),
		rawFrame(1, 0, 1, "\x82\x86") + rawFrame(9, 4, 1, "\x84\x41\x01a"), get + rawFrame(3, 0, 1, "\x00\x00\x00\x08"),
		rawFrame(8, 0, 0, "\x00\x00\x00\x01") + rawFrame(6, 0, 0, "12345678") + rawFrame(4, 0, 0, "\x00\x01\x00\x00\x00\x00"),
		ok + rawFrame(0, 0, 1, "answer") + rawFrame(1, 5, 1, "\x40\x01a\x01b"), rawFrame(7, 0, 0, "\x00\x00\x00\x01\x00\x00\x00\x00"),
		rawFrame(2, 0, 1, "\x00\x00\x00\x00\x00") + rawFrame(0xfa, 0, 0, "x"),
	} {
		f.Add(true, []byte(seed))
		f.Add(false, []byte(seed))
	}
	f.Fuzz(func(t *testing.T, fromDown bool, hostile []byte) {
		_, client, server := meet(t, func(c *Config) { c.HeadTimeout, c.IdleTimeout = time.Second, time.Second })
		from, to := client, server
		if !fromDown {
			from, to = server, client
			client.sends("GET 1")
			server.reads("GET 1")
			client.sends("POST 3")
			server.reads("POST 3")
		}
		from.conn.Write(hostile)
		from.conn.CloseWrite()
		drained := make(chan struct{})
		go func() {
			defer close(drained)
			io.Copy(io.Discard, from.conn)
		}()
		wantGoodFrames(t, to, fromDown)
		to.conn.Close()
		<-drained
	})
}

// wantGoodFrames reads to the end, and checks frames and header blocks.
func wantGoodFrames(t *testing.T, s *speaker, requests bool) {
	t.Helper()
	s.framer.AllowIllegalReads = false
	decoder := hpack.NewDecoder(64<<10, nil)
	var block []byte
	last := uint32(0)
	for {
		frame, err := s.framer.ReadFrame()
		var violation http2.ConnectionError
		var bad http2.StreamError
		if errors.As(err, &violation) || errors.As(err, &bad) {
			t.Fatalf("the other side sees %v: %v", err, s.framer.ErrorDetail())
		}
		if err != nil {
			return
		}
		h := frame.Header()
		switch f := frame.(type) {
		case *http2.HeadersFrame:
			block = append(block[:0], f.HeaderBlockFragment()...)
		case *http2.ContinuationFrame:
			block = append(block, f.HeaderBlockFragment()...)
		}
		if (h.Type == http2.FrameHeaders || h.Type == http2.FrameContinuation) && h.Flags.Has(http2.FlagHeadersEndHeaders) {
			wantGoodFields(t, decoder, block)
		}
		if h.Type == http2.FrameHeaders && requests {
			last = max(last, h.StreamID)
		}
		if requests && h.StreamID > last {
			t.Fatalf("the other side sees %v of a stream that it does not know", frame)
		}
	}
}

// wantGoodFields checks a header block by RFC 9113 §8.2.1: pseudo-fields come first, names are tokens without capitals,
// and values have no NUL, CR or LF. The framer's own check is stricter: it rejects every control character, although a
// recipient may retain them (RFC 9110 §5.5) and we forward them, as in HTTP/1.
func wantGoodFields(t *testing.T, decoder *hpack.Decoder, block []byte) {
	t.Helper()
	fields, err := decoder.DecodeFull(block)
	if err != nil {
		t.Fatalf("the other side cannot decode %q: %v", block, err)
	}
	regular := false
	for _, f := range fields {
		name := strings.TrimPrefix(f.Name, ":")
		if f.IsPseudo() && regular || !httpguts.ValidHeaderFieldName(name) || name != strings.ToLower(name) || strings.ContainsAny(f.Value, "\x00\r\n") {
			t.Fatalf("the other side sees the field %q of %q", f, fields)
		}
		regular = !f.IsPseudo()
	}
}
