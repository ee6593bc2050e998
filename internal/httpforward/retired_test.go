package httpforward

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/tcp"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// counted counts the rig's upstream connections, as the agent does.
func counted(c *Config) { c.Dialer.Stats = &c.Pool.Stats }

// grouping is a Router that puts connections to an address into its group.
type grouping struct {
	Router
	groups map[netip.AddrPort]*tcp.Group
}

func (g *grouping) Route(r *Request) Decision {
	d := g.Router.Route(r)
	d.Target.Group = g.groups[d.Target.Address]
	return d
}

// grouped returns a Router that puts connections to each of these addresses into a group of its own.
func grouped(router Router, addresses ...netip.AddrPort) *grouping {
	g := &grouping{router, map[netip.AddrPort]*tcp.Group{}}
	for _, a := range addresses {
		g.groups[a] = new(tcp.Group)
	}
	return g
}

// retireNow retires a group.
func (r *rig) retireNow(g *tcp.Group) { r.pool.Retire(map[*tcp.Group]struct{}{g: {}}) }

// retire retires a group again until what happens: an owner may be between its last check and its wait.
func (r *rig) retire(t *testing.T, g *tcp.Group, what string, happens func() bool) {
	t.Helper()
	nettest.Eventually(t, what, func() bool {
		r.retireNow(g)
		return happens()
	})
}

func TestIdleConnectionsToARetiredGroupAreClosed(t *testing.T) {
	home, other := newOrigin(t), newOrigin(t)
	r := newRig(t, home.address, false, plain, counted)
	router := grouped(newByPath(home, other), home.address, other.address)
	r.set(func() { r.router = router })
	client := r.dial(t)
	exchange := func(o net.Conn, request string) {
		t.Helper()
		expect(t, o, request)
		send(t, o, ok("1"))
		expect(t, client, ok("1"))
	}
	send(t, client, getHome)
	atHome := home.accept()
	exchange(atHome, getHome)
	send(t, client, getOther)
	atOther := other.accept()
	exchange(atOther, getOther) // now the connection to home is in the pool, and the client has that to other

	r.retire(t, router.groups[home.address], "an empty pool", func() bool { return r.pool.Idle() == 0 })
	readsEnd(t, atHome, "the server of the connection in the pool")
	r.retire(t, router.groups[other.address], "no connection", func() bool { return r.pool.Stats.Active.Load() == 0 })
	readsEnd(t, atOther, "the server of the client's connection")
	send(t, client, getOther)
	exchange(other.accept(), getOther) // a choice made after that is served, on another connection
}

func TestARequestAtARetiredGroupIsFinished(t *testing.T) {
	home, other := newOrigin(t), newOrigin(t)
	r := newRig(t, home.address, false, plain, counted)
	router := grouped(newByPath(home, other), home.address)
	r.set(func() { r.router = router })
	client := r.dial(t)
	send(t, client, getHome)
	atHome := home.accept()
	expect(t, atHome, getHome)
	r.retireNow(router.groups[home.address])
	send(t, atHome, ok("whole"))
	expect(t, client, ok("whole"))
	readsEnd(t, atHome, "the retired server")
	send(t, client, getHome)
	again := home.accept()
	expect(t, again, getHome)
	send(t, again, ok("new"))
	expect(t, client, ok("new"))
}

