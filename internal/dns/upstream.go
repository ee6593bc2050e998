package dns

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	// deadTime is how long an upstream that did not answer is queried after all others.
	deadTime = 10 * time.Second
	// logInterval limits how often an unresponsive upstream is logged. An upstream that answers for some names only would
	// otherwise be logged for each of the others.
	logInterval = time.Minute
	// maxStrays is how many packets with a wrong ID or question are skipped while waiting for the answer. More of them look
	// like an attempt to guess the ID, and then the query goes over TCP.
	maxStrays = 16
	// wholePacket is the UDP payload that fits into one packet on every path. Longer queries go over TCP, and longer
	// answers are requested over TCP: fragments get lost, and since ID and port protect only the first fragment, the others
	// can be forged (RFC 9715).
	wholePacket = 1232
)

// upstream is a server to which queries are forwarded.
type upstream struct {
	addr netip.AddrPort
	dead atomic.Int64 // end of the time as dead, in Unix nanoseconds; zero while it answers

	logged  atomic.Int64 // time of the last log line about a missing answer, in Unix nanoseconds
	logDead atomic.Bool  // the last log line about it reports that it does not answer
}

// forward sends q to the upstreams in turn, as a stub resolver does: to the next one if there is no answer, or if its code
// means that the server cannot answer. If all fail like this, the last answer is returned, or SERVFAIL without an answer.
// No server is blamed for a query that parent ends.
func (s *Server) forward(parent context.Context, q *query) reply {
	ctx, cancel := context.WithTimeout(parent, budget*s.Timeout)
	defer cancel()
	var last reply
	answered := make(map[*upstream]bool)
	for round := range rounds {
		for _, u := range s.inOrder() {
			if answered[u] || ctx.Err() != nil {
				continue
			}
			raw, err := s.try(ctx, u, q, round == 0)
			if raw != nil {
				last = reply{raw: s.adapt(q, raw), upstream: u.addr}
			}
			if err != nil {
				s.Stats.UpstreamFailures.Add(1)
				if raw == nil && parent.Err() == nil && !noDescriptors(err) {
					s.failed(u, err)
				}
				continue
			}
			s.worked(u)
			answered[u] = true
			switch raw[3] & 0xf {
			case rcodeServerFailure, rcodeRefused, rcodeNotImplemented:
			default:
				return last
			}
		}
	}
	if last.raw == nil {
		s.Stats.Unanswered.Add(1)
		last.raw = failure(&q.message, rcodeServerFailure)
	}
	return last
}

// inOrder lists the upstreams, those that failed within deadTime last. When deadTime has passed, one query tries such an
// upstream again, and the others do not wait for its result.
func (s *Server) inOrder() []*upstream {
	now := s.now().UnixNano()
	order := make([]*upstream, 0, len(s.upstreams))
	var dead []*upstream
	for _, u := range s.upstreams {
		until := u.dead.Load()
		if until == 0 || until <= now && u.dead.CompareAndSwap(until, now+int64(deadTime)) {
			order = append(order, u)
		} else {
			dead = append(dead, u)
		}
	}
	return append(order, dead...)
}

func (s *Server) failed(u *upstream, err error) {
	now := s.now()
	u.dead.Store(now.Add(deadTime).UnixNano())
	logged := u.logged.Load()
	if now.UnixNano()-logged >= int64(logInterval) && !u.logDead.Load() && u.logged.CompareAndSwap(logged, now.UnixNano()) {
		u.logDead.Store(true)
		s.Log.Warn("dns: upstream server does not answer, trying others first", "upstream", u.addr.String(), "error", err)
	}
}

// noDescriptors reports whether a try failed because this process has no descriptors left. The server is not to blame then.
func noDescriptors(err error) bool {
	return errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE)
}

func (s *Server) worked(u *upstream) {
	if u.dead.Load() != 0 && u.dead.Swap(0) != 0 && u.logDead.Swap(false) {
		s.Log.Info("dns: upstream server answers again", "upstream", u.addr.String())
	}
}

// try queries one upstream, over UDP and, if the answer is truncated, over TCP. If TCP then fails, it returns both the
// truncated answer and the error. With extend, a query without EDNS gets an OPT, so that most large answers fit into UDP.
// Without extend, the query is sent as downstream sent it: on some paths queries with an OPT or their answers are lost.
func (s *Server) try(ctx context.Context, u *upstream, q *query, extend bool) ([]byte, error) {
	wire := bytes.Clone(q.raw)
	added := extend && !q.edns() && q.joinKey != "" // without a joinKey the message must not change
	if added {
		wire = appendOPT(wire, wholePacket, make([]byte, 4))
	}
	raw, err := s.exchange(ctx, u, wire)
	if err == nil && added && raw[3]&0xf == rcodeFormatError {
		// A server without EDNS (RFC 6891 §7).
		return s.exchange(ctx, u, bytes.Clone(q.raw))
	}
	return raw, err
}

