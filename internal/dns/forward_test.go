package dns

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

func withOPT(m *dns.Msg, size uint16, options ...dns.EDNS0) *dns.Msg {
	m.SetEdns0(size, false)
	m.IsEdns0().Option = options
	return m
}

func TestQueriesReachUpstreamAsTheyWereSent(t *testing.T) {
	flags := question("Flags.Example.", dns.TypeHTTPS)
	flags.RecursionDesired, flags.CheckingDisabled, flags.AuthenticatedData = false, true, true
	update := new(dns.Msg).SetUpdate("example.")
	update.Insert([]dns.RR{&dns.A{Hdr: dns.RR_Header{Name: "a.example.", Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 1}, A: net.IPv4(192, 0, 2, 1)}})
	signed := question("signed.example.", dns.TypeA).SetTsig("key.", dns.HmacSHA256, 300, 1)
	for _, c := range []struct {
		name  string
		query *dns.Msg
		added bool // whether an OPT is added
	}{
		{"ordinary", question("example.", dns.TypeA), true},
		{"mixed case", question("wWw.ExAmPlE.", dns.TypeAAAA), true},
		{"flags", flags, true},
		{"a name without a search domain", question("name.", dns.TypeA), true},
		{"odd bytes", question(`a\000b\.c\255.example.`, 65400), true},
		{"EDNS", withOPT(question("example.", dns.TypeA), 1232), false},
		{"EDNS options, known and unknown", withOPT(question("example.", dns.TypeA), 700,
			&dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "0123456789abcdef"},
			&dns.EDNS0_LOCAL{Code: 65001, Data: []byte{1, 2, 3}}), false},
		{"DO", question("example.", dns.TypeDNSKEY).SetEdns0(4096, true), false},
		{"a signature", signed, false},
		{"an update", update, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := make(chan []byte, 1)
			server := packets(t, func(query []byte) [][]byte {
				got <- slices.Clone(query)
				query[2] |= bitQR
				return [][]byte{query}
			})
			sent := pack(t, c.query)
			r := serve(t, addrs(server))
			answer := r.send(t, sent)
			if !bytes.Equal(answer[:2], sent[:2]) {
				t.Errorf("the answer has ID %x, the query %x", answer[:2], sent[:2])
			}
			want := slices.Clone(sent[2:])
			if c.added {
				want[9]++ // additional records
				want = append(want, 0, 0, 41, 1232>>8, 1232&0xff, 0, 0, 0, 0, 0, 0)
			}
			if received := (<-got)[2:]; !bytes.Equal(received, want) {
				t.Errorf("upstream received\n% x, want\n% x", received, want)
			}
			// The same message is returned. Only the size in the OPT is that of this hop.
			if m, _ := parse(sent); m.edns() {
				binary.BigEndian.PutUint16(sent[m.opt.fixed+2:], 4096)
			}
			if sent[2] |= bitQR; !bytes.Equal(answer, sent) {
				t.Errorf("downstream received\n% x, want\n% x", answer, sent)
			}
		})
	}
}

func TestAnswersReachDownstreamAsTheyWereGiven(t *testing.T) {
	records := []byte("" +
		// An address of the question's name, a record of an unknown type and class, and a name that points into the first.
		"\xc0\x0c\x00\x01\x00\x01\x00\x00\x00\x3c\x00\x04\xc0\x00\x02\x01" +
		"\x03odd\x00\xff\x7b\x43\x21\x00\x00\x00\x01\x00\x05\xc0\xff\x00\xde\xad" +
		"\x01N\xc0\x14\x00\x05\x00\x01\x00\x00\x00\x05\x00\x02\xc0\x0c")
	opt := []byte("\x00\x00\x29\x05\x78\x00\x00\x80\x00\x00\x06\xfd\xea\x00\x02\x07\x08")
	for _, c := range []struct {
		name  string
		query *dns.Msg
		tail  []byte // after the question
		extra byte   // additional records
	}{
		{"plain", question("Example.ORG.", dns.TypeA), records, 1},
		{"EDNS", withOPT(question("Example.ORG.", dns.TypeA), 1232), slices.Concat(records, opt), 2},
		{"an unrequested OPT", question("Example.ORG.", dns.TypeA), slices.Concat(records, opt), 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			m, _ := parse(pack(t, c.query))
			body := slices.Concat([]byte("\x85\xb0\x00\x01\x00\x01\x00\x01\x00"), []byte{c.extra}, m.question, c.tail)
			server := packets(t, func(query []byte) [][]byte { return [][]byte{append(query[:2:2], body...)} })
			r := serve(t, addrs(server))
			want := slices.Clone(body)
			if m.edns() {
				copy(want[len(want)-len(opt)+3:], "\x10\x00")
			} else {
				want = want[:len(want)-len(c.tail)+len(records)]
				want[9] = 1
			}
			if answer := r.send(t, pack(t, c.query)); !bytes.Equal(answer[2:], want) {
				t.Errorf("downstream received\n% x, want\n% x", answer[2:], want)
			}
		})
	}
}

