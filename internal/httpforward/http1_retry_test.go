package httpforward

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/budget"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/route"
	"github.com/pillion-proxy/pillion/internal/tcp"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

var conditions = map[string]mesh.RetryConditions{
	"5xx": mesh.Retry5xx, "gateway-error": mesh.RetryGatewayError, "reset": mesh.RetryReset,
	"reset-before-request": mesh.RetryResetBeforeRequest, "connect-failure": mesh.RetryConnectFailure,
	"refused-stream": mesh.RetryRefusedStream, "ratelimited": mesh.RetryRateLimited, "retriable-4xx": mesh.Retry4xx,
	"codes": mesh.RetryStatusCodes, "headers": mesh.RetryHeaders, "cancelled": mesh.RetryCancelled,
	"deadline-exceeded": mesh.RetryDeadlineExceeded, "internal": mesh.RetryInternal,
	"resource-exhausted": mesh.RetryResourceExhausted, "unavailable": mesh.RetryUnavailable,
}

func response(status string, fields ...string) string {
	return "HTTP/1.1 " + status + "\r\nContent-Length: 1\r\n" + strings.Join(append(fields, "", ""), "\r\n") + "!"
}

// Each way in which an attempt fails is retried under the conditions that name it, and under no others.
func TestARetryNeedsACondition(t *testing.T) {
	const anyReset = "5xx gateway-error reset"
	for _, outcome := range []struct {
		name    string
		first   string // the first response; empty: upstream closes without one
		refuses bool   // upstream cannot be reached
		silent  bool   // upstream does not respond within the time of an attempt
		on      string // the conditions under which it is retried
		status  int    // of the reply or the response when it is not
		reason  flow.Reason
	}{
		{"refused", "", true, false, anyReset + " connect-failure reset-before-request", 503, flow.UpstreamRefused},
		{"closed", "", false, false, anyReset, 503, flow.UpstreamClosed},
		{"timed out", "", false, true, anyReset, 504, flow.RequestTimeout},
		{"malformed", "HTTP/1.1 twohundred\r\n\r\n", false, false, anyReset, 502, flow.BadResponse},
		{"500", response("500 E"), false, false, "5xx", 500, flow.Completed},
		{"501", response("501 E"), false, false, "5xx codes", 501, flow.Completed},
		{"502", response("502 E"), false, false, "5xx gateway-error", 502, flow.Completed},
		{"503", response("503 E"), false, false, "5xx gateway-error codes", 503, flow.Completed},
		{"504", response("504 E"), false, false, "5xx gateway-error", 504, flow.Completed},
		{"409", response("409 E"), false, false, "retriable-4xx", 409, flow.Completed},
		{"404", response("404 E"), false, false, "", 404, flow.Completed},
		{"200", response("200 OK"), false, false, "", 200, flow.Completed},
		{"503, rate limited", response("503 E", "X-Envoy-RateLimited: true"), false, false, "ratelimited", 503, flow.Completed},
		{"429, rate limited", response("429 E", "x-envoy-ratelimited: true"), false, false, "ratelimited", 429, flow.Completed},
		{"503, overloaded", response("503 E", "x-envoy-overloaded: true"), false, false, "", 503, flow.Completed},
		{"gRPC, cancelled", response("200 OK", "grpc-status: 1"), false, false, "cancelled", 200, flow.Completed},
		{"gRPC, deadline", response("200 OK", "grpc-status: 4"), false, false, "deadline-exceeded", 200, flow.Completed},
		{"gRPC, exhausted", response("200 OK", "grpc-status: 8"), false, false, "resource-exhausted", 200, flow.Completed},
		{"gRPC, internal", response("200 OK", "Grpc-Status: 13"), false, false, "internal", 200, flow.Completed},
		{"gRPC, unavailable", response("200 OK", "grpc-status: 14"), false, false, "unavailable", 200, flow.Completed},
		{"a field", response("200 OK", "X-Again: 1"), false, false, "headers", 200, flow.Completed},
		{"gRPC, not found", response("200 OK", "grpc-status: 5"), false, false, "", 200, flow.Completed},
	} {
		t.Run(outcome.name, func(t *testing.T) {
			t.Parallel()
			for name, condition := range conditions {
				try := func(t testing.TB, limit time.Duration) {
					o := newOrigin(t)
					closed := nettest.Refusing(t)
					policy := retrying(condition, 1)
					policy.Codes = []uint32{501, 503}
					policy.Headers = []mesh.HeaderMatcher{{Name: "x-again", Present: true}}
					if outcome.silent {
						policy.TryTimeout = limit // of the attempt that is answered, too
					}
					held := &leases{}
					r := newRig(t, o.address, false, plain)
					r.set(func() {
						r.router = &planned{leases: held, decide: func(r *Request, d *Decision) {
							d.Plan = &route.Plan{Retry: policy}
							if outcome.refuses && r.Attempt == 0 {
								d.Target.Address = closed
							}
						}}
					})
					client := r.dial(t)
					const request = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nbody"
					send(t, client, request)
					if !outcome.refuses {
						server := o.accept()
						expect(t, server, request)
						send(t, server, outcome.first)
						if outcome.first == "" && !outcome.silent {
							server.Close()
						}
					}
					retried := slices.Contains(strings.Fields(outcome.on), name)
					want := recorded{status: outcome.status, reason: outcome.reason, attempts: 1}
					first := Outcome{Status: outcome.status, GRPC: -1, Reason: outcome.reason, Connected: !outcome.refuses}
					if outcome.reason != flow.Completed {
						first.Status = 0
					}
					if i := strings.Index(strings.ToLower(outcome.first), "grpc-status: "); i >= 0 {
						fmt.Sscan(outcome.first[i+len("grpc-status: "):], &first.GRPC)
					}
					outcomes := []Outcome{first}
					if retried {
						again := o.accept()
						expect(t, again, request)
						send(t, again, response("201 Created"))
						want = recorded{status: 201, reason: flow.Completed, attempts: 2}
						outcomes = append(outcomes, Outcome{Status: 201, GRPC: -1, Reason: flow.Completed, Connected: true})
					}
					reader := bufio.NewReader(client)
					if got := head(t, reader); !strings.HasPrefix(got, fmt.Sprintf("HTTP/1.1 %d ", want.status)) {
						t.Errorf("%s: read %q, want status %d", name, got, want.status)
					}
					got := r.records.await(t, 0)
					if got.status != want.status || got.reason != want.reason || got.attempts != want.attempts || strings.Contains(got.flags, "URX") {
						t.Errorf("%s: record %+v, want %+v", name, got, want)
					}
					held.check(t, outcomes)
					client.Close()
				}
				if outcome.silent {
					nettest.UnderLimit(t, 20*time.Millisecond, try)
				} else {
					try(t, 0)
				}
			}
		})
	}
}

