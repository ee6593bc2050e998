package httpforward

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
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

// dialling reports whether somebody's SYN to address has no answer yet.
func dialling(t *testing.T, address netip.AddrPort) bool {
	t.Helper()
	const synSent = "02"
	table, err := os.ReadFile("/proc/net/tcp")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(table)) {
		fields := strings.Fields(line)
		if strings.HasSuffix(fields[2], fmt.Sprintf(":%04X", address.Port())) && fields[3] == synSent {
			return true
		}
	}
	return false
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

// fill writes to a connection until nobody has taken anything for a while.
func fill(t *testing.T, conn *net.TCPConn) {
	t.Helper()
	block := make([]byte, 1<<20)
	for {
		conn.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
		if _, err := conn.Write(block); errors.Is(err, os.ErrDeadlineExceeded) {
			return
		} else if err != nil {
			t.Fatal(err)
		}
	}
}

// The response is complete, upstream does not take the rest of the request, and downstream vanishes.
func TestAResetIsSeenBehindABodyThatNobodyTakes(t *testing.T) {
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
		t.Errorf("the record says %+v", got)
	}
	if _, err := io.Copy(io.Discard, up); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("upstream reads %v, want a reset", err)
	}
}
