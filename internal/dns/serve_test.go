package dns

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// held delays the answers of a handler until release is closed or the test ends.
type held struct {
	ends          context.Context
	come, release chan struct{}
	asked         atomic.Int32
}

func newHeld(t testing.TB) *held {
	return &held{ends: t.Context(), come: make(chan struct{}, 1000), release: make(chan struct{})}
}

func (h *held) hold(handler func(dns.ResponseWriter, *dns.Msg)) func(dns.ResponseWriter, *dns.Msg) {
	return func(w dns.ResponseWriter, r *dns.Msg) {
		h.asked.Add(1)
		h.come <- struct{}{}
		select {
		case <-h.release:
		case <-h.ends.Done():
		}
		handler(w, r)
	}
}

func TestIdenticalConcurrentQueriesAreForwardedOnce(t *testing.T) {
	h := newHeld(t)
	r := serve(t, addrs(standing(t, h.hold(fixed("example. 60 A 192.0.2.1")))))
	plain := question("example.", dns.TypeA)
	checking := plain.Copy()
	checking.CheckingDisabled = true
	kinds := []*dns.Msg{plain, question("eXample.", dns.TypeA), checking, plain.Copy().SetEdns0(1232, false), plain.Copy().SetEdns0(1232, true),
		withOPT(plain.Copy(), 1232, &dns.EDNS0_LOCAL{Code: 65001, Data: []byte{1}}),
		withOPT(plain.Copy(), 1232, &dns.EDNS0_LOCAL{Code: 65001, Data: []byte{2}})}
	const each = 8
	var clients sync.WaitGroup
	for i := range each * len(kinds) {
		clients.Go(func() {
			q := kinds[i%len(kinds)].Copy()
			q.Id = uint16(i)
			client := dns.Client{Net: []string{"udp", "tcp"}[i/len(kinds)%2], Timeout: nettest.Patience}
			if m, _, err := client.Exchange(q, r.addr); err != nil || len(m.Answer) != 1 || m.Question[0] != q.Question[0] {
				t.Errorf("query %d: %v\n%v", i, err, m)
			}
		})
	}
	nettest.Eventually(t, "all queries are in progress", func() bool { return r.Stats.InFlight.Load() == int64(each*len(kinds)) })
	close(h.release)
	clients.Wait()
	// A query may have been counted as in progress but not have joined another when the first answers came.
	if asked, joined := h.asked.Load(), r.Stats.Joined.Load(); int(asked) < len(kinds) || int64(asked)+joined != int64(each*len(kinds)) || joined == 0 {
		t.Errorf("upstream was queried %d times, and %d queries joined, of %d in %d kinds", asked, joined, each*len(kinds), len(kinds))
	}
}

func TestTooManyQueriesAreAnsweredAtOnce(t *testing.T) {
	h := newHeld(t)
	r := serve(t, addrs(standing(t, h.hold(fixed()))), func(c *Config) { c.MaxInFlight = 2 })
	var clients sync.WaitGroup
	for i := range 2 {
		clients.Go(func() { r.ask(t, "udp", question(fmt.Sprintf("%d.example.", i), dns.TypeA)) })
		<-h.come
	}
	for _, network := range []string{"udp", "tcp"} {
		q := question("more.example.", dns.TypeA).SetEdns0(1232, true)
		if m := r.ask(t, network, q); m.Rcode != dns.RcodeServerFailure || len(m.Question) != 1 || m.IsEdns0() == nil || !m.IsEdns0().Do() {
			t.Errorf("over %s:\n%v", network, m)
		}
	}
	if got := r.Stats.Overloaded.Load(); got != 2 {
		t.Errorf("%d are counted", got)
	}
	close(h.release)
	clients.Wait()
	if m := r.ask(t, "udp", question("more.example.", dns.TypeA)); m.Rcode != dns.RcodeSuccess {
		t.Errorf("afterwards:\n%v", m)
	}
}

