package secure

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"testing"

	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

// rawPeer is the far end of a connection with records: it makes and takes single records, also bad ones.
type rawPeer struct {
	net.Conn
	in, out direction
}

// afterHandshake returns a connection whose layer is records, as after a handshake, and its far end.
func (w *world) afterHandshake(t *testing.T, s *suite, server bool) (*rawPeer, *end, *records) {
	t.Helper()
	far, near := w.pair(t)
	keys := &secrets{client: bytes.Repeat([]byte{1}, s.hash().Size()), server: bytes.Repeat([]byte{2}, s.hash().Size())}
	var r *records
	near.SetLayer(nil, func(raw *tcp.Socket) tcp.Layer {
		var err error
		if r, err = newRecords(input{raw: raw}, s, keys, server); err != nil {
			t.Fatal(err)
		}
		return r
	})
	p := &rawPeer{Conn: far}
	read, write := keys.server, keys.client
	if !server {
		read, write = write, read
	}
	if err := errors.Join(p.in.begin(s, read), p.out.begin(s, write)); err != nil {
		t.Fatal(err)
	}
	e := &end{Conn: near, w: tcp.NewWaiter(t.Context())}
	t.Cleanup(e.w.Close)
	return p, e, r
}

// record returns a record as send writes it. Zeros are added to its content.
func (p *rawPeer) record(kind byte, content []byte, zeros int) []byte {
	if zeros == 0 {
		return p.out.seal(make([]byte, 0, len(content)+100), kind, content)
	}
	padded := append(append(bytes.Clone(content), kind), make([]byte, zeros-1)...)
	return p.out.seal(make([]byte, 0, len(padded)+100), 0, padded)
}

// receive returns the next record.
func (p *rawPeer) receive(t *testing.T) (kind byte, content []byte) {
	t.Helper()
	header := make([]byte, headerSize)
	if _, err := io.ReadFull(p, header); err != nil {
		t.Fatal(err)
	}
	body := make([]byte, int(header[3])<<8|int(header[4]))
	if _, err := io.ReadFull(p, body); err != nil {
		t.Fatal(err)
	}
	plain, err := p.in.aead.Open(nil, p.in.next(), body, header)
	if err != nil {
		t.Fatal(err)
	}
	content, kind = unpad(plain)
	return kind, content
}

func message(kind byte, body ...byte) []byte {
	return append([]byte{kind, 0, byte(len(body) >> 8), byte(len(body))}, body...)
}

// RFC 8448 §3 has the traffic secrets of a connection and the keys that follow from them.
func TestKeysFollowFromTheTrafficSecret(t *testing.T) {
	for _, c := range []struct{ secret, key, iv string }{
		{"9e40646ce79a7f9dc05af8889bce6552875afa0b06df0087f792ebb7c17504a5", "17422dda596ed5d9acd890e3c63f5051", "5b78923dee08579033e523d9"},
		{"a11af9f05531f856ad47116b45a950328204b4f44bfb6b3a4b4f1f3fcb631643", "9f02283b6c9c07efc26bb9f2ac92e356", "cf782b88dd83549aadf1e984"},
	} {
		secret, _ := hex.DecodeString(c.secret)
		key, err := aes128.expand(secret, "key", 16)
		if err != nil || hex.EncodeToString(key) != c.key {
			t.Errorf("key %x, %v, want %s", key, err, c.key)
		}
		iv, err := aes128.expand(secret, "iv", 12)
		if err != nil || hex.EncodeToString(iv) != c.iv {
			t.Errorf("iv %x, %v, want %s", iv, err, c.iv)
		}
	}
}

