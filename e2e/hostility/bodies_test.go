package hostility

import (
	"fmt"
	"hash/crc32"
	"io"
	"net/http"
	"testing"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

const gibibyte = 1 << 30

// castagnoli is a checksum that processors compute.
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// generated is a body of size bytes. No two of its blocks are alike.
type generated struct {
	size, done int
	block      [64 << 10]byte
	rest       []byte // of block
}

func (g *generated) Read(b []byte) (int, error) {
	if g.done == g.size {
		return 0, io.EOF
	}
	if len(g.rest) == 0 {
		copy(g.block[:], fmt.Sprintf("block at %d\n", g.done))
		g.rest = g.block[:]
	}
	n := copy(b, g.rest[:min(len(g.rest), g.size-g.done)])
	g.rest, g.done = g.rest[n:], g.done+n
	return n, nil
}

// summary reads a body to its end, and returns its size and its checksum.
func summary(body io.Reader) (string, error) {
	sum := crc32.New(castagnoli)
	n, err := io.CopyBuffer(struct{ io.Writer }{sum}, struct{ io.Reader }{body}, make([]byte, 256<<10))
	return fmt.Sprintf("%d bytes, %08x", n, sum.Sum32()), err
}

// serveBodies answers GET with a GiB, and other requests with the summary of their body.
func serveBodies(w http.ResponseWriter, r *http.Request) {
	if r.Method == http.MethodGet {
		w.Header().Set("Content-Length", fmt.Sprint(gibibyte))
		io.CopyBuffer(struct{ io.Writer }{w}, &generated{size: gibibyte}, make([]byte, 256<<10))
		return
	}
	text, err := summary(r.Body)
	if err != nil {
		text += ": " + err.Error()
	}
	io.WriteString(w, text)
}

// Bodies of 1 GiB pass a gateway in both directions, over HTTPS with HTTP/1.1 and HTTP/2, whole and in order. The gateway lives within
// 128 MiB, and holds a small part of them.
func TestGatewayCarriesBodiesOfAGibibyte(t *testing.T) {
	want, err := summary(&generated{size: gibibyte})
	if err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, false, gateway)
	for _, two := range []bool{false, true} {
		c := w.newClient(t, originAddress, two)
		c.Timeout, c.transport.WriteBufferSize, c.transport.ReadBufferSize = 2*nettest.Patience, 256<<10, 256<<10
		upload, err := http.NewRequest(http.MethodPost, c.url+"bodies", &generated{size: gibibyte})
		if err != nil {
			t.Fatal(err)
		}
		upload.ContentLength = gibibyte
		download, err := http.NewRequest(http.MethodGet, c.url+"bodies", nil)
		if err != nil {
			t.Fatal(err)
		}
		for _, request := range []*http.Request{upload, download} {
			response, err := c.Do(request)
			if err != nil {
				w.checkAlive(t)
				t.Fatalf("%s, HTTP/2 %v: %v", request.Method, two, err)
			}
			got := ""
			if request == download {
				got, err = summary(response.Body)
			} else {
				var text []byte
				text, err = io.ReadAll(response.Body)
				got = string(text)
			}
			response.Body.Close()
			if got != want || err != nil || response.ProtoMajor == 2 != two {
				t.Errorf("%s over %s: %s, %v, want %s", request.Method, response.Proto, got, err, want)
			}
		}
	}
	w.checkAlive(t)
	const most = 64 << 20
	if peak := w.peakResident(t); peak > most {
		t.Errorf("the gateway used %d KiB for bodies of 1 GiB, want at most %d", peak>>10, most>>10)
	}
	t.Logf("resident memory %d KiB, of the cgroup %d KiB", w.peakResident(t)>>10, w.cgroup.Peak()>>10)
}
