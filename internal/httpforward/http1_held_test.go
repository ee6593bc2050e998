package httpforward

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/budget"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/nettest"
)

// small makes the budget so small that four large heads use it up.
func small(c *Config) {
	c.Budget = budget.New(1 << 20)
	c.MaxHeadBytes = 256 << 10
}

// largeHead is the unfinished head of a request. It takes a buffer of 256 KiB.
var largeHead = "GET /large HTTP/1.1\r\nHost: a\r\nX: " + strings.Repeat("x", 200<<10)

// wantOverloaded checks that a request is answered 503, and that its connection ends.
func (r *rig) wantOverloaded(t *testing.T, conn net.Conn) {
	t.Helper()
	response, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatalf("no response: %v", err)
	}
	body, err := io.ReadAll(response.Body)
	if response.StatusCode != 503 || string(body) != replyOverloaded.body || !response.Close || err != nil {
		t.Fatalf("answered %v with %q and %v", response, body, err)
	}
}

// wantEvictions waits for n records of evictions, and checks them.
func (r *rig) wantEvictions(t *testing.T, n int) {
	t.Helper()
	nettest.Eventually(t, "the evictions are recorded", func() bool { return r.records.of(flow.MemoryBudget) >= n })
	if got := r.records.of(flow.MemoryBudget); got != n || r.engine.config.Budget.Evictions() != uint64(n) {
		t.Errorf("%d records of %d evictions, want %d", got, r.engine.config.Budget.Evictions(), n)
	}
}

// of counts the records with a reason. Those of evictions must name it in Envoy's words too.
func (r *records) of(reason flow.Reason) (n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, record := range r.closed {
		if record.reason == reason {
			n++
			if reason == flow.MemoryBudget && (record.flags != "OM" || record.details != "overload") {
				return -1
			}
		}
	}
	return n
}

