package secure

import (
	"bytes"
	crand "crypto/rand"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/secure/securetest"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

const (
	idOfServer = "spiffe://cluster.local/ns/shop/sa/server"
	idOfClient = "spiffe://cluster.local/ns/shop/sa/client"
)

// world is a mesh with one authority.
type world struct {
	*securetest.Authority
	server, client *tls.Certificate
	poller         *tcp.Poller
}

func newWorld(t testing.TB) *world {
	t.Helper()
	poller, err := tcp.NewPoller()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { poller.Close() })
	a := securetest.New(t, "root of the mesh")
	return &world{a, a.Leaf(t, idOfServer, nil), a.Leaf(t, idOfClient, nil), poller}
}

func (w *world) verifier() *Verifier {
	return &Verifier{Trust: func() (Trust, error) { return Trust{Roots: w.Roots}, nil }, SPIFFE: true}
}

// mutual is how an inbound filter chain of the mesh ends TLS.
func (w *world) mutual(protocols ...string) ServerConfig {
	return ServerConfig{
		Certificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return w.server, nil },
		Protocols:   protocols, Clients: w.verifier(),
	}
}

// peer is a configuration of crypto/tls for the other end.
func (w *world) peer(protocols ...string) *tls.Config {
	return &tls.Config{
		Certificates: []tls.Certificate{*w.client}, RootCAs: w.Roots.Pool, ClientCAs: w.Roots.Pool, InsecureSkipVerify: true,
		NextProtos: protocols, ClientAuth: tls.RequireAnyClientCert,
	}
}

// pair returns the ends of a connection. The second one was accepted.
func (w *world) pair(t testing.TB) (net.Conn, *tcp.Conn) {
	t.Helper()
	listener, err := w.poller.Listen(netip.MustParseAddrPort("127.0.0.1:0"))
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	far, err := net.Dial("tcp4", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { far.Close() })
	far.SetDeadline(time.Now().Add(nettest.Patience))
	near, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(near.Close)
	return far, near
}

// end is our end of a connection, and its waiter.
type end struct {
	*tcp.Conn
	w       *tcp.Waiter
	session *Session
}

// serve performs the handshake of a server with a crypto/tls client on the other end, which may split its writes.
func (w *world) serve(t testing.TB, server ServerConfig, client *tls.Config, wrap func(net.Conn) net.Conn) (*tls.Conn, *end, error) {
	t.Helper()
	far, near := w.pair(t)
	if wrap != nil {
		far = wrap(far)
	}
	peer := tls.Client(far, client)
	go peer.Handshake()
	e := &end{Conn: near, w: tcp.NewWaiter(t.Context())}
	t.Cleanup(e.w.Close)
	var err error
	e.session, err = Server(e.w, near, nil, NewServer(server), Memory{}, time.Now().Add(nettest.Patience))
	return peer, e, err
}

// ends returns both ends of a connection of ours, after the handshake.
func (w *world) ends(t testing.TB) (client, server *end) {
	t.Helper()
	listener, err := w.poller.Listen(netip.MustParseAddrPort("127.0.0.1:0"))
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	client, server = &end{w: tcp.NewWaiter(t.Context())}, &end{w: tcp.NewWaiter(t.Context())}
	address := listener.Addr()
	if client.Conn, err = w.poller.Dial(client.w, netip.Addr{}, address, time.Now().Add(nettest.Patience)); err != nil {
		t.Fatal(err)
	}
	if server.Conn, err = listener.Accept(); err != nil {
		t.Fatal(err)
	}
	for _, e := range []*end{client, server} {
		t.Cleanup(e.w.Close)
		t.Cleanup(e.Conn.Close)
	}
	done := make(chan error)
	go func() {
		var err error
		client.session, err = Client(client.w, client.Conn, NewClient(ClientConfig{
			Protocols: []string{"h2"}, Servers: w.verifier(), Certificate: func() (*tls.Certificate, error) { return w.client, nil },
		}), time.Now().Add(nettest.Patience))
		done <- err
	}()
	server.session, err = Server(server.w, server.Conn, nil, NewServer(w.mutual("h2")), Memory{}, time.Now().Add(nettest.Patience))
	if err := errors.Join(err, <-done); err != nil {
		t.Fatal(err)
	}
	return client, server
}

// read reads once, after waits as the engines wait.
func (e *end) read(p []byte) (int, error) {
	for {
		if e.Readable() {
			if n, err := e.Read(p); err != tcp.ErrAgain {
				return n, err
			}
		}
		if err := e.w.Wait(time.Now().Add(nettest.Patience), e.Conn, nil); err != nil {
			return 0, err
		}
	}
}

