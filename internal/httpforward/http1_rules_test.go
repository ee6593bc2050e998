package httpforward

import (
	"bufio"
	"fmt"
	"io"
	"math"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

// Malformed messages, and those that concern the connection only, end at the engine.
var ruleConversations = []conversation{
	{"a trailer Connection does not reach a connection that others use", `
		> POST / HTTP/1.1$Host: a$Transfer-Encoding: chunked$$2$ok$
		>> POST / HTTP/1.1$Host: a$Transfer-Encoding: chunked$$2$ok$
		> 0$Connection: close$$
		>> 0$
		<< HTTP/1.1 400 Bad Request$
		upstream is reset
		nothing is left in the pool`,
		[]recorded{{reason: flow.BadFraming, status: 400, flags: "DPE", received: 2, sent: 11}}},
	{"a trailer that Connection names is for the agent alone", `
		> POST / HTTP/1.1$Host: a$Connection: X-Hop$Transfer-Encoding: chunked$$
		>> POST / HTTP/1.1$Host: a$Transfer-Encoding: chunked$$
		> 0$x-hop: 1$$
		>> 0$
		<< HTTP/1.1 400 Bad Request$
		upstream is reset`,
		[]recorded{{reason: flow.BadFraming, status: 400, flags: "DPE", sent: 11}}},
	{"what Connection names in one request is free in the next", `
		> POST / HTTP/1.1$Host: a$Connection: X-Hop$Transfer-Encoding: chunked$$0$$
		>> POST / HTTP/1.1$Host: a$Transfer-Encoding: chunked$$0$$
		< HTTP/1.1 200 OK$Connection: X-Hop$Transfer-Encoding: chunked$$0$$
		<< HTTP/1.1 200 OK$Transfer-Encoding: chunked$$0$$
		> POST / HTTP/1.1$Host: a$Transfer-Encoding: chunked$$0$X-Hop: 1$$
		>> POST / HTTP/1.1$Host: a$Transfer-Encoding: chunked$$0$X-Hop: 1$$
		< HTTP/1.1 200 OK$Transfer-Encoding: chunked$$0$X-Hop: 1$$
		<< HTTP/1.1 200 OK$Transfer-Encoding: chunked$$0$X-Hop: 1$$`,
		[]recorded{done(200, 0, 0), done(200, 0, 0)}},
	{"a trailer Connection of a response ends both connections", `
		> GET / HTTP/1.1$Host: a$$
		>> GET / HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Transfer-Encoding: chunked$$2$ok$
		<< HTTP/1.1 200 OK$Transfer-Encoding: chunked$$2$ok$
		< 0$Connection: close$$
		<< 0$
		client is reset
		nothing is left in the pool`,
		[]recorded{{reason: flow.BadResponse, status: 200, flags: "UPE", sent: 2}}},
	{"a bare LF hides no field of a request", `
		> POST / HTTP/1.1$Host: a$X: y\nTransfer-Encoding: chunked$$0$$GET /admin HTTP/1.1$Host: a$$
		<< HTTP/1.1 400 Bad Request$`,
		[]recorded{{reason: flow.BadFraming, status: 400, flags: "DPE", sent: 11}}},
	{"a bare LF hides no field of a response", `
		> GET / HTTP/1.1$Host: a$$
		>> GET / HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$X: y\nTransfer-Encoding: chunked$$0$$
		<< HTTP/1.1 502 Bad Gateway$
		upstream is reset`,
		[]recorded{{reason: flow.BadResponse, status: 502, flags: "UPE", sent: 87}}},
	{"equal lengths in a list are one", `
		> PUT / HTTP/1.1$Host: a$Content-Length: 2, 2$$ab
		>> PUT / HTTP/1.1$Host: a$Content-Length: 2$$ab
		< HTTP/1.1 200 OK$Content-Length: 3,3$$abc
		<< HTTP/1.1 200 OK$Content-Length: 3$$abc
		> GET / HTTP/1.1$Host: a$$
		>> GET / HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Content-Length: 3$Content-Length: 3$$abc
		<< HTTP/1.1 200 OK$Content-Length: 3$$abc`,
		[]recorded{done(200, 2, 3), done(200, 0, 3)}},
}

func TestRuleConversations(t *testing.T) {
	for _, c := range ruleConversations {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			c.play(t)
		})
	}
}

