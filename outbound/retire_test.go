package outbound

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"testing"

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
