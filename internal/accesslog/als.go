package accesslog

import (
	"math/bits"
	"slices"
	"sort"
	"strings"
	"time"

	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/wire"
)

// alsEntry is the form of an entry for Envoy's access log service: an HTTPAccessLogEntry or a TCPAccessLogEntry
// (envoy.data.accesslog.v3). Points in time that records do not have are left out.
type alsEntry struct {
	tcp               bool
	peers             [2]bool // those of mesh.PeerStates that are sent
	request, response []alsField
}

// alsField is a header field that is sent: its source in records, and its number in HTTPRequestProperties; 0: it is one of the
// additional fields.
type alsField struct {
	name   string
	from   source
	number int
}

// Numbers of the maps of additional fields.
const (
	alsRequestFields  = 13
	alsResponseFields = 4
)

func (e *alsEntry) append(b []byte, _ *line, r *flow.Record, lasted time.Duration) []byte {
	start := len(b)
	b = wire.Wrap(e.appendCommon(b, r, lasted), start, 1)
	start = len(b)
	if e.tcp {
		b = numberField(b, 1, r.Received.Load())
		b = numberField(b, 2, r.Sent.Load())
		return wire.Wrap(b, start, 2)
	}
	if r.Protocol >= flow.HTTP10 {
		b = numberField(b, 2, uint64(r.Protocol-flow.HTTP10)+1)
		start = len(b)
	}
	b = wire.Wrap(e.appendRequest(b, r), start, 3)
	start = len(b)
	return wire.Wrap(e.appendResponse(b, r), start, 4)
}

// alsAddresses are the fields of AccessLogCommon with addresses.
var alsAddresses = [...]struct {
	number int
	address
}{{2, downstreamRemote}, {3, downstreamLocal}, {13, upstreamRemote}, {14, upstreamLocal}, {20, downstreamDirect}}

// appendCommon appends the fields of AccessLogCommon.
func (e *alsEntry) appendCommon(b []byte, r *flow.Record, lasted time.Duration) []byte {
	b = wire.AppendDouble(b, 1, 1) // the sample rate: always 1 in Envoy
	for _, a := range alsAddresses {
		if address := a.of(r); address.IsValid() {
			start := len(b)
			b = address.Addr().AppendTo(wire.AppendTag(b, 2, 0))
			b[start+1] = byte(len(b) - start - 2) // an address is shorter than 128 bytes
			b = wire.AppendVarint(b, 3, uint64(address.Port()))
			b = wire.Wrap(wire.Wrap(b, start, 1), start, a.number)
		}
	}
	b = e.appendTLS(b, r)
	b = appendSeconds(b, 5, r.Opened.Unix(), r.Opened.Nanosecond())
	if r.HTTP.Status != 0 && r.Reason == flow.Completed {
		b = appendDuration(b, 12, lasted) // the last byte is sent when the record closes
	}
	b = textField(b, 15, r.Cluster)
	b = appendFlags(b, 16, r.Flags())
	b = textField(b, 18, r.TransportFailure)
	b = textField(b, 19, r.Route)
	b = e.appendPeer(b, r)
	b = appendDuration(b, 23, lasted)
	b = numberField(b, 24, uint64(r.Attempts))
	b = textField(b, 26, r.HTTP.ID)
	b = textField(b, 28, r.DownstreamFailure())
	return numberField(b, 33, uint64(typeOf(r)))
}

// alsUnauthorized is the one flag that is a message: it has a reason, that an external service denies the request.
const alsUnauthorized = 13

// alsReset is the number of downstream's reset. Envoy's bit of drops by load, before it, has no field.
const alsReset = 28