func TestTheLastOfSeveralAttempts(t *testing.T) {
	policy := &route.Plan{Retry: retrying(mesh.Retry5xx, 2), CountAttempts: true, CountInResponses: true}
	for _, test := range []struct {
		name, script string
		want         recorded
		received     uint64
	}{
		{"is a response", `
			> PUT / HTTP/1.1$Host: a$Content-Length: 4$$body
			>> PUT / HTTP/1.1$Host: a$Content-Length: 4$x-envoy-attempt-count: 1$$body
			< HTTP/1.1 503 Busy$Content-Length: 100$$part
			upstream is gone
			>> PUT / HTTP/1.1$Host: a$Content-Length: 4$x-envoy-attempt-count: 2$$body
			< HTTP/1.1 503 Busy$Content-Length: 1$$2
			upstream is gone
			>> PUT / HTTP/1.1$Host: a$Content-Length: 4$x-envoy-attempt-count: 3$$body
			< HTTP/1.1 500 Busy$Content-Length: 1$$3
			<< HTTP/1.1 500 Busy$Content-Length: 1$x-envoy-attempt-count: 3$$3
			> GET / HTTP/1.1$Host: a$$
			>> GET / HTTP/1.1$Host: a$x-envoy-attempt-count: 1$$
			< HTTP/1.1 200 OK$Content-Length: 0$$
			<< HTTP/1.1 200 OK$Content-Length: 0$x-envoy-attempt-count: 1$$`,
			recorded{reason: flow.Completed, status: 500, flags: "URX", received: 4, sent: 1}, 0},
		{"is a reply", `
			> PUT / HTTP/1.1$Host: a$Content-Length: 4$$body
			>> PUT / HTTP/1.1$Host: a$Content-Length: 4$x-envoy-attempt-count: 1$$body
			upstream closes
			upstream is gone
			>> PUT / HTTP/1.1$Host: a$Content-Length: 4$x-envoy-attempt-count: 2$$body
			upstream closes
			upstream is gone
			>> PUT / HTTP/1.1$Host: a$Content-Length: 4$x-envoy-attempt-count: 3$$body
			upstream closes
			<< HTTP/1.1 503 Service Unavailable$`,
			recorded{reason: flow.UpstreamClosed, status: 503, flags: "URX,UC", received: 4, sent: 118}, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			want := []recorded{test.want}
			if strings.Contains(test.script, "> GET") {
				want = append(want, answered(200, 0))
			}
			conversation{"", test.script, want}.playOn(t, withPlan(policy))
		})
	}
}

