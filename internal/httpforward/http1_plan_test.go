package httpforward

import (
	"bufio"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/peers"
	"github.com/pillion-proxy/pillion/internal/route"
)

func add(name, value string, action mesh.EditAction) mesh.HeaderEdit {
	return mesh.HeaderEdit{Name: name, Value: value, Action: action}
}

// Lines that no edit concerns keep their bytes and their order.
func TestEditsChangeTheLinesThatTheyConcern(t *testing.T) {
	const answer = "HTTP/1.1 200 OK$Content-Length: 2$$ok"
	for _, test := range []struct {
		name           string
		plan           *route.Plan
		request, sent  string
		answer, gotten string
	}{
		{
			"a request",
			planOf(t, mesh.Forward{}, mesh.Edits{Request: mesh.HeaderEdits{
				Remove: []string{"X-Gone"},
				Add: []mesh.HeaderEdit{
					add("x-over", "new", mesh.OverwriteOrAdd), add("X-More", "2", mesh.AppendOrAdd), add("x-there", "no", mesh.AddIfAbsent),
					add("x-absent", "no", mesh.OverwriteIfPresent), add("x-new", "%REQ(x-more)%-%ROUTE_NAME%", mesh.AddIfAbsent),
					add("x-empty", "", mesh.AppendOrAdd),
				},
			}}),
			"GET /a?b HTTP/1.1$x-GONE: 1$Host: h$X-Over:  old$X-more: 1$X-There: yes$X-Gone: 2$x-over: older$Accept:\t*$$",
			"GET /a?b HTTP/1.1$Host: h$X-more: 1$X-There: yes$Accept:\t*$x-over: new$x-more: 2$x-new: 1-a-route$$",
			answer, answer,
		},
		{
			"a response",
			planOf(t, mesh.Forward{}, mesh.Edits{Response: mesh.HeaderEdits{
				Remove: []string{"X-Powered-By"},
				Add:    []mesh.HeaderEdit{add("x-saw", "%REQ(x-own)%%RESP(x-theirs)%", mesh.AppendOrAdd)},
			}}),
			"GET / HTTP/1.1$Host: h$X-Own: mine$$", "GET / HTTP/1.1$Host: h$X-Own: mine$$",
			"HTTP/1.1 200 Fine$X-Powered-by: x$sEt-cookie: a$X-Theirs: its$Content-Length: 2$$ok",
			"HTTP/1.1 200 Fine$sEt-cookie: a$X-Theirs: its$Content-Length: 2$x-saw: mineits$$ok",
		},
		{
			"the path and the host",
			planOf(t, mesh.Forward{PrefixRewrite: "/v2/", HostRewrite: "new.example", ForwardedHost: true}, mesh.Edits{}),
			"GET /a?b=/c HTTP/1.1$X-A: 1$hOst: old:80$X-B: 2$$",
			"GET /v2/a?b=/c HTTP/1.1$hOst: new.example$X-A: 1$X-B: 2$x-forwarded-host: old:80$x-envoy-original-path: /a?b=/c$$",
			answer, answer,
		},
		{
			"a target in absolute form",
			planOf(t, mesh.Forward{PrefixRewrite: "/v2/"}, mesh.Edits{}),
			"GET http://it.example/a HTTP/1.1$Host: other$$",
			"GET /v2/a HTTP/1.1$Host: it.example$x-envoy-original-path: /a$$",
			answer, answer,
		},
		{
			"a target without a path",
			planOf(t, mesh.Forward{PrefixRewrite: "/v2/", HostRewrite: "new.example"}, mesh.Edits{Request: mesh.HeaderEdits{Remove: []string{"x-a"}}}),
			"OPTIONS * HTTP/1.1$Host: h$X-A: 1$$", "OPTIONS * HTTP/1.1$Host: h$x-envoy-original-path: *$$",
			answer, answer,
		},
		{
			"a target without a path, and its response",
			planOf(t, mesh.Forward{PrefixRewrite: "/v2/", HostRewrite: "new.example"}, mesh.Edits{Response: mesh.HeaderEdits{Remove: []string{"x-a"}}}),
			"OPTIONS * HTTP/1.1$Host: h$$", "OPTIONS * HTTP/1.1$Host: h$x-envoy-original-path: *$$",
			answer, answer,
		},
		{
			"the framing and the connection are not edited",
			planOf(t, mesh.Forward{}, mesh.Edits{
				Request: mesh.HeaderEdits{
					Remove: []string{"Content-Length", "transfer-encoding"},
					Add:    []mesh.HeaderEdit{add("Connection", "close", mesh.AppendOrAdd), add("Content-Length", "7", mesh.OverwriteOrAdd)},
				},
				Response: mesh.HeaderEdits{Remove: []string{"content-length"}, Add: []mesh.HeaderEdit{add("transfer-encoding", "chunked", mesh.AppendOrAdd)}},
			}),
			"POST / HTTP/1.1$Host: h$Content-Length: 3$$abc", "POST / HTTP/1.1$Host: h$Content-Length: 3$$abc",
			answer, answer,
		},
		{
			"attempts and limits",
			&route.Plan{CountAttempts: true, CountInResponses: true, Timeout: time.Minute},
			"GET / HTTP/1.1$Host: h$X-Envoy-Attempt-Count: 7$x-envoy-expected-rq-timeout-ms: 1$X-A: 1$$",
			"GET / HTTP/1.1$Host: h$X-A: 1$x-envoy-expected-rq-timeout-ms: 60000$x-envoy-attempt-count: 1$$",
			answer, "HTTP/1.1 200 OK$Content-Length: 2$x-envoy-attempt-count: 1$$ok",
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, body, _ := strings.Cut(test.request, "$$")
			_, reply, _ := strings.Cut(test.answer, "$$")
			done := recorded{reason: flow.Completed, status: 200, received: uint64(len(body)), sent: uint64(len(reply))}
			script := "> " + test.request + "\n>> " + test.sent + "\n< " + test.answer + "\n<< " + test.gotten + "\n"
			conversation{"", script + script, []recorded{done, done}}.playOn(t, withPlan(test.plan)) // the second on the same connections
		})
	}
}

