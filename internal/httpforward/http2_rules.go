package httpforward

import (
	"net/http"

	"github.com/pillion-proxy/pillion/internal/http2"
)

// The rules that a message must follow beyond the validity of its fields (RFC 9113 §8.1), for one stream at a time.

// beginResponse records the framing of a final response. end is whether the response ends with its head.
func (s *stream) beginResponse(response *http2.Response, end bool) error {
	s.response.declared = response.ContentLength
	switch {
	case s.tunnel && response.Status < 300:
		s.response.declared = -1
		s.record.HTTP.Upgraded = true
	case s.head, response.Status == http.StatusNoContent, response.Status == http.StatusNotModified:
		s.response.declared = 0
	}
	if end && !s.response.whole() {
		return errBodyLength(s.id)
	}
	s.begun = true
	return nil
}

// endsWith reports as an error if fields are not valid trailers of the body.
func (b *body) endsWith(stream uint32, end bool, fields []http2.Field) error {
	if !end || !b.whole() || http2.CheckTrailers(fields) != nil {
		return errTrailers(stream)
	}
	return nil
}

func errTrailers(stream uint32) error {
	return http2.StreamError(stream, http2.ProtocolError, "malformed trailers")
}

func errBodyLength(stream uint32) error {
	return http2.StreamError(stream, http2.ProtocolError, "body of another length than declared")
}
