package probe

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/http2"
)

// grpcProbe calls Check of gRPC's health protocol (grpc.health.v1), over HTTP/2 without TLS.
//
// It makes one call on one connection, with messages of a few bytes. A gRPC client library would be a hundred times the
// code.
type grpcProbe struct {
	address string
	service string // empty: the whole server
	dial    func(ctx context.Context, network, address string) (net.Conn, error)
}

const (
	// maxReply bounds the bytes that a server may send. It is less than the initial flow-control window, so that no
	// WINDOW_UPDATE is needed.
	maxReply       = 48 << 10
	maxReplyFields = 100
	callStream     = 1 // the only stream
	grpcPrefix     = 5 // bytes before a message: a flag for compression, and the length
)

func (p *grpcProbe) run(ctx context.Context, from *http.Request) (answer, error) {
	conn, err := p.dial(ctx, "tcp", p.address)
	if err != nil {
		return answer{}, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })()
	if err := p.check(ctx, conn, from.UserAgent()); err != nil {
		return answer{}, err
	}
	return answer{status: http.StatusOK}, nil
}

// check makes the call and returns nil if the service is serving.
func (p *grpcProbe) check(ctx context.Context, conn io.ReadWriter, userAgent string) error {
	if _, err := conn.Write(p.request(ctx, userAgent)); err != nil {
		return fmt.Errorf("sending the call: %w", err)
	}
	limit := &io.LimitedReader{R: conn, N: maxReply}
	reply := &grpcReply{in: bufio.NewReader(limit), out: conn, decoder: http2.NewDecoder(http2.MinFrameSize, maxReplyFields)}
	for !reply.ended {
		err := reply.next()
		if limit.N == 0 && errors.Is(err, io.EOF) {
			err = fmt.Errorf("more than %d bytes", maxReply)
		}
		if err != nil {
			return fmt.Errorf("reading the reply: %w", err)
		}
	}
	return reply.verdict()
}

// request returns the preface, SETTINGS and the call, all that the probe sends apart from acknowledgements.
func (p *grpcProbe) request(ctx context.Context, userAgent string) []byte {
	var settings []byte
	settings = http2.Setting{ID: http2.EnablePush, Value: 0}.Append(settings)
	settings = http2.Setting{ID: http2.MaxHeaderListSize, Value: http2.MinFrameSize}.Append(settings)
	out := append([]byte(nil), http2.Preface...)
	out = http2.Header{Length: len(settings), Type: http2.Settings}.Append(out)
	out = append(out, settings...)

	start := len(out)
	out = append(out, make([]byte, http2.HeaderLength)...)
	fields := []http2.Field{
		{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: "http"},
		{Name: ":path", Value: "/grpc.health.v1.Health/Check"}, {Name: ":authority", Value: p.address},
		{Name: "content-type", Value: "application/grpc"}, {Name: "te", Value: "trailers"},
	}
	if end, ok := ctx.Deadline(); ok {
		left := max(time.Until(end).Milliseconds(), 1)
		fields = append(fields, http2.Field{Name: "grpc-timeout", Value: strconv.FormatInt(left, 10) + "m"})
	}
	if userAgent != "" {
		fields = append(fields, http2.Field{Name: "user-agent", Value: userAgent})
	}
	encoder := http2.NewEncoder()
	for _, field := range fields {
		out = encoder.AppendField(out, field)
	}
	out = http2.AppendHeaders(out, start, callStream, false)

	var message []byte // HealthCheckRequest: field 1 is the service
	if p.service != "" {
		message = binary.AppendUvarint([]byte{1<<3 | 2}, uint64(len(p.service)))
		message = append(message, p.service...)
	}
	out = http2.Header{Length: grpcPrefix + len(message), Type: http2.Data, Flags: http2.EndStream, Stream: callStream}.Append(out)
	out = append(out, 0)
	out = binary.BigEndian.AppendUint32(out, uint32(len(message)))
	return append(out, message...)
}

