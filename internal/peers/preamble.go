package peers

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/wire"
)

// The preamble of each direction of a TCP connection: magic, the length of what follows in 4 bytes, and a
// google.protobuf.Any with a Struct. The Struct has the description and the node's ID, under the names of the header fields.
const (
	headerLength = 8
	structType   = "type.googleapis.com/google.protobuf.Struct"

	metadataKey   = "x-envoy-peer-metadata"
	metadataIDKey = "x-envoy-peer-metadata-id"

	// maxPreamble is the longest preamble that is skipped. A longer one is an error.
	maxPreamble = 64 << 10
)

var magic = []byte{0x3d, 0x23, 0x04, 0x67}

// Protocol is the ALPN of TCP connections that begin with a preamble.
const Protocol = "istio-peer-exchange"

// appendPreamble appends the preamble of a node.
func appendPreamble(dst []byte, id string, metadata []byte) []byte {
	entry := func(b []byte, key string, value []byte) []byte {
		return wire.AppendBytes(b, 1, wire.AppendBytes(wire.AppendString(nil, 1, key), 2, value))
	}
	both := entry(nil, metadataKey, wire.AppendBytes(nil, structValue, metadata))
	both = entry(both, metadataIDKey, wire.AppendString(nil, stringValue, id))
	message := wire.AppendBytes(wire.AppendString(nil, 1, structType), 2, both)
	dst = append(dst, magic...)
	return append(binary.BigEndian.AppendUint32(dst, uint32(len(message))), message...)
}

// Preamble returns what this proxy sends at the start of a connection. It must not be modified.
func (e *Exchange) Preamble() []byte { return e.preamble }

// Preamble reads the preamble of a peer. Make it with Exchange.Reader.
type Preamble struct {
	exchange *Exchange
	found    func(*flow.Workload)

	header [headerLength]byte
	have   int    // bytes of header
	left   int    // bytes of the message that have not come, once the header has
	body   []byte // of the message; nil: it is skipped
}

// Reader returns a reader of a peer's preamble. It passes the workload to found if the peer describes one.
func (e *Exchange) Reader(found func(*flow.Workload)) *Preamble {
	return &Preamble{exchange: e, found: found}
}

// Begun reports whether a part of the preamble has come. The stream must not end then.
func (p *Preamble) Begun() bool { return p.have > 0 }

// Read takes the preamble out of the next bytes of a stream. Once it is whole, done is true, and rest are the bytes behind
// it. A stream that does not begin with one is returned as it is, in memory of its own if b has not all of it. A description
// that is too long is skipped: it is not kept in memory. An error means that the preamble is too long even for that.
func (p *Preamble) Read(b []byte) (rest []byte, done bool, err error) {
	if p.have < headerLength {
		begun := p.have
		n := copy(p.header[p.have:], b)
		p.have += n
		if known := min(p.have, len(magic)); !bytes.Equal(p.header[:known], magic[:known]) {
			if begun > 0 {
				b = append(bytes.Clone(p.header[:begun]), b...)
			}
			return b, true, nil
		}
		if b = b[n:]; p.have < headerLength {
			return nil, false, nil
		}
		if p.left = int(binary.BigEndian.Uint32(p.header[len(magic):])); p.left > maxPreamble {
			return nil, false, fmt.Errorf("the peer's metadata has %d bytes, more than %d", p.left, maxPreamble)
		}
		if p.left <= maxText {
			p.body = make([]byte, 0, p.left)
		}
	}
	n := min(p.left, len(b))
	if p.body != nil {
		p.body = append(p.body, b[:n]...)
	}
	if p.left -= n; p.left > 0 {
		return nil, false, nil
	}
	p.describe()
	return b[n:], true, nil
}

// describe reports the workload in the message.
func (p *Preamble) describe() {
	if len(p.body) == 0 {
		return
	}
	w := p.exchange.keep(string(p.body), func(message string) *flow.Workload { return decodeMessage([]byte(message)) })
	p.body = nil
	if w != nil {
		p.found(w)
	}
}

// decodeMessage reads the message of a preamble; nil if it is malformed or has no description.
func decodeMessage(b []byte) (w *flow.Workload) {
	var err error
	var value []byte
	kind := ""
	for m := wire.Read(b, &err); m.Next(); {
		switch m.Number {
		case 1:
			kind = m.String()
		case 2:
			value = m.Bytes()
		}
	}
	if err != nil || kind != structType {
		return nil
	}
	eachField(wire.Read(value, &err), func(key string, value wire.Message) {
		if key != metadataKey {
			return
		}
		for value.Next() {
			if value.Number == structValue {
				w = decode(value.Bytes())
			}
		}
	})
	if err != nil {
		return nil
	}
	return w
}
