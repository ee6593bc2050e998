package dns

import (
	"fmt"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// counting counts the queries that reach an upstream.
func counting(asked *atomic.Int32, handler func(dns.ResponseWriter, *dns.Msg)) func(dns.ResponseWriter, *dns.Msg) {
	return func(w dns.ResponseWriter, r *dns.Msg) {
		asked.Add(1)
		handler(w, r)
	}
}

// caching is a resolver with a cache and a clock of its own.
func caching(t *testing.T, asked *atomic.Int32, handler func(dns.ResponseWriter, *dns.Msg)) (*resolver, *clock) {
	t.Helper()
	r := prepare(t, addrs(standing(t, counting(asked, handler))), func(c *Config) { c.CacheSize = 100 })
	now := &clock{at: time.Now()}
	r.now = now.now
	r.Start()
	return r, now
}

func TestAnswersAreCachedForTheirTTL(t *testing.T) {
	const soa = "example. %d SOA ns.example. root.example. 1 2 3 4 %d"
	negative := func(rcode int, ttl, minimum int, answer ...string) func(dns.ResponseWriter, *dns.Msg) {
		return func(w dns.ResponseWriter, r *dns.Msg) {
			m := answered(r, answer...)
			m.Rcode = rcode
			m.Ns = answered(r, fmt.Sprintf(soa, ttl, minimum)).Answer
			_ = w.WriteMsg(m)
		}
	}
	for _, c := range []struct {
		name    string
		handler func(dns.ResponseWriter, *dns.Msg)
		want    time.Duration
	}{
		{"its TTL", fixed("a.example. 20 A 192.0.2.1"), 20 * time.Second},
		{"the least TTL", fixed("a.example. 90 CNAME b.example.", "b.example. 7 A 192.0.2.1", "b.example. 20 A 192.0.2.2"), 7 * time.Second},
		{"not for days", fixed("a.example. 86400 A 192.0.2.1"), maxPositive},
		{"no TTL", fixed("a.example. 0 A 192.0.2.1"), 0},
		{"a negative TTL", fixed("a.example. 2147483649 A 192.0.2.1"), 0},
		{"no such name, SOA's TTL", negative(dns.RcodeNameError, 5, 20), 5 * time.Second},
		{"no such name, SOA's minimum", negative(dns.RcodeNameError, 20, 6), 6 * time.Second},
		{"no such name, not for long", negative(dns.RcodeNameError, 3600, 3600), maxNegative},
		{"no such record", negative(dns.RcodeSuccess, 9, 9), 9 * time.Second},
		{"no such record behind an alias", negative(dns.RcodeSuccess, 99, 99, "a.example. 8 CNAME b.example."), 8 * time.Second},
		{"records and a SOA", negative(dns.RcodeSuccess, 99, 1, "a.example. 40 A 192.0.2.1"), 40 * time.Second},
		{"no such name, no SOA", coded(dns.RcodeNameError), 0},
		{"an alias alone", fixed("a.example. 90 CNAME b.example."), 0},
		{"no record, no SOA", fixed(), 0},
		{"SERVFAIL", negative(dns.RcodeServerFailure, 9, 9), 0},
		{"REFUSED", coded(dns.RcodeRefused), 0},
		{"large", func(w dns.ResponseWriter, r *dns.Msg) { big(maxCached)(w, r) }, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			var asked atomic.Int32
			r, now := caching(t, &asked, c.handler)
			q := question("a.example.", dns.TypeA)
			ask := func(later time.Duration, want int32) {
				t.Helper()
				now.add(later)
				asked.Store(0)
				if r.ask(t, "tcp", q); asked.Load() != want {
					t.Errorf("%v later, upstream is queried %d times, want %d", later, asked.Load(), want)
				}
			}
			r.ask(t, "tcp", q)
			if c.want > 0 {
				ask(c.want-1, 0)
				ask(1, 1)
			} else {
				asked.Store(0)
				if r.ask(t, "tcp", q); asked.Load() == 0 {
					t.Error("the answer is cached")
				}
			}
		})
	}
}

