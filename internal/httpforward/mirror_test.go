package httpforward

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/route"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// mirrored routes all requests, with copies to others.
func mirrored(held *leases, plan *route.Plan, policy *mesh.Mirror, to ...*origin) *planned {
	return &planned{decide: func(_ *Request, d *Decision) {
		d.Plan = plan
		for _, o := range to {
			m := Mirror{Target: upstream.Target{Address: o.address}, Policy: policy}
			if held != nil {
				m.Lease = held.open()
			}
			d.Mirrors = append(d.Mirrors, m)
		}
	}}
}

func TestCopiesAreWholeAndTheirResponsesAreDropped(t *testing.T) {
	for _, test := range []struct {
		policy     mesh.Mirror
		host, want string
	}{
		{mesh.Mirror{}, "a.example", "a.example-shadow"},
		{mesh.Mirror{}, "a.example:8080", "a.example-shadow:8080"},
		{mesh.Mirror{}, "[2001:db8::1]", "[2001:db8::1]-shadow"},
		{mesh.Mirror{}, "[2001:db8::1]:80", "[2001:db8::1]-shadow:80"},
		{mesh.Mirror{KeepHost: true}, "a.example", "a.example"},
		{mesh.Mirror{KeepHost: true, HostRewrite: "b"}, "a.example", "b"},
	} {
		home, one, two := newOrigin(t), newOrigin(t), newOrigin(t)
		held := &leases{}
		r := newRig(t, home.address, false, plain)
		plan := &route.Plan{CountAttempts: true}
		r.set(func() { r.router = mirrored(held, plan, &test.policy, one, two) })
		client := r.dial(t)
		const request = "POST /x HTTP/1.1\r\nX-First: 1\r\nHost: %s\r\nContent-Length: 4\r\nx-envoy-attempt-count: 1\r\n\r\n"
		sent := fmt.Sprintf(strings.Replace(request, "x-envoy-attempt-count: 1\r\n", "", 1), test.host)
		send(t, client, sent+"bo")
		server := home.accept()
		expect(t, server, fmt.Sprintf(request, test.host)+"bo")
		send(t, client, "dy")
		expect(t, server, "dy")
		send(t, server, ok("home"))
		expect(t, client, ok("home")) // although no copy has got a response
		for i, o := range []*origin{one, two} {
			mirror := o.accept()
			expect(t, mirror, fmt.Sprintf(request, test.want)+"body")
			if i == 0 {
				send(t, mirror, "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 503 Busy\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nbad\r\n0\r\n\r\n")
				within(t, "the connection is kept", func() bool { return r.pool.Idle() == 1 })
				continue
			}
			send(t, mirror, "HTTP/1.1 503 Busy\r\nConnection: close\r\nContent-Length: 3\r\n\r\nbad")
			readsEnd(t, mirror, "the mirror")
		}
		held.check(t, []Outcome{
			{Status: 503, GRPC: -1, Reason: flow.Completed, Connected: true},
			{Status: 503, GRPC: -1, Reason: flow.Completed, Connected: true},
		})
		if copied, dropped := r.pool.Stats.Copied.Load(), r.pool.Stats.CopiesDropped.Load(); copied != 2 || dropped != 0 {
			t.Errorf("%d copies sent and %d dropped", copied, dropped)
		}
		r.records.await(t, 0) // the client may read the response before the record closes
		if n := r.records.count(); n != 1 {
			t.Errorf("%d records, want that of the request", n)
		}
	}
}

// Bodies are copied whole or not at all.
func TestOnlyWholeRequestsAreCopied(t *testing.T) {
	for _, size := range []int{0, 100 << 10, 1000 << 10, 2 << 20} {
		for way := range 4 {
			chunked, http2 := way&1 != 0, way&2 != 0 // the windows of HTTP/2 are smaller than the longest body
			home := serveHTTP2(t, func(w http.ResponseWriter, r *http.Request) { io.Copy(io.Discard, r.Body) })
			body := bytes.Repeat([]byte("0123456789abcdef"), size/16)
			got := make(chan bool, 1)
			other := serveHTTP2(t, func(w http.ResponseWriter, r *http.Request) {
				copied, err := io.ReadAll(r.Body)
				got <- err == nil && bytes.Equal(copied, body)
			})
			r := newRig(t, home, false, plain)
			r.set(func() {
				r.router = &planned{decide: func(_ *Request, d *Decision) {
					d.Mirrors = []Mirror{{Target: upstream.Target{Address: other}, Policy: &mesh.Mirror{}, HTTP2: http2}}
				}}
			})
			request, err := http.NewRequest("POST", "http://"+r.address, bytes.NewReader(body))
			if err != nil {
				t.Fatal(err)
			}
			if chunked {
				request.ContentLength = -1
			}
			client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: nettest.Patience}
			response, err := client.Do(request)
			if err != nil {
				t.Fatal(err)
			}
			response.Body.Close()
			if size > maxKept {
				if n := r.pool.Stats.CopiesDropped.Load(); n != 1 {
					t.Errorf("%d bytes: %d copies dropped", size, n)
				}
				continue
			}
			select {
			case whole := <-got:
				if !whole {
					t.Errorf("%d bytes, chunked %v, HTTP/2 %v: the copy differs", size, chunked, http2)
				}
			case <-time.After(nettest.Patience):
				t.Errorf("%d bytes, chunked %v, HTTP/2 %v: no copy", size, chunked, http2)
			}
		}
	}
}

