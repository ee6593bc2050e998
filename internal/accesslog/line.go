package accesslog

import (
	"bytes"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/flow"
)

// line is the memory for building a line. It caches the text of the last second, because records come in bursts.
type line struct {
	buf    []byte
	entry  []byte // for a service
	second int64
	stamp  []byte
}

// build writes r's line, with its newline, into l.buf. lasted is how long the record has been open.
func (f *Format) build(l *line, r *flow.Record, lasted time.Duration) {
	dst := l.buf[:0]
	if s := f.steadyOf(r); s == nil {
		dst = f.appendPieces(dst, f.pieces, l, r, lasted)
	} else {
		dst = f.appendPieces(dst, f.pieces[:f.steady.first], l, r, lasted)
		if len(s.text) == 0 {
			made := f.appendPieces(dst, f.pieces[f.steady.first:f.steady.end], l, r, lasted)
			s.text = append(s.text, made[len(dst):]...)
		}
		dst = append(dst, s.text...)
		dst = f.appendPieces(dst, f.pieces[f.steady.end:], l, r, lasted)
	}
	l.buf = append(dst, '\n')
}

// place is where a connection keeps its *steadyText.
var place = flow.NewPlace()

// steadyText is the part of a line that nearly all requests of a connection share. Formatting its addresses would take
// longer than the rest of the line. It is kept with the connection from its second request on, because many connections have
// only one.
type steadyText struct {
	by              *Format
	upstream, local netip.AddrPort
	cluster, route  string
	text            []byte // empty: not built yet
}

// steadyOf returns the text of the request's connection, or nil if the record is not a request or its line differs in that
// part.
func (f *Format) steadyOf(r *flow.Record) *steadyText {
	c := r.Connection
	if c == nil || r.Reason != flow.Completed || r.HTTP.Method == nil || r.HTTP.ForwardedFor != nil || r.TLS().ServerName != "" ||
		r.Downstream != c.Downstream || r.OriginalDestination != c.OriginalDestination {
		return nil
	}
	s, _ := place.Get(c).(*steadyText)
	switch {
	case s == nil && c.Requests.Load() < 2: // r is one of them
		return nil
	case s == nil:
		s = new(steadyText)
		place.Set(c, s)
	case s.by == f && s.upstream == r.Upstream && s.local == r.UpstreamLocal && s.cluster == r.Cluster && s.route == r.Route:
		return s
	}
	*s = steadyText{f, r.Upstream, r.UpstreamLocal, r.Cluster, r.Route, s.text[:0]}
	return s
}

func (f *Format) appendPieces(dst []byte, pieces []piece, l *line, r *flow.Record, lasted time.Duration) []byte {
	first := false // the members before the next one were left out
	for i := range pieces {
		p := &pieces[i]
		text := p.text
		if first {
			text, first = strings.TrimPrefix(text, ","), false
		}
		dst = append(dst, text...)
		if p.does == verbNothing {
			continue
		}
		start := len(dst)
		marked := p.style == jsonValue && !p.number
		if marked {
			dst = append(dst, '"')
		}
		value, ok := p.value(dst, l, r, lasted)
		switch {
		case !ok && p.member > 0 && f.omits:
			if dst = dst[:start-p.member]; dst[len(dst)-1] == ',' {
				dst = dst[:len(dst)-1]
			} else {
				first = true
			}
		case !ok && p.style == jsonValue:
			dst = append(dst[:start], "null"...)
		case !ok && f.omits:
			dst = dst[:start]
		case !ok:
			dst = append(dst[:start], '-')
		case marked:
			dst = append(value, '"')
		default:
			dst = value
		}
	}
	return dst
}