// grpcReply is the state of the reply.
type grpcReply struct {
	in      *bufio.Reader
	out     io.Writer
	payload [http2.MinFrameSize]byte
	decoder *http2.Decoder
	greeted bool // the server's SETTINGS have arrived

	block   []byte // the header block that is being read
	inBlock bool
	last    bool // the header block ends the stream

	httpStatus  int // zero before the response's head
	contentType string
	grpcStatus  string
	grpcMessage string
	message     []byte // with its prefix
	ended       bool
}

// next reads and processes one frame.
func (r *grpcReply) next() error {
	var head [http2.HeaderLength]byte
	if _, err := io.ReadFull(r.in, head[:]); err != nil {
		return early(err)
	}
	h := http2.ParseHeader(head[:])
	if !r.greeted && (h.Type != http2.Settings || h.Has(http2.Ack)) {
		return errors.New("the workload does not speak HTTP/2 without TLS on this port")
	}
	r.greeted = true
	if err := h.Check(len(r.payload)); err != nil {
		return err
	}
	payload := r.payload[:h.Length]
	if _, err := io.ReadFull(r.in, payload); err != nil {
		return early(err)
	}
	if r.inBlock != (h.Type == http2.Continuation) {
		return http2.ConnectionError(http2.ProtocolError, "frames of a header block must follow each other")
	}
	switch h.Type {
	case http2.Settings:
		return r.settings(h, payload)
	case http2.Ping:
		if h.Has(http2.Ack) {
			return nil
		}
		h.Flags = http2.Ack
		return r.send(append(h.Append(nil), payload...))
	case http2.GoAway:
		last, code := http2.Uint31(payload), http2.Uint32(payload[4:])
		if last < callStream || code != uint32(http2.NoError) {
			return fmt.Errorf("the server ended the connection with code %d: %q", code, payload[8:])
		}
	case http2.ResetStream:
		if h.Stream == callStream {
			return fmt.Errorf("the server reset the call with code %d", http2.Uint32(payload))
		}
	case http2.PushPromise:
		return http2.ConnectionError(http2.ProtocolError, "PUSH_PROMISE although push is disabled")
	case http2.Headers, http2.Continuation, http2.Data:
		if h.Stream != callStream {
			return http2.ConnectionError(http2.ProtocolError, "frame of a stream that does not exist")
		}
		if h.Type == http2.Data {
			return r.data(h, payload)
		}
		return r.headers(h, payload)
	}
	return nil // WINDOW_UPDATE, PRIORITY and extensions have no effect here
}

// early returns the error for a connection that ended before the reply was complete.
func early(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("the server closed the connection: %w", io.EOF)
	}
	return err
}

// settings acknowledges the server's SETTINGS. Any valid values allow the few bytes that were sent.
func (r *grpcReply) settings(h http2.Header, payload []byte) error {
	if h.Has(http2.Ack) {
		return nil
	}
	for len(payload) > 0 {
		var setting http2.Setting
		setting, payload = http2.NextSetting(payload)
		if err := setting.Check(); err != nil {
			return err
		}
	}
	return r.send(http2.Header{Type: http2.Settings, Flags: http2.Ack}.Append(nil))
}

func (r *grpcReply) send(frame []byte) error {
	_, err := r.out.Write(frame)
	return err
}

func (r *grpcReply) data(h http2.Header, payload []byte) error {
	if r.httpStatus == 0 {
		return http2.ConnectionError(http2.ProtocolError, "a body before its head")
	}
	var first byte
	if len(payload) > 0 {
		first = payload[0]
	}
	before, behind, err := h.Padding(first)
	if err != nil {
		return err
	}
	r.message = append(r.message, payload[before:len(payload)-behind]...)
	r.ended = h.Has(http2.EndStream)
	return nil
}

