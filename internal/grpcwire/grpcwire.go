// Package grpcwire makes gRPC calls over net/http's HTTP/2. It frames messages that the caller has encoded, and reads the
// status from the trailers. An agent makes one stream and one call a day, all to one server: it needs neither name
// resolution, balancing, interceptors nor codecs. Without them its binary is 5 MB smaller, and its memory 5 MB.
//
// The protocol is that of https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md. Messages are not compressed, and
// compressed messages are refused.
package grpcwire

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/pillion-proxy/pillion/internal/envoy"
)

// prefixSize is the size of what precedes a message: a byte of flags, and the length.
const prefixSize = 5

// maxText bounds the message of a status that is kept, in bytes.
const maxText = 1 << 10

// Error is the status of a call that did not end with OK.
type Error struct {
	Code envoy.GRPCCode
	Text string // from the server; may be empty
}

func (e *Error) Error() string {
	if e.Text == "" {
		return e.Code.String()
	}
	return e.Code.String() + ": " + e.Text
}

// Client makes calls to one server.
type Client struct {
	Transport http.RoundTripper // must use HTTP/2
	Base      url.URL           // scheme and host
	Header    http.Header       // of every call; may be nil

	// Token returns the bearer token. It is called for every call, because tokens are rotated. An empty token is not
	// sent. Nil: calls carry no token.
	Token func() (string, error)

	MaxMessage int // limit of a received message, in bytes; greater than 0
}

// request begins a call of the method that path names, as in /package.Service/Method.
func (c *Client) request(ctx context.Context, path string, body io.ReadCloser) (*http.Request, error) {
	target := c.Base
	target.Path = path
	r := (&http.Request{Method: http.MethodPost, URL: &target, Host: target.Host, Header: c.Header.Clone(), Body: body}).WithContext(ctx)
	if r.Header == nil {
		r.Header = make(http.Header)
	}
	r.Header.Set("Content-Type", "application/grpc+proto")
	r.Header.Set("TE", "trailers") // servers reject calls without it: proxies that drop trailers would be in the way
	r.Header.Set("User-Agent", "pillion")
	r.Header.Set("Accept-Encoding", "identity") // otherwise net/http asks for gzip
	if c.Token == nil {
		return r, nil
	}
	token, err := c.Token()
	if err != nil {
		return nil, fmt.Errorf("reading the token: %w", err)
	}
	if token != "" {
		r.Header.Set("Authorization", "Bearer "+token)
	}
	return r, nil
}

// Call sends one message and returns the one message of the response.
func (c *Client) Call(ctx context.Context, path string, message []byte) ([]byte, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	body := net.Buffers(frame(message))
	r, err := c.request(ctx, path, io.NopCloser(&body))
	if err != nil {
		return nil, err
	}
	response, err := c.Transport.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	if err := check(response); err != nil {
		return nil, err
	}
	reply, err := readMessage(response, c.MaxMessage)
	if err == io.EOF {
		return nil, errors.New("the response has no message")
	}
	if err != nil {
		return nil, err
	}
	switch _, err := readMessage(response, c.MaxMessage); err {
	case io.EOF:
		return reply, nil
	case nil:
		return nil, errors.New("the response has more than one message")
	default:
		return nil, err
	}
}

// Stream is a call with any number of messages in both directions. Send and Receive may be called at the same time, each
// by one goroutine.
type Stream struct {
	limit  int
	cancel context.CancelFunc
	body   *io.PipeWriter
	opened chan struct{} // closed when response and err are set

	response *http.Response // nil after an error
	err      error
}

// Stream begins a call. It returns before the server has been reached. The stream ends with ctx. Close it.
func (c *Client) Stream(ctx context.Context, path string) (*Stream, error) {
	ctx, cancel := context.WithCancel(ctx)
	out, in := io.Pipe()
	r, err := c.request(ctx, path, out)
	if err != nil {
		cancel()
		return nil, err
	}
	s := &Stream{limit: c.MaxMessage, cancel: cancel, body: in, opened: make(chan struct{})}
	go s.open(c.Transport, r)
	return s, nil
}

// open waits for the head of the response. A server may send it together with its answer to our first message.
func (s *Stream) open(transport http.RoundTripper, r *http.Request) {
	defer close(s.opened)
	if s.response, s.err = transport.RoundTrip(r); s.err == nil {
		if s.err = check(s.response); s.err != nil {
			s.response.Body.Close()
			s.response = nil
		}
	}
	if s.err != nil {
		s.body.CloseWithError(s.err)
	}
}

// Send sends a message. It waits while the server does not take it.
func (s *Stream) Send(message []byte) error { return s.SendParts(message) }

