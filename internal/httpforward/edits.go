package httpforward

import (
	"net/netip"
	"strconv"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/route"
)

// edited is a message whose fields are changed by a plan: those that arrived, of which some are not sent, and those that are
// added. Both engines write it in their own form. Its memory is kept from one message to the next.
type edited struct {
	request route.Request // as it was received
	record  *flow.Record  // of the request

	fields   HeaderFields // of the message that is edited, as they were received; nil: it has no such fields
	response HeaderFields // the same of a response; nil: the message is a request
	gone     []bool       // of fields: not sent
	added    []addition
	values   []byte // of added
}

// addition is a field that is added.
type addition struct {
	name     string
	from, to int // of its value
	gone     bool
}

// begin prepares for the edits of a message with these fields.
func (e *edited) begin(fields HeaderFields) {
	e.fields, e.gone, e.added, e.values = fields, e.gone[:0], e.added[:0], e.values[:0]
	if fields == nil {
		return
	}
	for range fields.Len() {
		e.gone = append(e.gone, false)
	}
}

// clear drops what belongs to a request.
func (e *edited) clear() {
	clear(e.added)
	values := e.values[:0]
	if cap(values) > smallPiece {
		values = nil
	}
	gone, added := e.gone[:0], e.added[:0]
	*e = edited{} // a literal with fields would be built on the stack first
	e.gone, e.added, e.values = gone, added, values
}

// add adds a field whose value the caller appends to values behind from.
func (e *edited) add(name string, from int) {
	e.added = append(e.added, addition{name: name, from: from, to: len(e.values)})
}

// addText adds a field.
func (e *edited) addText(name, value string) {
	from := len(e.values)
	e.values = append(e.values, value...)
	e.add(name, from)
}

// addNumber adds a field with a number.
func (e *edited) addNumber(name string, n int64) {
	from := len(e.values)
	e.values = strconv.AppendInt(e.values, n, 10)
	e.add(name, from)
}

// value returns the value of an added field.
func (e *edited) value(a *addition) []byte { return e.values[a.from:a.to] }

// has reports whether a field with the name is sent.
func (e *edited) has(name string) bool {
	for i := range e.gone {
		if !e.gone[i] {
			if n, _ := e.fields.At(i); sameName(n, name) {
				return true
			}
		}
	}
	for i := range e.added {
		if !e.added[i].gone && e.added[i].name == name {
			return true
		}
	}
	return false
}

// remove removes all fields with the name.
func (e *edited) remove(name string) {
	for i := range e.gone {
		if !e.gone[i] {
			n, _ := e.fields.At(i)
			e.gone[i] = sameName(n, name)
		}
	}
	for i := range e.added {
		e.added[i].gone = e.added[i].gone || e.added[i].name == name
	}
}

// apply makes edits, in their order.
func (e *edited) apply(edits []route.Edit) {
	for i := range edits {
		if edit := &edits[i]; editable(edit.Name) {
			e.edit(edit)
		}
	}
}

func (e *edited) edit(edit *route.Edit) {
	switch {
	case edit.Remove:
		e.remove(edit.Name)
		return
	case edit.Action == mesh.AddIfAbsent && e.has(edit.Name), edit.Action == mesh.OverwriteIfPresent && !e.has(edit.Name):
		return
	}
	from := len(e.values)
	e.values = edit.AppendValue(e.values, e)
	if len(e.values) == from && !edit.KeepEmpty {
		return
	}
	if edit.Action == mesh.OverwriteOrAdd || edit.Action == mesh.OverwriteIfPresent {
		e.remove(edit.Name)
	}
	e.add(edit.Name, from)
}

// sanitize replaces the bytes of a value that would end its line. A formatted value may have bytes of a client in it.
func (e *edited) sanitize(from int) {
	for i, c := range e.values[from:] {
		if c == '\r' || c == '\n' || c == 0 {
			e.values[from+i] = ' '
		}
	}
}

// editable reports whether edits may concern a field. Those that frame a message, or belong to one connection, are the
// engine's own: a recipient would read a message whose framing is edited as two.
func editable(name string) bool {
	switch name {
	case "connection", "keep-alive", "proxy-connection", "transfer-encoding", "content-length", "te", "upgrade", "http2-settings", "host":
		return false
	}
	return name != "" && name[0] != ':'
}

