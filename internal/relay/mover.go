package relay

import (
	"errors"
	"io"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/tcp"
)

// bulk is the line between messages and bulk. A read that brings so much has found bulk, and the next turn goes by
// splice; a splice that moves less has seen its end, and the next turn copies. A message is cheaper to copy than to send
// through a pipe.
const bulk = tcp.BufferSize

// Mover moves bytes from one connection to another: messages by copying, bulk by splice(2), past this process.
//
// It holds a buffer or a pipe only from the system call that fills it to the one that empties it: over a wait only when
// Dst is full. Release gives them back.
type Mover struct {
	Src, Dst *tcp.Conn
	Moved    *atomic.Uint64 // bytes that Dst's socket took; nil: nobody asks

	buf      *tcp.Buffer
	pipe     *pipe
	piped    int  // bytes in pipe
	splicing bool // the last turn found bulk
	noSplice bool // this kernel cannot splice sockets
}

// Held is how many bytes were taken from Src and not put into Dst.
func (m *Mover) Held() int {
	if m.buf != nil {
		return m.buf.Len()
	}
	return m.piped
}

// Hold gives the mover bytes that were read from Src before, in a buffer that is the mover's from now on. It must hold
// nothing else.
func (m *Mover) Hold(read *tcp.Buffer) {
	if read != nil && read.Len() == 0 {
		read.Release()
		read = nil
	}
	m.buf = read
}

// Expect says that so many bytes are to come, so that bulk is known before it is met.
func (m *Mover) Expect(n int64) { m.splicing = n >= bulk }

// maySplice reports whether bytes can move past this process: both connections must be bare.
func (m *Mover) maySplice() bool { return !m.noSplice && m.Src.Bare() && m.Dst.Bare() }

// Take reads up to limit bytes from Src, while the mover holds nothing. The errors are those of tcp.Conn.Read.
func (m *Mover) Take(limit int64) (int, error) {
	if m.splicing && m.maySplice() {
		if n, err := m.takePipe(limit); n > 0 || err != nil {
			return n, err
		}
	}
	m.buf = tcp.TakeBuffer()
	n, err := m.buf.FillAtMost(m.Src, int(min(limit, bulk)))
	m.splicing = n >= bulk
	if n == 0 {
		m.Release()
	}
	return n, err
}

// takePipe fills a pipe from Src. When it moves nothing, a read has to find out why: there is nothing, or the end, or
// urgent data, or no pipe to be had. An error of the connection is told: the kernel tells it once, and a read after it
// would see an orderly end.
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

// Put gives Dst what it takes of what the mover holds. The errors are those of tcp.Conn.Write.
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

// Release gives back what the mover holds. Bytes that are still in it are lost.
func (m *Mover) Release() {
	if m.buf != nil {
		m.buf.Release()
		m.buf = nil
	}
	if m.pipe != nil {
		pipes.give(m.pipe, m.piped == 0)
		m.pipe, m.piped = nil, 0
	}
}
