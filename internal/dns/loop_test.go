package dns

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// As with rules that do not exempt the agent's user: every query to an upstream comes back to the resolver.
func TestAQueryOfOurOwnIsAnsweredAndLoggedOnce(t *testing.T) {
	var log bytes.Buffer
	var r *resolver
	r = prepare(t, addrs(netip.MustParseAddrPort("192.0.2.53:53"), netip.MustParseAddrPort("192.0.2.54:53")), func(c *Config) {
		c.Log = slog.New(slog.NewTextHandler(&log, nil))
		c.Dial = func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, r.addr)
		}
	})
	r.Start()
	const queries = 10
	for i := range queries {
		q := question(fmt.Sprintf("n%d.example.", i), dns.TypeA)
		if m := r.ask(t, "udp", q); m.Rcode != dns.RcodeServerFailure || len(m.Question) != 1 || m.Question[0] != q.Question[0] {
			t.Errorf("the answer is\n%v", m)
		}
	}
	// Each of the two upstreams is queried once: a SERVFAIL is an answer.
	if sent, loops := r.Stats.UpstreamQueries.Load(), r.Stats.Loops.Load(); sent != 2*queries || loops != 2*queries {
		t.Errorf("%d upstream queries and %d loops, want %d", sent, loops, 2*queries)
	}
	if n := strings.Count(log.String(), "capture the agent's own queries"); n != 1 || !strings.Contains(log.String(), "--proxy-uid") {
		t.Errorf("logged %d times, want once, with the remedy:\n%s", n, &log)
	}
	r.own.mu.Lock()
	defer r.own.mu.Unlock()
	if len(r.own.open) != 0 {
		t.Errorf("%d sockets are still in the set", len(r.own.open))
	}
}

func TestQueriesAreRecognisedWhateverTheFormOfTheirAddress(t *testing.T) {
	var own ownSockets
	conn, err := net.Dial("udp", "127.0.0.1:9")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	query := []byte("a query")
	remove := own.add(conn, query)
	local := conn.LocalAddr().(*net.UDPAddr).AddrPort()
	mapped := netip.AddrPortFrom(netip.AddrFrom16(local.Addr().As16()), local.Port())
	other := netip.AddrPortFrom(local.Addr(), local.Port()^1)
	if !own.sent(local, query) || !own.sent(mapped, query) || own.sent(other, query) {
		t.Errorf("%v: %t, %v: %t, %v: %t", local, own.sent(local, query), mapped, own.sent(mapped, query), other, own.sent(other, query))
	}
	if remove(); own.sent(local, query) {
		t.Errorf("%v is still in the set", local)
	}
}

// conntrack may give the query of a client the port of one of our own sockets.
func TestAQueryOfAnotherFromTheAddressOfAnOwnSocketIsAnswered(t *testing.T) {
	r := serve(t, addrs(standing(t, coded(dns.RcodeNameError))))
	client, err := net.Dial("udp", r.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	own := question("a.example.", dns.TypeA)
	sent, err := own.Pack()
	if err != nil {
		t.Fatal(err)
	}
	defer r.own.add(client, sent)() // as if it were a socket of the resolver's

	conn := &dns.Conn{Conn: client}
	client.SetDeadline(time.Now().Add(nettest.Patience))
	for _, q := range []*dns.Msg{question("a.example.", dns.TypeA), question("b.example.", dns.TypeA)} {
		if q.Id == own.Id {
			q.Id++
		}
		if err := conn.WriteMsg(q); err != nil {
			t.Fatal(err)
		}
		if m, err := conn.ReadMsg(); err != nil || m.Id != q.Id || m.Rcode != dns.RcodeNameError {
			t.Errorf("the answer to %s is %v, %v", q.Question[0].Name, m, err)
		}
	}
	if n := r.Stats.Loops.Load(); n != 0 {
		t.Errorf("%d queries are counted as loops", n)
	}
}
