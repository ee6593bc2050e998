package controlplane

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/codes"

	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/istiod"
	"github.com/pillion-proxy/pillion/internal/xds"
)

// errCut is the error of a connection that a test has cut.
var errCut = errors.New("connection reset by peer")

// cutConn is a connection that is cut once it has carried some bytes in one direction.
type cutConn struct {
	net.Conn
	received, sent       atomic.Int64
	readAfter, sentAfter int64 // negative: never
	once                 sync.Once
	cut                  chan struct{}
}

func (c *cutConn) end() {
	c.once.Do(func() {
		c.Conn.Close()
		close(c.cut)
	})
}

func (c *cutConn) Read(b []byte) (int, error) {
	if c.readAfter >= 0 {
		left := c.readAfter - c.received.Load()
		if left <= 0 {
			c.end()
			return 0, errCut
		}
		b = b[:min(len(b), int(left))]
	}
	n, err := c.Conn.Read(b)
	c.received.Add(int64(n))
	return n, err
}

func (c *cutConn) Write(b []byte) (int, error) {
	if c.sentAfter >= 0 && c.sent.Load()+int64(len(b)) > c.sentAfter {
		n, _ := c.Conn.Write(b[:max(c.sentAfter-c.sent.Load(), 0)])
		c.sent.Add(int64(n))
		c.end()
		return n, errCut
	}
	n, err := c.Conn.Write(b)
	c.sent.Add(int64(n))
	return n, err
}

// trial is a client whose connections a test provides.
type trial struct {
	client *xds.Client
	stop   func()
}

// begin starts a client. connect makes each of its connections; the first has number 0.
func begin(t *testing.T, p *plane, delta bool, m *mirror, connect func(number int, conn net.Conn) net.Conn) *trial {
	t.Helper()
	number := -1
	peer := &istiod.Server{Address: p.address, Plaintext: true, Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := new(net.Dialer).DialContext(ctx, network, address)
		if err != nil {
			return nil, err
		}
		number++
		return connect(number, conn), nil
	}}
	return beginWith(t, peer, delta, m)
}

// beginWith starts a client of peer.
func beginWith(t *testing.T, peer *istiod.Server, delta bool, m *mirror) *trial {
	t.Helper()
	encoded, err := node.Encode()
	if err != nil {
		t.Fatal(err)
	}
	a := &trial{client: xds.New(xds.Config{
		Delta: delta, Node: encoded, Handler: m, Log: slog.New(slog.DiscardHandler), MinBackoff: time.Microsecond, MaxBackoff: time.Millisecond,
		Connect: func(ctx context.Context) (xds.Stream, error) {
			connection, err := peer.Connect()
			if err != nil {
				return nil, err
			}
			stream, err := connection.Stream(ctx, xds.Method(delta))
			if err != nil {
				connection.Close()
				return nil, err
			}
			return &closing{stream, connection}, nil
		},
	})}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { a.client.Run(ctx); close(done) }()
	a.stop = func() { cancel(); <-done }
	return a
}

// closing is a stream that closes its connection with it.
type closing struct {
	xds.Stream
	connection *istiod.Connection
}

func (c *closing) Close() {
	c.Stream.Close()
	c.connection.Close()
}

// holding returns what a mirror holds when services are served.
func holding(services ...string) (held []string) {
	for _, name := range services {
		held = append(held, "CDS "+name, "EDS "+name)
	}
	return append(held, "LDS 0.0.0.0_80", "RDS 80")
}

// cutStep is the distance of the places where a connection is cut. With 1 the test takes a minute.
var cutStep = flag.Int64("cut-step", 7, "bytes between the places where a connection is cut")

// The connection of a short exchange is cut anywhere, in each direction. What the control plane has then changed to arrives
// over the next connection.
func TestTheConnectionMayBeCutAnywhere(t *testing.T) {
	bothProtocols(t, func(t *testing.T, delta bool) {
		p := startPlane(t)
		p.serve(t, "1", "cart")
		whole := &cutConn{readAfter: -1, sentAfter: -1, cut: make(chan struct{})}
		m := newMirror()
		a := begin(t, p, delta, m, func(_ int, conn net.Conn) net.Conn { whole.Conn = conn; return whole })
		m.await(t, holding("cart")...)
		received, sent := whole.received.Load(), whole.sent.Load()
		a.stop()
		if received < 500 || sent < 300 {
			t.Fatalf("%d bytes were received and %d sent", received, sent)
		}
		for at := int64(0); at < received; at += *cutStep {
			cutOnce(t, p, delta, &cutConn{readAfter: at, sentAfter: -1, cut: make(chan struct{})})
		}
		for at := int64(0); at < sent; at += *cutStep {
			cutOnce(t, p, delta, &cutConn{readAfter: -1, sentAfter: at, cut: make(chan struct{})})
		}
	})
}