// Both kinds of upstream connections of a hub: a stream in progress ends, its connection takes no other and closes.
func TestStreamsAtARetiredGroupAreFinished(t *testing.T) {
	for _, translated := range []bool{false, true} {
		started, release := make(chan struct{}), make(chan struct{})
		serve := func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/slow" {
				close(started)
				<-release
			}
			io.WriteString(w, r.RemoteAddr)
		}
		origin := serveHTTP2(t, serve)
		var router Router = &roundRobin{targets: []netip.AddrPort{origin}}
		if translated {
			server := httptest.NewServer(http.HandlerFunc(serve))
			t.Cleanup(server.Close)
			origin = netip.MustParseAddrPort(server.Listener.Addr().String())
			router = translating(origin)
		}
		groups := grouped(router, origin)
		r := newHub(t, origin, groups, counted)
		client := http2Client(t)
		get := func(path string) string {
			response, err := client.Get("http://" + r.address + path)
			if err != nil {
				t.Error(err)
				return ""
			}
			defer response.Body.Close()
			body, err := io.ReadAll(response.Body)
			if err != nil {
				t.Error(err)
			}
			return string(body)
		}
		slow := make(chan string, 1)
		go func() { slow <- get("/slow") }()
		<-started
		r.retireNow(groups.groups[origin])
		other := get("/")
		close(release)
		if first := <-slow; first == "" || first == other {
			t.Errorf("translated %v: the stream in progress was served at %q, the one after it at %q: want two connections", translated, first, other)
		}
		r.retire(t, groups.groups[origin], "no connection", func() bool { return r.pool.Stats.Active.Load() == 0 })
		if again := get("/"); again == other || again == "" {
			t.Errorf("translated %v: served at %q, before that at %q: want another connection", translated, again, other)
		}
	}
}

// The client of a connection with one upstream connection is asked to open another one.
func TestAnHTTP2ConnectionToARetiredGroupIsDrained(t *testing.T) {
	origin := serveHTTP2(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, r.RemoteAddr) })
	r := newRig(t, origin, true, counted)
	group := new(tcp.Group)
	r.set(func() { r.group = group })
	client := http2Client(t)
	get := func() string {
		response, err := client.Get("http://" + r.address + "/")
		if err != nil {
			t.Error(err)
			return ""
		}
		defer response.Body.Close()
		body, _ := io.ReadAll(response.Body)
		return string(body)
	}
	first := get()
	if again := get(); again != first {
		t.Fatalf("two connections: %q and %q", first, again)
	}
	r.retire(t, group, "no connection", func() bool { return r.pool.Stats.Active.Load() == 0 })
	if again := get(); again == first || again == "" {
		t.Errorf("served at %q, before that at %q: want another connection", again, first)
	}
}

// A connection may be retired while it is being dialled: the calls that wait for it are sent on it, and it takes no others.
func TestADialledConnectionOfARetiredGroupServesTheCallsThatWaitForIt(t *testing.T) {
	o := newOrigin(t)
	group, routed := new(tcp.Group), new(sync.WaitGroup)
	routed.Add(3)
	security := &upstream.Security{Handshake: func(*tcp.Waiter, *tcp.Conn, time.Time) error {
		routed.Wait()
		return nil
	}}
	r := newHub(t, o.address, &planned{decide: func(_ *Request, d *Decision) {
		d.Target = upstream.Target{Address: o.address, Group: group, Security: security}
		routed.Done()
	}}, plain, counted)
	r.retireNow(group)
	client := greetHub(t, r, "")
	for _, stream := range []int{1, 3, 5} {
		client.sends(fmt.Sprint("GET ", stream))
	}
	server := acceptHub(t, o, "")
	for _, stream := range []int{1, 3, 5} {
		if got, want := server.next(), fmt.Sprint("HEADERS ", stream, " "); !strings.HasPrefix(got, want) {
			t.Fatalf("read %q, want %q", got, want)
		}
	}
	server.reads("SETTINGS ack")
	for _, stream := range []int{1, 3, 5} {
		server.sends(fmt.Sprint("HEADERS ", stream, " end :status=200"))
		client.reads(fmt.Sprint("HEADERS ", stream, " end :status=200"))
	}
	server.conn.SetDeadline(time.Now().Add(nettest.Patience))
	readsEnd(t, server.conn, "the retired connection")
	if n := r.pool.Stats.Connected.Load(); n != 1 {
		t.Errorf("%d connections, want one", n)
	}
}
