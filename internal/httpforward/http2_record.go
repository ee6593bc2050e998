package httpforward

import (
	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/http2"
	"github.com/pillion-proxy/pillion/internal/tracing"
)

// The record of an HTTP/2 request, and the bodies of its messages. Nothing here depends on how streams are carried
// upstream.

// body is the state of a message body.
type body struct {
	declared int64 // content-length; -1 if not declared
	got      int64
	ended    bool
	messages grpcMessages // counted for gRPC requests
}

// take counts n bytes, and reports whether they stay within the declared length.
func (b *body) take(n int) bool {
	b.got += int64(n)
	return b.declared < 0 || b.got <= b.declared
}

// whole reports whether a body that ends now has the declared length.
func (b *body) whole() bool { return b.declared < 0 || b.got == b.declared }

// seen lists which of the fields that we may add a request already has.
type seen struct{ id, forwardedFor, forwardedProto bool }

// recordRequest copies the recorded parts of a request.
func (s *stream) recordRequest(request *http2.Request, fields []http2.Field) (has seen) {
	authority, id, agent, forwardedFor := request.Authority, "", "", 0
	for i := range fields {
		switch f := &fields[i]; f.Name {
		case "x-request-id":
			id, has.id = f.Value, true
		case "x-forwarded-for":
			if !has.forwardedFor {
				forwardedFor, has.forwardedFor = i, true
			}
		case "x-forwarded-proto":
			has.forwardedProto = true
		case "content-type":
			s.http.GRPC = isGRPC(f.Value)
		case "user-agent":
			agent = f.Value
		case "host":
			if authority == "" {
				authority = f.Value
			}
		}
	}
	// A record without a request, such as that of a connection that broke before one, went to no cluster.
	c := s.record.Connection
	s.record.Cluster, s.record.Route, s.record.Security = c.Cluster, c.Route, c.Security
	s.record.Workload.Set(c.Workload.Get())
	to := &s.http
	to.Method, to.Path, to.Authority = s.name(request.Method), s.name(request.Path), s.name(authority)
	if has.id {
		to.ID = s.name(id)
	}
	if agent != "" {
		to.UserAgent = s.name(agent)
	}
	if has.forwardedFor {
		to.ForwardedFor = s.nameJoined(fields[forwardedFor:])
	}
	to.Fields = s.nameFields(to.Fields, fields, s.settings.noted(false))
	if s.settings.Note.Heads {
		to.Head = headText(fields)
	}
	to.Body = s.settings.Note.Bodies.Begin()
	return has
}

// recordGRPCStatus records grpc-status. It has a meaning in the response to a gRPC request only.
func (s *stream) recordGRPCStatus(status string) {
	if s.http.GRPC {
		s.http.GRPCStatus = s.name(status)
	}
}

// close closes the record, and returns the stream to the pool. A response whose last frames could not be written counts
// as not delivered.
func (s *stream) close(flows flow.Sink, undelivered error) {
	r := &s.record
	s.endLease(s.reason)
	if undelivered != nil && s.reason == flow.Completed {
		s.reason, s.err = flow.DownstreamLeft, undelivered
		r.HTTP.Flags, r.HTTP.Details = envoy.FlagDownstreamConnectionTermination, envoy.DetailsDownstreamLeft
	}
	r.Received.Store(uint64(s.request.got))
	r.Sent.Store(uint64(s.response.got))
	r.HTTP.Messages, r.HTTP.ResponseMessages = s.request.messages.count, s.response.messages.count
	r.Close(flows, s.reason, s.err)
	tracing.Release(r.HTTP.Trace)
	clear(r.HTTP.Fields)
	clear(r.HTTP.ResponseFields)
	s.names.clear()
	*s = stream{
		http:  flow.Request{Fields: r.HTTP.Fields[:0], ResponseFields: r.HTTP.ResponseFields[:0]},
		names: s.names,
	}
	streamPool.Put(s)
}

// name copies text into memory of the stream.
func (s *stream) name(text string) []byte { return copyValue(&s.names, text) }

// nameJoined copies the values of all fields with the first one's name as one list (RFC 9110 §5.3).
func (s *stream) nameJoined(fields []http2.Field) []byte {
	last, size := 0, -1
	for i := range fields {
		if fields[i].Name == fields[0].Name {
			size += 1 + len(fields[i].Value)
			last = i
		}
	}
	var list joined
	list.begin(&s.names, size)
	for i := range fields[:last+1] {
		if fields[i].Name == fields[0].Name {
			joinValue(&list, fields[i].Value)
		}
	}
	return endJoin(&list, fields[last].Value)
}

// nameFields appends the value of the first field of each name, or nil if there is no such field.
func (s *stream) nameFields(dst [][]byte, fields []http2.Field, names []string) [][]byte {
	for _, name := range names {
		var value []byte
		for i := range fields {
			if fields[i].Name == name {
				value = s.name(fields[i].Value)
				break
			}
		}
		dst = append(dst, value)
	}
	return dst
}

// setFailure records why a stream ends with its connection.
func (s *stream) setFailure(reason flow.Reason, err error) {
	r := &s.http
	switch reason {
	case flow.DownstreamLeft:
		r.Flags, r.Details = envoy.FlagDownstreamConnectionTermination, envoy.DetailsDownstreamLeft
	case flow.BadFraming, flow.Overload:
		r.Flags, r.Details = envoy.FlagDownstreamProtocolError, envoy.DetailsHTTP2Violation
	case flow.BadResponse:
		r.Flags, r.Details = envoy.FlagUpstreamProtocolError, replyBadResponse.details
	case flow.Loop:
		r.Flags, r.Details = replyLoop.flags, replyLoop.details
	case flow.HeadTimeout:
		r.Details = replyHeadTimeout.details
	}
	s.reason, s.err = reason, err
}

// headText returns a header block as lines of text, for flow.Fields.Heads.
func headText(fields []http2.Field) (text []byte) {
	for i := range fields {
		text = append(append(append(append(text, fields[i].Name...), ": "...), fields[i].Value...), "\r\n"...)
	}
	return text
}
