package datagram

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

var pairs = [][2]netip.AddrPort{
	{netip.MustParseAddrPort("203.0.113.7:53"), netip.MustParseAddrPort("192.0.0.8:40000")},
	{netip.MustParseAddrPort("[2001:db8::7]:443"), netip.MustParseAddrPort("[100::8]:40000")},
}

// frameOf is a frame with a datagram.
func frameOf(from, to netip.AddrPort, payload string) []byte {
	buffer := make([]byte, headroom+maxPacket)
	return answer(buffer, copy(buffer[headroom:], payload), from, to)
}

// What answer writes, parse reads; a frame that is cut anywhere is refused. The kernel's checksums are right in a test of the
// built program.
func TestFramesAreReadAsTheyAreWritten(t *testing.T) {
	for _, pair := range pairs {
		for _, payload := range []string{"", "x", "hello"} {
			frame := frameOf(pair[0], pair[1], payload)
			got, ok := parse(frame)
			if !ok || got.source != pair[0] || got.destination != pair[1] || string(got.payload) != payload {
				t.Errorf("parse = %v %v, want %v and %q", got, ok, pair, payload)
			}
			for i := range frame {
				if _, ok := parse(frame[:i]); ok {
					t.Errorf("a frame of %d bytes that ends after %d is accepted", len(frame), i)
				}
			}
			if padded := append(bytes.Clone(frame), 0, 0, 0); true {
				if got, ok := parse(padded); !ok || string(got.payload) != payload {
					t.Errorf("a padded frame has the payload %q", got.payload)
				}
			}
		}
		if answer(make([]byte, headroom+maxPacket), maxPacket, pair[0], pair[1]) != nil {
			t.Error("a datagram that does not fit into a packet is written")
		}
	}
}

// Fragments, other protocols and contradictory lengths are refused.
func TestOtherFramesAreRefused(t *testing.T) {
	for name, change := range map[string]func(four, six []byte){
		"another protocol":      func(four, six []byte) { four[9], six[6] = 6, 6 },
		"a first fragment":      func(four, six []byte) { four[6], six[6] = 0x20, 44 },
		"a later fragment":      func(four, six []byte) { four[7], six[6] = 1, 44 },
		"a long packet":         func(four, six []byte) { four[3]++; six[5]++ },
		"a long datagram":       func(four, six []byte) { four[header4+5]++; six[header6+5]++ },
		"a short datagram":      func(four, six []byte) { four[header4+5], six[header6+5] = 7, 7 },
		"another version of IP": func(four, six []byte) { four[0], six[0] = 0x65, 0x45 },
	} {
		four, six := frameOf(pairs[0][0], pairs[0][1], "hello"), frameOf(pairs[1][0], pairs[1][1], "hello")
		change(four[frameHeader:], six[frameHeader:])
		for _, frame := range [][]byte{four, six} {
			if p, ok := parse(frame); ok {
				t.Errorf("%s is accepted: %v", name, p)
			}
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, pair := range pairs {
		f.Add(frameOf(pair[0], pair[1], "hello"))
	}
	f.Fuzz(func(t *testing.T, frame []byte) {
		if p, ok := parse(frame); ok && len(p.payload) > len(frame)-frameHeader-header4-headerUDP {
			t.Errorf("%d bytes of payload in a frame of %d", len(p.payload), len(frame))
		}
	})
}

// Only datagrams of the command to other hosts are carried.
func TestDatagramsToLoopbackAndGroupsAreNotCarried(t *testing.T) {
	config := Config{Addresses: []netip.Addr{pairs[0][1].Addr(), pairs[1][1].Addr()}}
	for source, destinations := range map[string][]string{
		"192.0.0.8:1":    {"127.0.0.1:1", "127.9.9.9:1", "0.0.0.0:1", "224.0.0.1:1", "255.255.255.255:1", "192.0.0.8:1", "203.0.113.7:0"},
		"[100::8]:1":     {"[::1]:1", "[::]:1", "[ff02::1]:1", "[100::8]:1", "[::ffff:127.0.0.1]:1"},
		"198.51.100.1:1": {"203.0.113.7:1"},
	} {
		for _, destination := range destinations {
			if config.carries(&packet{source: netip.MustParseAddrPort(source), destination: netip.MustParseAddrPort(destination)}) {
				t.Errorf("a datagram from %s to %s is carried", source, destination)
			}
		}
	}
	for _, pair := range pairs {
		if !config.carries(&packet{source: pair[1], destination: pair[0]}) {
			t.Errorf("a datagram to %s is not carried", pair[0])
		}
	}
}

// link is a Carrier whose packets a test sends and receives. Destinations are on loopback.
type link struct {
	carrier *Carrier
	file    *os.File

	mu    sync.Mutex
	ended []Flow
}

func newLink(t *testing.T, judge func(netip.AddrPort) string) *link {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	l := &link{file: os.NewFile(uintptr(pair[0]), "link")}
	l.carrier = start(&Carrier{
		config:  Config{Links: []*os.File{os.NewFile(uintptr(pair[1]), "link")}, Judge: judge, Ended: l.end},
		carries: func(*packet) bool { return true },
	})
	t.Cleanup(func() {
		l.carrier.Close()
		l.file.Close()
	})
	return l
}

func (l *link) end(f Flow) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ended = append(l.ended, f)
}

func (l *link) reported() []Flow {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.ended
}

func (l *link) send(t *testing.T, from, to netip.AddrPort, payload string) {
	t.Helper()
	if _, err := l.file.Write(frameOf(from, to, payload)); err != nil {
		t.Fatal(err)
	}
}

// receive returns the next datagram for a client.
func (l *link) receive(t *testing.T) packet {
	t.Helper()
	frame := make([]byte, maxFrame)
	n, err := l.file.Read(frame)
	if err != nil {
		t.Fatal(err)
	}
	p, ok := parse(frame[:n])
	if !ok {
		t.Fatalf("% x is not a datagram", frame[:n])
	}
	return p
}

// server is a socket that answers with what it gets.
func server(t *testing.T) netip.AddrPort {
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buffer := make([]byte, 100)
		for {
			n, from, err := conn.ReadFrom(buffer)
			if err != nil {
				return
			}
			conn.WriteTo(buffer[:n], from)
		}
	}()
	t.Cleanup(func() {
		conn.Close()
		<-done
	})
	return conn.LocalAddr().(*net.UDPAddr).AddrPort()
}