func dial(t testing.TB, r *resolver) *net.TCPConn {
	t.Helper()
	conn, err := net.DialTCP("tcp", nil, net.TCPAddrFromAddrPort(netip.MustParseAddrPort(r.addr)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(nettest.Patience))
	return conn
}

func receive(t testing.TB, conn io.Reader) *dns.Msg {
	t.Helper()
	var length [2]byte
	if _, err := io.ReadFull(conn, length[:]); err != nil {
		t.Fatal(err)
	}
	raw := make([]byte, binary.BigEndian.Uint16(length[:]))
	if _, err := io.ReadFull(conn, raw); err != nil {
		t.Fatal(err)
	}
	m := new(dns.Msg)
	if err := m.Unpack(raw); err != nil {
		t.Fatal(err)
	}
	return m
}

func TestASlowAnswerHoldsUpNoOtherOfItsConnection(t *testing.T) {
	h := newHeld(t)
	slow := h.hold(fixed())
	r := serve(t, addrs(standing(t, func(w dns.ResponseWriter, r *dns.Msg) {
		if r.Question[0].Name == "slow." {
			slow(w, r)
			return
		}
		fixed()(w, r)
	})))
	conn := dial(t, r)
	var sent []byte
	for _, name := range []string{"slow.", "fast.", "faster."} {
		sent = append(sent, framed(pack(t, question(name, dns.TypeA)))...)
	}
	if _, err := conn.Write(sent); err != nil {
		t.Fatal(err)
	}
	// The client sends no more queries but still reads answers.
	if err := conn.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	var names []string
	for len(names) < 2 {
		names = append(names, receive(t, conn).Question[0].Name)
	}
	close(h.release)
	names = append(names, receive(t, conn).Question[0].Name)
	if slices.Sort(names[:2]); !slices.Equal(names, []string{"fast.", "faster.", "slow."}) {
		t.Errorf("answers arrived for %v", names)
	}
	if n, err := conn.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Errorf("after the last answer: %d, %v", n, err)
	}
}

func TestManyQueriesOnOneConnectionAreAllAnswered(t *testing.T) {
	r := serve(t, addrs(standing(t, fixed())))
	conn := dial(t, r)
	const n = 5 * maxPipeline
	go func() {
		for i := range n {
			_, _ = conn.Write(framed(pack(t, question(fmt.Sprintf("%d.example.", i), dns.TypeA))))
		}
	}()
	names := make(map[string]bool)
	for range n {
		names[receive(t, conn).Question[0].Name] = true
	}
	if len(names) != n {
		t.Errorf("%d of %d queries were answered", len(names), n)
	}
}

func TestAnIdleConnectionIsClosed(t *testing.T) {
	query := framed(pack(t, question("example.", dns.TypeA)))
	for name, sent := range map[string][]byte{"nothing": nil, "half a query": query[:9], "a query": query} {
		nettest.UnderLimit(t, 50*time.Millisecond, func(t testing.TB, limit time.Duration) {
			r := prepare(t, addrs(standing(t, fixed())))
			r.idle = limit
			r.Start()
			conn := dial(t, r)
			if _, err := conn.Write(sent); err != nil {
				t.Fatal(err)
			}
			if answer, err := io.ReadAll(conn); err != nil || len(answer) > 0 != (len(sent) == len(query)) {
				t.Errorf("%s: % x, %v", name, answer, err)
			}
		})
	}
}

func TestDataOtherThanQueriesEndsItsConnection(t *testing.T) {
	r := serve(t, addrs(standing(t, fixed())))
	answer := pack(t, new(dns.Msg).SetReply(question("example.", dns.TypeA)))
	for _, sent := range [][]byte{{0, 0}, {0, 5, 1, 2, 3, 4, 5}, framed(answer)} {
		conn := dial(t, r)
		if _, err := conn.Write(sent); err != nil {
			t.Fatal(err)
		}
		if n, err := conn.Read(make([]byte, 1)); n != 0 || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("% x: %d, %v", sent, n, err)
		}
	}
	conn := dial(t, r)
	if _, err := conn.Write(framed(append(pack(t, question("example.", dns.TypeA)), make([]byte, maxQuery)...))[:maxQuery]); err != nil {
		t.Fatal(err)
	}
	if m := receive(t, conn); m.Rcode != dns.RcodeFormatError {
		t.Errorf("too long:\n%v", m)
	}
}

