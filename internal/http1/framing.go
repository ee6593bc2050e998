package http1

import (
	"bytes"
	"math"
)

// FramingKind is how the end of a body is determined.
type FramingKind uint8

// The kinds of framing.
const (
	NoBody     FramingKind = iota // the message ends with its head
	Sized                         // after Length bytes
	Chunked                       // with the last chunk and the trailers
	UntilClose                    // with the connection; responses only
	Tunnel                        // the message ends with its head, and the bytes after it are not HTTP/1
)

// Framing describes how the end of a body is determined.
type Framing struct {
	Kind   FramingKind
	Length int64 // of a Sized body, in bytes
}

// RequestFraming returns the framing of a request's body (RFC 9112 §6.3). h is complete, and b is the buffer it was
// parsed from.
func (h *Head) RequestFraming(b []byte) (Framing, error) {
	return h.framing(b, NoBody)
}

// ResponseFraming returns the framing of a response's body; method is the request's.
//
// Responses to HEAD, and those with status 1xx, 204 or 304, have no body regardless of their fields. Contradictory
// fields are an error even there, because the next recipient may interpret them differently. In a response that turns
// CONNECT into a tunnel the fields have no meaning (RFC 9110 §9.3.6).
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

// framing determines the end of every body; otherwise is the framing of a message without framing fields. Request
// smuggling needs two recipients that disagree here, so only one spelling of each framing is accepted, and never both.
// Equal lengths are the exception, whether in a list or in several lines, because they have only one meaning: the first
// is kept, as a line of its own, and the others are dropped (RFC 9110 §8.6).
func (h *Head) framing(b []byte, otherwise FramingKind) (Framing, error) {
	length, coding := h.Find(ContentLength), h.Find(TransferEncoding)
	switch {
	case length < 0 && coding < 0:
		return Framing{Kind: otherwise}, nil
	case length >= 0 && coding >= 0:
		return Framing{}, h.faultyField(coding, ErrBothFramings)
	case coding >= 0:
		return h.coded(b, coding)
	}
	return h.sized(b, length)
}

func (h *Head) coded(b []byte, coding int) (Framing, error) {
	switch {
	case h.Minor == 0:
		return Framing{}, h.faultyField(coding, ErrTransferEncodingInHTTP10) // RFC 9112 §6.1: framed by a hop that did not understand it
	case h.after(coding, TransferEncoding) >= 0:
		return Framing{}, h.faultyField(h.after(coding, TransferEncoding), ErrRepeatedTransferEncoding)
	case !same(h.Fields[coding].Value.In(b), "chunked"):
		return Framing{}, h.faultyField(coding, ErrUnsupportedCoding)
	}
	return Framing{Kind: Chunked}, nil
}

func (h *Head) sized(b []byte, length int) (Framing, error) {
	first := &h.Fields[length]
	value, _ := element(first.Value.In(b))
	n, ok := decimal(value)
	if !ok {
		return Framing{}, h.faultyField(length, ErrBadContentLength)
	}
	for i := length; i >= 0; i = h.after(i, ContentLength) {
		if !repeats(h.Fields[i].Value.In(b), value) {
			return Framing{}, h.faultyField(i, ErrContentLengthsDiffer)
		}
		h.Fields[i].Dropped = i != length
	}
	if end := first.Value.Start + uint32(len(value)); end < first.Value.End {
		first.Value.End, first.Line.End = end, end
		h.edited = true
	}
	return Framing{Kind: Sized, Length: n}, nil
}

// repeats reports whether each element of a comma-separated list equals value.
func repeats(list, value []byte) bool {
	for more := true; more; {
		more = bytes.IndexByte(list, ',') >= 0
		var one []byte
		if one, list = element(list); !bytes.Equal(one, value) {
			return false
		}
	}
	return true
}

// decimal parses a number that consists only of digits.
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
