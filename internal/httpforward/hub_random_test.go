package httpforward

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/route"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// disturbed is an echo whose handler sometimes fails, or ends early.
func disturbed(w http.ResponseWriter, r *http.Request) {
	switch rand.IntN(8) {
	case 0:
		w.WriteHeader(503) // without reading the request
		return
	case 1:
		panic(http.ErrAbortHandler)
	}
	sum := sha256.New()
	n, err := io.Copy(sum, r.Body)
	if err != nil {
		return
	}
	w.Header().Set("sum", string(hexOf(sum.Sum(nil))))
	io.Copy(w, io.LimitReader(rand.NewChaCha8([32]byte(sum.Sum(nil))), n*2))
}

func hexOf(b []byte) (text []byte) {
	for _, c := range b {
		text = append(text, "0123456789abcdef"[c>>4], "0123456789abcdef"[c&15])
	}
	return text
}

// Random conversations over several endpoints: what is answered with 200 has arrived unchanged in both directions, each lease
// ends once, and nothing is left behind.
func TestRandomConversationsOfAHub(t *testing.T) {
	var targets []netip.AddrPort
	for range 3 {
		targets = append(targets, serveHTTP2(t, disturbed))
	}
	targets = append(targets, netip.MustParseAddrPort("127.0.0.1:9"))
	held := &leases{}
	plan := &route.Plan{Retry: retrying(mesh.Retry5xx|mesh.RetryConnectFailure|mesh.RetryReset, 3)}
	r := newHub(t, targets[0], &planned{leases: held, decide: func(q *Request, d *Decision) {
		d.Plan, d.Target = plan, upstream.Target{Address: targets[rand.IntN(len(targets))]}
		if rand.IntN(10) == 0 && q.Attempt == 0 {
			d.Delay = time.Millisecond
		}
	}})
	var clients sync.WaitGroup
	var answered, left atomic.Int32
	for range 3 {
		client := http2Client(t)
		for range 16 {
			clients.Go(func() {
				for range 6 {
					switch err := converse(client, "http://"+r.address+"/"); {
					case err == nil:
						answered.Add(1)
					case errors.Is(err, context.Canceled):
						left.Add(1)
					default:
						t.Error(err)
					}
				}
			})
		}
	}
	clients.Wait()
	if answered.Load() == 0 || left.Load() == 0 {
		t.Errorf("%d answered, %d left", answered.Load(), left.Load())
	}
	held.check(t, nil) // while the connections are open: no stream is left behind
	if n := r.records.count(); n < int(answered.Load()) || n > 3*16*6 {
		t.Errorf("%d records of %d answered requests", n, answered.Load())
	}
}

// leaver is the body of a client that leaves in the middle of it.
type leaver struct {
	io.ReadCloser
	left  int
	leave func()
}

func (l *leaver) Read(p []byte) (int, error) {
	n, err := l.ReadCloser.Read(p)
	if l.left -= n; l.left <= 0 {
		l.leave()
	}
	return n, err
}

// converse sends a request with a random body, and checks the response. The client sometimes leaves.
func converse(client *http.Client, url string) error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	leaves := rand.IntN(8) == 0
	body := make([]byte, rand.IntN(1<<rand.IntN(19)+1))
	rand.NewChaCha8([32]byte{1}).Read(body)
	request, err := http.NewRequestWithContext(ctx, "POST", url, bytes.NewReader(body))
	if err != nil {
		return err
	}
	if leaves {
		request.Body = &leaver{request.Body, rand.IntN(len(body) + 1), cancel}
	}
	response, err := client.Do(request)
	if err != nil {
		if leaves {
			return context.Canceled
		}
		return err
	}
	defer response.Body.Close()
	got, err := io.ReadAll(response.Body)
	switch {
	case leaves:
		return context.Canceled
	case response.StatusCode == 503:
		return nil
	case err != nil:
		return err
	}
	sum := sha256.Sum256(body)
	want := make([]byte, 2*len(body))
	rand.NewChaCha8(sum).Read(want)
	if response.Header.Get("sum") != string(hexOf(sum[:])) || !bytes.Equal(got, want) {
		return errors.New("the bodies have changed")
	}
	return nil
}