// After a byte of a response, even an interim one, there is no retry. Another response would not fit to the part
// that downstream has seen.
func TestNothingIsRetriedAfterAByteOfAResponse(t *testing.T) {
	plan := &route.Plan{Retry: retrying(mesh.Retry5xx|mesh.RetryReset, 5)}
	conversation{"", `
		> GET / HTTP/1.1$Host: a$$
		>> GET / HTTP/1.1$Host: a$$
		< HTTP/1.1 103 Early Hints$Link: x$$
		<< HTTP/1.1 103 Early Hints$Link: x$$
		< HTTP/1.1 503 Busy$Content-Length: 0$$
		<< HTTP/1.1 503 Busy$Content-Length: 0$$
		> GET / HTTP/1.1$Host: a$$
		>> GET / HTTP/1.1$Host: a$$
		< HTTP/1.1 200 OK$Content-Length: 10$$half
		<< HTTP/1.1 200 OK$Content-Length: 10$$half
		upstream resets
		client is reset`,
		[]recorded{answered(503, 0), {reason: flow.ResponseIncomplete, status: 200, flags: "UC", sent: 4}}}.playOn(t, withPlan(plan))
}

// Bodies up to the limit are kept, whatever their framing and however much of them had arrived; longer ones are not retried.
func TestARequestIsKeptUpToALimit(t *testing.T) {
	for _, chunked := range []bool{false, true} {
		for _, test := range []struct {
			size    int
			retried bool
		}{{0, true}, {100, true}, {20 << 10, true}, {100 << 10, true}, {1000 << 10, true}, {1<<20 + 1, false}, {5 << 20, false}} {
			t.Run(fmt.Sprintf("%d, chunked %v", test.size, chunked), func(t *testing.T) {
				t.Parallel()
				body := bytes.Repeat([]byte("0123456789abcdef"), test.size/16+1)[:test.size]
				o := newOrigin(t)
				r := newRig(t, o.address, false, plain)
				r.set(func() { withPlan(&route.Plan{Retry: retrying(mesh.Retry5xx, 3)})(r) })
				request, err := http.NewRequest("POST", "http://"+r.address+"/", bytes.NewReader(body))
				if err != nil {
					t.Fatal(err)
				}
				if chunked {
					request.ContentLength = -1
				}
				var served sync.WaitGroup
				served.Go(func() {
					for attempt := range 3 {
						conn := o.accept()
						got, err := http.ReadRequest(bufio.NewReader(conn))
						if err != nil {
							t.Error(err)
							return
						}
						if read, err := io.ReadAll(got.Body); err != nil || !bytes.Equal(read, body) {
							t.Errorf("attempt %d: read %d bytes and %v, want %d", attempt, len(read), err, len(body))
						}
						status := "503 Busy"
						if attempt == 2 {
							status = "200 OK"
						}
						io.WriteString(conn, response(status))
						if !test.retried {
							return
						}
					}
				})
				response, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: nettest.Patience}).Do(request)
				if err != nil {
					t.Fatal(err)
				}
				response.Body.Close()
				served.Wait()
				want := map[bool]int{true: 200, false: 503}[test.retried]
				if got := r.records.await(t, 0); response.StatusCode != want || got.status != want || got.received < uint64(test.size) {
					t.Errorf("status %d, record %+v", response.StatusCode, got)
				}
			})
		}
	}
}

