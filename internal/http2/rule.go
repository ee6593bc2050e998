package http2

import (
	"errors"
	"fmt"
)

// The two kinds of malformed message (RFC 9113 §8.1.1). Every Rule is one of them, by errors.Is.
var (
	ErrField   = errors.New("HTTP/2: invalid field")
	ErrMessage = errors.New("HTTP/2: malformed message")
)

// Rule is a rule that a malformed message breaks: one of a closed set, small enough to be returned as an error without an
// allocation.
type Rule uint8

// The rules.
const (
	BadFieldName Rule = iota + 1
	BadFieldValue
	BadPseudoField
	WrongPseudoFields
	BadStatus
	ConnectionField
	RepeatedHost
	BadHost
	HostDiffers
	BadContentLength
	ContentLengthsDiffer
	LengthMismatch
	ForbiddenTrailer
	MisplacedTrailers
	TooManyInterim
	ruleCount
)

var ruleTexts = [ruleCount]struct{ name, text string }{
	BadFieldName:         {"bad_field_name", "a field name that is not a token in lower case"},
	BadFieldValue:        {"bad_field_value", "a field value with NUL, CR or LF"},
	BadPseudoField:       {"bad_pseudo_field", "a pseudo-field that is unknown, repeated, misplaced or invalid"},
	WrongPseudoFields:    {"wrong_pseudo_fields", "a request without a pseudo-field that it needs, or with one that it must not have"},
	BadStatus:            {"bad_status", "a response that does not begin with a valid :status"},
	ConnectionField:      {"connection_field", "a field that concerns the connection"},
	RepeatedHost:         {"repeated_host", "more than one host"},
	BadHost:              {"bad_host", "a host or :authority that is not a valid host"},
	HostDiffers:          {"host_differs", "a host other than :authority"},
	BadContentLength:     {"bad_content_length", "a content-length that is not a number up to 2^63-1"},
	ContentLengthsDiffer: {"content_lengths_differ", "content-lengths that differ"},
	LengthMismatch:       {"length_mismatch", "a body of another length than declared"},
	ForbiddenTrailer:     {"forbidden_trailer", "a trailer field for framing, routing or the connection"},
	MisplacedTrailers:    {"misplaced_trailers", "a header block behind the head that does not end the message"},
	TooManyInterim:       {"too_many_interim", "too many interim responses"},
}

// Rules returns all rules.
func Rules() (all []Rule) {
	for r := Rule(1); r < ruleCount; r++ {
		all = append(all, r)
	}
	return all
}

// Error returns the kind of the malformed message and Text.
func (r Rule) Error() string { return r.kind().Error() + ": " + r.Text() }

// Text returns a short description that begins with a lower-case letter.
func (r Rule) Text() string { return ruleTexts[r].text }

// Name returns the rule's name in access logs.
func (r Rule) Name() string { return ruleTexts[r].name }

// Is reports the kind of the malformed message.
func (r Rule) Is(target error) bool { return target == r.kind() }

func (r Rule) kind() error {
	if r == BadFieldName || r == BadFieldValue {
		return ErrField
	}
	return ErrMessage
}

// FieldError is a Rule with the field that breaks it.
type FieldError struct {
	Rule Rule
	Name string // shortened
}

// maxNamed is the longest field name in a FieldError.
const maxNamed = 64

func fieldError(rule Rule, f *Field) error {
	return &FieldError{rule, f.Name[:min(len(f.Name), maxNamed)]}
}

func (e *FieldError) Error() string { return fmt.Sprintf("%v: %q", e.Rule, e.Name) }
func (e *FieldError) Unwrap() error { return e.Rule }