// appendFlags appends a message ResponseFlags. Its fields have the order of Envoy's bits, from 1.
func appendFlags(b []byte, field int, flags string) []byte {
	start := len(b)
	for left := uint64(envoy.FlagBits(flags)); left != 0; left &= left - 1 {
		n := min(bits.TrailingZeros64(left)+1, alsReset)
		if n == alsUnauthorized {
			b = wire.AppendBytes(b, n, []byte{1 << 3, 1})
		} else {
			b = numberField(b, n, 1)
		}
	}
	if len(b) == start {
		return b
	}
	return wire.Wrap(b, start, field)
}

// appendTLS appends the properties of TLS with downstream.
func (e *alsEntry) appendTLS(b []byte, r *flow.Record) []byte {
	start := len(b)
	if s := r.SecurityOf(flow.Inbound); s != nil {
		b = numberField(b, 1, uint64(slices.Index(tlsVersions[:], s.Version)+1))
		if suite := suiteNumber(s.Cipher); suite != 0 {
			inner := len(b)
			b = wire.Wrap(numberField(b, 1, suite), inner, 2)
		}
		b = textField(b, 3, r.ServerName())
		b = appendCertificate(b, 4, s.OwnCertificate, s.Own)
		b = appendCertificate(b, 5, s.PeerCertificate, s.Peer)
	} else {
		b = textField(b, 3, r.ServerName())
	}
	if len(b) == start {
		return b
	}
	return wire.Wrap(b, start, 4)
}

var tlsVersions = [...]string{"TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3"}

// suites13 are the suites of TLS 1.3, by their numbers from 0x1301.
var suites13 = [...]string{"TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256"}

func suiteNumber(name string) uint64 {
	if i := slices.Index(suites13[:], name); i >= 0 {
		return uint64(0x1301 + i)
	}
	for _, s := range mesh.Suites {
		if s.Name == name {
			return uint64(s.Number)
		}
	}
	return 0
}

// appendCertificate appends the properties of a certificate. c may be nil: only its identity is known.
func appendCertificate(b []byte, field int, c *flow.Certificate, identity string) []byte {
	start := len(b)
	names := func(number int, joined string) {
		for name := range strings.SplitSeq(joined, ",") {
			one := len(b)
			if b = textField(b, number, name); len(b) > one {
				b = wire.Wrap(b, one, 1)
			}
		}
	}
	names(1, uris(c, identity))
	if c != nil {
		names(2, c.DNS)
		b = textField(b, 2, c.Subject)
		b = textField(b, 3, c.Issuer)
	}
	if len(b) == start {
		return b
	}
	return wire.Wrap(b, start, field)
}

// workloadNames are the names of flow.WorkloadNames in order.
var workloadNames = func() (names []string) {
	for name := range flow.WorkloadNames {
		names = append(names, name)
	}
	sort.Strings(names)
	return names
}()

const structType = "type.googleapis.com/google.protobuf.Struct"

// appendPeer appends the workload of the other side as a filter state: a google.protobuf.Struct, as in Istio's proxy.
func (e *alsEntry) appendPeer(b []byte, r *flow.Record) []byte {
	w := r.Workload.Get()
	if w == nil || !e.peers[r.Direction] {
		return b
	}
	start := len(b)
	b = wire.AppendString(b, 1, mesh.PeerStates[r.Direction])
	value := len(b)
	b = wire.AppendString(b, 1, structType)
	packed := len(b)
	for _, name := range workloadNames {
		member := len(b)
		b = wire.AppendString(b, 1, name)
		inner := len(b)
		if b = textField(b, 3, flow.WorkloadNames[name](w)); len(b) == inner {
			b = b[:member]
			continue
		}
		b = wire.Wrap(wire.Wrap(b, inner, 2), member, 1)
	}
	b = wire.Wrap(b, packed, 2)
	return wire.Wrap(wire.Wrap(b, value, 2), start, 21)
}

// alsMethods are the numbers of methods, from 1 (envoy.config.core.v3.RequestMethod).
var alsMethods = [...]string{"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"}

