package httpforward

import (
	"slices"

	"github.com/pillion-proxy/pillion/internal/http1"
	"github.com/pillion-proxy/pillion/internal/http2"
	"github.com/pillion-proxy/pillion/internal/peers"
)

// PeerFields is the treatment of fields in which proxies of a mesh describe themselves and peers: x-forwarded-client-cert of
// requests, by ClientCert; server of responses; and x-envoy-peer-metadata and x-envoy-peer-metadata-id, in which proxies describe themselves to each other.
// The latter are always removed, from requests and responses: applications must not see them, and they are not
// authenticated. In trailers of HTTP/1, removed fields are malformed, because chunk framing is not rewritten. A PeerFields
// may be shared, and is never modified.
type PeerFields struct {
	ClientCert ClientCert
	Element    string // that AppendClientCert and ReplaceClientCert add to the field

	// Exchange has this proxy's own description, and reads those of peers for records; nil: they are not exchanged. A proxy
	// that introduces itself describes itself in each request, and reads responses. Another one reads requests, and
	// describes itself to peers that have done so.
	Exchange   *peers.Exchange
	Introduces bool
	Server     string // value of server in responses; empty: the field is one like any other
	IfAbsent   bool   // Server is added to responses without the field, and replaces no other
}

// ClientCert is what becomes of x-forwarded-client-cert in a request. Several fields are forwarded as one list.
type ClientCert uint8

// The choices.
const (
	KeepClientCert    ClientCert = iota // leave the field unchanged
	RemoveClientCert                    // remove it
	AppendClientCert                    // append Element
	ReplaceClientCert                   // set it to Element
)

// Names of fields. Messages over HTTP/2 have them in lower case.
const (
	clientCertField     = "x-forwarded-client-cert"
	peerMetadataField   = "x-envoy-peer-metadata"
	peerMetadataIDField = "x-envoy-peer-metadata-id"
)

// added is more than the fields that are added to a request take, in bytes, without what they had before. p may be nil.
func (p *PeerFields) added() (n int) {
	if p == nil {
		return 0
	}
	if p.Element != "" {
		n = len(clientCertField) + len(": ,\r\n") + len(p.Element)
	}
	if p.Introduces {
		n += p.described(introduced{true, true})
	}
	return n
}

// described is how many bytes the fields of this proxy's own description take in a head of HTTP/1.
func (p *PeerFields) described(to introduced) (n int) {
	if to.metadata {
		n += len(peerMetadataField) + len(": \r\n") + len(p.Exchange.Metadata)
	}
	if to.id {
		n += len(peerMetadataIDField) + len(": \r\n") + len(p.Exchange.ID)
	}
	return n
}

// adds reports whether requests get a field.
func (p *PeerFields) adds() bool {
	return p != nil && (p.ClientCert == AppendClientCert || p.ClientCert == ReplaceClientCert)
}

// dropRequest and drop mark the fields of a head that are not forwarded. p may be nil.
func (p *PeerFields) dropRequest(h *http1.Head) {
	p.drop(h)
	if p != nil && p.ClientCert != KeepClientCert && h.Has(http1.XForwardedClientCert) {
		drop(h, http1.XForwardedClientCert)
	}
}

func (p *PeerFields) drop(h *http1.Head) {
	if p == nil {
		return
	}
	for _, k := range [...]http1.Known{http1.PeerMetadata, http1.PeerMetadataID} {
		if h.Has(k) {
			drop(h, k)
		}
	}
}

// names reports whether a response gets Server, given whether it has the field. p may be nil.
func (p *PeerFields) names(has bool) bool {
	return p != nil && p.Server != "" && !(has && p.IfAbsent)
}

// server returns the value of server in a response of our own. p may be nil.
func (p *PeerFields) server() string {
	if p == nil || p.Server == "" {
		return "pillion"
	}
	return p.Server
}

// appendLine appends the field that a request gets. h is its head, whose fields may have been dropped, and b h's buffer.
func (p *PeerFields) appendLine(dst []byte, h *http1.Head, b []byte) []byte {
	dst = append(dst, clientCertField+": "...)
	if p.ClientCert == AppendClientCert {
		for i := range h.Fields {
			if f := &h.Fields[i]; f.Known == http1.XForwardedClientCert && !f.Value.Empty() {
				dst = append(append(dst, f.Value.In(b)...), ',')
			}
		}
	}
	return append(append(dst, p.Element...), "\r\n"...)
}

// forbid returns the names that are forbidden in the trailers of a response, given those that Connection names: recipients
// may read trailers like a head. p may be nil.
func (p *PeerFields) forbid(nominated []byte) []byte {
	switch {
	case p == nil:
		return nominated
	case len(nominated) == 0:
		return onlyMetadata
	}
	return append(nominated, metadataFields...)
}

// forbidRequest is forbid for the trailers of a request.
func (p *PeerFields) forbidRequest(nominated []byte) []byte {
	switch {
	case p == nil || p.ClientCert == KeepClientCert:
		return p.forbid(nominated)
	case len(nominated) == 0:
		return onlyPeers
	}
	return append(append(nominated, metadataFields+","...), clientCertField...)
}

// The lists without names that Connection names. They are shared.
const metadataFields = peerMetadataField + "," + peerMetadataIDField

var (
	onlyMetadata = []byte(metadataFields)
	onlyPeers    = []byte(metadataFields + "," + clientCertField)
)

// drops reports whether a field of a message over HTTP/2 is not forwarded. p may be nil.
func (p *PeerFields) drops(name string) bool {
	if p == nil {
		return false
	}
	switch name {
	case peerMetadataField, peerMetadataIDField:
		return true
	case clientCertField:
		return p.ClientCert != KeepClientCert
	}
	return false
}

// changes reports whether a request with these fields is sent with others. p may be nil.
func (p *PeerFields) changes(fields []http2.Field) bool {
	if p == nil || p.adds() || p.readsResponses() {
		return p != nil
	}
	return slices.ContainsFunc(fields, func(f http2.Field) bool { return p.drops(f.Name) })
}

// appendField appends the field that a request gets to its header block, given the fields of the request.
func (p *PeerFields) appendField(block []byte, e *http2.Encoder, fields []http2.Field) []byte {
	size := 0
	if p.ClientCert == AppendClientCert {
		for i := range fields {
			if f := &fields[i]; f.Name == clientCertField && f.Value != "" {
				size += len(f.Value) + len(",")
			}
		}
	}
	if size == 0 {
		return e.AppendField(block, http2.Field{Name: clientCertField, Value: p.Element})
	}
	if e.Collects() {
		value := p.appendElements(make([]byte, 0, size+len(p.Element)), fields)
		return e.AppendLiteral(block, clientCertField, value)
	}
	return p.appendElements(http2.AppendLiteralName(block, clientCertField, size+len(p.Element)), fields)
}

// appendElements appends the elements of the request's field, and the one of the peer.
func (p *PeerFields) appendElements(dst []byte, fields []http2.Field) []byte {
	for i := range fields {
		if f := &fields[i]; f.Name == clientCertField && f.Value != "" {
			dst = append(append(dst, f.Value...), ',')
		}
	}
	return append(dst, p.Element...)
}
