package e2e

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

func TestBytesPassUnchangedInBothDirections(t *testing.T) {
	t.Parallel()
	newStage(t).everyWay(t, func(t *testing.T, w way) {
		downstream, upstream := w.connect(t)
		for _, size := range []int{1, 1000, 100_000} {
			message := make([]byte, size)
			rand.Read(message)
			for _, side := range [][2]net.Conn{{downstream, upstream}, {upstream, downstream}} {
				go side[0].Write(message)
				got := make([]byte, size)
				if _, err := io.ReadFull(side[1], got); err != nil || !bytes.Equal(got, message) {
					t.Fatalf("%d bytes: %v, equal: %v", size, err, bytes.Equal(got, message))
				}
			}
		}
	})
}

func TestAgentLogsEachConnection(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	s.everyWay(t, func(t *testing.T, w way) {
		downstream, upstream := w.connect(t)
		converse(t, downstream, upstream)
		downstream.Close()
		upstream.Close()
		line := s.agent.log.await(t, `msg="connection closed"`, "downstream="+downstream.LocalAddr().String())
		for key, want := range map[string]string{
			"direction":            w.name[:len(w.name)-len(" IPv4")],
			"original_destination": upstream.LocalAddr().String(),
			"upstream_local":       upstream.RemoteAddr().String(),
			"received":             fmt.Sprint(len("question")),
			"sent":                 fmt.Sprint(len("answer")),
			"reason":               "closed",
		} {
			if got := attribute(t, line, key); got != want {
				t.Errorf("%s: got %s, want %s", key, got, want)
			}
		}
	})
}

func TestHalfCloseByDownstream(t *testing.T) {
	t.Parallel()
	newStage(t).everyWay(t, func(t *testing.T, w way) {
		downstream, upstream := w.connect(t)
		halfClose(t, downstream, upstream)
	})
}

func TestHalfCloseByUpstream(t *testing.T) {
	t.Parallel()
	newStage(t).everyWay(t, func(t *testing.T, w way) {
		downstream, upstream := w.connect(t)
		halfClose(t, upstream, downstream)
	})
}

// halfClose sends words on one side and closes that half. The other side must see the end and can still answer.
func halfClose(t *testing.T, near, far *net.TCPConn) {
	t.Helper()
	writes(t, near, "last words")
	near.CloseWrite()
	if got, err := io.ReadAll(far); err != nil || string(got) != "last words" {
		t.Fatalf("the other side read %q and %v", got, err)
	}
	writes(t, far, "answer")
	far.Close()
	if got, err := io.ReadAll(near); err != nil || string(got) != "answer" {
		t.Fatalf("read %q and %v after the half-close, want the answer", got, err)
	}
}

// Connection tracking forgets a half-closed flow, and its redirection, after a minute of silence. Only the agent's
// keep-alive prevents that: the test's own sockets have keep-alive disabled.
func TestHalfClosedConnectionSurvivesSeventySecondsOfSilence(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("takes 70 seconds")
	}
	const silence = 70 * time.Second
	type pair struct {
		name      string
		near, far *net.TCPConn
	}
	var pairs []pair
	for _, w := range newStage(t).ways() {
		downstream, upstream := w.connect(t)
		pairs = append(pairs, pair{w.name + ", closed by downstream", downstream, upstream})
		downstream, upstream = w.connect(t)
		pairs = append(pairs, pair{w.name + ", closed by upstream", upstream, downstream})
	}
	for _, p := range pairs {
		p.near.SetDeadline(time.Now().Add(silence + nettest.Patience))
		p.far.SetDeadline(time.Now().Add(silence + nettest.Patience))
		p.near.CloseWrite()
		if got, err := io.ReadAll(p.far); err != nil || len(got) > 0 {
			t.Fatalf("%s: read %q and %v, want the end alone", p.name, got, err)
		}
	}
	<-time.After(silence)
	for _, p := range pairs {
		if _, err := p.far.Write([]byte("late answer")); err != nil {
			t.Errorf("%s: %v", p.name, err)
		}
		p.far.Close()
		if got, err := io.ReadAll(p.near); err != nil || string(got) != "late answer" {
			t.Errorf("%s: read %q and %v, want the late answer", p.name, got, err)
		}
	}
}