// readAll reads pieces to the end.
func (e *end) readAll(piece int) ([]byte, error) {
	var all []byte
	for p := make([]byte, piece); ; {
		n, err := e.read(p)
		all = append(all, p[:n]...)
		if err == io.EOF {
			return all, nil
		}
		if err != nil {
			return all, err
		}
	}
}

// writeAll writes pieces, and then the close message.
func (e *end) writeAll(all []byte, piece int) error {
	for len(all) > 0 {
		n, err := e.Write(all[:min(piece, len(all))])
		all = all[n:]
		if err == tcp.ErrAgain {
			err = e.w.Wait(time.Now().Add(nettest.Patience), e.Conn, nil)
		}
		if err != nil {
			return err
		}
	}
	return e.CloseWrite()
}

// splitter writes a few bytes at a time.
type splitter struct {
	net.Conn
	piece int
}

func (s splitter) Write(p []byte) (int, error) {
	for rest := p; len(rest) > 0; {
		n, err := s.Conn.Write(rest[:min(s.piece, len(rest))])
		if err != nil {
			return 0, err
		}
		rest = rest[n:]
	}
	return len(p), nil
}

func TestBytesPassUnchangedBothWays(t *testing.T) {
	w := newWorld(t)
	body := make([]byte, 300_000)
	crand.Read(body)
	for name, c := range map[string]struct {
		version        uint16
		piece          int // of our reads and writes
		segment, write int // of the peer
	}{
		"1.3":                            {tls.VersionTLS13, 16 << 10, 1 << 20, 1 << 20},
		"1.2":                            {tls.VersionTLS12, 16 << 10, 1 << 20, 1 << 20},
		"small reads of large records":   {tls.VersionTLS13, 700, 1 << 20, 1 << 20},
		"many records in a segment":      {tls.VersionTLS13, 16 << 10, 1 << 20, 100},
		"records over many segments":     {tls.VersionTLS13, 16 << 10, 1300, 1 << 20},
		"records of one size with reads": {tls.VersionTLS13, 1000, 1 << 20, 1000},
		"larger writes than a record":    {tls.VersionTLS13, 100_000, 1 << 20, 1 << 20},
	} {
		t.Run(name, func(t *testing.T) {
			config := w.peer()
			config.MinVersion, config.MaxVersion = c.version, c.version
			peer, e, err := w.serve(t, w.mutual(), config, func(conn net.Conn) net.Conn { return splitter{conn, c.segment} })
			if err != nil {
				t.Fatal(err)
			}
			if e.session.Version != c.version {
				t.Errorf("version %x, want %x", e.session.Version, c.version)
			}
			sent := make(chan error, 1)
			go func() {
				_, err := io.CopyBuffer(struct{ io.Writer }{peer}, struct{ io.Reader }{bytes.NewReader(body)}, make([]byte, c.write))
				sent <- errors.Join(err, peer.CloseWrite())
			}()
			if got, err := e.readAll(c.piece); err != nil || !bytes.Equal(got, body) {
				t.Fatalf("%d of %d bytes arrived here, %v", len(got), len(body), err)
			}
			if err := <-sent; err != nil {
				t.Fatal(err)
			}
			received := make(chan []byte, 1)
			go func() {
				all, err := io.ReadAll(peer)
				if err != nil {
					t.Error(err)
				}
				received <- all
			}()
			if err := e.writeAll(body, c.piece); err != nil {
				t.Fatal(err)
			}
			if got := <-received; !bytes.Equal(got, body) {
				t.Errorf("%d of %d bytes arrived at the peer", len(got), len(body))
			}
		})
	}
}

// The records of a peer that sends them in one segment and then waits are all read. A Buffered that is wrong would leave
// some of them in crypto/tls, where no event reports them.
func TestRecordsThatArriveTogetherAreAllRead(t *testing.T) {
	w := newWorld(t)
	for _, piece := range []int{1, 3, 10, 100} {
		hold := &holder{}
		peer, e, err := w.serve(t, w.mutual(), w.peer(), func(conn net.Conn) net.Conn { hold.Conn = conn; return hold })
		if err != nil {
			t.Fatal(err)
		}
		if err := peer.Handshake(); err != nil { // its goroutine writes no more
			t.Fatal(err)
		}
		for round := range 3 {
			hold.on = true
			for _, text := range []string{"abcdefghij", "k", "", "lmnopqrst", "uvw"} {
				io.WriteString(peer, text)
			}
			hold.on = false
			if err := hold.flush(); err != nil {
				t.Fatal(err)
			}
			var got []byte
			for p := make([]byte, piece); len(got) < 23; {
				n, err := e.read(p)
				if err != nil {
					t.Fatalf("pieces of %d, round %d: %v after %q", piece, round, err, got)
				}
				got = append(got, p[:n]...)
			}
			if string(got) != "abcdefghijklmnopqrstuvw" {
				t.Fatalf("pieces of %d: %q", piece, got)
			}
			if n, err := e.Read(make([]byte, 10)); err != tcp.ErrAgain {
				t.Fatalf("pieces of %d: a read without data returns %d, %v", piece, n, err)
			}
			if e.Readable() {
				t.Errorf("pieces of %d: readable without data", piece)
			}
		}
	}
}