func cutOnce(t *testing.T, p *plane, delta bool, c *cutConn) {
	t.Helper()
	p.serve(t, "1", "cart")
	m := newMirror()
	a := begin(t, p, delta, m, func(number int, conn net.Conn) net.Conn {
		if number > 0 {
			return conn
		}
		c.Conn = conn
		return c
	})
	defer a.stop()
	select {
	case <-c.cut:
	case <-time.After(time.Second): // frames such as pings differ by timing: it is cut when the push arrives
	}
	p.serve(t, "2", "pay")
	m.await(t, holding("pay")...)
	// The acknowledgement of the push may be what is cut.
	deadline := time.Now().Add(patience)
	for status := a.client.Status(); !status.Connected; status = a.client.Status() {
		if time.Now().After(deadline) {
			t.Fatalf("cut after %d bytes read, %d sent: status %+v", c.readAfter, c.sentAfter, status)
		}
		time.Sleep(time.Millisecond)
	}
}

// pair returns the ends of a connection over loopback: unlike a net.Pipe it has buffers.
func pair(t *testing.T) (ours, theirs net.Conn) {
	socket, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Error(err)
		return nil, nil
	}
	defer socket.Close()
	if ours, err = net.Dial("tcp", socket.Addr().String()); err == nil {
		theirs, err = socket.Accept()
	}
	if err != nil {
		t.Error(err)
	}
	t.Cleanup(func() { theirs.Close() })
	return ours, theirs
}

// scripted is a server of HTTP/2 that does what a test says, frame by frame, on one connection.
type scripted struct {
	net.Conn
	*http2.Framer
	mu    sync.Mutex
	block bytes.Buffer
	pack  *hpack.Encoder
}

// accept serves the connection until the first message of a call has come, and goes on to answer pings.
func accept(conn net.Conn) (*scripted, error) {
	s := &scripted{Conn: conn, Framer: http2.NewFramer(conn, conn)}
	s.pack = hpack.NewEncoder(&s.block)
	if _, err := io.ReadFull(conn, make([]byte, len(http2.ClientPreface))); err != nil {
		return nil, err
	}
	if err := s.WriteSettings(); err != nil {
		return nil, err
	}
	called := make(chan error, 1)
	go func() {
		for {
			frame, err := s.ReadFrame()
			if err != nil {
				called <- err
				io.Copy(io.Discard, conn)
				return
			}
			s.mu.Lock()
			switch frame := frame.(type) {
			case *http2.SettingsFrame:
				if !frame.IsAck() {
					s.WriteSettingsAck()
				}
			case *http2.PingFrame:
				s.WritePing(true, frame.Data)
			case *http2.DataFrame:
				select {
				case called <- nil:
				default:
				}
			}
			s.mu.Unlock()
		}
	}()
	return s, <-called
}

// do writes frames.
func (s *scripted) do(write func(s *scripted)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	write(s)
}

// head writes a header block.
func (s *scripted) head(end bool, fields ...string) {
	s.block.Reset()
	for i := 0; i < len(fields); i += 2 {
		s.pack.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	s.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: s.block.Bytes(), EndStream: end, EndHeaders: true})
}

// open writes the head of a response of gRPC.
func (s *scripted) open() { s.head(false, ":status", "200", "content-type", "application/grpc") }

// message writes a message with a prefix of its own.
func (s *scripted) message(flag byte, length uint32, text string) {
	s.WriteData(1, false, append(binary.BigEndian.AppendUint32([]byte{flag}, length), text...))
}

// finish ends the connection in order. Closing it would reset it if bytes of the client have not been read.
func (s *scripted) finish() { s.Conn.(*net.TCPConn).CloseWrite() }

// ending is how a stream ends.
type ending struct {
	name string
	do   func(s *scripted)
	want string // in the error
}