// headers collects the frames of a header block and decodes it when it is complete.
func (r *grpcReply) headers(h http2.Header, payload []byte) error {
	if h.Type == http2.Headers {
		fragment, err := h.Fragment(payload)
		if err != nil {
			return err
		}
		payload, r.block, r.last = fragment, r.block[:0], h.Has(http2.EndStream)
	}
	r.block = append(r.block, payload...)
	if r.inBlock = !h.Has(http2.EndHeaders); r.inBlock {
		return nil
	}
	fields, whole, err := r.decoder.Decode(r.block)
	if err != nil {
		return err
	}
	if !whole {
		return fmt.Errorf("more than %d fields or %d bytes of them", maxReplyFields, http2.MinFrameSize)
	}
	if r.httpStatus == 0 {
		response, err := http2.ParseResponse(fields)
		if err != nil {
			return err
		}
		if response.Interim() && !r.last {
			return nil
		}
		r.httpStatus = response.Status
	} else if err := http2.CheckTrailers(fields); err != nil {
		return err
	} else if !r.last {
		return http2.ConnectionError(http2.ProtocolError, "trailers that do not end the stream")
	}
	// The status is in the trailers, or in the head of a response that consists of a head only.
	for _, field := range fields {
		switch field.Name {
		case "content-type":
			r.contentType = field.Value
		case "grpc-status":
			r.grpcStatus = field.Value
		case "grpc-message":
			r.grpcMessage = field.Value
		}
	}
	r.ended = r.last
	return nil
}

// healthNames are the names of HealthCheckResponse.ServingStatus.
var healthNames = []string{"UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN"}

const serving = 1

// verdict evaluates the complete reply and returns nil if the service is serving.
func (r *grpcReply) verdict() error {
	if r.httpStatus != http.StatusOK {
		return fmt.Errorf("the server answers with HTTP status %d: it is not a gRPC server", r.httpStatus)
	}
	if !strings.HasPrefix(r.contentType, "application/grpc") {
		return fmt.Errorf("the server answers with content type %q: it is not a gRPC server", r.contentType)
	}
	if r.grpcStatus != envoy.GRPCOK.Number() {
		message := r.grpcMessage
		if plain, err := url.PathUnescape(message); err == nil {
			message = plain
		}
		return fmt.Errorf("gRPC status %s: %q", codeName(r.grpcStatus), message)
	}
	if len(r.message) < grpcPrefix || int64(len(r.message)-grpcPrefix) != int64(binary.BigEndian.Uint32(r.message[1:])) {
		return errors.New("the reply is not exactly one message")
	}
	if r.message[0] != 0 {
		return errors.New("the reply is compressed, although compression was not offered")
	}
	status, err := healthStatus(r.message[grpcPrefix:])
	if err != nil {
		return err
	}
	if status != serving {
		return fmt.Errorf("health status %s", name(healthNames, strconv.FormatUint(status, 10)))
	}
	return nil
}

// codeName returns the name of a gRPC status code.
func codeName(number string) string {
	if n, err := strconv.ParseUint(number, 10, 8); err == nil && n < uint64(envoy.GRPCCodes) {
		return envoy.GRPCCode(n).String()
	}
	return fmt.Sprintf("%q", number)
}

// name returns the name of a number, or the quoted number if it has no name.
func name(names []string, number string) string {
	n, err := strconv.ParseUint(number, 10, 8)
	if err != nil || n >= uint64(len(names)) {
		return fmt.Sprintf("%q", number)
	}
	return names[n]
}

var errMessage = errors.New("the reply is not a HealthCheckResponse")

// healthStatus returns field 1 of a protobuf message and skips other fields. An absent field is zero, as in protobuf.
func healthStatus(message []byte) (status uint64, err error) {
	for len(message) > 0 {
		tag, n := binary.Uvarint(message)
		if n <= 0 {
			return 0, errMessage
		}
		message = message[n:]
		value, size := uint64(0), 0
		switch tag & 7 {
		case 0: // a varint
			value, size = binary.Uvarint(message)
		case 1: // 8 bytes
			size = 8
		case 2: // a length, and that many bytes
			length, n := binary.Uvarint(message)
			if n <= 0 || length > uint64(len(message)-n) {
				return 0, errMessage
			}
			size = n + int(length)
		case 5: // 4 bytes
			size = 4
		}
		if size <= 0 || size > len(message) {
			return 0, errMessage
		}
		if tag == 1<<3 {
			status = value
		}
		message = message[size:]
	}
	return status, nil
}