func TestCachedAnswersDifferOnlyInTheirTTL(t *testing.T) {
	var asked atomic.Int32
	r, now := caching(t, &asked, func(w dns.ResponseWriter, r *dns.Msg) {
		m := answered(r, r.Question[0].Name+" 60 A 192.0.2.2", r.Question[0].Name+" 50 A 192.0.2.1")
		m.Compress = true
		m.Extra = answered(r, "extra.example. 70 TXT x").Answer
		if r.IsEdns0() != nil {
			m.SetEdns0(1400, r.IsEdns0().Do())
		}
		_ = w.WriteMsg(m)
	})
	for _, q := range []*dns.Msg{question("Name.Example.", dns.TypeA), question("Name.Example.", dns.TypeA).SetEdns0(1232, true)} {
		asked.Store(0)
		first := r.ask(t, "udp", q)
		now.add(12500 * time.Millisecond)
		q = q.Copy()
		q.Id++
		q.Question[0].Name = "nAME.eXAMPLE."
		second := r.ask(t, "udp", q)
		if asked.Load() != 1 {
			t.Fatalf("upstream was queried %d times", asked.Load())
		}
		first.Id++
		for _, rr := range append(first.Answer, first.Extra...) {
			if rr.Header().Rrtype != dns.TypeOPT {
				rr.Header().Ttl -= 12
			}
		}
		want := strings.ReplaceAll(first.String(), "Name.Example.", "nAME.eXAMPLE.")
		if second.String() != want {
			t.Errorf("first\n%v\nthen\n%v", want, second)
		}
		now.add(time.Hour)
	}
}

func TestQueriesThatDifferDoNotShareAnAnswer(t *testing.T) {
	base := func() *dns.Msg { return question("example.", dns.TypeA) }
	change := func(c func(*dns.Msg)) *dns.Msg { q := base(); c(q); return q }
	cookie := withOPT(base(), 1232, &dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "0123456789abcdef"})
	subnet := withOPT(base(), 1232, &dns.EDNS0_SUBNET{Code: dns.EDNS0SUBNET, Family: 1, SourceNetmask: 24, Address: net.IPv4(192, 0, 2, 0).To4()})
	var asked atomic.Int32
	r, _ := caching(t, &asked, func(w dns.ResponseWriter, r *dns.Msg) {
		m := answered(r)
		m.Answer = []dns.RR{&dns.RFC3597{
			Hdr:   dns.RR_Header{Name: r.Question[0].Name, Rrtype: r.Question[0].Qtype, Class: r.Question[0].Qclass, Ttl: 60},
			Rdata: "c0000201",
		}}
		_ = w.WriteMsg(m)
	})
	for _, c := range []struct {
		name string
		q    *dns.Msg
		kept bool
	}{
		{"base", base(), true},
		{"name", question("example.org.", dns.TypeA), true},
		{"type", question("example.", 0xff61), true}, // ends in the letter a
		{"type in upper case", question("example.", 0xff41), true},
		{"class", change(func(q *dns.Msg) { q.Question[0].Qclass = dns.ClassCHAOS }), true},
		{"RD", change(func(q *dns.Msg) { q.RecursionDesired = false }), true},
		{"CD", change(func(q *dns.Msg) { q.CheckingDisabled = true }), true},
		{"AD", change(func(q *dns.Msg) { q.AuthenticatedData = true }), true},
		{"EDNS", withOPT(base(), 1232), true},
		{"DO", base().SetEdns0(1232, true), true},
		{"another version of EDNS", change(func(q *dns.Msg) { q.SetEdns0(1232, false).IsEdns0().SetVersion(1) }), false},
		{"cookie", cookie, false},
		{"client subnet", subnet, false},
		{"a record", change(func(q *dns.Msg) { q.Extra = answered(base(), "x. 1 A 192.0.2.1").Answer }), false},
	} {
		for time, want := range []bool{true, !c.kept} {
			asked.Store(0)
			r.ask(t, "udp", c.q)
			if got := asked.Load() == 1; got != want {
				t.Errorf("%s, time %d: upstream is queried: %t, want %t", c.name, time, got, want)
			}
		}
	}
}

