package httpforward

import (
	"bytes"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/http1"
	"github.com/pillion-proxy/pillion/internal/http2"
	"github.com/pillion-proxy/pillion/internal/mesh"
)

// Edge is the treatment of requests from clients outside of the mesh, as Envoy has it with use_remote_address. The fields in
// which proxies describe a client to those behind them are set from the connection, and a client's own are removed. Routers,
// policies and records see the request afterwards. An Edge is never modified, and may be shared.
//
// All x-envoy- fields of a client are removed. Envoy removes a list of them, and each of its advisories has made that longer.
type Edge struct {
	TrustedHops int            // proxies before the peer whose fields are trusted
	Internal    []netip.Prefix // clients whose x-envoy- fields are kept, if no proxy forwards for them

	KeepFor bool // x-forwarded-for is not appended
	Port    bool // x-forwarded-port is set
	ID      bool // requests get an x-request-id
	KeepID  bool // that of a client is kept

	Underscores mesh.Underscores // of the names of fields

	StripPort       Strip // removes the port from the host of requests other than CONNECT
	StripDot        bool  // removes the dot at the end of the host's name
	AlwaysReplyToID bool  // responses get the x-request-id of their request

	// Limits that replace those of Settings; zero: they do not.
	MaxHeadBytes, MaxHeadFields int
	HeadTimeout                 time.Duration
	IdleTimeout                 time.Duration // of a connection without requests
	SilenceTimeout              time.Duration // of a request of which no byte moves
	RequestTimeout              time.Duration // until the whole request has arrived; zero: no limit

	limited atomic.Pointer[limitedSettings]
}

// Strip is which ports are removed from hosts.
type Strip uint8

// The choices.
const (
	KeepPort  Strip = iota
	StripOwn        // the port at which the client has arrived
	StripEach       // each
)

// Edges may be implemented by a Router whose connections come from outside of the mesh.
type Edges interface {
	// Edge returns the treatment of the next request; nil: it is one from inside of the mesh. The goroutine of the connection
	// calls it for each request.
	Edge() *Edge
}

// limitedSettings are the settings with the limits of an Edge.
type limitedSettings struct {
	Settings
	from *Settings
}

// current returns the settings for the next request of c.
func (e *Engine) current(c *Connection) *Settings {
	settings := e.settings.Load()
	if edges, ok := c.Router.(Edges); ok {
		if edge := edges.Edge(); edge != nil {
			return edge.limit(settings)
		}
	}
	return settings
}

// limit returns settings with the limits of e. They are made once.
func (e *Edge) limit(settings *Settings) *Settings {
	if known := e.limited.Load(); known != nil && known.from == settings {
		return &known.Settings
	}
	made := &limitedSettings{*settings, settings}
	s := &made.Settings
	s.edge, s.unlimited = e, settings
	s.Fields.ForwardedFor, s.Fields.ForwardedProto, s.Fields.RequestID = ForwardedForOff, false, false
	if e.MaxHeadBytes > 0 {
		s.MaxHeadBytes = e.MaxHeadBytes
	}
	if e.MaxHeadFields > 0 {
		s.MaxHeadFields = e.MaxHeadFields
	}
	if e.HeadTimeout > 0 {
		s.HeadTimeout = e.HeadTimeout
	}
	s.IdleTimeout = shorter(e.SilenceTimeout, settings.IdleTimeout)
	e.limited.Store(made)
	return s
}

// betweenRequests returns how long a connection without requests may last.
func (s *Settings) betweenRequests() time.Duration {
	if s.edge == nil {
		return s.IdleTimeout
	}
	return shorter(s.edge.IdleTimeout, s.unlimited.IdleTimeout)
}

// shorter returns the shorter of two limits. Zero and less do not limit.
func shorter(a, b time.Duration) time.Duration {
	if a <= 0 || b > 0 && b < a {
		return b
	}
	return a
}