// NTLM authenticates the connection, however the field is spelled. Such a connection never serves another client.
func TestAConnectionThatIsAuthenticatedIsNotShared(t *testing.T) {
	for _, c := range []struct {
		field string
		bound bool
	}{
		{"Authorization: NTLM TlRMTVNTUAAB", true},
		{"Authorization: ntlm\tTlRMTVNTUAAB", true},
		{"Authorization:NTLM", true},
		{"Authorization: \t Negotiate  YII=", true},
		{"Authorization: Negotiate\vYII=", true},
		{"Authorization: NTLM\x01TlRMTVNTUAAB", true},
		{"Proxy-Authorization: nEgOtIaTe,YII=", true},
		{"Authorization: Basic YTpi, NTLM TlRM", true},
		{"Authorization: Basic YTpi\r\nAuthorization: NTLM TlRM", true},
		{"WWW-Authenticate: NTLM", true},
		{"WWW-Authenticate: Basic realm=\"a\",NTLM", true},
		{"WWW-Authenticate: Basic realm=\"a\"\r\nWWW-Authenticate: Negotiate\tYII=", true},
		{"Proxy-Authenticate: Basic realm=\"a\" , Negotiate", true},
		{"Authorization: Basic YTpi", false},
		{"Authorization: Bearer NTLMNegotiate", false},
		{"WWW-Authenticate: Bearer realm=\"negotiated\"", false},
		{"Authorization:", false},
	} {
		t.Run(c.field, func(t *testing.T) {
			t.Parallel()
			request, response := c.field+"\r\n", ""
			pool := "the pool has a connection"
			if strings.HasPrefix(c.field, "WWW") || strings.HasPrefix(c.field, "Proxy-Authenticate") {
				request, response = "", request
			}
			if c.bound {
				pool = "nothing is left in the pool"
			}
			escape := strings.NewReplacer("\r\n", "$", "\t", `\t`)
			script := "> GET / HTTP/1.1$Host: a$" + escape.Replace(request) + "$\n" +
				">> GET / HTTP/1.1$Host: a$" + escape.Replace(request) + "$\n" +
				"< HTTP/1.1 401 Unauthorized$" + escape.Replace(response) + "Content-Length: 0$$\n" +
				"<< HTTP/1.1 401 Unauthorized$" + escape.Replace(response) + "Content-Length: 0$$\n"
			if c.bound {
				script += "client closes\nupstream reads the end\n"
			} else {
				script += "client closes\n"
			}
			conversation{"", script + pool, []recorded{done(401, 0, 0)}}.play(t)
		})
	}
}