// exchange sends wire with a random ID, and returns a well-formed answer that matches the question.
func (s *Server) exchange(ctx context.Context, u *upstream, wire []byte) ([]byte, error) {
	var truncated []byte
	if len(wire) <= wholePacket {
		raw, err := s.over(ctx, "udp", u, wire, exchangeUDP)
		if err != nil && !errors.Is(err, errStrays) {
			return nil, err
		}
		if err == nil && raw[2]&bitTC == 0 {
			return raw, nil
		}
		truncated = raw
	}
	s.Stats.UpstreamTCP.Add(1)
	raw, err := s.over(ctx, "tcp", u, wire, exchangeTCP)
	if err != nil {
		return truncated, err
	}
	return raw, nil
}

// over opens a socket for one exchange. It ends after Timeout, or with ctx.
func (s *Server) over(ctx context.Context, network string, u *upstream, wire []byte, exchange func(*Server, net.Conn, []byte) ([]byte, error)) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, s.Timeout)
	defer cancel()
	s.Stats.UpstreamQueries.Add(1)
	conn, err := s.Dial(ctx, network, u.addr.String())
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	if _, err := rand.Read(wire[:2]); err != nil {
		return nil, err
	}
	defer s.own.add(conn, wire)()
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(past) })()
	raw, err := exchange(s, conn, wire)
	if err != nil {
		return nil, fmt.Errorf("querying %v over %s: %w", u.addr, network, err)
	}
	return raw, nil
}

var errStrays = errors.New("too many packets with a wrong ID or question")

// exchangeUDP reads packets until one matches: a late or forged packet must not end the try. The socket is connected, so
// the kernel drops packets from other addresses.
func exchangeUDP(s *Server, conn net.Conn, wire []byte) ([]byte, error) {
	if _, err := conn.Write(wire); err != nil {
		return nil, err
	}
	query, err := parse(wire)
	if err != nil {
		return nil, err
	}
	buf := make([]byte, max(ednsSize, query.udpSize())) // some servers exceed the size that was announced
	for range maxStrays {
		n, err := conn.Read(buf)
		if err != nil {
			return nil, err
		}
		raw, matches, err := check(&query, buf[:n])
		if matches {
			return raw, err
		}
		s.Stats.UpstreamStrays.Add(1)
	}
	return nil, errStrays
}

func exchangeTCP(_ *Server, conn net.Conn, wire []byte) ([]byte, error) {
	framed := binary.BigEndian.AppendUint16(make([]byte, 0, 2+len(wire)), uint16(len(wire)))
	if _, err := conn.Write(append(framed, wire...)); err != nil {
		return nil, err
	}
	query, err := parse(wire)
	if err != nil {
		return nil, err
	}
	var length [2]byte
	if _, err := io.ReadFull(conn, length[:]); err != nil {
		return nil, err
	}
	buf := make([]byte, binary.BigEndian.Uint16(length[:]))
	if _, err := io.ReadFull(conn, buf); err != nil {
		return nil, err
	}
	raw, matches, err := check(&query, buf)
	if !matches {
		return nil, errors.New("the answer has a wrong ID or question")
	}
	return raw, err
}

// check reports whether raw is an answer to query; err means that it is, but malformed. The case of letters in the question
// may differ: it is left to downstream to compare it. A server that could not parse the query does not repeat the question.
func check(query *message, raw []byte) (whole []byte, matches bool, err error) {
	answer, err := parse(raw)
	switch {
	case len(raw) < headerSize, !answer.response(), answer.id() != query.id(), answer.opcode() != query.opcode():
		return nil, false, nil
	case len(answer.question) > 0:
		matches = sameName(answer.name(), query.name()) &&
			bytes.Equal(answer.question[len(answer.name()):], query.question[len(query.name()):])
	case err == nil:
		switch answer.rcode() {
		case rcodeFormatError, rcodeServerFailure, rcodeNotImplemented, rcodeRefused:
			matches = true
		default:
			matches = answer.opcode() != opcodeQuery // RFC 2136 §3.8
		}
	}
	return answer.raw, matches, err
}

// adapt adapts the OPT of an answer to downstream: it is removed if the query had no OPT, and otherwise gets our own
// UDP size, because the size applies to one hop (RFC 6891 §6.2.3).
func (s *Server) adapt(q *query, raw []byte) []byte {
	m, err := parse(raw)
	switch {
	case err != nil || !m.edns():
		return raw
	case q.edns():
		binary.BigEndian.PutUint16(raw[m.opt.fixed+2:], ednsSize)
		return raw
	case m.ttl(m.opt)[0] != 0:
		// An extended code cannot be sent without EDNS, and its low bits alone may mean NOERROR.
		return failure(&q.message, rcodeServerFailure)
	}
	return m.cutOPT()
}