func TestAnAnswerInAnotherCaseIsNotCached(t *testing.T) {
	var asked atomic.Int32
	r, _ := caching(t, &asked, func(w dns.ResponseWriter, r *dns.Msg) {
		r.Question[0].Name = strings.ToLower(r.Question[0].Name)
		fixed(r.Question[0].Name+" 60 A 192.0.2.1")(w, r)
	})
	for range 2 {
		sent := pack(t, question("ExAmPlE.", dns.TypeA))
		answer := r.send(t, sent)
		// Downstream may have chosen its case as a secret (0x20), so it gets the question as it was returned.
		if got := string(answer[13:20]); got != "example" {
			t.Errorf("the question comes back as %q", got)
		}
	}
	if asked.Load() != 2 {
		t.Errorf("upstream was queried %d times", asked.Load())
	}
}

func TestTruncatedAnswersAreNotCached(t *testing.T) {
	var asked atomic.Int32
	server := packets(t, func(query []byte) [][]byte {
		asked.Add(1)
		answer := address(query)
		answer[2] |= bitTC
		return [][]byte{answer}
	})
	r := serve(t, addrs(server), func(c *Config) { c.CacheSize = 10 })
	for range 2 {
		r.ask(t, "udp", question("example.", dns.TypeA))
	}
	if r.Stats.CacheEntries.Load() != 0 || r.Stats.Cached.Load() != 0 {
		t.Error("the answer is cached")
	}
}

func TestACacheSizeOfZeroTurnsTheCacheOff(t *testing.T) {
	var asked atomic.Int32
	r := serve(t, addrs(standing(t, counting(&asked, fixed("example. 60 A 192.0.2.1")))))
	for range 2 {
		r.ask(t, "udp", question("example.", dns.TypeA))
	}
	if asked.Load() != 2 {
		t.Errorf("upstream was queried %d times", asked.Load())
	}
}

func TestTheCacheIsBoundedInEntriesAndBytes(t *testing.T) {
	for _, c := range []struct {
		name    string
		data    int
		entries int64 // cached at the end
	}{{"small", 4, 10}, {"large", 3000, 3}} {
		var stats Stats
		cache := newCache(10, &stats)
		now := time.Now()
		key := func(i int) *query {
			m, err := parse(pack(t, question(fmt.Sprintf("%02d.example.", i), dns.TypeNULL)))
			if err != nil {
				t.Fatal(err)
			}
			return newQuery(m)
		}
		for i := range 30 {
			q := new(dns.Msg)
			if err := q.Unpack(key(i).raw); err != nil {
				t.Fatal(err)
			}
			m := answered(q)
			m.Answer = []dns.RR{&dns.NULL{
				Hdr:  dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeNULL, Class: dns.ClassINET, Ttl: 60},
				Data: strings.Repeat("x", c.data),
			}}
			for range 2 { // the second replaces the first
				cache.put(key(i), pack(t, m), now)
			}
			cache.get(key(0), now) // so that it is never the least recently used
		}
		if got := stats.CacheEntries.Load(); got != c.entries || stats.CacheBytes.Load() > 10*bytesPerEntry {
			t.Errorf("%s: %d entries with %d bytes", c.name, got, stats.CacheBytes.Load())
		}
		if cache.get(key(0), now) == nil || cache.get(key(29), now) == nil || cache.get(key(20), now) != nil && c.data > 4 {
			t.Errorf("%s: the cache does not hold the most recently used answers", c.name)
		}
		for i := range 30 {
			cache.get(key(i), now.Add(time.Minute))
		}
		if stats.CacheEntries.Load() != 0 || stats.CacheBytes.Load() != 0 || cache.bytes != 0 {
			t.Errorf("%s: %d entries with %d bytes are left after their TTL", c.name, stats.CacheEntries.Load(), cache.bytes)
		}
	}
}
