package sniff

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/budget"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

const (
	patience = nettest.Patience
	blink    = 20 * time.Millisecond // for tests in which time must pass
	waiting  = "tcp.(*Waiter).Wait"
)

// rig is a Detection with a connection to downstream and one to upstream.
type rig struct {
	client, server *net.TCPConn // the far ends
	w              *tcp.Waiter
	cancel         context.CancelFunc
	wakeAll        func()
	Sniffer
}

func newRig(t *testing.T) *rig {
	t.Helper()
	poller, err := tcp.NewPoller()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { poller.Close() })
	r := &rig{Sniffer: Sniffer{Hold: patience}, wakeAll: poller.WakeAll}
	ctx, cancel := context.WithCancel(context.Background())
	r.w, r.cancel = tcp.NewWaiter(ctx), func() { cancel(); poller.WakeAll() }
	r.client, r.Down = accepted(t, poller)
	r.server, r.Up = dialled(t, poller, r.w)
	t.Cleanup(func() {
		cancel()
		r.w.Close()
		r.Read.Release()
		r.UpRead.Release()
	})
	return r
}

// accepted returns the two ends of a connection. The second was accepted, as by the agent's listener.
func accepted(t *testing.T, poller *tcp.Poller) (*net.TCPConn, *tcp.Conn) {
	t.Helper()
	listener, err := poller.Listen(netip.MustParseAddrPort("127.0.0.1:0"))
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	conn, err := net.DialTCP("tcp4", nil, net.TCPAddrFromAddrPort(listener.Addr()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	near, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(near.Close)
	return conn, near
}

// dialled returns the two ends of a connection. The second has dialled.
func dialled(t *testing.T, poller *tcp.Poller, w *tcp.Waiter) (*net.TCPConn, *tcp.Conn) {
	t.Helper()
	listener, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	near, err := poller.Dial(w, netip.Addr{}, listener.Addr().(*net.TCPAddr).AddrPort(), time.Now().Add(patience))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(near.Close)
	conn, err := listener.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn, near
}

// await waits for an event of one of the connections.
func (r *rig) await(t *testing.T, what string, happened func() bool) {
	t.Helper()
	for !happened() {
		if err := r.w.Wait(time.Now().Add(patience), r.Down, r.Up); err != nil {
			t.Fatalf("waiting for %s: %v", what, err)
		}
	}
}

// say writes the pieces one by one.
func say(t *testing.T, conn *net.TCPConn, pieces ...string) {
	for _, piece := range pieces {
		if _, err := io.WriteString(conn, piece); err != nil {
			t.Error(err)
		}
	}
}

// want checks the verdict.
func (r *rig) want(t *testing.T, got Protocol, err error, want Protocol) {
	t.Helper()
	if err != nil || got != want {
		t.Fatalf("%s, %v; want %s", protocolName(got), err, protocolName(want))
	}
}

// wantAll checks that the buffered bytes and those still in the socket are all that downstream sent, followed by EOF.
func (r *rig) wantAll(t *testing.T, sent string) {
	t.Helper()
	r.client.CloseWrite()
	var got []byte
	if r.Read != nil {
		got = append(got, r.Read.Bytes()...)
	}
	for p := make([]byte, 1000); ; {
		n, err := r.Down.Read(p)
		got = append(got, p[:n]...)
		if err == tcp.ErrAgain {
			err = r.w.Wait(time.Now().Add(patience), r.Down, nil)
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if string(got) != sent {
		t.Errorf("found %d of %d bytes: %q", len(got), len(sent), last(got))
	}
}

// phases runs a test in the phase that waits for downstream only, and in the phase that waits for both sides.
func phases(t *testing.T, test func(t *testing.T, r *rig, look func() (Protocol, error))) {
	t.Run("first", func(t *testing.T) {
		r := newRig(t)
		test(t, r, func() (Protocol, error) { r.Delay = patience; return r.First(r.w) })
	})
	t.Run("both", func(t *testing.T) {
		r := newRig(t)
		test(t, r, func() (Protocol, error) { r.Idle = patience; return r.Both(r.w) })
	})
}

func TestDownstreamDecidesTheProtocol(t *testing.T) {
	request := "GET / HTTP/1.1\r\nHost: a\r\n\r\n"
	hello := string(record(hello("example.com", "h2")))
	for _, c := range []struct {
		name   string
		pieces []string
		want   Protocol
	}{
		{"HTTP/1", []string{request}, HTTP1},
		{"HTTP/1, byte by byte", strings.Split(request, ""), HTTP1},
		{"HTTP/1 and much more", []string{request, strings.Repeat("x", 100_000)}, HTTP1},
		{"HTTP/2", []string{preface + "\x00\x00\x00"}, HTTP2},
		{"HTTP/2, byte by byte", strings.Split(preface, ""), HTTP2},
		{"TLS", []string{hello}, TLS},
		{"TLS, byte by byte", pieces(hello, 1), TLS},
		{"opaque", []string{"\x00\x01"}, Opaque},
		{"opaque, byte by byte", strings.Split("INVITE sip:a SIP/2.0\r\n", ""), Opaque},
		{"a line without end", []string{"BREW /" + strings.Repeat("x", Limit)}, Opaque},
		{"a line without end, in pieces", pieces("BREW /"+strings.Repeat("x", Limit), 999), Opaque},
		{"a long request line", []string{"GET /" + strings.Repeat("x", Limit)}, HTTP1},
		{"a long request line, in pieces", pieces("GET /"+strings.Repeat("x", Limit), 999), HTTP1},
		{"an empty line and a request", []string{"\r\n", request}, HTTP1},
	} {
		t.Run(c.name, func(t *testing.T) {
			phases(t, func(t *testing.T, r *rig, look func() (Protocol, error)) {
				done := make(chan struct{})
				go func() {
					defer close(done)
					say(t, r.client, c.pieces...)
				}()
				protocol, err := look()
				<-done
				r.want(t, protocol, err, c.want)
				if tls := c.want == TLS; (r.Hello.ServerName == "example.com") != tls || (len(r.Hello.ALPN) == 1) != tls {
					t.Errorf("Hello = %+v", r.Hello)
				}
				r.wantAll(t, strings.Join(c.pieces, ""))
			})
		})
	}
}

func pieces(text string, size int) (list []string) {
	for len(text) > 0 {
		n := min(size, len(text))
		list, text = append(list, text[:n]), text[n:]
	}
	return list
}

func TestTheDelayBoundsTheWaitForDownstream(t *testing.T) {
	r := newRig(t)
	began := time.Now()
	r.Delay = blink
	protocol, err := r.First(r.w)
	r.want(t, protocol, err, Undecided)
	if r.Read != nil {
		t.Error("an empty buffer is held")
	}
	if waited := time.Since(began); waited < blink {
		t.Errorf("ended after %v, want at least %v", waited, blink)
	}
	// The protocol can still be detected afterwards.
	say(t, r.client, "GET / HTTP/1.1\r\n")
	protocol, err = r.Both(r.w)
	r.want(t, protocol, err, HTTP1)
	r.wantAll(t, "GET / HTTP/1.1\r\n")
}

func TestTheHoldBoundsAnUndecidedBeginning(t *testing.T) {
	phases(t, func(t *testing.T, r *rig, look func() (Protocol, error)) {
		r.Hold = blink
		say(t, r.client, "GE")
		began := time.Now()
		protocol, err := look()
		r.want(t, protocol, err, Opaque)
		if waited := time.Since(began); waited < blink {
			t.Errorf("ended after %v, want at least %v", waited, blink)
		}
		r.wantAll(t, "GE")
	})
}

// A request line that pauses in its middle is HTTP when the hold ends, as it would be behind another request.
func TestAPauseInARequestLineDoesNotHideTheRequest(t *testing.T) {
	phases(t, func(t *testing.T, r *rig, look func() (Protocol, error)) {
		r.Hold = blink
		say(t, r.client, "GET /he")
		protocol, err := look()
		r.want(t, protocol, err, HTTP1)
		r.wantAll(t, "GET /he")
	})
}

// The hold starts at the first byte. Later bytes and the next phase do not restart it.
func TestDribblingDoesNotProlongTheHold(t *testing.T) {
	phases(t, func(t *testing.T, r *rig, look func() (Protocol, error)) {
		r.Hold = 5 * blink
		stop, done := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(done)
			io.WriteString(r.client, "BREW /")
			for ticker := time.NewTicker(blink); ; {
				select {
				case <-ticker.C:
					io.WriteString(r.client, "x")
				case <-stop:
					return
				}
			}
		}()
		protocol, err := look()
		close(stop)
		<-done
		r.want(t, protocol, err, Opaque)
	})
}

// The beginning of a ClientHello that may be answered is held for as long as a handshake may take.
func TestASlowHelloIsHeld(t *testing.T) {
	sent := string(record(hello("example.com", "h2")))
	phases(t, func(t *testing.T, r *rig, look func() (Protocol, error)) {
		r.Hold, r.HelloHold = time.Nanosecond, patience
		say(t, r.client, sent[:20])
		nettest.OnceBlocked(t, waiting, func() { say(t, r.client, sent[20:]) }) // the shorter hold would have ended the wait
		protocol, err := look()
		r.want(t, protocol, err, TLS)
		r.wantAll(t, sent)
	})
	phases(t, func(t *testing.T, r *rig, look func() (Protocol, error)) {
		r.Hold, r.HelloHold = 0, blink
		say(t, r.client, sent[:20])
		if protocol, err := look(); !errors.Is(err, ErrHelloTimeout) || Reason(err) != flow.TLSTimeout {
			t.Errorf("%v, %v", protocol, err)
		}
	})
}

// A ClientHello that may be answered and is too large to be held does not pass for another protocol.
func TestATooLargeHelloIsAnError(t *testing.T) {
	announced := "\x16\x03\x01\x40\x00\x01\x00\x40\x01"
	for name, sent := range map[string]string{"announced": announced, "in records": strings.Repeat("\x16\x03\x01\x00\x01\x01", Limit/6+1)} {
		for _, held := range []time.Duration{0, patience} {
			phases(t, func(t *testing.T, r *rig, look func() (Protocol, error)) {
				r.Hold, r.HelloHold = patience, held
				say(t, r.client, sent)
				protocol, err := look()
				if held == 0 {
					if protocol != Opaque || err != nil {
						t.Errorf("%s, not to be answered: %v, %v", name, protocol, err)
					}
				} else if !errors.Is(err, ErrHelloSize) || Reason(err) != flow.TLSFailed {
					t.Errorf("%s: %v, %v", name, protocol, err)
				}
			})
		}
	}
}

// A ClientHello that may be answered decides, whatever the server has sent. The server's bytes stay for the detection
// inside the TLS.
func TestAHelloDecidesBesideAGreeting(t *testing.T) {
	sent := string(record(hello("example.com", "h2")))
	for name, greeting := range map[string]string{"HTTP/2": settings, "another": "220 ready\r\n"} {
		for _, piece := range []int{len(sent), 20} {
			r := newRig(t)
			r.HelloHold = patience
			say(t, r.server, greeting)
			r.await(t, "the greeting", r.Up.Readable)
			if name == "HTTP/2" {
				if _, err := r.greet(); err != nil || r.greeted.IsZero() {
					t.Fatal(err)
				}
				r.greeted = r.greeted.Add(-patience) // so that its hold is over
			}
			say(t, r.client, sent[:piece])
			r.await(t, "the hello", r.Down.Readable)
			if piece < len(sent) {
				nettest.OnceBlocked(t, waiting, func() { say(t, r.client, sent[piece:]) })
			}
			protocol, err := r.Both(r.w)
			r.want(t, protocol, err, TLS)
			if got := r.Read.Bytes(); string(got) != sent {
				t.Errorf("%s: %d bytes of the hello", name, len(got))
			}
		}
	}
}

// Inside TLS, a greeting of HTTP/2 is held again, and answers no request of HTTP/1.
func TestAGreetingIsKeptForTheDetectionInsideTLS(t *testing.T) {
	for text, want := range map[string]Protocol{opening: HTTP2, "GET / HTTP/1.1\r\n": Opaque} {
		r := newRig(t)
		r.HelloHold, r.Delay = patience, patience
		say(t, r.server, settings)
		r.await(t, "the greeting", r.Up.Readable)
		if _, err := r.greet(); err != nil || r.greeted.IsZero() {
			t.Fatal(err)
		}
		before := r.greeted.Add(-patience)
		r.greeted = before
		r.Take().Release()
		if !r.greeted.After(before) || r.HelloHold != 0 {
			t.Error("the greeting's hold does not begin again, or TLS inside TLS may be ended")
		}
		say(t, r.client, text)
		protocol, err := r.First(r.w)
		r.want(t, protocol, err, want)
	}
}

func TestAnUndecidedBeginningWithoutAHoldIsOpaque(t *testing.T) {
	phases(t, func(t *testing.T, r *rig, look func() (Protocol, error)) {
		r.Hold = 0
		say(t, r.client, "G")
		protocol, err := look()
		r.want(t, protocol, err, Opaque)
		r.wantAll(t, "G")
	})
}

func TestUpstreamThatSendsFirstIsOpaque(t *testing.T) {
	r := newRig(t)
	nettest.OnceBlocked(t, waiting, func() { say(t, r.server, "220 ready\r\n") })
	protocol, err := r.Both(r.w)
	r.want(t, protocol, err, Opaque)
	if r.Read != nil {
		t.Error("an empty buffer is held")
	}
	if got := string(r.UpRead.Bytes()); got != "220 ready\r\n" {
		t.Errorf("upstream's bytes are %q", got)
	}
	r.wantAll(t, "")
}

const (
	settings = "\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x64" // with a limit of 100 streams
	opening  = preface + "\x00\x00\x00\x04\x00\x00\x00\x00\x00"
)

// An HTTP/2 server may send its SETTINGS before a slow client sends its preface. The client's bytes decide, and the
// server's bytes are kept.
func TestServerSettingsDoNotDecide(t *testing.T) {
	for _, c := range []struct {
		name, server, client string
		want                 Protocol
	}{
		{"HTTP/2", settings, opening, HTTP2},
		{"HTTP/2, the server's frame in pieces", settings[:4], opening, HTTP2},
		{"HTTP/1", settings, "GET / HTTP/1.1\r\n", Opaque},
		{"something else", settings, "\x01\x02", Opaque},
		{"not what a server says: another frame", "\x00\x00\x06\x00" + settings[4:], "", Opaque},
		{"not what a server says: an acknowledgement", settings[:4] + "\x01" + settings[5:], "", Opaque},
		{"not what a server says: a long frame", "\x01" + settings[1:], "", Opaque},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t)
			say(t, r.server, c.server)
			r.await(t, "the server's bytes", r.Up.Readable)
			if c.client != "" {
				nettest.OnceBlocked(t, waiting, func() { say(t, r.client, c.client) })
			}
			protocol, err := r.Both(r.w)
			r.want(t, protocol, err, c.want)
			if got := string(r.UpRead.Bytes()); got != c.server {
				t.Errorf("%q is left of the server's bytes", got)
			}
			r.wantAll(t, c.client)
		})
	}
}

