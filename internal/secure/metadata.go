package secure

import (
	"io"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/peers"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

// Exchange begins the exchange of metadata if the ALPN of the session stands for it: it writes the own preamble, and takes
// the peer's out of what is read. found is called, during a read, if the peer describes its workload. Call it before the
// connection is read or written. It reports whether there is an exchange.
func (s *Session) Exchange(e *peers.Exchange, found func(*flow.Workload)) bool {
	if s.Protocol != peers.Protocol || e == nil {
		return false
	}
	s.raw.Replace(&metadata{Layer: s.layer, raw: s.raw, preamble: e.Reader(found)})
	_, _ = s.layer.Write(e.Preamble()) // the error of it is that of every later write
	return true
}

// metadata takes the preamble out of what the layer below has decoded. It goes when all that came with the preamble is read.
type metadata struct {
	tcp.Layer
	raw      *tcp.Socket
	preamble *peers.Preamble
	rest     []byte // behind the preamble, and not returned yet
	ended    bool   // the preamble is whole, or there is none
}

// Read implements tcp.Layer.
func (m *metadata) Read(p []byte) (int, error) {
	for !m.ended {
		n, err := m.Layer.Read(p)
		if n > 0 {
			var failed error
			if m.rest, m.ended, failed = m.preamble.Read(p[:n]); failed != nil {
				return 0, &Error{Failure: Protocol, Detail: failed.Error(), Err: failed}
			}
		}
		if err == io.EOF && !m.ended && m.preamble.Begun() {
			err = io.ErrUnexpectedEOF
		}
		if err != nil && len(m.rest) == 0 {
			return 0, err
		}
	}
	n := copy(p, m.rest) // it may be a part of p itself
	if m.rest = m.rest[n:]; len(m.rest) > 0 {
		return n, nil
	}
	if m.raw.Replace(m.Layer); n == 0 {
		return m.Layer.Read(p)
	}
	return n, nil
}

// Buffered implements tcp.Layer.
func (m *metadata) Buffered() bool { return len(m.rest) > 0 || m.Layer.Buffered() }