func clientAt(i int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), 1000)
}

// The number of clients and of flows is bounded: the idlest ends, and the newest is carried.
func TestClientsAndFlowsAreBounded(t *testing.T) {
	l, to := newLink(t, nil), server(t)
	for i := range maxClients + 10 {
		l.send(t, clientAt(i), to, fmt.Sprint(i))
		if got := l.receive(t); got.destination != clientAt(i) || got.source != to || string(got.payload) != fmt.Sprint(i) {
			t.Fatalf("client %d got %v", i, got)
		}
	}
	if ended := l.reported(); len(ended) != 10 || ended[0].Client != clientAt(0) || ended[9].Client != clientAt(9) || ended[0].Received != 1 {
		t.Fatalf("%d flows ended: %+v", len(ended), ended)
	}
	before := len(l.reported())
	for i := range maxFlows - maxClients + 10 {
		l.carrier.mu.Lock()
		if one := l.carrier.clients[clientAt(20)]; l.carrier.open(one, clientAt(i), time.Now()) == nil {
			t.Fatal("a flow is refused")
		}
		flows := l.carrier.flows
		l.carrier.mu.Unlock()
		if flows > maxFlows {
			t.Fatalf("%d flows", flows)
		}
	}
	if got := len(l.reported()) - before; got != 10 {
		t.Errorf("%d flows have ended for newer ones, want 10", got)
	}
}

// Idle flows end, and clients without flows.
func TestIdleFlowsEnd(t *testing.T) {
	l, to := newLink(t, nil), server(t)
	l.send(t, clientAt(0), to, "x")
	l.receive(t)
	l.carrier.endUnusedSince(time.Now().Add(-time.Hour))
	if ended := l.reported(); len(ended) != 0 {
		t.Fatalf("a flow in use has ended: %+v", ended)
	}
	l.carrier.endUnusedSince(time.Now().Add(time.Hour))
	if ended := l.reported(); len(ended) != 1 || ended[0].Sent != 1 || ended[0].Received != 1 {
		t.Fatalf("the flows that ended are %+v", ended)
	}
	l.carrier.mu.Lock()
	defer l.carrier.mu.Unlock()
	if len(l.carrier.clients)+l.carrier.flows != 0 {
		t.Errorf("%d clients and %d flows are left", len(l.carrier.clients), l.carrier.flows)
	}
}

// Datagrams wait for the judgement of their destination, up to a bound. Denied destinations are reported, and get nothing.
func TestDatagramsWaitForTheirJudgement(t *testing.T) {
	decide, other, to := make(chan string), server(t), server(t)
	l := newLink(t, func(judged netip.AddrPort) string {
		if judged == other {
			return ""
		}
		return <-decide
	})
	for i := range maxWaiting + 5 {
		l.send(t, clientAt(0), to, fmt.Sprint(i))
	}
	l.send(t, clientAt(0), other, "the last one")
	l.receive(t)
	held := func() int {
		l.carrier.mu.Lock()
		defer l.carrier.mu.Unlock()
		if one := l.carrier.clients[clientAt(0)]; one != nil && one.flows[to] != nil {
			return len(one.flows[to].waiting)
		}
		return 0
	}
	if got := held(); got != maxWaiting {
		t.Errorf("%d datagrams wait, want %d", got, maxWaiting)
	}
	decide <- ""
	for i := range maxWaiting {
		if got := l.receive(t); string(got.payload) != fmt.Sprint(i) {
			t.Errorf("datagram %d is answered with %q", i, got.payload)
		}
	}
	l.send(t, clientAt(1), to, "x")
	decide <- "not allowed"
	frame := make([]byte, maxFrame)
	if n, err := l.file.Read(frame); err != nil || frame[frameHeader+9] != protocolICMP || n < frameHeader+header4+8 ||
		binary.BigEndian.Uint16(frame[frameHeader+header4:]) != 3<<8|13 {
		t.Errorf("a denied datagram is answered with % x, %v", frame[:n], err)
	}
	if ended := l.reported(); len(ended) != 1 || ended[0].Denied != "not allowed" || ended[0].Sent != 0 {
		t.Errorf("the flows that ended are %+v", ended)
	}
}
