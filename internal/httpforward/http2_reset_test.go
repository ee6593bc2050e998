package httpforward

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/pillion-proxy/pillion/internal/flow"
)

// together sends the frames of all lines by one write, so that the engine reads them at once.
func (s *speaker) together(lines ...string) {
	s.t.Helper()
	var all bytes.Buffer
	framer := s.framer
	defer func() { s.framer = framer }()
	s.framer = http2.NewFramer(&all, nil)
	for _, line := range lines {
		s.sends(line)
	}
	if _, err := s.conn.Write(all.Bytes()); err != nil {
		s.t.Fatal(err)
	}
}

// The server is not troubled with requests that downstream has already reset.
func TestARequestThatArrivesWithItsResetIsNotForwarded(t *testing.T) {
	r, client, server := meet(t)
	client.together("GET 1", "RST 1 CANCEL", "GET 3", "HEADERS 5 "+postFields, "GET 7", "RST 5 CANCEL", "PING 12345678")
	server.reads("GET 3")
	server.reads("GET 7")
	server.reads("PING 12345678")
	for i := range 2 {
		if got := r.records.await(t, i); got.reason != flow.DownstreamLeft || got.flags != "DC" || got.method == "" {
			t.Errorf("the record of request %d is %+v", i+1, got)
		}
	}
	server.sends("HEADERS 3 end :status=204")
	client.reads("HEADERS 3 end :status=204")
	// The header table is in step, although not all blocks were forwarded.
	client.sends("GET 9")
	server.reads("GET 9")
}

// A reset behind other frames of the stream, or in a later read, is forwarded with them.
func TestAResetBehindDataIsForwarded(t *testing.T) {
	_, client, server := meet(t)
	client.together("HEADERS 1 "+postFields, "DATA 1 body", "RST 1 CANCEL")
	server.reads("HEADERS 1 " + postFields)
	server.reads("DATA 1 body")
	server.reads("RST 1 CANCEL")
	client.sends("GET 3")
	server.reads("GET 3")
	client.sends("RST 3 CANCEL")
	server.reads("RST 3 CANCEL")
}

// Each counts towards the bound on resets, as if it had been forwarded.
func TestRequestsThatArriveWithTheirResetsAreAFlood(t *testing.T) {
	_, client, server := meet(t)
	server.quietly()
	goodbye := client.quietly()
	var both bytes.Buffer
	framer := http2.NewFramer(&both, nil)
	for id := uint32(1); id < 2*2*resetBurst; id += 2 {
		both.Reset()
		framer.WriteHeaders(http2.HeadersFrameParam{
			StreamID: id, EndStream: true, EndHeaders: true, BlockFragment: client.encode(strings.Fields(getFields)),
		})
		framer.WriteRSTStream(id, http2.ErrCodeCancel)
		if _, err := client.conn.Write(both.Bytes()); err != nil {
			break // the engine has had enough
		}
	}
	if got := goodbye(); !strings.HasPrefix(got, "GOAWAY ENHANCE_YOUR_CALM") {
		t.Errorf("the client was told %q", got)
	}
}

// A downstream that resets many requests is read at intervals, in which a reset catches up with its request.
func TestResetsCatchUpWithRequestsInAFlood(t *testing.T) {
	t.Parallel()
	_, client, server := meet(t, func(c *Config) { c.resetPause = 2 * time.Second })
	id := 1
	for range manyResets {
		client.together(fmt.Sprintf("GET %d", id), fmt.Sprintf("RST %d CANCEL", id))
		id += 2
	}
	client.sends("PING 12345678") // read after the first pause, or before it
	server.reads("PING 12345678")
	for attempt := 0; ; attempt++ {
		client.sends(fmt.Sprintf("GET %d", id))
		server.conn.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
		frame, err := server.framer.ReadFrame()
		server.conn.SetReadDeadline(time.Time{})
		if errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
		if attempt == 100 || err != nil {
			t.Fatalf("during the pause the server read %v, %v", frame, err)
		}
		client.sends(fmt.Sprintf("RST %d CANCEL", id)) // the request was read in the turn that began after a pause
		server.reads(fmt.Sprintf("RST %d CANCEL", id))
		id += 2
	}
	client.sends(fmt.Sprintf("RST %d CANCEL", id))
	client.sends("PING 87654321")
	server.reads("PING 87654321")
}
