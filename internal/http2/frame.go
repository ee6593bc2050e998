// Package http2 is the wire format of HTTP/2 (RFC 9113): frames, settings, header blocks, and what a well-formed message
// is.
//
// Frames are read in place, from whatever buffer their bytes are in, and written by appending to the caller's. The
// package keeps no connection, and no state but the two tables of HPACK (RFC 7541).
package http2

import "encoding/binary"

// Preface is what a client says first (RFC 9113 §3.4).
const Preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

// The sizes of frames.
const (
	HeaderLength = 9                 // of each frame's header
	MinFrameSize = 1 << 14           // what every receiver takes, and the first value of MAX_FRAME_SIZE
	MaxFrameSize = 1<<24 - 1         // what MAX_FRAME_SIZE may be raised to
	MaxStream    = 1<<31 - 1         // the highest stream number
	MaxWindow    = 1<<31 - 1         // the largest flow-control window
	FirstWindow  = 1<<16 - 1         // what a window is before anything is said about it
	FirstTable   = 4 << 10           // what a header table holds before anything is said about it
	padding      = 1                 // the byte that says how much padding there is
	priority     = 5                 // the fields of a priority
	reserved     = uint32(1) << 31   // a bit that is to be ignored
	flagsOfBlock = Padded | Priority // flags that put something around a header block
)

// FrameType is a frame's type.
type FrameType uint8

// The types of RFC 9113 §6. Others are extensions.
const (
	Data FrameType = iota
	Headers
	PriorityFrame
	ResetStream
	Settings
	PushPromise
	Ping
	GoAway
	WindowUpdate
	Continuation
)

// Flags are a frame's flags. What a bit means depends on the type.
type Flags uint8

// The flags.
const (
	EndStream  Flags = 0x1  // of Data and Headers: the sender's last frame on this stream but for what belongs to it
	Ack        Flags = 0x1  // of Settings and Ping
	EndHeaders Flags = 0x4  // of Headers and Continuation: the header block is complete
	Padded     Flags = 0x8  // of Data and Headers
	Priority   Flags = 0x20 // of Headers
)

// Header is the header of a frame.
type Header struct {
	Length int // of the payload
	Type   FrameType
	Flags  Flags
	Stream uint32
}

// ParseHeader reads the HeaderLength bytes that b begins with.
func ParseHeader(b []byte) Header {
	_ = b[HeaderLength-1]
	return Header{
		Length: int(b[0])<<16 | int(b[1])<<8 | int(b[2]),
		Type:   FrameType(b[3]),
		Flags:  Flags(b[4]),
		Stream: binary.BigEndian.Uint32(b[5:]) &^ reserved,
	}
}

// Put writes the header to the first HeaderLength bytes of b.
func (h Header) Put(b []byte) {
	_ = b[HeaderLength-1]
	b[0], b[1], b[2] = byte(h.Length>>16), byte(h.Length>>8), byte(h.Length)
	b[3], b[4] = byte(h.Type), byte(h.Flags)
	binary.BigEndian.PutUint32(b[5:], h.Stream)
}

// Append appends the header to dst.
func (h Header) Append(dst []byte) []byte {
	var b [HeaderLength]byte
	h.Put(b[:])
	return append(dst, b[:]...)
}

// Has reports whether a flag is set.
func (h Header) Has(flag Flags) bool { return h.Flags&flag != 0 }

// Check judges a header by itself: whether a frame of its type may have this length, and belong to a stream or to the
// connection. limit is the largest payload that the receiver takes. Wrong headers are errors of the connection: some
// could be errors of the stream alone (RFC 9113 §5.4.2 allows either), but whoever sends them is broken.
func (h Header) Check(limit int) error {
	if h.Length > limit {
		return connectionError(FrameSizeError, "frame larger than MAX_FRAME_SIZE")
	}
	switch h.Type {
	case Data, Headers, PriorityFrame, ResetStream, PushPromise, Continuation:
		if h.Stream == 0 {
			return connectionError(ProtocolError, "frame of a stream without a stream")
		}
	case Settings, Ping, GoAway:
		if h.Stream != 0 {
			return connectionError(ProtocolError, "frame of the connection with a stream")
		}
	}
	if !h.lengthFits() {
		return connectionError(FrameSizeError, "frame of a wrong size")
	}
	return nil
}

