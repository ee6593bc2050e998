package httpforward

import (
	"errors"
	"strings"
	"syscall"
	"unicode"
	"unicode/utf8"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/tcp"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// reply is an answer that the agent gives in upstream's place. Bodies, flags and details are Envoy's, word for word:
// people's alerts and searches know them.
type reply struct {
	status  int
	body    string
	reason  flow.Reason
	flags   string
	details string
}

// The replies that do not depend on anything.
var (
	replyBadRequest     = reply{400, "Bad Request", flow.BadFraming, "DPE", "http1.codec_error"}
	replyHeadTimeout    = reply{408, "request header timeout", flow.HeadTimeout, "", "request_header_timeout"}
	replyHeadTooLarge   = reply{431, "Request Header Fields Too Large", flow.HeadTooLarge, "DPE", "http1.headers_too_large"}
	replyTooManyFields  = reply{431, "Request Header Fields Too Large", flow.HeadTooLarge, "DPE", "http1.too_many_headers"}
	replyBadResponse    = resetReply(502, flow.BadResponse, "UPE", "protocol error", "")
	replyUpstreamClosed = resetReply(503, flow.UpstreamClosed, "UC", "connection termination", "")
	replyRequestTimeout = reply{504, "upstream request timeout", flow.RequestTimeout, "UT", "response_timeout"}
)

// resetReply is what Envoy answers when upstream gives no response. transport may be empty.
func resetReply(status int, reason flow.Reason, flags, reset, transport string) reply {
	body := "upstream connect error or disconnect/reset before headers. reset reason: " + reset
	details := reset
	if transport != "" {
		body += ", transport failure reason: " + transport
		details += "|" + transport
	}
	details = "upstream_reset_before_response_started{" + strings.ReplaceAll(details, " ", "_") + "}"
	return reply{status, body, reason, flags, details}
}

// dialReply is the answer when upstream cannot be reached.
func dialReply(err error) reply {
	reason := upstream.Reason(err)
	switch {
	case reason == flow.UpstreamTimeout && errors.Is(err, tcp.ErrDeadline):
		return resetReply(503, reason, "UF", "connection timeout", "")
	case reason == flow.NoDescriptors:
		return resetReply(503, reason, "UF", "local connection failure", "")
	}
	transport := ""
	var errno syscall.Errno
	if errors.As(err, &errno) {
		first, size := utf8.DecodeRuneInString(errno.Error())
		transport = "delayed connect error: " + string(unicode.ToUpper(first)) + errno.Error()[size:]
	}
	return resetReply(503, reason, "UF", "remote connection failure", transport)
}

// grpcStatus is the gRPC status that stands for the reply's HTTP status, by gRPC's own table for proxies that do not
// speak it (HTTP to gRPC status code mapping).
func (r reply) grpcStatus() string {
	switch r.status {
	case 400, 431:
		return "13" // INTERNAL
	case 408, 502, 503, 504:
		return "14" // UNAVAILABLE
	}
	return "2" // UNKNOWN
}
