package dns

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// scripted is a socket to an upstream that answers with one packet, whose ID is that of the query.
type scripted struct {
	net.Conn
	tcp    bool
	packet []byte
	reply  io.Reader
}

func (c *scripted) Write(p []byte) (int, error) {
	packet, asked := bytes.Clone(c.packet), p
	if c.tcp {
		asked = p[2:]
	}
	copy(packet, asked[:2])
	if c.tcp {
		packet = framed(packet)
	}
	c.reply = bytes.NewReader(packet)
	return len(p), nil
}

func (c *scripted) Read(p []byte) (int, error)  { return c.reply.Read(p) }
func (c *scripted) Close() error                { return nil }
func (c *scripted) LocalAddr() net.Addr         { return nil }
func (c *scripted) SetDeadline(time.Time) error { return nil }

// FuzzAnswer sends arbitrary bytes from downstream and upstream. An answer always has its query's ID, is well-formed and
// fits, and a cached answer equals the first one.
func FuzzAnswer(f *testing.F) {
	for _, q := range []*dns.Msg{question("Example.", dns.TypeA), question("example.", dns.TypeTXT).SetEdns0(1232, true), new(dns.Msg).SetUpdate("example.")} {
		asked := pack(f, q)
		m := answered(q, "example. 60 A 192.0.2.1", "www.example. 5 CNAME example.", "example. 9 TXT abc")
		m.Ns = answered(q, "example. 60 SOA ns.example. root.example. 1 2 3 4 5").Answer
		m.Compress = true
		f.Add(asked, pack(f, m), true)
		f.Add(asked, pack(f, m.SetEdns0(4096, true)), false)
		f.Add(asked[:len(asked)-1], pack(f, new(dns.Msg).SetRcode(q, dns.RcodeFormatError)), false)
		f.Add(asked[:13], asked, true)
	}
	f.Fuzz(func(t *testing.T, asked, response []byte, overTCP bool) {
		if len(response) > maxMessage {
			return
		}
		s := &Server{Config: Config{
			Timeout: time.Second, MaxInFlight: 1, Log: slog.New(slog.DiscardHandler), Sink: func(Query) {},
			Dial: func(_ context.Context, network, _ string) (net.Conn, error) {
				return &scripted{packet: response, tcp: network == "tcp"}, nil
			},
		}, now: time.Now, queries: context.Background(), flights: make(map[string]*flight)}
		s.upstreams = []*upstream{{addr: netip.MustParseAddrPort("192.0.2.53:53")}}
		s.cache = newCache(10, &s.Stats)
		at := time.Now()
		s.now = func() time.Time { return at }

		transport, limit := "udp", maxPacket
		if overTCP {
			transport, limit = "tcp", maxMessage
		}
		kept := bytes.Clone(asked)
		out := s.answer(asked, transport, limit)
		if !bytes.Equal(asked, kept) {
			t.Fatalf("the query was changed: % x", asked)
		}
		if len(asked) < headerSize || asked[2]&bitQR != 0 {
			if out != nil {
				t.Fatalf("a message that is not a query was answered with % x", out)
			}
			return
		}
		out = out[2:]
		m, err := parse(out)
		switch {
		case err != nil || len(m.raw) != len(out):
			t.Fatalf("malformed: % x", out)
		case !m.response() || !bytes.Equal(out[:2], asked[:2]):
			t.Fatalf("not an answer to this query: % x", out)
		case overTCP && m.truncated():
			t.Fatalf("TC over TCP: % x", out)
		}
		query, err := parse(asked)
		if err != nil || len(query.raw) != len(asked) || len(query.question) == 0 {
			if m.rcode() != dns.RcodeFormatError || len(out) != headerSize {
				t.Fatalf("a malformed query was answered with % x", out)
			}
			return
		}
		if !overTCP && len(out) > query.udpSize() {
			t.Fatalf("%d bytes for a downstream that accepts %d", len(out), query.udpSize())
		}
		if m.edns() && !query.edns() {
			t.Fatalf("an OPT in the answer to a query without one: % x", out)
		}
		if len(m.question) > 0 && !sameName(m.name(), query.name()) {
			t.Fatalf("the answer to another question: % x", out)
		}
		before := s.Stats.Cached.Load()
		if again := s.answer(asked, transport, limit); s.Stats.Cached.Load() > before && !bytes.Equal(again[2:], out) {
			t.Fatalf("first % x\nthen  % x", out, again[2:])
		}
		if s.Stats.InFlight.Load() != 0 || len(s.flights) != 0 {
			t.Fatal("a query is still in progress")
		}
	})
}