func TestAResetByDownstreamBecomesAResetUpstream(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	s.everyWay(t, func(t *testing.T, w way) {
		downstream, upstream := w.connect(t)
		converse(t, downstream, upstream)
		reset(t, downstream)
		if _, err := upstream.Read(make([]byte, 1)); !isReset(err) {
			t.Errorf("upstream sees %v, want a reset", err)
		}
		s.agent.log.await(t, "downstream="+downstream.LocalAddr().String(), "reason=downstream_reset")
	})
}

func TestAResetByUpstreamBecomesAResetDownstream(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	s.everyWay(t, func(t *testing.T, w way) {
		downstream, upstream := w.connect(t)
		converse(t, downstream, upstream)
		reset(t, upstream)
		if _, err := downstream.Read(make([]byte, 1)); !isReset(err) {
			t.Errorf("downstream sees %v, want a reset", err)
		}
		s.agent.log.await(t, "downstream="+downstream.LocalAddr().String(), "reason=upstream_reset")
	})
}

func TestAResetAfterAHalfCloseStillPasses(t *testing.T) {
	t.Parallel()
	newStage(t).everyWay(t, func(t *testing.T, w way) {
		downstream, upstream := w.connect(t)
		downstream.CloseWrite()
		if got, err := io.ReadAll(upstream); err != nil || len(got) > 0 {
			t.Fatalf("upstream read %q and %v, want the end alone", got, err)
		}
		reset(t, upstream)
		if _, err := downstream.Read(make([]byte, 1)); !isReset(err) {
			t.Errorf("downstream sees %v, want a reset", err)
		}
	})
}

func TestARefusedUpstreamBecomesAReset(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	s.everyWay(t, func(t *testing.T, w way) {
		err := tryConnection(w.from, netip.AddrPortFrom(w.address, 9).String())
		if !isReset(err) && !isRefused(err) {
			t.Errorf("downstream sees %v, want a reset", err)
		}
		s.agent.log.await(t, "original_destination="+netip.AddrPortFrom(w.address, 9).String(), "reason=upstream_refused")
	})
}

// The upstream's host receives the SYN and does not answer.
func TestAnUpstreamThatDoesNotAnswerBecomesAReset(t *testing.T) {
	t.Parallel()
	s := newStage(t, "--connect-timeout", "1s")
	for _, program := range []string{"iptables", "ip6tables"} {
		s.peer.MustRun(t, requireProgram(t, program), "-A", "INPUT", "-p", "tcp", "--dport", "9", "-j", "DROP")
	}
	for _, w := range s.ways()[2:] {
		t.Run(w.name, func(t *testing.T) {
			begin := time.Now()
			if err := tryConnection(w.from, netip.AddrPortFrom(w.address, 9).String()); !isReset(err) {
				t.Errorf("downstream sees %v, want a reset", err)
			}
			if took := time.Since(begin); took < 900*time.Millisecond {
				t.Errorf("the reset came after %v, before the connect timeout of 1s", took)
			}
			s.agent.log.await(t, "original_destination="+netip.AddrPortFrom(w.address, 9).String(), "reason=upstream_timeout")
		})
	}
}

func TestAnUnreachableUpstreamBecomesAReset(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	reject := map[string]string{"iptables": "icmp-host-unreachable", "ip6tables": "icmp6-addr-unreachable"}
	for program, with := range reject {
		s.peer.MustRun(t, requireProgram(t, program), "-A", "INPUT", "-p", "tcp", "--dport", "9", "-j", "REJECT", "--reject-with", with)
	}
	for _, w := range s.ways()[2:] {
		t.Run(w.name, func(t *testing.T) {
			if err := tryConnection(w.from, netip.AddrPortFrom(w.address, 9).String()); !isReset(err) {
				t.Errorf("downstream sees %v, want a reset", err)
			}
			s.agent.log.await(t, "original_destination="+netip.AddrPortFrom(w.address, 9).String(), "reason=upstream_unreachable")
		})
	}
}

func TestIdleTimeout(t *testing.T) {
	t.Parallel()
	s := newStage(t, "--idle-timeout", "6s") // a loaded machine needs some time to connect
	w := s.inbound()
	downstream, upstream := w.connect(t)
	converse(t, downstream, upstream)
	for _, side := range []net.Conn{downstream, upstream} {
		if _, err := side.Read(make([]byte, 1)); !isReset(err) {
			t.Errorf("a side sees %v, want a reset", err)
		}
	}
	s.agent.log.await(t, "reason=idle_timeout")
}

