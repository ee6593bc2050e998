package metrics

import (
	"strconv"

	"github.com/pillion-proxy/pillion/internal/dns"
)

// rcodes are the names of DNS response codes (RFC 6895 §2.3). The others stand as numbers.
var rcodes = [16]string{0: "NOERROR", 1: "FORMERR", 2: "SERVFAIL", 3: "NXDOMAIN", 4: "NOTIMP", 5: "REFUSED"}

// resolver shows what the resolver counts.
func (f *families) resolver(s *dns.Stats) {
	queries := f.counter("pillion_dns_queries_total", "Queries that came, by transport.")
	queries.counts(uint64(s.UDPQueries.Load()), label("transport", "udp"))
	queries.counts(uint64(s.TCPQueries.Load()), label("transport", "tcp"))
	answers := f.counter("pillion_dns_answers_total", "Answers, by response code.")
	for code := range s.Answers {
		name := rcodes[code]
		if n := s.Answers[code].Load(); n > 0 || name != "" {
			if name == "" {
				name = strconv.Itoa(code)
			}
			answers.counts(uint64(n), label("rcode", name))
		}
	}
	f.counter("pillion_dns_cached_answers_total", "Answers from the cache.").counts(uint64(s.Cached.Load()))
	f.counter("pillion_dns_joined_queries_total", "Queries whose answer was under way already.").counts(uint64(s.Joined.Load()))
	f.counter("pillion_dns_truncated_answers_total", "Answers that did not fit.").counts(uint64(s.Truncated.Load()))
	f.counter("pillion_dns_overloaded_queries_total", "Queries above the limit, answered SERVFAIL.").counts(uint64(s.Overloaded.Load()))
	f.counter("pillion_dns_unanswered_queries_total", "Queries that no upstream answered, answered SERVFAIL.").counts(uint64(s.Unanswered.Load()))
	f.counter("pillion_dns_malformed_queries_total", "Queries that could not be read, answered FORMERR.").counts(uint64(s.Malformed.Load()))
	f.counter("pillion_dns_dropped_packets_total", "What was no query at all.").counts(uint64(s.Dropped.Load()))
	upstream := f.counter("pillion_dns_upstream_queries_total", "Queries to upstreams, by transport.")
	overTCP := s.UpstreamTCP.Load()
	upstream.counts(uint64(s.UpstreamQueries.Load()-overTCP), label("transport", "udp"))
	upstream.counts(uint64(overTCP), label("transport", "tcp"))
	f.counter("pillion_dns_upstream_failures_total", "Tries that brought no answer.").counts(uint64(s.UpstreamFailures.Load()))
	f.counter("pillion_dns_upstream_strays_total", "Packets with a wrong ID or question.").counts(uint64(s.UpstreamStrays.Load()))
	f.gauge("pillion_dns_queries_open", "Queries that wait for their answer.").is(float64(s.InFlight.Load()))
	f.gauge("pillion_dns_connections", "TCP connections that are open.").is(float64(s.TCPConns.Load()))
	f.gauge("pillion_dns_cache_entries", "Answers in the cache.").is(float64(s.CacheEntries.Load()))
	f.gauge("pillion_dns_cache_bytes", "Bytes of the answers in the cache.").is(float64(s.CacheBytes.Load()))
}
