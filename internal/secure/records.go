package secure

import (
	"crypto/tls"
	"errors"
	"io"
	"net"

	"github.com/pillion-proxy/pillion/internal/tcp"
)

// records is the record layer of TLS 1.3 after the handshake (RFC 8446 §5). Crypto/tls performs the handshake, and has the
// record layer of TLS 1.2. Its own one for TLS 1.3 allocates with each read, keeps two buffers and the state of the
// handshake while the connection is idle, and reads and writes a record at a time.
type records struct {
	input
	in, out direction
	server  bool   // this side is the server
	plain   []byte // decrypted and not yet read; in input's block
	message []byte // beginning of a handshake message
	useless int    // records in succession without data
	begun   bool   // the peer has sent data
	asked   bool   // the peer asks for the next key of this side
	readErr error  // returned when the data before it is read
	fatal   error  // a fatal alert was sent: nothing can be written
}

// Types of records, handshake messages and alerts.
const (
	typeAlert           = 21
	typeHandshake       = 22
	typeApplicationData = 23

	messageNewSessionTicket = 4
	messageKeyUpdate        = 24

	warning, fatal = 1, 2

	alertCloseNotify       = 0
	alertUnexpectedMessage = 10
	alertBadRecordMAC      = 20
	alertRecordOverflow    = 22
	alertIllegalParameter  = 47
	alertDecodeError       = 50
	alertInternalError     = 80
	alertUserCanceled      = 90
)

const (
	maxUseless = 16       // as in crypto/tls; a peer could keep the connection busy without sending data
	maxMessage = 64 << 10 // of a handshake message; a ticket has some hundred bytes

	// maxRecordsOfKey is when a key is replaced. RFC 8446 §5.5 allows 2^24.5 records of AES-GCM.
	maxRecordsOfKey = 1 << 24
)

// newRecords takes over after a handshake, with the raw bytes that were read after its end.
func newRecords(in input, s *suite, secrets *secrets, server bool) (*records, error) {
	r := &records{input: in, server: server}
	read, write := secrets.server, secrets.client
	if server {
		read, write = write, read
	}
	return r, errors.Join(r.in.begin(s, read), r.out.begin(s, write))
}

// Read implements tcp.Layer. It decrypts as many records as p has room for. A record that fits is decrypted right into p.
func (r *records) Read(p []byte) (n int, err error) {
	n = copy(p, r.plain)
	r.plain = r.plain[n:]
	for r.readErr == nil && n < len(p) {
		size, whole := r.record()
		if n > 0 && (!whole || size-headerSize-tagSize > len(p)-n) {
			break
		}
		if size > maxRecord {
			r.readErr = r.fail(alertRecordOverflow)
		} else if whole {
			n += r.open(p[n:], r.use(size))
		} else if err := r.fill(); err != nil {
			return 0, err
		}
	}
	if len(r.plain) == 0 {
		r.rest()
	}
	if n > 0 {
		return n, nil
	}
	return 0, r.readErr
}

// Held implements tcp.Holder.
func (r *records) Held() int { return r.size() + cap(r.message) }

// Drop implements tcp.Holder.
func (r *records) Drop() {
	r.drop()
	r.plain, r.message = nil, nil
}

// Buffered implements tcp.Layer.
func (r *records) Buffered() bool {
	size, whole := r.record()
	return len(r.plain) > 0 || r.readErr != nil || whole || size > maxRecord
}

// open decrypts a record, and returns how many bytes of data are in p. Data for which p has no room is in r.plain, and an
// error in r.readErr. p may be overwritten even if there is no data.
func (r *records) open(p, record []byte) int {
	header, body := record[:headerSize], record[headerSize:]
	if header[0] != typeApplicationData {
		r.readErr = r.fail(alertUnexpectedMessage)
		return 0
	}
	dst, direct := body[:0], len(body)-tagSize <= len(p)
	if direct {
		dst = p[:0:len(p)]
	}
	content, err := r.in.aead.Open(dst, r.in.next(), body, header)
	if err != nil {
		r.readErr = r.fail(alertBadRecordMAC)
		return 0
	}
	content, kind := unpad(content)
	switch {
	case len(content) > maxPlaintext:
		r.readErr = r.fail(alertRecordOverflow)
	case kind != typeApplicationData || len(content) == 0:
		r.readErr = r.control(kind, content)
	case len(r.message) > 0:
		r.readErr = r.fail(alertUnexpectedMessage) // messages are not interleaved with data
	default:
		r.useless, r.begun = 0, true
		if direct {
			return len(content)
		}
		n := copy(p, content)
		r.plain = content[n:]
		return n
	}
	return 0
}

// unpad splits the plaintext of a record into content and type. The type is 0 if there is none.
func unpad(plaintext []byte) (content []byte, kind byte) {
	for i := len(plaintext) - 1; i >= 0; i-- {
		if plaintext[i] != 0 {
			return plaintext[:i], plaintext[i]
		}
	}
	return nil, 0
}