// A client that has half-closed still waits for its response.
func TestAHalfCloseDoesNotEndTheRetries(t *testing.T) {
	conversation{"", `
		> GET / HTTP/1.1$Host: a$$
		client closes its half
		>> GET / HTTP/1.1$Host: a$$
		upstream reads the end
		< HTTP/1.1 503 Busy$Content-Length: 0$$
		upstream is gone
		>> GET / HTTP/1.1$Host: a$$
		upstream reads the end
		< HTTP/1.1 200 OK$Content-Length: 2$$ok
		<< HTTP/1.1 200 OK$Content-Length: 2$$ok
		client reads the end`,
		[]recorded{answered(200, 2)}}.playOn(t, withPlan(&route.Plan{Retry: retrying(mesh.Retry5xx, 1)}))
}

// What is kept for a retry counts as held memory, and is given back with the response. While memory is short, requests are
// not kept, and so not retried.
func TestKeptRequestsAreHeldMemory(t *testing.T) {
	const size = 500 << 10
	for _, short := range []bool{false, true} {
		o := newOrigin(t)
		r := newRig(t, o.address, false, plain)
		r.set(func() { withPlan(&route.Plan{Retry: retrying(mesh.Retry5xx, 1)})(r) })
		hog := &budget.Account{}
		w := tcp.NewWaiter(t.Context())
		defer w.Close()
		hog.Open(r.engine.config.Budget, w, netip.MustParseAddr("192.0.2.1"))
		defer hog.Close()
		if short {
			hog.Hold(r.engine.config.Budget.Limit()/2 + 1)
		}
		before := r.engine.config.Budget.Used()
		client := r.dial(t)
		request := fmt.Sprintf("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s", size, strings.Repeat("x", size))
		go io.WriteString(client, request)
		server := o.accept()
		expect(t, server, request)
		held := func() int { return r.engine.config.Budget.Used() - before }
		if short {
			send(t, server, response("503 Busy"))
			expect(t, client, response("503 Busy"))
			continue
		}
		within(t, "the request is held", func() bool { return held() >= size && held() <= maxKept })
		send(t, server, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\no")
		expect(t, client, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\no")
		within(t, "the memory is given back", func() bool { return held() == 0 })
		send(t, server, "k")
		expect(t, client, "k")
	}
}

// The time of an attempt starts with the end of the request, also if an attempt before has failed.
func TestTheTimeOfAnAttemptStartsWithTheEndOfTheRequest(t *testing.T) {
	t.Parallel()
	nettest.UnderLimit(t, 30*time.Millisecond, func(t testing.TB, limit time.Duration) {
		policy := retrying(mesh.Retry5xx, 2)
		policy.TryTimeout = long(limit)
		conversation{"", `
			> POST / HTTP/1.1$Host: a$Content-Length: 4$$ab
			>> POST / HTTP/1.1$Host: a$Content-Length: 4$$ab
			< HTTP/1.1 503 Busy$Content-Length: 0$$
			upstream is gone
			>> POST / HTTP/1.1$Host: a$Content-Length: 4$$ab
			a longer time passes
			> cd
			>> cd
			< HTTP/1.1 200 OK$Content-Length: 0$$
			<< HTTP/1.1 200 OK$Content-Length: 0$$`,
			[]recorded{{reason: flow.Completed, status: 200, received: 4}}}.playUnder(t, limit, withPlan(&route.Plan{Retry: policy}))
	})
}

// A request whose body is still on its way when an attempt fails is sent again with the part that is there, and goes on.
func TestAnAttemptFailsInTheMiddleOfTheRequest(t *testing.T) {
	conversation{"", `
		> POST / HTTP/1.1$Host: a$Content-Length: 8$$abcd
		>> POST / HTTP/1.1$Host: a$Content-Length: 8$$abcd
		< HTTP/1.1 503 Busy$Content-Length: 0$$
		upstream is gone
		>> POST / HTTP/1.1$Host: a$Content-Length: 8$$abcd
		> efgh
		>> efgh
		< HTTP/1.1 200 OK$Content-Length: 0$$
		<< HTTP/1.1 200 OK$Content-Length: 0$$`,
		[]recorded{{reason: flow.Completed, status: 200, received: 8}}}.playOn(t, withPlan(&route.Plan{Retry: retrying(mesh.Retry5xx, 1)}))
}

func TestTheRouterChoosesAgainForEachAttempt(t *testing.T) {
	first, second := newOrigin(t), newOrigin(t)
	r := newRig(t, first.address, false, plain)
	var seen []string
	plan := &route.Plan{Retry: retrying(mesh.Retry5xx, 2)}
	r.set(func() {
		r.router = &planned{decide: func(r *Request, d *Decision) {
			_, host := r.Fields.At(0)
			text := fmt.Sprintf("%d %s %s %s", r.Attempt, r.Method, r.Path, host)
			if r.Previous != nil {
				text += fmt.Sprint(" after ", r.Previous.Target.Address == first.address, r.Previous.Lease)
			}
			seen = append(seen, text)
			switch r.Attempt {
			case 0:
				d.Plan = plan
			case 1:
				d.Target.Address = second.address // the plan stands
			case 2:
				d.Target, d.Reply = upstream.Target{}, &route.Reply{Status: 503, Body: "full", Flags: "UO", Reason: flow.Overload}
			}
		}}
	})
	client := r.dial(t)
	send(t, client, getHome)
	for _, o := range []*origin{first, second} {
		server := o.accept()
		expect(t, server, getHome)
		send(t, server, response("503 Busy"))
		readsReset(t, server, "upstream")
	}
	reader := bufio.NewReader(client)
	if got := head(t, reader); !strings.HasPrefix(got, "HTTP/1.1 503 ") {
		t.Errorf("read %q", got)
	}
	expect(t, reader, "full")
	if got := r.records.await(t, 0); got.flags != "UO" || got.reason != flow.Overload || got.attempts != 2 {
		t.Errorf("record %+v", got)
	}
	want := []string{"0 GET /home a", "1 GET /home a after true <nil>", "2 GET /home a after false <nil>"}
	if !slices.Equal(seen, want) {
		t.Errorf("the router saw %q, want %q", seen, want)
	}
}

// Each attempt is decided about by the path that the first decision has set: policies must not see another one than the server.
func TestARetryHasThePathThatWasSet(t *testing.T) {
	for _, two := range []bool{false, true} {
		var calls atomic.Int32
		origin := serveHTTP2(t, func(w http.ResponseWriter, _ *http.Request) {
			if calls.Add(1) < 3 {
				w.WriteHeader(http.StatusServiceUnavailable)
			}
		})
		var mu sync.Mutex
		var seen []string
		plan := &route.Plan{Retry: retrying(mesh.Retry5xx, 2)}
		r := newRig(t, origin, two, plain)
		client := http1Client(t)
		if two {
			client = http2Client(t)
		}
		r.set(func() {
			r.many = two
			r.router = &planned{decide: func(q *Request, d *Decision) {
				mu.Lock()
				defer mu.Unlock()
				if seen = append(seen, string(q.Path)); q.Attempt == 0 {
					d.Plan, d.Path = plan, []byte("/set?q")
				}
			}}
		})
		response, err := client.Get("http://" + r.address + "/received?q")
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		mu.Lock()
		if want := []string{"/received?q", "/set?q", "/set?q"}; response.StatusCode != 200 || !slices.Equal(seen, want) {
			t.Errorf("HTTP/2 %v: the router saw %q, want %q; status %d", two, seen, want, response.StatusCode)
		}
		mu.Unlock()
	}
}

func TestLimitsOfARoute(t *testing.T) {
	none := time.Duration(0)
	for _, test := range []struct {
		name   string
		plan   func(short, long time.Duration) *route.Plan
		script string
		want   recorded
	}{
		{"of the response's head", func(short, long time.Duration) *route.Plan { return &route.Plan{Timeout: short} }, `
			> GET / HTTP/1.1$Host: a$$
			>> GET / HTTP/1.1$Host: a$x-envoy-expected-rq-timeout-ms: SHORT$$
			<< HTTP/1.1 504 Gateway Timeout$`,
			recorded{reason: flow.RequestTimeout, status: 504, flags: "UT", sent: 24}},
		{"of the response's end", func(short, long time.Duration) *route.Plan { return &route.Plan{Timeout: long} }, `
			> GET / HTTP/1.1$Host: a$$
			>> GET / HTTP/1.1$Host: a$x-envoy-expected-rq-timeout-ms: LONG$$
			< HTTP/1.1 200 OK$Content-Length: 10$$half
			<< HTTP/1.1 200 OK$Content-Length: 10$$half
			client is reset`,
			recorded{reason: flow.RequestTimeout, status: 200, flags: "UT", sent: 4}},
		{"of all attempts", func(short, long time.Duration) *route.Plan {
			return &route.Plan{Timeout: short, Retry: &mesh.RetryPolicy{On: mesh.Retry5xx, Retries: 1, BackOff: time.Hour, MaxBackOff: time.Hour}}
		}, `
			> GET / HTTP/1.1$Host: a$$
			>> GET / HTTP/1.1$Host: a$x-envoy-expected-rq-timeout-ms: SHORT$$
			< HTTP/1.1 503 Busy$Content-Length: 0$$
			<< HTTP/1.1 504 Gateway Timeout$`,
			recorded{reason: flow.RequestTimeout, status: 504, flags: "UT", sent: 24}},
		{"of an attempt, exhausted", func(short, long time.Duration) *route.Plan {
			return &route.Plan{Retry: &mesh.RetryPolicy{On: mesh.RetryReset, Retries: 1, TryTimeout: short}}
		}, `
			> GET / HTTP/1.1$Host: a$$
			>> GET / HTTP/1.1$Host: a$$
			upstream is gone
			>> GET / HTTP/1.1$Host: a$$
			<< HTTP/1.1 504 Gateway Timeout$`,
			recorded{reason: flow.RequestTimeout, status: 504, flags: "URX,UT", sent: 24}},
		{"of an attempt, once the response has begun", func(short, long time.Duration) *route.Plan {
			return &route.Plan{Retry: &mesh.RetryPolicy{On: mesh.RetryReset, Retries: 1, TryTimeout: long}}
		}, `
			> GET / HTTP/1.1$Host: a$$
			>> GET / HTTP/1.1$Host: a$$
			< HTTP/1.1 200 OK$Content-Length: 10$$half
			<< HTTP/1.1 200 OK$Content-Length: 10$$half
			a longer time passes
			< andend
			<< andend`,
			recorded{reason: flow.Completed, status: 200, sent: 10}},
		{"of the stream", func(short, long time.Duration) *route.Plan { return &route.Plan{MaxStream: new(short)} }, `
			> GET / HTTP/1.1$Host: a$$
			>> GET / HTTP/1.1$Host: a$$
			<< HTTP/1.1 504 Gateway Timeout$`,
			recorded{reason: flow.RequestTimeout, status: 504, flags: "UT", sent: 27}},
		{"of the stream, while the request is on its way", func(short, long time.Duration) *route.Plan { return &route.Plan{MaxStream: new(short)} }, `
			> POST / HTTP/1.1$Host: a$Content-Length: 4$$ab
			>> POST / HTTP/1.1$Host: a$Content-Length: 4$$ab
			<< HTTP/1.1 408 Request Timeout$`,
			recorded{reason: flow.RequestTimeout, status: 408, flags: "UT", received: 2, sent: 27}},
		{"begin with the end of the request", func(short, long time.Duration) *route.Plan {
			return &route.Plan{Timeout: long, Retry: &mesh.RetryPolicy{On: mesh.RetryReset, TryTimeout: long / 2}}
		}, `
			> POST / HTTP/1.1$Host: a$Content-Length: 4$$ab
			>> POST / HTTP/1.1$Host: a$Content-Length: 4$x-envoy-expected-rq-timeout-ms: HALF$$ab
			a longer time passes
			> cd
			>> cd
			< HTTP/1.1 200 OK$Content-Length: 0$$
			<< HTTP/1.1 200 OK$Content-Length: 0$$`,
			recorded{reason: flow.Completed, status: 200, received: 4}},
		{"of zero are none", func(short, long time.Duration) *route.Plan {
			return &route.Plan{MaxStream: &none, Idle: &none, GRPCTimeout: &none}
		}, `
			> GET / HTTP/1.1$Host: a$$
			>> GET / HTTP/1.1$Host: a$$
			some time passes
			< HTTP/1.1 200 OK$Content-Length: 0$$
			<< HTTP/1.1 200 OK$Content-Length: 0$$`,
			recorded{reason: flow.Completed, status: 200}},
		{"of silence before a response", func(short, long time.Duration) *route.Plan { return &route.Plan{Idle: new(short)} }, `
			> GET / HTTP/1.1$Host: a$$
			>> GET / HTTP/1.1$Host: a$$
			<< HTTP/1.1 504 Gateway Timeout$`,
			recorded{reason: flow.IdleTimeout, status: 504, flags: "SI", sent: 14}},
		{"of silence in a request, beside a longer limit", func(short, long time.Duration) *route.Plan { return &route.Plan{Idle: new(short), Timeout: time.Hour} }, `
			> POST / HTTP/1.1$Host: a$Content-Length: 4$$ab
			>> POST / HTTP/1.1$Host: a$Content-Length: 4$x-envoy-expected-rq-timeout-ms: 3600000$$ab
			<< HTTP/1.1 408 Request Timeout$`,
			recorded{reason: flow.IdleTimeout, status: 408, flags: "SI", received: 2, sent: 14}},
		{"of silence in a response, beside a longer limit", func(short, long time.Duration) *route.Plan {
			return &route.Plan{Idle: new(long), MaxStream: new(time.Hour)}
		}, `
			> GET / HTTP/1.1$Host: a$$
			>> GET / HTTP/1.1$Host: a$$
			< HTTP/1.1 200 OK$Content-Length: 10$$half
			<< HTTP/1.1 200 OK$Content-Length: 10$$half
			client is reset`,
			recorded{reason: flow.IdleTimeout, status: 200, flags: "SI", sent: 4}},
		{"of an upgrade are those of its response", func(short, long time.Duration) *route.Plan { return &route.Plan{Timeout: short} }, `
			> GET / HTTP/1.1$Host: a$Connection: Upgrade$Upgrade: x$$
			>> GET / HTTP/1.1$Host: a$Upgrade: x$Connection: Upgrade$x-envoy-expected-rq-timeout-ms: SHORT$$
			some time passes
			< HTTP/1.1 101 Switching$Connection: Upgrade$Upgrade: x$$
			<< HTTP/1.1 101 Switching$Upgrade: x$Connection: Upgrade$$
			some time passes
			> up
			>> up
			client closes
			upstream closes`,
			recorded{reason: flow.Closed, status: 101, received: 2}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			nettest.UnderLimit(t, 30*time.Millisecond, func(t testing.TB, limit time.Duration) {
				conversation{"", test.script, []recorded{test.want}}.playUnder(t, limit, withPlan(test.plan(limit, long(limit))))
			})
		})
	}
}

// unanswered returns an address that neither accepts nor refuses connections: the queue of its listener is full.
func unanswered(t *testing.T) netip.AddrPort {
	t.Helper()
	o := newOrigin(t)
	raw, err := o.listener.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if failed := raw.Control(func(fd uintptr) { err = unix.Listen(int(fd), 0) }); failed != nil || err != nil {
		t.Fatal(failed, err)
	}
	conn, err := net.Dial("tcp", o.address.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return o.address
}

// The limits of a route include the time in which a connection is made: an endpoint that has gone without a word, with its node,
// must not hold back a request for longer.
func TestLimitsOfARouteEndDials(t *testing.T) {
	t.Parallel()
	const limit = 50 * time.Millisecond
	silent, refusing := unanswered(t), nettest.Refusing(t)
	for name, c := range map[string]struct {
		plan  *route.Plan
		first netip.AddrPort
		flags string
	}{
		"of the response":  {&route.Plan{Timeout: limit}, silent, "UT"},
		"of the stream":    {&route.Plan{MaxStream: new(limit)}, silent, "UT"},
		"of both":          {&route.Plan{Timeout: time.Hour, MaxStream: new(limit)}, silent, "UT"},
		"of all attempts":  {&route.Plan{Timeout: limit, Retry: retrying(mesh.RetryConnectFailure, 5)}, refusing, "UT"},
		"although retries": {&route.Plan{Timeout: limit, Retry: retrying(mesh.RetryConnectFailure, 5)}, silent, "UT"},
	} {
		held := &leases{}
		r := newRig(t, silent, false, plain, func(c *Config) { c.ConnectTimeout = time.Hour })
		r.set(func() {
			r.router = &planned{leases: held, decide: func(q *Request, d *Decision) {
				if d.Plan = c.plan; q.Attempt == 0 {
					d.Target.Address = c.first
				}
			}}
		})
		client := r.dial(t)
		send(t, client, getHome)
		if got := head(t, bufio.NewReader(client)); !strings.HasPrefix(got, "HTTP/1.1 504 ") {
			t.Errorf("%s: read %q", name, got)
		}
		if got := r.records.await(t, 0); got.reason != flow.RequestTimeout || got.flags != c.flags {
			t.Errorf("%s: the record is %+v", name, got)
		}
		held.check(t, nil)
	}
}

// Requests fail at random, in random places: each lease ends once, and each response belongs to its request.
func TestLeasesEndOnceWhateverFails(t *testing.T) {
	t.Parallel()
	o := newOrigin(t)
	closed := nettest.Refusing(t)
	r := newRig(t, o.address, false, plain)
	held := &leases{}
	var mu sync.Mutex
	random := rand.New(rand.NewPCG(1, 2))
	chance := func(n int) bool {
		mu.Lock()
		defer mu.Unlock()
		return random.IntN(n) == 0
	}
	plan := &route.Plan{Timeout: 50 * time.Millisecond, Retry: retrying(mesh.Retry5xx|mesh.RetryReset, 3), CountAttempts: true}
	plan.Retry.TryTimeout = 20 * time.Millisecond
	r.set(func() {
		r.router = &planned{leases: held, decide: func(_ *Request, d *Decision) {
			d.Plan = plan
			switch {
			case chance(10):
				d.Target.Address = closed
			case chance(30):
				d.Reply = &route.Reply{Status: 503, Reason: flow.Overload}
			case chance(30):
				d.Target = upstream.Target{}
			case chance(20):
				d.Delay = time.Millisecond
			}
		}}
	})
	var servers, clients sync.WaitGroup
	servers.Go(func() {
		for {
			conn, err := o.listener.AcceptTCP()
			if err != nil {
				return
			}
			servers.Go(func() {
				defer conn.Close()
				conn.SetDeadline(time.Now().Add(nettest.Patience))
				reader := bufio.NewReader(conn)
				for {
					request, err := http.ReadRequest(reader)
					if err != nil || chance(6) {
						return
					}
					if !chance(6) {
						io.Copy(io.Discard, request.Body)
					}
					path := request.URL.Path
					switch {
					case chance(5):
						io.WriteString(conn, response("503 Busy"))
					case chance(20):
						io.WriteString(conn, "nonsense\r\n\r\n")
						return
					case chance(20):
						conn.SetReadDeadline(time.Now().Add(30 * time.Millisecond)) // it is silent, longer than an attempt may last
						reader.ReadByte()
						return
					case chance(20):
						io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
						return
					default:
						io.WriteString(conn, ok(path))
					}
				}
			})
		}
	})
	for worker := range 8 {
		clients.Go(func() {
			for round := range 40 {
				conn, err := net.Dial("tcp", r.address)
				if err != nil {
					t.Error(err)
					return
				}
				conn.SetDeadline(time.Now().Add(nettest.Patience))
				reader := bufio.NewReader(conn)
				for i := range 4 {
					path := fmt.Sprintf("/%d/%d/%d", worker, round, i)
					body := strings.Repeat("x", 1+worker*round*30)
					fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s", path, len(body), body)
					if chance(20) {
						break
					}
					response, err := http.ReadResponse(reader, nil)
					if err != nil {
						break
					}
					got, err := io.ReadAll(response.Body)
					if err == nil && response.StatusCode == 200 && string(got) != path {
						t.Errorf("the response to %s is %q", path, got)
					}
					if err != nil || response.Close {
						break
					}
				}
				conn.Close()
			}
		})
	}
	clients.Wait()
	o.listener.Close()
	within(t, "the sessions end", func() bool { return r.open.Load() == 0 })
	r.pool.Close()
	servers.Wait()
	held.check(t, nil)
}
