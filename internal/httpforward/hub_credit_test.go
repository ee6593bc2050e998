package httpforward

import (
	"fmt"
	"strings"
	"testing"

	"golang.org/x/net/http2"

	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/route"
)

// streamCredit reads until the ping, and adds up the credit that a side receives on a stream.
func (s *speaker) streamCredit(stream uint32, ping string) (credit int) {
	s.t.Helper()
	for {
		frame, err := s.framer.ReadFrame()
		if err != nil {
			s.t.Fatalf("after %d bytes of credit: %v", credit, err)
		}
		switch f := frame.(type) {
		case *http2.WindowUpdateFrame:
			if f.StreamID == stream {
				credit += int(f.Increment)
			}
		case *http2.PingFrame:
			if string(f.Data[:]) == ping {
				return credit
			}
		}
	}
}

// takes reads frames until it has n bytes of data of a stream.
func (s *speaker) takes(stream uint32, n int) {
	s.t.Helper()
	for got := 0; got < n; {
		frame, err := s.framer.ReadFrame()
		if err != nil {
			s.t.Fatalf("after %d of %d bytes: %v", got, n, err)
		}
		if data, ok := frame.(*http2.DataFrame); ok && data.StreamID == stream {
			got += len(data.Data())
		}
	}
}

// A request whose body is sent again gives its client credit for each byte once.
func TestAHubGivesCreditOnceForABodyThatIsSentAgain(t *testing.T) {
	const part, parts = 16000, 3
	o := newOrigin(t)
	r := newHub(t, o.address, &planned{decide: func(_ *Request, d *Decision) {
		d.Target.Address, d.Plan = o.address, &route.Plan{Retry: retrying(mesh.Retry5xx, 1)}
	}}, plain)
	client := greetHub(t, r, "")
	client.sends("POST 1")
	server := acceptHub(t, o, "")
	server.reads("POST 1")
	server.reads("SETTINGS ack")
	server.sends("WINDOW 0 400000")
	data := rawFrame(0, 0, 1, strings.Repeat("x", part))
	send(t, client.conn, strings.Repeat(data, parts))
	server.takes(1, parts*part)
	for id := range uint32(2) {
		server.sends(fmt.Sprintf("RST %d REFUSED_STREAM", 2*id+1))
		server.takes(2*id+3, parts*part)
	}
	client.sends("PING 12345678")
	first := client.streamCredit(1, "12345678")
	server.sends("WINDOW 5 65535")
	send(t, client.conn, strings.Repeat(data, parts))
	server.takes(5, parts*part)
	client.sends("PING 87654321")
	both := first + client.streamCredit(1, "87654321")
	if first > parts*part || both > 2*parts*part || both <= 2*parts*part-streamWindow/2 {
		t.Errorf("%d bytes of credit after %d bytes, %d after %d", first, parts*part, both, 2*parts*part)
	}
}

// Padding without data takes credit, and gives it back.
func TestAHubGivesCreditForPaddingBack(t *testing.T) {
	const frames = streamWindow / 256
	o := newOrigin(t)
	r := newHub(t, o.address, toOrigin(o), plain)
	client := greetHub(t, r, "")
	client.sends("POST 1")
	server := acceptHub(t, o, "")
	server.reads("POST 1")
	server.reads("SETTINGS ack")
	send(t, client.conn, strings.Repeat(rawFrame(0, 8, 1, "\xff"+strings.Repeat("\x00", 255)), frames))
	client.sends("PING 12345678")
	if got := client.streamCredit(1, "12345678"); got < streamWindow/2 || got > 256*frames {
		t.Errorf("%d bytes of credit after %d bytes of padding", got, 256*frames)
	}
}