// The log of a malformed message names the request and the rule that is broken; the error, for the debug log, also the
// field.
func TestTheRecordOfAMalformedMessageNamesItsRule(t *testing.T) {
	const before, after = "upstream_reset_before_response_started", "upstream_reset_after_response_started"
	for _, c := range []struct {
		name, request, response string
		method, path            string
		details, err            string
	}{
		{"a request line", "GET  /a HTTP/1.1\r\n\r\n", "", "", "", "http1.codec_error{bad_request_line}", `"GET  /a HTTP/1.1"`},
		{"a request line that ends with LF", "GET /a HTTP/1.1\nHost: a\n\n", "", "GET", "/a", "http1.codec_error{bare_lf}", `"GET /a HTTP/1.1"`},
		{"a field name", "GET /a HTTP/1.1\r\nHost: a\r\nX-Token : secret\r\n\r\n", "", "GET", "/a", "http1.codec_error{space_before_colon}", `"X-Token "`},
		{"a host", "GET /a HTTP/1.1\r\nHost: a/b\r\n\r\n", "", "GET", "/a", "http1.codec_error{bad_host}", `"Host"`},
		{"a framing", "POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n", "", "POST", "/a", "http1.codec_error{bad_content_length}", `"Content-Length"`},
		{"a chunk", "POST /a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n", "", "POST", "/a", "http1.codec_error{bad_chunk_size}", "chunk size"},
		{"too many fields", "GET /a HTTP/1.1\r\nHost: a\r\n" + strings.Repeat("a: b\r\n", 200) + "\r\n", "", "GET", "/a", "http1.too_many_headers", "more fields"},
		{"a status line", "GET /a HTTP/1.1\r\nHost: a\r\n\r\n", "ICY 200 OK\r\n\r\n", "GET", "/a", before + "{protocol_error|bad_status_line}", `"ICY 200 OK"`},
		{"a length", "GET /a HTTP/1.1\r\nHost: a\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "GET", "/a",
			before + "{protocol_error|bad_content_length}", `"Content-Length"`},
		{"an unasked switch", "GET /a HTTP/1.1\r\nHost: a\r\n\r\n", "HTTP/1.1 101 Switching Protocols\r\n\r\n", "GET", "/a",
			before + "{protocol_error|switched_unasked}", "unasked"},
		{"a chunk of a response", "GET /a HTTP/1.1\r\nHost: a\r\n\r\n", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n|x\r\n", "GET", "/a",
			after + "{protocol_error|bad_chunk_size}", "chunk size"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			o := newOrigin(t)
			r := newRig(t, o.address, false, plain)
			client := r.dial(t)
			send(t, client, c.request)
			if c.response != "" {
				upstream := o.accept()
				head(t, bufio.NewReader(upstream))
				begun, rest, _ := strings.Cut(c.response, "|")
				send(t, upstream, begun)
				if rest != "" {
					head(t, bufio.NewReader(client))
					send(t, upstream, rest)
				}
			}
			got := r.records.await(t, 0)
			if got.method != c.method || got.path != c.path || got.details != c.details {
				t.Errorf("%q %q, %q; want %q %q, %q", got.method, got.path, got.details, c.method, c.path, c.details)
			}
			if got.err == nil || !strings.Contains(got.err.Error(), c.err) || strings.Contains(got.err.Error(), "secret") {
				t.Errorf("the error is %v, want one with %s and without values", got.err, c.err)
			}
		})
	}
}

// A server that sends interim responses faster than they are forwarded gives the engine no rest. It does not keep the
// request timeout from being looked at.
func TestInterimResponsesDoNotProlongARequest(t *testing.T) {
	nettest.UnderLimit(t, 20*time.Millisecond, func(t testing.TB, limit time.Duration) { // in which the request reaches upstream
		o := newOrigin(t)
		r := newRig(t, o.address, false, plain, func(c *Config) { c.RequestTimeout, c.maxInterim = limit, math.MaxInt })
		client := r.dial(t)
		send(t, client, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
		go io.Copy(io.Discard, client)
		upstream := o.accept()
		head(t, bufio.NewReader(upstream))
		flood, most := strings.Repeat("HTTP/1.1 102 Processing\r\n\r\n", 10_000), int(limit.Milliseconds())*6<<20
		var err error
		for sent := 0; sent < most && err == nil; sent += len(flood) {
			_, err = io.WriteString(upstream, flood)
		}
		if err == nil {
			t.Fatal("all of the flood was forwarded")
		}
		if got := r.records.await(t, 0); got.reason != flow.RequestTimeout {
			t.Errorf("the record is %s, %d: %v", got.reason, got.status, got.err)
		}
	})
}

func TestInterimResponsesAreLimited(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		n      int
		status int
		reason flow.Reason
	}{{maxInterim, 200, flow.Completed}, {maxInterim + 1, 502, flow.BadResponse}} {
		o := newOrigin(t)
		r := newRig(t, o.address, false, plain)
		client := r.dial(t)
		send(t, client, "GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
		go io.Copy(io.Discard, client)
		upstream := o.accept()
		head(t, bufio.NewReader(upstream))
		io.WriteString(upstream, strings.Repeat("HTTP/1.1 102 Processing\r\n\r\n", c.n)+ok(""))
		if got := r.records.await(t, 0); got.reason != c.reason || got.status != c.status {
			t.Errorf("after %d interim responses: %s, %d: %v", c.n, got.reason, got.status, got.err)
		}
	}
}

// The record of a request names it as far as its head is known.
func TestTheRecordOfAnUnfinishedHeadNamesTheRequest(t *testing.T) {
	const begun = "GET /slow HTTP/1.1\r\nHost: a.test\r\nX: "
	for _, c := range []struct {
		name   string
		end    func(*net.TCPConn)
		reason flow.Reason
		status int
	}{
		{"a timeout", func(conn *net.TCPConn) { io.Copy(io.Discard, conn) }, flow.HeadTimeout, 408},
		{"a half-close", func(conn *net.TCPConn) { conn.CloseWrite() }, flow.DownstreamLeft, 0},
		{"a head over the limit", func(conn *net.TCPConn) { conn.Write(make([]byte, 100<<10)) }, flow.HeadTooLarge, 431},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			o := newOrigin(t)
			r := newRig(t, o.address, false, plain, func(config *Config) {
				if config.HeadTimeout = nettest.Patience; c.status == 408 {
					config.HeadTimeout = 50 * time.Millisecond
				}
			})
			client := r.dial(t)
			send(t, client, begun)
			c.end(client)
			got := r.records.await(t, 0)
			if got.reason != c.reason || got.status != c.status || got.method != "GET" || got.path != "/slow" || got.authority != "a.test" {
				t.Errorf("%s, %d: %q %q of %q", got.reason, got.status, got.method, got.path, got.authority)
			}
		})
	}
}

