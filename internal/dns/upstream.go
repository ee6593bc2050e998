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

	"github.com/miekg/dns"
)

const (
	// deadTime is how long an upstream that did not answer is asked after all others.
	deadTime = 10 * time.Second
	// tellTime is how often at most the log says of an upstream that it does not answer. One that says nothing to some
	// names only would be told of with each of them.
	tellTime = time.Minute
	// maxStrays is how many packets with a wrong ID or question are borne while waiting for the right one. More of them
	// look like somebody who guesses, and TCP does not listen to guesses.
	maxStrays = 16
	// wholePacket is what every path carries in one packet, the headers beside it: the longest query that goes over UDP,
	// and the longest answer that we ask for. A longer one comes over TCP, as fragments get lost, and an ID and a port that
	// nobody can guess protect the first of them only: others can be forged into an answer (RFC 9715).
	wholePacket = 1232
)

// upstream is a server that is asked.
type upstream struct {
	addr netip.AddrPort
	dead atomic.Int64 // until when, in Unix nanoseconds; zero while it answers

	told   atomic.Int64 // when the log last said that it does not answer, in Unix nanoseconds
	silent atomic.Bool  // that is the last that the log said of it
}

// ask asks the upstreams one after the other, as a stub resolver does: the next one when there is no answer, or one that
// says that the server cannot tell. If none can, the last that was said goes through, and SERVFAIL if nothing was.
func (s *Server) ask(q *query) reply {
	ctx, cancel := context.WithTimeout(s.queries, budget*s.Timeout)
	defer cancel()
	var last reply
	said := make(map[*upstream]bool)
	for round := range rounds {
		for _, u := range s.inOrder() {
			if said[u] || ctx.Err() != nil {
				continue
			}
			raw, err := s.try(ctx, u, q, round == 0)
			if raw != nil {
				last = reply{raw: s.adapt(q, raw), upstream: u.addr}
			}
			if err != nil {
				s.Stats.UpstreamFailures.Add(1)
				if raw == nil && s.queries.Err() == nil && !ours(err) {
					s.failed(u, err)
				}
				continue
			}
			s.worked(u)
			said[u] = true
			switch raw[3] & 0xf {
			case dns.RcodeServerFailure, dns.RcodeRefused, dns.RcodeNotImplemented:
			default:
				return last
			}
		}
	}
	if last.raw == nil {
		s.Stats.Unanswered.Add(1)
		last.raw = failure(&q.message, dns.RcodeServerFailure)
	}
	return last
}

// inOrder lists the upstreams, those last that did not answer a short time ago. When that time is over, one query finds out
// whether they do again, and no other waits for that.
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
	told := u.told.Load()
	if now.UnixNano()-told >= int64(tellTime) && !u.silent.Load() && u.told.CompareAndSwap(told, now.UnixNano()) {
		u.silent.Store(true)
		s.Log.Warn("dns: an upstream server does not answer; others are asked first, if there are any", "upstream", u.addr.String(), "error", err)
	}
}

// ours reports whether a try failed because this process may open nothing more. That says nothing of the server.
func ours(err error) bool { return errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) }

func (s *Server) worked(u *upstream) {
	if u.dead.Load() != 0 && u.dead.Swap(0) != 0 && u.silent.Swap(false) {
		s.Log.Info("dns: an upstream server answers again", "upstream", u.addr.String())
	}
}

// try asks one upstream, over UDP and, where that is not enough, over TCP. When UDP gave a truncated answer and TCP none,
// it returns both the answer and the error. With extend, a query without EDNS gets an OPT, so that most large answers need
// no TCP. It must not be lost by that, where queries with an OPT or their answers do not arrive: without extend, it goes
// as downstream sent it.
func (s *Server) try(ctx context.Context, u *upstream, q *query, extend bool) ([]byte, error) {
	wire := bytes.Clone(q.raw)
	added := extend && !q.edns() && q.joinKey != "" // what goes alone goes as it is
	if added {
		wire = appendOPT(wire, wholePacket, make([]byte, 4))
	}
	raw, err := s.exchange(ctx, u, wire)
	if err == nil && added && raw[3]&0xf == dns.RcodeFormatError {
		// A server from before EDNS (RFC 6891 §7).
		return s.exchange(ctx, u, bytes.Clone(q.raw))
	}
	return raw, err
}

// exchange sends wire, whose ID it chooses, and returns the answer, well-formed and to this question.
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

// over opens a socket for one exchange. It ends with the try's time, or with ctx.
func (s *Server) over(ctx context.Context, network string, u *upstream, wire []byte, exchange func(*Server, net.Conn, []byte) ([]byte, error)) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, s.Timeout)
	defer cancel()
	s.Stats.UpstreamQueries.Add(1)
	conn, err := s.Dial(ctx, network, u.addr.String())
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(past) })()
	if _, err := rand.Read(wire[:2]); err != nil {
		return nil, err
	}
	raw, err := exchange(s, conn, wire)
	if err != nil {
		return nil, fmt.Errorf("asking %v over %s: %w", u.addr, network, err)
	}
	return raw, nil
}

var errStrays = errors.New("too many packets with a wrong ID or question")

// exchangeUDP reads until the answer comes, and not the first packet only: a late or forged one must not end the try.
// The socket is connected, so the kernel takes packets from the upstream's address alone.
func exchangeUDP(s *Server, conn net.Conn, wire []byte) ([]byte, error) {
	if _, err := conn.Write(wire); err != nil {
		return nil, err
	}
	query, err := parse(wire)
	if err != nil {
		return nil, err
	}
	buf := make([]byte, max(ednsSize, query.udpSize())) // some servers send more than they may
	for range maxStrays {
		n, err := conn.Read(buf)
		if err != nil {
			return nil, err
		}
		raw, ours, err := check(&query, buf[:n])
		if ours {
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
	raw, ours, err := check(&query, buf)
	if !ours {
		return nil, errors.New("the answer has a wrong ID or question")
	}
	return raw, err
}

// check tells whether raw answers query; err says that it does, but cannot be read. The question may come back in other
// letters: downstream, which chose them, sees what came back. A server that could not read the query repeats no question.
func check(query *message, raw []byte) (whole []byte, ours bool, err error) {
	answer, err := parse(raw)
	switch {
	case len(raw) < headerSize, !answer.response(), answer.id() != query.id(), answer.opcode() != query.opcode():
		return nil, false, nil
	case len(answer.question) > 0:
		ours = sameName(answer.name(), query.name()) &&
			bytes.Equal(answer.question[len(answer.name()):], query.question[len(query.name()):])
	case err == nil:
		switch answer.rcode() {
		case dns.RcodeFormatError, dns.RcodeServerFailure, dns.RcodeNotImplemented, dns.RcodeRefused:
			ours = true
		default:
			ours = answer.opcode() != dns.OpcodeQuery // RFC 2136 §3.8
		}
	}
	return answer.raw, ours, err
}

// adapt makes of what the upstream said what downstream may be told: no OPT if it sent none, and else our own UDP size
// in it, since that is about the next hop (RFC 6891 §6.2.3).
func (s *Server) adapt(q *query, raw []byte) []byte {
	m, err := parse(raw)
	switch {
	case err != nil || !m.edns():
		return raw
	case q.edns():
		binary.BigEndian.PutUint16(raw[m.opt.fixed+2:], ednsSize)
		return raw
	case m.ttl(m.opt)[0] != 0:
		// An extended code cannot be told without EDNS, and its low bits alone may say NOERROR.
		return failure(&q.message, dns.RcodeServerFailure)
	}
	return m.cutOPT()
}
