package http1

import (
	"bytes"
	"math"
)

// FramingKind is how the end of a body is found.
type FramingKind uint8

// The kinds of framing.
const (
	NoBody     FramingKind = iota // the message ends with its head
	Sized                         // after Length bytes
	Chunked                       // with the last chunk and the trailers
	UntilClose                    // with the connection; responses only
	Tunnel                        // the message ends with its head, and what follows on the connection is not HTTP/1
)

// Framing says how the end of a body is found.
type Framing struct {
	Kind   FramingKind
	Length int64 // of a Sized body, in bytes
}

// RequestFraming says how the body of a request ends (RFC 9112 §6.3). h is complete, and b is what it was parsed from.
func (h *Head) RequestFraming(b []byte) (Framing, error) {
	return h.framing(b, NoBody)
}

// ResponseFraming says how the body of a response ends; method is that of its request.
//
// Answers to HEAD, 1xx, 204 and 304 have no body whatever their fields say, but fields that contradict each other are an
// error all the same: their next reader may be less sure. In an answer that turns a CONNECT into a tunnel the fields mean
// nothing (RFC 9110 §9.3.6).
func (h *Head) ResponseFraming(b, method []byte) (Framing, error) {
	if h.Status/100 == 2 && string(method) == "CONNECT" {
		return Framing{Kind: Tunnel}, nil
	}
	f, err := h.framing(b, UntilClose)
	switch {
	case err != nil:
		return Framing{}, err
	case h.Status == 101:
		return Framing{Kind: Tunnel}, nil
	case h.Status/100 == 1, h.Status == 204, h.Status == 304, string(method) == "HEAD":
		return Framing{Kind: NoBody}, nil
	}
	return f, nil
}

// framing is where every body's end is decided; otherwise is for a message whose fields do not say. This is what an
// attacker wants us and the next hop to disagree about, so there is one spelling of each framing, and never both. Equal
// Content-Length lines are the exception, as they have one meaning: the first is kept and the others are dropped, so
// that it is one that goes on. A list of lengths in one line is refused.
func (h *Head) framing(b []byte, otherwise FramingKind) (Framing, error) {
	length, coding := h.Find(ContentLength), h.Find(TransferEncoding)
	switch {
	case length < 0 && coding < 0:
		return Framing{Kind: otherwise}, nil
	case length >= 0 && coding >= 0:
		return Framing{}, ErrBothFramings
	case coding >= 0:
		return h.coded(b, coding)
	}
	return h.sized(b, length)
}

func (h *Head) coded(b []byte, coding int) (Framing, error) {
	switch {
	case h.Minor == 0:
		return Framing{}, ErrTransferEncodingInHTTP10 // RFC 9112 §6.1: framed by a hop that did not understand it
	case h.after(coding, TransferEncoding) >= 0:
		return Framing{}, ErrRepeatedTransferEncoding
	case !same(h.Fields[coding].Value.In(b), "chunked"):
		return Framing{}, ErrUnsupportedCoding
	}
	return Framing{Kind: Chunked}, nil
}

func (h *Head) sized(b []byte, length int) (Framing, error) {
	value := h.Fields[length].Value.In(b)
	n, ok := decimal(value)
	if !ok {
		return Framing{}, ErrBadContentLength
	}
	for i := h.after(length, ContentLength); i >= 0; i = h.after(i, ContentLength) {
		if !bytes.Equal(h.Fields[i].Value.In(b), value) {
			return Framing{}, ErrContentLengthsDiffer
		}
		h.Fields[i].Dropped = true
	}
	return Framing{Kind: Sized, Length: n}, nil
}

// decimal reads digits and nothing else.
func decimal(p []byte) (int64, bool) {
	var n int64
	for _, c := range p {
		if !digit(c) || n > (math.MaxInt64-int64(c-'0'))/10 {
			return 0, false
		}
		n = n*10 + int64(c-'0')
	}
	return n, len(p) > 0
}
