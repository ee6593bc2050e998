package sniff

import (
	"io"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/tcp"
	"github.com/pillion-proxy/pillion/internal/tcp/layertest"
)

// layered sets a record layer on both sides.
func (r *rig) layered() (client, server *layertest.Peer) {
	layertest.Under(r.Down, nil)
	layertest.Under(r.Up, nil)
	return &layertest.Peer{TCPConn: r.client}, &layertest.Peer{TCPConn: r.server}
}

// Detection on a connection with a layer inspects the decoded bytes.
func TestDetectionUnderALayer(t *testing.T) {
	for text, want := range map[string]Protocol{"GET / HTTP/1.1\r\n": HTTP1, preface: HTTP2, "\x00\x01": Opaque} {
		for _, piece := range []int{0, 1} {
			phases(t, func(t *testing.T, r *rig, look func() (Protocol, error)) {
				client, server := r.layered()
				client.Piece = piece
				client.Ticket()
				server.Ticket()
				go io.WriteString(client, text)
				protocol, err := look()
				r.want(t, protocol, err, want)
				for len(r.Read.Bytes()) < len(text) {
					if _, err := r.Read.Fill(r.Down); err == tcp.ErrAgain {
						err = r.w.Wait(time.Now().Add(patience), r.Down, nil)
						if err != nil {
							t.Fatal(err)
						}
					}
				}
				if got := string(r.Read.Bytes()); got != text {
					t.Errorf("read %q", got)
				}
			})
		}
	}
}

// A session ticket makes the socket readable, but contains no data of the server.
func TestATicketIsNotAGreeting(t *testing.T) {
	r := newRig(t)
	client, server := r.layered()
	server.Ticket()
	r.await(t, "the ticket", r.Up.Readable)
	if spoke, err := r.greet(); spoke || err != nil || r.UpRead != nil {
		t.Fatalf("a ticket counts as a greeting: %v, %v", spoke, err)
	}
	server.Ticket()
	r.await(t, "another ticket", r.Up.Readable)
	io.WriteString(client, "GET / HTTP/1.1\r\n")
	protocol, err := r.Both(r.w)
	r.want(t, protocol, err, HTTP1)

	r = newRig(t)
	_, server = r.layered()
	server.Ticket()
	io.WriteString(server, "220 ready\r\n")
	protocol, err = r.Both(r.w)
	r.want(t, protocol, err, Opaque)
	if got := string(r.UpRead.Bytes()); got != "220 ready\r\n" {
		t.Errorf("read %q from upstream", got)
	}
}
