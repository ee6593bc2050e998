package tcp

import (
	"errors"
	"io"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/budget"
	"github.com/pillion-proxy/pillion/internal/sockopt"
)

// ErrHandshake is in the error of a read if the peer has rejected the handshake of a Layer after this side had finished it,
// and before it sent any data. In TLS 1.3 a client finishes before the server has verified its certificate.
var ErrHandshake = errors.New("the peer rejected the handshake")

// Layer is a record layer between a Conn and its socket, such as TLS. It encodes written bytes into records and decodes
// received ones. Only the goroutine that owns the connection calls it. It does all its input and output through the Socket
// that it was created with.
type Layer interface {
	// Read decodes into p. p must not be empty. It returns ErrAgain only if Socket.Read has returned that, and there is no
	// complete record with data. It returns io.EOF only after the peer's close message. See also ErrHandshake.
	Read(p []byte) (int, error)

	// Write encodes all of p and writes it.
	Write(p []byte) (int, error)

	// CloseWrite writes the close message. No Write follows.
	CloseWrite() error

	// Buffered reports whether Read may return a result other than ErrAgain without reading from the Socket.
	Buffered() bool
}

// Limited may be implemented by a Layer whose Write takes less than all, and returns ErrAgain if it takes nothing, because the
// peer limits what it accepts.
type Limited interface {
	// Room reports whether Write may take something, after a Read.
	Room() bool
}

// Holder may be implemented by a Layer that holds bytes of the peer, or memory for them, while the connection waits.
type Holder interface {
	// Held returns the size of that memory.
	Held() int

	// Drop frees it. No Read follows.
	Drop()
}

// Raw is the side of a Layer towards the network: a Socket, or another Layer.
type Raw interface {
	Read(p []byte) (int, error)
	Write(p []byte) (int, error)
}

// Socket is the raw side of a connection with a Layer.
type Socket struct{ c *Conn }

const (
	// maxEncoded bounds the bytes that one write of a Conn encodes. If the socket takes only a part of the encoded records,
	// the rest must be kept in memory.
	maxEncoded = LargeBufferSize

	// maxUnsent bounds the encoded bytes that wait for the socket while the layer reads. A layer may write when it reads, to
	// answer a key update for example. A peer that asks without reading the answers is not read from beyond this. It is
	// not less than one write encodes, because a peer may be waiting to be read before it reads.
	maxUnsent = maxEncoded

	// lingerTime is how long a closed connection with a Layer tries to send its unsent bytes.
	lingerTime = 30 * time.Second
)

// layered is the state of a connection with a Layer.
type layered struct {
	Layer
	ahead  *Buffer // raw input that was read before the layer was set; may be nil
	unsent *Buffer // encoded output that the socket has not taken; may be nil

	more     bool  // the layer may have data, independently of the socket
	stalled  bool  // reading waits until unsent is sent; see maxUnsent
	peeked   bool  // peek is valid
	peek     byte  // decoded by Quiet, to be returned by the next read
	finished bool  // the socket has returned io.EOF
	readErr  error // of the layer; returned by every later read
	writeErr error // returned by every later write; the rest of a record is lost, so no record can follow

	full bool // the layer has taken no more: see Limited

	closing bool // the close message is written; FIN follows when it is sent

	label any // see SetLabel

	budget  *budget.Budget  // see SetBudget
	peer    netip.Addr      // whose memory it is
	account *budget.Account // of budget; nil: nothing to report so far
}

// SetLayer puts a layer under the connection. ahead has raw bytes that were read before, and is decoded first; it may be
// nil. The connection owns the buffer from now on.
func (c *Conn) SetLayer(read *Buffer, layer func(*Socket) Layer) {
	c.layer = &layered{ahead: read, more: true}
	c.layer.Layer = layer(&Socket{c})
}

