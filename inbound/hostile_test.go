package inbound

import (
	"bufio"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/serve/servetest"
)

// byByte writes each byte on its own.
type byByte struct{ net.Conn }

func (b byByte) Write(p []byte) (int, error) {
	for i := range p {
		if _, err := b.Conn.Write(p[i : i+1]); err != nil {
			return i, err
		}
	}
	return len(p), nil
}

// inRecords writes the ClientHello in records of 100 bytes.
type inRecords struct {
	net.Conn
	begun bool
}

func (r *inRecords) Write(p []byte) (int, error) {
	if r.begun {
		return r.Conn.Write(p)
	}
	r.begun = true
	var records []byte
	for rest := p[5:]; len(rest) > 0; {
		n := min(100, len(rest))
		records = append(append(records, p[0], p[1], p[2], 0, byte(n)), rest[:n]...)
		rest = rest[n:]
	}
	_, err := r.Conn.Write(records)
	return len(p), err
}

// However a ClientHello is cut, its filter chain is found and TLS is ended. One of more than 16 KiB is refused, as by Envoy.
func TestAnUnusualHelloFindsItsChain(t *testing.T) {
	protocols := func(n int) (many []string) { // some 250 bytes each
		for i := range n {
			many = append(many, fmt.Sprintf("%03d%s", i, strings.Repeat("x", 246)))
		}
		return append(many, "istio")
	}
	for _, mode := range []string{"PERMISSIVE, TCP", "STRICT, TCP", "PERMISSIVE, auto"} {
		m := newMeshRig(t, mode)
		for name, c := range map[string]struct {
			wrap      func(net.Conn) net.Conn
			protocols []string
			refused   bool
		}{
			"single bytes": {func(c net.Conn) net.Conn { return byByte{c} }, meshTCP, false},
			"many records": {func(c net.Conn) net.Conn { return &inRecords{Conn: c} }, meshTCP, false},
			"15 KiB":       {func(c net.Conn) net.Conn { return c }, protocols(58), false},
			"20 KiB":       {func(c net.Conn) net.Conn { return c }, protocols(80), true},
		} {
			conn, err := m.handshake(t, c.wrap(m.Dial(t, m.At(81))), m.client, c.protocols...)
			if (err != nil) != c.refused {
				t.Errorf("%s, %s: %v", mode, name, err)
			}
			if err == nil {
				io.WriteString(conn, "\x00echo")
				servetest.Expect(t, conn, "\x00echo")
			}
			conn.Close()
			switch got := m.Await(t); {
			case err == nil && got.Peer != idOfClient:
				t.Errorf("%s, %s: peer %q", mode, name, got.Peer)
			case err != nil && got.Reason != flow.TLSFailed:
				t.Errorf("%s, %s: %v", mode, name, got.Reason)
			}
		}
	}
}

// A request whose body ends without the close message is not a whole request for the workload, and an upload is whole if
// its bytes are.
func TestATruncatedBodyIsNotWhole(t *testing.T) {
	m := newMeshRig(t, "STRICT, auto")
	conns := m.Listen(t, "82")
	for _, truncated := range []bool{false, true} {
		raw := m.Dial(t, m.At(82))
		conn, err := m.handshake(t, raw, m.client, meshTCP...)
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(conn, "\x00upload")
		workload := servetest.Take(t, conns)
		servetest.Expect(t, workload, "\x00upload")
		if truncated {
			raw.CloseWrite() // FIN, and no close message
		} else {
			conn.CloseWrite()
		}
		_, err = workload.Read(make([]byte, 1))
		if whole := err == io.EOF; whole == truncated {
			t.Errorf("truncated %v: the workload reads %v", truncated, err)
		}
		conn.Close()
		workload.Close()
		if got := m.Await(t); (got.Reason == flow.Closed) == truncated {
			t.Errorf("truncated %v: %v", truncated, got.Reason)
		}
	}
}

