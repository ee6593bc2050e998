package httpforward

import (
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/route"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// meetPlanned is meet for a connection whose requests are routed.
func meetPlanned(t testing.TB, prepare func(*rig)) (*rig, *speaker, *speaker) {
	t.Helper()
	o := newOrigin(t)
	r := newRig(t, o.address, true, plain)
	r.set(func() { prepare(r) })
	client, server := meetOn(t, r, o)
	return r, client, server
}

func TestEditsOfHTTP2(t *testing.T) {
	const answer = " end :status=200 server=theirs"
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
				},
			}}),
			getFields + " x-gone=1 x-over=old x-more=1 !x-there=yes x-over=older accept=*",
			getFields + " x-more=1 !x-there=yes accept=* x-over=new x-more=2 x-new=1-a-route",
			answer, answer,
		},
		{
			"a response",
			planOf(t, mesh.Forward{}, mesh.Edits{Response: mesh.HeaderEdits{
				Remove: []string{"X-Powered-By"},
				Add:    []mesh.HeaderEdit{add("x-saw", "%REQ(x-own)%%RESP(x-theirs)%%REQ(:path)%", mesh.AppendOrAdd)},
			}}),
			getFields + " x-own=mine", getFields + " x-own=mine",
			" end :status=200 x-powered-by=x set-cookie=a x-theirs=its", " end :status=200 set-cookie=a x-theirs=its x-saw=mineits/",
		},
		{
			"the path and the host",
			planOf(t, mesh.Forward{PrefixRewrite: "/v2/", HostRewrite: "new.example", ForwardedHost: true}, mesh.Edits{}),
			":method=GET :scheme=http :path=/a?b :authority=old host=old x-a=1",
			":method=GET :scheme=http :path=/v2/a?b :authority=new.example x-a=1 x-forwarded-host=old x-envoy-original-path=/a?b",
			answer, answer,
		},
		{
			"a host without an authority",
			planOf(t, mesh.Forward{HostRewrite: "new.example"}, mesh.Edits{}),
			":method=GET :scheme=http :path=/ host=old", ":method=GET :scheme=http :path=/ host=new.example",
			answer, answer,
		},
		{
			"the framing is not edited",
			planOf(t, mesh.Forward{}, mesh.Edits{Request: mesh.HeaderEdits{
				Remove: []string{"te"}, Add: []mesh.HeaderEdit{add("Connection", "close", mesh.AppendOrAdd), add("content-length", "7", mesh.OverwriteOrAdd)},
			}}),
			getFields + " te=trailers", getFields + " te=trailers", answer, answer,
		},
		{
			"attempts and limits",
			&route.Plan{CountAttempts: true, CountInResponses: true, Timeout: time.Minute},
			getFields + " x-envoy-attempt-count=7 x-a=1", getFields + " x-a=1 x-envoy-expected-rq-timeout-ms=60000 x-envoy-attempt-count=1",
			answer, answer + " x-envoy-attempt-count=1",
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, client, server := meetPlanned(t, withPlan(test.plan))
			for _, id := range []string{"1", "3"} { // the second blocks refer to the tables
				client.sends("HEADERS " + id + " end " + test.request)
				server.reads("HEADERS " + id + " end " + test.sent)
				server.sends("HEADERS " + id + test.answer)
				client.reads("HEADERS " + id + test.gotten)
			}
		})
	}
}

func TestARouteAnswersHTTP2Requests(t *testing.T) {
	code := uint32(8)
	edits := planOf(t, mesh.Forward{}, mesh.Edits{Response: mesh.HeaderEdits{Add: []mesh.HeaderEdit{add("x-edited", "yes", mesh.AppendOrAdd)}}})
	const grpc = getFields + " content-type=application/grpc"
	for _, test := range []struct {
		name          string
		reply         *route.Reply
		plan          *route.Plan
		request, want string
		flags         string
	}{
		{"redirect", &route.Reply{Status: 301, Fields: []route.Field{{Name: "location", Value: "https://a/"}}}, nil, getFields,
			":status=301 server=pillion content-length=0 location=https://a/", ""},
		{"overflow", &route.Reply{Status: 503, Flags: "UO", Fields: []route.Field{{Name: "x-envoy-overloaded", Value: "true"}}}, nil, getFields,
			":status=503 server=pillion content-length=0 x-envoy-overloaded=true", "UO"},
		{"no content", &route.Reply{Status: 204}, nil, getFields, ":status=204 server=pillion", ""},
		{"edited", &route.Reply{Status: 200, Edited: true}, edits, getFields, ":status=200 server=pillion content-length=0 x-edited=yes", ""},
		{"abort of gRPC", &route.Reply{Status: 200, Body: "fault filter abort", GRPC: &code, Flags: "FI"}, nil, grpc,
			":status=200 server=pillion content-type=application/grpc grpc-status=8 grpc-message=fault_filter_abort", "FI"},
		{"no healthy host for gRPC", &route.Reply{Status: 503, Body: "no healthy upstream", Flags: "UH"}, nil, grpc,
			":status=200 server=pillion content-type=application/grpc grpc-status=14 grpc-message=no_healthy_upstream", "UH"},
	} {
		t.Run(test.name, func(t *testing.T) {
			test.reply.Reason = flow.Completed
			held := &leases{}
			r, client, _ := meetPlanned(t, func(r *rig) {
				r.router = &planned{leases: held, decide: func(_ *Request, d *Decision) { d.Target, d.Reply, d.Plan = upstream.Target{}, test.reply, test.plan }}
			})
			client.sends("HEADERS 1 end " + test.request)
			client.reads("HEADERS 1 end " + test.want)
			if got := r.records.await(t, 0); got.flags != test.flags || got.reason != flow.Completed || got.attempts != 0 {
				t.Errorf("the record is %+v", got)
			}
			held.check(t, []Outcome{{GRPC: -1, Reason: flow.Completed}})
		})
	}
}