func TestAnExtendedCodeBecomesSERVFAILWithoutEDNS(t *testing.T) {
	server := standing(t, func(w dns.ResponseWriter, r *dns.Msg) {
		m := new(dns.Msg).SetReply(r).SetEdns0(1232, false)
		m.Rcode = dns.RcodeBadVers
		_ = w.WriteMsg(m)
	})
	r := serve(t, addrs(server))
	if m := r.ask(t, "udp", question("example.", dns.TypeA)); m.Rcode != dns.RcodeServerFailure || m.IsEdns0() != nil {
		t.Errorf("without EDNS:\n%v", m)
	}
	if m := r.ask(t, "udp", withOPT(question("example.", dns.TypeA), 1232)); m.Rcode != dns.RcodeBadVers {
		t.Errorf("with EDNS:\n%v", m)
	}
}

func TestAnswersOfEverySizeArriveWhole(t *testing.T) {
	for _, size := range []int{300, 511, 1000, 1400, 4000, 9000, 30_000, 60_000} {
		r := serve(t, addrs(standing(t, big(size))))
		whole := r.ask(t, "tcp", question("big.example.", dns.TypeTXT))
		if whole.Truncated || whole.Len() < size {
			t.Fatalf("%d bytes over TCP arrive as %d, TC %t", size, whole.Len(), whole.Truncated)
		}
		whole.Compress = true
		for _, offered := range []int{0, 100, 512, 1232, 4096, 65535} {
			q := question("big.example.", dns.TypeTXT)
			limit, opt := 512, 0
			if offered > 0 {
				q.SetEdns0(uint16(offered), false)
				limit, opt = max(512, offered), optSize
			}
			m, err := dns.ExchangeContext(t.Context(), q, r.addr)
			if err != nil {
				t.Fatalf("%d bytes, %d offered: %v", size, offered, err)
			}
			m.Compress = true
			if m.Len() > limit {
				t.Errorf("%d bytes, %d offered: %d arrive", size, offered, m.Len())
			}
			if fits := whole.Len()+opt <= limit; m.Truncated == fits || fits && len(m.Answer) != len(whole.Answer) {
				t.Errorf("%d bytes, %d offered: %d of %d records, TC %t", size, offered, len(m.Answer), len(whole.Answer), m.Truncated)
			}
			if m.Truncated && limit-m.Len() > 250 {
				t.Errorf("%d bytes, %d offered: room for another record, in %d bytes", size, offered, m.Len())
			}
			for i, rr := range m.Answer {
				if rr.String() != whole.Answer[i].String() {
					t.Errorf("record %d differs", i)
				}
			}
			if got := m.IsEdns0(); (got != nil) != (offered > 0) || got != nil && got.UDPSize() != 4096 {
				t.Errorf("%d bytes, %d offered: OPT %v", size, offered, got)
			}
		}
	}
}

func TestGoResolverGetsItsAnswers(t *testing.T) {
	server := standing(t, func(w dns.ResponseWriter, r *dns.Msg) {
		switch name := r.Question[0].Name; {
		case r.Question[0].Qtype == dns.TypeTXT:
			big(20_000)(w, r)
		case name == "nowhere.example.":
			coded(dns.RcodeNameError)(w, r)
		case r.Question[0].Qtype == dns.TypeA:
			fixed(name+" 5 A 192.0.2.1")(w, r)
		default:
			fixed(name+" 5 AAAA 2001:db8::1")(w, r)
		}
	})
	r := serve(t, addrs(server), func(c *Config) { c.CacheSize = DefaultCacheSize })
	client := net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, r.addr)
	}}
	for range 2 {
		hosts, err := client.LookupHost(t.Context(), "host.example.")
		if slices.Sort(hosts); err != nil || !slices.Equal(hosts, []string{"192.0.2.1", "2001:db8::1"}) {
			t.Errorf("host.example has %v, %v", hosts, err)
		}
		texts, err := client.LookupTXT(t.Context(), "text.example.")
		if err != nil || len(texts) < 80 {
			t.Errorf("text.example has %d texts, %v", len(texts), err)
		}
		_, err = client.LookupHost(t.Context(), "nowhere.example.")
		if missing, ok := err.(*net.DNSError); !ok || !missing.IsNotFound {
			t.Errorf("nowhere.example: %v", err)
		}
	}
}

