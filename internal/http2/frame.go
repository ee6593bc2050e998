// Package http2 implements the wire format of HTTP/2 (RFC 9113): frames, settings, header blocks, and the validity of
// messages.
//
// Frames are read in place, from the caller's buffer, and written by appending to a slice. The package does no I/O; its
// only state are the two HPACK tables (RFC 7541).
package http2

import "encoding/binary"

// Preface is the first thing a client sends (RFC 9113 §3.4).
const Preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

// The sizes of frames.
const (
	HeaderLength = 9                 // length of a frame header
	MinFrameSize = 1 << 14           // accepted by every receiver; initial value of MAX_FRAME_SIZE
	MaxFrameSize = 1<<24 - 1         // maximum of MAX_FRAME_SIZE
	MaxStream    = 1<<31 - 1         // the highest stream number
	MaxWindow    = 1<<31 - 1         // the largest flow-control window
	FirstWindow  = 1<<16 - 1         // initial window
	FirstTable   = 4 << 10           // initial size of a header table
	padding      = 1                 // length of the Pad Length field
	priority     = 5                 // length of the priority fields
	reserved     = uint32(1) << 31   // a bit that receivers ignore
	flagsOfBlock = Padded | Priority // flags that add bytes around a header block
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

// Flags are a frame's flags. The meaning of a bit depends on the type.
type Flags uint8

// The flags.
const (
	EndStream  Flags = 0x1  // of Data and Headers: the message ends; only Continuation may follow
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

// ParseHeader parses the first HeaderLength bytes of b.
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

// Check validates a header by itself: whether a frame of its type may have this length, and whether it belongs to a
// stream or to the connection. limit is the largest payload that the receiver accepts. All errors are connection
// errors; RFC 9113 §5.4.2 would allow stream errors for some, but such a peer is broken.
func (h Header) Check(limit int) error {
	if h.Length > limit {
		return connectionError(FrameSizeError, "frame larger than MAX_FRAME_SIZE")
	}
	switch h.Type {
	case Data, Headers, PriorityFrame, ResetStream, PushPromise, Continuation:
		if h.Stream == 0 {
			return connectionError(ProtocolError, "stream frame without a stream ID")
		}
	case Settings, Ping, GoAway:
		if h.Stream != 0 {
			return connectionError(ProtocolError, "connection frame with a stream ID")
		}
	}
	if !h.lengthFits() {
		return connectionError(FrameSizeError, "wrong frame size")
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

// Padding returns how many bytes of a payload precede and follow its content. first is the first byte of the payload;
// it is used only if the frame is padded.
func (h Header) Padding(first byte) (before, behind int, err error) {
	if !h.Has(Padded) {
		return 0, 0, nil
	}
	if h.Length == 0 {
		return 0, 0, connectionError(FrameSizeError, "padded frame without padding")
	}
	if int(first) >= h.Length {
		return 0, 0, connectionError(ProtocolError, "padding longer than the frame")
	}
	return padding, int(first), nil
}

// Fragment returns the header block fragment of a HEADERS frame: its payload without padding and priority. A stream
// that depends on itself is a stream error.
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

// DependsOnItself checks the priority at the beginning of b. Priorities are obsolete and otherwise ignored (RFC 9113
// §5.3.2).
func DependsOnItself(stream uint32, b []byte) bool { return Uint31(b) == stream }

// Uint31 reads a 31-bit number: a stream ID, or a window increment.
func Uint31(b []byte) uint32 { return binary.BigEndian.Uint32(b) &^ reserved }

// Uint32 reads a 32-bit number: an error code.
func Uint32(b []byte) uint32 { return binary.BigEndian.Uint32(b) }

// PutUint32 writes a 32-bit number.
func PutUint32(b []byte, n uint32) { binary.BigEndian.PutUint32(b, n) }

// AppendResetStream appends a RST_STREAM frame.
func AppendResetStream(dst []byte, stream uint32, code Code) []byte {
	dst = Header{Length: 4, Type: ResetStream, Stream: stream}.Append(dst)
	return binary.BigEndian.AppendUint32(dst, uint32(code))
}

// AppendWindowUpdate appends a WINDOW_UPDATE of n bytes for a stream, or with zero for the connection.
func AppendWindowUpdate(dst []byte, stream uint32, n int) []byte {
	dst = Header{Length: 4, Type: WindowUpdate, Stream: stream}.Append(dst)
	return binary.BigEndian.AppendUint32(dst, uint32(n))
}

// AppendGoAway appends a GOAWAY frame. Streams above last are not served. The text is for people.
func AppendGoAway(dst []byte, last uint32, code Code, text string) []byte {
	dst = Header{Length: 8 + len(text), Type: GoAway}.Append(dst)
	dst = binary.BigEndian.AppendUint32(dst, last)
	dst = binary.BigEndian.AppendUint32(dst, uint32(code))
	return append(dst, text...)
}
