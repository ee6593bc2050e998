package bench

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// A minimal client and origin for HTTP/2 without TLS, with prior knowledge (RFC 9113 §3.3): small requests without a body,
// responses with smallBody, and precomputed field blocks. Each request and each response is a separate write, as from
// independent callers. Streams that move in lockstep would save the proxy most of its reads and writes.

const clientPreface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

// RFC 9113 §6 and §6.5.2.
const (
	frameHeaderSize = 9

	frameData         = 0x0
	frameHeaders      = 0x1
	frameReset        = 0x3
	frameSettings     = 0x4
	framePing         = 0x6
	frameGoAway       = 0x7
	frameWindowUpdate = 0x8

	flagAck        = 0x1 // of SETTINGS and PING
	flagEndStream  = 0x1 // of DATA and HEADERS
	flagEndHeaders = 0x4
	flagPadded     = 0x8
	flagPriority   = 0x20

	settingTableSize  = 0x1
	settingMaxStreams = 0x3

	defaultTableSize = 4096
	defaultWindow    = 1<<16 - 1
	maxWindow        = 1<<31 - 1
)

type frame struct {
	kind, flags byte
	stream      uint32
	payload     []byte // valid until the next read
}

func (f frame) has(flag byte) bool { return f.flags&flag != 0 }

// content returns the payload of DATA and HEADERS without padding and priority.
func (f frame) content() ([]byte, error) {
	content := f.payload
	padding := 0
	if f.has(flagPadded) && len(content) > 0 {
		content, padding = content[1:], int(content[0])
	}
	if f.kind == frameHeaders && f.has(flagPriority) {
		content = content[min(5, len(content)):]
	}
	if padding > len(content) {
		return nil, fmt.Errorf("%d bytes of padding in a frame of %d", padding, len(f.payload))
	}
	return content[:len(content)-padding], nil
}

func appendFrame(to []byte, kind, flags byte, stream uint32, payload []byte) []byte {
	to = append(to, byte(len(payload)>>16), byte(len(payload)>>8), byte(len(payload)), kind, flags)
	to = binary.BigEndian.AppendUint32(to, stream)
	return append(to, payload...)
}

// fields is a list of fields in HPACK (RFC 7541), encoded beforehand. A connection sends first once, to add the fields
// to the dynamic table. Later blocks are again, with references to the table. If the other side disables the table, all
// are plain.
type fields struct{ first, again, plain []byte }

// field has a name of the static table and a value of less than 127 bytes.
type field struct {
	name  byte
	value string
}

// newFields returns a list that begins with fields of the static table.
func newFields(static string, others ...field) fields {
	const sizeUpdateToZero = "\x20"
	list := fields{[]byte(static), []byte(static), []byte(sizeUpdateToZero + static)}
	for i, f := range others {
		literal := append([]byte{byte(len(f.value))}, f.value...)
		list.first = append(append(list.first, 0x40|f.name), literal...)
		list.again = append(list.again, 0x80|byte(62+len(others)-1-i)) // the last one added has index 62
		if f.name < 15 {
			list.plain = append(list.plain, f.name)
		} else {
			list.plain = append(list.plain, 15, f.name-15)
		}
		list.plain = append(list.plain, literal...)
	}
	return list
}

// The fields of requests and responses. The bytes for the static table mean GET, http and "/", and status 200.
var (
	requestFields = newFields("\x82\x86\x84",
		field{1, fmt.Sprintf("workload.example:%d", http2Port)}, field{58, "load"}, field{19, "*/*"})
	answerFields = newFields("\x88",
		field{54, "origin"}, field{33, "Thu, 01 Jan 2026 00:00:00 GMT"}, field{31, "text/plain"},
		field{28, fmt.Sprint(len(smallBody))})
)

// http2Conn is the common part of client and origin.
type http2Conn struct {
	*socket
	skip    int    // bytes to skip before the first frame
	partial []byte // incomplete frame
	out     []byte // frames for one write
	fields  fields
	entered bool // fields are in the dynamic table
	plain   bool // the other side does not allow the dynamic table
}

