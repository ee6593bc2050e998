package http1

// Error is what is wrong with a message: one of a closed set, small enough to be an error without an allocation. A
// request that has one is answered with Status and a close; a response that has one is answered for with 502.
type Error uint8

// What can be wrong with a message.
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
	ErrBadRequestLine:           {"bad_request_line", "the first line is no request line"},
	ErrBadStatusLine:            {"bad_status_line", "the first line is no status line"},
	ErrBadVersion:               {"bad_version", "the first line does not say HTTP/1.x"},
	ErrBareCR:                   {"bare_cr", "a CR that no LF follows"},
	ErrNUL:                      {"nul", "a NUL"},
	ErrObsFold:                  {"obs_fold", "a field line that begins with white space"},
	ErrNoColon:                  {"no_colon", "a field line without a colon"},
	ErrSpaceBeforeColon:         {"space_before_colon", "white space between a field name and its colon"},
	ErrBadFieldName:             {"bad_field_name", "a field name that is no token"},
	ErrMissingHost:              {"missing_host", "an HTTP/1.1 request without Host"},
	ErrRepeatedHost:             {"repeated_host", "more than one Host"},
	ErrBadHost:                  {"bad_host", "a Host that is no host"},
	ErrBadContentLength:         {"bad_content_length", "a Content-Length that is no number up to 2^63-1"},
	ErrContentLengthsDiffer:     {"content_lengths_differ", "more than one Content-Length"},
	ErrBothFramings:             {"both_framings", "both Transfer-Encoding and Content-Length"},
	ErrUnsupportedCoding:        {"unsupported_coding", "a Transfer-Encoding that is not just chunked"},
	ErrRepeatedTransferEncoding: {"repeated_transfer_encoding", "more than one Transfer-Encoding"},
	ErrTransferEncodingInHTTP10: {"transfer_encoding_in_http10", "a Transfer-Encoding in HTTP/1.0"},
	ErrBadChunkSize:             {"bad_chunk_size", "a chunk size that is no hexadecimal number up to 2^63-1"},
	ErrChunkLineTooLong:         {"chunk_line_too_long", "a chunk size with its extensions that is longer than 4 KiB"},
	ErrBareLF:                   {"bare_lf", "a line of chunk framing that ends with LF alone"},
	ErrBadChunkEnd:              {"bad_chunk_end", "a chunk that does not end with CRLF"},
	ErrForbiddenTrailer:         {"forbidden_trailer", "a trailer field that frames or routes"},
	ErrTrailersTooLarge:         {"trailers_too_large", "trailers that are larger than the limit"},
}

// Error is one sentence, without a capital.
func (e Error) Error() string { return errorTexts[e].text }

// Name is the error's word for counters and access logs.
func (e Error) Name() string { return errorTexts[e].name }

// Status is how a server answers a request that has the error: 431 when there is too much of it (RFC 6585 §5), else 400.
func (e Error) Status() int {
	switch e {
	case ErrHeadTooLarge, ErrTooManyFields, ErrTrailersTooLarge:
		return 431
	}
	return 400
}