func (h Header) lengthFits() bool {
	switch h.Type {
	case PriorityFrame:
		return h.Length == priority
	case ResetStream, WindowUpdate:
		return h.Length == 4
	case Settings:
		return h.Length%settingLength == 0 && (h.Length == 0 || !h.Has(Ack))
	case Ping:
		return h.Length == 8
	case GoAway:
		return h.Length >= 8
	}
	return true
}

// Padding returns how many bytes of a payload stand in front of its content, and how many behind it. first is the first
// byte of the payload, which is looked at when the frame is padded.
func (h Header) Padding(first byte) (before, behind int, err error) {
	if !h.Has(Padded) {
		return 0, 0, nil
	}
	if h.Length == 0 {
		return 0, 0, connectionError(FrameSizeError, "padded frame without padding")
	}
	if int(first) >= h.Length {
		return 0, 0, connectionError(ProtocolError, "more padding than frame")
	}
	return padding, int(first), nil
}

// Fragment returns the piece of a header block that a Headers frame carries: its payload without padding and priority.
// A stream that depends on itself is an error of that stream.
func (h Header) Fragment(payload []byte) ([]byte, error) {
	if h.Flags&flagsOfBlock == 0 {
		return payload, nil
	}
	var first byte
	if len(payload) > 0 {
		first = payload[0]
	}
	before, behind, err := h.Padding(first)
	if err != nil {
		return nil, err
	}
	content := payload[before : len(payload)-behind]
	if !h.Has(Priority) {
		return content, nil
	}
	if len(content) < priority {
		return nil, connectionError(FrameSizeError, "frame too short for its priority")
	}
	if DependsOnItself(h.Stream, content) {
		err = StreamError(h.Stream, ProtocolError, "stream depends on itself")
	}
	return content[priority:], err
}

// DependsOnItself looks at the priority that b begins with. Priorities are obsolete and not otherwise regarded
// (RFC 9113 §5.3.2).
func DependsOnItself(stream uint32, b []byte) bool { return Uint31(b) == stream }

// Uint31 reads a number of 31 bits: a stream, or a window's increment.
func Uint31(b []byte) uint32 { return binary.BigEndian.Uint32(b) &^ reserved }

// Uint32 reads a number of 32 bits: an error code.
func Uint32(b []byte) uint32 { return binary.BigEndian.Uint32(b) }

// PutUint32 is the reverse of Uint32.
func PutUint32(b []byte, n uint32) { binary.BigEndian.PutUint32(b, n) }

// AppendResetStream appends a frame that ends a stream.
func AppendResetStream(dst []byte, stream uint32, code Code) []byte {
	dst = Header{Length: 4, Type: ResetStream, Stream: stream}.Append(dst)
	return binary.BigEndian.AppendUint32(dst, uint32(code))
}

// AppendWindowUpdate appends a frame that lets the receiver send n more bytes, on a stream, or, with zero, on all.
func AppendWindowUpdate(dst []byte, stream uint32, n int) []byte {
	dst = Header{Length: 4, Type: WindowUpdate, Stream: stream}.Append(dst)
	return binary.BigEndian.AppendUint32(dst, uint32(n))
}

// AppendGoAway appends a frame that ends the connection for streams above last. The text is for people.
func AppendGoAway(dst []byte, last uint32, code Code, text string) []byte {
	dst = Header{Length: 8 + len(text), Type: GoAway}.Append(dst)
	dst = binary.BigEndian.AppendUint32(dst, last)
	dst = binary.BigEndian.AppendUint32(dst, uint32(code))
	return append(dst, text...)
}