// What a peer may send after the handshake besides data does not disturb the data.
func TestRecordsBesidesDataPass(t *testing.T) {
	w := newWorld(t)
	ticket := message(messageNewSessionTicket, make([]byte, 300)...)
	for name, c := range map[string]struct {
		server bool // our side
		send   func(p *rawPeer) [][]byte
	}{
		"padding": {true, func(p *rawPeer) [][]byte {
			return [][]byte{p.record(typeApplicationData, []byte("da"), 1), p.record(typeApplicationData, []byte("ta"), 1000)}
		}},
		"empty records": {true, func(p *rawPeer) (all [][]byte) {
			for range maxUseless {
				all = append(all, p.record(typeApplicationData, nil, 0))
			}
			return append(all, p.record(typeApplicationData, []byte("data"), 0))
		}},
		"cancelling": {true, func(p *rawPeer) [][]byte {
			return [][]byte{p.record(typeAlert, []byte{warning, alertUserCanceled}, 0), p.record(typeApplicationData, []byte("data"), 0)}
		}},
		"tickets": {false, func(p *rawPeer) [][]byte {
			return [][]byte{p.record(typeHandshake, append(ticket, ticket...), 0), p.record(typeApplicationData, []byte("data"), 0)}
		}},
		"a ticket in pieces": {false, func(p *rawPeer) [][]byte {
			return [][]byte{
				p.record(typeHandshake, ticket[:3], 0), p.record(typeHandshake, ticket[3:200], 0), p.record(typeHandshake, ticket[200:], 0),
				p.record(typeApplicationData, []byte("data"), 0),
			}
		}},
		"new keys": {true, func(p *rawPeer) [][]byte {
			first := p.record(typeApplicationData, []byte("da"), 0)
			update := p.record(typeHandshake, message(messageKeyUpdate, 0), 0)
			if err := p.out.update(); err != nil {
				t.Fatal(err)
			}
			return [][]byte{first, update, p.record(typeApplicationData, []byte("ta"), 0)}
		}},
	} {
		for _, s := range []*suite{aes128, aes256} {
			for _, together := range []bool{true, false} {
				p, e, _ := w.afterHandshake(t, s, c.server)
				all := c.send(p)
				go func() {
					if together {
						p.Write(bytes.Join(all, nil))
						return
					}
					for _, record := range all {
						byByte{p.Conn}.Write(record)
					}
				}()
				got := make([]byte, 0, 10)
				for len(got) < 4 {
					n, err := e.read(got[len(got):cap(got)])
					if err != nil {
						t.Fatalf("%s: %v after %q", name, err, got)
					}
					got = got[:len(got)+n]
				}
				if string(got) != "data" {
					t.Errorf("%s: read %q", name, got)
				}
			}
		}
	}
}