// take passes each complete frame to serve, except those that c.serve answers itself.
func (c *http2Conn) take(in []byte, serve func(frame) error) error {
	if len(c.partial) > 0 {
		in = append(c.partial, in...)
	}
	skipped := min(c.skip, len(in))
	in, c.skip = in[skipped:], c.skip-skipped
	for len(in) >= frameHeaderSize {
		end := frameHeaderSize + int(in[0])<<16 + int(in[1])<<8 + int(in[2])
		if len(in) < end {
			break
		}
		f := frame{in[3], in[4], binary.BigEndian.Uint32(in[5:]) & maxWindow, in[frameHeaderSize:end]}
		if err := c.serve(f, serve); err != nil {
			return err
		}
		in = in[end:]
	}
	c.partial = append(c.partial[:0], in...)
	return nil
}

func (c *http2Conn) serve(f frame, others func(frame) error) error {
	switch {
	case f.kind == frameReset || f.kind == frameGoAway:
		return fmt.Errorf("frame %#x on stream %d: %q", f.kind, f.stream, f.payload)
	case f.kind == frameHeaders && !f.has(flagEndHeaders):
		return errors.New("field block in more than one frame")
	case f.kind == framePing && !f.has(flagAck):
		c.out = appendFrame(c.out, framePing, flagAck, 0, f.payload)
		return c.flush()
	case f.kind == frameSettings && !f.has(flagAck):
		for s := f.payload; len(s) >= 6; s = s[6:] {
			if binary.BigEndian.Uint16(s) == settingTableSize {
				c.plain = binary.BigEndian.Uint32(s[2:]) < defaultTableSize
			}
		}
		c.out = appendFrame(c.out, frameSettings, flagAck, 0, nil)
		if err := c.flush(); err != nil {
			return err
		}
	}
	return others(f)
}

// appendFields appends a HEADERS frame with c.fields.
func (c *http2Conn) appendFields(stream uint32, flags byte) {
	block := c.fields.first
	switch {
	case c.plain:
		block = c.fields.plain
	case c.entered:
		block = c.fields.again
	}
	c.entered = !c.plain
	c.out = appendFrame(c.out, frameHeaders, flagEndHeaders|flags, stream, block)
}

func (c *http2Conn) flush() error {
	if len(c.out) == 0 {
		return nil
	}
	err := c.write(c.out)
	c.out = c.out[:0]
	return err
}

// http2Origin answers every request with smallBody.
type http2Origin struct {
	http2Conn
	window  int      // send window of the connection; that of a stream always suffices for one response
	waiting []uint32 // streams that wait for the window
}

func newHTTP2Origin(s *socket) reader {
	o := &http2Origin{http2Conn{socket: s, skip: len(clientPreface), fields: answerFields}, defaultWindow, nil}
	o.out = appendFrame(o.out, frameSettings, 0, 0, []byte{0, settingMaxStreams, 0, 0, 0, 128})
	return o
}

// readable closes the connection after an error. The load then misses a response and reports it.
func (o *http2Origin) readable() error {
	in, err := o.read()
	if err == nil {
		err = o.take(in, o.answer)
	}
	if err != nil {
		o.close()
	}
	return nil
}

func (o *http2Origin) answer(f frame) error {
	switch {
	case f.kind == frameWindowUpdate && f.stream == 0 && len(f.payload) == 4:
		o.window += int(binary.BigEndian.Uint32(f.payload))
	case (f.kind == frameHeaders || f.kind == frameData) && f.has(flagEndStream):
		o.waiting = append(o.waiting, f.stream)
	}
	for len(o.waiting) > 0 && o.window >= len(smallBody) {
		o.appendFields(o.waiting[0], 0)
		o.out = appendFrame(o.out, frameData, flagEndStream, o.waiting[0], []byte(smallBody))
		if err := o.flush(); err != nil {
			return err
		}
		o.window -= len(smallBody)
		o.waiting = o.waiting[:copy(o.waiting, o.waiting[1:])]
	}
	return nil
}

