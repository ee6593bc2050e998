package metrics

import (
	"strconv"

	"github.com/pillion-proxy/pillion/internal/dns"
)

// rcodes are names of DNS response codes (RFC 6895 §2.3). Codes without a name here are shown as numbers.
var rcodes = [16]string{0: "NOERROR", 1: "FORMERR", 2: "SERVFAIL", 3: "NXDOMAIN", 4: "NOTIMP", 5: "REFUSED"}

// resolver adds the metrics of the DNS resolver.
func (f *families) resolver(s *dns.Stats) {
	queries := f.counter("pillion_dns_queries_total", "Received queries, by transport.")
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
	f.counter("pillion_dns_cached_answers_total", "Answers served from the cache.").counts(uint64(s.Cached.Load()))
	f.counter("pillion_dns_joined_queries_total", "Queries that joined an identical one in progress.").counts(uint64(s.Joined.Load()))
	f.counter("pillion_dns_mesh_answers_total", "Answers from the control plane's names.").counts(uint64(s.Named.Load()))
	f.counter("pillion_dns_early_queries_total", "Queries before the control plane's names arrived, answered SERVFAIL.").counts(uint64(s.Early.Load()))
	f.counter("pillion_dns_truncated_answers_total", "Answers truncated to the size limit of UDP.").counts(uint64(s.Truncated.Load()))
	f.counter("pillion_dns_overloaded_queries_total", "Queries that exceeded the limit and were answered SERVFAIL.").counts(uint64(s.Overloaded.Load()))
	f.counter("pillion_dns_loops_total", "Queries of the resolver that the rules sent back to it, answered SERVFAIL.").counts(uint64(s.Loops.Load()))
	f.counter("pillion_dns_receive_drops_total", "Queries that the kernel dropped because the resolver's receive buffer was full.").counts(uint64(s.ReceiveDrops.Load()))
	f.counter("pillion_dns_unanswered_queries_total", "Queries answered SERVFAIL because no upstream server answered.").counts(uint64(s.Unanswered.Load()))
	f.counter("pillion_dns_malformed_queries_total", "Malformed queries, answered FORMERR.").counts(uint64(s.Malformed.Load()))
	f.counter("pillion_dns_dropped_packets_total", "Dropped packets that are not queries.").counts(uint64(s.Dropped.Load()))
	upstream := f.counter("pillion_dns_upstream_queries_total", "Queries sent to upstream servers, by transport.")
	overTCP := s.UpstreamTCP.Load()
	upstream.counts(uint64(s.UpstreamQueries.Load()-overTCP), label("transport", "udp"))
	upstream.counts(uint64(overTCP), label("transport", "tcp"))
	f.counter("pillion_dns_upstream_failures_total", "Upstream queries without an answer.").counts(uint64(s.UpstreamFailures.Load()))
	f.counter("pillion_dns_upstream_strays_total", "Upstream packets with a wrong ID or question.").counts(uint64(s.UpstreamStrays.Load()))
	f.gauge("pillion_dns_queries_open", "Queries waiting for an answer.").is(float64(s.InFlight.Load()))
	f.gauge("pillion_dns_connections", "Open TCP connections of clients.").is(float64(s.TCPConns.Load()))
	f.gauge("pillion_dns_mesh_hosts", "Hosts of the control plane that are answered.").is(float64(s.Hosts.Load()))
	f.gauge("pillion_dns_cache_entries", "Cached answers.").is(float64(s.CacheEntries.Load()))
	f.gauge("pillion_dns_cache_bytes", "Bytes of cached answers.").is(float64(s.CacheBytes.Load()))
}