// The path by which a router has decided is sent, with the rewrites of a plan.
func TestTheDecidedPathIsSent(t *testing.T) {
	rewrite := planOf(t, mesh.Forward{PrefixRewrite: "/v2/"}, mesh.Edits{})
	for _, test := range []struct {
		plan           *route.Plan
		path, original string
	}{{nil, "/b?c", ""}, {rewrite, "/v2/b?c", "/b?c"}} {
		decide := func(r *rig) {
			r.router = &planned{decide: func(_ *Request, d *Decision) { d.Plan, d.Path = test.plan, []byte("/b?c") }}
		}
		line, field := "", ""
		if test.original != "" {
			line, field = "x-envoy-original-path: "+test.original+"$", " x-envoy-original-path="+test.original
		}
		for _, target := range []string{"/a/../b?c", "http://a/a/../b?c"} {
			conversation{"", `
				> GET ` + target + ` HTTP/1.1$Host: a$X-A: 1$$
				>> GET ` + test.path + ` HTTP/1.1$Host: a$X-A: 1$` + line + `$
				< HTTP/1.1 200 OK$Content-Length: 0$$
				<< HTTP/1.1 200 OK$Content-Length: 0$$`,
				[]recorded{answered(200, 0)}}.playOn(t, decide)
		}
		_, client, server := meetPlanned(t, decide)
		client.sends("HEADERS 1 end :method=GET :scheme=http :path=/a/../b?c :authority=a x-a=1")
		server.reads("HEADERS 1 end :method=GET :scheme=http :path=" + test.path + " :authority=a x-a=1" + field)
	}
}