// address returns a valid answer to query. Callers may modify it.
func address(query []byte) []byte {
	q := new(dns.Msg)
	if err := q.Unpack(query); err != nil {
		panic(err)
	}
	raw, _ := answered(q, q.Question[0].Name+" 60 A 192.0.2.1").Pack()
	return raw
}

func TestTheNextServerIsQueriedAfterAFailure(t *testing.T) {
	silence := func([]byte) [][]byte { return nil }
	modified := func(modify func(answer []byte) []byte) func([]byte) [][]byte {
		return func(query []byte) [][]byte { return [][]byte{modify(address(query))} }
	}
	for _, c := range []struct {
		name  string
		first netip.AddrPort
		moves bool
	}{
		{"refused port", refusing(t), true},
		{"silence", packets(t, silence), true},
		{"SERVFAIL", standing(t, coded(dns.RcodeServerFailure)), true},
		{"REFUSED", standing(t, coded(dns.RcodeRefused)), true},
		{"NOTIMP", standing(t, coded(dns.RcodeNotImplemented)), true},
		{"wrong ID", packets(t, modified(func(a []byte) []byte { a[0]++; return a })), true},
		{"wrong name", packets(t, modified(func(a []byte) []byte { a[14]++; return a })), true},
		{"wrong type", packets(t, modified(func(a []byte) []byte { a[22] = 28; return a })), true},
		{"a query", packets(t, modified(func(a []byte) []byte { a[2] &^= bitQR; return a })), true},
		{"another opcode", packets(t, modified(func(a []byte) []byte { a[2] |= 5 << 3; return a })), true},
		{"a header alone", packets(t, modified(func(a []byte) []byte { a[5], a[7] = 0, 0; return a[:12] })), true},
		{"cut short", packets(t, modified(func(a []byte) []byte { return a[:len(a)-1] })), true},
		{"a byte", packets(t, modified(func(a []byte) []byte { return a[:1] })), true},
		{"garbage", packets(t, func([]byte) [][]byte { return [][]byte{bytes.Repeat([]byte{0xff}, 300)} }), true},
		{"truncated, and no TCP", packets(t, modified(func(a []byte) []byte { a[2] |= bitTC; return a })), true},
		{"NXDOMAIN", standing(t, coded(dns.RcodeNameError)), false},
		{"no record", standing(t, fixed()), false},
		{"an answer", standing(t, fixed("example. 60 A 192.0.2.7")), false},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel() // most of the time is spent waiting
			nettest.UnderLimit(t, soon, func(t testing.TB, limit time.Duration) {
				second := standing(t, fixed("example. 60 A 192.0.2.2"))
				r := serve(t, addrs(c.first, second), within(limit))
				m := r.ask(t, "udp", question("example.", dns.TypeA))
				moved := len(m.Answer) == 1 && m.Answer[0].(*dns.A).A.String() == "192.0.2.2"
				if moved != c.moves {
					t.Errorf("the second server was queried: %t, want %t\n%v", moved, c.moves, m)
				}
				alone := serve(t, addrs(c.first), within(limit))
				switch m := alone.ask(t, "udp", question("example.", dns.TypeA)); {
				case c.name == "truncated, and no TCP":
					if !m.Truncated {
						t.Errorf("alone: the answer has no TC:\n%v", m)
					}
					if alone.upstreams[0].dead.Load() != 0 {
						t.Error("a server that answers over UDP is marked as dead")
					}
					if m := alone.ask(t, "tcp", question("example.", dns.TypeA)); m.Rcode != dns.RcodeServerFailure {
						t.Errorf("alone, over TCP:\n%v", m)
					}
				case strings.ToUpper(c.name) == c.name:
					if dns.RcodeToString[m.Rcode] != c.name {
						t.Errorf("alone: the answer was not passed through:\n%v", m)
					}
				case c.moves && m.Rcode != dns.RcodeServerFailure:
					t.Errorf("alone:\n%v", m)
				}
			})
		})
	}
}