func TestANewConnectionTakesThePlaceOfTheOldestIdleOne(t *testing.T) {
	h := newHeld(t)
	slow := h.hold(fixed())
	r := prepare(t, addrs(standing(t, func(w dns.ResponseWriter, r *dns.Msg) {
		if r.Question[0].Name == "slow." {
			slow(w, r)
			return
		}
		fixed()(w, r)
	})))
	now := &clock{at: time.Now()}
	r.now, r.idle = now.now, nettest.Patience
	r.Start()
	var conns []*net.TCPConn
	use := func(conn *net.TCPConn) {
		t.Helper()
		now.add(time.Second)
		if _, err := conn.Write(framed(pack(t, question("example.", dns.TypeA)))); err != nil {
			t.Fatal(err)
		}
		receive(t, conn)
		nettest.Eventually(t, "the server to wait for the next query", func() bool {
			r.connsMu.Lock()
			defer r.connsMu.Unlock()
			for c := range r.conns {
				if c.RemoteAddr().String() == conn.LocalAddr().String() {
					return len(c.slots) == 0 && c.used.Equal(now.now())
				}
			}
			return false
		})
	}
	open := func() {
		conns = append(conns, dial(t, r))
		use(conns[len(conns)-1])
	}
	for range maxConns {
		open()
	}
	// Then the first is the oldest, but busy, and the second was used last. So the third is evicted.
	if _, err := conns[0].Write(framed(pack(t, question("slow.", dns.TypeA)))); err != nil {
		t.Fatal(err)
	}
	<-h.come
	for _, conn := range append(conns[2:maxConns:maxConns], conns[1]) {
		use(conn)
	}
	nettest.Eventually(t, "all queries except the slow one are answered", func() bool { return r.Stats.InFlight.Load() == 1 })
	open()
	if _, err := conns[2].Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the oldest idle connection: %v", err)
	}
	close(h.release)
	receive(t, conns[0])
	use(conns[1])
	if open, evicted := r.Stats.TCPConns.Load(), r.Stats.TCPEvicted.Load(); open != maxConns || evicted != 1 {
		t.Errorf("%d are open, and %d were evicted", open, evicted)
	}
}

func TestShutdownAnswersQueriesInProgress(t *testing.T) {
	h := newHeld(t)
	r := serve(t, addrs(standing(t, h.hold(fixed()))))
	var clients sync.WaitGroup
	for _, network := range []string{"udp", "tcp"} {
		clients.Go(func() {
			if m := r.ask(t, network, question(network+".example.", dns.TypeA)); m.Rcode != dns.RcodeSuccess {
				t.Errorf("over %s:\n%v", network, m)
			}
		})
		<-h.come
	}
	idle := dial(t, r)
	done := make(chan error)
	go func() { done <- r.Shutdown(t.Context()) }()
	if _, err := idle.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("an idle connection: %v", err)
	}
	select {
	case err := <-done:
		t.Errorf("Shutdown returned %v while queries were in progress", err)
	default:
	}
	close(h.release)
	clients.Wait()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if err := r.Shutdown(t.Context()); err != nil {
		t.Errorf("a second time: %v", err)
	}
}

