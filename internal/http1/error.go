package http1

// Error is a defect of a message: one of a closed set, small enough to be returned as an error without an allocation. A
// request with a defect is answered with Status and a close; a response with a defect is replaced by 502.
type Error uint8

// The errors of messages.
const (
	ErrHeadTooLarge Error = iota + 1
	ErrTooManyFields
	ErrBadRequestLine
	ErrBadStatusLine
	ErrBadVersion
	ErrBareCR
	ErrNUL
	ErrObsFold
	ErrNoColon
	ErrSpaceBeforeColon
	ErrBadFieldName
	ErrMissingHost
	ErrRepeatedHost
	ErrBadHost
	ErrBadContentLength
	ErrContentLengthsDiffer
	ErrBothFramings
	ErrUnsupportedCoding
	ErrRepeatedTransferEncoding
	ErrTransferEncodingInHTTP10
	ErrBadChunkSize
	ErrChunkLineTooLong
	ErrBareLF
	ErrBadChunkEnd
	ErrForbiddenTrailer
	ErrTrailersTooLarge
	errorCount
)

var errorTexts = [errorCount]struct{ name, text string }{
	ErrHeadTooLarge:             {"head_too_large", "the head is larger than the limit"},
	ErrTooManyFields:            {"too_many_fields", "more fields than the limit"},
	ErrBadRequestLine:           {"bad_request_line", "the first line is not a request line"},
	ErrBadStatusLine:            {"bad_status_line", "the first line is not a status line"},
	ErrBadVersion:               {"bad_version", "the first line has no HTTP/1.x version"},
	ErrBareCR:                   {"bare_cr", "a CR without an LF"},
	ErrNUL:                      {"nul", "a NUL"},
	ErrObsFold:                  {"obs_fold", "a field line that begins with white space"},
	ErrNoColon:                  {"no_colon", "a field line without a colon"},
	ErrSpaceBeforeColon:         {"space_before_colon", "white space between a field name and its colon"},
	ErrBadFieldName:             {"bad_field_name", "a field name that is not a token"},
	ErrMissingHost:              {"missing_host", "an HTTP/1.1 request without Host"},
	ErrRepeatedHost:             {"repeated_host", "more than one Host"},
	ErrBadHost:                  {"bad_host", "a Host that is not a valid host"},
	ErrBadContentLength:         {"bad_content_length", "a Content-Length that is not a number up to 2^63-1"},
	ErrContentLengthsDiffer:     {"content_lengths_differ", "Content-Lengths that differ"},
	ErrBothFramings:             {"both_framings", "both Transfer-Encoding and Content-Length"},
	ErrUnsupportedCoding:        {"unsupported_coding", "a Transfer-Encoding other than chunked"},
	ErrRepeatedTransferEncoding: {"repeated_transfer_encoding", "more than one Transfer-Encoding"},
	ErrTransferEncodingInHTTP10: {"transfer_encoding_in_http10", "a Transfer-Encoding in HTTP/1.0"},
	ErrBadChunkSize:             {"bad_chunk_size", "a chunk size that is not a hexadecimal number up to 2^63-1"},
	ErrChunkLineTooLong:         {"chunk_line_too_long", "a chunk size line longer than 4 KiB"},
	ErrBareLF:                   {"bare_lf", "a line that ends with a bare LF"},
	ErrBadChunkEnd:              {"bad_chunk_end", "a chunk that does not end with CRLF"},
	ErrForbiddenTrailer:         {"forbidden_trailer", "a trailer field for framing, routing or the connection"},
	ErrTrailersTooLarge:         {"trailers_too_large", "trailers that are larger than the limit"},
}

// Error returns a short description that begins with a lower-case letter.
func (e Error) Error() string { return errorTexts[e].text }

// Errors returns all errors.
func Errors() (all []Error) {
	for e := Error(1); e < errorCount; e++ {
		all = append(all, e)
	}
	return all
}

// Name returns the error's name in counters and access logs.
func (e Error) Name() string { return errorTexts[e].name }

// Status returns the status of the response to a request with the error: 431 if it is too large (RFC 6585 §5),
// otherwise 400.
func (e Error) Status() int {
	switch e {
	case ErrHeadTooLarge, ErrTooManyFields, ErrTrailersTooLarge:
		return 431
	}
	return 400
}