func TestOneLostPacketDoesNotFailALookup(t *testing.T) {
	nettest.UnderLimit(t, soon, func(t testing.TB, limit time.Duration) {
		var seen atomic.Int32
		server := packets(t, func(query []byte) [][]byte {
			if seen.Add(1) == 1 {
				return nil
			}
			return [][]byte{address(query)}
		})
		r := serve(t, addrs(server), within(limit))
		if m := r.ask(t, "udp", question("example.", dns.TypeA)); len(m.Answer) != 1 {
			t.Errorf("the answer is\n%v", m)
		}
	})
}

func TestAServerThatHasAnsweredIsNotQueriedAgain(t *testing.T) {
	nettest.UnderLimit(t, soon, func(t testing.TB, limit time.Duration) {
		var refused, silent atomic.Int32
		r := serve(t, addrs(
			standing(t, counting(&refused, coded(dns.RcodeRefused))),
			packets(t, func([]byte) [][]byte { silent.Add(1); return nil })), within(limit))
		if m := r.ask(t, "udp", question("example.", dns.TypeA)); m.Rcode != dns.RcodeRefused {
			t.Errorf("the answer is\n%v", m)
		}
		if refused.Load() != 1 || silent.Load() != rounds {
			t.Errorf("the refusing server was queried %d times, the silent one %d times", refused.Load(), silent.Load())
		}
	})
}

func TestAForgedAnswerDoesNotHideTheRealOne(t *testing.T) {
	server := packets(t, func(query []byte) [][]byte {
		good, forged := address(query), address(query)
		forged[0]++
		forged[len(forged)-1] = 66
		return [][]byte{forged, forged[:20], good}
	})
	r := serve(t, addrs(server))
	m := r.ask(t, "udp", question("example.", dns.TypeA))
	if len(m.Answer) != 1 || m.Answer[0].(*dns.A).A.String() != "192.0.2.1" || r.Stats.UpstreamStrays.Load() != 2 {
		t.Errorf("%d strays; the answer is\n%v", r.Stats.UpstreamStrays.Load(), m)
	}
}

func TestManyForgedAnswersMoveTheQueryToTCP(t *testing.T) {
	var overUDP atomic.Bool
	server := standing(t, func(w dns.ResponseWriter, r *dns.Msg) {
		if _, udp := w.RemoteAddr().(*net.UDPAddr); udp {
			overUDP.Store(true)
			for range maxStrays {
				m := answered(r, "example. 60 A 192.0.2.66")
				m.Id++
				_ = w.WriteMsg(m)
			}
			return
		}
		fixed("example. 60 A 192.0.2.1")(w, r)
	})
	r := serve(t, addrs(server))
	m := r.ask(t, "udp", question("example.", dns.TypeA))
	if !overUDP.Load() || len(m.Answer) != 1 || m.Answer[0].(*dns.A).A.String() != "192.0.2.1" {
		t.Errorf("the answer is\n%v", m)
	}
}

func TestEveryTryHasAnIDAndAPortOfItsOwn(t *testing.T) {
	type origin struct{ id, port uint16 }
	seen := make(chan origin, 100)
	server := standing(t, func(w dns.ResponseWriter, r *dns.Msg) {
		seen <- origin{r.Id, w.RemoteAddr().(*net.UDPAddr).AddrPort().Port()}
		fixed()(w, r)
	})
	r := serve(t, addrs(server))
	ids, ports := make(map[uint16]bool), make(map[uint16]bool)
	for range 50 {
		q := question("example.", dns.TypeA)
		q.Id = 7
		r.ask(t, "udp", q)
		o := <-seen
		ids[o.id], ports[o.port] = true, true
	}
	if len(ids) < 45 || len(ports) < 40 {
		t.Errorf("50 tries had %d IDs and %d source ports", len(ids), len(ports))
	}
}

