package gateway

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pires/go-proxyproto"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/serve/servetest"
)

// listenBehind sets a listener whose connections begin with a header of the PROXY protocol.
func (r *rig) listenBehind(chain *mesh.FilterChain, filter mesh.ListenerFilter, limit time.Duration) {
	filter.Kind = mesh.ProxyProtocol
	r.push(func(e *mesh.Edit) {
		e.SetListener(name, &mesh.Listener{
			Name: name, Direction: mesh.Outbound, Addresses: []netip.AddrPort{netip.MustParseAddrPort("0.0.0.0:8080")},
			Default: chain, Filters: []mesh.ListenerFilter{filter}, FiltersTimeout: limit,
		})
	})
}

// proxyHeader returns a header as another implementation writes it.
func proxyHeader(t *testing.T, version byte, source, destination string) string {
	t.Helper()
	address := func(text string) net.Addr { return net.TCPAddrFromAddrPort(netip.MustParseAddrPort(text)) }
	header := proxyproto.HeaderProxyFromAddrs(version, address(source), address(destination))
	text, err := header.Format()
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

const signature = "\r\n\r\n\x00\r\nQUIT\n"

// binaryHeader returns a header of version 2.
func binaryHeader(command, family byte, content string) string {
	return signature + string([]byte{command, family}) + string(binary.BigEndian.AppendUint16(nil, uint16(len(content)))) + content
}

const inet4 = "\xcb\x00\x71\x07\xc6\x33\x64\x02\x12\x34\x1f\x90" // 203.0.113.7:4660 to 198.51.100.2:8080

// The client's address is that of the header, for servers, policies and records; without one in it, it is that of the peer. The
// address of the packets stays the direct one.
func TestProxyHeadersNameTheClient(t *testing.T) {
	r := newRig(t)
	r.cluster("web", 82)
	web := host("web", "web")
	web.Routes[0].Edits.Request.Add = []mesh.HeaderEdit{{Name: "x-direct", Value: "%DOWNSTREAM_DIRECT_REMOTE_ADDRESS%"}}
	r.route(web)
	r.handle(t, 82, func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, r.Header.Get("X-Envoy-External-Address"), " ", r.Header.Get("X-Forwarded-For"), " ", r.Header.Get("X-Direct"))
	})
	r.listenBehind(edge(0), mesh.ListenerFilter{}, 0)
	for header, client := range map[string]string{
		proxyHeader(t, 1, "203.0.113.7:4660", "198.51.100.2:8080"): "203.0.113.7:4660",
		proxyHeader(t, 2, "203.0.113.7:4660", "198.51.100.2:8080"): "203.0.113.7:4660",
		proxyHeader(t, 1, "[2001:db8::7]:1", "[2001:db8::1]:8080"): "[2001:db8::7]:1",
		proxyHeader(t, 2, "[2001:db8::7]:1", "[2001:db8::1]:8080"): "[2001:db8::7]:1",
		"PROXY TCP6 ::ffff:203.0.113.7 ::1 0 65535\r\n":            "203.0.113.7:0",
		"PROXY UNKNOWN\r\n": "",
		"PROXY UNKNOWN ffff::ffff ffff::ffff 65535 65535\r\n":                "",
		binaryHeader(0x21, 0x11, inet4+"\x04\x00\x03abc"):                    "203.0.113.7:4660", // with a TLV
		binaryHeader(0x21, 0x11, inet4+strings.Repeat("a", 1008-len(inet4))): "203.0.113.7:4660", // 1 KiB
		binaryHeader(0x20, 0x11, inet4):                                      "",                 // LOCAL
		binaryHeader(0x20, 0, ""):                                            "",
		binaryHeader(0x21, 0, "whatever"):                                    "", // UNSPEC
	} {
		for _, step := range []int{1, 7, 1 << 20} {
			conn := r.client(t)
			for rest := header; rest != ""; rest = rest[min(step, len(rest)):] {
				part := rest[:min(step, len(rest))]
				if len(rest) <= step {
					part += "GET / HTTP/1.1\r\nHost: web\r\n" // what follows in the same segment
				}
				servetest.Send(t, conn, part)
			}
			servetest.Send(t, conn, "\r\n")
			response, err := http.ReadResponse(conn.read, nil)
			if err != nil {
				t.Fatalf("%q: %v", header, err)
			}
			body, _ := io.ReadAll(response.Body)
			direct := conn.LocalAddr().(*net.TCPAddr).AddrPort()
			want := direct
			if client != "" {
				want = netip.MustParseAddrPort(client)
			}
			if got := string(body); got != fmt.Sprintf("%v %v %v", want.Addr(), want.Addr(), direct) {
				t.Errorf("%q: the server sees %q, want %v", header, got, want)
			}
			if got := r.Await(t); got.Downstream != want {
				t.Errorf("%q: the record has the client %v, want %v", header, got.Downstream, want)
			}
			conn.Close()
		}
	}
}

