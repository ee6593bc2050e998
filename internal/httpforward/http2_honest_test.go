package httpforward

import (
	"io"
	"net/http"
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