// If the client stays silent, the hold ends and the server's greeting is released to it.
func TestTheHoldBoundsAServersGreeting(t *testing.T) {
	r := newRig(t)
	r.Hold = blink
	say(t, r.server, settings)
	began := time.Now()
	protocol, err := r.Both(r.w)
	r.want(t, protocol, err, Opaque)
	if time.Since(began) < blink || string(r.UpRead.Bytes()) != settings {
		t.Errorf("%q after %v", r.UpRead.Bytes(), time.Since(began))
	}
}

// A server may send GOAWAY after its SETTINGS and close. There is no reason to hold its greeting any longer.
func TestTheGreetingOfAClosedServerIsNotHeld(t *testing.T) {
	r := newRig(t)
	r.Hold = time.Hour // the test would not end
	say(t, r.server, settings)
	r.await(t, "the greeting", r.Up.Readable)
	if _, err := r.greet(); err != nil || r.greeted.IsZero() {
		t.Fatalf("greeting not held: %v", err)
	}
	r.server.CloseWrite()
	protocol, err := r.Both(r.w)
	r.want(t, protocol, err, Opaque)
	if got := string(r.UpRead.Bytes()); got != settings {
		t.Errorf("upstream's bytes are %q", got)
	}
}

// The kernel reports a reset only once, and the read that consumes it may precede the poller's event.
func TestAConsumedResetIsNotEOF(t *testing.T) {
	r := newRig(t)
	poller, err := tcp.NewPoller()
	if err != nil {
		t.Fatal(err)
	}
	defer poller.Close()
	server, up := accepted(t, poller) // the first read precedes the first wait
	if err := server.SetLinger(0); err != nil {
		t.Fatal(err)
	}
	server.Close()
	r.Up.Close()
	r.Up = up
	protocol, err := r.Both(r.w)
	if !errors.Is(err, syscall.ECONNRESET) || Reason(err) != flow.UpstreamReset {
		t.Errorf("%s, %v", protocolName(protocol), err)
	}
}