// Policies of the client's address apply to that of the header, and those of the direct one to that of the packets.
func TestPoliciesSeeTheAddressesOfProxyHeaders(t *testing.T) {
	r := newRig(t)
	r.cluster("web", 82)
	r.route(host("web", "web"))
	r.serve(t, 82)
	direct := func(prefix string) mesh.Condition {
		return mesh.Condition{Kind: mesh.ConditionPeer, Addresses: netip.MustParsePrefix(prefix)}
	}
	for name, c := range map[string]struct {
		denied mesh.Condition
		status int
	}{
		"the client":                     {clients("203.0.113.0/24"), 403},
		"another client":                 {clients("192.0.2.0/24"), 200},
		"the load balancer as a client":  {clients("198.51.100.0/24"), 200},
		"the load balancer as a peer":    {direct("198.51.100.0/24"), 403},
		"the client's address as a peer": {direct("203.0.113.0/24"), 200},
	} {
		r.listenBehind(edge(0, deny(anything, c.denied)), mesh.ListenerFilter{}, 0)
		conn := r.client(t)
		servetest.Send(t, conn, proxyHeader(t, 2, "203.0.113.7:4660", "198.51.100.2:8080"))
		if status, _ := conn.ask(t, "/", ""); status != c.status {
			t.Errorf("%s is denied: status %d, want %d", name, status, c.status)
		}
		r.Await(t)
		conn.Close()
	}
}

// A connection without a whole, valid header is reset, and its server sees no connection.
func TestConnectionsWithoutAProxyHeaderAreReset(t *testing.T) {
	r := newRig(t)
	conns := r.Listen(t, "9001")
	r.cluster("tcp", 9001)
	chain := &mesh.FilterChain{TCP: &mesh.TCPProxy{Clusters: []mesh.TCPCluster{{Name: "tcp", Weight: 1}}}}
	r.listenBehind(chain, mesh.ListenerFilter{}, 0)
	for _, begin := range []string{
		"GET / HTTP/1.1\r\nHost: web\r\n\r\n",
		"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00",
		"proxy TCP4 203.0.113.7 198.51.100.2 1 2\r\n",
		"PROXY\r\n",
		"PROXY \r\n",
		"PROXY TCP4\r\n",
		"PROXY TCP4 203.0.113.7 198.51.100.2 1 2\n",
		"PROXY TCP4 203.0.113.7 198.51.100.2 1 2 3\r\n",
		"PROXY TCP4  203.0.113.7 198.51.100.2 1 2\r\n",
		"PROXY TCP4 203.0.113.7 198.51.100.2 1 65536\r\n",
		"PROXY TCP4 203.0.113.7 198.51.100.2 -1 2\r\n",
		"PROXY TCP4 203.0.113.7 198.51.100.2 +1 2\r\n",
		"PROXY TCP4 203.0.113.007 198.51.100.2 1 2\r\n",
		"PROXY TCP4 2001:db8::7 2001:db8::1 1 2\r\n",
		"PROXY TCP6 203.0.113.7 198.51.100.2 1 2\r\n",
		"PROXY TCP6 fe80::7%eth0 fe80::1 1 2\r\n",
		"PROXY TCP4 shop.example 198.51.100.2 1 2\r\n",
		"PROXY UDP4 203.0.113.7 198.51.100.2 1 2\r\n",
		"PROXY TCP4 203.0.113.7 198.51.100.2 1 2" + strings.Repeat(" ", 70),
		"PROXY UNKNOWN " + strings.Repeat("a", 92) + "\r\n",
		binaryHeader(0x31, 0x11, inet4),
		binaryHeader(0x11, 0x11, inet4),
		binaryHeader(0x22, 0x11, inet4),
		binaryHeader(0x21, 0x12, inet4), // UDP
		binaryHeader(0x21, 0x31, strings.Repeat("a", 216)),
		binaryHeader(0x21, 0x11, inet4[1:]),
		binaryHeader(0x21, 0x21, inet4),
		signature + "\x21\x11\xff\xff",
		signature + "\x21\x11\x04\x00",
		signature[:11] + "X",
	} {
		conn := r.Dial(t, r.At(port))
		servetest.Send(t, conn, begin)
		servetest.ExpectEnd(t, conn, syscall.ECONNRESET)
		if got := r.Await(t); got.Reason != flow.BadProxyHeader || got.Err == nil {
			t.Errorf("%q: the reason is %v, %v", begin, got.Reason, got.Err)
		}
	}
	for _, begin := range []string{"PROXY TCP4 203", signature + "\x21\x11\x00"} {
		conn := r.Dial(t, r.At(port))
		servetest.Send(t, conn, begin)
		conn.CloseWrite()
		servetest.ExpectEnd(t, conn, syscall.ECONNRESET)
		if got := r.Await(t); got.Reason != flow.BadProxyHeader {
			t.Errorf("%q and the end: the reason is %v, %v", begin, got.Reason, got.Err)
		}
	}
	probe := r.Dial(t, r.At(port)) // by a load balancer
	probe.CloseWrite()
	servetest.ExpectEnd(t, probe, io.EOF)
	if got := r.Await(t); got.Reason != flow.Closed {
		t.Errorf("a probe ends with %v, %v", got.Reason, got.Err)
	}
	r.listenBehind(chain, mesh.ListenerFilter{}, 50*time.Millisecond)
	for _, begin := range []string{"", "PROXY ", signature} {
		conn := r.Dial(t, r.At(port))
		if _, err := io.WriteString(conn, begin); err == nil { // the time may be over before
			servetest.ExpectEnd(t, conn, syscall.ECONNRESET)
		}
		if got := r.Await(t); got.Reason != flow.BadProxyHeader || got.Err == nil || !strings.Contains(got.Err.Error(), "in time") {
			t.Errorf("%q and silence: %v, %v", begin, got.Reason, got.Err)
		}
	}
	select {
	case <-conns:
		t.Error("the server has got a connection")
	default:
	}
}

