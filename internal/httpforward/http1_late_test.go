package httpforward

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/nettest"
)

// newCrampedOrigin listens with room for one connection in its queue. When that is taken, a dial takes as long as it
// does over a network: its SYN is dropped, and sent again after a second.
func newCrampedOrigin(t *testing.T) *origin {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	file := os.NewFile(uintptr(fd), "listener")
	defer file.Close()
	listener, err := net.FileListener(file)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	return &origin{t, listener.(*net.TCPListener), listener.Addr().(*net.TCPAddr).AddrPort()}
}

// sockets returns the lines of the kernel's table of IPv4 sockets whose ports are these, 0 for any, in its columns.
func sockets(t *testing.T, local, remote int) (lines [][]string) {
	t.Helper()
	table, err := os.ReadFile("/proc/net/tcp")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(table)) {
		fields := strings.Fields(line)
		if (local == 0 || strings.HasSuffix(fields[1], fmt.Sprintf(":%04X", local))) &&
			(remote == 0 || strings.HasSuffix(fields[2], fmt.Sprintf(":%04X", remote))) {
			lines = append(lines, fields)
		}
	}
	return lines
}

// queued is how many bytes stand between conn's other end and conn's reader: sent, or waiting to be.
func queued(t *testing.T, conn *net.TCPConn) (sum int64) {
	t.Helper()
	near, far := conn.LocalAddr().(*net.TCPAddr).Port, conn.RemoteAddr().(*net.TCPAddr).Port
	for _, socket := range append(sockets(t, far, near), sockets(t, near, far)...) {
		var sending, received int64
		if _, err := fmt.Sscanf(socket[4], "%x:%x", &sending, &received); err != nil {
			t.Fatal(err)
		}
		sum += sending + received
	}
	return sum
}

// dialling reports whether somebody's SYN to address has no answer yet.
func dialling(t *testing.T, address netip.AddrPort) bool {
	const synSent = "02"
	return slices.ContainsFunc(sockets(t, 0, int(address.Port())), func(s []string) bool { return s[3] == synSent })
}

// taken reports whether the other end has read everything that was sent.
func taken(t *testing.T, conn net.Conn) bool {
	other := sockets(t, conn.RemoteAddr().(*net.TCPAddr).Port, conn.LocalAddr().(*net.TCPAddr).Port)
	return len(other) == 1 && strings.HasSuffix(other[0][4], ":00000000")
}

func TestARequestIsSentAgainAfterADialThatTakesTime(t *testing.T) {
	t.Parallel()
	const request = "GET / HTTP/1.1\r\nHost: a\r\n\r\n"
	o := newCrampedOrigin(t)
	client := newRig(t, o.address, false, plain).dial(t)
	send(t, client, request)
	first := o.accept()
	expect(t, first, request)
	send(t, first, ok("1"))
	expect(t, client, ok("1"))

	filler, err := net.Dial("tcp", o.address.String())
	if err != nil {
		t.Fatal(err)
	}
	defer filler.Close()
	send(t, client, request)
	expect(t, first, request)
	first.Close()
	nettest.Eventually(t, "the engine dials", func() bool { return dialling(t, o.address) })
	o.accept() // the filler
	second := o.accept()
	expect(t, second, request)
	send(t, second, ok("2"))
	expect(t, client, ok("2"))
}

// fill writes to a connection until its peer has accepted no byte for a while, twice in a row, because the engine may pause.
func fill(t *testing.T, conn *net.TCPConn) {
	t.Helper()
	block := make([]byte, 1<<20)
	for stuck := 0; stuck < 2; {
		conn.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
		n, err := conn.Write(block)
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal(err)
		}
		if stuck++; n > 0 {
			stuck = 0
		}
	}
}

// The response is complete, upstream does not take the rest of the request, and downstream vanishes.
func TestAResetIsNoticedWhileUpstreamDoesNotRead(t *testing.T) {
	t.Parallel()
	o := newOrigin(t)
	r := newRig(t, o.address, false, plain)
	client := r.dial(t)
	send(t, client, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000\r\n\r\n")
	up := o.accept()
	send(t, up, ok("early"))
	expect(t, client, ok("early"))
	fill(t, client)
	client.SetLinger(0)
	client.Close()
	if got := r.records.await(t, 0); got.reason != flow.Completed || got.status != 200 {
		t.Errorf("the record is %+v", got)
	}
	if _, err := io.Copy(io.Discard, up); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("upstream reads %v, want a reset", err)
	}
}

