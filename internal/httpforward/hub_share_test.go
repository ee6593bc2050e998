package httpforward

import (
	"fmt"
	"testing"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// A connection whose server takes no streams holds back no call that another connection to the target can carry. Calls that wait for it
// move to another that gets a place.
func TestCallsAvoidAConnectionThatTakesNoStreams(t *testing.T) {
	o := newOrigin(t)
	r := newHub(t, o.address, toOrigin(o), plain)
	client := greetHub(t, r, "")
	ask := func(client *speaker, id string) { client.sends("HEADERS " + id + " end " + getFields) }
	accept := func() *speaker {
		server := acceptHub(t, o, "3=1")
		server.reads("HEADERS 1 end " + getFields)
		server.reads("SETTINGS ack")
		client.sends("PING 12345678") // its limit is known behind that
		client.reads("PING ack 12345678")
		return server
	}
	set := func(server *speaker, settings string) {
		server.sends("SETTINGS " + settings)
		server.reads("SETTINGS ack")
	}
	respond := func(server *speaker, upstream, downstream string) {
		server.sends("HEADERS " + upstream + " end :status=200")
		client.reads("HEADERS " + downstream + " end :status=200")
	}
	ask(client, "1")
	a := accept()
	ask(client, "3")
	b := accept()
	set(a, "3=0")
	ask(client, "5") // b is full, but another connection may have a place
	c := accept()
	set(b, "3=0")
	set(c, "3=0")
	respond(a, "1", "1")
	ask(client, "7") // waits for a: it carries the fewest
	ask(client, "9")
	client.sends("PING 12345678")
	client.reads("PING ack 12345678")
	set(c, "3=2")
	c.reads("HEADERS 3 end " + getFields)
	respond(c, "1", "5")
	c.reads("HEADERS 5 end " + getFields)
	respond(c, "3", "7")
	respond(c, "5", "9")
	respond(b, "1", "3")
	for i := range 5 {
		if got := r.records.await(t, i); got.reason != flow.Completed || got.status != 200 {
			t.Errorf("the record is %+v", got)
		}
	}
}

// A call is carried although a hub has as many connections as it may: idle ones give way, and those that take no more calls, or carry
// calls to other targets, do not stand in its way.
func TestAHubHasAConnectionForEachTarget(t *testing.T) {
	for name, c := range map[string]struct {
		each func(client, server *speaker, id string) // what becomes of the connections before
		left int                                      // how many of them carry a call at the end
	}{
		"idle": {func(client, server *speaker, id string) {
			server.sends("HEADERS 1 end :status=200")
			client.reads("HEADERS " + id + " end :status=200")
		}, 0},
		"retired": {func(_, server *speaker, _ string) {
			server.sends("GOAWAY 1 NO_ERROR")
			server.sends("PING 12345678")
			server.reads("PING ack 12345678")
		}, maxLegs},
		"busy": {func(_, _ *speaker, _ string) {}, maxLegs},
	} {
		t.Run(name, func(t *testing.T) {
			o := newOrigin(t)
			retired := &upstream.Security{}
			r := newHub(t, o.address, &planned{decide: func(_ *Request, d *Decision) {
				d.Target = upstream.Target{Address: o.address, Security: retired}
				if name != "retired" {
					d.Target.Security = new(upstream.Security)
				}
			}}, plain)
			client := greetHub(t, r, "")
			var servers []*speaker
			carry := func(n int) (id string) {
				id = fmt.Sprint(2*n + 1)
				client.sends("GET " + id)
				server := acceptHub(t, o, "3=1")
				server.reads("GET 1")
				server.reads("SETTINGS ack")
				servers = append(servers, server)
				return id
			}
			for n := range maxLegs {
				id := carry(n)
				c.each(client, servers[n], id)
			}
			id := carry(maxLegs)
			servers[maxLegs].sends("HEADERS 1 end :status=200")
			client.reads("HEADERS " + id + " end :status=200")
			for n := range c.left {
				servers[n].sends("HEADERS 1 end :status=200")
				client.reads(fmt.Sprintf("HEADERS %d end :status=200", 2*n+1))
			}
			switch name {
			case "idle":
				servers[0].reads("the end")
			case "busy":
				servers[0].sends("PING 12345678")
				servers[0].reads("PING ack 12345678")
			}
		})
	}
}

// The limit of a cluster holds as well when a hub has as many connections as it may: further calls wait for a place.
func TestCallsWaitForAPlaceWithinTheLimitOfTheirCluster(t *testing.T) {
	o := newOrigin(t)
	security := &upstream.Security{Options: upstream.Options{Streams: 1}}
	r := newHub(t, o.address, &planned{decide: func(_ *Request, d *Decision) {
		d.Target = upstream.Target{Address: o.address, Security: security}
	}}, plain)
	client := greetHub(t, r, "")
	var servers []*speaker
	for n := range maxLegs {
		client.sends(fmt.Sprintf("GET %d", 2*n+1))
		server := acceptHub(t, o, "")
		server.reads("GET 1")
		server.reads("SETTINGS ack")
		servers = append(servers, server)
	}
	client.sends(fmt.Sprintf("GET %d", 2*maxLegs+1))
	client.sends("PING 12345678") // it has been decided about behind that
	client.reads("PING ack 12345678")
	servers[1].sends("HEADERS 1 end :status=200")
	client.reads("HEADERS 3 end :status=200")
	servers[1].reads("GET 3")
	servers[1].sends("HEADERS 3 end :status=200")
	client.reads(fmt.Sprintf("HEADERS %d end :status=200", 2*maxLegs+1))
}
