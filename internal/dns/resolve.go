package dns

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"strconv"
	"time"

	"github.com/miekg/dns"
)

// query is what downstream asks.
type query struct {
	message
	// joinKey is the same for queries that one answer serves: flags, what EDNS asks for, type, class, and the name as it
	// is spelt. It is empty for what goes alone and as it is: updates, notifications, and whatever brings records, such as
	// a signature over the message.
	joinKey string
	// cacheKey is joinKey with the name in lower case; empty when the answer depends on more, such as a client subnet.
	cacheKey string
}

// reply is an answer whose ID is not set yet. It is shared and never changed: fit makes each downstream its copy.
type reply struct {
	raw      []byte
	upstream netip.AddrPort
}

// flight is a query that is under way. reply may be read when done is closed.
type flight struct {
	done  chan struct{}
	reply reply
}

// answer returns the answer to what downstream sent, behind two bytes that are free for TCP's length, or nil when it
// was no query. limit is what the transport takes; over UDP, what EDNS says counts as well.
func (s *Server) answer(raw []byte, transport string, limit int) []byte {
	start := s.now()
	if len(raw) < headerSize || raw[2]&bitQR != 0 {
		s.Stats.Dropped.Add(1)
		return nil
	}
	if s.Stats.InFlight.Add(1) > int64(s.MaxInFlight) {
		s.Stats.InFlight.Add(-1)
		s.Stats.Overloaded.Add(1)
		q, _ := parse(raw)
		return s.deliver(&q, reply{raw: failure(&q, dns.RcodeServerFailure)}, transport, limit, Query{}, start)
	}
	defer s.Stats.InFlight.Add(-1)

	m, err := parse(raw)
	if err != nil || len(m.question) == 0 || len(m.raw) != len(raw) {
		s.Stats.Malformed.Add(1)
		bad := message{raw: raw} // nothing of it is repeated but the header
		return s.deliver(&bad, reply{raw: failure(&bad, dns.RcodeFormatError)}, transport, limit, Query{}, start)
	}
	q := newQuery(m)
	r, how := s.resolve(q)
	return s.deliver(&q.message, r, transport, limit, how, start)
}

func newQuery(m message) *query {
	q := &query{message: m}
	if m.opcode() != dns.OpcodeQuery || m.extra {
		return q
	}
	name, tail := m.name(), m.question[len(m.name()):]
	key := make([]byte, 0, 96)
	key = append(key, m.raw[2], m.raw[3])
	key = append(key, tail...)
	plain := true
	if m.edns() {
		ttl, options := m.ttl(m.opt), m.data(m.opt)
		plain = len(options) == 0 && bytes.Equal([]byte{0, 0, ttl[2] & 0x80, 0}, ttl)
		key = append(append(key, 'E'), ttl...)
		key = binary.BigEndian.AppendUint16(key, uint16(len(options)))
		key = append(key, options...)
	} else {
		key = append(key, '-')
	}
	known := len(key)
	key = append(key, name...)
	q.joinKey = string(key)
	if plain {
		for i := known; i < len(key); i++ {
			key[i] = lower(key[i])
		}
		q.cacheKey = string(key)
	}
	return q
}

// resolve finds q's answer: in the cache, from the same query under way, or from an upstream.
func (s *Server) resolve(q *query) (reply, Query) {
	if kind := q.kind(); q.opcode() == dns.OpcodeQuery && (kind == dns.TypeAXFR || kind == dns.TypeIXFR) {
		// A transfer is many messages; its first alone would pass for the whole zone.
		return reply{raw: failure(&q.message, dns.RcodeNotImplemented)}, Query{}
	}
	if raw := s.cache.get(q, s.now()); raw != nil {
		s.Stats.Cached.Add(1)
		return reply{raw: raw}, Query{Cached: true}
	}
	if q.joinKey == "" {
		r := s.ask(q)
		return r, Query{Upstream: r.upstream}
	}
	s.flightsMu.Lock()
	if under := s.flights[q.joinKey]; under != nil {
		s.flightsMu.Unlock()
		<-under.done
		s.Stats.Joined.Add(1)
		return under.reply, Query{Upstream: under.reply.upstream, Joined: true}
	}
	own := &flight{done: make(chan struct{})}
	s.flights[q.joinKey] = own
	s.flightsMu.Unlock()

	own.reply = s.ask(q)
	s.cache.put(q, own.reply.raw, s.now())
	s.flightsMu.Lock()
	delete(s.flights, q.joinKey)
	s.flightsMu.Unlock()
	close(own.done)
	return own.reply, Query{Upstream: own.reply.upstream}
}

// deliver makes downstream's own copy of r, and counts and tells it. A query without a question is not told.
func (s *Server) deliver(q *message, r reply, transport string, limit int, how Query, start time.Time) []byte {
	if transport == "udp" {
		limit = min(limit, q.udpSize())
	}
	m, err := parse(r.raw)
	if err != nil || transport == "tcp" && m.truncated() {
		// Only what upstream truncated and then refused to give over TCP comes here; TC means nothing over TCP.
		m, _ = parse(failure(q, dns.RcodeServerFailure))
	}
	out, cut := m.fit(limit)
	copy(out[2:4], q.raw)
	if cut {
		s.Stats.Truncated.Add(1)
	}
	s.Stats.Answers[m.rcode()].Add(1)
	if s.Sink == nil || len(q.question) == 0 {
		return out
	}
	how.Transport, how.Truncated, how.Duration = transport, cut || m.truncated(), s.now().Sub(start)
	how.Name, _, _ = dns.UnpackDomainName(q.name(), 0)
	how.Type = dns.Type(q.kind()).String()
	how.Rcode = dns.RcodeToString[m.rcode()]
	if how.Rcode == "" {
		how.Rcode = "RCODE" + strconv.Itoa(m.rcode())
	}
	s.Sink(how)
	return out
}