func endings() []ending {
	all := []ending{
		{"OK", func(s *scripted) {
			s.head(true, ":status", "200", "content-type", "application/grpc", "grpc-status", "0")
		}, "closed by the control plane"},
		{"a status of HTTP", func(s *scripted) { s.head(true, ":status", "503") }, "HTTP status 503"},
		{"a web page", func(s *scripted) { s.head(true, ":status", "200", "content-type", "text/html") }, `content type "text/html"`},
		{"no status", func(s *scripted) { s.open(); s.WriteData(1, true, nil) }, "without a status"},
		{"OK after the head", func(s *scripted) { s.open(); s.head(true, "grpc-status", "0") }, "closed by the control plane"},
		{"a compressed message", func(s *scripted) { s.open(); s.message(1, 1, "x") }, "the message is compressed"},
		{"a message that is too long", func(s *scripted) { s.open(); s.message(0, 1<<31, "x") }, "more than the limit of 67108864"},
		{"half a message", func(s *scripted) { s.open(); s.message(0, 9, "x"); s.head(true, "grpc-status", "0") }, "unexpected EOF"},
		{"half a prefix", func(s *scripted) { s.open(); s.WriteData(1, true, []byte{0, 0}) }, "unexpected EOF"},
		{"a malformed response", func(s *scripted) { s.open(); s.message(0, 1, "\xff") }, "response"},
		{"an unknown type", func(s *scripted) { s.open(); s.message(0, 3, "\x22\x01x") }, `unknown type "x"`},
		{"an empty response", func(s *scripted) { s.open(); s.message(0, 0, "") }, `unknown type ""`},
		{"the end of the connection", func(s *scripted) { s.finish() }, "EOF"},
		{"the end of the connection after the head", func(s *scripted) { s.open(); s.finish() }, "EOF"},
		{"GOAWAY", func(s *scripted) {
			s.WriteGoAway(0, http2.ErrCodeEnhanceYourCalm, []byte("too_many_pings"))
			s.finish()
		}, "ENHANCE_YOUR_CALM"},
		{"GOAWAY in order", func(s *scripted) { s.open(); s.WriteGoAway(1, http2.ErrCodeNo, nil); s.finish() }, "GOAWAY"},
		{"bytes of another protocol", func(s *scripted) {
			io.WriteString(s.Conn, "HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
			s.Close()
		}, "http2"},
	}
	for code := codes.Canceled; code <= codes.Unauthenticated; code++ {
		number := strconv.Itoa(int(code))
		name := envoy.GRPCCode(code).String()
		all = append(all,
			ending{"status " + name, func(s *scripted) {
				s.head(true, ":status", "200", "content-type", "application/grpc", "grpc-status", number, "grpc-message", "because%20of "+number)
			}, name + ": because of " + number},
			ending{"late status " + name, func(s *scripted) { s.open(); s.head(true, "grpc-status", number, "grpc-message", "late") }, name + ": late"})
	}
	for _, code := range []http2.ErrCode{http2.ErrCodeNo, http2.ErrCodeProtocol, http2.ErrCodeInternal, http2.ErrCodeRefusedStream, http2.ErrCodeCancel, http2.ErrCodeEnhanceYourCalm} {
		all = append(all,
			ending{"RST_STREAM " + code.String(), func(s *scripted) { s.WriteRSTStream(1, code) }, code.String()},
			ending{"late RST_STREAM " + code.String(), func(s *scripted) { s.open(); s.WriteRSTStream(1, code) }, code.String()})
	}
	return all
}

// Each way in which a stream can end has an error that names it, and the next stream leads to the control plane's state.
func TestTheEndOfAStreamIsNamed(t *testing.T) {
	p := startPlane(t)
	p.serve(t, "1", "cart")
	for _, test := range endings() {
		t.Run(test.name, func(t *testing.T) {
			m := newMirror()
			a := begin(t, p, true, m, func(number int, conn net.Conn) net.Conn {
				if number > 0 {
					return conn
				}
				conn.Close()
				ours, theirs := pair(t)
				go func() {
					if s, err := accept(theirs); err == nil {
						s.do(test.do)
					}
				}()
				return ours
			})
			defer a.stop()
			m.await(t, holding("cart")...)
			status := a.client.Status()
			if status.LastError == nil || !strings.Contains(status.LastError.Error(), test.want) || !status.Connected {
				t.Errorf("error %v, want one with %q; connected: %v", status.LastError, test.want, status.Connected)
			}
		})
	}
}

// An istiod that cannot be verified is named, gets no request, and is tried again.
func TestAnIstiodThatCannotBeVerifiedIsNamed(t *testing.T) {
	p := secured(t)
	p.serve(t, "1", "cart")
	other := newAuthority(t, "secret")
	roots := filepath.Join(t.TempDir(), "roots.pem")
	for _, test := range []struct {
		name       string
		roots      []byte
		serverName string
		want       string
	}{
		{"another root", other.RootPEM(), "127.0.0.1", "unknown authority"},
		{"another name", p.ca.RootPEM(), "istiod.example.com", "istiod.example.com"},
		{"no root", nil, "127.0.0.1", "no certificate"},
	} {
		if err := os.WriteFile(roots, test.roots, 0o600); err != nil {
			t.Fatal(err)
		}
		m, peer := newMirror(), &istiod.Server{Address: p.address, ServerName: test.serverName, Roots: roots}
		a := beginWith(t, peer, true, m)
		ticker := time.NewTicker(time.Millisecond)
		for a.client.Status().Failures < 3 {
			<-ticker.C
		}
		if status := a.client.Status(); status.Connected || !strings.Contains(status.LastError.Error(), test.want) {
			t.Errorf("%s: error %v, want one with %q; connected: %v", test.name, status.LastError, test.want, status.Connected)
		}
		ticker.Stop()
		a.stop()
	}
	if len(p.nodes) > 0 {
		t.Errorf("%d requests arrived", len(p.nodes))
	}
}