// Bytes behind a header are carried, whichever side sends first, and a header may be optional.
func TestBytesFollowAProxyHeader(t *testing.T) {
	r := newRig(t)
	conns := r.Listen(t, "9001")
	r.cluster("tcp", 9001)
	r.listenBehind(&mesh.FilterChain{TCP: &mesh.TCPProxy{Clusters: []mesh.TCPCluster{{Name: "tcp", Weight: 1}}}}, mesh.ListenerFilter{AllowWithout: true}, 0)
	for begin, rest := range map[string]string{
		"PROXY TCP4 203.0.113.7 198.51.100.2 1 2\r\nhello": "hello",
		binaryHeader(0x21, 0x11, inet4):                    "",
		"PROXIED":                                          "PROXIED",
		"\r\n\r\n\x00\r\nQUIET":                            "\r\n\r\n\x00\r\nQUIET",
		"hello":                                            "hello",
	} {
		client := r.Dial(t, r.At(port))
		servetest.Send(t, client, begin)
		server := servetest.Take(t, conns)
		servetest.Send(t, server, "220 ready\r\n")
		servetest.Expect(t, client, "220 ready\r\n")
		servetest.Send(t, client, " more")
		servetest.Expect(t, server, rest+" more")
		client.Close()
		server.Close()
		want := client.LocalAddr().(*net.TCPAddr).AddrPort()
		switch {
		case strings.HasPrefix(begin, "PROXY "):
			want = netip.MustParseAddrPort("203.0.113.7:1")
		case strings.HasPrefix(begin, signature):
			want = netip.MustParseAddrPort("203.0.113.7:4660")
		}
		if got := r.Await(t); got.Downstream != want {
			t.Errorf("%q: the record has the client %v, want %v", begin, got.Downstream, want)
		}
	}
}

// A connection that has not sent its header ends when its listener is removed.
func TestAConnectionWithoutItsProxyHeaderEndsWithItsListener(t *testing.T) {
	r := newRig(t)
	r.listenBehind(manager(), mesh.ListenerFilter{}, 0)
	conn := r.Dial(t, r.At(port))
	servetest.Send(t, conn, "PROXY ")
	r.push(func(e *mesh.Edit) { e.SetListener(name, nil) })
	r.Await(t)
}
