package httpforward

import (
	"slices"
	"strconv"
	"time"

	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/http2"
	"github.com/pillion-proxy/pillion/internal/route"
	"github.com/pillion-proxy/pillion/internal/tracing"
)

// heads makes the header blocks of a connection's messages. Both HTTP/2 engines have one.
type heads struct {
	Connection

	routed Request     // the router's argument; a field, so that it is not allocated
	fields blockFields // of routed

	entered    []http2.Field // of a request that the edge has prepared
	addedTexts repeats       // of the fields that it has added
	responded  blockFields   // of the response that is edited
	edited     *edited       // nil: no plan was carried out yet

	from string // downstream's address for x-forwarded-for; empty until first used
}

// view shows a request to the router: the whole values, of which the record may have kept parts.
func (m *heads) view(s *stream, request *http2.Request, fields []http2.Field) *Request {
	r := &m.routed
	r.view(&s.record)
	r.Seed += uint64(s.id) << 32 // streams may have been opened at the same time
	r.Method, r.Path = whole(r.Method, request.Method), whole(r.Path, request.Path)
	authority := request.Authority
	for i := 0; i < len(fields) && authority == ""; i++ {
		if fields[i].Name == "host" {
			authority = fields[i].Value
		}
	}
	r.Authority = whole(r.Authority, authority)
	if request.Scheme != "" {
		r.Scheme = readOnly(request.Scheme)
	}
	r.Upgrade = readOnly(request.Protocol)
	m.fields = ofBlock(fields)
	r.Fields = &m.fields
	return r
}

// appendFields re-encodes fields, except those that are not forwarded.
func (m *heads) appendFields(block []byte, encoder *http2.Encoder, fields []http2.Field) []byte {
	for i := range fields {
		if !m.Peers.drops(fields[i].Name) {
			block = encoder.AppendField(block, fields[i])
		}
	}
	return block
}

// changes reports whether a request is sent with other fields than those it has.
func (m *heads) changes(s *stream, fields []http2.Field, has seen) bool {
	add := &s.settings.Fields
	return m.Peers.changes(fields) || s.http.Trace != nil || m.edits(s) || add.RequestID && !has.id || add.ForwardedProto && !has.forwardedProto ||
		add.ForwardedFor == ForwardedForAppend || add.ForwardedFor == ForwardedForSetIfAbsent && !has.forwardedFor
}

// edits reports whether the head of a request is edited.
func (m *heads) edits(s *stream) bool {
	return editsRequest(s.plan) || s.normalized || len(s.edits) > 0
}

// appendRequest appends the header block of a request as it is sent upstream, with the added fields.
func (m *heads) appendRequest(block []byte, encoder *http2.Encoder, s *stream, fields []http2.Field, has seen) []byte {
	peers, edits := m.Peers, m.edits(s)
	if edits {
		block = m.appendEditedRequest(block, encoder, s, fields, has)
	} else if t := s.http.Trace; t != nil {
		block = m.appendTraced(block, encoder, fields, t)
	} else {
		block = m.appendFields(block, encoder, fields)
	}
	if peers.adds() {
		block = peers.appendField(block, encoder, fields)
	}
	if peers.readsResponses() {
		block = peers.appendFields(block, encoder, introduced{true, true})
	}
	if edits {
		return block
	}
	return m.appendAdded(block, encoder, s, has)
}

// appendAdded appends the fields that are added to a request that is not edited.
func (m *heads) appendAdded(block []byte, encoder *http2.Encoder, s *stream, has seen) []byte {
	add := &s.settings.Fields
	if add.RequestID && !has.id {
		block = encoder.AppendLiteral(block, "x-request-id", s.newID())
	}
	if add.ForwardedProto && !has.forwardedProto {
		block = encoder.AppendField(block, http2.Field{Name: "x-forwarded-proto", Value: "http"})
	}
	if add.ForwardedFor == ForwardedForAppend || add.ForwardedFor == ForwardedForSetIfAbsent && !has.forwardedFor {
		if m.from == "" {
			m.from = string(appendAddress(nil, m.Record.Downstream.Addr()))
		}
		block = encoder.AppendField(block, http2.Field{Name: "x-forwarded-for", Value: m.from})
	}
	return block
}