func TestHalfCloseTimeout(t *testing.T) {
	t.Parallel()
	s := newStage(t, "--half-close-timeout", "500ms")
	w := s.outbound()
	open, openUpstream := w.connect(t)
	downstream, upstream := w.connect(t)
	downstream.CloseWrite()
	if _, err := downstream.Read(make([]byte, 1)); !isReset(err) {
		t.Errorf("downstream sees %v, want a reset", err)
	}
	if _, err := io.ReadAll(upstream); err != nil && !isReset(err) {
		t.Errorf("upstream sees %v, want the end and a reset", err)
	}
	s.agent.log.await(t, "reason=half_close_timeout")
	converse(t, open, openUpstream) // both of its halves are open
}

// One GiB each way at the same time, compared by hash.
func TestAGibibyteEachWayArrivesWhole(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	for _, w := range []way{s.inbound(), s.outbound()} {
		t.Run(w.name, func(t *testing.T) {
			downstream, upstream := w.connect(t)
			var ends sync.WaitGroup
			for _, side := range [][2]*net.TCPConn{{downstream, upstream}, {upstream, downstream}} {
				sent, got := sha256.New(), sha256.New()
				var received int64
				var transfer sync.WaitGroup
				transfer.Go(func() { sendBulk(t, side[0], sent, 1<<30) })
				transfer.Go(func() { received, _ = io.Copy(got, patientReader{side[1]}) })
				ends.Go(func() {
					transfer.Wait()
					if received != 1<<30 || !bytes.Equal(sent.Sum(nil), got.Sum(nil)) {
						t.Errorf("%d bytes arrived, want %d; their hash is the sender's: %v",
							received, 1<<30, bytes.Equal(sent.Sum(nil), got.Sum(nil)))
					}
				})
			}
			ends.Wait()
			line := s.agent.log.await(t, "downstream="+downstream.LocalAddr().String(), "reason=closed")
			if attribute(t, line, "received") != fmt.Sprint(1<<30) || attribute(t, line, "sent") != fmt.Sprint(1<<30) {
				t.Errorf("the agent counts other bytes: %s", line)
			}
		})
	}
}

// onlyReader hides the other methods of a connection from io.Copy, so that it does not splice past the hash.
type onlyReader struct{ io.Reader }

// patientReader bounds the silence of a connection, and not the time of all that it carries.
type patientReader struct{ conn net.Conn }

func (r patientReader) Read(b []byte) (int, error) {
	r.conn.SetReadDeadline(time.Now().Add(nettest.Patience))
	return r.conn.Read(b)
}

// sendBulk writes n pseudo-random bytes, hashes them, and closes its half. It has patience for each block.
func sendBulk(t testing.TB, conn *net.TCPConn, sum hash.Hash, n int64) {
	block := make([]byte, 1<<18)
	rand.Read(block)
	for sent := int64(0); sent < n; sent += int64(len(block)) {
		binary.BigEndian.PutUint64(block, uint64(sent))
		sum.Write(block)
		conn.SetWriteDeadline(time.Now().Add(nettest.Patience))
		if _, err := conn.Write(block); err != nil {
			t.Errorf("after %d bytes: %v", sent, err)
			return
		}
	}
	conn.CloseWrite()
}

func TestTwoHundredConcurrentConnections(t *testing.T) {
	t.Parallel()
	const connections = 200
	s := newStage(t)
	for _, w := range []way{s.inbound(), s.outbound()} {
		t.Run(w.name, func(t *testing.T) {
			listener := w.to.Listen(t, "tcp", netip.AddrPortFrom(w.address, 0).String())
			serveEcho(t, listener)
			var clients sync.WaitGroup
			for serial := range connections {
				clients.Go(func() {
					if err := askEcho(w.from, listener.Addr().String(), serial); err != nil {
						t.Errorf("connection %d: %v", serial, err)
					}
				})
			}
			clients.Wait()
		})
	}
}

