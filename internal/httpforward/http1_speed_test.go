//go:build !race

package httpforward

import (
	"io"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/route"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

const (
	speedRequest  = "GET /some/path HTTP/1.1\r\nHost: example.test:8080\r\nUser-Agent: test/1.0\r\nAccept: */*\r\n\r\n"
	speedResponse = "HTTP/1.1 200 OK\r\nServer: origin\r\nDate: Mon, 23 Nov 2026 12:00:00 GMT\r\nContent-Type: text/plain\r\nContent-Length: 5\r\n\r\nhello"
)

// speedRig answers every request on one upstream connection with the same bytes, without allocating.
func speedRig(t testing.TB, peers *PeerFields, router Router, added string) (exchange func()) {
	o := newOrigin(t)
	r := newRig(t, o.address, false, func(c *Config) { c.Flows = nowhere{} })
	r.set(func() { r.peers, r.router = peers, router })
	client := r.dial(t)
	answer := len(speedResponse) + len("x-envoy-upstream-service-time: 0\r\n") + len(added)
	buf, request, response := make([]byte, 4096), []byte(speedRequest), []byte(speedResponse)
	if peers.readsRequests() {
		request = append(request[:len(request)-2], described+"\r\n"...)
		answer += peers.described(introduced{true, true})
	}
	if peers.readsResponses() {
		response = []byte(strings.Replace(speedResponse, "\r\n", "\r\n"+described, 1))
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		serveSpeed(o.accept(), response)
	}()
	t.Cleanup(func() { client.Close(); <-served })
	return func() {
		if _, err := client.Write(request); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(client, buf[:answer]); err != nil {
			t.Fatal(err)
		}
	}
}

// nowhere is a sink that costs nothing.
type nowhere struct{}

func (nowhere) Closed(*flow.Record) {}

// described are the fields by which a peer describes itself.
var described = peerMetadataIDField + ": sidecar~192.0.2.1~a.shop~shop.svc.cluster.local\r\n" + peerMetadataField + ": " + ofReviews.Metadata + "\r\n"

func serveSpeed(conn net.Conn, response []byte) {
	buf := make([]byte, 4096)
	for {
		if _, err := conn.Read(buf); err != nil {
			return
		}
		if _, err := conn.Write(response); err != nil {
			return
		}
	}
}

func TestARequestAllocatesNothing(t *testing.T) {
	for _, peers := range []*PeerFields{nil, {ClientCert: AppendClientCert, Element: "Hash=own"}, {Exchange: ofReviews}, {Exchange: ofReviews, Introduces: true}} {
		exchange := speedRig(t, peers, nil, "")
		for range 10 {
			exchange()
		}
		if allocs := testing.AllocsPerRun(2000, exchange); allocs >= 0.1 { // the collector may empty the pools
			t.Errorf("%+v: %v allocations for a request, want none", peers, allocs)
		}
	}
}

// A connection for each request: with an upstream connection that others have used, and with one of its own.
func BenchmarkRequestOnANewConnection(b *testing.B) {
	for name, balanced := range map[string]bool{"shared": false, "own": true} {
		b.Run(name, func(b *testing.B) {
			o := newOrigin(b)
			r := newRig(b, o.address, false, func(c *Config) { c.Flows = nowhere{} })
			r.set(func() { r.balanced = balanced })
			var serving sync.WaitGroup
			serving.Go(func() {
				for {
					conn, err := o.listener.Accept()
					if err != nil {
						return
					}
					serving.Go(func() { defer conn.Close(); serveSpeed(conn, []byte(speedResponse)) })
				}
			})
			b.Cleanup(func() { o.listener.Close(); r.cancel(); r.pool.Close(); serving.Wait() })
			answer := len(speedResponse) + len("x-envoy-upstream-service-time: 0\r\n")
			buf, request := make([]byte, 4096), []byte(speedRequest)
			before := cpuTime(b)
			b.ReportAllocs()
			for b.Loop() {
				client, err := net.Dial("tcp4", r.address)
				if err != nil {
					b.Fatal(err)
				}
				if _, err := client.Write(request); err != nil {
					b.Fatal(err)
				}
				if _, err := io.ReadFull(client, buf[:answer]); err != nil {
					b.Fatal(err)
				}
				client.Close()
			}
			b.ReportMetric(float64(cpuTime(b)-before)/float64(b.N), "cpu-ns/op") // of the client and the server, too
		})
	}
}

func cpuTime(b *testing.B) time.Duration {
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		b.Fatal(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

func BenchmarkRequest(b *testing.B) {
	for _, of := range speedRouters(b) {
		b.Run(of.name, func(b *testing.B) {
			exchange := speedRig(b, nil, of.router, of.added)
			before := cpuTime(b)
			b.ReportAllocs()
			for b.Loop() {
				exchange()
			}
			b.ReportMetric(float64(cpuTime(b)-before)/float64(b.N), "cpu-ns/op") // of the client and the server, too
		})
	}
}

// speedRouter routes each request with the same plan, after it has looked for a field that is not there.
type speedRouter struct{ plan *route.Plan }

func (s *speedRouter) Route(r *Request) Decision {
	_ = lookup(r.Fields, "x-absent")
	return Decision{
		Target: upstream.Target{Address: r.Connection.OriginalDestination}, Cluster: "c", Route: "r", Plan: s.plan, Lease: speedLease{},
	}
}

type speedLease struct{}

func (speedLease) End(Outcome) {}

// speedRouters are routers with what the routes of a mesh usually ask for, and with more. added is what they add to the response.
func speedRouters(t testing.TB) []struct {
	name   string
	router Router
	added  string
} {
	policy := &mesh.RetryPolicy{
		On:      mesh.RetryConnectFailure | mesh.RetryRefusedStream | mesh.RetryUnavailable | mesh.RetryCancelled | mesh.RetryStatusCodes,
		Retries: 2, Codes: []uint32{503}, BackOff: 25 * time.Millisecond, MaxBackOff: 250 * time.Millisecond, OtherHosts: true, HostChoices: 5,
	}
	edits := planOf(t, mesh.Forward{PrefixRewrite: "/v2/", HostRewrite: "new.example", Retry: policy, Timeout: time.Minute}, mesh.Edits{
		Request:  mesh.HeaderEdits{Add: []mesh.HeaderEdit{{Name: "x-more", Value: "%REQ(user-agent)%"}}, Remove: []string{"accept"}},
		Response: mesh.HeaderEdits{Add: []mesh.HeaderEdit{{Name: "x-route", Value: "%ROUTE_NAME%"}}},
	})
	return []struct {
		name   string
		router Router
		added  string
	}{
		{"unrouted", nil, ""},
		{"routed", &speedRouter{}, ""},
		{"retries", &speedRouter{&route.Plan{Retry: policy}}, ""},
		{"counted", &speedRouter{&route.Plan{Retry: policy, CountAttempts: true}}, ""},
		{"edited", &speedRouter{edits}, "x-route: r\r\n"},
	}
}

func TestARoutedRequestAllocatesNothing(t *testing.T) {
	for _, of := range speedRouters(t) {
		exchange := speedRig(t, nil, of.router, of.added)
		for range 10 {
			exchange()
		}
		if allocs := testing.AllocsPerRun(2000, exchange); allocs >= 0.1 { // the collector may empty the pools
			t.Errorf("%s: %v allocations for a request, want none", of.name, allocs)
		}
	}
}