// recordResponse records the head of a final response. after is the time since its request was sent.
func (m *heads) recordResponse(s *stream, status int, after time.Duration, fields []http2.Field) {
	r := &s.http
	r.Status, r.Details, r.ServiceTime = status, envoy.DetailsViaUpstream, after
	if m.Peers.readsResponses() {
		m.meetFields(&s.record, fields)
	}
	r.ResponseFields = s.nameFields(r.ResponseFields, fields, s.settings.noted(true))
	if s.settings.Note.Heads {
		r.ResponseHead = headText(fields)
	}
	r.ResponseBody = s.settings.Note.Bodies.Begin()
	if s.lease != nil {
		s.noteResponse(fields)
	}
}

// appendResponse appends the header block of a final response as it is sent downstream.
func (m *heads) appendResponse(block []byte, encoder *http2.Encoder, s *stream, fields []http2.Field) []byte {
	timed, named, echoes := s.settings.Fields.ServiceTime, m.names(fields), s.repliesToID()
	var e *edited
	if editsResponse(s.plan) {
		e = m.editResponse(s, fields)
	}
	for i := range fields {
		if e != nil && i > 0 && e.gone[i-1] { // behind :status
			continue
		}
		switch fields[i].Name {
		case "grpc-status":
			s.recordGRPCStatus(fields[i].Value)
		case serviceTimeField:
			if timed {
				continue // an agent between here and the server set it; our time includes that agent's
			}
		case serverField:
			if named {
				continue
			}
		case requestIDField:
			if echoes {
				continue
			}
		case peerMetadataField, peerMetadataIDField:
			if m.Peers != nil {
				continue
			}
		}
		block = encoder.AppendField(block, fields[i])
	}
	if e != nil {
		e.fields = nil
		block = e.appendBlock(block, encoder)
	} else if named {
		block = encoder.AppendField(block, http2.Field{Name: serverField, Value: m.Peers.Server})
	}
	if timed {
		value := strconv.FormatInt(s.http.ServiceTime.Milliseconds(), 10)
		block = encoder.AppendField(block, http2.Field{Name: serviceTimeField, Value: value})
	}
	if echoes {
		block = encoder.AppendLiteral(block, requestIDField, s.http.ID)
	}
	block = m.Peers.appendFields(block, encoder, s.introduced)
	return block
}

// repliesToID reports whether the response gets the ID of the request.
func (s *stream) repliesToID() bool { return s.settings.edge.repliesToID() && len(s.http.ID) > 0 }

// names reports whether a response with these fields gets the server's name.
func (m *heads) names(fields []http2.Field) bool {
	if m.Peers == nil || m.Peers.Server == "" {
		return false
	}
	return m.Peers.names(slices.ContainsFunc(fields, func(f http2.Field) bool { return f.Name == serverField }))
}

const (
	serviceTimeField = "x-envoy-upstream-service-time"
	serverField      = "server"
)

// takeEdited returns the edits of a stream's request, for the request that the router has just seen.
func (m *heads) takeEdited(s *stream) *edited {
	if m.edited == nil {
		m.edited = new(edited)
	}
	m.edited.record = &s.record
	m.edited.describe(&m.routed)
	return m.edited
}

