package httpforward

import (
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/http1"
	"github.com/pillion-proxy/pillion/internal/http2"
	"github.com/pillion-proxy/pillion/internal/peers"
)

// introduced is which of the fields a client has sent in which proxies describe themselves. A client that sends none does not
// expect them in the response, and may be no proxy.
type introduced struct{ metadata, id bool }

// readsRequests and readsResponses report where peers describe themselves. p may be nil.
func (p *PeerFields) readsRequests() bool  { return p != nil && p.Exchange != nil && !p.Introduces }
func (p *PeerFields) readsResponses() bool { return p != nil && p.Exchange != nil && p.Introduces }

// describe sets the workload in a record of a request from the description that came with it. Without one it stays that of
// the connection.
func describe[T string | []byte](c *Connection, r *flow.Record, description T) {
	if w := peers.Find(c.Peers.Exchange, description); w != nil && r.Security.Agrees(w) {
		r.Workload.Set(w)
	}
}

// meet reads the description of the peer in a head of HTTP/1.
func (c *Connection) meet(r *flow.Record, h *http1.Head, b []byte) (by introduced) {
	if i := h.Find(http1.PeerMetadata); i >= 0 {
		by.metadata = true
		describe(c, r, h.Fields[i].Value.In(b))
	}
	by.id = h.Has(http1.PeerMetadataID)
	return by
}

// meetFields is meet for the fields of a message over HTTP/2.
func (c *Connection) meetFields(r *flow.Record, fields []http2.Field) (by introduced) {
	for i := range fields {
		switch fields[i].Name {
		case peerMetadataField:
			if !by.metadata {
				by.metadata = true
				describe(c, r, fields[i].Value)
			}
		case peerMetadataIDField:
			by.id = true
		}
	}
	return by
}

// appendLines appends this proxy's own description to a head of HTTP/1.
func (p *PeerFields) appendLines(dst []byte, to introduced) []byte {
	if to.id {
		dst = append(append(dst, peerMetadataIDField+": "...), p.Exchange.ID...)
		dst = append(dst, "\r\n"...)
	}
	if to.metadata {
		dst = append(append(dst, peerMetadataField+": "...), p.Exchange.Metadata...)
		dst = append(dst, "\r\n"...)
	}
	return dst
}

// appendFields is appendLines for a header block.
func (p *PeerFields) appendFields(block []byte, e *http2.Encoder, to introduced) []byte {
	if to.id {
		block = e.AppendField(block, http2.Field{Name: peerMetadataIDField, Value: p.Exchange.ID})
	}
	if to.metadata {
		block = e.AppendField(block, http2.Field{Name: peerMetadataField, Value: p.Exchange.Metadata})
	}
	return block
}
