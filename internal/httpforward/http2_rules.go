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
		s.http.Upgraded = true
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
	switch err := http2.CheckTrailers(fields); {
	case !end:
		return http2.MessageError(stream, http2.MisplacedTrailers)
	case !b.whole():
		return errBodyLength(stream)
	case err != nil:
		return http2.MessageError(stream, err)
	}
	return nil
}

func errBodyLength(stream uint32) error { return http2.MessageError(stream, http2.LengthMismatch) }

// maxInterim is the default of Config.maxInterim: how many interim responses a request may get. A server that reports
// progress (102) once a second stays below it for a quarter of an hour; without a limit, a server could send them
// forever.
const maxInterim = 1000
