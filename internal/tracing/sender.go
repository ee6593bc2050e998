package tracing

import (
	"bytes"
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
	Timeout time.Duration // of a batch; greater than zero
}

const exportMethod = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"

// NewGRPCSender returns a sender. transport must use HTTP/2.
func NewGRPCSender(transport http.RoundTripper, base url.URL, header http.Header, timeout time.Duration) *GRPCSender {
	return &GRPCSender{grpcwire.Client{Transport: transport, Base: base, Header: header, MaxMessage: maxResponse}, timeout}
}

// Send implements Sender.
func (s *GRPCSender) Send(ctx context.Context, request []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, s.Timeout)
	defer cancel()
	response, err := s.Client.Call(ctx, exportMethod, request)
	var status *grpcwire.Error
	switch {
	case err == nil:
		return response, nil
	case !errors.As(err, &status):
		return nil, &Temporary{Err: err}
	}
	switch status.Code { // OTLP §Failures. ResourceExhausted would need a delay that the receiver names
	case envoy.GRPCCanceled, envoy.GRPCDeadlineExceeded, envoy.GRPCAborted, envoy.GRPCOutOfRange, envoy.GRPCUnavailable, envoy.GRPCDataLoss:
		return nil, &Temporary{Err: err}
	}
	return nil, err
}