// Every violation ends the connection with the alert that the standard has for it, and no data is read after it.
func TestViolationsAreAnsweredByAnAlert(t *testing.T) {
	w := newWorld(t)
	data := func(p *rawPeer) []byte { return p.record(typeApplicationData, []byte("data"), 0) }
	for name, c := range map[string]struct {
		want byte
		send func(p *rawPeer) []byte
	}{
		"a changed byte": {alertBadRecordMAC, func(p *rawPeer) []byte {
			r := data(p)
			r[len(r)-1] ^= 1
			return r
		}},
		"a changed header": {alertBadRecordMAC, func(p *rawPeer) []byte {
			r := data(p)
			r[1] ^= 1
			return r
		}},
		"a record of another place": {alertBadRecordMAC, func(p *rawPeer) []byte { data(p); return data(p) }},
		"an empty body":             {alertBadRecordMAC, func(*rawPeer) []byte { return []byte{typeApplicationData, 3, 3, 0, 0} }},
		"an alert in the clear":     {alertUnexpectedMessage, func(*rawPeer) []byte { return []byte{typeAlert, 3, 3, 0, 2, warning, alertCloseNotify} }},
		"a change of ciphers":       {alertUnexpectedMessage, func(*rawPeer) []byte { return []byte{20, 3, 3, 0, 1, 1} }},
		"a record that is too long": {alertRecordOverflow, func(*rawPeer) []byte { return []byte{typeApplicationData, 3, 3, 0x41, 1} }},
		"too much data": {alertRecordOverflow, func(p *rawPeer) []byte {
			return p.record(typeApplicationData, make([]byte, maxPlaintext+1), 0)
		}},
		"no type":                {alertUnexpectedMessage, func(p *rawPeer) []byte { return p.record(0, nil, 0) }},
		"an unknown type":        {alertUnexpectedMessage, func(p *rawPeer) []byte { return p.record(99, []byte("data"), 0) }},
		"an empty message":       {alertUnexpectedMessage, func(p *rawPeer) []byte { return p.record(typeHandshake, nil, 0) }},
		"a ticket from a client": {alertUnexpectedMessage, func(p *rawPeer) []byte { return p.record(typeHandshake, message(messageNewSessionTicket, 1), 0) }},
		"renegotiation":          {alertUnexpectedMessage, func(p *rawPeer) []byte { return p.record(typeHandshake, message(1, 3, 3), 0) }},
		"a huge message":         {alertUnexpectedMessage, func(p *rawPeer) []byte { return p.record(typeHandshake, []byte{messageKeyUpdate, 1, 0, 0}, 0) }},
		"the beginning of a client's ticket": {alertUnexpectedMessage, func(p *rawPeer) []byte {
			return p.record(typeHandshake, []byte{messageNewSessionTicket, 0, 0x40, 0}, 0)
		}},
		"the beginning of a long key update": {alertDecodeError, func(p *rawPeer) []byte {
			return p.record(typeHandshake, []byte{messageKeyUpdate, 0, 0x40, 0}, 0)
		}},
		"data within a message": {alertUnexpectedMessage, func(p *rawPeer) []byte {
			return append(p.record(typeHandshake, []byte{messageKeyUpdate, 0}, 0), data(p)...)
		}},
		"an alert of one byte": {alertDecodeError, func(p *rawPeer) []byte { return p.record(typeAlert, []byte{fatal}, 0) }},
		"a key update without a body": {alertDecodeError, func(p *rawPeer) []byte {
			return p.record(typeHandshake, message(messageKeyUpdate), 0)
		}},
		"a key update of another kind": {alertIllegalParameter, func(p *rawPeer) []byte {
			return p.record(typeHandshake, message(messageKeyUpdate, 2), 0)
		}},
		"a message over two keys": {alertUnexpectedMessage, func(p *rawPeer) []byte {
			return p.record(typeHandshake, append(message(messageKeyUpdate, 0), messageKeyUpdate), 0)
		}},
		"records without data": {alertUnexpectedMessage, func(p *rawPeer) (all []byte) {
			for range maxUseless + 1 {
				all = append(all, p.record(typeApplicationData, nil, 0)...)
			}
			return all
		}},
	} {
		t.Run(name, func(t *testing.T) {
			p, e, _ := w.afterHandshake(t, aes128, true)
			p.Write(append(data(p), append(c.send(p), data(p)...)...))
			got, err := e.readAll(100)
			var failed *net.OpError
			if string(got) != "data" || !errors.As(err, &failed) || failed.Err != tls.AlertError(c.want) {
				t.Errorf("read %q, %v, want %v", got, err, tls.AlertError(c.want))
			}
			if kind, content := p.receive(t); kind != typeAlert || !bytes.Equal(content, []byte{fatal, c.want}) {
				t.Errorf("the peer receives %d, %v", kind, content)
			}
			if _, err := e.Write([]byte("more")); err == nil {
				t.Error("bytes can be written after the alert")
			}
		})
	}
}