// value appends the value of the operator, and reports whether the record has one.
func (p *piece) value(dst []byte, l *line, r *flow.Record, lasted time.Duration) ([]byte, bool) {
	h := r.HTTP
	switch p.does {
	case verbStartTime:
		if p.layout == "" {
			return l.appendStart(dst, r.Opened), true
		}
		return appendTime(dst, r.Opened.UTC(), p.layout), true
	case verbField:
		for _, from := range p.from {
			if value := from.of(h); value != nil {
				if p.pathOnly {
					value, _, _ = bytes.Cut(value, question)
				}
				return addText(p, dst, cut(value, p.max))
			}
		}
		return dst, false
	case verbServiceTime:
		// A local reply may have replaced the head from upstream.
		if h.ServiceTime <= 0 || envoy.IsResetBeforeResponse(h.Details) {
			return dst, false
		}
		return strconv.AppendInt(dst, h.ServiceTime.Milliseconds(), 10), true
	case verbProtocol:
		if r.Protocol < flow.HTTP10 {
			return dst, false
		}
		return append(dst, r.Protocol.String()...), true
	case verbStatus:
		return strconv.AppendInt(dst, int64(h.Status), 10), true
	case verbFlags:
		if flags := r.Flags(); flags != "" {
			return addText(p, dst, flags)
		}
		return append(dst, '-'), true // also in JSON: Envoy's value without flags
	case verbDetails:
		return orMissing(p, dst, r.Details())
	case verbTermination:
		return orMissing(p, dst, r.TerminationDetails())
	case verbTransportFailure:
		return appendFailure(p, dst, r.TransportFailure)
	case verbReceived:
		return strconv.AppendUint(dst, r.Received.Load(), 10), true
	case verbSent:
		return strconv.AppendUint(dst, r.Sent.Load(), 10), true
	case verbDuration:
		return strconv.AppendInt(dst, lasted.Milliseconds(), 10), true
	case verbAttempts:
		return strconv.AppendInt(dst, int64(r.Attempts), 10), true // 0 without an attempt, as in Envoy
	case verbCluster:
		return orMissing(p, dst, r.Cluster)
	case verbAddress:
		return p.appendAddress(dst, r)
	case verbServerName:
		return orMissing(p, dst, r.ServerName())
	case verbRoute:
		return orMissing(p, dst, r.Route)
	case verbGRPCName, verbGRPCNumber:
		return appendGRPCStatus(dst, h.GRPCStatus, p.does == verbGRPCName)
	case verbPeerName, verbOwnName, verbTLSVersion, verbTLSCipher:
		return orMissing(p, dst, p.ofTLS(r))
	case verbCertificate:
		return orMissing(p, dst, p.ofCertificate(r))
	case verbValidity:
		return p.appendValidity(dst, l, r)
	case verbDownstreamFailure:
		return appendFailure(p, dst, r.DownstreamFailure())
	case verbWorkload:
		return p.appendWorkload(dst, r)
	case verbDryRun:
		return p.appendDryRun(dst, h.DryRun)
	case verbDirection:
		if r.Direction == flow.Inbound {
			return append(dst, "INBOUND"...), true
		}
		return append(dst, "OUTBOUND"...), true
	case verbTraceID, verbSpanID:
		return p.appendTrace(dst, h.Trace)
	case verbReason:
		return append(dst, r.Reason...), r.Reason != ""
	case verbOwn:
		return orMissing(p, dst, p.own)
	}
	return dst, false // verbMissing
}

var question = []byte("?")

// of returns the value of the field, or nil if the message lacks it.
func (s source) of(h *flow.Request) []byte {
	switch s {
	case fromMethod:
		return h.Method
	case fromPath:
		return h.Path
	case fromAuthority:
		return h.Authority
	case fromUserAgent:
		return h.UserAgent
	case fromForwardedFor:
		return h.ForwardedFor
	case fromID:
		return h.ID
	}
	fields, i := h.Fields, int(s-fromRequest)
	if s >= fromResponse {
		fields, i = h.ResponseFields, int(s-fromResponse)
	}
	if i >= len(fields) {
		return nil // the request ended before these fields were recorded
	}
	return fields[i]
}

// cut returns at most max bytes of value, and does not split a rune.
func cut(value []byte, max int) []byte {
	if max < 0 || len(value) <= max {
		return value
	}
	for back := 0; back < 3 && max > 0 && value[max]&0xc0 == 0x80; back++ {
		max--
	}
	return value[:max]
}

// ofTLS returns a fact about TLS with the side that the operator names; empty if the agent does not speak TLS with it.
func (p *piece) ofTLS(r *flow.Record) string {
	s := r.SecurityOf(p.side)
	if s == nil {
		return ""
	}
	switch p.does {
	case verbPeerName:
		return uris(s.PeerCertificate, s.Peer)
	case verbOwnName:
		return uris(s.OwnCertificate, s.Own)
	case verbTLSVersion:
		return s.Version
	}
	return s.Cipher
}

// appendFailure appends a failure as one word.
func appendFailure(p *piece, dst []byte, text string) ([]byte, bool) {
	const escaped = `\x20` // of a space in the bare style
	start := len(dst)
	dst, ok := orMissing(p, dst, text)
	end := start
	for i := start; i < len(dst); {
		b, size := dst[i], 1
		switch rest := dst[i:]; {
		case b == ' ':
			b = '_'
		case len(rest) >= len(escaped) && string(rest[:len(escaped)]) == escaped:
			b, size = '_', len(escaped)
		case b == '\\' && len(rest) > 1: // another escape, or a backslash
			dst[end] = b
			end, i, b = end+1, i+1, rest[1]
		}
		dst[end] = b
		end, i = end+1, i+size
	}
	return dst[:end], ok
}

