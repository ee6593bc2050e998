package secure

import (
	"io"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/peers"
)

// Exchange begins the exchange of metadata if the ALPN of the session stands for it: it writes the own preamble, and takes
// the peer's out of what is read. found is called, during a read, if the peer describes its workload. Call it before the
// connection is read or written. It reports whether there is an exchange.
func (s *Session) Exchange(e *peers.Exchange, found func(*flow.Workload)) bool {
	if s.Protocol != peers.Protocol || e == nil {
		return false
	}
	s.layer.metadata = &metadata{preamble: e.Reader(found)}
	_, _ = s.layer.conn.Write(e.Preamble()) // crypto/tls returns the error of it from every later write
	return true
}

// metadata takes the preamble out of what a layer has decoded.
type metadata struct {
	preamble *peers.Preamble
	rest     []byte // behind the preamble, and not returned yet
	ended    bool   // the preamble is whole, or there is none
}

// read is layer.Read until the preamble and the bytes that came with it are read.
func (m *metadata) read(l *layer, p []byte) (int, error) {
	for !m.ended {
		n, err := l.decode(p)
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
	if l.metadata = nil; n == 0 {
		return l.decode(p)
	}
	return n, nil
}