// A peer that asks for new keys gets them, and the records before and after are whole.
func TestNewKeysOnRequest(t *testing.T) {
	w := newWorld(t)
	p, e, _ := w.afterHandshake(t, aes256, true)
	for range 3 {
		if _, err := e.Write([]byte("before")); err != nil {
			t.Fatal(err)
		}
		p.Write(p.record(typeHandshake, message(messageKeyUpdate, 1), 0))
		if err := p.out.update(); err != nil {
			t.Fatal(err)
		}
		p.Write(p.record(typeApplicationData, []byte("x"), 0))
		if n, err := e.read(make([]byte, 9)); n != 1 || err != nil {
			t.Fatal(n, err)
		}
		if _, err := e.Write([]byte("after")); err != nil {
			t.Fatal(err)
		}
		if kind, content := p.receive(t); kind != typeApplicationData || string(content) != "before" {
			t.Errorf("%d, %q", kind, content)
		}
		if kind, content := p.receive(t); kind != typeHandshake || !bytes.Equal(content, message(messageKeyUpdate, 0)) {
			t.Errorf("%d, %q", kind, content)
		}
		if err := p.in.update(); err != nil {
			t.Fatal(err)
		}
		if kind, content := p.receive(t); kind != typeApplicationData || string(content) != "after" {
			t.Errorf("%d, %q", kind, content)
		}
	}
}

// Several requests for new keys are answered by one change, and a side that has sent its close message reads on after one.
func TestNewKeysAreSentBeforeDataOnly(t *testing.T) {
	w := newWorld(t)
	for _, closed := range []bool{false, true} {
		p, e, _ := w.afterHandshake(t, aes128, true)
		if closed {
			if err := e.CloseWrite(); err != nil {
				t.Fatal(err)
			}
		}
		for range 3 {
			p.Write(p.record(typeHandshake, message(messageKeyUpdate, 1), 0))
			if err := p.out.update(); err != nil {
				t.Fatal(err)
			}
			p.Write(p.record(typeApplicationData, []byte("x"), 0))
			if n, err := e.read(make([]byte, 9)); n != 1 || err != nil {
				t.Fatalf("closed %v: %d, %v", closed, n, err)
			}
		}
		if closed {
			continue
		}
		if _, err := e.Write([]byte("data")); err != nil {
			t.Fatal(err)
		}
		if kind, _ := p.receive(t); kind != typeHandshake {
			t.Errorf("type %d", kind)
		}
		if err := p.in.update(); err != nil {
			t.Fatal(err)
		}
		if kind, content := p.receive(t); kind != typeApplicationData || string(content) != "data" {
			t.Errorf("%d, %q", kind, content)
		}
	}
}

// A key is not used for more records than AES-GCM allows.
func TestAKeyIsReplacedInTime(t *testing.T) {
	w := newWorld(t)
	p, e, r := w.afterHandshake(t, aes128, false)
	r.out.number, p.in.number = maxRecordsOfKey-1, maxRecordsOfKey-1
	for range 2 {
		if _, err := e.Write([]byte("data")); err != nil {
			t.Fatal(err)
		}
	}
	if kind, _ := p.receive(t); kind != typeApplicationData {
		t.Errorf("type %d", kind)
	}
	if kind, content := p.receive(t); kind != typeHandshake || !bytes.Equal(content, message(messageKeyUpdate, 0)) {
		t.Errorf("%d, %q", kind, content)
	}
	if err := p.in.update(); err != nil {
		t.Fatal(err)
	}
	if kind, content := p.receive(t); kind != typeApplicationData || string(content) != "data" {
		t.Errorf("%d, %q", kind, content)
	}
}

// A stream that ends after any byte but those of the close message is truncated, and what was whole before is read.
func TestTruncationIsNoticedEverywhere(t *testing.T) {
	w := newWorld(t)
	const records, each = 3, 20
	for cut := 0; ; cut++ {
		p, e, _ := w.afterHandshake(t, aes128, true)
		var stream []byte
		ends := []int{0}
		for i := range records {
			stream = append(stream, p.record(typeApplicationData, bytes.Repeat([]byte{byte(i)}, each), 0)...)
			ends = append(ends, len(stream))
		}
		stream = append(stream, p.record(typeAlert, []byte{warning, alertCloseNotify}, 0)...)
		p.Write(stream[:cut])
		p.Conn.(*net.TCPConn).CloseWrite()
		got, err := e.readAll(7)
		whole := 0
		for whole < records && ends[whole+1] <= cut {
			whole++
		}
		want := io.ErrUnexpectedEOF
		if cut == len(stream) {
			want = nil
		}
		if len(got) != whole*each || err != want {
			t.Errorf("after %d of %d bytes: read %d bytes, %v; want %d, %v", cut, len(stream), len(got), err, whole*each, want)
		}
		e.Close()
		if cut == len(stream) {
			return
		}
	}
}