// editRequest makes the edits of a request, and returns them with the fields that the engine adds.
func (m *heads) editRequest(s *stream, has seen) *edited {
	e, p, add := m.edited, s.plan, &s.settings.Fields
	e.begin(&m.fields)
	for i := range m.fields.list {
		name := m.fields.list[i].Name
		e.gone[i] = m.Peers.drops(name) || p.RewritesHost && name == "host" && len(m.routed.Authority) > 0 ||
			s.http.Trace != nil && tracing.Replaces(s.http.Trace, name)
	}
	if add.RequestID && !has.id {
		from := len(e.values)
		e.values = append(e.values, s.newID()...)
		e.add("x-request-id", from)
	}
	e.addTrace(s.http.Trace)
	if add.ForwardedProto && !has.forwardedProto {
		e.addText("x-forwarded-proto", "http")
	}
	if add.ForwardedFor == ForwardedForAppend || add.ForwardedFor == ForwardedForSetIfAbsent && !has.forwardedFor {
		from := len(e.values)
		e.values = appendAddress(e.values, m.Record.Downstream.Addr())
		e.add("x-forwarded-for", from)
	}
	e.apply(s.edits)
	e.apply(p.RequestEdits)
	if ms := s.limits.expected().Milliseconds(); ms > 0 {
		e.remove(expectedTimeoutField)
		e.addNumber(expectedTimeoutField, ms)
	}
	if p.CountAttempts {
		e.remove(attemptCountField)
		e.addNumber(attemptCountField, int64(s.retries)+1)
	}
	return e
}

// appendEditedRequest appends the header block of a request that its plan changes.
func (m *heads) appendEditedRequest(block []byte, encoder *http2.Encoder, s *stream, fields []http2.Field, has seen) []byte {
	p := s.plan
	e := m.editRequest(s, has)
	pseudo := len(fields) - len(m.fields.list)
	hosted := false
	for i := range fields[:pseudo] {
		switch f := &fields[i]; {
		case f.Name == ":path" && s.normalized && !p.RewritesPath:
			block = encoder.AppendField(block, http2.Field{Name: f.Name, Value: string(m.routed.Path)})
		case f.Name == ":path" && p.RewritesPath && f.Value[0] == '/':
			block = encoder.AppendField(block, http2.Field{Name: f.Name, Value: string(p.AppendPath(nil, m.routed.Path))})
		case f.Name == ":authority" && p.RewritesHost:
			hosted = true
			block = encoder.AppendField(block, http2.Field{Name: f.Name, Value: string(p.AppendHost(nil, m.routed.Authority))})
		default:
			block = encoder.AppendField(block, *f)
		}
	}
	block = e.appendBlock(block, encoder)
	if p.RewritesHost && !hosted && len(m.routed.Authority) > 0 { // it came as host
		block = encoder.AppendField(block, http2.Field{Name: "host", Value: string(p.AppendHost(nil, m.routed.Authority))})
	}
	return block
}

// editResponse makes the edits of a response with these fields.
func (m *heads) editResponse(s *stream, fields []http2.Field) *edited {
	e, p := m.edited, s.plan
	e.record = &s.record
	e.request = route.Request{
		Method: s.http.Method, Path: s.http.Path, Authority: s.http.Authority, Scheme: schemeOf(s.record.Connection),
		Fields: &s.asked, Downstream: s.record.Downstream, Local: s.record.OriginalDestination, GRPC: s.http.GRPC,
	}
	m.responded = ofBlock(fields)
	e.begin(&m.responded)
	e.response = &m.responded
	if m.names(fields) {
		e.remove(serverField)
		e.addText(serverField, m.Peers.Server)
	}
	if p.CountInResponses {
		e.remove(attemptCountField)
		e.addNumber(attemptCountField, int64(s.retries)+1)
	}
	e.apply(p.ResponseEdits)
	e.response = nil
	return e
}

// appendMade appends the fields of a made reply, except those of its framing, with the edits of its plan.
func (m *heads) appendMade(block []byte, encoder *http2.Encoder, s *stream) []byte {
	e := m.takeEdited(s)
	e.begin(nil)
	for i := range s.made.Fields {
		if f := &s.made.Fields[i]; editable(f.Name) && (f.Name != "content-type" || !s.http.GRPC) {
			e.addText(f.Name, f.Value)
			e.sanitize(e.added[len(e.added)-1].from)
		}
	}
	if s.plan != nil && s.made.Edited {
		if s.plan.CountInResponses {
			e.addNumber(attemptCountField, int64(s.retries)+1)
		}
		e.apply(s.plan.ResponseEdits)
	}
	return e.appendBlock(block, encoder)
}
