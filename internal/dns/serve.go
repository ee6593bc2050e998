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
	// maxQuery is the longest query in bytes. One with a name and EDNS options has some hundreds.
	maxQuery = 16 << 10

	maxConns    = 256                    // TCP connections at a time
	maxPipeline = 64                     // queries at a time of one connection; then it is not read from
	idleTime    = 10 * time.Second       // for the next query to come whole (RFC 7766 §6.2.3)
	writeTime   = 5 * time.Second        // for an answer to be taken
	lastTime    = 100 * time.Millisecond // the same, when Shutdown has no more time
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
		raw := bytes.Clone(buf[:n])
		if n > maxQuery {
			raw = raw[:headerSize] // malformed, but its ID can be read
		}
		s.open.Go(func() { s.answerUDP(socket, peer, raw) })
	}
}

func (s *Server) answerUDP(socket *net.UDPConn, peer netip.AddrPort, raw []byte) {
	out := s.answer(raw, "udp", maxPacket)
	if out == nil {
		return
	}
	if _, err := socket.WriteToUDPAddrPort(out[2:], peer); err != nil {
		s.Log.Debug("dns: an answer could not be sent", "to", peer.String(), "error", err)
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
	slots chan struct{} // one is taken by each query that is not answered yet
	open  sync.WaitGroup

	writing sync.Mutex // an answer is one write, under the deadline that it sets
	gaveUp  bool       // guarded by writing

	used time.Time // when the last query came; guarded by Server.connsMu
}

// register makes room for c. Downstreams that keep connections for later must not lock out one that asks now, so the
// connection that has been without a query for longest gives way; when all are busy, the new one is closed.
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

// awaitQuery sets the time for the next query, none if the server has stopped.
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

// serveTCP reads queries until there are no more, and closes c when all are answered. Answers go out as they come, in
// any order (RFC 7766 §6.2.1.1).
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

// readQuery returns a query, of one that is too long its header, with an error as for whatever ends the connection.
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
		c.Close() // who sends answers to a server speaks something else
		return
	}
	binary.BigEndian.PutUint16(out, uint16(len(out)-2))
	s.write(c, out)
}

// write closes the connection when downstream does not take what it asked for.
func (s *Server) write(c *conn, out []byte) {
	c.writing.Lock()
	defer c.writing.Unlock()
	if c.gaveUp {
		return
	}
	_ = c.SetWriteDeadline(time.Now().Add(writeTime))
	if s.queries.Err() != nil { // asked after the deadline was set, so that giveUp has the last word
		_ = c.SetWriteDeadline(time.Now().Add(lastTime))
	}
	if _, err := c.Write(out); err != nil {
		c.gaveUp = true
		c.Close()
	}
}

// giveUp ends a write that waits. Those that come later have lastTime.
func (c *conn) giveUp() { _ = c.SetWriteDeadline(past) }