// An alert before any data is a rejected handshake, and one after it is not.
func TestAlertsAreErrors(t *testing.T) {
	w := newWorld(t)
	const unknownCA = 48
	for _, begun := range []bool{false, true} {
		p, e, _ := w.afterHandshake(t, aes128, false)
		if begun {
			p.Write(p.record(typeApplicationData, []byte("data"), 0))
		}
		p.Write(p.record(typeAlert, []byte{fatal, unknownCA}, 0))
		_, err := e.readAll(100)
		if err == nil || errors.Is(err, tcp.ErrHandshake) == begun {
			t.Errorf("after data %v: %v", begun, err)
		}
	}
}

// However a stream is cut into records, segments and reads, its bytes are the same, and the memory that an unfinished record
// needs is given back.
func TestRandomCutsKeepTheBytes(t *testing.T) {
	w := newWorld(t)
	for seed := range uint64(20) {
		random := rand.New(rand.NewPCG(seed, 1))
		p, e, r := w.afterHandshake(t, aes128, true)
		body := make([]byte, 200_000)
		for i := range body {
			body[i] = byte(random.Uint32())
		}
		go func() {
			random := rand.New(rand.NewPCG(seed, 2))
			var stream []byte
			for rest := body; len(rest) > 0; {
				n := min(len(rest), 1+random.IntN([]int{10, 1000, maxPlaintext}[random.IntN(3)]))
				stream = append(stream, p.record(typeApplicationData, rest[:n], random.IntN(3))...)
				rest = rest[n:]
			}
			stream = append(stream, p.record(typeAlert, []byte{warning, alertCloseNotify}, 0)...)
			for len(stream) > 0 {
				n := min(len(stream), 1+random.IntN([]int{10, 2000, 100_000}[random.IntN(3)]))
				p.Write(stream[:n])
				stream = stream[n:]
				if random.IntN(10) == 0 {
					runtime.Gosched()
				}
			}
		}()
		var got []byte
		for p := make([]byte, 70_000); ; {
			n, err := e.read(p[:1+random.IntN([]int{10, 1000, len(p)}[random.IntN(3)])])
			got = append(got, p[:n]...)
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		if sha256.Sum256(got) != sha256.Sum256(body) {
			t.Errorf("seed %d: %d bytes became %d others", seed, len(body), len(got))
		}
		if r.block != nil || r.piece != nil || r.message != nil {
			t.Errorf("seed %d: memory is held after the end", seed)
		}
	}
}

// A connection in the middle of a record holds memory for one record, and not for a whole read.
func TestAnUnfinishedRecordHoldsAPiece(t *testing.T) {
	w := newWorld(t)
	p, e, r := w.afterHandshake(t, aes128, true)
	record := p.record(typeApplicationData, make([]byte, 10_000), 0)
	p.Write(record[:9000])
	nettest.Eventually(t, "the beginning has arrived", func() bool {
		if n, err := e.Conn.Read(make([]byte, 100)); n > 0 || err != tcp.ErrAgain {
			t.Fatal(n, err)
		}
		return len(r.bytes) == 9000
	})
	if r.block != nil || r.piece == nil {
		t.Error("a block is held")
	}
	p.Write(record[9000:])
	for left := 10_000; left > 0; {
		n, err := e.read(make([]byte, left))
		if err != nil {
			t.Fatal(err)
		}
		left -= n
	}
	if r.block != nil || r.piece != nil {
		t.Error("memory is held without bytes")
	}
}