// appendRequest appends the fields of HTTPRequestProperties.
func (e *alsEntry) appendRequest(b []byte, r *flow.Record) []byte {
	h := r.HTTP
	for i, method := range alsMethods {
		if string(h.Method) == method {
			b = numberField(b, 1, uint64(i)+1)
		}
	}
	if h.Method != nil {
		scheme := "http"
		if r.SecurityOf(flow.Inbound) != nil {
			scheme = "https"
		}
		b = textField(b, 2, scheme)
	}
	b = textField(b, 3, h.Authority)
	b = textField(b, 5, h.Path)
	b = textField(b, 6, h.UserAgent)
	b = textField(b, 8, h.ForwardedFor)
	b = textField(b, 9, h.ID)
	b = numberField(b, 12, r.Received.Load())
	return appendFields(b, alsRequestFields, e.request, h)
}

// appendResponse appends the fields of HTTPResponseProperties.
func (e *alsEntry) appendResponse(b []byte, r *flow.Record) []byte {
	h := r.HTTP
	if h.Status != 0 {
		start := len(b)
		b = wire.Wrap(numberField(b, 1, uint64(h.Status)), start, 1)
	}
	b = numberField(b, 3, r.Sent.Load())
	b = textField(b, 6, r.Details())
	return appendFields(b, alsResponseFields, e.response, h)
}

// appendFields appends header fields. Those without a number of their own go into the map.
func appendFields(b []byte, number int, fields []alsField, h *flow.Request) []byte {
	for i := range fields {
		f := &fields[i]
		value := f.from.of(h)
		switch start := len(b); {
		case value == nil:
		case f.number != 0:
			b = textField(b, f.number, value)
		default:
			b = textField(wire.AppendString(b, 1, f.name), 2, value)
			b = wire.Wrap(b, start, number)
		}
	}
	return b
}

// textField appends a string, unless it is empty. Invalid UTF-8 becomes question marks.
func textField[T text](b []byte, field int, value T) []byte {
	if len(value) == 0 {
		return b
	}
	return wire.AsText(append(wire.AppendTag(b, field, len(value)), value...), len(value))
}

// numberField appends an integer, unless it is zero.
func numberField(b []byte, field int, n uint64) []byte {
	if n == 0 {
		return b
	}
	return wire.AppendVarint(b, field, n)
}

// appendSeconds appends a google.protobuf.Timestamp or Duration.
func appendSeconds(b []byte, field int, seconds int64, nanoseconds int) []byte {
	start := len(b)
	b = numberField(numberField(b, 1, uint64(seconds)), 2, uint64(nanoseconds))
	return wire.Wrap(b, start, field)
}

func appendDuration(b []byte, field int, d time.Duration) []byte {
	return appendSeconds(b, field, int64(d/time.Second), int(d%time.Second))
}

// alsEntry returns the form of the entries of a service, and asks for what it needs in records.
func (s *Sinks) alsEntry(c *mesh.LogService) (e *alsEntry, problems []error) {
	e = &alsEntry{tcp: c.Kind == mesh.TCPLogs}
	for i, name := range mesh.PeerStates {
		e.peers[i] = slices.Contains(c.Peers, name)
	}
	s.Noted.AddCertificates()
	if e.tcp {
		return e, nil
	}
	add := func(to *[]alsField, name string, number int, base source) {
		place, err := s.Noted.Add(name, base == fromResponse)
		if err != nil {
			problems = append(problems, notRecorded(name, err))
			return
		}
		*to = append(*to, alsField{name, base + source(place), number})
	}
	add(&e.request, "referer", 7, fromRequest)
	add(&e.request, "x-envoy-original-path", 10, fromRequest)
	for _, name := range c.Request {
		if from, have := always[name]; have {
			e.request = append(e.request, alsField{name, from, 0})
			continue
		}
		add(&e.request, name, 0, fromRequest)
	}
	for _, name := range c.Response {
		add(&e.response, name, 0, fromResponse)
	}
	return e, problems
}