// AddLayer puts a layer on top of the connection's layer, whose Label stays, or on the socket. It must be the last layer: the one
// below is never replaced.
func (c *Conn) AddLayer(layer func(below Raw) Layer) {
	if c.layer == nil {
		c.SetLayer(nil, func(s *Socket) Layer { return layer(s) })
		return
	}
	below := c.layer.Layer
	c.layer.Layer, c.layer.more = &stacked{layer(below), below}, true
}

// stacked is a Layer on another one.
type stacked struct {
	Layer
	below Layer
}

// CloseWrite implements Layer.
func (s *stacked) CloseWrite() error {
	err := s.Layer.CloseWrite()
	if closed := s.below.CloseWrite(); err == nil {
		err = closed
	}
	return err
}

// Buffered implements Layer.
func (s *stacked) Buffered() bool { return s.Layer.Buffered() || s.below.Buffered() }

// Room implements Limited.
func (s *stacked) Room() bool {
	l, ok := s.Layer.(Limited)
	return ok && l.Room()
}

// SetLabel sets what Label returns. The connection must have a layer.
func (c *Conn) SetLabel(label any) { c.layer.label = label }

// Label returns a description of the layer that its maker set; nil without any.
func (c *Conn) Label() any {
	if c.layer == nil {
		return nil
	}
	return c.layer.label
}

// Replace sets the connection's layer. The former one has passed on everything that it has read.
func (s *Socket) Replace(layer Layer) { s.c.layer.Layer = layer }

// SetBudget attributes to peer what the connection's layer holds during waits. The socket's own peer may be a load balancer with
// the connections of many. If the connection is evicted, reads and writes fail with budget.ErrEvicted, and a wait ends as with
// a reset.
func (c *Conn) SetBudget(b *budget.Budget, peer netip.Addr) { c.layer.budget, c.layer.peer = b, peer }

// ordinaryHeld is what a connection with a layer may hold without a report.
const ordinaryHeld = 4 << 10

// report reports what the layer holds, before a wait. It returns true if the connection is evicted now.
func (l *layered) report(c *Conn) bool {
	n := 0
	for _, b := range [...]*Buffer{l.ahead, l.unsent} {
		if b != nil {
			n += b.Cap()
		}
	}
	if holder, ok := l.Layer.(Holder); ok {
		n += holder.Held()
	}
	if n <= ordinaryHeld {
		n = 0
	}
	if l.account == nil {
		if n == 0 {
			return false
		}
		l.account = new(budget.Account)
		l.account.Open(l.budget, (*evictable)(c), l.peer)
	}
	l.account.Hold(n)
	return l.checkEvicted()
}

// checkEvicted ends the reads and writes of a connection that has been evicted since the last check. The layer is not in a call.
func (l *layered) checkEvicted() bool {
	if l.account == nil || !l.account.Evicted() {
		return false
	}
	l.drop()
	l.writeErr = budget.ErrEvicted
	return true
}

// drop ends the reading, and frees all memory. Unsent bytes are lost.
func (l *layered) drop() {
	if holder, ok := l.Layer.(Holder); ok {
		holder.Drop()
	}
	l.peeked, l.more, l.stalled = false, true, false
	l.readErr = budget.ErrEvicted
	l.release()
}

// evictable is a Conn as an owner of memory.
type evictable Conn

// Interrupt implements budget.Owner: the connection becomes one that has failed.
func (e *evictable) Interrupt() {
	c := (*Conn)(e)
	c.ready.Or(readable | writable | failed)
	if w := c.waiter.Load(); w != nil {
		w.Wake()
	}
}

// Continue implements budget.Owner: an evicted connection ends.
func (*evictable) Continue() {}

// closeAccount ends the account, whose memory is freed, or reported by another one.
func (l *layered) closeAccount() {
	if l.account != nil {
		l.account.Close()
		l.account = nil
	}
}

// Sending reports whether the connection's layer has written what the socket has not taken yet. A wait for the connection sends it.
func (c *Conn) Sending() bool {
	return c.layer != nil && c.layer.unsent != nil && c.layer.writeErr == nil
}

