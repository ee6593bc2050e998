package istiod

import (
	"context"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pillion-proxy/pillion/internal/grpcwire"
)

// oneListener accepts one connection.
type oneListener struct {
	net.Listener
	conns chan net.Conn
	ended chan struct{}
}

func (l *oneListener) Accept() (net.Conn, error) {
	select {
	case conn := <-l.conns:
		return conn, nil
	case <-l.ended:
		return nil, net.ErrClosed
	}
}

func (l *oneListener) Close() error   { return nil }
func (l *oneListener) Addr() net.Addr { return &net.UnixAddr{} }

// mutable is a connection that can be made silent, as one whose other end has lost its power: what is written disappears,
// and nothing can be read.
type mutable struct {
	net.Conn
	silent atomic.Bool
}

func (m *mutable) Write(b []byte) (int, error) {
	if m.silent.Load() {
		return len(b), nil
	}
	return m.Conn.Write(b)
}

func (m *mutable) Read(b []byte) (int, error) {
	for {
		n, err := m.Conn.Read(b)
		if err != nil || !m.silent.Load() {
			return n, err
		}
	}
}

// stream opens a stream over conn and sends a message.
func stream(t *testing.T, conn net.Conn) *grpcwire.Stream {
	t.Helper()
	s := &Server{Address: "istiod:15010", Plaintext: true, Dial: func(context.Context, string, string) (net.Conn, error) { return conn, nil }}
	connection, err := s.Connect()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(connection.Close)
	stream, err := connection.Stream(t.Context(), "/s/m")
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	return stream
}

func TestAnIstiodThatAcceptsAndIsSilentIsLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ours, theirs := net.Pipe()
		go io.Copy(io.Discard, theirs)
		stream, begun := stream(t, ours), time.Now()
		_, err := stream.Receive()
		if took := time.Since(begun); err == nil || !strings.Contains(err.Error(), "connection lost") || took < pingAfter || took > pingAfter+pingTimeout {
			t.Errorf("error %v after %v, want a lost connection within %v", err, took, pingAfter+pingTimeout)
		}
		stream.Close()
	})
}

// serveStream serves one stream, whose messages are answered by echo, over the returned connection.
func serveStream(t *testing.T, answer bool) *mutable {
	t.Helper()
	ours, theirs := net.Pipe()
	listener := &oneListener{conns: make(chan net.Conn, 1), ended: make(chan struct{})}
	listener.conns <- theirs
	server := &http.Server{Protocols: new(http.Protocols), Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/grpc")
		if answer {
			message := make([]byte, 10)
			io.ReadFull(r.Body, message)
			w.Write(message)
			w.(http.Flusher).Flush()
		}
		<-r.Context().Done()
	})}
	server.Protocols.SetUnencryptedHTTP2(true)
	go server.Serve(listener)
	t.Cleanup(func() { close(listener.ended); server.Close(); ours.Close() })
	return &mutable{Conn: ours}
}

func TestAConnectionThatIsHalfOpenIsLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conn := serveStream(t, true)
		stream := stream(t, conn)
		if message, err := stream.Receive(); err != nil || string(message) != "hello" {
			t.Fatalf("%q, error %v", message, err)
		}
		time.Sleep(10 * time.Minute) // pings keep it
		conn.silent.Store(true)
		begun := time.Now()
		_, err := stream.Receive()
		if took := time.Since(begun); err == nil || !strings.Contains(err.Error(), "connection lost") || took > pingAfter+pingTimeout {
			t.Errorf("error %v after %v", err, took)
		}
		stream.Close()
	})
}

// A server that answers pings may be busy: the stream waits.
func TestAnIstiodThatAnswersPingsIsWaitedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		stream := stream(t, serveStream(t, false))
		received := make(chan error, 1)
		go func() {
			_, err := stream.Receive()
			received <- err
		}()
		time.Sleep(time.Hour)
		select {
		case err := <-received:
			t.Errorf("the stream ended: %v", err)
		default:
		}
		stream.Close()
	})
}

// A server that accepts and does not begin TLS is given up after the time for a dial.
func TestAHandshakeWithoutAnAnswerIsGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ours, theirs := net.Pipe()
		go io.Copy(io.Discard, theirs)
		s := &Server{Address: "istiod:15012", ServerName: "istiod", Roots: SystemRoots, Dial: func(context.Context, string, string) (net.Conn, error) { return ours, nil }}
		connection, err := s.Connect()
		if err != nil {
			t.Fatal(err)
		}
		begun := time.Now()
		_, err = connection.Call(t.Context(), "/s/m", nil)
		if took := time.Since(begun); err == nil || !strings.Contains(err.Error(), "TLS handshake timeout") || took != dialTimeout {
			t.Errorf("error %v after %v, want one after %v", err, took, dialTimeout)
		}
		connection.Close()
	})
}
