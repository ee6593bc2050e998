package export

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/grpcwire"
)

// maxResponse bounds the response of a receiver, in bytes.
const maxResponse = 64 << 10

// DefaultTimeout is that of a batch, if no other is configured.
const DefaultTimeout = 10 * time.Second

// HTTPSender sends batches by OTLP over HTTP, in protobuf.
type HTTPSender struct {
	Transport http.RoundTripper
	URL       url.URL
	Host      string // of the request; empty: that of URL
	Header    http.Header
	Timeout   time.Duration // of a batch; greater than zero
}

// Send implements Sender.
func (s *HTTPSender) Send(ctx context.Context, request []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, s.Timeout)
	defer cancel()
	r := (&http.Request{
		Method: http.MethodPost, URL: &s.URL, Host: s.Host, Header: s.Header.Clone(), ContentLength: int64(len(request)),
		Body: io.NopCloser(bytes.NewReader(request)),
	}).WithContext(ctx)
	if r.Header == nil {
		r.Header = make(http.Header)
	}
	r.Header.Set("Content-Type", "application/x-protobuf")
	r.Header.Set("User-Agent", "pillion")
	response, err := s.Transport.RoundTrip(r)
	if err != nil {
		return nil, &Temporary{Err: err}
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, maxResponse))
	switch response.StatusCode {
	case http.StatusTooManyRequests, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout: // OTLP §Failures
		return nil, &Temporary{Err: fmt.Errorf("HTTP status %d", response.StatusCode), After: retryAfter(response.Header)}
	}
	switch {
	case response.StatusCode/100 != 2:
		return nil, fmt.Errorf("HTTP status %d", response.StatusCode)
	case err != nil:
		return nil, nil // it was accepted
	}
	return body, nil
}

// Close implements Sender.
func (s *HTTPSender) Close(context.Context) { closeIdle(s.Transport) }

// closeIdle closes the connections of a transport that has its own.
func closeIdle(t http.RoundTripper) {
	if t, ok := t.(interface{ CloseIdleConnections() }); ok {
		t.CloseIdleConnections()
	}
}

// retryAfter returns the seconds of Retry-After.
func retryAfter(h http.Header) time.Duration {
	seconds, err := strconv.Atoi(h.Get("Retry-After"))
	if err != nil || seconds < 0 {
		return 0
	}
	return time.Duration(min(seconds, 3600)) * time.Second
}

// GRPCSender sends batches by OTLP over gRPC.
type GRPCSender struct {
	Client  grpcwire.Client
	Method  string        // as in /package.Service/Method
	Timeout time.Duration // of a batch; greater than zero
}

// NewGRPCSender returns a sender. transport must use HTTP/2.
func NewGRPCSender(transport http.RoundTripper, base url.URL, header http.Header, method string, timeout time.Duration) *GRPCSender {
	return &GRPCSender{grpcwire.Client{Transport: transport, Base: base, Header: header, MaxMessage: maxResponse}, method, timeout}
}

// Send implements Sender.
func (s *GRPCSender) Send(ctx context.Context, request []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, s.Timeout)
	defer cancel()
	response, err := s.Client.Call(ctx, s.Method, request)
	if err != nil {
		return nil, refusalOf(err)
	}
	return response, nil
}

// refusalOf returns the error of a call, as a *Temporary unless the server has refused the batch for good.
func refusalOf(err error) error {
	var status *grpcwire.Error
	if !errors.As(err, &status) {
		return &Temporary{Err: err}
	}
	switch status.Code { // OTLP §Failures. ResourceExhausted would need a delay that the receiver names
	case envoy.GRPCCanceled, envoy.GRPCDeadlineExceeded, envoy.GRPCAborted, envoy.GRPCOutOfRange, envoy.GRPCUnavailable, envoy.GRPCDataLoss:
		return &Temporary{Err: err}
	}
	return err
}

// Close implements Sender.
func (s *GRPCSender) Close(context.Context) { closeIdle(s.Client.Transport) }

// StreamSender sends each batch as a message of one stream of gRPC, whose receiver does not answer. A batch counts as sent
// when the stream has taken it; the receiver confirms batches only when the stream is closed.
type StreamSender struct {
	GRPCSender
	First []byte // fields of the first message of each stream, before those of the batch

	stream  *grpcwire.Stream // nil: not open
	refusal time.Duration    // 0: that of the constant
}

// refusal is how long a receiver has to refuse a new stream before a batch counts as sent.
const refusal = time.Second

// Send implements Sender.
func (s *StreamSender) Send(ctx context.Context, request []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, s.Timeout)
	defer cancel()
	first, head := s.stream == nil, []byte(nil)
	if first {
		stream, err := s.Client.Stream(context.Background(), s.Method)
		if err != nil {
			return nil, &Temporary{Err: err}
		}
		s.stream, head = stream, s.First
	}
	stop := context.AfterFunc(ctx, s.stream.Close) // which ends Send
	err := s.stream.SendParts(head, request)
	if deadline, _ := ctx.Deadline(); first && err == nil {
		err = s.stream.Refused(ctx, min(cmp.Or(s.refusal, refusal), time.Until(deadline)/4))
	}
	if err != nil && ctx.Err() == nil { // the stream has ended: with a status, if the server has sent one
		if _, reason := s.stream.Receive(); reason != nil && reason != io.EOF {
			err = reason
		}
	}
	if stop() && err == nil {
		return nil, nil
	}
	s.stream.Close()
	s.stream = nil
	if err = cmp.Or(err, ctx.Err()); first {
		return nil, refusalOf(err)
	}
	return nil, &Temporary{Err: err} // the status may be about batches before
}

// Close implements Sender. The end of the server's answer confirms that it has read the stream.
func (s *StreamSender) Close(ctx context.Context) {
	if s.stream != nil {
		stop := context.AfterFunc(ctx, s.stream.Close)
		s.stream.CloseSend()
		for {
			if _, err := s.stream.Receive(); err != nil {
				break
			}
		}
		stop()
		s.stream.Close()
		s.stream = nil
	}
	s.GRPCSender.Close(ctx)
}