func TestAServerWithoutEDNSIsQueriedWithoutIt(t *testing.T) {
	for _, whole := range []bool{true, false} {
		server := packets(t, func(query []byte) [][]byte {
			m, err := parse(query)
			if err != nil {
				panic(err)
			}
			if !m.edns() {
				return [][]byte{address(query)}
			}
			answer := failure(&message{raw: query}, dns.RcodeFormatError)
			if whole {
				m.opt = record{}
				answer = failure(&m, dns.RcodeFormatError)
			}
			return [][]byte{answer}
		})
		r := serve(t, addrs(server))
		if m := r.ask(t, "udp", question("example.", dns.TypeA)); len(m.Answer) != 1 {
			t.Errorf("downstream without EDNS:\n%v", m)
		}
		raw := r.send(t, pack(t, withOPT(question("example.", dns.TypeA), 1232)))
		if raw[3]&0xf != dns.RcodeFormatError {
			t.Errorf("a downstream with EDNS gets % x, want FORMERR, so that it can decide itself", raw)
		}
	}
}

func TestAQueryWhoseOPTIsDroppedIsRepeatedWithoutIt(t *testing.T) {
	nettest.UnderLimit(t, soon, func(t testing.TB, limit time.Duration) {
		server := standing(t, func(w dns.ResponseWriter, r *dns.Msg) {
			if r.IsEdns0() == nil { // a query with an OPT gets no answer
				big(3000)(w, r)
			}
		})
		r := serve(t, addrs(server), within(limit))
		if m := r.ask(t, "tcp", question("example.", dns.TypeTXT)); len(m.Answer) < 10 {
			t.Errorf("the answer is\n%v", m)
		}
	})
}

// behindDead starts a resolver with a dead server, whose queries are counted, and another one behind it.
func behindDead(t testing.TB, limit time.Duration) (r *resolver, asked *atomic.Int32, now *clock) {
	t.Helper()
	asked = new(atomic.Int32)
	dead := packets(t, func([]byte) [][]byte { asked.Add(1); return nil })
	r = prepare(t, addrs(dead, standing(t, fixed())), within(limit))
	now = &clock{at: time.Now()}
	r.now = now.now
	r.Start()
	return r, asked, now
}

func TestADeadServerIsQueriedLastForAWhile(t *testing.T) {
	nettest.UnderLimit(t, soon, func(t testing.TB, limit time.Duration) {
		r, asked, now := behindDead(t, limit)
		for i, c := range []struct {
			later time.Duration
			want  int32
		}{{0, 1}, {0, 1}, {deadTime - 1, 1}, {1, 2}, {0, 2}} {
			now.add(c.later)
			r.ask(t, "udp", question("example.", dns.TypeA))
			if got := asked.Load(); got != c.want {
				t.Errorf("after query %d, the dead server was queried %d times, want %d", i, got, c.want)
			}
		}
	})
}

// If this process cannot open a socket, the server is not the cause.
func TestAServerIsNotDeadWhenThisProcessLacksDescriptors(t *testing.T) {
	nettest.UnderLimit(t, soon, func(t testing.TB, limit time.Duration) {
		alive := standing(t, fixed())
		r := prepare(t, addrs(alive), within(limit), func(c *Config) {
			dial := new(net.Dialer).DialContext
			var lacks atomic.Bool
			lacks.Store(true)
			c.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
				if lacks.Swap(false) {
					return nil, os.NewSyscallError("socket", syscall.EMFILE)
				}
				return dial(ctx, network, address)
			}
		})
		r.Start()
		r.ask(t, "udp", question("example.", dns.TypeA))
		if until := r.upstreams[0].dead.Load(); until != 0 {
			t.Error("the server is marked as dead")
		}
	})
}

// One query tries a dead server again; the others do not wait for its result.
func TestOneQueryTriesADeadServerAgain(t *testing.T) {
	nettest.UnderLimit(t, soon, func(t testing.TB, limit time.Duration) {
		r, asked, now := behindDead(t, limit)
		r.ask(t, "udp", question("first.example.", dns.TypeA))
		now.add(deadTime)
		var all sync.WaitGroup
		for i := range 20 {
			all.Go(func() { r.ask(t, "udp", question(fmt.Sprintf("%d.example.", i), dns.TypeA)) })
		}
		all.Wait()
		if got := asked.Load(); got != 2 {
			t.Errorf("the dead server was queried %d times, want 2", got)
		}
	})
}