func TestUpstreamThatEndsMakesItOpaque(t *testing.T) {
	for name, end := range map[string]func(*net.TCPConn){
		"half": func(c *net.TCPConn) { c.CloseWrite() }, "whole": func(c *net.TCPConn) { c.Close() }, "reset": reset,
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			nettest.OnceBlocked(t, waiting, func() { end(r.server) })
			protocol, err := r.Both(r.w)
			r.want(t, protocol, err, Opaque)
			_, err = r.Up.Read(make([]byte, 1))
			if name == "reset" && !errors.Is(err, syscall.ECONNRESET) || name != "reset" && err != io.EOF {
				t.Errorf("reading from upstream: %v", err)
			}
			r.wantAll(t, "")
		})
	}
}

// If upstream sends while an undecided beginning is held, the beginning is part of an opaque stream.
func TestUpstreamThatSendsDuringTheHold(t *testing.T) {
	r := newRig(t)
	say(t, r.client, "GET")
	nettest.Eventually(t, "the beginning to be read", func() bool {
		protocol, err := r.look()
		r.want(t, protocol, err, Undecided)
		return r.Read != nil
	})
	nettest.OnceBlocked(t, waiting, func() { say(t, r.server, "hello") })
	protocol, err := r.Both(r.w)
	r.want(t, protocol, err, Opaque)
	r.wantAll(t, "GET")
}

