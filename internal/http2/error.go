package http2

import (
	"errors"
	"fmt"
	"strings"
)

// Code is an error code (RFC 9113 §7).
type Code uint32

// The codes that the proxy sends itself. Others are forwarded.
const (
	NoError           Code = 0x0
	ProtocolError     Code = 0x1
	InternalError     Code = 0x2
	FlowControlError  Code = 0x3
	StreamClosed      Code = 0x5
	FrameSizeError    Code = 0x6
	RefusedStream     Code = 0x7
	Cancel            Code = 0x8
	CompressionError  Code = 0x9
	EnhanceYourCalm   Code = 0xb
	connectionsStream      = 0
)

// Error is a protocol error. It ends a stream or, if Stream is zero, the connection.
type Error struct {
	Stream uint32
	Code   Code
	Text   string
	Rule   Rule // that a malformed message breaks; 0 for other errors
}

func (e *Error) Error() string {
	if e.Stream == connectionsStream {
		return fmt.Sprintf("HTTP/2: %s (code %d)", e.Text, e.Code)
	}
	return fmt.Sprintf("HTTP/2: stream %d: %s (code %d)", e.Stream, e.Text, e.Code)
}

// StreamError returns an error of a stream.
func StreamError(stream uint32, code Code, text string) error {
	return &Error{Stream: stream, Code: code, Text: text}
}

// MessageError returns an error of a stream whose message is malformed. err is one of ParseRequest, or a Rule.
func MessageError(stream uint32, err error) error {
	e := &Error{Stream: stream, Code: ProtocolError, Text: err.Error()}
	if errors.As(err, &e.Rule) {
		e.Text = strings.TrimPrefix(e.Text, "HTTP/2: ")
	}
	return e
}

// ConnectionError returns an error of the connection.
func ConnectionError(code Code, text string) error {
	return &Error{Stream: connectionsStream, Code: code, Text: text}
}

func connectionError(code Code, text string) error { return ConnectionError(code, text) }
