package outbound

import (
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"runtime"
	"testing"

	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/nettest"
)

// held is what a process holds that pushes must not make grow.
type held struct {
	goroutines, descriptors int
	heap                    uint64
}

// unnoticed is a listener whose server does not see that its connections speak TLS: it would not serve Istio's ALPN.
type unnoticed struct{ net.Listener }

func (l unnoticed) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return struct{ net.Conn }{conn}, nil
}

func measure(t *testing.T) (h held) {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // what a finalizer or a cleanup frees is collected by the second
		runtime.GC()
	}
	var memory runtime.MemStats
	runtime.ReadMemStats(&memory)
	return held{runtime.NumGoroutine(), len(entries), memory.HeapAlloc}
}

// A role that lives long holds no more after thousands of pushes than after some, apart from tables that are bounded: each push
// takes the last cluster away and brings another, one in four with TLS of its own; the workload's certificate is renewed now and
// then. A request goes to each cluster.
func TestPushesLeaveNothingBehind(t *testing.T) {
	const some, many, secured, rotation = 100, 2000, 4, 50
	r := newRouted(t, to("c"))
	r.Discard()
	listener := r.Peer.Listen(t, "tcp4", "0.0.0.0:82")
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "82") })}
	config := &tls.Config{Certificates: []tls.Certificate{*r.authority.Leaf(t, idOfServer, nil)}, ClientAuth: tls.RequireAnyClientCert, NextProtos: []string{"istio-http/1.1", "istio"}}
	served := make(chan struct{})
	go func() {
		defer close(served)
		server.Serve(unnoticed{tls.NewListener(listener, config)})
	}()
	t.Cleanup(func() { server.Close(); <-served })
	r.serve(t, 83)
	balancer := r.Role.(*Proxy).Balancer()
	client := r.client(t)
	defer client.Close()
	pushes := 0
	push := func() {
		pushes++
		name := fmt.Sprint("c", pushes)
		r.push(func(e *mesh.Edit) {
			e.SetCluster(fmt.Sprint("c", pushes-1), nil)
			e.SetAssignment(fmt.Sprint("c", pushes-1), nil)
			e.SetRoutes("81", &mesh.Routes{Name: "81", IgnorePort: true, Hosts: []mesh.VirtualHost{
				{Name: "web", Domains: []mesh.Domain{{Kind: mesh.DomainAny}}, Routes: []mesh.Route{to(name)}},
			}})
		})
		port, secure := uint16(83), func(*mesh.Cluster) {}
		if pushes%secured == 0 {
			port, secure = 82, func(c *mesh.Cluster) {
				c.Transports = []mesh.Transport{{TLS: &mesh.UpstreamTLS{
					SNI: sni, ALPN: []string{"istio"}, Certificate: "default", Roots: "ROOTCA",
					Names: []mesh.NameMatcher{{StringMatcher: mesh.StringMatcher{Text: idOfServer}}},
				}}}
			}
		}
		r.cluster(name, secure, port)
		if pushes%rotation == 0 {
			r.plane.Own.Store(r.authority.Identity(t, idOfClient))
		}
		balancer.Follow()
		if status, body := client.ask(t, "/"); status != 200 || body != fmt.Sprint(port) {
			t.Fatalf("push %d: status %d, %q", pushes, status, body)
		}
	}
	for pushes < some {
		push()
	}
	before := measure(t)
	for pushes < some+many {
		push()
	}
	var after held
	if !nettest.Within(nettest.Patience, func() bool {
		after = measure(t)
		return after.goroutines <= before.goroutines+5 && after.descriptors <= before.descriptors+5 && after.heap <= before.heap+2<<20
	}) {
		t.Errorf("after %d pushes %+v, after %d %+v", some, before, pushes, after)
	}
	t.Logf("after %d pushes %+v, after %d %+v", some, before, pushes, after)
}
