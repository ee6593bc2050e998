package dns

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"time"
)

// query is a query of downstream.
type query struct {
	message
	// joinKey is equal for queries that can share an answer: flags, EDNS flags and options, type, class, and the name in
	// its spelling. It is empty for messages that are forwarded unchanged and unshared: updates, notifications, and
	// queries with records, such as a signature of the message.
	joinKey string
	// cacheKey is joinKey with the name in lower case. It is empty if the answer depends on more, such as a client subnet.
	cacheKey string
}

// reply is an answer whose ID is not set yet. It is shared and never modified: fit makes a copy for each downstream.
type reply struct {
	raw      []byte
	upstream netip.AddrPort
}

// flight is a query in progress. reply may be read when done is closed.
type flight struct {
	done  chan struct{}
	reply reply
}

// answer returns the answer to a message of downstream, after two bytes that are free for TCP's length. It returns nil if
// the message is not a query. limit is the transport's limit in bytes; over UDP that of EDNS applies as well.
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
		return s.deliver(&q, reply{raw: failure(&q, rcodeServerFailure)}, transport, limit, Query{}, start)
	}
	defer s.Stats.InFlight.Add(-1)

	m, err := parse(raw)
	if err != nil || len(m.question) == 0 || len(m.raw) != len(raw) {
		s.Stats.Malformed.Add(1)
		bad := message{raw: raw} // only the header is repeated
		return s.deliver(&bad, reply{raw: failure(&bad, rcodeFormatError)}, transport, limit, Query{}, start)
	}
	if s.Refuse != nil && s.Refuse(m.text()) {
		return s.deliver(&m, reply{raw: failure(&m, rcodeRefused)}, transport, limit, Query{Refused: true}, start)
	}
	if r, report, ok := s.known(&m); ok {
		return s.deliver(&m, r, transport, limit, report, start)
	}
	q := newQuery(m)
	r, report := s.resolve(q)
	return s.deliver(&q.message, r, transport, limit, report, start)
}

// known returns the answer that needs no upstream: from the control plane's names, or SERVFAIL while they are awaited. An
// upstream could answer that a name does not exist, and the workload would remember that.
func (s *Server) known(m *message) (reply, Query, bool) {
	names := s.names.Load()
	if names == nil {
		if !s.AwaitNames {
			return reply{}, Query{}, false
		}
		s.Stats.Early.Add(1)
		return reply{raw: failure(m, rcodeServerFailure)}, Query{}, true
	}
	raw := names.answer(m)
	if raw == nil {
		return reply{}, Query{}, false
	}
	s.Stats.Named.Add(1)
	return reply{raw: raw}, Query{Named: true}, true
}

func newQuery(m message) *query {
	q := &query{message: m}
	if m.opcode() != opcodeQuery || m.extra {
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

// resolve finds the answer to q: in the cache, from an identical query in progress, or from an upstream.
func (s *Server) resolve(q *query) (reply, Query) {
	if kind := q.kind(); q.opcode() == opcodeQuery && (kind == typeAXFR || kind == typeIXFR) {
		// A transfer consists of many messages. The first alone would be mistaken for the whole zone.
		return reply{raw: failure(&q.message, rcodeNotImplemented)}, Query{}
	}
	if raw := s.cache.get(q, s.now()); raw != nil {
		s.Stats.Cached.Add(1)
		return reply{raw: raw}, Query{Cached: true}
	}
	if q.joinKey == "" {
		r := s.forward(s.queries, q)
		return r, Query{Upstream: r.upstream}
	}
	s.flightsMu.Lock()
	if other := s.flights[q.joinKey]; other != nil {
		s.flightsMu.Unlock()
		<-other.done
		s.Stats.Joined.Add(1)
		return other.reply, Query{Upstream: other.reply.upstream, Joined: true}
	}
	own := &flight{done: make(chan struct{})}
	s.flights[q.joinKey] = own
	s.flightsMu.Unlock()

	own.reply = s.forward(s.queries, q)
	s.cache.put(q, own.reply.raw, s.now())
	s.flightsMu.Lock()
	delete(s.flights, q.joinKey)
	s.flightsMu.Unlock()
	close(own.done)
	return own.reply, Query{Upstream: own.reply.upstream}
}

// deliver makes downstream's own copy of r, counts it, and reports it to the Sink unless the query has no question. report
// has the fields that resolve has set.
func (s *Server) deliver(q *message, r reply, transport string, limit int, report Query, start time.Time) []byte {
	if transport == "udp" {
		limit = min(limit, q.udpSize())
	}
	m, err := parse(r.raw)
	if err != nil || transport == "tcp" && m.truncated() {
		// The upstream truncated the answer and did not answer over TCP. TC has no meaning over TCP.
		m, _ = parse(failure(q, rcodeServerFailure))
	}
	out, cut := m.fit(limit)
	copy(out[2:4], q.raw)
	if cut {
		s.Stats.Truncated.Add(1)
	}
	s.Stats.Answers[m.rcode()].Add(1)
	if s.Learn != nil && m.rcode() == rcodeSuccess && len(q.question) > 0 {
		s.Learn(q.text(), m.hosts())
	}
	if s.Sink == nil || len(q.question) == 0 {
		return out
	}
	report.Transport, report.Truncated, report.Duration = transport, cut || m.truncated(), s.now().Sub(start)
	report.Name = q.text()
	report.Type, report.Rcode = typeName(q.kind()), rcodeName(m.rcode())
	s.Sink(report)
	return out
}