func TestAHalfCloseMakesItOpaque(t *testing.T) {
	for name, sent := range map[string]string{"without a byte": "", "with half a line": "GET / HT", "with a whole line": "GET / HTTP/1.1\r\n"} {
		t.Run(name, func(t *testing.T) {
			phases(t, func(t *testing.T, r *rig, look func() (Protocol, error)) {
				say(t, r.client, sent)
				r.client.CloseWrite()
				protocol, err := look()
				want := Opaque
				if strings.HasSuffix(sent, "\n") {
					want = HTTP1
				}
				r.want(t, protocol, err, want)
				if (r.Read == nil) != (sent == "") {
					t.Errorf("a buffer is held: %v", r.Read != nil)
				}
				r.wantAll(t, sent)
			})
		})
	}
}

func TestAResetIsAnError(t *testing.T) {
	for _, sent := range []string{"", "GET"} {
		phases(t, func(t *testing.T, r *rig, look func() (Protocol, error)) {
			say(t, r.client, sent)
			nettest.OnceBlocked(t, waiting, func() { reset(r.client) })
			protocol, err := look()
			if !errors.Is(err, syscall.ECONNRESET) || Reason(err) != flow.DownstreamReset {
				t.Errorf("after %q: %s, %v", sent, protocolName(protocol), err)
			}
		})
	}
}

