package httpforward

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/http1"
	"github.com/pillion-proxy/pillion/internal/http2"
	"github.com/pillion-proxy/pillion/internal/tcp"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// reply is a response that the agent generates in place of upstream. Bodies, flags and details are Envoy's, word for
// word, because alerts and searches depend on them.
type reply struct {
	status  int
	body    string
	reason  flow.Reason
	flags   string
	details string
}

// The fixed replies.
var (
	replyBadRequest     = reply{400, "Bad Request", flow.BadFraming, envoy.FlagDownstreamProtocolError, envoy.DetailsHTTP1CodecError}
	replyHeadTimeout    = reply{408, "request header timeout", flow.HeadTimeout, "", envoy.DetailsHeadTimeout}
	replyHeadTooLarge   = reply{431, "Request Header Fields Too Large", flow.HeadTooLarge, envoy.FlagDownstreamProtocolError, envoy.DetailsHTTP1HeadTooLarge}
	replyTooManyFields  = reply{431, "Request Header Fields Too Large", flow.HeadTooLarge, envoy.FlagDownstreamProtocolError, envoy.DetailsHTTP1TooManyFields}
	replyBadResponse    = resetReply(502, flow.BadResponse, envoy.FlagUpstreamProtocolError, envoy.ResetByProtocolError, "")
	replyUpstreamClosed = resetReply(503, flow.UpstreamClosed, envoy.FlagUpstreamConnectionTermination, envoy.ResetByTermination, "")
	replyLoop           = reply{503, "no healthy upstream", flow.Loop, envoy.FlagNoHealthyUpstream, envoy.DetailsNoHealthyUpstream}
	replyUncollected    = reply{503, "", flow.PolicyDenied, "UAEX", "ext_authz_error"}
	replyUnchecked      = reply{403, "", flow.PolicyDenied, "UAEX", "ext_authz_error"}
	replyRequestTimeout = reply{504, "upstream request timeout", flow.RequestTimeout, envoy.FlagUpstreamRequestTimeout, envoy.DetailsResponseTimeout}
)

var errUnchecked = errors.New("the request would have to be asked about where it cannot wait")

// resetReply is Envoy's reply when upstream sends no response. transport may be empty.
func resetReply(status int, reason flow.Reason, flags, reset, transport string) reply {
	body := "upstream connect error or disconnect/reset before headers. reset reason: " + reset
	details := reset
	if transport != "" {
		body += ", transport failure reason: " + transport
		details += "|" + transport
	}
	return reply{status, body, reason, flags, envoy.ResetBeforeResponse(details)}
}

// rejection returns Envoy's text for a handshake that upstream rejected, and "" for other errors.
func rejection(err error) string {
	if errors.Is(err, tcp.ErrHandshake) {
		return upstream.TransportFailure(err)
	}
	return ""
}

// closedReply returns the reply to a request whose upstream connection ended before the response, and the error of its
// record.
func closedReply(up *tcp.Conn, err error) (*reply, error) {
	if up.Looped() {
		return &replyLoop, upstream.ErrLoop
	}
	if errors.Is(err, tcp.ErrHandshake) {
		err = &upstream.HandshakeError{Reason: flow.UpstreamTLS, Err: err}
		r := dialReply(err, false)
		return &r, err
	}
	return &replyUpstreamClosed, err
}

// badRequests are the replies to malformed HTTP/1 requests. Their details name the rule that is broken, unless Envoy has
// details of its own.
var badRequests = func() map[http1.Error]*reply {
	replies := make(map[http1.Error]*reply)
	for _, err := range http1.Errors() {
		r := replyBadRequest
		r.details = envoy.WithRule(r.details, err.Name())
		replies[err] = &r
	}
	replies[http1.ErrHeadTooLarge], replies[http1.ErrTooManyFields] = &replyHeadTooLarge, &replyTooManyFields
	return replies
}()

// badResponse returns the reply in place of a malformed HTTP/1 response.
func badResponse(err error) reply {
	r := replyBadResponse
	r.details = envoy.ProtocolErrorBeforeResponse(ruleOfResponse(err))
	return r
}

// ruleOfResponse returns the name of the rule that a malformed HTTP/1 response breaks.
func ruleOfResponse(err error) string {
	var rule http1.Error
	switch {
	case errors.As(err, &rule):
		return rule.Name()
	case errors.Is(err, errTooManyInterim):
		return http2.TooManyInterim.Name()
	}
	var violation *http2.Error
	if errors.As(err, &violation) {
		return ruleOf(violation)
	}
	return "switched_unasked"
}

// faultError is a http1.Error with the line that it is about.
type faultError struct {
	rule error
	line string
}

// maxFault is the longest part of a line in a faultError.
const maxFault = 64

// faultOf returns err with the line of h that it is about: the name of a field, or the beginning of a start line. Values
// are left out, because they may be secret.
func faultOf(err error, h *http1.Head, b []byte) error {
	line := h.Fault.In(b)
	if len(line) == 0 {
		return err
	}
	if h.Fault.Start > h.Line.Start { // not the start line
		line, _, _ = bytes.Cut(line, []byte{':'})
	}
	return &faultError{err, string(line[:min(len(line), maxFault)])}
}

func (e *faultError) Error() string { return fmt.Sprintf("%v: %q", e.rule, e.line) }
func (e *faultError) Unwrap() error { return e.rule }