// A mirror that answers without reading has answered. Its answer is larger than what is read of it, and the request than the window.
func TestAMirrorMayAnswerWithoutReading(t *testing.T) {
	home := serveHTTP2(t, func(w http.ResponseWriter, r *http.Request) { io.Copy(io.Discard, r.Body) })
	small := &http.HTTP2Config{MaxReceiveBufferPerConnection: 64 << 10, MaxReceiveBufferPerStream: 64 << 10}
	mirror := serveHTTP2By(t, small, func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(201)
		w.Write(make([]byte, 100<<10))
		<-r.Context().Done()
	})
	held := &leases{}
	r := newRig(t, home, false, plain)
	r.set(func() {
		r.router = &planned{decide: func(_ *Request, d *Decision) {
			d.Mirrors = []Mirror{{Target: upstream.Target{Address: mirror}, Policy: &mesh.Mirror{}, HTTP2: true, Lease: held.open()}}
		}}
	})
	client := &http.Client{Timeout: nettest.Patience}
	defer client.CloseIdleConnections()
	response, err := client.Post("http://"+r.address, "text/plain", bytes.NewReader(make([]byte, 1000<<10)))
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	held.check(t, []Outcome{{Status: 201, GRPC: -1, Reason: flow.Completed, Connected: true}})
}

// Mirrors that accept nothing, respond with nothing, or nonsense, or are not there: no request notices.
func TestARequestDoesNotSufferFromItsCopies(t *testing.T) {
	const requests = 3 * maxCopies
	home := serveHTTP2(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		w.Write(body)
	})
	silent, gone := newOrigin(t), &origin{address: nettest.Refusing(t)}
	nonsense := newOrigin(t)
	go func() {
		for {
			conn, err := nonsense.listener.Accept()
			if err != nil {
				return
			}
			io.WriteString(conn, "HTTP/1.1 2\r\n\r\n")
			conn.Close()
		}
	}()
	held := &leases{}
	r := newRig(t, home, false, plain)
	r.set(func() { r.router = mirrored(held, new(route.Plan), &mesh.Mirror{}, silent, gone, nonsense) })
	var most atomic.Int32
	var clients sync.WaitGroup
	for range 4 {
		clients.Go(func() {
			client := &http.Client{Timeout: nettest.Patience}
			defer client.CloseIdleConnections()
			for i := range requests / 4 {
				want := strings.Repeat("x", i*100)
				response, err := client.Post("http://"+r.address, "text/plain", strings.NewReader(want))
				if err != nil {
					t.Error(err)
					return
				}
				got, err := io.ReadAll(response.Body)
				response.Body.Close()
				if err != nil || string(got) != want || response.StatusCode != 200 {
					t.Errorf("read %d bytes, %v and status %d, want %d bytes", len(got), err, response.StatusCode, len(want))
				}
				if n := r.engine.copies.active.Load(); n > most.Load() {
					most.Store(n)
				}
			}
		})
	}
	clients.Wait()
	silent.listener.Close() // resets the connections that it has not accepted, and so ends the copies that wait for answers
	held.check(t, nil)
	if n := most.Load(); n > maxCopies+4 { // the counter is above the limit for a moment when a copy is refused
		t.Errorf("%d copies at a time", n)
	}
	stats := &r.pool.Stats
	if copied, dropped := stats.Copied.Load(), stats.CopiesDropped.Load(); copied+dropped != 3*requests || dropped == 0 {
		t.Errorf("%d copies sent and %d dropped, want %d together", copied, dropped, 3*requests)
	}
}

// A request that fails before it has arrived is not copied, and one that is retried is copied once.
func TestARequestIsCopiedOnce(t *testing.T) {
	home, other := newOrigin(t), newOrigin(t)
	held := &leases{}
	r := newRig(t, home.address, false, plain)
	r.set(func() {
		r.router = mirrored(held, &route.Plan{Retry: retrying(mesh.Retry5xx, 2)}, &mesh.Mirror{KeepHost: true}, other)
	})
	client := r.dial(t)
	send(t, client, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nbo")
	home.accept()
	client.Close()
	if got := r.records.await(t, 0); got.reason != flow.DownstreamLeft {
		t.Errorf("the record is %+v", got)
	}
	held.check(t, []Outcome{{GRPC: -1, Reason: flow.DownstreamLeft}})
	client = r.dial(t)
	send(t, client, getHome)
	for _, status := range []string{"503 Busy", "503 Busy", "200 OK"} {
		server := home.accept()
		expect(t, server, getHome)
		send(t, server, response(status))
	}
	mirror := other.accept()
	expect(t, mirror, getHome)
	mirror.Close()
	if got := head(t, bufio.NewReader(client)); !strings.HasPrefix(got, "HTTP/1.1 200 ") {
		t.Errorf("read %q", got)
	}
	other.listener.SetDeadline(time.Now().Add(50 * time.Millisecond))
	if conn, err := other.listener.Accept(); err == nil {
		conn.Close()
		t.Error("the request was copied twice")
	} else if e, ok := err.(net.Error); !ok || !e.Timeout() {
		t.Error(err)
	}
	if n := r.pool.Stats.Copied.Load(); n != 1 {
		t.Errorf("%d copies", n)
	}
}