func TestShutdownOutOfTimeAnswersSERVFAIL(t *testing.T) {
	h := newHeld(t)
	r := serve(t, addrs(standing(t, h.hold(fixed()))))
	var clients sync.WaitGroup
	for _, network := range []string{"udp", "tcp"} {
		clients.Go(func() {
			if m := r.ask(t, network, question(network+".example.", dns.TypeA)); m.Rcode != dns.RcodeServerFailure {
				t.Errorf("over %s:\n%v", network, m)
			}
		})
		<-h.come
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := r.Shutdown(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Shutdown returned %v", err)
	}
	clients.Wait()
}

func TestShutdownDoesNotWaitForADownstreamThatReadsNothing(t *testing.T) {
	r := serve(t, addrs(standing(t, big(60_000))))
	conn := dial(t, r)
	_ = conn.SetReadBuffer(4096)
	query := framed(pack(t, question("big.example.", dns.TypeTXT)))
	if _, err := conn.Write(bytes.Repeat(query, maxPipeline)); err != nil {
		t.Fatal(err)
	}
	nettest.Eventually(t, "an answer has been written", func() bool { return r.Stats.Answers[0].Load() > 0 })
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	start := time.Now()
	if err := r.Shutdown(ctx); !errors.Is(err, context.Canceled) || time.Since(start) > writeTime {
		t.Errorf("Shutdown took %v, with %v", time.Since(start), err)
	}
}

func TestEveryQueryIsReportedToTheSink(t *testing.T) {
	reported := make(chan Query, 10)
	server := standing(t, func(w dns.ResponseWriter, r *dns.Msg) {
		if r.Question[0].Qtype == dns.TypeTXT {
			big(2000)(w, r)
			return
		}
		fixed(r.Question[0].Name+" 60 A 192.0.2.1")(w, r)
	})
	r := serve(t, addrs(server), func(c *Config) { c.Sink, c.CacheSize = func(q Query) { reported <- q }, 10 })
	long := strings.Repeat(strings.Repeat(`\255`, 63)+".", 3) + strings.Repeat(`\255`, 61) + "."
	for _, c := range []struct {
		network string
		q       *dns.Msg
		want    Query
	}{
		{"udp", question("a.example.", dns.TypeA), Query{Name: "a.example.", Type: "A", Rcode: "NOERROR", Transport: "udp", Upstream: server}},
		{"tcp", question("A.example.", dns.TypeA), Query{Name: "A.example.", Type: "A", Rcode: "NOERROR", Transport: "tcp", Cached: true}},
		{"udp", question("b.example.", dns.TypeTXT), Query{Name: "b.example.", Type: "TXT", Rcode: "NOERROR", Transport: "udp", Upstream: server, Truncated: true}},
		{"tcp", question(long, 65400), Query{Name: long, Type: "TYPE65400", Rcode: "NOERROR", Transport: "tcp", Upstream: server}},
		{"tcp", question("c.example.", dns.TypeAXFR), Query{Name: "c.example.", Type: "AXFR", Rcode: "NOTIMP", Transport: "tcp"}},
	} {
		r.ask(t, c.network, c.q)
		got := <-reported
		if got.Duration <= 0 || got.Duration > nettest.Patience || len(got.Name) > 1004 {
			t.Errorf("%s took %v", got.Name, got.Duration)
		}
		if got.Duration = 0; got != c.want {
			t.Errorf("reported %+v\nwant     %+v", got, c.want)
		}
	}
}

func TestConcurrentDownstreamsGetTheirOwnAnswers(t *testing.T) {
	servers := addrs(
		packets(t, func([]byte) [][]byte { return nil }),
		standing(t, coded(dns.RcodeRefused)),
		standing(t, func(w dns.ResponseWriter, r *dns.Msg) {
			var i, size int
			if _, err := fmt.Sscanf(r.Question[0].Name, "n%d-%d.", &i, &size); err == nil && size > 0 {
				big(size)(w, r)
				return
			}
			fixed(fmt.Sprintf("%s %d A 192.0.2.%d", r.Question[0].Name, i%3, i))(w, r)
		}))
	var reported atomic.Int64
	r := serve(t, servers, func(c *Config) {
		c.Timeout, c.CacheSize, c.Sink = 2*time.Second, 20, func(Query) { reported.Add(1) }
	})
	const downstreams, each = 30, 20
	var clients sync.WaitGroup
	for d := range downstreams {
		clients.Go(func() {
			client := dns.Client{Net: []string{"udp", "tcp"}[d%2], Timeout: nettest.Patience, UDPSize: dns.MaxMsgSize}
			for n := range each {
				i, size := (d+n)%40, 0
				if n%5 == 0 {
					size = 1000 + 10_000*(n/5)
				}
				q := question(fmt.Sprintf("n%d-%d.example.", i, size), dns.TypeA)
				m, _, err := client.Exchange(q, r.addr)
				switch {
				case err != nil || m.Question[0] != q.Question[0] || len(m.Answer) == 0:
					t.Errorf("%s: %v\n%v", q.Question[0].Name, err, m)
				case size > 0 && len(m.Answer) < size/300 && !m.Truncated, size == 0 && m.Answer[0].(*dns.A).A[3] != byte(i):
					t.Errorf("%s: the answer is\n%v", q.Question[0].Name, m)
				}
			}
		})
	}
	clients.Wait()
	if reported.Load() != downstreams*each || r.Stats.Answers[0].Load() != downstreams*each {
		t.Errorf("%d of %[3]d queries were reported, %[2]d counted", reported.Load(), r.Stats.Answers[0].Load(), downstreams*each)
	}
	nettest.Eventually(t, "all queries, flights and connections to end", func() bool {
		r.connsMu.Lock()
		defer r.connsMu.Unlock()
		return r.Stats.InFlight.Load() == 0 && len(r.flights) == 0 && len(r.conns) == 0
	})
}

func TestBadConfigurationIsNamed(t *testing.T) {
	udp, tcp := sockets(t)
	defer udp.Close()
	defer tcp.Close()
	own := udp.LocalAddr().(*net.UDPAddr).AddrPort()
	server := netip.MustParseAddrPort("192.0.2.53:53")
	bound := func(c *Config) { c.UDP, c.TCP = []*net.UDPConn{udp}, []*net.TCPListener{tcp} }
	listen := func(addr string) func(*Config) {
		return func(c *Config) { c.Listen = addrs(netip.MustParseAddrPort(addr)) }
	}
	for _, c := range []struct {
		upstream string
		change   func(*Config)
		want     string
	}{
		{"127.0.0.1:15053", func(*Config) {}, "127.0.0.1:15053 is where this resolver listens"},
		{"[::1]:15053", func(*Config) {}, "[::1]:15053 is where"},
		{"[::ffff:127.0.0.1]:15053", func(*Config) {}, "]:15053 is where"},
		{"0.0.0.0:15053", func(*Config) {}, "0.0.0.0:15053 is where"},
		{"127.0.0.53:15053", listen("0.0.0.0:15053"), "127.0.0.53:15053 is where"},
		{own.String(), bound, own.String() + " is where"},
		{own.String(), func(c *Config) { c.UDP = []*net.UDPConn{udp} }, own.String() + " is where"},
		{own.String(), func(c *Config) { c.TCP = []*net.TCPListener{tcp} }, own.String() + " is where"},
		{server.String(), func(c *Config) { c.Upstreams = nil }, "Upstreams is empty"},
		{server.String(), func(c *Config) { c.Upstreams[0] = netip.AddrPort{} }, "no address or no port"},
		{"192.0.2.53:0", func(*Config) {}, "192.0.2.53:0 has no address or no port"},
		{server.String(), func(c *Config) { c.Timeout = -1 }, "Timeout is -1"},
		{server.String(), func(c *Config) { c.MaxInFlight = -2 }, "MaxInFlight is -2"},
		{server.String(), func(c *Config) { c.CacheSize = -3 }, "CacheSize is -3"},
		{server.String(), listen(own.String()), "address already in use"},
		{server.String(), listen("192.0.2.1:15053"), "cannot assign requested address"},
	} {
		config := Config{Upstreams: addrs(netip.MustParseAddrPort(c.upstream)), Log: slog.New(slog.DiscardHandler)}
		c.change(&config)
		s, err := New(config)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.upstream, err, c.want)
		}
		if s != nil {
			t.Error("New returned a server and an error")
		}
	}
}

