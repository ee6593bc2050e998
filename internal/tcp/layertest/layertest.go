// Package layertest has a toy record layer for tests of the engines' requirements for TLS. Only tests import it.
//
// A record is a type, a length of two bytes, and a payload whose bytes are XORed. There are records of data, tickets
// without data, questions that the Layer answers with a ticket, and a close message.
package layertest

import (
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/tcp"
)

const (
	data     = 'D'
	ticket   = 'T'
	question = 'Q'
	closing  = 'C'

	key    = 0x5a
	header = 3
	record = 1000 // bytes of data in the largest record
)

func encode(dst []byte, kind byte, payload []byte) []byte {
	dst = append(dst, kind)
	dst = binary.BigEndian.AppendUint16(dst, uint16(len(payload)))
	for _, b := range payload {
		dst = append(dst, b^key)
	}
	return dst
}

// encodeAll makes records of data.
func encodeAll(p []byte, record int) (out []byte) {
	for len(p) > 0 {
		n := min(len(p), record)
		out = encode(out, data, p[:n])
		p = p[n:]
	}
	return out
}

// decoder decodes records.
type decoder struct {
	raw     []byte
	pending []byte
	closed  bool
	records int                  // of data
	answer  func(size int) error // called for a question; nil: ignored
	failed  error                // of answer
}

// step decodes a record of raw. It reports false when there is no whole one.
func (d *decoder) step() bool {
	if !d.whole() {
		return false
	}
	payload := d.raw[header : header+int(binary.BigEndian.Uint16(d.raw[1:]))]
	switch d.raw[0] {
	case data:
		d.records++
		for _, b := range payload {
			d.pending = append(d.pending, b^key)
		}
	case question:
		if d.answer != nil && d.failed == nil {
			d.failed = d.answer(int(binary.BigEndian.Uint16([]byte{payload[0] ^ key, payload[1] ^ key})))
		}
	case closing:
		d.closed = true
	}
	d.raw = d.raw[header+len(payload):]
	return true
}

func (d *decoder) whole() bool {
	return len(d.raw) >= header && len(d.raw) >= header+int(binary.BigEndian.Uint16(d.raw[1:]))
}

// read returns data of one record at most. more reads raw bytes.
func (d *decoder) read(p []byte, more func([]byte) (int, error)) (int, error) {
	for {
		switch {
		case len(d.pending) > 0:
			n := copy(p, d.pending)
			d.pending = d.pending[n:]
			return n, nil
		case d.failed != nil:
			return 0, d.failed
		case d.closed:
			return 0, io.EOF
		case d.step():
			continue
		}
		raw := make([]byte, 4096)
		n, err := more(raw)
		if err != nil {
			return 0, err // io.EOF as well: whether that is a truncation, the caller decides
		}
		d.raw = append(d.raw, raw[:n]...)
	}
}

// Layer is the toy as a tcp.Layer.
type Layer struct {
	socket *tcp.Socket
	decoder
}

// Under puts the toy under c, with the raw bytes that were read before, or nil.
func Under(c *tcp.Conn, read *tcp.Buffer) {
	c.SetLayer(read, func(socket *tcp.Socket) tcp.Layer {
		return &Layer{socket: socket, decoder: decoder{answer: func(size int) error {
			_, err := socket.Write(encode(nil, ticket, make([]byte, size)))
			return err
		}}}
	})
}

func (l *Layer) Read(p []byte) (int, error) { return l.decoder.read(p, l.socket.Read) }

func (l *Layer) Write(p []byte) (int, error) {
	if _, err := l.socket.Write(encodeAll(p, record)); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (l *Layer) CloseWrite() error {
	_, err := l.socket.Write(encode(nil, closing, nil))
	return err
}

// Held implements tcp.Holder.
func (l *Layer) Held() int { return cap(l.raw) + cap(l.pending) }

// Drop implements tcp.Holder.
func (l *Layer) Drop() { l.raw, l.pending = nil, nil }

func (l *Layer) Buffered() bool { return len(l.pending) > 0 || l.closed || l.whole() }

// Peer is the far end of a connection with the toy layer.
type Peer struct {
	*net.TCPConn
	Piece  int // bytes that one system call writes; 0: any number
	Record int // bytes of data in its largest record, at most 65535; 0: 1000

	mu sync.Mutex // writes
	decoder
}

// Read decodes. The end without a close message is io.ErrUnexpectedEOF.
func (p *Peer) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	n, err := p.decoder.read(b, p.TCPConn.Read)
	if err == io.EOF && !p.closed {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// Write encodes.
func (p *Peer) Write(b []byte) (int, error) {
	size := record
	if p.Record > 0 {
		size = p.Record
	}
	if err := p.raw(encodeAll(b, size)); err != nil {
		return 0, err
	}
	return len(b), nil
}

// ReadFrom keeps io.Copy from writing to the socket.
func (p *Peer) ReadFrom(r io.Reader) (int64, error) { return io.Copy(struct{ io.Writer }{p}, r) }

// WriteTo keeps io.Copy from reading from the socket.
func (p *Peer) WriteTo(w io.Writer) (int64, error) { return io.Copy(w, struct{ io.Reader }{p}) }

// Records is the number of records of data that were decoded.
func (p *Peer) Records() int { return p.records }

// Encode returns the records that carry b.
func Encode(b []byte) []byte { return encodeAll(b, record) }

// Ticket writes a record without data.
func (p *Peer) Ticket() error { return p.raw(encode(nil, ticket, []byte("resume with this"))) }

// Questions returns n questions. The answers are tickets with size bytes.
func Questions(n int, size uint16) (all []byte) {
	for range n {
		all = encode(all, question, binary.BigEndian.AppendUint16(nil, size))
	}
	return all
}

// Ask writes questions.
func (p *Peer) Ask(n int, size uint16) error { return p.raw(Questions(n, size)) }

// CloseMessage writes the close message without FIN.
func (p *Peer) CloseMessage() error { return p.raw(encode(nil, closing, nil)) }

// CloseWrite writes the close message and FIN.
func (p *Peer) CloseWrite() error {
	if err := p.CloseMessage(); err != nil {
		return err
	}
	return p.TCPConn.CloseWrite()
}

// Close writes the close message and closes.
func (p *Peer) Close() error {
	_ = p.CloseMessage()
	return p.TCPConn.Close()
}

// Truncate sends FIN without the close message.
func (p *Peer) Truncate() error { return p.TCPConn.CloseWrite() }

func (p *Peer) raw(b []byte) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(b) > 0 {
		n := len(b)
		if p.Piece > 0 {
			n = min(n, p.Piece)
		}
		if _, err := p.TCPConn.Write(b[:n]); err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

// Accept returns the two ends of a connection with the toy layer. The second was accepted.
func Accept(t testing.TB, poller *tcp.Poller) (*Peer, *tcp.Conn) {
	t.Helper()
	listener, err := poller.Listen(netip.MustParseAddrPort("127.0.0.1:0"))
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	conn, err := net.DialTCP("tcp4", nil, net.TCPAddrFromAddrPort(listener.Addr()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	near, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(near.Close)
	Under(near, nil)
	return &Peer{TCPConn: conn}, near
}

// Listener accepts Peers.
type Listener struct{ net.Listener }

// Accept implements net.Listener.
func (l Listener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &Peer{TCPConn: conn.(*net.TCPConn)}, nil
}
