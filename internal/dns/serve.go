package dns

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"
)

const (
	// maxQuery is the length limit of a query in bytes. One with a name and EDNS options has some hundreds.
	maxQuery = 16 << 10

	maxConns    = 256                    // open TCP connections
	maxPipeline = 64                     // queries in progress on one connection; at the limit it is not read
	idleTime    = 10 * time.Second       // until the next query is complete (RFC 7766 §6.2.3)
	writeTime   = 5 * time.Second        // for writing an answer
	lastTime    = 100 * time.Millisecond // the same, once the time of Shutdown is up
)

func (s *Server) serveUDP(socket *net.UDPConn) {
	buf := make([]byte, maxQuery+1)
	for {
		n, peer, err := socket.ReadFromUDPAddrPort(buf)
		if err != nil {
			if s.pause("reading queries", err) {
				continue
			}
			return
		}
		s.Stats.UDPQueries.Add(1)
		s.drops.noteQuery()
		raw := bytes.Clone(buf[:n])
		if n > maxQuery {
			raw = raw[:headerSize] // malformed, but its ID can be read
		}
		s.open.Go(func() { s.answerUDP(socket, peer, raw) })
	}
}

func (s *Server) answerUDP(socket *net.UDPConn, peer netip.AddrPort, raw []byte) {
	var out []byte
	if s.own.sent(peer, raw) {
		out = s.refuseLoop(raw)
	} else {
		out = s.answer(raw, "udp", maxPacket)
	}
	if out == nil {
		return
	}
	if _, err := socket.WriteToUDPAddrPort(out[2:], peer); err != nil {
		s.Log.Debug("dns: cannot send answer", "to", peer.String(), "error", err)
	}
}

func (s *Server) acceptTCP(ln *net.TCPListener) {
	for {
		tcp, err := ln.AcceptTCP()
		if err != nil {
			if s.pause("accepting", err) {
				continue
			}
			return
		}
		c := &conn{TCPConn: tcp, slots: make(chan struct{}, maxPipeline)}
		if !s.register(c) {
			tcp.Close()
			continue
		}
		s.open.Go(func() { s.serveTCP(c) })
	}
}

// conn is a downstream TCP connection.
type conn struct {
	*net.TCPConn
	slots chan struct{} // holds one element for each query in progress
	open  sync.WaitGroup

	writing sync.Mutex // held for one answer: its deadline and its write
	gaveUp  bool       // guarded by writing

	used time.Time // arrival of the last query; guarded by Server.connsMu
}

// register adds c, and evicts the connection that has been idle longest if there are too many: downstreams that keep idle
// connections must not keep out a new one. It returns false if all connections are busy.
func (s *Server) register(c *conn) bool {
	s.connsMu.Lock()
	defer s.connsMu.Unlock()
	if len(s.conns) >= maxConns {
		var oldest *conn
		for other := range s.conns {
			if len(other.slots) == 0 && (oldest == nil || other.used.Before(oldest.used)) {
				oldest = other
			}
		}
		if oldest == nil {
			return false
		}
		delete(s.conns, oldest)
		oldest.Close()
		s.Stats.TCPEvicted.Add(1)
	}
	c.used = s.now()
	s.conns[c] = struct{}{}
	s.Stats.TCPConns.Store(int64(len(s.conns)))
	return true
}

func (s *Server) unregister(c *conn) {
	s.connsMu.Lock()
	defer s.connsMu.Unlock()
	delete(s.conns, c)
	s.Stats.TCPConns.Store(int64(len(s.conns)))
}

// awaitQuery sets the deadline of the next query, in the past if the server has stopped.
func (s *Server) awaitQuery(c *conn) {
	s.connsMu.Lock()
	defer s.connsMu.Unlock()
	c.used = s.now()
	select {
	case <-s.stopped:
		_ = c.SetReadDeadline(past)
	default:
		_ = c.SetReadDeadline(time.Now().Add(s.idle))
	}
}

// serveTCP reads queries until the stream ends, and closes c when all are answered. Answers are sent as they arrive, in any
// order (RFC 7766 §6.2.1.1).
func (s *Server) serveTCP(c *conn) {
	defer s.unregister(c)
	defer c.Close()
	defer c.open.Wait()
	in := bufio.NewReader(c)
	for {
		s.awaitQuery(c)
		raw, err := readQuery(in)
		if raw != nil {
			s.Stats.TCPQueries.Add(1)
			c.slots <- struct{}{}
			c.open.Go(func() { s.answerTCP(c, raw) })
		}
		if err != nil {
			return
		}
	}
}

// readQuery returns the next query. Of a query that is too long it returns the header and an error. Each error ends the
// connection.
func readQuery(in *bufio.Reader) ([]byte, error) {
	var length [2]byte
	if _, err := io.ReadFull(in, length[:]); err != nil {
		return nil, err
	}
	n := int(binary.BigEndian.Uint16(length[:]))
	var err error
	switch {
	case n < headerSize:
		return nil, errMalformed
	case n > maxQuery:
		n, err = headerSize, errMalformed
	}
	raw := make([]byte, n)
	if _, err := io.ReadFull(in, raw); err != nil {
		return nil, err
	}
	return raw, err
}

func (s *Server) answerTCP(c *conn, raw []byte) {
	defer func() { <-c.slots }()
	out := s.answer(raw, "tcp", maxMessage)
	if out == nil {
		c.Close() // a client that sends responses does not speak DNS
		return
	}
	binary.BigEndian.PutUint16(out, uint16(len(out)-2))
	s.write(c, out)
}

// write sends an answer, and closes the connection if downstream does not read it in time.
func (s *Server) write(c *conn, out []byte) {
	c.writing.Lock()
	defer c.writing.Unlock()
	if c.gaveUp {
		return
	}
	_ = c.SetWriteDeadline(time.Now().Add(writeTime))
	if s.queries.Err() != nil { // checked after the deadline was set, so that a concurrent giveUp is not overwritten
		_ = c.SetWriteDeadline(time.Now().Add(lastTime))
	}
	if _, err := c.Write(out); err != nil {
		c.gaveUp = true
		c.Close()
	}
}

// giveUp ends a write in progress. Later writes get lastTime.
func (c *conn) giveUp() { _ = c.SetWriteDeadline(past) }
