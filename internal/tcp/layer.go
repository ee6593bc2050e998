package tcp

import (
	"errors"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/sockopt"
)

// Layer is a record layer between a Conn and its socket, such as TLS. It encodes what the connection writes into records
// and decodes what it reads. It belongs to the goroutine that owns the connection, and does all its input and output by
// the Socket that it was made with.
type Layer interface {
	// Read decodes into p, which is not empty. It returns ErrAgain only when Socket.Read has returned that: then there is
	// no whole record with data. It returns io.EOF after the peer's close message and for no other reason.
	Read(p []byte) (int, error)

	// Write encodes all of p and writes it.
	Write(p []byte) (int, error)

	// CloseWrite writes the close message. No Write follows.
	CloseWrite() error

	// Buffered reports whether Read may return something else than ErrAgain without reading from the Socket.
	Buffered() bool
}

// Socket is the raw side of a connection with a Layer.
type Socket struct{ c *Conn }

const (
	// maxEncoded bounds the bytes that one write of a Conn encodes. Encoded records cannot be taken back when the socket
	// takes only a part of them, so this is what may wait in memory.
	maxEncoded = 16 << 10

	// maxUnsent bounds the encoded bytes that wait for the socket while the layer reads. A layer may write when it reads, to
	// answer a key update for example. A peer that asks without reading the answers is not read from beyond this. It is
	// much more than one write encodes, because a peer may be waiting to be read before it reads.
	maxUnsent = 4 * maxEncoded

	// lingerTime is how long a closed connection with a Layer tries to send what is unsent.
	lingerTime = 30 * time.Second
)

// layered is the state of a connection with a Layer.
type layered struct {
	Layer
	ahead  *Buffer // raw input that was read before the layer was set; nil: none left
	unsent *Buffer // encoded output that the socket has not taken; nil: none

	more     bool  // a read is worth trying whatever the socket has
	stalled  bool  // reading waits until unsent is sent; see maxUnsent
	peeked   bool  // Quiet has decoded a byte that was not read
	peek     byte  // this one
	finished bool  // the socket has returned io.EOF
	readErr  error // of the layer, returned by every later read
	writeErr error // likewise; the rest of a record is lost, so no record can follow

	closing bool // the close message is written, and FIN follows when it is sent
}

// SetLayer puts a layer under the connection. Raw bytes that were read before are decoded first; their buffer is the
// connection's from now on. nil stands for none.
func (c *Conn) SetLayer(read *Buffer, layer func(*Socket) Layer) {
	c.layer = &layered{ahead: read, more: true}
	c.layer.Layer = layer(&Socket{c})
}

// Bare reports whether there is no layer: the bytes on the socket are the connection's own. Only such a connection can be
// spliced.
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

// Write takes all of p, as a record cannot be taken back: the connection keeps what the socket does not take, and sends
// it before anything else.
func (s *Socket) Write(p []byte) (int, error) {
	l := s.c.layer
	if l.writeErr != nil {
		return 0, l.writeErr
	}
	rest := p
	for l.unsent == nil && len(rest) > 0 {
		n, err := s.c.writeSocket(rest)
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

// read decodes. While the layer may have more, the connection stays readable, as it would with bytes in the kernel.
func (l *layered) read(p []byte) (int, error) {
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
			err = io.ErrUnexpectedEOF // FIN without a close message: anybody can have cut the connection
		}
		l.readErr = err
	}
	if n > 0 {
		err = nil
	}
	l.more = l.readErr != nil || !l.stalled && l.ahead != nil || n > 0 && l.Buffered()
	return n, err
}

// write encodes up to maxEncoded bytes of p. It takes nothing while earlier records are unsent.
func (l *layered) write(c *Conn, p []byte) (int, error) {
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
	if err != nil {
		l.writeErr = err
	}
	return n, err
}

// writeVector encodes pieces together, so that small ones share a record.
func (l *layered) writeVector(c *Conn, v *Vector) (int, error) {
	gathered := TakeBuffer()
	defer gathered.Release()
	n, err := l.write(c, v.copyTo(gathered.bytes[:maxEncoded]))
	v.took(n)
	return n, err
}

// flush sends what is unsent, and then the FIN if the connection is closing. It returns ErrAgain when the socket does not
// take all of it.
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

// flushWaiting flushes when the connection is waited for, because its owner cannot see that something is unsent. It reports
// whether the owner must try again at once: the flush failed, or a read that was stalled can go on.
func (l *layered) flushWaiting(c *Conn) (news bool) {
	if l.unsent == nil || l.writeErr != nil {
		return l.stalled && l.resume()
	}
	if err := l.flush(c); err != nil && err != ErrAgain {
		return true
	}
	return l.stalled && (l.unsent == nil || l.unsent.Len() <= maxUnsent) && l.resume()
}

func (l *layered) resume() bool {
	l.stalled, l.more = false, true
	return true
}

// closeWrite writes the close message. FIN follows it at once, or when what is unsent has gone.
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

// quiet is Conn.Quiet. Bytes on the socket may be records without data, such as session tickets, or a close message, so
// it decodes them.
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

// release gives back the buffers. What is unsent is lost.
func (l *layered) release() {
	l.ahead.Release()
	l.unsent.Release()
	l.ahead, l.unsent = nil, nil
}

// closeLayered closes in order: the close message goes out behind what was written. When the socket does not take it, a
// goroutine of the poller sees to that, as the kernel does for a bare connection.
func (c *Conn) closeLayered() {
	_ = c.layer.closeWrite(c) // an error closes as well
	if c.layer.unsent == nil || c.layer.writeErr != nil {
		c.finish()
		return
	}
	rest := &Conn{poller: c.poller, fd: c.fd, remote: c.remote, layer: c.layer, open: c.open, set: c.set}
	if c.watched {
		c.poller.forget(c)
	}
	c.closed, c.fd, c.layer, c.open, c.set = true, -1, nil, nil, nil
	rest.poller.sending.Add(1)
	rest.poller.lingering.Go(rest.linger)
}

// linger sends what is unsent and closes the connection, with a reset if that takes too long: what was cut must not look
// complete.
func (c *Conn) linger() {
	w := NewWaiter(c.poller.life)
	defer w.Close()
	defer c.poller.sending.Add(-1)
	for deadline := time.Now().Add(lingerTime); c.layer.flush(c) == ErrAgain; {
		if w.Wait(deadline, c, nil) != nil {
			_ = sockopt.SetReset(c.fd) // cannot fail on an open TCP socket
			break
		}
	}
	c.finish()
}