// The time for the response begins when the request has ended, however long that took.
func TestASlowRequestHasItsTimeToo(t *testing.T) {
	t.Parallel()
	const limit = 300 * time.Millisecond
	o := newOrigin(t)
	r := newRig(t, o.address, false, plain, func(c *Config) { c.RequestTimeout = limit })
	client := r.dial(t)
	send(t, client, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n")
	began := time.Now()
	up := o.accept()
	expect(t, up, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n")
	up.SetReadDeadline(began.Add(2 * limit))
	if _, err := up.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("upstream reads %v before the body is sent", err)
	}
	up.SetReadDeadline(time.Now().Add(nettest.Patience))
	ended := time.Now()
	send(t, client, "ab")
	expect(t, up, "ab")
	expect(t, client, "HTTP/1.1 504 Gateway Timeout\r\n")
	if took := time.Since(ended); took < limit {
		t.Errorf("the response had %v", took)
	}
}

// A request cut at the end of a drain is recorded as such in every phase.
func TestARequestCutByADrainIsRecordedAsSuch(t *testing.T) {
	t.Parallel()
	for name, sent := range map[string]string{
		"in its head":                    "GET / HTTP/1.1\r\nHo",
		"in its body":                    "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nab",
		"while upstream thinks about it": "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			o := newOrigin(t)
			r := newRig(t, o.address, false, plain)
			client := r.dial(t)
			send(t, client, sent)
			if strings.Contains(sent, "\r\n\r\n") {
				expect(t, o.accept(), sent)
			}
			nettest.Eventually(t, "the engine has the request", func() bool { return taken(t, client) })
			r.cancel()
			if got := r.records.await(t, 0).reason; got != flow.DrainDeadline {
				t.Errorf("the record is %s", got)
			}
		})
	}
}

// Downstream does not read its interim responses, and one of them is partly written when the request times out. A reply
// after that part would become part of the interim response.
func TestNoAnswerStandsInTheMiddleOfAnInterimResponse(t *testing.T) {
	t.Parallel()
	nettest.UnderLimit(t, 300*time.Millisecond, func(t testing.TB, limit time.Duration) { // time to fill the way to the client
		o := newOrigin(t)
		r := newRig(t, o.address, false, plain, func(c *Config) { c.RequestTimeout = limit })
		client := r.dial(t)
		send(t, client, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
		up := o.accept()
		interim := "HTTP/1.1 103 Early Hints\r\nLink: " + strings.Repeat("x", 9000) + "\r\n\r\n"
		var err error
		for err == nil {
			_, err = io.WriteString(up, interim) // until the engine gives up
		}
		if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
			t.Fatalf("upstream is told %v", err)
		}
		if got, _ := io.ReadAll(client); strings.Contains(string(got), "504") {
			t.Errorf("downstream reads %q", got[len(got)-1000:])
		}
		if got := r.records.await(t, 0); got.reason != flow.RequestTimeout || got.status != 0 {
			t.Errorf("the record is %+v", got)
		}
	})
}

// A record counts the bytes that the receiving socket accepted, not the bytes that were read from the sender.
func TestARecordCountsWhatWasTaken(t *testing.T) {
	t.Parallel()
	o := newOrigin(t)
	r := newRig(t, o.address, false, plain)
	client := r.dial(t)
	send(t, client, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
	up := o.accept()
	head := "HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n"
	send(t, up, head)
	fill(t, up)
	got, still := int64(0), 0
	nettest.Eventually(t, "nothing moves any more", func() bool {
		now := queued(t, client)
		if still++; now != got {
			got, still = now, 0
		}
		return still > 60 // looks, which take 5 ms at least, and longer in a process that is not run
	})
	client.SetLinger(0)
	client.Close()
	got -= int64(len(head))
	const twice = 16 << 10 // at most so much is in both sockets' queues, sent and not acknowledged
	if sent := int64(r.records.await(t, 0).sent); sent > got || sent < got-twice {
		t.Errorf("the record is %d bytes, and downstream's socket took %d", sent, got)
	}
}

// The upstream connection ends with the 503. Downstream outlives it only if the next request would reach the same server.
func TestARefusedRequestEndsItsConnectionUnlessTheWorkloadListens(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ balanced, listens, outlives bool }{{true, true, false}, {false, false, false}, {false, true, true}} {
		t.Run(fmt.Sprintf("balanced %t, listens %t", c.balanced, c.listens), func(t *testing.T) {
			t.Parallel()
			const request = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"
			o := newOrigin(t)
			r := newRig(t, o.address, false, plain)
			r.set(func() { r.balanced = c.balanced })
			client := r.dial(t)
			send(t, client, request)
			up := o.accept()
			expect(t, up, request)
			if !c.listens {
				o.listener.Close()
			}
			up.Close()
			reader := bufio.NewReader(client)
			response, err := http.ReadResponse(reader, nil)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadAll(response.Body); err != nil || response.StatusCode != 503 || response.Close == c.outlives {
				t.Errorf("%d, closes: %t, %v", response.StatusCode, response.Close, err)
			}
			if !c.outlives {
				if _, err := reader.ReadByte(); err != io.EOF {
					t.Errorf("after the response: %v, want the end", err)
				}
				return
			}
			send(t, client, request)
			second := o.accept()
			expect(t, second, request)
			second.Close()
		})
	}
}