// A response that its workload resets before it is whole is not ended by a close message.
func TestAResetResponseHasNoCloseMessage(t *testing.T) {
	m := newMeshRig(t, "STRICT, HTTP")
	conns := m.Listen(t, "82")
	conn, err := m.handshake(t, m.Dial(t, m.At(82)), m.client, meshHTTP...)
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(conn, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
	workload := servetest.Take(t, conns)
	if _, err := http.ReadRequest(bufio.NewReader(workload)); err != nil {
		t.Fatal(err)
	}
	servetest.Send(t, workload, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nbeginning")
	response, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	servetest.Expect(t, readerConn{conn, response.Body}, "beginning")
	workload.SetLinger(0)
	workload.Close()
	if _, err := io.ReadAll(response.Body); err == nil {
		t.Error("the client reads an end in order")
	}
	m.Await(t)
}

// readerConn reads from elsewhere.
type readerConn struct {
	net.Conn
	in io.Reader
}

func (r readerConn) Read(p []byte) (int, error) { return r.in.Read(p) }

// Bytes that are not TLS after a beginning that is, and a client that stops in its hello, are refused with a reason.
func TestABrokenHelloIsRefused(t *testing.T) {
	m := newMeshRig(t, "STRICT, TCP")
	for name, hello := range map[string]string{
		"garbage after a header": "\x16\x03\x01\x00\x10\x01\x00\x00\x0c" + strings.Repeat("\xff", 12),
		"an old version":         "\x80\x2e\x01\x00\x02" + strings.Repeat("\x00", 41),
	} {
		conn := m.Dial(t, m.At(81))
		io.WriteString(conn, hello)
		io.ReadAll(conn)
		conn.Close()
		if got := m.Await(t); got.Reason != flow.TLSFailed && got.Reason != flow.TLSRequired {
			t.Errorf("%s: %v, %v", name, got.Reason, got.Err)
		}
	}
	conn := m.Dial(t, m.At(81))
	io.WriteString(conn, "\x16\x03\x01\x02\x00\x01\x00")
	m.AwaitListed(t, 1)
	conn.Close()
	if got := m.Await(t); got.Reason == flow.Closed {
		t.Errorf("half a hello: %v", got.Reason)
	}
}

// A client of TLS 1.2 cannot begin a second handshake.
func TestRenegotiationIsRefused(t *testing.T) {
	m := newMeshRig(t, "STRICT, TCP")
	raw := m.Dial(t, m.At(81))
	conn := tls.Client(raw, &tls.Config{
		Certificates: []tls.Certificate{*m.client}, InsecureSkipVerify: true, NextProtos: meshTCP, MaxVersion: tls.VersionTLS12,
	})
	if err := conn.Handshake(); err != nil {
		t.Fatal(err)
	}
	io.WriteString(conn, "\x00echo")
	servetest.Expect(t, conn, "\x00echo")
	// A ClientHello in the clear, which is no record of this connection, stands for one inside it: crypto/tls cannot send that.
	raw.Write([]byte("\x16\x03\x03\x00\x04\x01\x00\x00\x00"))
	_, err := conn.Read(make([]byte, 1))
	if alert := new(net.OpError); !errors.As(err, &alert) || alert.Op != "remote error" {
		t.Errorf("the client reads %v, want an alert", err)
	}
	conn.Close()
	m.Await(t)
}

// A workload that does not answer HTTP/2 makes no connection opaque whose filter chain is for HTTP: its bytes would pass
// without being judged.
func TestAWorkloadWithoutHTTP2DoesNotOpenAChainForHTTP(t *testing.T) {
	const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
	for mode, opaque := range map[string]bool{"STRICT, HTTP": false, "STRICT, TCP": true} {
		m := newMeshRig(t, mode)
		conns := m.Listen(t, "82")
		conn, err := m.handshake(t, m.Dial(t, m.At(82)), m.client, "istio-h2", "istio", "h2")
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(conn, preface)
		workload := servetest.Take(t, conns)
		servetest.Send(t, workload, "not HTTP/2 at all")
		got, err := bufio.NewReader(conn).Peek(17)
		if is := string(got) == "not HTTP/2 at all"; is != opaque {
			t.Errorf("%s: the client reads %q, %v", mode, got, err)
		}
		io.WriteString(conn, "unjudged")
		workload.CloseWrite()
		conn.CloseWrite()
		if all, _ := io.ReadAll(workload); strings.Contains(string(all), "unjudged") != opaque {
			t.Errorf("%s: the workload reads %q", mode, all)
		}
		conn.Close()
		workload.Close()
	}
}
