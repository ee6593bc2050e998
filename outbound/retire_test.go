package outbound

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/nettest"
)

// When an endpoint leaves the cluster, the requests of an HTTP/2 connection that follow go to another one, over the same
// downstream connection.
func TestAnHTTP2ConnectionFollowsItsEndpoints(t *testing.T) {
	r := newRouted(t, to("v1"))
	r.serve(t, 82, 83)
	r.cluster("v1", nil, 82)
	dials := 0
	transport := &http.Transport{Protocols: new(http.Protocols)}
	transport.Protocols.SetUnencryptedHTTP2(true)
	transport.DialContext = func(context.Context, string, string) (net.Conn, error) {
		dials++
		return r.TryDial(r.At(81))
	}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport, Timeout: nettest.Patience}
	get := func() string {
		t.Helper()
		response, err := client.Get("http://web/")
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		body, _ := io.ReadAll(response.Body)
		if response.StatusCode != 200 {
			t.Fatalf("status %d", response.StatusCode)
		}
		r.Await(t)
		return string(body)
	}
	for range 3 {
		if body := get(); body != "82" || dials != 1 {
			t.Fatalf("%s answered over %d connections", body, dials)
		}
	}
	r.endpoints("v1", 83)
	r.Wake()
	nettest.Eventually(t, "requests to reach the new endpoint", func() bool { return get() == "83" })
	if dials != 1 {
		t.Errorf("%d connections", dials)
	}
}

// The requests of an HTTP/2 connection whose cluster is refused by a push are answered from then on, as those of HTTP/1 are,
// also before the connection has ended.
func TestARefusedClusterBindsTheNextRequestOfAnHTTP2Connection(t *testing.T) {
	r := newRouted(t, to("v1"))
	r.serve(t, 82)
	refuse := func(refused, transport bool) func(*mesh.Cluster) {
		return func(c *mesh.Cluster) {
			c.Refused = refused
			c.Transports = []mesh.Transport{{Name: "raw", Refused: transport}}
		}
	}
	for _, push := range []func(*mesh.Cluster){refuse(true, false), refuse(false, true)} {
		r.cluster("v1", refuse(false, false), 82)
		transport := &http.Transport{Protocols: new(http.Protocols)}
		transport.Protocols.SetUnencryptedHTTP2(true)
		transport.DialContext = func(context.Context, string, string) (net.Conn, error) { return r.TryDial(r.At(81)) }
		client := &http.Client{Transport: transport, Timeout: nettest.Patience}
		get := func() error {
			response, err := client.Get("http://web/")
			if err == nil {
				response.Body.Close()
				if response.StatusCode != 200 {
					err = errors.New(response.Status)
				}
			}
			r.Await(t)
			return err
		}
		if err := get(); err != nil {
			t.Fatal(err)
		}
		r.cluster("v1", push, 82)
		if err := get(); err == nil { // over a new connection, which is reset, if the other one has ended
			t.Error("the endpoint answered")
		}
		transport.CloseIdleConnections()
	}
}

// A push that removes an endpoint of one cluster closes the idle connections that were made for it, and no connection of a cluster
// that still has an endpoint with this address.
func TestALostEndpointOfOneClusterKeepsTheConnectionsOfAnother(t *testing.T) {
	subset := to("v1")
	subset.Match = mesh.RouteMatch{Kind: mesh.PathPrefix, Path: "/v1"}
	r := newRouted(t, subset, to("all"))
	closed := make(chan string, 10)
	listener := r.Peer.Listen(t, "tcp4", r.At(82).String())
	server := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, r.RemoteAddr) }),
		ConnState: func(c net.Conn, state http.ConnState) {
			if state == http.StateClosed {
				closed <- c.RemoteAddr().String()
			}
		},
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		server.Serve(listener)
	}()
	t.Cleanup(func() { server.Close(); <-served })
	r.cluster("v1", nil, 82)
	r.cluster("all", nil, 82)
	client := r.client(t)
	get := func(path string) string {
		t.Helper()
		status, connection := client.ask(t, path)
		if status != 200 {
			t.Fatalf("status %d", status)
		}
		r.Await(t)
		return connection
	}
	lost, kept := get("/v1"), get("/")
	if get("/v1") != lost || get("/") != kept {
		t.Fatal("connections are not kept between requests")
	}
	r.endpoints("v1", 83)
	r.Role.(*Proxy).Balancer().Follow()
	select {
	case connection := <-closed:
		if connection != lost {
			t.Errorf("closed: %s; the connection of the cluster that has lost its endpoint is %s", connection, lost)
		}
	case <-time.After(nettest.Patience):
		t.Fatal("no connection is closed")
	}
	if again := get("/"); again != kept {
		t.Errorf("the other cluster's connection was %s, and is %s after the push", kept, again)
	}
	client.Close()
}

// When a push brings routes or another cluster for the port of an open connection, the connection ends in order: no request is lost,
// and those of the next connection go there.
func TestAPushThatBringsRoutesRetiresConnections(t *testing.T) {
	for serial := range 4 {
		two, routes := serial&1 != 0, serial&2 != 0
		r := newRouted(t, to("v2"))
		r.serve(t, 82, 83)
		r.cluster("v1", nil, 82)
		r.cluster("v2", nil, 83)
		r.Discard()
		listener := r.plane.InForce.Load().Listener("0.0.0.0_81")
		r.bytes(&mesh.TCPProxy{Clusters: []mesh.TCPCluster{{Name: "v1", Weight: 1}}})
		dials := 0
		transport := &http.Transport{Protocols: new(http.Protocols)}
		transport.Protocols.SetHTTP1(!two)
		transport.Protocols.SetUnencryptedHTTP2(two)
		transport.DialContext = func(context.Context, string, string) (net.Conn, error) {
			dials++
			return r.TryDial(r.At(81))
		}
		defer transport.CloseIdleConnections()
		client := &http.Client{Transport: transport, Timeout: nettest.Patience}
		get := func() string {
			t.Helper()
			response, err := client.Post("http://web/", "text/plain", strings.NewReader("body")) // the client does not send it again
			if err != nil {
				t.Fatal(err)
			}
			defer response.Body.Close()
			body, err := io.ReadAll(response.Body)
			if err != nil || response.StatusCode != 200 {
				t.Fatalf("status %d, %v", response.StatusCode, err)
			}
			return string(body)
		}
		for range 3 {
			if body := get(); body != "82" || dials != 1 {
				t.Fatalf("%s answered over %d connections", body, dials)
			}
		}
		r.cluster("v1", func(c *mesh.Cluster) { c.ConnectTimeout = time.Second }, 82) // nothing of the connection's
		r.Wake()
		for range 3 {
			if body := get(); body != "82" || dials != 1 {
				t.Fatalf("after another push, %s answered over %d connections", body, dials)
			}
		}
		if routes {
			r.push(func(e *mesh.Edit) { e.SetListener(listener.Name, listener) })
		} else {
			r.bytes(&mesh.TCPProxy{Clusters: []mesh.TCPCluster{{Name: "v2", Weight: 1}}})
		}
		r.Wake()
		nettest.Eventually(t, "requests to go elsewhere", func() bool { return get() == "83" })
		if get() != "83" || dials != 2 {
			t.Errorf("%d connections", dials)
		}
	}
}