func TestCancelEndsDetection(t *testing.T) {
	for _, sent := range []string{"", "GET"} {
		phases(t, func(t *testing.T, r *rig, look func() (Protocol, error)) {
			say(t, r.client, sent)
			nettest.OnceBlocked(t, waiting, r.cancel)
			protocol, err := look()
			if err != tcp.ErrCanceled || Reason(err) != flow.DrainDeadline {
				t.Errorf("after %q: %s, %v", sent, protocolName(protocol), err)
			}
		})
	}
}

func TestTwoSilentSidesAreIdle(t *testing.T) {
	r := newRig(t)
	r.Idle = blink
	protocol, err := r.Both(r.w)
	if err != tcp.ErrDeadline || Reason(err) != flow.IdleTimeout || r.Read != nil {
		t.Errorf("%s, %v; buffer held: %v", protocolName(protocol), err, r.Read != nil)
	}
}

func TestReasonOfAFailedWait(t *testing.T) {
	for _, err := range []error{syscall.ENOSPC, syscall.EMFILE, syscall.ENOMEM} {
		if got := Reason(os.NewSyscallError("epoll_ctl", err)); got != flow.NoDescriptors {
			t.Errorf("Reason(%v) = %s", err, got)
		}
	}
}

func reset(conn *net.TCPConn) {
	conn.SetLinger(0)
	conn.Close()
}

// A drain ends detection on a connection without any bytes, but waits for one that has begun.
func TestADrainEndsDetectionOnASilentConnection(t *testing.T) {
	r := newRig(t)
	var draining atomic.Bool
	r.Draining = draining.Load
	nettest.OnceBlocked(t, waiting, func() { draining.Store(true); r.wakeAll() })
	if protocol, err := r.Both(r.w); protocol != Undecided || err != ErrDraining {
		t.Errorf("without any bytes: %v, %v", protocol, err)
	}
	if got := Reason(ErrDraining); got != flow.Drained {
		t.Errorf("the reason is %s", got)
	}

	r = newRig(t)
	draining.Store(false)
	r.Draining = draining.Load
	say(t, r.client, "GET /")
	nettest.OnceBlocked(t, waiting, func() {
		draining.Store(true)
		r.wakeAll()
		say(t, r.client, " HTTP/1.1\r\n")
	})
	if protocol, err := r.Both(r.w); protocol != HTTP1 || err != nil {
		t.Errorf("with half a request: %v, %v", protocol, err)
	}
}