// Edits of a response have the request's path as the router returned it, although the buffer in which the request arrived has other
// bytes by then: those of the request's body. The path of a target in absolute form, which a router returns, lies in that buffer.
func TestAResponseIsEditedByThePathOfItsRequest(t *testing.T) {
	plan := planOf(t, mesh.Forward{}, mesh.Edits{Response: mesh.HeaderEdits{Add: []mesh.HeaderEdit{add("x-asked", "%REQ(:method)% %REQ(:path)% %REQ(x-a)%", mesh.AppendOrAdd)}}})
	retry := *plan
	retry.Retry = retrying(mesh.Retry5xx, 1)
	body := strings.Repeat("#", 200) // longer than the head, which it overwrites
	for _, test := range []struct{ target, normal, sent string }{{"/b?c", "", "/b?c"}, {"http://a/b?c", "", "/b?c"}, {"/a/../b?c", "/b?c", "/b?c"}} {
		request := "PUT " + test.sent + " HTTP/1.1$Host: a$X-A: 1$Content-Length: 200$$"
		exchange := func(attempts string) string {
			return `
				> PUT ` + test.target + ` HTTP/1.1$Host: a$X-A: 1$Content-Length: 200$$
				>> ` + request + `
				> ` + body + `
				>> ` + body + attempts + `
				< HTTP/1.1 200 OK$Content-Length: 0$$
				<< HTTP/1.1 200 OK$Content-Length: 0$x-asked: PUT ` + test.sent + ` 1$$`
		}
		again := `
				< HTTP/1.1 503 Busy$Content-Length: 0$$
				upstream is gone
				>> ` + request + body
		done := answered(200, 0)
		done.received = uint64(len(body))
		for _, c := range []struct {
			plan     *route.Plan
			attempts string
		}{{plan, ""}, {&retry, again}} {
			// Buffers are pooled, and the pool may return another one, so there are several requests.
			conversation{"", strings.Repeat(exchange(c.attempts), 8), slices.Repeat([]recorded{done}, 8)}.playOn(t, func(r *rig) {
				r.router = &planned{decide: func(q *Request, d *Decision) {
					d.Plan = c.plan
					if q.Attempt > 0 {
						return
					}
					if test.normal != "" {
						d.Path = []byte(test.normal)
					} else if q.Absolute {
						d.Path = q.Path
					}
				}}
			})
		}
	}
}

// A router's edits of one request come before those of its plan, in both engines, and the proxy introduces itself besides.
func TestEditsOfOneRequest(t *testing.T) {
	own := planOf(t, mesh.Forward{}, mesh.Edits{Request: mesh.HeaderEdits{
		Remove: []string{"authorization"}, Add: []mesh.HeaderEdit{add("x-claim", "alice", mesh.OverwriteOrAdd)},
	}}).RequestEdits
	plan := planOf(t, mesh.Forward{}, mesh.Edits{Request: mesh.HeaderEdits{Add: []mesh.HeaderEdit{add("x-claim", "plan", mesh.AppendOrAdd)}}})
	for _, p := range []*route.Plan{nil, plan} {
		line, field := "", ""
		if p != nil {
			line, field = "x-claim: plan$", " x-claim=plan"
		}
		prepare := func(r *rig) {
			r.peers = &PeerFields{Exchange: &peers.Exchange{Metadata: "me", ID: "it"}, Introduces: true}
			r.router = &planned{decide: func(_ *Request, d *Decision) { d.Plan, d.Edits = p, own }}
		}
		conversation{"", `
			> GET / HTTP/1.1$Host: a$Authorization: secret$X-Claim: forged$$
			>> GET / HTTP/1.1$Host: a$x-envoy-peer-metadata-id: it$x-envoy-peer-metadata: me$x-claim: alice$` + line + `$
			< HTTP/1.1 200 OK$Content-Length: 0$$
			<< HTTP/1.1 200 OK$Content-Length: 0$$`,
			[]recorded{answered(200, 0)}}.playOn(t, prepare)
		_, client, server := meetPlanned(t, prepare)
		client.sends("HEADERS 1 end " + getFields + " authorization=secret x-claim=forged")
		server.reads("HEADERS 1 end " + getFields + " x-claim=alice" + field + " x-envoy-peer-metadata-id=it x-envoy-peer-metadata=me")
	}
}

// The fields that the engine adds are there when edits are made.
func TestEditsSeeTheFieldsThatTheEngineAdds(t *testing.T) {
	plan := planOf(t, mesh.Forward{}, mesh.Edits{Request: mesh.HeaderEdits{
		Remove: []string{"x-request-id"},
		Add:    []mesh.HeaderEdit{add("x-forwarded-proto", "https", mesh.OverwriteOrAdd), add("x-forwarded-for", "9.9.9.9", mesh.AddIfAbsent)},
	}})
	all := func(c *Config) {
		c.Fields = Fields{ForwardedFor: ForwardedForSetIfAbsent, ForwardedProto: true, RequestID: true}
	}
	conversation{"", `
		> GET / HTTP/1.1$Host: a$$
		>> GET / HTTP/1.1$Host: a$x-forwarded-for: 127.0.0.1$x-forwarded-proto: https$$
		< HTTP/1.1 200 OK$Content-Length: 0$$
		<< HTTP/1.1 200 OK$Content-Length: 0$$`,
		[]recorded{answered(200, 0)}}.playOn(t, withPlan(plan), all)
}