// Names of fields that the edge sets.
const (
	forwardedForField    = "x-forwarded-for"
	forwardedProtoField  = "x-forwarded-proto"
	forwardedPortField   = "x-forwarded-port"
	externalAddressField = "x-envoy-external-address"
	internalField        = "x-envoy-internal"

	forwardedFamily = "x-forwarded-"
)

// maxEdgeFields is more than the fields that the edge adds.
const maxEdgeFields = 8

// enter prepares a request with these fields in to: the fields that are gone, and those that are added. It records the client's
// address. It reports false if a name is rejected.
func (e *Edge) enter(to *edited, fields HeaderFields, r *flow.Record) (accepted bool) {
	to.begin(fields)
	peer := r.Connection.Downstream.Addr()
	client := peer
	r.HTTP.Edge = true
	if e.TrustedHops > 0 {
		client = ForwardedAddress(fields, e.TrustedHops-1, peer)
	}
	if client != peer {
		r.Downstream = netip.AddrPortFrom(client, 0)
	}
	internal := !to.has(forwardedForField) && slices.ContainsFunc(e.Internal, func(p netip.Prefix) bool { return p.Contains(client.Unmap()) })
	forwarded := 0
	for i := range fields.Len() {
		name, value := fields.At(i)
		switch {
		case e.Underscores != mesh.AllowUnderscores && slices.Contains(name, '_'):
			if e.Underscores == mesh.RejectUnderscores {
				return false
			}
			to.gone[i] = true
		case disguised(name):
			to.gone[i] = true
		case sameName(name, forwardedForField):
			if !e.KeepFor {
				to.gone[i] = true
				to.values = append(append(to.values, value...), ',')
				forwarded = len(to.values)
			}
		case envoyField(name):
			to.gone[i] = !internal || sameName(name, internalField) || sameName(name, externalAddressField)
		case sameName(name, requestIDField):
			to.gone[i] = e.ID && !e.KeepID && !internal
		case sameName(name, forwardedProtoField):
			to.gone[i] = e.TrustedHops == 0
		case sameName(name, forwardedPortField):
			to.gone[i] = e.Port && e.TrustedHops == 0
		}
	}
	if !e.KeepFor {
		to.values = appendAddress(to.values[:forwarded], peer)
		to.add(forwardedForField, 0)
	}
	e.add(to, r.Connection, client, internal)
	return true
}

// add adds the fields that the request is to have, and does not have.
func (e *Edge) add(to *edited, c *flow.Record, client netip.Addr, internal bool) {
	if !to.has(forwardedProtoField) {
		to.addText(forwardedProtoField, string(schemeOf(c)))
	}
	if e.Port && !to.has(forwardedPortField) {
		to.addNumber(forwardedPortField, int64(c.OriginalDestination.Port()))
	}
	if e.ID && !to.has(requestIDField) {
		from := len(to.values)
		to.values = appendUUID(to.values)
		to.add(requestIDField, from)
	}
	if internal {
		to.addText(internalField, "true")
		return
	}
	from := len(to.values)
	to.values = appendAddress(to.values, client)
	to.add(externalAddressField, from)
}

// envoyField reports whether a field is one of those by which Envoys are controlled and report to each other.
func envoyField(name []byte) bool { return ofFamily(name, "x-envoy-") }

// disguised reports whether a name with underscores is one of those that the edge sets or removes for applications that read
// underscores and hyphens alike, as those of CGI and WSGI do.
func disguised(name []byte) bool {
	if !slices.Contains(name, '_') {
		return false
	}
	plain := bytes.ReplaceAll(name, []byte{'_'}, []byte{'-'})
	return envoyField(plain) || ofFamily(plain, forwardedFamily) || sameName(plain, requestIDField)
}

// ofFamily reports whether a name begins with family, which is in lower case.
func ofFamily(name []byte, family string) bool {
	return len(name) > len(family) && sameName(name[:len(family)], family)
}