// serveEcho answers every connection with its own bytes, until the test ends.
func serveEcho(t testing.TB, listener net.Listener) {
	serveEach(t, listener, func(conn net.Conn) { io.Copy(conn, conn) })
}

// serveEach calls serve for every connection, each in its own goroutine, until the test ends. It closes the connection when
// serve returns. Connections have a deadline.
func serveEach(t testing.TB, listener net.Listener, serve func(net.Conn)) {
	var running sync.WaitGroup
	running.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			running.Go(func() {
				defer conn.Close()
				defer context.AfterFunc(t.Context(), func() { conn.Close() })() // the agent may keep it for a while
				conn.SetDeadline(time.Now().Add(nettest.Patience))
				serve(conn)
			})
		}
	})
	t.Cleanup(func() {
		listener.Close()
		running.Wait()
	})
}

// askEcho sends bytes that are unique to this connection and checks the echo.
func askEcho(from *nettest.Namespace, address string, serial int) error {
	conn, err := from.Dial("tcp", address, time.Minute)
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(time.Minute))
	question := bytes.Repeat(binary.BigEndian.AppendUint32(nil, uint32(serial)), 20_000)
	go func() {
		conn.Write(question)
		conn.(*net.TCPConn).CloseWrite()
	}()
	answer, err := io.ReadAll(conn)
	if err == nil && !bytes.Equal(answer, question) {
		err = fmt.Errorf("the answer of %d bytes is not the question of %d", len(answer), len(question))
	}
	return err
}

func TestAnIdleConnectionHoldsTwoDescriptors(t *testing.T) {
	t.Parallel()
	const connections = 20
	s := newStage(t)
	converse2 := func(w way) { d, u := w.connect(t); converse(t, d, u) }
	converse2(s.inbound()) // whatever the first connection needs is there now
	nettest.Eventually(t, "the connection that asked for readiness is closed", func() bool {
		return s.pod.MustRun(t, "ss", "-Htn", "sport = :15021") == ""
	})
	before := s.agent.descriptors(t)
	for _, w := range []way{s.inbound(), s.outbound()} {
		for range connections {
			converse2(w)
		}
	}
	want := before + 2*2*connections
	if !nettest.Within(nettest.Patience, func() bool { return s.agent.descriptors(t) == want }) {
		t.Errorf("%d idle connections hold %d descriptors, want 2 each", 2*connections, s.agent.descriptors(t)-before)
	}
}

func TestStalledReceiver(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	for _, w := range []way{s.inbound(), s.outbound()} {
		t.Run(w.name, func(t *testing.T) {
			downstream, upstream := w.connect(t)
			before := s.agent.resident(t)
			// The other end does not read, so this fills every buffer in between and then waits.
			sent := sha256.New()
			sum := func(n int, block []byte) { sent.Write(block[:n]) }
			block := make([]byte, 1<<16)
			rand.Read(block)
			downstream.SetWriteDeadline(time.Now().Add(2 * time.Second))
			total := 0
			for {
				n, err := downstream.Write(block)
				sum(n, block)
				total += n
				if err != nil {
					break
				}
			}
			if grown := s.agent.resident(t) - before; grown > 8<<20 {
				t.Errorf("the agent grew by %d KiB while %d KiB waited", grown>>10, total>>10)
			}
			downstream.CloseWrite()
			got := sha256.New()
			received, err := io.Copy(got, onlyReader{upstream})
			if err != nil || received != int64(total) || !bytes.Equal(got.Sum(nil), sent.Sum(nil)) {
				t.Errorf("%d bytes arrived of %d, error %v", received, total, err)
			}
		})
	}
}

func TestAResetInTheMiddleOfATransferPasses(t *testing.T) {
	t.Parallel()
	newStage(t).everyWay(t, func(t *testing.T, w way) {
		downstream, upstream := w.connect(t)
		failed := make(chan error, 1)
		go func() {
			block := make([]byte, 1<<16)
			for {
				if _, err := upstream.Write(block); err != nil {
					failed <- err
					return
				}
			}
		}()
		if _, err := io.CopyN(io.Discard, downstream, 16<<20); err != nil {
			t.Fatal(err)
		}
		reset(t, downstream)
		if err := <-failed; !isReset(err) && !errors.Is(err, syscall.EPIPE) {
			t.Errorf("upstream sees %v, want a reset", err)
		}
	})
}