func TestEditedRequestsHaveTheFieldsThatTheEngineAdds(t *testing.T) {
	all := func(c *Config) {
		c.Fields = Fields{ForwardedFor: ForwardedForAppend, ForwardedProto: true, RequestID: true}
	}
	for _, two := range []bool{false, true} {
		got := make(chan http.Header, 1)
		origin := serveHTTP2(t, func(w http.ResponseWriter, r *http.Request) { got <- r.Header })
		r := newRig(t, origin, two, all)
		r.set(func() { withPlan(&route.Plan{CountAttempts: true})(r) })
		client := http2Client(t)
		protocols := client.Transport.(*http.Transport).Protocols
		protocols.SetUnencryptedHTTP2(two)
		protocols.SetHTTP1(!two)
		response, err := client.Get("http://" + r.address)
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		header, record := <-got, r.records.await(t, 0)
		if id := header.Get("X-Request-Id"); len(id) != uuidLength || id != record.id {
			t.Errorf("HTTP/2 %v: the request ID is %q, recorded %q", two, id, record.id)
		}
		if header.Get("X-Forwarded-For") != "127.0.0.1" || header.Get("X-Forwarded-Proto") != "http" {
			t.Errorf("HTTP/2 %v: %v", two, header)
		}
	}
}

func TestARouteAnswersRequests(t *testing.T) {
	code := uint32(8)
	edits := planOf(t, mesh.Forward{}, mesh.Edits{Response: mesh.HeaderEdits{Add: []mesh.HeaderEdit{add("x-edited", "yes", mesh.AppendOrAdd)}}})
	for _, test := range []struct {
		name  string
		reply *route.Reply
		plan  *route.Plan
		head  string // without server and date
		flags string
	}{
		{"redirect", &route.Reply{Status: 301, Fields: []route.Field{{Name: "location", Value: "https://a/"}}, Reason: flow.Completed}, nil,
			"HTTP/1.1 301 Moved Permanently|location: https://a/|content-length: 0", ""},
		{"body", &route.Reply{Status: 418, Body: "tea", Reason: flow.Completed}, nil,
			"HTTP/1.1 418 I'm a teapot|content-type: text/plain|content-length: 3", ""},
		{"own type", &route.Reply{Status: 200, Body: "{}", Fields: []route.Field{{Name: "content-type", Value: "application/json"}}, Reason: flow.Completed}, nil,
			"HTTP/1.1 200 OK|content-type: application/json|content-length: 2", ""},
		{"no content", &route.Reply{Status: 204, Body: "not sent", Reason: flow.Completed}, nil, "HTTP/1.1 204 No Content", ""},
		{"abort", &route.Reply{Status: 503, Body: "fault filter abort", GRPC: &code, Flags: "FI", Reason: flow.Completed}, nil,
			"HTTP/1.1 503 Service Unavailable|content-type: text/plain|content-length: 18", "FI"},
		{"overflow", &route.Reply{Status: 503, Body: "full", Flags: "UO", Fields: []route.Field{{Name: "x-envoy-overloaded", Value: "true"}}, Reason: flow.Overload}, nil,
			"HTTP/1.1 503 Service Unavailable|content-type: text/plain|x-envoy-overloaded: true|content-length: 4", "UO"},
		{"edited", &route.Reply{Status: 200, Edited: true, Reason: flow.Completed}, edits, "HTTP/1.1 200 OK|x-edited: yes|content-length: 0", ""},
		{"not edited", &route.Reply{Status: 404, Flags: "NR", Reason: flow.Completed}, edits, "HTTP/1.1 404 Not Found|content-length: 0", "NR"},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := newRig(t, newOrigin(t).address, false, plain)
			test.reply.Details = envoy.DetailsDirectResponse
			r.set(func() { withReply(test.reply, test.plan)(r) })
			client := r.dial(t)
			reader := bufio.NewReader(client)
			for i, request := range []string{"GET", "POST", "HEAD"} { // on one connection
				send(t, client, request+" / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nbody")
				var lines []string
				for line := range strings.SplitSeq(strings.TrimSuffix(head(t, reader), "\r\n\r\n"), "\r\n") {
					if name, _, _ := strings.Cut(line, ":"); name != "server" && name != "date" {
						lines = append(lines, line)
					}
				}
				if got := strings.Join(lines, "|"); got != test.head {
					t.Errorf("%s: the head is %q, want %q", request, got, test.head)
				}
				body := test.reply.Body
				if request == "HEAD" || test.reply.Status == 204 {
					body = ""
				}
				expect(t, reader, body)
				got := r.records.await(t, i)
				if got.status != test.reply.Status || got.flags != test.flags || got.details != envoy.DetailsDirectResponse ||
					got.reason != test.reply.Reason || got.sent != uint64(len(body)) || got.attempts != 0 || got.cluster != "planned" {
					t.Errorf("%s: the record is %+v", request, got)
				}
			}
		})
	}
}

