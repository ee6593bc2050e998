package httpforward

import (
	"errors"
	"net/http"
	"strconv"
	"time"

	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/http2"
)

// replyMisdirected answers a request that the router sends to another upstream than the connection's. The stream cannot
// be carried there, because its number and windows belong to this upstream connection, and must not be carried here
// (RFC 9110 §15.5.20: the client may repeat it on another connection).
var replyMisdirected = reply{421, "Misdirected Request", flow.UpstreamUnreachable, envoy.FlagNoRouteFound, envoy.DetailsMisdirected}

var errMisdirected = errors.New("the request is routed to another upstream than its HTTP/2 connection")

// replyHeaderListTooLarge is replyHeadTooLarge for HTTP/2.
var replyHeaderListTooLarge = reply{replyHeadTooLarge.status, replyHeadTooLarge.body, flow.HeadTooLarge, envoy.FlagDownstreamProtocolError, envoy.DetailsHTTP2TooManyFields}

// appendReply records a reply in place of upstream, and appends its header block. gRPC clients ignore the HTTP status, so
// they get the status in trailers without a body. server is the value of that
// field, and hasBody whether the caller sends the reply's body as data.
func (s *stream) appendReply(block []byte, encoder *http2.Encoder, r *reply, server string, now time.Time, hasBody bool) []byte {
	to := &s.http
	to.Status, to.Flags, to.Details = r.status, r.flags, r.details
	if to.GRPC {
		to.Status = http.StatusOK
	}
	add := func(name, value string) { block = encoder.AppendField(block, http2.Field{Name: name, Value: value}) }
	add(":status", strconv.Itoa(to.Status))
	add("server", server)
	add("date", now.UTC().Format(http.TimeFormat))
	if s.repliesToID() {
		block = encoder.AppendLiteral(block, requestIDField, to.ID)
	}
	switch {
	case to.GRPC:
		code := r.grpcStatus()
		if s.made != nil && s.made.GRPC != nil {
			code = strconv.FormatUint(uint64(*s.made.GRPC), 10)
		}
		to.GRPCStatus = s.name(code)
		add("content-type", "application/grpc")
		add("grpc-status", code)
		add("grpc-message", r.grpcMessage())
	case r.bodiless():
	case s.made != nil && (hasBody || s.head):
		add("content-length", strconv.Itoa(len(r.body)))
	case hasBody || s.head:
		add("content-type", "text/plain")
		add("content-length", strconv.Itoa(len(r.body)))
	default:
		add("content-length", "0")
	}
	return block
}
