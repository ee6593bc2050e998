package relay

import (
	"errors"
	"io"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/tcp"
)

// bulk separates messages from bulk. After a read that returns this much, the next turn splices; after a splice that moves
// less, the next turn copies. A message is cheaper to copy than to move through a pipe.
const bulk = tcp.BufferSize

// maxLargeBuffers bounds the large buffers of all movers, as there is a bound for pipes. Peers that do not read decide how
// long one is held.
const maxLargeBuffers = 128

var largeBuffers atomic.Int64 // that movers hold

// Mover moves bytes from one connection to another. It copies messages, and moves bulk by splice(2), without copying it to
// this process.
//
// It holds a buffer or a pipe only from the system call that fills it to the one that empties it, and over a wait only if
// Dst is full. Release gives them back.
type Mover struct {
	Src, Dst *tcp.Conn
	Moved    *atomic.Uint64 // bytes that Dst took; nil: not counted

	buf      *tcp.Buffer
	large    bool // buf is one of largeBuffers
	pipe     *pipe
	piped    int  // bytes in pipe
	splicing bool // the last turn found bulk
	noSplice bool // this kernel cannot splice sockets
}

// Held returns the number of bytes that were taken from Src and not put into Dst.
func (m *Mover) Held() int {
	if m.buf != nil {
		return m.buf.Len()
	}
	return m.piped
}

// Hold gives the mover bytes that were read from Src before. The mover owns the buffer from now on. It must be empty when
// Hold is called.
func (m *Mover) Hold(read *tcp.Buffer) {
	if read != nil && read.Len() == 0 {
		read.Release()
		read = nil
	}
	m.buf = read
}

// Expect announces that n bytes are to come, so that bulk is spliced from its first byte.
func (m *Mover) Expect(n int64) { m.splicing = n >= bulk }

// maySplice reports whether bytes can move past this process: both connections must be bare.
func (m *Mover) maySplice() bool { return !m.noSplice && m.Src.Bare() && m.Dst.Bare() }

// Take reads up to limit bytes from Src. The mover must be empty. The errors are those of tcp.Conn.Read.
func (m *Mover) Take(limit int64) (int, error) {
	if m.splicing && m.maySplice() {
		if n, err := m.takePipe(limit); n > 0 || err != nil {
			return n, err
		}
	}
	most := m.takeBuffer()
	n, err := m.buf.FillAtMost(m.Src, int(min(limit, most)))
	m.splicing = n >= bulk
	if n == 0 {
		m.Release()
	}
	return n, err
}

// takeBuffer takes a buffer, and returns how many bytes to read into it: a large one for bulk that cannot be spliced.
func (m *Mover) takeBuffer() (most int64) {
	if m.splicing && !m.maySplice() {
		if m.large = largeBuffers.Add(1) <= maxLargeBuffers; m.large {
			m.buf = tcp.TakeLargeBuffer()
			return tcp.LargeBufferSize
		}
		largeBuffers.Add(-1)
	}
	m.buf = tcp.TakeBuffer()
	return bulk
}

// takePipe fills a pipe from Src. If it moves no bytes, the caller must read to find out why: there are no bytes, the
// connection has ended, there is urgent data, or no pipe was available. It returns an error of the connection, because the
// kernel reports it only once: a later read would see an orderly end.
func (m *Mover) takePipe(limit int64) (int, error) {
	if m.pipe = pipes.take(); m.pipe == nil {
		return 0, nil
	}
	n, err := m.Src.SpliceTo(m.pipe.w, int(min(limit, pipeSize)))
	if err == nil {
		m.piped = n
		m.splicing = n >= bulk
		return n, nil
	}
	m.Release()
	switch {
	case err == tcp.ErrAgain, err == io.EOF:
		return 0, nil
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOSYS):
		m.noSplice = true
		return 0, nil
	}
	return 0, err
}

// Put writes held bytes to Dst, as many as it takes. The errors are those of tcp.Conn.Write.
func (m *Mover) Put() (int, error) {
	var n int
	var err error
	if m.pipe != nil {
		if n, err = m.Dst.SpliceFrom(m.pipe.r, m.piped); err == nil {
			m.piped -= n
		}
	} else if n, err = m.Dst.Write(m.buf.Bytes()); err == nil {
		m.buf.Discard(n)
	}
	if err != nil {
		return 0, err
	}
	if m.Moved != nil {
		m.Moved.Add(uint64(n))
	}
	if m.Held() == 0 {
		m.Release()
	}
	return n, nil
}

// Release gives back the buffer and the pipe. Bytes that they still hold are lost.
func (m *Mover) Release() {
	if m.buf != nil {
		m.buf.Release()
		m.buf = nil
	}
	if m.large {
		largeBuffers.Add(-1)
		m.large = false
	}
	if m.pipe != nil {
		pipes.give(m.pipe, m.piped == 0)
		m.pipe, m.piped = nil, 0
	}
}