// Bare reports whether the connection has no layer. Only such a connection can be spliced.
func (c *Conn) Bare() bool { return c.layer == nil }

// Read returns raw bytes, with results like those of Conn.Read on a bare connection. It also returns ErrAgain while more
// than maxUnsent bytes are unsent.
func (s *Socket) Read(p []byte) (int, error) {
	l := s.c.layer
	if l.unsent != nil && l.unsent.Len() > maxUnsent && l.flush(s.c) == ErrAgain {
		l.stalled = true
		return 0, ErrAgain
	}
	if l.ahead != nil {
		n := copy(p, l.ahead.Bytes())
		if l.ahead.Discard(n); l.ahead.Len() == 0 {
			l.ahead.Release()
			l.ahead = nil
		}
		if n > 0 {
			return n, nil
		}
	}
	n, err := s.c.readSocket(p)
	l.finished = l.finished || err == io.EOF
	return n, err
}

// Write accepts all of p, because a part of a record is useless. The connection keeps the bytes that the socket does not
// take, and sends them before any others.
func (s *Socket) Write(p []byte) (int, error) {
	l := s.c.layer
	if l.writeErr != nil {
		return 0, l.writeErr
	}
	rest, flags := p, uintptr(0)
	if l.closing {
		flags = unix.MSG_MORE // FIN follows at once, in the segment of the close message
	}
	for l.unsent == nil && len(rest) > 0 {
		n, err := s.c.sendSocket(rest, flags)
		if err == ErrAgain {
			l.unsent = TakeBuffer()
			break
		}
		if err != nil {
			l.writeErr = err
			return 0, err
		}
		rest = rest[n:]
	}
	if len(rest) > 0 {
		l.unsent.Append(rest)
	}
	return len(p), nil
}

// read decodes. While the layer may have more data, the connection stays readable, as with bytes in the kernel.
func (l *layered) read(p []byte) (int, error) {
	l.checkEvicted()
	if l.peeked {
		p[0], l.peeked = l.peek, false
		l.more = l.readErr != nil || l.Buffered()
		return 1, nil
	}
	if l.readErr != nil {
		return 0, l.readErr
	}
	n, err := l.Layer.Read(p)
	if errors.Is(err, ErrAgain) {
		err = ErrAgain
	} else if err != nil {
		if err == io.EOF && l.finished {
			err = io.ErrUnexpectedEOF // FIN without a close message: an attacker may have truncated the stream
		}
		l.readErr = err
	}
	if n > 0 {
		err = nil
	}
	l.more = l.readErr != nil || !l.stalled && l.ahead != nil || n > 0 && l.Buffered()
	return n, err
}

// write encodes up to maxEncoded bytes of p. It returns ErrAgain while earlier records are unsent.
func (l *layered) write(c *Conn, p []byte) (int, error) {
	l.checkEvicted()
	if err := l.flush(c); err != nil {
		return 0, err
	}
	if l.closing {
		return 0, os.NewSyscallError("write", unix.EPIPE)
	}
	if len(p) == 0 {
		return 0, nil
	}
	n, err := l.Layer.Write(p[:min(len(p), maxEncoded)])
	switch {
	case err == ErrAgain:
		l.full = true
	case err != nil:
		l.writeErr = err
	}
	return n, err
}

// writeVector encodes pieces together, so that small ones share a record.
func (l *layered) writeVector(c *Conn, v *Vector) (int, error) {
	gathered := TakeBuffer()
	defer gathered.Release()
	n, err := l.write(c, v.copyTo(gathered.bytes))
	v.took(n)
	return n, err
}

