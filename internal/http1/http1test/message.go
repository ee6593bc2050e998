// Package http1test is a table of HTTP/1 messages, good, odd and hostile, each with what a strict proxy makes of it. It
// is for tests alone: the codec is held against it, and so may be whatever carries HTTP/1.
package http1test

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