// control processes a record without data, and returns an error that ends the reading.
func (r *records) control(kind byte, content []byte) error {
	if r.useless++; r.useless > maxUseless {
		return r.fail(alertUnexpectedMessage)
	}
	switch {
	case kind == typeAlert:
		return r.alerted(content)
	case kind == typeHandshake && len(content) > 0:
		r.message = append(r.message, content...)
		return r.messages()
	case kind == typeApplicationData && len(r.message) == 0:
		return nil // empty
	}
	return r.fail(alertUnexpectedMessage)
}

// alerted returns the error that an alert of the peer means: io.EOF for a close message, nil for none. The level of an
// alert has no meaning in TLS 1.3 (RFC 8446 §6).
func (r *records) alerted(content []byte) error {
	switch {
	case len(content) != 2:
		return r.fail(alertDecodeError)
	case content[1] == alertCloseNotify:
		return io.EOF
	case content[1] == alertUserCanceled:
		return nil // a close message follows
	}
	err := error(&net.OpError{Op: "remote error", Err: tls.AlertError(content[1])})
	if rejected, ok := rejection(err); ok && !r.begun {
		return rejected
	}
	return err
}

// messages processes the whole handshake messages in r.message.
func (r *records) messages() error {
	for len(r.message) >= 4 {
		size := 4 + int(r.message[1])<<16 + int(r.message[2])<<8 + int(r.message[3])
		switch kind := r.message[0]; { // the end of a wrong message is not awaited, because that would take memory
		case kind != messageKeyUpdate && (kind != messageNewSessionTicket || r.server), size > maxMessage:
			return r.fail(alertUnexpectedMessage)
		case kind == messageKeyUpdate && size != 4+1:
			return r.fail(alertDecodeError)
		}
		if len(r.message) < size {
			return nil
		}
		message := r.message[:size]
		if r.message = r.message[size:]; len(r.message) == 0 {
			r.message = nil
		}
		switch {
		case message[0] == messageNewSessionTicket: // sessions are not resumed
		case r.message == nil: // a message does not span keys
			if err := r.keyUpdate(message[4]); err != nil {
				return err
			}
		default:
			return r.fail(alertUnexpectedMessage)
		}
	}
	return nil
}

// keyUpdate changes the key of the records to come. If the peer asks for it, ours changes before the next data: one change
// answers several requests, and a side that has sent its close message sends none (RFC 8446 §4.6.3).
func (r *records) keyUpdate(request byte) error {
	if request > 1 {
		return r.fail(alertIllegalParameter)
	}
	if err := r.in.update(); err != nil {
		return r.fail(alertInternalError)
	}
	r.asked = r.asked || request == 1
	return nil
}

// renew announces the next key of this side and changes to it.
func (r *records) renew() error {
	if err := r.send(typeHandshake, []byte{messageKeyUpdate, 0, 0, 1, 0}); err != nil {
		return err
	}
	r.asked = false
	return r.out.update()
}

// Write implements tcp.Layer.
func (r *records) Write(p []byte) (int, error) {
	if (r.asked || r.out.number >= maxRecordsOfKey) && r.fatal == nil {
		if err := r.renew(); err != nil {
			return 0, err
		}
	}
	if r.fatal != nil {
		return 0, r.fatal
	}
	b := blocks.Get().(*block)
	defer blocks.Put(b)
	for rest := p; len(rest) > 0; {
		out := b[:0]
		for len(rest) > 0 && len(out)+maxRecord <= len(b) {
			piece := rest[:min(len(rest), maxPlaintext)]
			out, rest = r.out.seal(out, typeApplicationData, piece), rest[len(piece):]
		}
		if _, err := r.raw.Write(out); err != nil {
			return 0, err
		}
	}
	return len(p), nil
}

// CloseWrite implements tcp.Layer.
func (r *records) CloseWrite() error { return r.send(typeAlert, []byte{warning, alertCloseNotify}) }

// fail sends a fatal alert and returns the error for it.
func (r *records) fail(alert byte) error {
	err := &net.OpError{Op: "local error", Err: tls.AlertError(alert)}
	_ = r.send(typeAlert, []byte{fatal, alert}) // the connection ends in any case
	r.fatal = err
	return err
}

// send writes a record.
func (r *records) send(kind byte, content []byte) error {
	if r.fatal != nil {
		return r.fatal
	}
	b := blocks.Get().(*block)
	_, err := r.raw.Write(r.out.seal(b[:0], kind, content))
	blocks.Put(b)
	return err
}

// seal appends a record to out, which must have room for it.
func (d *direction) seal(out []byte, kind byte, content []byte) []byte {
	size := len(content) + 1 + tagSize
	out = append(out, typeApplicationData, 3, 3, byte(size>>8), byte(size))
	header, body := out[len(out)-headerSize:], len(out)
	out = append(append(out, content...), kind)
	return d.aead.Seal(out[:body], d.next(), out[body:], header)
}

var _ tcp.Layer = (*records)(nil)