// dialReply returns the reply to a failed dial. retried is whether there was more than one attempt to reach upstream.
func dialReply(err error, retried bool) reply {
	reason, flags := upstream.Reason(err), envoy.FlagUpstreamConnectionFailure
	if retried {
		flags = envoy.FlagsConnectFailed
	}
	var r reply
	switch {
	case reason == flow.UpstreamTimeout && errors.Is(err, tcp.ErrDeadline):
		r = resetReply(503, reason, flags, envoy.ResetByConnectTimeout, "")
	case reason == flow.NoDescriptors:
		r = resetReply(503, reason, flags, envoy.ResetByLocalConnectFailure, "")
	default:
		r = resetReply(503, reason, flags, envoy.ResetByRemoteConnectFailure, upstream.TransportFailure(err))
	}
	if retried {
		r.body = strings.Replace(r.body, "reset reason", "retried and the latest reset reason", 1)
	}
	return r
}

// endsConnection reports whether a reply ends its connection. After a malformed request, or one whose memory was freed,
// the next one cannot be found. When upstream cannot be reached, a client that has to connect again may reach another
// server, or another pod.
func (r *reply) endsConnection() bool {
	switch r.reason {
	case flow.BadFraming, flow.MemoryBudget, flow.UpstreamRefused, flow.UpstreamTimeout, flow.UpstreamUnreachable:
		return r.flags != envoy.FlagNoRouteFound
	}
	return false
}

// refuse sends a reply in place of upstream, and closes the record. The connection persists if the whole request has
// arrived, unless the reply ends it, or downstream does not outlive the upstream connection. After a part of an interim
// response no reply can be sent: downstream could not parse it.
func (x *exchange) refuse(r reply, err error) ending {
	if x.response.out.Len() > 0 && x.response.bad == nil {
		return x.close(r.reason, err, cut)
	}
	if r.reason == flow.Loop && x.s.Returned != nil { // downstream is the agent itself, and reports the loop after a reset
		x.http.Flags, x.http.Details = r.flags, r.details
		return x.close(r.reason, err, cut)
	}
	end := linger
	if x.started && x.request.body.Done() && !r.endsConnection() && !x.downstreamCloses() && !x.last() && x.s.outlivesReply() {
		end = next
	}
	x.s.dropUpstream()
	return x.sendReply(r, err, end)
}

// sendReply sends a reply, and closes the record. The connection continues as end says.
func (x *exchange) sendReply(r reply, err error, end ending) ending {
	m := &x.response
	m.dst = x.s.Down
	m.out.Reset()
	m.head = x.appendReply(m.head[:0], r, end != next)
	m.out.Append(m.head)
	if x.made != nil && string(x.http.Method) != http.MethodHead {
		m.out.Append(readOnly(r.body)) // it may be long, and many requests share it
	}
	for deadline := time.Now().Add(lingerTime); m.out.Len() > 0; {
		switch n := m.put(); {
		case n > 0:
			if x.made != nil {
				deadline = time.Now().Add(lingerTime)
			}
			continue
		case m.dstErr == nil && x.s.w.Wait(deadline, x.s.Down, nil) == nil:
			continue
		}
		end = cut
		x.record.Sent.Store(0)
		break
	}
	return x.close(r.reason, err, end)
}

// appendReply appends a whole response, and records it.
func (x *exchange) appendReply(dst []byte, r reply, closes bool) []byte {
	to := &x.http
	to.Status, to.Flags, to.Details = r.status, r.flags, r.details
	dst = append(dst, "HTTP/1.1 "...)
	dst = strconv.AppendInt(dst, int64(to.Status), 10)
	dst = append(dst, ' ')
	dst = append(dst, http.StatusText(to.Status)...)
	dst = append(dst, "\r\n"...)
	if x.made != nil {
		dst = x.appendMade(dst, &r)
	} else {
		dst = append(append(append(dst, "server: "...), x.s.Peers.server()...), "\r\ndate: "...)
		dst = time.Now().UTC().AppendFormat(dst, httpTime)
		dst = append(dst, "\r\ncontent-type: text/plain\r\n"...)
	}
	if x.settings.edge.repliesToID() {
		dst = x.appendID(dst)
	}
	if !r.bodiless() {
		dst = append(dst, "content-length: "...)
		dst = strconv.AppendInt(dst, int64(len(r.body)), 10)
		dst = append(dst, "\r\n"...)
	}
	if closes {
		dst = append(dst, "Connection: close\r\n"...)
	} else if x.requestHead.Minor == 0 {
		dst = append(dst, "Connection: keep-alive\r\n"...)
	}
	dst = append(dst, "\r\n"...)
	if string(to.Method) != http.MethodHead {
		x.record.Sent.Store(uint64(len(r.body)))
		if x.made == nil {
			dst = append(dst, r.body...)
		}
	}
	return dst
}

const httpTime = http.TimeFormat

// bodiless reports whether the status allows no body (RFC 9110 §6.4.1).
func (r *reply) bodiless() bool {
	return r.status == http.StatusNoContent || r.status == http.StatusNotModified
}

// grpcMessage returns the body as the value of grpc-message, where bytes other than printable ASCII, and the percent
// sign, are percent-encoded. The only such byte in our bodies is the percent sign.
func (r reply) grpcMessage() string { return strings.ReplaceAll(r.body, "%", "%25") }

// grpcStatus returns the gRPC status for the reply's HTTP status, from gRPC's table for proxies that do not support it
// (HTTP to gRPC status code mapping).
// After a limit of time it is DEADLINE_EXCEEDED, as in Envoy since 2026: UNAVAILABLE would make clients try again.
func (r reply) grpcStatus() string {
	if r.reason == flow.RequestTimeout {
		return envoy.GRPCDeadlineExceeded.Number()
	}
	return envoy.GRPCCodeOf(r.status).Number()
}