// flush sends the unsent bytes, and then the FIN if the connection is closing. It returns ErrAgain if the socket does not
// take all of them.
func (l *layered) flush(c *Conn) error {
	for l.unsent != nil && l.writeErr == nil {
		n, err := c.writeSocket(l.unsent.Bytes())
		if err == ErrAgain {
			return ErrAgain
		}
		l.writeErr = err
		if l.unsent.Discard(n); l.unsent.Len() == 0 {
			l.unsent.Release()
			l.unsent = nil
		}
	}
	if l.closing && !c.shut && l.writeErr == nil {
		c.shut = true
		l.writeErr = os.NewSyscallError("shutdown", shutdown(c.fd))
	}
	return l.writeErr
}

// flushWaiting flushes before a wait for the connection, because its owner cannot see the unsent bytes. It reports whether
// the owner must try again at once: the flush failed, a read that was stalled can go on, or all bytes are sent. A write may have
// returned ErrAgain because of them, and no event follows if the socket has room: it may not be watched for writes yet.
func (l *layered) flushWaiting(c *Conn) (news bool) {
	if l.full {
		if limited, ok := l.Layer.(Limited); ok && limited.Room() {
			l.full = false
			return true
		}
	}
	if l.unsent == nil || l.writeErr != nil {
		return l.stalled && l.resume()
	}
	if err := l.flush(c); err != ErrAgain {
		if l.stalled && err == nil {
			l.resume()
		}
		return true
	}
	return l.stalled && l.unsent.Len() <= maxUnsent && l.resume()
}

func (l *layered) resume() bool {
	l.stalled, l.more = false, true
	return true
}

// closeWrite writes the close message. FIN follows when all bytes are sent.
func (l *layered) closeWrite(c *Conn) error {
	if !l.closing {
		l.closing = true
		if l.writeErr == nil {
			l.writeErr = l.CloseWrite()
		}
	}
	if err := l.flush(c); err != ErrAgain {
		return err
	}
	return nil
}

// quiet implements Conn.Quiet. It decodes the bytes on the socket, because they may be records without data, such as
// session tickets, or a close message.
func (l *layered) quiet() bool {
	if l.peeked || l.readErr != nil || l.writeErr != nil || l.unsent != nil {
		return false
	}
	var p [1]byte
	n, err := l.read(p[:])
	if n == 1 {
		l.peeked, l.peek, l.more = true, p[0], true
	}
	return n == 0 && err == ErrAgain
}

// release releases the buffers. Unsent bytes are lost.
func (l *layered) release() {
	l.ahead.Release()
	l.unsent.Release()
	l.ahead, l.unsent = nil, nil
	l.closeAccount()
}

// closeLayered closes in order: the close message follows the written bytes. If the socket does not take all of them, a
// goroutine of the poller sends the rest, as the kernel does for a bare connection.
func (c *Conn) closeLayered() {
	_ = c.layer.closeWrite(c) // after an error, the connection is closed as well
	if c.layer.unsent == nil || c.layer.writeErr != nil {
		c.finish()
		return
	}
	if c.set != nil {
		c.leave() // Returned must not read fd while it changes
	}
	c.layer.closeAccount() // rest has one of its own
	rest := newConn(c.poller, c.fd, c.RemoteAddr(), 0)
	rest.layer, rest.open = c.layer, c.open
	if c.watched {
		c.poller.forget(c)
	}
	c.closed, c.fd, c.layer, c.open = true, -1, nil, nil
	rest.poller.sending.Add(1)
	rest.poller.lingering.Go(rest.linger)
}

// linger sends the unsent bytes and closes the connection. If that takes too long, it resets the connection, because a
// truncated stream must not look complete.
func (c *Conn) linger() {
	w := NewWaiter(c.poller.life)
	defer w.Close()
	defer c.poller.sending.Add(-1)
	for deadline := time.Now().Add(lingerTime); c.layer.flush(c) == ErrAgain; {
		if w.Wait(deadline, c, nil) != nil || c.layer.writeErr == budget.ErrEvicted {
			_ = sockopt.SetReset(c.fd) // cannot fail on an open TCP socket
			break
		}
	}
	c.finish()
}