// Origins ignore Host beside an absolute target. So does the record, and with it routes and metrics.
func TestTheRecordHasTheAuthorityThatTheOriginUses(t *testing.T) {
	o := newOrigin(t)
	r := newRig(t, o.address, false, plain)
	client := r.dial(t)
	send(t, client, "GET http://b.test:8080/x HTTP/1.1\r\nHost: a.test\r\n\r\n")
	upstream := o.accept()
	expect(t, upstream, "GET http://b.test:8080/x HTTP/1.1\r\nHost: a.test\r\n\r\n")
	send(t, upstream, ok(""))
	if got := r.records.await(t, 0); got.authority != "b.test:8080" {
		t.Errorf("the record has the authority %q", got.authority)
	}
}

// Interim responses that arrive together are written together. A final response, and one that is incomplete, must wait until
// they are written, and nothing is appended to a part.
func TestInterimResponsesAreWrittenTogether(t *testing.T) {
	const interim = "HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
	for name, c := range map[string]struct {
		in      string
		written int // bytes of the responses that came before
		queued  int // such responses
		want    bool
	}{
		"another interim response":     {interim + interim, 0, 1, true},
		"an incomplete one":            {interim[:len(interim)-1], 0, 1, false},
		"the final response":           {ok(""), 0, 1, false},
		"another protocol":             {"HTTP/1.1 101 Switching Protocols\r\n\r\n", 0, 1, false},
		"after a part":                 {interim, 1, 1, false},
		"enough of them":               {interim, 0, interimBatch/len(interim) + 1, false},
		"no bytes after the last head": {"", 0, 1, false},
	} {
		t.Run(name, func(t *testing.T) {
			x := &exchange{}
			m := &x.response
			m.head = []byte(strings.Repeat(interim, c.queued))
			m.out.Append(m.head[c.written:])
			if c.in != "" {
				m.in = tcp.TakeBuffer()
				defer m.in.Release()
				m.in.Append([]byte(c.in))
			}
			if got := x.interimFollows(); got != c.want {
				t.Errorf("interimFollows = %t", got)
			}
		})
	}
}

// A batch may outgrow the memory of its first response, of which a part is queued.
func TestManyInterimResponsesArriveWhole(t *testing.T) {
	t.Parallel()
	o := newOrigin(t)
	r := newRig(t, o.address, false, plain)
	client := r.dial(t)
	send(t, client, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
	upstream := o.accept()
	head(t, bufio.NewReader(upstream))
	var all strings.Builder
	for i := range 900 {
		fmt.Fprintf(&all, "HTTP/1.1 103 Early Hints\r\nLink: <%d>%s\r\n\r\n", i, strings.Repeat("x", i%300))
	}
	all.WriteString(ok("hello"))
	go io.WriteString(upstream, all.String())
	expect(t, client, all.String())
}