// A failed detection releases its buffers and its upstream. Upstream sees EOF when the agent drains, and a reset otherwise.
func TestAnAbandonedDetectionReleasesEverything(t *testing.T) {
	for _, c := range []struct {
		err, seen error
	}{
		{ErrDraining, io.EOF},
		{fmt.Errorf("while draining: %w", ErrDraining), io.EOF},
		{tcp.ErrDeadline, syscall.ECONNRESET},
		{tcp.ErrCanceled, syscall.ECONNRESET},
	} {
		t.Run(c.err.Error(), func(t *testing.T) {
			r := newRig(t)
			r.Read, r.UpRead = tcp.TakeBuffer(), tcp.TakeBuffer()
			r.Abandon(c.err)
			if r.Read != nil || r.UpRead != nil || r.Up != nil {
				t.Errorf("still held: %v, %v, %v", r.Read, r.UpRead, r.Up)
			}
			if _, err := r.server.Read(make([]byte, 1)); !errors.Is(err, c.seen) {
				t.Errorf("upstream sees %v, want %v", err, c.seen)
			}
			if !r.Down.Quiet() {
				t.Error("downstream was closed")
			}
		})
	}
}

// Before the dial there is no upstream to release.
func TestADetectionIsAbandonedBeforeTheDial(t *testing.T) {
	r := newRig(t)
	r.Up.Close()
	r.Up = nil
	r.Abandon(tcp.ErrCanceled)
}

// A large beginning that does not decide is accounted for while it is held, and dropped when there is no room.
func TestHeldBeginningsShareABudget(t *testing.T) {
	large := "GET /" + strings.Repeat("x", 5000)
	phases(t, func(t *testing.T, r *rig, look func() (Protocol, error)) {
		r.Budget = budget.New(tcp.BufferSize + 1000)
		say(t, r.client, large)
		rival := new(rival)
		rival.Open(r.Budget, rival, netip.MustParseAddr("198.51.100.2"))
		nettest.OnceBlocked(t, waiting, func() {
			if r.Budget.Used() != tcp.BufferSize {
				t.Errorf("%d bytes are accounted for", r.Budget.Used())
			}
			rival.Hold(1001) // less than the other holds
		})
		_, err := look()
		if Reason(err) != flow.MemoryBudget || rival.Evicted() || r.Budget.Used() != 1001 {
			t.Errorf("detection ended with %v, and %d bytes are accounted for", err, r.Budget.Used())
		}
		rival.Close()
	})
	phases(t, func(t *testing.T, r *rig, look func() (Protocol, error)) {
		r.Budget = budget.New(tcp.BufferSize / 2)
		say(t, r.client, "GET /")
		nettest.OnceBlocked(t, waiting, func() { say(t, r.client, " HTTP/1.1\r\n") })
		protocol, err := look()
		r.want(t, protocol, err, HTTP1) // what is small takes no room
		r.wantAll(t, "GET / HTTP/1.1\r\n")
	})
}

// A peer has one account, whichever part of the agent holds its bytes.
func TestHeldBeginningsCountAsThePeers(t *testing.T) {
	phases(t, func(t *testing.T, r *rig, look func() (Protocol, error)) {
		const own, others = 2000, tcp.BufferSize + 1000
		r.Budget, r.Peer = budget.New(tcp.BufferSize+own+others), netip.MustParseAddr("198.51.100.1")
		say(t, r.client, "GET /"+strings.Repeat("x", 5000))
		same, other := new(rival), new(rival)
		same.Open(r.Budget, same, r.Peer)
		other.Open(r.Budget, other, netip.MustParseAddr("198.51.100.2"))
		same.Hold(own)
		other.Hold(others)
		nettest.OnceBlocked(t, waiting, func() { other.Hold(others + 1) }) // less than the peer holds in all
		if _, err := look(); Reason(err) != flow.MemoryBudget || other.Evicted() || same.Evicted() {
			t.Errorf("detection ended with %v; evicted: the peer's other account %t, the other peer %t", err, same.Evicted(), other.Evicted())
		}
		same.Close()
		other.Close()
	})
}

// rival is another owner of an account.
type rival struct{ budget.Account }

func (*rival) Interrupt() {}
func (*rival) Continue()  {}
