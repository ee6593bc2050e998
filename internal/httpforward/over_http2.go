package httpforward

import (
	"crypto/sha1"
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/pillion-proxy/pillion/internal/http1"
	"github.com/pillion-proxy/pillion/internal/http2"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

// overHTTP2 is a layer of an upstream connection: what is written as HTTP/1 goes to the server as HTTP/2, and its responses are
// read as HTTP/1. The connection carries one stream at a time, like one of HTTP/1, so it is kept and shared like one.
//
// Data is sent as the server's windows allow: Write takes less, and then ErrAgain means to wait for the connection. The server
// gets credit back as its data is read.
type overHTTP2 struct {
	below  tcp.Raw
	limits http1.Limits

	overOutput
	overInput
	exchangeOver
}

// overOutput is the server's part of the connection's state.
type overOutput struct {
	out     []byte // frames of one call
	encoder *http2.Encoder
	window  int64 // of the connection
	initial int64 // of a stream
	extends bool  // the server supports extended CONNECT (RFC 8441)
	next    uint32
	ends    bool   // no request follows: the server has sent GOAWAY
	partial []byte // the beginning of a head
}

// overInput is what was received and not read yet.
type overInput struct {
	in      []byte // frames, in a slab
	parsed  int    // of in
	ready   []byte // of the response
	read    int    // of ready
	err     error  // behind ready
	greeted bool
	decoder *http2.Decoder
	block   block
	idle    bucket
	owed    int // credit of the connection to be given back
}

// exchangeOver is the request in progress and its response.
type exchangeOver struct {
	id     uint32 // of the stream; 0: there was none yet
	method string
	minor  int    // of the request
	key    string // of a websocket that was asked for

	head      http1.Head
	request   http1.Body
	begun     bool // the head was sent
	tunnel    bool // a successful response opens a tunnel
	requested bool // the end was sent, or is not wanted any more
	sending   int64
	trailing  []http2.Field

	response  body
	answered  bool
	responded bool // the whole response is received
	framing   http1.FramingKind
	streamOwe int // credit of the stream to be given back
}

const overWindow = 1 << 20 // that a server has on a connection and on a stream

// carryOverHTTP2 puts the layer on a fresh connection. What it writes first comes with the first request.
func carryOverHTTP2(up *tcp.Conn, settings *Settings) {
	up.AddLayer(func(below tcp.Raw) tcp.Layer {
		o := &overHTTP2{below: below, limits: http1.Limits{Head: 2*settings.MaxHeadBytes + 64<<10, Fields: 2*settings.MaxHeadFields + 1000}}
		o.encoder, o.window, o.initial, o.next = http2.NewEncoder(), http2.FirstWindow, http2.FirstWindow, 1
		o.decoder = http2.NewDecoder(settings.MaxHeadBytes, settings.MaxHeadFields)
		o.idle = newIdleBucket(time.Now())
		o.requested, o.responded = true, true
		o.out = append(o.out, http2.Preface...)
		o.out = appendSettings(o.out, []http2.Setting{
			{ID: http2.EnablePush, Value: 0},
			{ID: http2.InitialWindowSize, Value: overWindow},
			{ID: http2.MaxHeaderListSize, Value: uint32(settings.MaxHeadBytes)},
		})
		o.out = http2.AppendWindowUpdate(o.out, 0, overWindow-http2.FirstWindow)
		return o
	})
}

// Write implements tcp.Layer.
func (o *overHTTP2) Write(p []byte) (int, error) {
	taken, err := o.take(p)
	if flushed := o.flush(); flushed != nil {
		return taken, flushed
	}
	if taken > 0 && err == tcp.ErrAgain {
		err = nil
	}
	return taken, err
}

func (o *overHTTP2) flush() error {
	if len(o.out) == 0 {
		return nil
	}
	_, err := o.below.Write(o.out)
	if o.out = o.out[:0]; cap(o.out) > keptScratch {
		o.out = nil
	}
	return err
}

// take makes frames of p, and returns how much of it was taken.
func (o *overHTTP2) take(p []byte) (taken int, err error) {
	for taken < len(p) {
		var n int
		if o.begun {
			n, err = o.takeBody(p[taken:])
		} else {
			n, err = o.takeHead(p[taken:])
		}
		if taken += n; err != nil || n == 0 {
			return taken, err
		}
	}
	return taken, nil
}

// takeHead begins a request once its whole head is there.
func (o *overHTTP2) takeHead(p []byte) (int, error) {
	if o.ends || o.next > http2.MaxStream {
		return 0, errRefusedStream
	}
	o.exchangeOver = exchangeOver{head: o.head, id: o.id, requested: true, responded: true}
	h, b := &o.head, p
	h.Reset()
	before := len(o.partial)
	if before > 0 {
		b = append(o.partial, p...)
	}
	done, err := h.ParseRequest(b, o.limits)
	if err == nil && !done {
		o.partial = append(o.partial, p...)
		return len(p), nil
	}
	var framing http1.Framing
	if err == nil {
		framing, err = h.RequestFraming(b)
	}
	if err != nil {
		return 0, err
	}
	upgrades := o.websocket(b)
	if upgrades && !o.greeted {
		return 0, tcp.ErrAgain // whether it can be asked for is in the server's settings
	}
	o.partial, o.responded = nil, false
	o.method, o.minor = string(h.Method.In(b)), h.Minor
	o.tunnel = upgrades && o.extends || o.method == http.MethodConnect
	o.id, o.begun = o.next, true
	o.next += 2
	o.sending, o.response = o.initial, body{declared: -1}
	if o.request.Start(framing, o.limits); o.tunnel {
		o.request.Start(http1.Framing{Kind: http1.UntilClose}, o.limits)
	}
	o.requested = o.request.Done()
	at := len(o.out)
	var room [http2.HeaderLength]byte
	o.out = http2.AppendHeaders(o.appendRequest(append(o.out, room[:]...), b), at, o.id, o.requested)
	o.idle.earn(idleBonus)
	o.begun = !o.requested
	return h.Length - before, nil
}

// websocket reports whether the request asks for a websocket.
func (o *overHTTP2) websocket(p []byte) bool {
	i := o.head.Find(http1.Upgrade)
	return i >= 0 && strings.EqualFold(string(o.head.Fields[i].Value.In(p)), "websocket") && string(o.head.Method.In(p)) == http.MethodGet
}

// appendRequest appends the header block of a request.
func (o *overHTTP2) appendRequest(block, p []byte) []byte {
	h := &o.head
	add := func(name, value string) { block = o.encoder.AppendField(block, http2.Field{Name: name, Value: value}) }
	scheme, authority, path := "http", string(h.Authority(p)), string(h.Target.In(p))
	if name, rest, found := strings.Cut(path, "://"); found && path[0] != '/' {
		scheme, path = strings.ToLower(name), "/"
		if i := strings.IndexAny(rest, "/?"); i >= 0 {
			path = rest[i:]
		}
		if path[0] == '?' {
			path = "/" + path
		}
	}
	websocket := o.tunnel && o.method != http.MethodConnect
	switch {
	case websocket:
		add(":method", http.MethodConnect)
		add(":protocol", "websocket")
	default:
		add(":method", o.method)
	}
	if o.method != http.MethodConnect {
		add(":scheme", scheme)
		add(":path", path)
	} else if authority == "" {
		authority = path
	}
	if authority != "" {
		add(":authority", authority)
	}
	h.DropHopByHop(p)
	for i := range h.Fields {
		f := &h.Fields[i]
		name, value := strings.ToLower(string(f.Name.In(p))), string(f.Value.In(p))
		switch {
		case f.Known == http1.TE && http1.Lists(f.Value.In(p), "trailers"):
			add("te", "trailers")
		case f.Dropped, f.Known == http1.Host, f.Known == http1.TransferEncoding:
		case websocket && name == "sec-websocket-key":
			o.key = value
		default:
			add(name, value)
		}
	}
	return block
}

// takeBody takes bytes of the request behind its head.
func (o *overHTTP2) takeBody(p []byte) (int, error) {
	if o.request.Payload() == 0 {
		return o.takeLine(p)
	}
	n := int(min(int64(len(p)), o.request.Payload()))
	if !o.requested {
		n = int(min(int64(n), o.window, o.sending, http2.MinFrameSize))
		if n <= 0 {
			return 0, tcp.ErrAgain
		}
	}
	if o.request.Skip(int64(n)); o.requested {
		o.begun = !o.request.Done()
		return n, nil
	}
	o.window -= int64(n)
	o.sending -= int64(n)
	o.sendData(p[:n], o.request.Done())
	o.idle.earn(idleBonus + n/idleBonusBytes)
	return n, nil
}

func (o *overHTTP2) sendData(data []byte, end bool) {
	frame := http2.Header{Length: len(data), Type: http2.Data, Stream: o.id}
	if end {
		frame.Flags = http2.EndStream
		o.requested, o.begun = true, false
	}
	o.out = append(frame.Append(o.out), data...)
}

// takeLine takes a line of chunk framing.
func (o *overHTTP2) takeLine(p []byte) (int, error) {
	n, trailer, err := o.request.Line(p)
	if err != nil {
		return 0, err
	}
	if trailer != nil {
		name, value, _ := strings.Cut(string(trailer), ":")
		o.trailing = append(o.trailing, http2.Field{Name: strings.ToLower(name), Value: strings.Trim(value, " \t")})
	}
	if !o.request.Done() {
		return n, nil
	}
	switch {
	case o.requested:
	case o.trailing == nil:
		o.sendData(nil, true)
	default:
		at := len(o.out)
		var room [http2.HeaderLength]byte
		block := append(o.out, room[:]...)
		for _, f := range o.trailing {
			block = o.encoder.AppendField(block, f)
		}
		o.out = http2.AppendHeaders(block, at, o.id, true)
		o.requested, o.trailing = true, nil
	}
	o.begun = false
	return n, nil
}

// Room implements tcp.Limited.
func (o *overHTTP2) Room() bool {
	switch {
	case o.err != nil:
		return true
	case !o.begun:
		return o.greeted
	}
	return o.requested || o.window > 0 && o.sending > 0
}

// CloseWrite implements tcp.Layer. It ends a tunnel. A request that is incomplete must not look complete.
func (o *overHTTP2) CloseWrite() error {
	if o.begun && !o.requested {
		if o.tunnel {
			o.sendData(nil, true)
		} else {
			o.out = http2.AppendResetStream(o.out, o.id, http2.Cancel)
		}
	}
	return o.flush()
}

// Buffered implements tcp.Layer.
func (o *overHTTP2) Buffered() bool {
	return o.read < len(o.ready) || o.err != nil || o.parsed < len(o.in)
}

// Read implements tcp.Layer.
func (o *overHTTP2) Read(p []byte) (int, error) {
	for o.read == len(o.ready) {
		o.ready, o.read = o.ready[:0], 0
		if cap(o.ready) > keptScratch {
			o.ready = nil
		}
		if o.err != nil {
			return 0, o.err
		}
		progress, err := o.step()
		if err == nil && !progress {
			err = o.fill()
		}
		if flushed := o.flush(); err == nil {
			err = flushed
		}
		switch {
		case err == tcp.ErrAgain:
			return 0, tcp.ErrAgain
		case err != nil:
			o.err = err
		}
	}
	n := copy(p, o.ready[o.read:])
	o.read += n
	return n, nil
}

// fill reads more frames.
func (o *overHTTP2) fill() error {
	switch {
	case o.in == nil:
		o.in = tcp.TakeSlab(http2.HeaderLength + http2.MinFrameSize)
	case o.parsed > 0:
		o.in, o.parsed = o.in[:copy(o.in, o.in[o.parsed:])], 0
	}
	n, err := o.below.Read(o.in[len(o.in):cap(o.in)])
	o.in = o.in[:len(o.in)+n]
	if len(o.in) == 0 {
		tcp.GiveSlab(o.in)
		o.in = nil
	}
	if n > 0 {
		return nil
	}
	return err
}

// step handles the next frame. It reports false if it is incomplete.
func (o *overHTTP2) step() (bool, error) {
	b := o.in[o.parsed:]
	if !o.greeted && !http2.BeginsLikeServer(b) {
		return false, errNotHTTP2
	}
	if len(b) < http2.HeaderLength {
		return false, nil
	}
	h := http2.ParseHeader(b)
	if err := h.Check(http2.MinFrameSize); err != nil {
		return false, err
	}
	switch {
	case !o.greeted && (h.Type != http2.Settings || h.Has(http2.Ack)):
		return false, http2.ConnectionError(http2.ProtocolError, "the first frame is not SETTINGS")
	case o.block.open != (h.Type == http2.Continuation), o.block.open && h.Stream != o.block.stream:
		return false, http2.ConnectionError(http2.ProtocolError, "a header block is interrupted")
	case h.Type == http2.PushPromise:
		return false, http2.ConnectionError(http2.ProtocolError, "a push")
	}
	whole := http2.HeaderLength + h.Length
	if len(b) < whole {
		return false, nil
	}
	o.parsed += whole
	return true, o.frame(h, b[http2.HeaderLength:whole])
}

// frame handles a whole frame.
func (o *overHTTP2) frame(h http2.Header, payload []byte) error {
	if h.Stream != 0 && h.Type != http2.PriorityFrame && (h.Stream >= o.next || h.Stream&1 == 0) {
		return http2.ConnectionError(http2.ProtocolError, "frame for an idle stream")
	}
	switch h.Type {
	case http2.Data:
		return o.data(h, payload)
	case http2.Headers:
		fragment, err := h.Fragment(payload)
		if err != nil {
			return err
		}
		o.block = block{open: true, stream: h.Stream, end: h.Has(http2.EndStream), fragments: o.block.fragments[:0]}
		return o.fragment(h, fragment)
	case http2.Continuation:
		if o.block.continuations++; o.block.continuations > maxContinuations {
			return errManyContinuations
		}
		return o.fragment(h, payload)
	case http2.Settings:
		return o.takeSettings(h, payload)
	case http2.ResetStream:
		return o.reset(h.Stream, http2.Code(http2.Uint32(payload)))
	case http2.WindowUpdate:
		return o.windowUpdate(h, payload)
	case http2.GoAway:
		if o.ends = true; o.id > http2.Uint31(payload) && !o.over() {
			return errRefusedStream
		}
		return o.endsIdle()
	case http2.Ping:
		if !h.Has(http2.Ack) {
			o.out = append(http2.Header{Length: len(payload), Type: http2.Ping, Flags: http2.Ack}.Append(o.out), payload...)
		}
	}
	return o.idleFrame()
}

func (o *overHTTP2) idleFrame() error {
	if o.idle.spend(time.Now) {
		return nil
	}
	return errManyIdle
}

// over reports whether there is no exchange in progress.
func (o *overHTTP2) over() bool { return o.requested && o.responded }

// endsIdle returns the error of a connection that takes no further request, if none is in progress.
func (o *overHTTP2) endsIdle() error {
	if o.ends && o.over() {
		return io.EOF
	}
	return nil
}

// fragment adds to a header block, and handles it if it is whole.
func (o *overHTTP2) fragment(h http2.Header, fragment []byte) error {
	if len(o.block.fragments)+len(fragment) > o.limits.Head {
		return http2.ConnectionError(http2.EnhanceYourCalm, "header block too large")
	}
	o.block.add(fragment)
	if !h.Has(http2.EndHeaders) {
		return nil
	}
	stream, end := o.block.stream, o.block.end
	fields, whole, err := o.decoder.Decode(o.block.fragments)
	defer o.decoder.Forget()
	o.block.free()
	switch {
	case err != nil:
		return err
	case stream != o.id || o.responded:
		return o.idleFrame() // crossed with a reset
	case !whole:
		return http2.StreamError(o.id, http2.ProtocolError, "header block over the limit")
	case o.answered:
		return o.trailers(fields, end)
	}
	return o.responseHead(fields, end)
}

// responseHead makes the head of a response.
func (o *overHTTP2) responseHead(fields []http2.Field, end bool) error {
	r, err := http2.ParseResponse(fields)
	switch {
	case err != nil:
		return http2.MessageError(o.id, err)
	case r.Interim() && end:
		return http2.StreamError(o.id, http2.ProtocolError, "interim response that is the last")
	case r.RepeatedLength:
		fields = http2.SingleLength(fields)
	}
	opens := o.tunnel && r.Status < 300 && !r.Interim()
	status := r.Status
	if opens && o.method != http.MethodConnect {
		status = http.StatusSwitchingProtocols
	}
	o.ready = append(strconv.AppendInt(append(o.ready, "HTTP/1.1 "...), int64(status), 10), ' ')
	o.ready = append(append(o.ready, http.StatusText(status)...), "\r\n"...)
	for i := range fields {
		if f := &fields[i]; !f.IsPseudo() && !(opens && f.Name == "content-length") {
			o.ready = appendLine(o.ready, f.Name, f.Value)
		}
	}
	if r.Interim() {
		o.ready = append(o.ready, "\r\n"...)
		return nil
	}
	o.idle.earn(idleBonus)
	o.answered = true
	o.response.declared = r.ContentLength
	o.frameResponse(r.Status, opens, end)
	o.ready = append(o.ready, "\r\n"...)
	if end {
		return o.endResponse()
	}
	return nil
}

// frameResponse chooses the framing of a response, and appends the fields for it.
func (o *overHTTP2) frameResponse(status int, opens, end bool) {
	switch {
	case opens:
		o.framing, o.response.declared = http1.Tunnel, -1
		if o.method != http.MethodConnect {
			o.ready = append(o.ready, "connection: upgrade\r\nupgrade: websocket\r\n"...)
			if o.key != "" {
				sum := sha1.Sum([]byte(o.key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11")) // RFC 6455 §4.2.2
				o.ready = appendLine(o.ready, "sec-websocket-accept", base64.StdEncoding.EncodeToString(sum[:]))
			}
		}
		return
	case o.method == http.MethodHead || status == http.StatusNoContent || status == http.StatusNotModified:
		o.framing, o.response.declared = http1.NoBody, 0
	case o.response.declared >= 0:
		o.framing = http1.Sized
	case end:
		o.framing = http1.Sized
		o.ready = append(o.ready, "content-length: 0\r\n"...)
	case o.minor == 0:
		o.framing = http1.UntilClose
	default:
		o.framing = http1.Chunked
		o.ready = append(o.ready, "transfer-encoding: chunked\r\n"...)
	}
	if o.ends || o.framing == http1.UntilClose {
		o.ready = append(o.ready, "connection: close\r\n"...)
	}
}

// data handles a DATA frame.
func (o *overHTTP2) data(h http2.Header, payload []byte) error {
	var first byte
	if h.Has(http2.Padded) && h.Length > 0 {
		first = payload[0]
	}
	before, behind, err := h.Padding(first)
	if err != nil {
		return err
	}
	o.giveBack(h)
	content := payload[before : len(payload)-behind]
	switch {
	case h.Stream != o.id || o.responded:
		return o.idleFrame() // crossed with the end of the stream
	case !o.answered:
		return http2.StreamError(o.id, http2.ProtocolError, "data before the head of a response")
	case !o.response.take(len(content)):
		return errBodyLength(o.id)
	case len(content) == 0 && !h.Has(http2.EndStream):
		return o.idleFrame()
	}
	o.idle.earn(idleBonus + len(content)/idleBonusBytes)
	if o.framing == http1.Chunked && len(content) > 0 {
		o.ready = append(strconv.AppendInt(o.ready, int64(len(content)), 16), "\r\n"...)
		o.ready = append(append(o.ready, content...), "\r\n"...)
	} else {
		o.ready = append(o.ready, content...)
	}
	if !h.Has(http2.EndStream) {
		return nil
	}
	if o.framing == http1.Chunked {
		o.ready = append(o.ready, "0\r\n\r\n"...)
	}
	return o.endResponse()
}

// giveBack gives credit back in large steps. What was received before is read by now, or is read next.
func (o *overHTTP2) giveBack(h http2.Header) {
	if o.owed += h.Length; o.owed >= overWindow/4 {
		o.out = http2.AppendWindowUpdate(o.out, 0, o.owed)
		o.owed = 0
	}
	if h.Stream != o.id || h.Has(http2.EndStream) {
		return
	}
	if o.streamOwe += h.Length; o.streamOwe >= overWindow/4 {
		o.out = http2.AppendWindowUpdate(o.out, o.id, o.streamOwe)
		o.streamOwe = 0
	}
}

// trailers ends a response. Without chunks they cannot be sent.
func (o *overHTTP2) trailers(fields []http2.Field, end bool) error {
	if err := o.response.endsWith(o.id, end, fields); err != nil {
		return err
	}
	if o.framing == http1.Chunked {
		o.ready = append(o.ready, "0\r\n"...)
		for i := range fields {
			o.ready = appendLine(o.ready, fields[i].Name, fields[i].Value)
		}
		o.ready = append(o.ready, "\r\n"...)
	}
	return o.endResponse()
}

// endResponse notes the end of a response. The end of a tunnel, and of a body without another end, is that of the connection.
func (o *overHTTP2) endResponse() error {
	if !o.response.whole() {
		return errBodyLength(o.id)
	}
	o.responded = true
	if o.framing == http1.UntilClose || o.framing == http1.Tunnel {
		return io.EOF
	}
	if o.tunnel && !o.requested { // it was refused
		o.out = http2.AppendResetStream(o.out, o.id, http2.Cancel)
		o.requested, o.begun = true, false
	}
	return o.endsIdle()
}

// reset handles the reset of a stream.
func (o *overHTTP2) reset(stream uint32, code http2.Code) error {
	switch {
	case stream != o.id || o.over():
		return o.idleFrame()
	case o.responded: // the rest of the request is not wanted (RFC 9113 §8.1)
		o.requested = true
		return o.endsIdle()
	case code == http2.RefusedStream && !o.answered:
		return errRefusedStream
	}
	return &streamReset{code}
}

// windowUpdate takes credit.
func (o *overHTTP2) windowUpdate(h http2.Header, payload []byte) error {
	n := int64(http2.Uint31(payload))
	window := &o.window
	switch {
	case n == 0:
		return http2.ConnectionError(http2.ProtocolError, "increment of zero")
	case h.Stream != 0 && h.Stream != o.id:
		return o.idleFrame()
	case h.Stream != 0:
		window = &o.sending
	}
	if *window += n; *window > http2.MaxWindow {
		return http2.ConnectionError(http2.FlowControlError, "window too large")
	}
	return o.idleFrame()
}

// takeSettings takes over a SETTINGS frame, and acknowledges it.
func (o *overHTTP2) takeSettings(h http2.Header, payload []byte) error {
	if h.Has(http2.Ack) {
		return o.idleFrame()
	}
	if o.greeted {
		if err := o.idleFrame(); err != nil {
			return err
		}
	}
	o.greeted = true
	table, err := readSettings(payload, func(s http2.Setting) error {
		switch s.ID {
		case http2.InitialWindowSize:
			o.sending += int64(s.Value) - o.initial
			o.initial = int64(s.Value)
			if o.sending > http2.MaxWindow && !o.over() { // the window of an ended stream does not count
				return http2.ConnectionError(http2.FlowControlError, "window too large")
			}
		case http2.EnablePush:
			return permitPush(s.Value)
		case http2.EnableConnectProtocol:
			o.extends = s.Value == 1
		}
		return nil
	})
	if err != nil {
		return err
	}
	if table.present {
		o.encoder.SetTableSize(table.smallest, table.now)
	}
	o.out = appendSettingsAck(o.out)
	return nil
}

// errRefusedStream is the error of a request that the server has not processed (RFC 9113 §8.7).
var errRefusedStream = &streamReset{http2.RefusedStream}

// streamReset is the error of a request whose stream the server has reset.
type streamReset struct{ code http2.Code }

func (e *streamReset) Error() string {
	return fmt.Sprintf("upstream reset the stream (code %d)", e.code)
}
