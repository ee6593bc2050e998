package secure

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/peers"
	"github.com/pillion-proxy/pillion/internal/tcp"
	"github.com/pillion-proxy/pillion/internal/wire"
)

// named returns the exchange of a workload with a name.
func named(name string) *peers.Exchange {
	entry := wire.AppendBytes(wire.AppendString(nil, 1, "WORKLOAD_NAME"), 2, wire.AppendString(nil, 3, name))
	return peers.New("sidecar~192.0.2.1~a~shop.svc.cluster.local", wire.AppendBytes(nil, 1, entry))
}

// exchanging makes an end whose peer has agreed on protocol, and begins the exchange.
func exchanging(t *testing.T, protocol string, wrote ...[]byte) (*tls.Conn, *end, *string) {
	t.Helper()
	w := newWorld(t)
	peer, e, err := w.serve(t, w.mutual(protocol), w.peer(protocol), nil)
	if err != nil {
		t.Fatal(err)
	}
	found := new(string)
	if exchanges := e.session.Exchange(named("reviews"), func(w *flow.Workload) { *found = w.Name }); exchanges != (protocol == peers.Protocol) {
		t.Fatalf("with ALPN %s, there is an exchange: %v", protocol, exchanges)
	}
	go func() {
		for _, piece := range wrote {
			peer.Write(piece)
		}
		peer.CloseWrite()
	}()
	return peer, e, found
}

// The preamble of a peer never reaches the reader, however it is divided into records and reads.
func TestThePreambleIsNotPayload(t *testing.T) {
	preamble, payload := named("ratings").Preamble(), bytes.Repeat([]byte("payload "), 5000)
	whole := append(bytes.Clone(preamble), payload...)
	for name, pieces := range map[string][][]byte{
		"in one record": {whole}, "in its own record": {preamble, payload}, "in two": {whole[:3], whole[3:]}, "cut behind its head": {whole[:8], whole[8:]},
		"with a part of the payload": {whole[:len(preamble)+1], whole[len(preamble)+1:]},
	} {
		for _, size := range []int{1, 7, 16 << 10} {
			_, e, found := exchanging(t, peers.Protocol, pieces...)
			if got, err := e.readAll(size); err != nil || !bytes.Equal(got, payload) || *found != "ratings" {
				t.Errorf("%s, reads of %d: %d bytes, %v, from %q", name, size, len(got), err, *found)
			}
		}
	}
}

// Envoy takes a stream without a preamble as it is.
func TestAStreamWithoutAPreambleIsKept(t *testing.T) {
	for _, text := range []string{"payload", "=#\x04", "=#\x04payload"} {
		_, e, found := exchanging(t, peers.Protocol, []byte(text[:2]), []byte(text[2:]))
		got, err := e.readAll(1)
		if text == "=#\x04" { // it would be one, or is truncated
			if !errors.Is(err, io.ErrUnexpectedEOF) || len(got) > 0 {
				t.Errorf("%q: read %q, %v", text, got, err)
			}
			continue
		}
		if err != nil || string(got) != text || *found != "" {
			t.Errorf("%q: read %q, %v, from %q", text, got, err, *found)
		}
	}
}

func TestAnEndlessPreambleEndsTheConnection(t *testing.T) {
	_, e, _ := exchanging(t, peers.Protocol, []byte("=#\x04g\xff\xff\xff\xffpayload"))
	var failed *Error
	if got, err := e.readAll(100); !errors.As(err, &failed) || failed.Failure != Protocol || len(got) > 0 {
		t.Errorf("read %q, %v", got, err)
	}
}

// The own preamble is sent at once, so a client that waits for the server learns who that is. Other protocols have none.
func TestTheOwnPreambleComesFirst(t *testing.T) {
	for _, protocol := range []string{peers.Protocol, "http/1.1"} {
		peer, e, _ := exchanging(t, protocol)
		want := "payload"
		if protocol == peers.Protocol {
			want = string(named("reviews").Preamble()) + want
		}
		if err := e.writeAll([]byte("payload"), 100); err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(peer); err != nil || string(got) != want {
			t.Errorf("%s: the peer receives %q, %v", protocol, got, err)
		}
	}
}

// A peer that has sent its preamble only is silent.
func TestAPreambleAloneIsSilence(t *testing.T) {
	w := newWorld(t)
	peer, e, err := w.serve(t, w.mutual(peers.Protocol), w.peer(peers.Protocol), nil)
	if err != nil {
		t.Fatal(err)
	}
	found := ""
	e.session.Exchange(named("reviews"), func(w *flow.Workload) { found = w.Name })
	if _, err := peer.Write(named("ratings").Preamble()); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(nettest.Patience); found == ""; {
		if err := e.w.Wait(deadline, e.Conn, nil); err != nil {
			t.Fatal(err)
		}
		if n, err := e.Read(make([]byte, 100)); n > 0 || err != tcp.ErrAgain {
			t.Fatalf("read %d bytes, %v", n, err)
		}
	}
	if !e.Quiet() || e.Readable() {
		t.Error("the connection has something to read")
	}
}
