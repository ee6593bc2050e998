package httpforward

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/pillion-proxy/pillion/internal/budget"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// collecting is an atEdge whose decisions need the bodies of requests.
type collecting struct{ *atEdge }

func (c collecting) Route(r *Request) Decision {
	if r.Collected == nil {
		return Decision{Collect: 1 << 20}
	}
	return c.atEdge.Route(r)
}

// The copy of a body for a decision is held in the budget of the process, until the decision is made.
func TestCollectedBodiesAreHeldUntilTheDecision(t *testing.T) {
	const size = 1 << 20
	for _, two := range []bool{false, true} {
		t.Run(fmt.Sprintf("HTTP/2 %v", two), func(t *testing.T) {
			arrived, release := make(chan int64), make(chan struct{})
			defer close(release)
			origin := serveHTTP2(t, func(_ http.ResponseWriter, r *http.Request) {
				n, _ := io.Copy(io.Discard, r.Body)
				arrived <- n
				<-release
			})
			q := new(question)
			router := &planned{decide: func(r *Request, d *Decision) {
				switch {
				case r.Collected == nil:
					*d = Decision{Collect: size}
				case r.Check == nil:
					*d = Decision{Check: q}
				default:
					d.Target = upstream.Target{Address: origin}
				}
			}}
			r := newRig(t, origin, two, plain, func(c *Config) { c.Budget = budget.New(64 << 20) })
			r.set(func() { r.many, r.router = two, router })
			used := func() int { return r.engine.config.Budget.Used() }
			client := http2Client(t)
			if !two {
				client = &http.Client{Transport: &http.Transport{}, Timeout: nettest.Patience}
				t.Cleanup(client.CloseIdleConnections)
			}
			from, to := io.Pipe()
			var sent sync.WaitGroup
			sent.Go(func() {
				request, _ := http.NewRequestWithContext(t.Context(), "POST", "http://"+r.address, from)
				request.ContentLength = size
				if response, err := client.Do(request); err != nil {
					t.Error(err)
				} else {
					response.Body.Close()
				}
			})
			io.WriteString(to, strings.Repeat("a", size/2))
			if !two { // the buffer and the copy
				nettest.Eventually(t, "the first half of the body is held", func() bool { return used() >= size+size/2 })
			}
			io.WriteString(to, strings.Repeat("b", size/2))
			to.Close()
			nettest.Eventually(t, "the body is held twice", func() bool {
				q.mu.Lock()
				defer q.mu.Unlock()
				return q.ready != nil && used() >= map[bool]int{false: 3 * size, true: 2 * size}[two]
			})
			q.answer()
			if n := <-arrived; n != size {
				t.Errorf("%d bytes arrive", n)
			}
			nettest.Eventually(t, "the body is freed before its response", func() bool { return used() < size/2 })
			release <- struct{}{}
			sent.Wait()
		})
	}
}

// A Router finds the same seed whenever it is called about a request, and another one for each request.
func TestRequestsKeepTheirSeeds(t *testing.T) {
	for _, many := range []bool{false, true} {
		origin := serveHTTP2(t, func(http.ResponseWriter, *http.Request) {})
		seeds := make(chan uint64, 10)
		r := newRig(t, origin, many)
		r.set(func() {
			r.many, r.router = many, &planned{decide: func(r *Request, d *Decision) {
				seeds <- r.Seed
				switch {
				case r.Collected == nil:
					*d = Decision{Collect: 10}
				case r.Check == nil:
					*d = Decision{Check: &question{done: true}}
				}
			}}
		})
		client := http2Client(t)
		if !many {
			client = &http.Client{Transport: &http.Transport{}, Timeout: nettest.Patience}
			t.Cleanup(client.CloseIdleConnections)
		}
		for range 2 {
			response, err := client.Post("http://"+r.address, "text/plain", strings.NewReader("body"))
			if err != nil {
				t.Fatal(err)
			}
			response.Body.Close()
		}
		var got [6]uint64
		for i := range got {
			got[i] = <-seeds
		}
		if got[0] != got[1] || got[0] != got[2] || got[3] != got[4] || got[3] != got[5] || got[0] == got[3] {
			t.Errorf("HTTP/2 %v: the seeds of two requests are %v", many, got)
		}
	}
}
