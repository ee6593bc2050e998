// Package http1test is a table of HTTP/1 messages, good, odd and hostile, each with what a strict proxy makes of it. It
// is for tests alone: the codec is held against it, and so may be whatever carries HTTP/1.
package http1test

import "strings"

// Message is what comes on a connection, and what becomes of it.
type Message struct {
	Name  string // the promise, unique in its table
	Bytes string // what comes; the message begins with the first byte
	Head  string // the head that goes on, with its empty line; empty when it is the one that came
	Rest  string // what is left of Bytes behind the message

	// Want is the name of the error, as the codec spells it, or how the message is framed, with the bytes of payload
	// that come: "no body", "sized 5", "chunked 5", "until close 5" or "tunnel". Or it is Incomplete.
	Want string

	// Method is that of the request that a response answers; empty is GET.
	Method string
}

// Incomplete is the Want of a message that ends too early.
const Incomplete = "incomplete"

// Good reports whether the message is whole and well formed: Want is a framing, which has a blank or is "tunnel", and not
// the name of an error.
func (m Message) Good() bool { return m.Want == "tunnel" || strings.Contains(m.Want, " ") }

// Forwarded is the head that goes on, without its empty line. Whoever forwards may add fields behind it.
func (m Message) Forwarded() string {
	head := m.Head
	if head == "" {
		head, _, _ = strings.Cut(m.Bytes, "\r\n\r\n")
		return head + "\r\n"
	}
	return strings.TrimSuffix(head, "\r\n")
}