// refusesTrailer reports whether clients must not send a field in trailers, because applications may read those like a head.
// Over HTTP/1 such a trailer is malformed, over HTTP/2 it is removed, whatever Underscores is of the two.
func (e *Edge) refusesTrailer(name []byte) bool {
	return envoyField(name) || ofFamily(name, forwardedFamily) || sameName(name, requestIDField) || disguised(name) ||
		e.Underscores != mesh.AllowUnderscores && slices.Contains(name, '_')
}

// enter has the edge prepare the request whose head is in b. The head is written again and parsed, so that nothing behind it
// sees what the client has sent. It returns the bytes of that head, or the reply to a request that is rejected.
//
//go:noinline
func (x *exchange) enter(b []byte) ([]byte, *reply) {
	h, e := &x.requestHead, editions.Get().(*edited)
	defer editions.Put(e)
	defer e.clear()
	x.fields = headFields{h, b}
	edge := x.settings.edge
	if !edge.enter(e, &x.fields, &x.record) {
		return b, &replyUnderscore
	}
	if edge.RequestTimeout > 0 {
		x.arriveEnd, x.limited = x.record.Opened.Add(edge.RequestTimeout), true
	}
	for i, gone := range e.gone {
		h.Fields[i].Dropped = gone
	}
	x.arrived = h.Length
	x.entered = append(e.appendLines(h.AppendLines(x.entered[:0], b)), "\r\n"...)
	strips := edge.strips() && string(h.Method.In(b)) != http.MethodConnect
	h.Reset()
	limits := http1.Limits{Head: len(x.entered) + 1, Fields: x.settings.MaxHeadFields + maxEdgeFields}
	if _, err := h.ParseRequest(x.entered, limits); err != nil {
		return b, x.malformed(err)
	}
	for i := 0; strips && i < 2; i++ { // that of the field, and of a target in absolute form
		host := h.Value(x.entered, "host")
		if i > 0 {
			field := cap(host)
			if host = h.Authority(x.entered); cap(host) == field {
				break
			}
		}
		at := cap(x.entered) - cap(host)
		kept := edge.strip(host, x.record.OriginalDestination.Port())
		if len(kept) == len(host) {
			continue
		}
		n := copy(x.entered[at:], kept) // it is shorter
		x.entered = append(x.entered[:at+n], x.entered[at+len(host):]...)
		h.Reset()
		if _, err := h.ParseRequest(x.entered, limits); err != nil {
			return b, x.malformed(err)
		}
	}
	return x.entered, nil
}

// repliesToID reports whether responses get the x-request-id of their request. e may be nil.
func (e *Edge) repliesToID() bool { return e != nil && e.AlwaysReplyToID }

func (e *Edge) strips() bool { return e.StripPort != KeepPort || e.StripDot }

// strip returns a host without what is to be removed from it. The result may share its memory. port is that at which the
// client has arrived (Envoy's stripTrailingHostDot and stripPortFromHost).
func (e *Edge) strip(host []byte, port uint16) []byte {
	colon := bytes.LastIndexByte(host, ':')
	if colon < 0 || bytes.IndexByte(host[colon:], ']') >= 0 {
		colon = len(host)
	}
	name, suffix := host[:colon], host[colon:]
	if e.StripDot {
		name = bytes.TrimSuffix(name, []byte{'.'})
	}
	if n, err := strconv.ParseUint(string(bytes.TrimPrefix(suffix, []byte{':'})), 10, 32); err == nil &&
		(e.StripPort == StripEach || e.StripPort == StripOwn && n == uint64(port)) {
		suffix = nil
	}
	if len(name)+len(suffix) == len(host) {
		return host
	}
	return append(bytes.Clone(name), suffix...)
}

// head returns the bytes of the request's head.
func (x *exchange) head() []byte {
	if x.arrived > 0 {
		return x.entered
	}
	return x.s.Read.Bytes()
}

