package httpforward

import (
	"bufio"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/route"
	"github.com/pillion-proxy/pillion/internal/tcp"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// newFullHub is a hub whose calls wait for connections of HTTP/1, with its client: it may make as many connections to o as are left.
// decide changes the decisions about calls to o; it may be nil.
func newFullHub(t *testing.T, left int, decide func(*Request, *Decision)) (o *origin, r *rig, client *speaker) {
	t.Helper()
	idle := 256 - left // a hub has one for each of its streams at most
	var waiting atomic.Int32
	all := make(chan struct{})
	other := serveHTTP2(t, func(http.ResponseWriter, *http.Request) {
		if waiting.Add(1) == int32(idle) {
			close(all)
		}
		<-all
	})
	o = newOrigin(t)
	r = newHub(t, o.address, &planned{decide: func(q *Request, d *Decision) {
		if d.Translate = true; string(q.Path) == "/other" {
			d.Target.Address = other
		} else if decide != nil {
			decide(q, d)
		}
	}}, plain)
	client = greetHub(t, r, "")
	for i := range idle {
		client.sends(fmt.Sprintf("HEADERS %d end :method=GET :scheme=http :path=/other :authority=a", 2*i+1))
	}
	for range idle {
		if got := client.next(); !strings.Contains(got, " end :status=200") {
			t.Fatalf("read %q", got)
		}
	}
	return o, r, client
}

// Bytes behind a response are not the response to the request that waits for the connection: a server that sends a body in
// response to HEAD would let whoever chooses that body answer the requests of others.
func TestBytesBehindAResponseAnswerNoOtherRequest(t *testing.T) {
	o, _, client := newFullHub(t, 1, nil)
	client.sends("HEADERS 1001 end :method=HEAD :scheme=http :path=/first :authority=a")
	server := o.accept()
	head(t, bufio.NewReader(server))
	client.sends("HEADERS 1003 end :method=GET :scheme=http :path=/second :authority=a")
	client.sends("PING 12345678")
	client.reads("PING ack 12345678") // the second request waits for the connection of the first
	send(t, server, "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nHTTP/1.1 200 OK\r\nForged: 1\r\nContent-Length: 0\r\n\r\n")
	client.reads("HEADERS 1001 end :status=200 content-length=3")
	server = o.accept()
	if got := head(t, bufio.NewReader(server)); !strings.HasPrefix(got, "GET /second ") {
		t.Fatalf("the server read %q", got)
	}
	send(t, server, ok(""))
	client.reads("HEADERS 1003 end :status=200 content-length=0")
}

// A call that waits for a connection is not sent on it if the server has closed it, or has sent bytes behind the response, by the
// time when the call before ends, although they are not read yet: it is sent on another.
func TestUnreadBytesAnswerNoOtherRequest(t *testing.T) {
	for name, happens := range map[string]func(t *testing.T, server *net.TCPConn){
		"bytes": func(t *testing.T, server *net.TCPConn) { send(t, server, "HTTP/1.1 200 OK\r\nForged: 1\r\n\r\n") },
		"an end": func(t *testing.T, server *net.TCPConn) {
			if err := server.CloseWrite(); err != nil {
				t.Error(err)
			}
		},
	} {
		for _, method := range []string{"GET", "POST"} {
			for _, long := range []int{0, 20} { // other responses, which leave downstream no room: nothing more is read then
				t.Run(fmt.Sprintf("%s behind %s and %d others", method, name, long), func(t *testing.T) {
					testUnread(t, method, happens, long)
				})
			}
		}
	}
}

func testUnread(t *testing.T, method string, happens func(*testing.T, *net.TCPConn), long int) {
	var first atomic.Pointer[tcp.Conn]
	security := &upstream.Security{Handshake: func(_ *tcp.Waiter, c *tcp.Conn, _ time.Time) error {
		first.CompareAndSwap(nil, c)
		return nil
	}}
	held, release := make(chan struct{}), make(chan struct{})
	o, r, client := newFullHub(t, 1+long, func(q *Request, d *Decision) {
		switch string(q.Path) {
		case "/long":
		case "/holds":
			close(held)
			<-release
			*d = Decision{Check: new(question)}
		default:
			d.Target.Security = security
		}
	})
	client.sends("SETTINGS 4=65536")
	client.sends("WINDOW 0 10000000")
	client.reads("SETTINGS ack")
	var others []*net.TCPConn
	for i := range long {
		client.sends(fmt.Sprintf("HEADERS %d end :method=GET :scheme=http :path=/long :authority=a", 801+2*i))
		others = append(others, o.accept())
	}
	client.sends("HEADERS 1001 :method=POST :scheme=http :path=/first :authority=a")
	server := o.accept()
	head(t, bufio.NewReader(server))
	client.sends("HEADERS 1003 end :method=" + method + " :scheme=http :path=/second :authority=a")
	client.sends("PING 12345678")
	client.reads("PING ack 12345678") // the second request waits for the connection of the first
	send(t, server, ok(""))
	client.reads("HEADERS 1001 end :status=200 content-length=0")
	client.sends("HEADERS 1005 end :method=GET :scheme=http :path=/holds :authority=a")
	<-held // from here on the hub reads nothing
	client.sends("DATA 1001 end")
	client.sends("HEADERS 1007 end :method=" + method + " :scheme=http :path=/third :authority=a")
	for _, other := range others {
		send(t, other, ok(strings.Repeat("x", 20_000)))
	}
	happens(t, server)
	nettest.Eventually(t, "the arrival", func() bool { return !first.Load().Quiet() })
	close(release)
	server = o.accept()
	lines := bufio.NewReader(server)
	for _, c := range []struct{ path, stream string }{{"/second", "1003"}, {"/third", "1007"}} {
		if got := head(t, lines); !strings.HasPrefix(got, method+" "+c.path+" ") {
			t.Fatalf("the server read %q", got)
		}
		send(t, server, "HTTP/1.1 200 OK\r\nHonest: 1\r\nContent-Length: 0\r\n\r\n")
		got := client.next()
		for strings.HasPrefix(got, "HEADERS 8") || strings.HasPrefix(got, "DATA 8") || got == "RST 1001 NO_ERROR" {
			got = client.next() // of others, and the end of the first request if its connection ends before its body is sent
		}
		if got != "HEADERS "+c.stream+" end :status=200 honest=1 content-length=0" {
			t.Fatalf("read %q", got)
		}
	}
	for i := range 258 {
		if got := r.records.await(t, i); got.reason != flow.Completed || got.status != 200 || got.attempts != 1 {
			t.Errorf("the record is %+v", got)
		}
	}
}

// A call that moves from a retired connection to an idle one is sent at once, although nothing else happens. One connection of a
// group is retired after the other, so the idle one may not be yet.
func TestACallThatMovesFromARetiredConnectionIsSent(t *testing.T) {
	var conns tcp.Set
	group := new(tcp.Group)
	conns.Retire(map[*tcp.Group]struct{}{group: {}})
	var first *tcp.Conn
	security := &upstream.Security{Handshake: func(_ *tcp.Waiter, c *tcp.Conn, _ time.Time) error {
		if first == nil {
			first = c
		}
		return nil
	}}
	q := new(question)
	policy := retrying(mesh.Retry5xx, 1)
	policy.BackOff, policy.MaxBackOff = 100*time.Millisecond, 100*time.Millisecond
	o, _, client := newFullHub(t, 3, func(r *Request, d *Decision) {
		d.Target.Security = security
		d.Plan = &route.Plan{Retry: policy}
		if r.Attempt > 0 && r.Check == nil { // at the end of a pause, when no byte moves
			first.Join(&conns, group, nil)
			*d = Decision{Check: q}
		}
	})
	var lines [3]*bufio.Reader
	var servers [3]*net.TCPConn
	for i := range servers {
		client.sends(fmt.Sprintf("HEADERS %d end :method=GET :scheme=http :path=/%d :authority=a", 1001+2*i, i))
		servers[i] = o.accept()
		lines[i] = bufio.NewReader(servers[i])
		head(t, lines[i])
	}
	client.sends("HEADERS 1007 end :method=GET :scheme=http :path=/moves :authority=a")
	client.sends("PING 12345678")
	client.reads("PING ack 12345678") // it waits for the first
	respond := func(i int, stream string) {
		t.Helper()
		send(t, servers[i], ok(""))
		client.reads("HEADERS " + stream + " end :status=200 content-length=0")
	}
	respond(1, "1003")
	send(t, servers[2], "HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n")
	if got := head(t, lines[1]); !strings.HasPrefix(got, "GET /moves ") {
		t.Fatalf("the server read %q", got)
	}
	respond(1, "1007")
	respond(0, "1001")
}

// A request that is cut off by the limit of its stream, after its response, leaves no connection on which the server still waits for
// the rest of it: that would be taken from the next request.
func TestACutRequestIsNotContinuedByTheNext(t *testing.T) {
	for _, translate := range []bool{true, false} {
		nettest.UnderLimit(t, 50*time.Millisecond, func(t testing.TB, limit time.Duration) { // in which the response reaches the client
			limited := &route.Plan{MaxStream: &limit}
			o := newOrigin(t)
			r := newHub(t, o.address, &planned{decide: func(q *Request, d *Decision) {
				if d.Translate = translate; string(q.Method) == "POST" {
					d.Plan = limited
				}
			}}, plain)
			client := greetHub(t, r, "")
			client.sends("HEADERS 1 :method=POST :scheme=http :path=/ :authority=a content-length=100")
			if !translate {
				server := acceptHub(t, o, "")
				server.reads("HEADERS 1 :method=POST :scheme=http :path=/ :authority=a content-length=100")
				server.reads("SETTINGS ack")
				server.sends("HEADERS 1 end :status=200")
				client.reads("HEADERS 1 end :status=200")
				client.reads("RST 1 NO_ERROR")
				server.reads("RST 1 CANCEL")
				return
			}
			server := o.accept()
			head(t, bufio.NewReader(server))
			send(t, server, ok(""))
			client.reads("HEADERS 1 end :status=200 content-length=0")
			client.reads("RST 1 NO_ERROR")
			client.sends("GET 3")
			next := o.accept()
			head(t, bufio.NewReader(next))
			send(t, next, ok(""))
			client.reads("HEADERS 3 end :status=200 content-length=0")
		})
	}
}
