package dns

import (
	"context"
	"encoding/binary"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

// resolver is a Server under test, and where it listens.
type resolver struct {
	*Server
	addr string
}

// serve starts a Server for upstreams and shuts it down when the test ends.
func serve(t testing.TB, upstreams []netip.AddrPort, change ...func(*Config)) *resolver {
	t.Helper()
	s := prepare(t, upstreams, change...)
	s.Start()
	return s
}

func prepare(t testing.TB, upstreams []netip.AddrPort, change ...func(*Config)) *resolver {
	t.Helper()
	udp, tcp := sockets(t)
	config := Config{
		UDP: []*net.UDPConn{udp}, TCP: []*net.TCPListener{tcp}, Upstreams: upstreams,
		Timeout: nettest.Patience, Log: slog.New(slog.DiscardHandler),
	}
	for _, c := range change {
		c(&config)
	}
	s, err := New(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), nettest.Patience)
		defer cancel()
		if err := s.Shutdown(ctx); err != nil {
			t.Errorf("Shutdown: %v", err)
		}
	})
	return &resolver{s, udp.LocalAddr().String()}
}

// soon is a short Timeout, for upstreams that do not answer. On a busy machine others may need longer.
const soon = 200 * time.Millisecond

// within sets Timeout.
func within(limit time.Duration) func(*Config) { return func(c *Config) { c.Timeout = limit } }

// sockets returns sockets that are bound to the same port of loopback.
func sockets(t testing.TB) (*net.UDPConn, *net.TCPListener) {
	t.Helper()
	for range 20 {
		udp, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
		if err != nil {
			t.Fatal(err)
		}
		if tcp, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(udp.LocalAddr().(*net.UDPAddr).AddrPort())); err == nil {
			return udp, tcp
		}
		udp.Close()
	}
	t.Fatal("no port is free for both UDP and TCP")
	return nil, nil
}

// standing starts an upstream that is a real server.
func standing(t testing.TB, handler func(w dns.ResponseWriter, r *dns.Msg)) netip.AddrPort {
	t.Helper()
	udp, tcp := sockets(t)
	for _, server := range []*dns.Server{{PacketConn: udp, UDPSize: 4096}, {Listener: tcp}} {
		started := make(chan struct{})
		server.Handler = dns.HandlerFunc(handler)
		server.NotifyStartedFunc = func() { close(started) }
		server.MsgAcceptFunc = func(dns.Header) dns.MsgAcceptAction { return dns.MsgAccept }
		go func() { _ = server.ActivateAndServe() }()
		<-started
		t.Cleanup(func() { _ = server.Shutdown() })
	}
	return udp.LocalAddr().(*net.UDPAddr).AddrPort()
}

// packets starts an upstream over UDP only that answers each packet with the handler's packets.
func packets(t testing.TB, handler func(query []byte) [][]byte) netip.AddrPort {
	t.Helper()
	udp, tcp := sockets(t)
	tcp.Close()
	t.Cleanup(func() { udp.Close() })
	go func() {
		buf := make([]byte, 1<<16)
		for {
			n, peer, err := udp.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			for _, packet := range handler(append([]byte(nil), buf[:n]...)) {
				_, _ = udp.WriteToUDPAddrPort(packet, peer)
			}
		}
	}()
	return udp.LocalAddr().(*net.UDPAddr).AddrPort()
}

// refusing returns an address of loopback that refuses TCP connections and datagrams: its sockets do not listen, and are
// connected to another one.
func refusing(t testing.TB) netip.AddrPort {
	t.Helper()
	for range 20 {
		at := nettest.Refusing(t)
		udp, err := net.DialUDP("udp4", net.UDPAddrFromAddrPort(at), &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 9})
		if err == nil {
			t.Cleanup(func() { udp.Close() })
			return at
		}
	}
	t.Fatal("no port is free for both UDP and TCP")
	return netip.AddrPort{}
}

// fixed answers every query with these records.
func fixed(records ...string) func(dns.ResponseWriter, *dns.Msg) {
	return func(w dns.ResponseWriter, r *dns.Msg) {
		_ = w.WriteMsg(answered(r, records...))
	}
}

func answered(r *dns.Msg, records ...string) *dns.Msg {
	m := new(dns.Msg).SetReply(r)
	m.RecursionAvailable = true
	for _, record := range records {
		rr, err := dns.NewRR(record)
		if err != nil {
			panic(err)
		}
		m.Answer = append(m.Answer, rr)
	}
	return m
}

func coded(rcode int) func(dns.ResponseWriter, *dns.Msg) {
	return func(w dns.ResponseWriter, r *dns.Msg) { _ = w.WriteMsg(new(dns.Msg).SetRcode(r, rcode)) }
}

// big answers with about size bytes, truncated over UDP to the size that the query allows.
func big(size int) func(dns.ResponseWriter, *dns.Msg) {
	return func(w dns.ResponseWriter, r *dns.Msg) {
		m := answered(r)
		for i := 0; m.Len() < size; i++ {
			m.Answer = append(m.Answer, &dns.TXT{
				Hdr: dns.RR_Header{Name: r.Question[0].Name, Rrtype: dns.TypeTXT, Class: dns.ClassINET, Ttl: 60},
				Txt: []string{fmt.Sprintf("%06d%s", i, strings.Repeat("x", 200))},
			})
		}
		if opt := r.IsEdns0(); opt != nil {
			m.SetEdns0(1400, opt.Do())
		}
		if _, udp := w.RemoteAddr().(*net.UDPAddr); udp {
			limit := 512
			if opt := r.IsEdns0(); opt != nil {
				limit = int(opt.UDPSize())
			}
			m.Truncate(limit)
		}
		m.Compress = true
		_ = w.WriteMsg(m)
	}
}

func question(name string, kind uint16) *dns.Msg { return new(dns.Msg).SetQuestion(name, kind) }

// ask sends a query and returns its answer.
func (r *resolver) ask(t testing.TB, network string, q *dns.Msg) *dns.Msg {
	t.Helper()
	client := dns.Client{Net: network, Timeout: nettest.Patience}
	m, _, err := client.Exchange(q, r.addr)
	if err != nil {
		t.Fatalf("%s over %s: %v", q.Question[0].String(), network, err)
	}
	return m
}

// send sends a packet and returns the bytes of the answer.
func (r *resolver) send(t testing.TB, packet []byte) []byte {
	t.Helper()
	conn, err := net.Dial("udp", r.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(nettest.Patience))
	if _, err := conn.Write(packet); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 1<<16)
	n, err := conn.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	return buf[:n]
}

// pack returns the message in wire format.
func pack(t testing.TB, m *dns.Msg) []byte {
	t.Helper()
	raw, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// clock is a clock that the test sets.
type clock struct {
	mu sync.Mutex
	at time.Time
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.at
}

func (c *clock) add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at = c.at.Add(d)
}

// framed prepends the length, as over TCP.
func framed(raw []byte) []byte {
	return append(binary.BigEndian.AppendUint16(nil, uint16(len(raw))), raw...)
}

func addrs(of ...netip.AddrPort) []netip.AddrPort { return of }
