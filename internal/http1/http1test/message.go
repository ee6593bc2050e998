// Package http1test is a table of valid, unusual and hostile HTTP/1 messages, each with the result expected of a strict
// proxy. It is for tests only: of the codec, and of anything that forwards HTTP/1.
package http1test

import "strings"

// Message is the input of a connection and the expected result.
type Message struct {
	Name  string // the promise, unique in its table
	Bytes string // the input; the message begins at the first byte
	Head  string // the forwarded head, with its empty line; if empty, the head of Bytes
	Rest  string // the bytes after the message

	// Want is the name of the error, as the codec spells it; or the framing and the number of payload bytes: "no body",
	// "sized 5", "chunked 5", "until close 5" or "tunnel"; or Incomplete.
	Want string

	// Method is the method of the request to which this is a response; if empty, GET.
	Method string
}

// Incomplete is the Want of a truncated message.
const Incomplete = "incomplete"

// Good reports whether the message is complete and valid: Want is a framing, not the name of an error. Framings are
// "tunnel" or contain a space.
func (m Message) Good() bool { return m.Want == "tunnel" || strings.Contains(m.Want, " ") }

// Forwarded returns the forwarded head without its empty line. A proxy may append fields to it.
func (m Message) Forwarded() string {
	head := m.Head
	if head == "" {
		head, _, _ = strings.Cut(m.Bytes, "\r\n\r\n")
		return head + "\r\n"
	}
	return strings.TrimSuffix(head, "\r\n")
}
