package dns

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// unreachable makes each query to an upstream fail at once.
func unreachable(c *Config) {
	c.Dial = func(context.Context, string, string) (net.Conn, error) { return nil, errors.New("unreachable") }
}

// burst sends n queries for different names to a resolver from one socket.
func burst(t *testing.T, r *resolver, n int) {
	t.Helper()
	conn, err := net.Dial("udp", r.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for i := range n {
		if _, err := conn.Write(pack(t, question(fmt.Sprintf("n%d.example.", i), dns.TypeA))); err != nil {
			t.Fatal(err)
		}
	}
}

func TestQueriesThatTheKernelDropsAreCountedAndLogged(t *testing.T) {
	var log bytes.Buffer
	r := prepare(t, addrs(netip.MustParseAddrPort("192.0.2.53:53")), unreachable, func(c *Config) { c.Log = slog.New(slog.NewTextHandler(&log, nil)) })
	now := &clock{at: time.Now()}
	r.now = now.now
	const sent = 15_000
	burst(t, r, sent) // the server has not started, so the receive buffer overflows
	r.Start()
	nettest.Eventually(t, "each query to be either read or counted as dropped", func() bool {
		return r.Stats.UDPQueries.Load()+r.Stats.ReceiveDrops.Load() == sent && r.Stats.ReceiveDrops.Load() > 0
	})
	r.countDrops() // waits for the timer's call: it logs after it has counted
	dropped := r.Stats.ReceiveDrops.Load()
	if want := fmt.Sprintf("dropped=%d remedy=", dropped); strings.Count(log.String(), "receive buffer full") != 1 || !strings.Contains(log.String(), want) {
		t.Errorf("the log does not have %q once:\n%s", want, &log)
	}

	// Without new drops the counter does not change, and there is no warning.
	now.add(logInterval)
	r.countDrops()
	if again := r.Stats.ReceiveDrops.Load(); again != dropped || strings.Count(log.String(), "receive buffer full") != 1 {
		t.Errorf("%d drops are counted after %d:\n%s", again, dropped, &log)
	}
}

func TestWarningsAboutDropsAreLimitedAndComplete(t *testing.T) {
	var log bytes.Buffer
	r := prepare(t, addrs(netip.MustParseAddrPort("192.0.2.53:53")), unreachable, func(c *Config) { c.Log = slog.New(slog.NewTextHandler(&log, nil)) })
	now := &clock{at: time.Now()}
	r.now = now.now
	if err := r.UDP[0].SetReadBuffer(4096); err != nil {
		t.Fatal(err)
	}
	var total int64
	for _, c := range []struct {
		later time.Duration
		lines int
	}{{0, 1}, {logInterval - 1, 1}, {1, 2}} {
		now.add(c.later)
		burst(t, r, 100)
		r.countDrops()
		if lines := strings.Count(log.String(), "receive buffer full"); lines != c.lines {
			t.Errorf("%d warnings, want %d:\n%s", lines, c.lines, &log)
		}
	}
	for _, field := range strings.Fields(log.String()) {
		if value, ok := strings.CutPrefix(field, "dropped="); ok {
			n, err := strconv.ParseInt(value, 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			total += n
		}
	}
	if want := r.Stats.ReceiveDrops.Load(); total != want || total < 200 {
		t.Errorf("the warnings have %d drops, the counter has %d", total, want)
	}
}

func TestTheReceiveBufferIsAsLargeAsTheKernelAllows(t *testing.T) {
	r := prepare(t, addrs(refusing(t)))
	other, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	byDefault := bufferSize(t, other)
	if err := other.SetReadBuffer(1 << 30); err != nil { // the kernel reduces it to its limit
		t.Fatal(err)
	}
	want := min(bufferSize(t, other), 2*receiveBuffer)
	if size := bufferSize(t, r.UDP[0]); size != want || size <= byDefault {
		t.Errorf("the receive buffer has %d bytes, want %d; %d by default", size, want, byDefault)
	}
}

// bufferSize returns the size of a socket's receive buffer. It is twice the size that was set.
func bufferSize(t *testing.T, socket *net.UDPConn) (size int) {
	t.Helper()
	raw, err := socket.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if controlErr := raw.Control(func(fd uintptr) { size, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF) }); controlErr != nil {
		t.Fatal(controlErr)
	}
	if err != nil {
		t.Fatal(err)
	}
	return size
}