func TestUnfinishedHeadsShareABudget(t *testing.T) {
	r := newRig(t, serveHTTP2(t, func(http.ResponseWriter, *http.Request) {}), false, plain, small)
	used := r.engine.config.Budget.Used
	other := r.dialFrom(t, "127.0.0.2")
	send(t, other, "GET /other HTTP/1.1\r\nHost: a\r\nX: "+strings.Repeat("x", 40<<10))
	nettest.Eventually(t, "the other's head is accounted for", func() bool { return used() == 64<<10 })
	var conns []net.Conn
	for i := range 10 {
		conn := r.dial(t)
		send(t, conn, largeHead)
		conns = append(conns, conn)
		if i < 3 {
			nettest.Eventually(t, "the head is accounted for", func() bool { return used() == 64<<10+(i+1)*256<<10 })
		} else { // there is room for three beside the other one
			r.wantOverloaded(t, conns[i-3])
			nettest.Eventually(t, "its memory is given back", func() bool { return used() == 64<<10+3*256<<10 })
		}
		client := r.dialFrom(t, "127.0.0.3")
		send(t, client, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
		expect(t, client, "HTTP/1.1 200 OK\r\n")
	}
	for _, conn := range append(conns[7:], other) {
		send(t, conn, "\r\n\r\n")
		expect(t, conn, "HTTP/1.1 200 OK\r\n")
	}
	r.wantEvictions(t, 7)
	nettest.Eventually(t, "everything is given back", func() bool { return used() == 0 })
}

// A head that is small so far takes neither a buffer nor a place in the budget.
func TestSlowSmallHeadsHoldLittle(t *testing.T) {
	w := newWitness(t)
	r := newRig(t, w.address, false, plain, small)
	var conns []net.Conn
	for range 200 { // 3 MiB in buffers of the ordinary size
		conn := r.dial(t)
		send(t, conn, "GET / HTTP/1.1\r\nHost: a\r\nX: "+strings.Repeat("x", 500))
		conns = append(conns, conn)
	}
	for _, conn := range conns {
		send(t, conn, "y")
	}
	for _, conn := range conns {
		send(t, conn, "\r\n\r\n")
		expect(t, conn, "HTTP/1.1 200 OK\r\n")
	}
	r.wantEvictions(t, 0)
	if got := strings.Count(w.text(), "\r\nX: "+strings.Repeat("x", 500)+"y\r\n"); got != 200 {
		t.Errorf("%d of 200 heads arrived whole", got)
	}
}

// Many short fields take more memory than bytes.
func TestFieldsOfUnfinishedHeadsAreAccountedFor(t *testing.T) {
	r := newRig(t, newWitness(t).address, false, plain, small, func(c *Config) { c.MaxHeadFields = 5000 })
	conn := r.dial(t)
	send(t, conn, "GET / HTTP/1.1\r\nHost: a\r\n"+strings.Repeat("a:\r\n", 4000))
	nettest.Eventually(t, "the fields are accounted for", func() bool { return r.engine.config.Budget.Used() > 16<<10+4000*fieldSize })
}

// The head is kept while upstream is silent, because the request may have to be sent again.
func TestHeadsKeptForARepeatShareTheBudget(t *testing.T) {
	o := newOrigin(t)
	r := newRig(t, o.address, false, plain, small)
	var conns, ups []net.Conn
	for i := range 6 {
		conn := r.dial(t)
		send(t, conn, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
		up := o.accept()
		head(t, bufio.NewReader(up))
		send(t, up, ok("hello"))
		expect(t, conn, ok("hello"))
		send(t, conn, largeHead+"\r\n\r\n")
		if _, err := io.ReadFull(up, make([]byte, len(largeHead)+4)); err != nil {
			t.Fatal(err)
		}
		conns, ups = append(conns, conn), append(ups, up)
		if i < 4 {
			nettest.Eventually(t, "the head is accounted for", func() bool { return r.engine.config.Budget.Used() >= (i+1)*len(largeHead) })
			continue
		}
		r.wantOverloaded(t, conns[i-4])
		readsReset(t, ups[i-4], "upstream")
	}
	for i := 2; i < 6; i++ {
		send(t, ups[i], ok("late"))
		expect(t, conns[i], ok("late"))
	}
	r.wantEvictions(t, 2)
}

func TestUnfinishedResponseHeadsShareTheBudget(t *testing.T) {
	o := newOrigin(t)
	r := newRig(t, o.address, false, plain, small)
	var conns, ups []net.Conn
	for i := range 6 {
		conn := r.dial(t)
		send(t, conn, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
		up := o.accept()
		head(t, bufio.NewReader(up))
		send(t, up, "HTTP/1.1 200 OK\r\nX: "+strings.Repeat("x", 200<<10))
		conns, ups = append(conns, conn), append(ups, up)
		if i < 4 {
			nettest.Eventually(t, "the head is accounted for", func() bool { return r.engine.config.Budget.Used() == (i+1)*256<<10 })
			continue
		}
		r.wantOverloaded(t, conns[i-4])
		readsReset(t, ups[i-4], "upstream")
	}
	for i := 2; i < 6; i++ {
		send(t, ups[i], "\r\nContent-Length: 0\r\n\r\n")
		expect(t, conns[i], "HTTP/1.1 200 OK\r\nX: xxx")
	}
	r.wantEvictions(t, 2)
}

// A dial may take as long as its timeout, but an eviction ends it at once.
func TestAnEvictionEndsADial(t *testing.T) {
	o := newCrampedOrigin(t)
	filler, err := net.Dial("tcp", o.address.String())
	if err != nil {
		t.Fatal(err)
	}
	defer filler.Close()
	r := newRig(t, o.address, false, plain, small)
	first := r.dial(t)
	send(t, first, largeHead+"\r\n\r\n")
	for i := range 5 {
		nettest.Eventually(t, "the head is accounted for", func() bool { return r.engine.config.Budget.Used() > i*200<<10 })
		send(t, r.dial(t), largeHead+"\r\n\r\n")
	}
	r.wantOverloaded(t, first)
	r.cancel()
}

// pathSeen is a Router that remembers a request, and has no route for it.
type pathSeen struct{ path, authority string }

func (p *pathSeen) Route(r *Request) Decision {
	p.path, p.authority = string(r.Path), string(r.Authority)
	return Decision{}
}

// The router decides by what is forwarded.
func TestTheRouterSeesWholeValues(t *testing.T) {
	path := "/" + strings.Repeat("p", 3*flow.MaxValue)
	for _, two := range []bool{false, true} {
		r := newRig(t, serveHTTP2(t, func(http.ResponseWriter, *http.Request) {}), two)
		var seen pathSeen
		r.set(func() { r.router = &seen })
		client := http2Client(t)
		protocols := client.Transport.(*http.Transport).Protocols
		protocols.SetUnencryptedHTTP2(two)
		protocols.SetHTTP1(!two)
		response, err := client.Get("http://" + r.address + path)
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		r.records.await(t, 0) // so that the router has returned
		if response.StatusCode != 404 || seen.path != path || seen.authority != r.address {
			t.Errorf("HTTP/2 %v: answered %d; the router saw a path of %d bytes and the authority %q, want %d and %q",
				two, response.StatusCode, len(seen.path), seen.authority, len(path), r.address)
		}
	}
}