func TestNewBindsTheAddressesOfListen(t *testing.T) {
	udp, tcp := sockets(t)
	free := udp.LocalAddr().(*net.UDPAddr).AddrPort()
	udp.Close()
	tcp.Close()
	s, err := New(Config{Listen: addrs(free), Upstreams: addrs(standing(t, fixed())), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	s.Start()
	for _, network := range []string{"udp", "tcp"} {
		(&resolver{s, free.String()}).ask(t, network, question("example.", dns.TypeA))
	}
	if err := s.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestReadResolvConfReturnsAllServersInOrder(t *testing.T) {
	path := filepath.Join(t.TempDir(), "resolv.conf")
	text := "# nameserver 192.0.2.9\nsearch a.example b.example\nnameserver 192.0.2.1\n nameserver\tfe80::1%eth0 # a comment\n" +
		"nameserver\nnameserver dns.example\nnameserver 192.0.2.300\noptions ndots:5\nnameserver 2001:db8::1\n; nameserver 192.0.2.8\n" +
		"nameservers 192.0.2.7\nnameserver 192.0.2.2\nnameserver 192.0.2.3"
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := ReadResolvConf(path)
	want := "[192.0.2.1:53 [fe80::1%eth0]:53 [2001:db8::1]:53 192.0.2.2:53 192.0.2.3:53]"
	if err != nil || fmt.Sprint(got) != want {
		t.Errorf("%v, %v, want %s", got, err, want)
	}
	if _, err := ReadResolvConf(path + ".none"); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), path) {
		t.Errorf("a missing file: %v", err)
	}
}