func TestLimitsOfARouteOverHTTP2(t *testing.T) {
	const short = 30 * time.Millisecond
	none := time.Duration(0)
	t.Run("of the response's head", func(t *testing.T) {
		r, client, server := meetPlanned(t, withPlan(&route.Plan{Timeout: short}))
		client.sends("GET 1")
		server.reads("HEADERS 1 end " + getFields + " x-envoy-expected-rq-timeout-ms=30")
		server.reads("RST 1 CANCEL")
		client.reads("HEADERS 1 end :status=504 server=pillion content-length=0")
		if got := r.records.await(t, 0); got.reason != flow.RequestTimeout || got.flags != "UT" || got.details != "response_timeout" {
			t.Errorf("the record is %+v", got)
		}
	})
	t.Run("of a gRPC request's own", func(t *testing.T) {
		r, client, server := meetPlanned(t, withPlan(&route.Plan{GRPCTimeout: &none}))
		client.sends("HEADERS 1 end " + getFields + " content-type=application/grpc grpc-timeout=30m")
		server.reads("HEADERS 1 end " + getFields + " content-type=application/grpc grpc-timeout=30m")
		server.reads("RST 1 CANCEL")
		client.reads("HEADERS 1 end :status=200 server=pillion content-type=application/grpc grpc-status=4 grpc-message=upstream_request_timeout")
		if got := r.records.await(t, 0); got.reason != flow.RequestTimeout || got.flags != "UT" || got.grpc != "4" {
			t.Errorf("the record is %+v", got)
		}
	})
	t.Run("of the response's end", func(t *testing.T) {
		nettest.UnderLimit(t, 400*time.Millisecond, func(t testing.TB, limit time.Duration) {
			r, client, server := meetPlanned(t, withPlan(&route.Plan{Timeout: limit}))
			client.sends("GET 1")
			server.next()
			server.sends("HEADERS 1 :status=200")
			client.reads("HEADERS 1 :status=200")
			server.reads("RST 1 CANCEL")
			client.reads("RST 1 INTERNAL_ERROR")
			if got := r.records.await(t, 0); got.reason != flow.RequestTimeout || got.flags != "UT" || got.status != 200 {
				t.Errorf("the record is %+v", got)
			}
		})
	})
	t.Run("of the stream, each its own", func(t *testing.T) {
		held := &leases{}
		r, client, server := meetPlanned(t, func(r *rig) {
			limit := time.Hour
			r.router = &planned{leases: held, decide: func(_ *Request, d *Decision) {
				d.Plan = &route.Plan{MaxStream: new(limit)}
				limit = short
			}}
		})
		client.sends("GET 1")
		server.reads("GET 1")
		client.sends("POST 3")
		server.reads("POST 3")
		server.reads("RST 3 CANCEL")
		client.reads("HEADERS 3 end :status=408 server=pillion content-length=0")
		client.reads("RST 3 NO_ERROR")
		if got := r.records.await(t, 0); got.status != 408 || got.details != "max_duration_timeout" {
			t.Errorf("the record is %+v", got)
		}
		server.sends("HEADERS 1 end :status=200 grpc-status=7")
		client.reads("HEADERS 1 end :status=200 grpc-status=7")
		held.check(t, []Outcome{
			{GRPC: -1, Reason: flow.RequestTimeout, Connected: true},
			{Status: 200, GRPC: 7, Reason: flow.Completed, Connected: true},
		})
	})
}

func TestLeasesOfHTTP2EndWithTheirStreams(t *testing.T) {
	held := &leases{}
	_, client, server := meetPlanned(t, func(r *rig) {
		r.router = &planned{leases: held, decide: func(*Request, *Decision) {}}
	})
	for _, id := range []string{"1", "3", "5"} {
		client.sends("GET " + id)
		server.reads("GET " + id)
	}
	server.sends("RST 1 REFUSED_STREAM")
	client.reads("RST 1 REFUSED_STREAM")
	client.sends("RST 3 CANCEL")
	server.reads("RST 3 CANCEL")
	server.conn.SetLinger(0)
	server.conn.Close()
	held.check(t, []Outcome{
		{GRPC: -1, Reason: flow.UpstreamReset, Connected: true},
		{GRPC: -1, Reason: flow.DownstreamLeft, Connected: true},
		{GRPC: -1, Reason: flow.UpstreamClosed, Connected: true},
	})
}

// Copies of streams are not sent, and the places that were taken for them are given back.
func TestMirrorsOfHTTP2EndTheirLeases(t *testing.T) {
	held := &leases{}
	_, client, server := meetPlanned(t, func(r *rig) {
		r.router = &planned{decide: func(_ *Request, d *Decision) {
			d.Mirrors = []Mirror{{Target: d.Target, Policy: &mesh.Mirror{}, Lease: held.open()}}
		}}
	})
	client.sends("GET 1")
	server.reads("GET 1")
	held.check(t, []Outcome{{GRPC: -1, Reason: flow.Overload}})
}