// holder keeps what is written while on.
type holder struct {
	net.Conn
	on   bool
	held []byte
}

func (h *holder) Write(p []byte) (int, error) {
	if h.on {
		h.held = append(h.held, p...)
		return len(p), nil
	}
	return h.Conn.Write(p)
}

func (h *holder) flush() error {
	_, err := h.Conn.Write(h.held)
	h.held = nil
	return err
}

func TestAnEndWithoutACloseMessageIsATruncation(t *testing.T) {
	w := newWorld(t)
	for _, orderly := range []bool{true, false} {
		peer, e, err := w.serve(t, w.mutual(), w.peer(), nil)
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(peer, "the beginning")
		if orderly {
			err = peer.Close()
		} else {
			err = peer.NetConn().Close()
		}
		if err != nil {
			t.Fatal(err)
		}
		got, err := e.readAll(100)
		if string(got) != "the beginning" || orderly != (err == nil) || !orderly && err != io.ErrUnexpectedEOF {
			t.Errorf("close message %v: %q, %v", orderly, got, err)
		}
	}
}

func TestAConnectionIsHalfClosedByACloseMessage(t *testing.T) {
	w := newWorld(t)
	peer, e, err := w.serve(t, w.mutual(), w.peer(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := e.writeAll([]byte("question"), 100); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(peer); err != nil || string(got) != "question" {
		t.Fatalf("the peer reads %q, %v", got, err)
	}
	io.WriteString(peer, "answer")
	peer.CloseWrite()
	if got, err := e.readAll(100); err != nil || string(got) != "answer" {
		t.Errorf("read %q, %v after closing the sending half", got, err)
	}
}

// A peer that does not read keeps neither our goroutine nor more than one write's records.
func TestAWriteDoesNotBlock(t *testing.T) {
	w := newWorld(t)
	peer, e, err := w.serve(t, w.mutual(), w.peer(), nil)
	if err != nil {
		t.Fatal(err)
	}
	written, piece := 0, make([]byte, 64<<10)
	for {
		n, err := e.Write(piece)
		if err == tcp.ErrAgain {
			break
		}
		if err != nil || written > 64<<20 {
			t.Fatalf("%d bytes written, %v", written, err)
		}
		written += n
	}
	received := make(chan int64, 1)
	go func() {
		n, _ := io.Copy(io.Discard, peer)
		received <- n
	}()
	if err := e.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	e.Close()
	if n := <-received; n != int64(written) {
		t.Errorf("the peer received %d of %d bytes", n, written)
	}
}

func TestAClientSpeaksWithAServerOfCryptoTLS(t *testing.T) {
	w := newWorld(t)
	far, near := w.pair(t)
	config := w.peer("h2", "http/1.1")
	config.Certificates = []tls.Certificate{*w.server}
	peer := tls.Server(far, config)
	go func() {
		io.Copy(peer, peer)
		peer.CloseWrite()
	}()
	e := &end{Conn: near, w: tcp.NewWaiter(t.Context())}
	defer e.w.Close()
	session, err := Client(e.w, near, NewClient(ClientConfig{
		ServerName:  "outbound_.80_._.web.shop.svc.cluster.local",
		Protocols:   []string{"istio-http/1.1", "istio", "http/1.1"},
		Certificate: func() (*tls.Certificate, error) { return w.client, nil },
		Servers:     w.verifier(),
	}), time.Now().Add(nettest.Patience))
	if err != nil {
		t.Fatal(err)
	}
	if session.Protocol != "http/1.1" || session.SPIFFE != idOfServer || session.Version != tls.VersionTLS13 {
		t.Errorf("session %+v", session)
	}
	if err := e.writeAll([]byte("echo"), 2); err != nil {
		t.Fatal(err)
	}
	if got, err := e.readAll(100); err != nil || string(got) != "echo" {
		t.Errorf("read %q, %v", got, err)
	}
	if state := peer.ConnectionState(); state.ServerName != "outbound_.80_._.web.shop.svc.cluster.local" || len(state.PeerCertificates) != 1 {
		t.Errorf("the server saw %q with %d certificates", state.ServerName, len(state.PeerCertificates))
	}
}