func TestAServerThatFailsForSomeNamesDoesNotFillTheLog(t *testing.T) {
	nettest.UnderLimit(t, soon, func(t testing.TB, limit time.Duration) {
		server := packets(t, func(query []byte) [][]byte {
			if m, _ := parse(query); m.name()[0] == 1 { // a name whose first label is one letter
				return nil
			}
			return [][]byte{address(query)}
		})
		var log bytes.Buffer
		now := &clock{at: time.Now()}
		r := prepare(t, addrs(server), func(c *Config) {
			c.Timeout = limit
			c.Log = slog.New(slog.NewTextHandler(&log, nil))
		})
		r.now = now.now
		r.Start()
		for _, want := range []int{1, 1, 2} { // lines of each kind
			for _, name := range []string{"a.example.", "some.example.", "b.example.", "more.example."} {
				r.ask(t, "udp", question(name, dns.TypeA))
			}
			if silent, again := strings.Count(log.String(), "does not answer"), strings.Count(log.String(), "answers again"); silent != want || again != want {
				t.Errorf("%d lines report that the server does not answer, %d that it answers again, want %d:\n%s", silent, again, want, &log)
			}
			now.add(logInterval / 2)
		}
	})
}

func TestZoneTransfersAreRefused(t *testing.T) {
	r := serve(t, addrs(standing(t, fixed())))
	for _, kind := range []uint16{dns.TypeAXFR, dns.TypeIXFR} {
		if m := r.ask(t, "tcp", question("example.", kind)); m.Rcode != dns.RcodeNotImplemented {
			t.Errorf("%s:\n%v", dns.TypeToString[kind], m)
		}
	}
}

func TestMalformedQueriesAreAnsweredFORMERR(t *testing.T) {
	good := pack(t, question("example.", dns.TypeA))
	twoOPTs := question("example.", dns.TypeA).SetEdns0(1232, false)
	twoOPTs.Extra = append(twoOPTs.Extra, twoOPTs.Extra[0])
	with := func(at int, b byte) []byte { raw := slices.Clone(good); raw[at] = b; return raw }
	r := serve(t, addrs(standing(t, fixed())))
	for _, c := range []struct {
		name string
		raw  []byte
	}{
		{"no question", append(with(5, 0)[:12:12], good[12:]...)},
		{"a header alone", good[:12]},
		{"two questions", append(with(5, 2), good[12:]...)},
		{"a missing record", with(7, 1)},
		{"cut short", good[:len(good)-1]},
		{"bytes after the end", append(slices.Clone(good), 0)},
		{"a name that points at itself", append(slices.Clone(good[:12]), 0xc0, 12, 0, 1, 0, 1)},
		{"a name without an end", append(slices.Clone(good[:12]), bytes.Repeat([]byte("\x07example"), 40)...)},
		{"a name of 257 bytes", slices.Concat(good[:12], bytes.Repeat([]byte("\x07example"), 32), []byte{0, 0, 1, 0, 1})},
		{"an unknown kind of label", with(12, 0x40)},
		{"two OPTs", pack(t, twoOPTs)},
		{"a record that points at itself", slices.Concat(with(11, 1), []byte{0xc0, byte(len(good)), 0, 1, 0, 1, 0, 0, 0, 0, 0, 0})},
		{"an OPT that has a name", slices.Concat(with(11, 1), []byte{0xc0, 12, 0, 41, 4, 0, 0, 0, 0, 0, 0, 0})},
		{"far too long", append(slices.Clone(good), make([]byte, maxQuery)...)},
	} {
		before := r.Stats.Malformed.Load()
		answer := r.send(t, c.raw)
		m := new(dns.Msg)
		if err := m.Unpack(answer); err != nil || m.Rcode != dns.RcodeFormatError || !m.Response || !bytes.Equal(answer[:2], c.raw[:2]) {
			t.Errorf("%s: %v\n%v", c.name, err, m)
		}
		if r.Stats.Malformed.Load() != before+1 {
			t.Errorf("%s is not counted", c.name)
		}
	}
	// A packet that cannot be a query is not answered: the first answer is that of the next query.
	conn, err := net.Dial("udp", r.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(nettest.Patience))
	for _, raw := range [][]byte{{}, good[:1], good[:11], with(2, 0x81), good} {
		if _, err := conn.Write(raw); err != nil {
			t.Fatal(err)
		}
	}
	buf := make([]byte, 512)
	if n, err := conn.Read(buf); err != nil || buf[3]&0xf != 0 || n < len(good) {
		t.Errorf("the first answer is % x, %v", buf[:n], err)
	}
	nettest.Eventually(t, "four dropped packets", func() bool { return r.Stats.Dropped.Load() == 4 })
}