// headLength returns how many bytes the head of the request took.
func (x *exchange) headLength() int {
	if x.arrived > 0 {
		return x.arrived
	}
	return x.requestHead.Length
}

// enter has the edge prepare a request over HTTP/2, and returns its fields, or the reply to a request that is rejected. The
// fields are valid until the next call.
func (m *heads) enter(s *stream, request *http2.Request, fields []http2.Field) (prepared []http2.Field, rejected *reply) {
	if !s.tunnel && request.Scheme != "https" && request.Scheme != "http" {
		return fields, &replyScheme
	}
	if m.edited == nil {
		m.edited = new(edited)
	}
	e := m.edited
	m.fields = ofBlock(fields)
	if !s.settings.edge.enter(e, &m.fields, &s.record) {
		return fields, &replyUnderscore
	}
	list := append(m.entered[:0], fields[:len(fields)-len(m.fields.list)]...)
	for i, gone := range e.gone {
		if !gone {
			list = append(list, m.fields.list[i])
		}
	}
	for i := range e.added {
		list = append(list, http2.Field{Name: e.added[i].name, Value: m.addedTexts.at(i, e.value(&e.added[i]))})
	}
	if edge := s.settings.edge; edge.strips() && !s.tunnel {
		for i := range list {
			f := &list[i]
			if f.Name == ":authority" || f.Name == "host" {
				f.Value = string(edge.strip([]byte(f.Value), s.record.OriginalDestination.Port()))
			}
			if f.Name == ":authority" {
				request.Authority = f.Value
			}
		}
	}
	m.entered = list
	return list, nil
}

// trailers returns the trailers of a request over HTTP/2 without the fields that clients must not send. e may be nil.
func (e *Edge) trailers(fields []http2.Field) []http2.Field {
	if e == nil {
		return fields
	}
	return slices.DeleteFunc(fields, func(f http2.Field) bool { return e.refusesTrailer(readOnly(f.Name)) })
}

// trailers returns the trailers of the request without the fields that they must not have.
func (s *stream) trailers(fields []http2.Field) []http2.Field {
	fields = s.settings.edge.trailers(fields)
	if len(s.forbidden) == 0 {
		return fields
	}
	return slices.DeleteFunc(fields, func(f http2.Field) bool { return forbids(s.forbidden, readOnly(f.Name)) })
}

// ForwardedAddress returns the address in the x-forwarded-for of a request that skip others follow: each proxy appends the one
// from which it was reached. Without it, or if it is not an address, it is peer (Envoy's getLastAddressFromXFF).
func ForwardedAddress(fields HeaderFields, skip int, peer netip.Addr) netip.Addr {
	for i := fields.Len() - 1; i >= 0; i-- {
		name, value := fields.At(i)
		if !sameName(name, forwardedForField) {
			continue
		}
		for text := string(value); ; skip-- {
			comma := strings.LastIndexByte(text, ',')
			if skip == 0 {
				return parseAddress(text[comma+1:], peer)
			}
			if comma < 0 {
				skip--
				break
			}
			text = text[:comma]
		}
	}
	return peer
}

// parseAddress returns an address without a port. Other text is the peer.
func parseAddress(text string, peer netip.Addr) netip.Addr {
	address, err := netip.ParseAddr(strings.Trim(text, " \t"))
	if err != nil || address.Zone() != "" {
		return peer
	}
	return address.Unmap()
}

// replyUnderscore answers a request with a field whose name has an underscore, if such are rejected.
var replyUnderscore = reply{400, "Bad Request", flow.BadFraming, envoy.FlagDownstreamProtocolError, envoy.DetailsUnderscore}

// replyScheme answers a request over HTTP/2 whose scheme is not one of the web. Servers reset it, which would count as a failure
// of theirs and eject healthy ones.
var replyScheme = reply{400, "Bad Request", flow.BadFraming, envoy.FlagDownstreamProtocolError, envoy.DetailsHTTP2InvalidField}