// orMissing is addText, except that an empty value counts as missing.
func orMissing(p *piece, dst []byte, value string) ([]byte, bool) {
	if value == "" {
		return dst, false
	}
	return addText(p, dst, value)
}

// addText appends a value in the style of the piece, cut to the space left in the line. An empty value counts as missing in
// the bare style, where the field would vanish.
func addText[T text](p *piece, dst []byte, value T) ([]byte, bool) {
	room := min(maxValue, maxLine-p.reserve-len(dst))
	return appendText(dst, value, p.style, room), len(value) > 0 || p.style != bare
}

func (p *piece) appendAddress(dst []byte, r *flow.Record) ([]byte, bool) {
	switch a := p.address.of(r); {
	case !a.IsValid():
		return dst, false
	case p.part == withoutPort:
		return a.Addr().AppendTo(dst), true
	case p.part == onlyPort:
		return strconv.AppendUint(dst, uint64(a.Port()), 10), true
	default:
		return a.AppendTo(dst), true
	}
}

// of returns the address in a record; invalid: the record does not have it.
func (a address) of(r *flow.Record) netip.AddrPort {
	switch a {
	case upstreamRemote:
		if r.Reason != flow.Loop {
			return r.Upstream
		}
	case upstreamLocal:
		return r.UpstreamLocal
	case downstreamLocal:
		return r.OriginalDestination
	case downstreamRemote:
		if last := r.HTTP.ForwardedFor; last != nil && !r.HTTP.Edge {
			last = bytes.TrimSpace(last[bytes.LastIndexByte(last, ',')+1:])
			if forwarded := parseIP(last); forwarded.IsValid() {
				return netip.AddrPortFrom(forwarded, 0)
			}
		}
		return r.Downstream
	case downstreamDirect:
		return r.Direct()
	}
	return netip.AddrPort{}
}

// parseIP parses an address. A zone in client-supplied text is rejected. netip's parser allocates, because its error keeps
// the argument; IPv4, the common case, avoids that.
func parseIP(text []byte) netip.Addr {
	if a, ok := parseIPv4(text); ok {
		return a
	}
	if len(text) > len("ffff:ffff:ffff:ffff:ffff:ffff:255.255.255.255") || bytes.IndexByte(text, ':') < 0 {
		return netip.Addr{}
	}
	a, err := netip.ParseAddr(string(text))
	if err != nil || a.Zone() != "" {
		return netip.Addr{}
	}
	return a
}

func parseIPv4(text []byte) (netip.Addr, bool) {
	var octets [4]byte
	at, value, digits := 0, 0, 0
	for _, b := range text {
		switch {
		case b == '.' && digits > 0 && at < 3:
			octets[at] = byte(value)
			at, value, digits = at+1, 0, 0
		case b >= '0' && b <= '9' && (digits == 0 || value > 0): // no leading zero
			value = value*10 + int(b-'0')
			if digits++; value > 255 {
				return netip.Addr{}, false
			}
		default:
			return netip.Addr{}, false
		}
	}
	octets[at] = byte(value)
	return netip.AddrFrom4(octets), at == 3 && digits > 0
}

// appendGRPCStatus appends the name of a status if byName is set and it has one, and otherwise its number. Text that is not
// a number of at most nine digits counts as missing.
func appendGRPCStatus(dst, status []byte, byName bool) ([]byte, bool) {
	number := 0
	for _, b := range status {
		if b < '0' || b > '9' {
			return dst, false
		}
		number = number*10 + int(b-'0')
	}
	switch {
	case len(status) == 0 || len(status) > 9:
		return dst, false
	case byName && number < envoy.GRPCCodes:
		return append(dst, envoy.GRPCCode(number).EnvoyName()...), true
	}
	return strconv.AppendInt(dst, int64(number), 10), true
}

// appendTrace appends the ID of a trace or of its span.
func (p *piece) appendTrace(dst []byte, t *flow.Trace) ([]byte, bool) {
	switch {
	case t == nil:
		return dst, false
	case p.does == verbTraceID:
		return appendHex(dst, t.ID[:]), true
	}
	return appendHex(dst, t.Span[:]), true
}

func appendHex(dst, b []byte) []byte {
	for _, c := range b {
		dst = append(dst, hex[c>>4], hex[c&15])
	}
	return dst
}