// http2Client sends several concurrent requests on a connection in a loop.
type http2Client struct {
	http2Conn
	streams uint32 // opened so far
	greeted bool   // the other side's SETTINGS have arrived
	body    int    // bytes of all responses' bodies
	ended   func(*http2Client) error
}

// greet announces a window that no load fills, so that no further WINDOW_UPDATE is needed.
func (c *http2Client) greet() error {
	c.out = append(c.out, clientPreface...)
	c.out = appendFrame(c.out, frameSettings, 0, 0, nil)
	c.out = appendFrame(c.out, frameWindowUpdate, 0, 0, binary.BigEndian.AppendUint32(nil, maxWindow-defaultWindow))
	return c.flush()
}

func (c *http2Client) send() error {
	c.appendFields(2*c.streams+1, flagEndStream)
	c.streams++
	return c.flush()
}

func (c *http2Client) readable() error {
	in, err := c.read()
	if err != nil {
		return fmt.Errorf("response missing: %w", err)
	}
	return c.take(in, c.serveAnswer)
}

func (c *http2Client) serveAnswer(f frame) error {
	var content []byte
	var err error
	switch f.kind {
	case frameSettings:
		c.greeted = true
		return nil
	case frameHeaders:
		if content, err = f.content(); err == nil && !isOK(content) {
			err = fmt.Errorf("unexpected response % x", content)
		}
	case frameData:
		content, err = f.content()
		c.body += len(content)
	default:
		return nil
	}
	if err == nil && f.has(flagEndStream) {
		err = c.ended(c)
	}
	return err
}

// isOK reports whether a field block begins with status 200 from the static table, after any table size updates.
func isOK(block []byte) bool {
	for len(block) > 0 && block[0]>>5 == 1 {
		more := block[0] == 0x3f
		for block = block[1:]; more && len(block) > 0; block = block[1:] {
			more = block[0] >= 0x80
		}
	}
	return len(block) > 0 && block[0] == 0x88
}

// dialHTTP2 opens HTTP/2 connections in a new loop and waits for the other sides' SETTINGS. ended is called for every
// response.
func dialHTTP2(connections int, ended func(*http2Client) error) (*loop, []*http2Client, error) {
	l, err := newLoop()
	if err != nil {
		return nil, nil, err
	}
	clients := make([]*http2Client, connections)
	for i := range clients {
		s, err := l.dial(int64(i), http2Port)
		if err != nil {
			return nil, nil, err
		}
		clients[i] = &http2Client{http2Conn: http2Conn{socket: s, fields: requestFields}, ended: ended}
		if err := l.add(s.fd, clients[i]); err != nil {
			return nil, nil, err
		}
		if err := clients[i].greet(); err != nil {
			return nil, nil, err
		}
	}
	greeted := 0
	return l, clients, l.run(patience, func() bool {
		for greeted < len(clients) && clients[greeted].greeted {
			greeted++
		}
		return greeted == len(clients)
	})
}

// http2Load keeps a number of requests in progress on each connection.
func http2Load(connections, streams int, requests int64) load {
	var l *loop
	var clients []*http2Client
	var toSend, toCome, answered int64
	next := func(c *http2Client) error {
		if toSend == 0 {
			return nil
		}
		toSend--
		return c.send()
	}
	all := func(n int64) error {
		toSend, toCome = n, n
		for _, c := range clients {
			for range streams {
				if err := next(c); err != nil {
					return err
				}
			}
		}
		if err := l.run(patience, func() bool { return toCome == 0 }); err != nil {
			return err
		}
		body := 0
		for _, c := range clients {
			body += c.body
		}
		if want := int(answered) * len(smallBody); body != want {
			return fmt.Errorf("responses had %d bytes in all, want %d", body, want)
		}
		return nil
	}
	return load{
		warm: func() (err error) {
			l, clients, err = dialHTTP2(connections, func(c *http2Client) error {
				toCome--
				answered++
				return next(c)
			})
			if err != nil {
				return err
			}
			return all(min(requests, 5000))
		},
		run: func() error { return all(requests) },
	}
}