// sameName reports whether a field's name is lower, a text in lower case.
func sameName(name []byte, lower string) bool {
	if len(name) != len(lower) {
		return false
	}
	for i, c := range name {
		if 'A' <= c && c <= 'Z' {
			c += 'a' - 'A'
		}
		if c != lower[i] {
			return false
		}
	}
	return true
}

// Request implements route.Context.
func (e *edited) Request() route.Request { return e.request }

// ResponseFields implements route.Context.
func (e *edited) ResponseFields() route.Fields { return e.response }

// AppendOperator implements route.Context.
func (e *edited) AppendOperator(dst []byte, o route.Operator) []byte {
	r, c := e.record, e.record.Connection
	switch o {
	case route.DownstreamRemoteAddress:
		return appendEndpoint(dst, r.Downstream)
	case route.DownstreamDirectRemoteAddress:
		return appendEndpoint(dst, r.Direct())
	case route.DownstreamRemoteHost:
		return appendHost(dst, r.Downstream)
	case route.DownstreamDirectRemoteHost:
		return appendHost(dst, r.Direct())
	case route.DownstreamRemotePort:
		return appendPort(dst, r.Downstream)
	case route.DownstreamDirectRemotePort:
		return appendPort(dst, r.Direct())
	case route.DownstreamLocalAddress:
		return appendEndpoint(dst, r.OriginalDestination)
	case route.DownstreamLocalHost:
		return appendHost(dst, r.OriginalDestination)
	case route.DownstreamLocalPort:
		return appendPort(dst, r.OriginalDestination)
	case route.DownstreamPeerURISAN, route.DownstreamLocalURISAN:
		return appendIdentity(dst, c, o == route.DownstreamLocalURISAN)
	case route.RequestedServerName:
		return append(dst, c.TLS().ServerName...)
	case route.Protocol:
		return append(dst, r.Protocol.String()...)
	case route.StartTime:
		return r.Opened.UTC().AppendFormat(dst, "2006-01-02T15:04:05.000Z07:00")
	case route.RouteName:
		return append(dst, r.Route...)
	case route.UpstreamCluster:
		return append(dst, r.Cluster...)
	case route.UpstreamHost, route.UpstreamRemoteAddress:
		return appendEndpoint(dst, r.Upstream)
	case route.ResponseFlags:
		return append(dst, r.HTTP.Flags...)
	case route.ResponseCodeDetails:
		return append(dst, r.HTTP.Details...)
	}
	return dst // Hostname, DownstreamPeerSubject, VirtualClusterName: not known here
}

// appendIdentity appends the SPIFFE ID of downstream's TLS: our own, or the peer's.
func appendIdentity(dst []byte, connection *flow.Record, own bool) []byte {
	s := connection.SecurityOf(flow.Inbound)
	switch {
	case s == nil:
		return dst
	case own:
		return append(dst, s.Own...)
	}
	return append(dst, s.Peer...)
}

func appendEndpoint(dst []byte, a netip.AddrPort) []byte {
	if !a.IsValid() {
		return dst
	}
	return a.AppendTo(dst)
}

func appendHost(dst []byte, a netip.AddrPort) []byte {
	if !a.IsValid() {
		return dst
	}
	return a.Addr().AppendTo(dst)
}

func appendPort(dst []byte, a netip.AddrPort) []byte {
	if !a.IsValid() {
		return dst
	}
	return strconv.AppendUint(dst, uint64(a.Port()), 10)
}

// Names of fields that the engines add.
const (
	attemptCountField    = "x-envoy-attempt-count"
	expectedTimeoutField = "x-envoy-expected-rq-timeout-ms"
)

// editsRequest and editsResponse report whether a plan changes a head. Plans that do not leave its bytes as they are.
func editsRequest(p *route.Plan) bool {
	return p != nil && (p.RewritesPath || p.RewritesHost || p.CountAttempts || p.Timeout > 0 || len(p.RequestEdits) > 0)
}

func editsResponse(p *route.Plan) bool {
	return p != nil && (p.CountInResponses || len(p.ResponseEdits) > 0)
}
