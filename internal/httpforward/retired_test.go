package httpforward

import (
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"testing"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// counted counts the rig's upstream connections, as the agent does.
func counted(c *Config) { c.Dialer.Stats = &c.Pool.Stats }

// retire retires an address again until what happens: an owner may be between its last check and its wait.
func (r *rig) retire(t *testing.T, address netip.AddrPort, what string, happens func() bool) {
	t.Helper()
	nettest.Eventually(t, what, func() bool {
		r.pool.Retire(map[netip.AddrPort]struct{}{address: {}})
		return happens()
	})
}

func TestIdleConnectionsToARetiredAddressAreClosed(t *testing.T) {
	home, other := newOrigin(t), newOrigin(t)
	r := newRig(t, home.address, false, plain, counted)
	r.set(func() { r.router = newByPath(home, other) })
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

	r.retire(t, home.address, "an empty pool", func() bool { return r.pool.Idle() == 0 })
	readsEnd(t, atHome, "the server of the connection in the pool")
	r.retire(t, other.address, "no connection", func() bool { return r.pool.Stats.Active.Load() == 0 })
	readsEnd(t, atOther, "the server of the client's connection")
	send(t, client, getOther)
	exchange(other.accept(), getOther) // a choice made after that is served, on another connection
}

func TestARequestAtARetiredAddressIsFinished(t *testing.T) {
	home, other := newOrigin(t), newOrigin(t)
	r := newRig(t, home.address, false, plain, counted)
	r.set(func() { r.router = newByPath(home, other) })
	client := r.dial(t)
	send(t, client, getHome)
	atHome := home.accept()
	expect(t, atHome, getHome)
	r.pool.Retire(map[netip.AddrPort]struct{}{home.address: {}})
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
func TestStreamsAtARetiredAddressAreFinished(t *testing.T) {
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
		r := newHub(t, origin, router, counted)
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
		r.pool.Retire(map[netip.AddrPort]struct{}{origin: {}})
		other := get("/")
		close(release)
		if first := <-slow; first == "" || first == other {
			t.Errorf("translated %v: the stream in progress was served at %q, the one after it at %q: want two connections", translated, first, other)
		}
		r.retire(t, origin, "no connection", func() bool { return r.pool.Stats.Active.Load() == 0 })
		if again := get("/"); again == other || again == "" {
			t.Errorf("translated %v: served at %q, before that at %q: want another connection", translated, again, other)
		}
	}
}

// The client of a connection with one upstream connection is asked to open another one.
func TestAnHTTP2ConnectionToARetiredAddressIsDrained(t *testing.T) {
	origin := serveHTTP2(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, r.RemoteAddr) })
	r := newRig(t, origin, true, counted)
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
	r.retire(t, origin, "no connection", func() bool { return r.pool.Stats.Active.Load() == 0 })
	if again := get(); again == first || again == "" {
		t.Errorf("served at %q, before that at %q: want another connection", again, first)
	}
}