// SendParts is Send for a message in parts.
func (s *Stream) SendParts(parts ...[]byte) error {
	for _, b := range frame(parts...) {
		if _, err := s.body.Write(b); err != nil {
			return err
		}
	}
	return nil
}

// Receive returns the next message, io.EOF after the last one if the status is OK, and an *Error otherwise.
func (s *Stream) Receive() ([]byte, error) {
	<-s.opened
	if s.err != nil {
		return nil, s.err
	}
	return readMessage(s.response, s.limit)
}

// Refused returns the error with which the server refuses the call, if it does so within a time; nil: it has not.
func (s *Stream) Refused(ctx context.Context, within time.Duration) error {
	timer := time.NewTimer(within)
	defer timer.Stop()
	select {
	case <-s.opened:
		return s.err
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// CloseSend ends our side of the stream.
func (s *Stream) CloseSend() { s.body.Close() }

// Close ends the stream and waits until the transport has let go of it.
func (s *Stream) Close() {
	s.cancel()
	s.body.CloseWithError(context.Canceled)
	<-s.opened
	if s.response != nil {
		s.response.Body.Close()
	}
}

// maxCopied bounds the messages that are copied behind their prefix, in bytes, so that they leave in one frame of HTTP/2.
const maxCopied = 16 << 10

// frame returns a message with its prefix. A large one is not copied: exporters send megabytes.
func frame(parts ...[]byte) [][]byte {
	size := 0
	for _, p := range parts {
		size += len(p)
	}
	b := make([]byte, prefixSize)
	binary.BigEndian.PutUint32(b[1:], uint32(size))
	if size > maxCopied {
		return append([][]byte{b}, parts...)
	}
	return [][]byte{append(b, bytes.Join(parts, nil)...)}
}

// check returns an error if the response is not one of gRPC, or is a status without messages.
func check(response *http.Response) error {
	isGRPC := strings.HasPrefix(response.Header.Get("Content-Type"), "application/grpc")
	switch {
	case response.ProtoMajor != 2:
		return fmt.Errorf("the server speaks %s, not HTTP/2", response.Proto)
	case isGRPC && response.Header.Get("Grpc-Status") != "": // the head is also the trailers
		if err := status(response.Header); err != io.EOF {
			return err
		}
		return nil
	case response.StatusCode != http.StatusOK:
		return &Error{envoy.GRPCCodeOf(response.StatusCode), fmt.Sprintf("HTTP status %d", response.StatusCode)}
	case !isGRPC:
		return fmt.Errorf("the response has content type %.80q, not gRPC's", response.Header.Get("Content-Type"))
	}
	return nil
}

// readMessage returns the next message of a response, or the status at its end: io.EOF for OK.
func readMessage(response *http.Response, limit int) ([]byte, error) {
	var prefix [prefixSize]byte
	switch _, err := io.ReadFull(response.Body, prefix[:]); {
	case err == io.EOF:
		if response.Header.Get("Grpc-Status") != "" {
			return nil, status(response.Header)
		}
		return nil, status(response.Trailer)
	case err != nil:
		return nil, err
	}
	length := binary.BigEndian.Uint32(prefix[1:])
	if prefix[0] != 0 {
		return nil, errors.New("the message is compressed")
	}
	if uint64(length) > uint64(limit) {
		return nil, fmt.Errorf("the message has %d bytes, more than the limit of %d", length, limit)
	}
	// The memory grows with the bytes that arrive, not with the length that is announced.
	var message bytes.Buffer
	message.Grow(int(min(length, 64<<10)))
	if _, err := io.CopyN(&message, response.Body, int64(length)); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return nil, err
	}
	return message.Bytes(), nil
}

// status returns the status in the trailers: io.EOF for OK, an *Error otherwise.
func status(trailer http.Header) error {
	text := trailer.Get("Grpc-Status")
	code, known := envoy.ParseGRPCCode([]byte(text))
	switch {
	case text == "":
		return &Error{envoy.GRPCUnknown, "the response ended without a status"}
	case !known:
		return &Error{envoy.GRPCUnknown, fmt.Sprintf("unknown status %.20q", text)}
	case code == envoy.GRPCOK:
		return io.EOF
	}
	return &Error{code, decode(trailer.Get("Grpc-Message"))}
}

// decode undoes the percent-encoding of a status message, at most maxText bytes of it. Malformed text is kept.
func decode(text string) string {
	text = text[:min(len(text), maxText)]
	if decoded, err := url.PathUnescape(text); err == nil {
		text = decoded
	}
	return strings.ToValidUTF8(text, "\uFFFD")
}
