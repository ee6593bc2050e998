package httpforward

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/flow"
)

// slowly reads in small pieces. Go's HTTP/2 gives credit back, on the stream and on the connection, for each 4 KiB.
func slowly(r io.Reader) (int64, error) {
	return io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{r}, make([]byte, 4<<10))
}

// zeros is a body that comes in large frames.
func zeros(n int64) io.Reader {
	return io.LimitReader(struct{ io.Reader }{zeroReader{}}, n)
}

type zeroReader struct{}

func (zeroReader) Read(p []byte) (int, error) { return len(p), nil }

func TestAReceiverThatGivesCreditBackInSmallPiecesIsNoFlood(t *testing.T) {
	const size = 32 << 20
	origin := serveHTTP2(t, func(w http.ResponseWriter, r *http.Request) {
		if n, err := slowly(r.Body); n != size || err != nil {
			t.Errorf("upstream read %d bytes and %v", n, err)
		}
		io.Copy(w, zeros(size))
	})
	r := newRig(t, origin, true)
	response, err := http2Client(t).Post("http://"+r.address+"/", "text/plain", zeros(size))
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	if n, err := slowly(response.Body); n != size || err != nil {
		t.Errorf("downstream read %d bytes and %v", n, err)
	}
	if got := r.records.await(t, 0); got.reason != flow.Completed {
		t.Errorf("the record is %+v", got)
	}
}

// An upstream that leaves while many requests are being sent resets them all at once, more than are remembered one by
// one.
func TestRequestsThatCrossAGoAwayAreNotAnError(t *testing.T) {
	_, client, server := meet(t)
	const last = 2*2*resetBurst + 1
	for id := 1; id <= last; id += 2 {
		client.sends(fmt.Sprintf("POST %d", id))
		server.reads(fmt.Sprintf("POST %d", id))
	}
	server.sends("GOAWAY 1 NO_ERROR")
	client.reads("GOAWAY 1 NO_ERROR")
	for id := 3; id <= last; id += 2 {
		client.next() // resets, in any order
	}
	for id := 3; id <= last; id += 2 {
		client.sends(fmt.Sprintf("DATA %d x", id))
		client.sends(fmt.Sprintf("HEADERS %d end trailer=1", id))
	}
	client.sends("DATA 1 end x")
	server.reads("DATA 1 end x")
	server.sends("HEADERS 1 end :status=200")
	heard := client.next()
	for strings.HasPrefix(heard, "WINDOW 0 ") {
		heard = client.next()
	}
	if heard != "HEADERS 1 end :status=200" {
		t.Fatalf("read %q", heard)
	}
}