// The reply does not cost the connection to the upstream of the requests before.
func TestAReplyKeepsTheUpstreamConnection(t *testing.T) {
	prepare := func(r *rig) {
		r.router = &planned{decide: func(r *Request, d *Decision) {
			if string(r.Path) == "/here" {
				d.Reply = &route.Reply{Status: 200, Reason: flow.Overload}
			}
		}}
	}
	o := newOrigin(t)
	r := newRig(t, o.address, false, plain)
	r.set(func() { prepare(r) })
	client := r.dial(t)
	reader := bufio.NewReader(client)
	send(t, client, getHome)
	server := o.accept()
	expect(t, server, getHome)
	send(t, server, ok("1"))
	expect(t, reader, ok("1"))
	send(t, client, "GET /here HTTP/1.1\r\nHost: a\r\n\r\n")
	head(t, reader)
	send(t, client, getHome)
	expect(t, server, getHome)
	send(t, server, ok("2"))
	expect(t, reader, ok("2"))
}

// A long body reaches a client that reads slowly, and is not copied for each request.
func TestALongReplyIsSentWhole(t *testing.T) {
	body := strings.Repeat("0123456789abcdef", 1<<16)
	r := newRig(t, newOrigin(t).address, false, plain)
	r.set(func() { withReply(&route.Reply{Status: 200, Body: body, Reason: flow.Completed}, nil)(r) })
	client := r.dial(t)
	send(t, client, getHome+getHome)
	reader := bufio.NewReader(client)
	for range 2 {
		response, err := http.ReadResponse(reader, nil)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(response.Body); err != nil || string(got) != body {
			t.Fatalf("read %d bytes and %v, want %d", len(got), err, len(body))
		}
	}
}

func TestADelayComesBeforeTheDial(t *testing.T) {
	const delay = 50 * time.Millisecond
	o := newOrigin(t)
	r := newRig(t, o.address, false, plain)
	r.set(func() { r.router = &planned{decide: func(_ *Request, d *Decision) { d.Delay = delay }} })
	client := r.dial(t)
	began := time.Now()
	send(t, client, getHome)
	server := o.accept()
	if passed := time.Since(began); passed < delay {
		t.Errorf("dialled after %v, want %v", passed, delay)
	}
	expect(t, server, getHome)
	send(t, server, ok(""))
	expect(t, client, ok(""))
	if got := r.records.await(t, 0); got.flags != "DI" || got.reason != flow.Completed {
		t.Errorf("the record is %+v, want the flag of a delay", got)
	}
}

func TestADelayedAbortHasBothFlags(t *testing.T) {
	r := newRig(t, newOrigin(t).address, false, plain)
	r.set(func() {
		r.router = &planned{decide: func(_ *Request, d *Decision) {
			d.Delay, d.Reply = time.Millisecond, &route.Reply{Status: 503, Flags: "FI", Reason: flow.Completed}
		}}
	})
	client := r.dial(t)
	send(t, client, getHome)
	if got := head(t, bufio.NewReader(client)); !strings.HasPrefix(got, "HTTP/1.1 503 ") {
		t.Errorf("read %q", got)
	}
	if got := r.records.await(t, 0); got.flags != "DI,FI" {
		t.Errorf("the flags are %q", got.flags)
	}
}

func TestAClientThatLeavesEndsItsDelay(t *testing.T) {
	for _, reset := range []bool{true, false} {
		o := newOrigin(t)
		r := newRig(t, o.address, false, plain)
		r.set(func() { r.router = &planned{decide: func(_ *Request, d *Decision) { d.Delay = time.Hour }} })
		client := r.dial(t)
		send(t, client, getHome)
		within(t, "the request is delayed", func() bool { return r.open.Load() == 1 })
		if reset {
			client.SetLinger(0)
		}
		client.Close()
		if got := r.records.await(t, 0); got.reason != flow.DownstreamLeft || got.flags != "DI,DC" || got.attempts != 0 {
			t.Errorf("the record is %+v", got)
		}
	}
}
