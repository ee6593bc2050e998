package route

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
)

// find returns the choice of a request among routes.
func find(r mesh.Route, request *Request) Choice {
	return Of(everything(mesh.VirtualHost{Routes: []mesh.Route{r}})).Find(request)
}

// everything returns a table of one virtual host, for all hosts.
func everything(h mesh.VirtualHost) *mesh.Routes {
	h.Domains = []mesh.Domain{{Kind: mesh.DomainAny}}
	return &mesh.Routes{Hosts: []mesh.VirtualHost{h}}
}

// outcome returns the outcome of a request by one route.
func outcome(r mesh.Route, request *Request) Outcome {
	c := find(r, request)
	return c.Outcome(request, false)
}

// context is a Context whose operators have their numbers as values.
type context struct {
	request  *Request
	response fieldList
	missing  bool // operators have no values
}

func (c *context) Request() Request { return *c.request }

func (c *context) ResponseFields() Fields {
	if c.response == nil {
		return nil
	}
	return c.response
}

func (c *context) AppendOperator(dst []byte, o Operator) []byte {
	if c.missing {
		return dst
	}
	return fmt.Appendf(dst, "<%d\r\n>", o)
}

// edited makes edits in the plainest way and returns the fields, each in a line.
func edited(edits []Edit, c Context, fields fieldList) string {
	var lines []string
	for i := 0; i < len(fields); i += 2 {
		lines = append(lines, fields[i]+": "+fields[i+1])
	}
	for i := range edits {
		e := &edits[i]
		named := func(line string) bool { return strings.HasPrefix(strings.ToLower(line), e.Name+": ") }
		value := string(e.AppendValue(nil, c))
		switch {
		case e.Remove:
			lines = slices.DeleteFunc(lines, named)
			continue
		case value == "" && !e.KeepEmpty,
			e.Action == mesh.AddIfAbsent && slices.ContainsFunc(lines, named),
			e.Action == mesh.OverwriteIfPresent && !slices.ContainsFunc(lines, named):
			continue
		case e.Action == mesh.OverwriteOrAdd, e.Action == mesh.OverwriteIfPresent:
			lines = slices.DeleteFunc(lines, named)
		}
		lines = append(lines, e.Name+": "+value)
	}
	return strings.Join(lines, "\n")
}

func add(name, value string, action mesh.EditAction) mesh.HeaderEdits {
	return mesh.HeaderEdits{Add: []mesh.HeaderEdit{{Name: name, Value: value, Action: action}}}
}

func TestValuesOfEdits(t *testing.T) {
	c := &context{request: request("GET http://host/path?q", "User-Agent", "curl", "Empty", ""), response: fieldList{"Server", "x"}}
	for value, want := range map[string]string{
		"":                                "",
		"plain":                           "plain",
		"100%%":                           "100%",
		"%%%%":                            "%%",
		"%REQ(user-agent)%":               "curl",
		"a%REQ(USER-AGENT):2%b":           "acub",
		"%REQ(x?User-Agent)%":             "curl",
		"%REQ(empty?User-Agent)%":         "",
		"%REQ(x)%":                        "",
		"%REQ(:path)% %REQ(:AUTHORITY)%":  "/path?q host",
		"%REQ(:method)%/%RESP(server)%":   "GET/x",
		"%RESP(x?SERVER)%":                "x",
		"%PROTOCOL%":                      fmt.Sprintf("<%d  >", Protocol),
		"[%DOWNSTREAM_REMOTE_ADDRESS%]%%": fmt.Sprintf("[<%d  >]%%", DownstreamRemoteAddress),
		"%START_TIME(%Y)%":                fmt.Sprintf("<%d  >", StartTime),
		"%MOON%":                          "",
		"a%MOON(x)%b":                     "ab",
		"a%REQ(x":                         "a",
		"a%":                              "a",
		"a%b":                             "a",
	} {
		e := compileEdit("name", value, 0, false)
		if got := string(e.AppendValue([]byte("before "), c)); got != "before "+want {
			t.Errorf("%q: %q, want %q", value, got, want)
		}
	}
	for name, operator := range operators {
		e := compileEdit("name", "%"+name+"%", 0, false)
		if got, want := string(e.AppendValue(nil, c)), fmt.Sprintf("<%d  >", operator); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	if len(operators) != int(ResponseCodeDetails) {
		t.Errorf("%d operators have names", len(operators))
	}
}

func TestEditsOfAWeightPrecedeThoseOfItsRouteHostAndTable(t *testing.T) {
	r := to("c")
	r.Forward.Clusters[0].Edits.Request = add("X", "weight", mesh.OverwriteOrAdd)
	r.Edits.Request = add("x", "route", mesh.OverwriteOrAdd)
	table := everything(mesh.VirtualHost{Routes: []mesh.Route{r}, Edits: mesh.Edits{Request: add("x", "host", mesh.OverwriteOrAdd)}})
	table.Edits.Request = add("x", "table", mesh.OverwriteOrAdd)
	reversed := everything(table.Hosts[0])
	reversed.Edits, reversed.SpecificEditsLast = table.Edits, true
	for _, test := range []struct {
		table *mesh.Routes
		want  string
	}{{table, "x: table"}, {reversed, "x: weight"}} {
		request := request("GET /")
		c := Of(test.table).Find(request)
		if got := edited(c.Outcome(request, false).Plan.RequestEdits, &context{request: request}, nil); got != test.want {
			t.Errorf("%q, want %q", got, test.want)
		}
	}
}

func TestFieldsOfOneLevelAreRemovedThenOverwrittenThenAdded(t *testing.T) {
	edits := mesh.HeaderEdits{Remove: []string{"A", "gone"}, Add: []mesh.HeaderEdit{
		{Name: "a", Value: "1"},
		{Name: "b", Value: "2", Action: mesh.OverwriteOrAdd},
		{Name: "b", Value: "3"},
		{Name: "c", Value: "4", Action: mesh.AddIfAbsent},
		{Name: "d", Value: "5", Action: mesh.AddIfAbsent},
		{Name: "e", Value: "6", Action: mesh.OverwriteIfPresent},
		{Name: "f", Value: "7", Action: mesh.OverwriteIfPresent},
		{Name: "g", Value: ""},
		{Name: "h", Value: "", KeepEmpty: true},
	}}
	got := edited(appendEdits(nil, &edits), &context{request: request("GET /")},
		fieldList{"a", "0", "A", "0", "Gone", "0", "b", "0", "c", "0", "e", "0", "kept", "0"})
	want := "c: 0\nkept: 0\nb: 2\ne: 6\na: 1\nb: 3\nd: 5\nh: "
	if got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestRewrites(t *testing.T) {
	prefix, exact, regex, separated := mesh.RouteMatch{Path: "/v1/"}, mesh.RouteMatch{Kind: mesh.PathExact, Path: "/old"}, mesh.RouteMatch{Kind: mesh.PathRegex, Path: "/[a-z]+"}, mesh.RouteMatch{Kind: mesh.PathSeparatedPrefix, Path: "/api"}
	root := mesh.RouteMatch{Path: "/"}
	for _, test := range []struct {
		match      mesh.RouteMatch
		prefix     string
		regex      *mesh.RegexRewrite
		path, want string
	}{
		{prefix, "", nil, "/v1/a?b", "/v1/a?b"},
		{prefix, "/", nil, "/v1/a?b#c", "/a?b#c"},
		{prefix, "/", nil, "/v1/", "/"},
		{root, "/v2", nil, "/foo", "/v2foo"}, // as Envoy does
		{exact, "/new", nil, "/old?q=/old", "/new?q=/old"},
		{regex, "/new", nil, "/abc?q", "/new?q"},
		{separated, "/", nil, "/api/x", "//x"},
		{separated, "/v2", nil, "/api", "/v2"},
		{prefix, "/", nil, "http://host/v1/a", "http://host/a"},
		{prefix, "", &mesh.RegexRewrite{Pattern: "/v1/([a-z]+)/([a-z]+)", Substitution: `/\2/\1/\0`}, "/v1/a/b?q=/v1/x/y", "/b/a//v1/a/b?q=/v1/x/y"},
		{prefix, "", &mesh.RegexRewrite{Pattern: "(1)()()()()()()()(/)", Substitution: `\9\1`}, "/v1/1", `/v/11`},
		{prefix, "", &mesh.RegexRewrite{Pattern: "1", Substitution: `$1\\`}, "/v1/1", `/v$1\/$1\`},
	} {
		r := to("c")
		r.Match = test.match
		r.Forward.PrefixRewrite, r.Forward.RegexRewrite = test.prefix, test.regex
		request := request("GET " + "/v1/")
		request.Path = []byte(test.path)
		plan := outcome(r, request).Plan
		if got := string(plan.AppendPath([]byte("GET "), request.Path)); got != "GET "+test.want {
			t.Errorf("%q with %q and %v: %q, want %q", test.path, test.prefix, test.regex, got, test.want)
		}
		original := ""
		if rewrites := test.prefix != "" || test.regex != nil; rewrites != plan.RewritesPath {
			t.Errorf("%q: rewrites %v", test.path, plan.RewritesPath)
		} else if rewrites {
			original = "x-envoy-original-path: " + test.path
		}
		if got := edited(plan.RequestEdits, &context{request: request}, nil); got != original {
			t.Errorf("%q: edits %q, want %q", test.path, got, original)
		}
	}
}

func TestTheHostIsRewrittenByTheWeightOrTheRoute(t *testing.T) {
	for _, test := range []struct {
		weight, route string
		forwarded     bool
		fields        []string
		want, edits   string
	}{
		{"", "", true, nil, "host", ""},
		{"", "r", false, nil, "r", ""},
		{"w", "r", true, nil, "w", "x-forwarded-host: host"},
		{"w", "", true, []string{"X-Forwarded-Host", "a"}, "w", "X-Forwarded-Host: a\nx-forwarded-host: host"},
		{"w", "", true, []string{"X-Forwarded-Host", "a, host"}, "w", "X-Forwarded-Host: a, host"},
	} {
		r := to("c")
		r.Forward.HostRewrite, r.Forward.Clusters[0].HostRewrite, r.Forward.ForwardedHost = test.route, test.weight, test.forwarded
		request := request("GET http://host/", test.fields...)
		plan := outcome(r, request).Plan
		if got := string(plan.AppendHost(nil, request.Authority)); got != test.want || plan.RewritesHost != (got != "host") {
			t.Errorf("%+v: %q", test, got)
		}
		if got := edited(plan.RequestEdits, &context{request: request}, test.fields); got != test.edits {
			t.Errorf("%+v: edits %q", test, got)
		}
	}
}

func TestRedirects(t *testing.T) {
	for _, test := range []struct {
		redirect mesh.Redirect
		match    mesh.RouteMatch
		request  *Request
		want     string
	}{
		{mesh.Redirect{}, mesh.RouteMatch{Path: "/"}, request("GET http://host/a?b"), "http://host/a?b"},
		{mesh.Redirect{Host: "new", Path: "/new"}, mesh.RouteMatch{Path: "/"}, request("GET http://host:80/a?b"), "http://new/new?b"},
		{mesh.Redirect{Path: "/new?x=1", StripQuery: true}, mesh.RouteMatch{Path: "/"}, request("GET http://host/a?b"), "http://host/new?x=1"},
		{mesh.Redirect{Path: "new", StripQuery: true}, mesh.RouteMatch{Path: "/"}, request("GET http://host/a?b"), "http://host/new"},
		{mesh.Redirect{Prefix: "/n"}, mesh.RouteMatch{Path: "/a/"}, request("GET http://host/a/b?c"), "http://host/nb?c"},
		{mesh.Redirect{Prefix: "/n", StripQuery: true}, mesh.RouteMatch{Kind: mesh.PathExact, Path: "/a"}, request("GET http://host/a?c"), "http://host/n"},
		{mesh.Redirect{Regex: &mesh.RegexRewrite{Pattern: "^/(.*)/x", Substitution: `/y/\1`}}, mesh.RouteMatch{Path: "/"}, request("GET http://host/a/x?c"), "http://host/y/a?c"},
		{mesh.Redirect{Scheme: "https"}, mesh.RouteMatch{Path: "/"}, request("GET http://host:80/", "x-forwarded-proto", "http"), "https://host/"},
		{mesh.Redirect{Scheme: "https"}, mesh.RouteMatch{Path: "/"}, request("GET http://host:81/"), "https://host:81/"},
		{mesh.Redirect{Scheme: "https", Port: 8443}, mesh.RouteMatch{Path: "/"}, request("GET http://[2001:db8::1]:81/"), "https://[2001:db8::1]:8443/"},
		{mesh.Redirect{Scheme: "http"}, mesh.RouteMatch{Path: "/"}, request("GET https://host:443/"), "http://host/"},
		{mesh.Redirect{}, mesh.RouteMatch{Path: "/"}, request("GET https://host:443/"), "https://host:443/"},
	} {
		test.redirect.Code = 307
		reply := outcome(mesh.Route{Match: test.match, Redirect: &test.redirect}, test.request).Reply
		if reply == nil || reply.Status != 307 || !slices.Equal(reply.Fields, []Field{{"location", test.want}}) || reply.Details != envoy.DetailsDirectResponse || !reply.Edited {
			t.Errorf("%+v: %+v, want %s", test.redirect, reply, test.want)
		}
	}
}

// A request without a host cannot be redirected to its host. It is malformed.
func TestARedirectNeedsAHost(t *testing.T) {
	for _, target := range []string{"GET http:///a", "GET http://:8080/a"} {
		for name, route := range map[string]mesh.Redirect{"same host": {Code: 301, Scheme: "https", Port: 8443}, "same host and port": {Code: 301, Scheme: "https"}} {
			if reply := outcome(mesh.Route{Match: mesh.RouteMatch{Path: "/"}, Redirect: &route}, request(target)).Reply; reply != noHost {
				t.Errorf("%s, %s: %+v", target, name, reply)
			}
		}
		named := mesh.Redirect{Code: 301, Host: "new"}
		if reply := outcome(mesh.Route{Match: mesh.RouteMatch{Path: "/"}, Redirect: &named}, request(target)).Reply; reply.Status != 301 {
			t.Errorf("%s to another host: %+v", target, reply)
		}
		if c := Of(everything(mesh.VirtualHost{RequireTLS: mesh.TLSRequired, Routes: []mesh.Route{to("c")}})).Find(request(target)); c.Reply != noHost {
			t.Errorf("%s to HTTPS: %+v", target, c.Reply)
		}
	}
	if noHost.Status != 400 || noHost.Details != envoy.DetailsMissingHost || noHost.Reason != flow.BadFraming {
		t.Errorf("the reply is %+v", noHost)
	}
}

func TestAVirtualHostThatRequiresTLSRedirectsToIt(t *testing.T) {
	for _, test := range []struct {
		require mesh.RequireTLS
		request *Request
		want    string
	}{
		{mesh.TLSRequired, request("GET http://host/a?b"), "301 [{location https://host/a?b}]"},
		{mesh.TLSRequired, request("GET http://host/", "X-Forwarded-Proto", "https"), "c"},
		{mesh.TLSRequired, request("GET https://host/"), "c"},
		{mesh.TLSRequired, request("GET https://host/", "x-forwarded-proto", "http"), "301 [{location https://host/}]"},
		{mesh.TLSRequiredExternally, request("GET http://host/"), "301 [{location https://host/}]"},
		{mesh.TLSRequiredExternally, request("GET http://host/", "x-envoy-internal", "true"), "c"},
		{mesh.TLSNotRequired, request("GET http://host/"), "c"},
	} {
		got := result(Of(everything(mesh.VirtualHost{RequireTLS: test.require, Routes: []mesh.Route{to("c")}})).Find(test.request))
		if want := strings.Replace(test.want, "301 ", "301", 1); strings.Replace(got, "301 ", "301", 1) != want {
			t.Errorf("%v: %s, want %s", test.require, got, test.want)
		}
	}
}

func TestDirectResponses(t *testing.T) {
	r := mesh.Route{Match: mesh.RouteMatch{Path: "/"}, Respond: &mesh.Response{Status: 418, Body: []byte("short and stout")}}
	r.Edits.Response = add("a", "b", 0)
	o := outcome(r, request("GET /"))
	if o.Reply.Status != 418 || o.Reply.Body != "short and stout" || !o.Reply.Edited || o.Reply.Reason != flow.Completed || len(o.Plan.ResponseEdits) != 1 {
		t.Errorf("%+v", o.Reply)
	}
}

func TestFaultsAreDrawnOneByOne(t *testing.T) {
	half := mesh.Fraction{Numerator: 50, Denominator: 100}
	fault := &mesh.Fault{Delay: time.Second, DelayFraction: half, Abort: &mesh.Abort{Status: 503}, AbortFraction: mesh.Fraction{Numerator: 500_000, Denominator: 1_000_000}}
	for _, test := range []struct {
		draws []uint64
		delay time.Duration
		abort bool
	}{
		{[]uint64{0, 0}, time.Second, true},
		{[]uint64{49, 499_999}, time.Second, true},
		{[]uint64{50, 0}, 0, true},
		{[]uint64{0, 500_000}, time.Second, false},
		{[]uint64{150, 1_500_000}, 0, false},
	} {
		r := to("c")
		r.Filters.Fault = fault
		request := request("GET /")
		request.Random = draw(test.draws...)
		o := outcome(r, request)
		if o.Delay != test.delay || (o.Reply != nil) != test.abort || o.Plan == nil {
			t.Errorf("%v: %+v", test.draws, o)
		}
		if test.abort && (o.Reply.Status != 503 || o.Reply.Body != "fault filter abort" || o.Reply.Flags != "FI" || o.Reply.Details != "fault_filter_abort" || o.Reply.Edited) {
			t.Errorf("%+v", o.Reply)
		}
	}
}

// The rate of responses is drawn before the other faults, as in Envoy.
func TestRatesOfResponsesAreDrawn(t *testing.T) {
	half := mesh.Fraction{Numerator: 50, Denominator: 100}
	r := to("c")
	r.Filters.Fault = &mesh.Fault{Rate: 8 << 10, RateFraction: half, Delay: time.Second, DelayFraction: half}
	for _, test := range []struct {
		draws []uint64
		rate  uint64
		delay time.Duration
	}{{[]uint64{49, 50}, 8 << 10, 0}, {[]uint64{50, 49}, 0, time.Second}} {
		request := request("GET /")
		request.Random = draw(test.draws...)
		if o := outcome(r, request); o.ResponseRate != test.rate || o.Delay != test.delay || o.Reply != nil {
			t.Errorf("%v: %+v", test.draws, o)
		}
	}
}

func TestTheMostSpecificFaultCounts(t *testing.T) {
	all := mesh.Fraction{Numerator: 100, Denominator: 100}
	abort := func(status int) mesh.RouteFilters {
		return mesh.RouteFilters{Fault: &mesh.Fault{Abort: &mesh.Abort{Status: status}, AbortFraction: all}}
	}
	jason := abort(1)
	jason.Fault.Headers = []mesh.HeaderMatcher{{Name: "end-user", Kind: mesh.HeaderText, Text: mesh.StringMatcher{Text: "jason"}}}
	other := abort(1)
	other.Fault.Cluster = "other"
	grpc := mesh.RouteFilters{Fault: &mesh.Fault{Abort: &mesh.Abort{GRPC: new(uint32(14)), Body: "b"}, AbortFraction: all}}
	off := mesh.RouteFilters{Fault: &mesh.Fault{Disabled: true}}
	for _, test := range []struct {
		name                       string
		weight, route, host, table mesh.RouteFilters
		fields                     []string
		want                       string
	}{
		{"none", mesh.RouteFilters{}, mesh.RouteFilters{}, mesh.RouteFilters{}, mesh.RouteFilters{}, nil, ""},
		{"the table's", mesh.RouteFilters{}, mesh.RouteFilters{}, mesh.RouteFilters{}, abort(4), nil, "4"},
		{"the host's", mesh.RouteFilters{}, mesh.RouteFilters{}, abort(3), abort(4), nil, "3"},
		{"the route's", mesh.RouteFilters{}, abort(2), abort(3), abort(4), nil, "2"},
		{"the weight's", abort(1), abort(2), abort(3), abort(4), nil, "1"},
		{"turned off", mesh.RouteFilters{}, off, abort(3), abort(4), nil, ""},
		{"for others", mesh.RouteFilters{}, jason, abort(3), abort(4), []string{"end-user", "x"}, ""},
		{"for this one", mesh.RouteFilters{}, jason, abort(3), abort(4), []string{"end-user", "jason"}, "1"},
		{"for another cluster", mesh.RouteFilters{}, other, abort(3), abort(4), nil, ""},
		{"of gRPC", mesh.RouteFilters{}, grpc, abort(3), abort(4), nil, "200 14 b"},
	} {
		r := to("c")
		r.Forward.Clusters[0].Filters, r.Filters = test.weight, test.route
		table := everything(mesh.VirtualHost{Routes: []mesh.Route{r}, Filters: test.host})
		table.Filters = test.table
		request := request("GET /", test.fields...)
		c := Of(table).Find(request)
		got := ""
		if reply := c.Outcome(request, false).Reply; reply != nil && reply.GRPC != nil {
			got = fmt.Sprint(reply.Status, *reply.GRPC, " ", reply.Body)
		} else if reply != nil {
			got = fmt.Sprint(reply.Status)
		}
		if got != test.want {
			t.Errorf("%s: %q, want %q", test.name, got, test.want)
		}
		c.Fault = abort(5).Fault
		if reply := c.Outcome(request, false).Reply; (reply != nil && reply.Status == 5) != (test.name == "none") {
			t.Errorf("%s: %+v with the filter's fault", test.name, reply)
		}
	}
}

func TestActiveFaultsAreLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := to("c")
		r.Filters.Fault = &mesh.Fault{Delay: time.Second, DelayFraction: mesh.Fraction{Numerator: 100, Denominator: 100}, MaxActive: new(uint32(2))}
		table := Of(everything(mesh.VirtualHost{Routes: []mesh.Route{r}}))
		delays := func() (n int) {
			for range 5 {
				request := request("GET /")
				c := table.Find(request)
				if c.Outcome(request, false).Delay > 0 {
					n++
				}
			}
			return n
		}
		if n := delays(); n != 2 {
			t.Errorf("%d requests are delayed", n)
		}
		time.Sleep(2 * time.Second)
		if n := delays(); n != 2 {
			t.Errorf("%d requests are delayed afterwards", n)
		}
		time.Sleep(2 * time.Second)
	})
}

func TestCrossOriginRequests(t *testing.T) {
	yes, no := true, false
	always := mesh.Fraction{Numerator: 100, Denominator: 100}
	policy := func(change func(*mesh.CORS)) mesh.RouteFilters {
		c := &mesh.CORS{Enabled: always}
		change(c)
		return mesh.RouteFilters{CORS: c}
	}
	origins := func(texts ...string) (m []mesh.StringMatcher) {
		for _, text := range texts {
			m = append(m, mesh.StringMatcher{Text: text})
		}
		return m
	}
	ours := policy(func(c *mesh.CORS) {
		c.Origins, c.Methods, c.MaxAge, c.Credentials, c.Expose = origins("https://a"), "GET", "60", &yes, "x%y"
	})
	forwarding := policy(func(c *mesh.CORS) { c.Origins, c.ForwardUnmatched = origins("https://a"), &no })
	wild := policy(func(c *mesh.CORS) { c.Origins, c.Methods, c.Headers, c.PrivateNetwork = origins("*"), "*", "*", &yes })
	regex := policy(func(c *mesh.CORS) { c.Origins = []mesh.StringMatcher{{Kind: mesh.MatchRegex, Text: "https://.*"}} })
	never := policy(func(c *mesh.CORS) { c.Origins, c.Enabled = origins("https://a"), mesh.Fraction{Denominator: 100} })
	preflight := func(origin string, more ...string) *Request {
		return request("OPTIONS /", append([]string{"Origin", origin, "Access-Control-Request-Method", "PUT"}, more...)...)
	}
	off := mesh.RouteFilters{CORS: &mesh.CORS{Disabled: true}}
	for _, test := range []struct {
		name        string
		route, host mesh.RouteFilters
		request     *Request
		want        string
	}{
		{"no policy", mesh.RouteFilters{}, mesh.RouteFilters{}, preflight("https://a"), "edits"},
		{"a preflight", ours, mesh.RouteFilters{}, preflight("https://a"), "200 [{access-control-allow-origin https://a} {access-control-allow-credentials true} {access-control-allow-methods GET} {access-control-max-age 60}]"},
		{"a preflight of another origin goes on", ours, mesh.RouteFilters{}, preflight("https://b"), "edits"},
		{"a preflight of another origin is answered", forwarding, mesh.RouteFilters{}, preflight("https://b"), "200 []"},
		{"stars", wild, mesh.RouteFilters{}, preflight("null", "access-control-request-headers", "x, y", "access-control-request-private-network", "true"), "200 [{access-control-allow-origin null} {access-control-allow-methods PUT} {access-control-allow-headers x, y} {access-control-allow-private-network true}]"},
		{"a regular expression", regex, mesh.RouteFilters{}, preflight("https://b"), "200 [{access-control-allow-origin https://b}]"},
		{"fields of two policies", forwarding, policy(func(c *mesh.CORS) { c.MaxAge, c.ForwardUnmatched = "9", &yes }), preflight("https://b"), "200 [{access-control-max-age 9}]"},
		{"turned off by the route", off, ours, preflight("https://a"), "edits"},
		{"turned off by the host", ours, off, preflight("https://b"), "edits"},
		{"not enabled", never, ours, preflight("https://a"), "edits"},
		{"a request", ours, mesh.RouteFilters{}, request("GET /", "origin", "https://a"), "edits access-control-allow-origin: https://a\naccess-control-allow-credentials: true\naccess-control-expose-headers: x%y"},
		{"a request of another origin", ours, mesh.RouteFilters{}, request("GET /", "origin", "https://b"), "edits"},
		{"a request of no origin", wild, mesh.RouteFilters{}, request("GET /"), "edits"},
		{"OPTIONS that is no preflight", wild, mesh.RouteFilters{}, request("OPTIONS /", "origin", "x"), "edits access-control-allow-origin: x"},
	} {
		r := to("c")
		r.Filters = test.route
		c := Of(everything(mesh.VirtualHost{Routes: []mesh.Route{r}, Filters: test.host})).Find(test.request)
		o := c.Outcome(test.request, false)
		got := strings.TrimSpace("edits " + edited(o.Plan.ResponseEdits, &context{request: test.request}, nil))
		if o.Reply != nil {
			got = fmt.Sprintf("%d %v", o.Reply.Status, o.Reply.Fields)
		}
		if got != test.want {
			t.Errorf("%s: %s\nwant %s", test.name, got, test.want)
		}
	}
}

func TestTimeouts(t *testing.T) {
	second := time.Second
	seconds := func(n int) *time.Duration { return new(time.Duration(n) * second) }
	for _, test := range []struct {
		name    string
		forward mesh.Forward
		grpc    bool
		fields  []string
		want    [3]time.Duration
	}{
		{"none", mesh.Forward{}, false, nil, [3]time.Duration{}},
		{"the route's", mesh.Forward{Timeout: 5 * second, Retry: &mesh.RetryPolicy{TryTimeout: second}}, true, []string{"grpc-timeout", "1S"}, [3]time.Duration{5 * second, second}},
		{"of a try, too long", mesh.Forward{Timeout: second, Retry: &mesh.RetryPolicy{TryTimeout: second}}, false, nil, [3]time.Duration{second}},
		{"of gRPC", mesh.Forward{Timeout: 5 * second, MaxGRPCTimeout: seconds(0)}, true, []string{"grpc-timeout", "7S"}, [3]time.Duration{7 * second}},
		{"of gRPC, absent", mesh.Forward{Timeout: 5 * second, MaxGRPCTimeout: seconds(0)}, true, nil, [3]time.Duration{}},
		{"of gRPC, bounded", mesh.Forward{Timeout: 5 * second, MaxGRPCTimeout: seconds(3)}, true, []string{"grpc-timeout", "7S"}, [3]time.Duration{3 * second}},
		{"of gRPC, absent and bounded", mesh.Forward{MaxGRPCTimeout: seconds(3)}, true, nil, [3]time.Duration{3 * second}},
		{"of a request that is not gRPC's", mesh.Forward{Timeout: 5 * second, MaxGRPCTimeout: seconds(3)}, false, []string{"grpc-timeout", "7S"}, [3]time.Duration{5 * second}},
		{"of the stream", mesh.Forward{Timeout: 5 * second, MaxStreamLength: seconds(9)}, false, nil, [3]time.Duration{2: 9 * second}},
		{"of gRPC's stream", mesh.Forward{Timeout: 5 * second, MaxGRPCTimeout: seconds(1), MaxStreamLength: seconds(0), MaxGRPCStream: seconds(0)}, true, []string{"grpc-timeout", "7S"}, [3]time.Duration{2: 7 * second}},
		{"of gRPC's stream, absent", mesh.Forward{MaxStreamLength: seconds(9), MaxGRPCStream: seconds(0)}, true, nil, [3]time.Duration{2: 9 * second}},
		{"of the request's fields", mesh.Forward{Timeout: 5 * second}, false, []string{"X-Envoy-Upstream-Rq-Timeout-Ms", "250", "x-envoy-upstream-rq-per-try-timeout-ms", "100"}, [3]time.Duration{250 * time.Millisecond, 100 * time.Millisecond}},
		{"of the request's fields, malformed", mesh.Forward{Timeout: 5 * second}, false, []string{"x-envoy-upstream-rq-timeout-ms", "1s"}, [3]time.Duration{5 * second}},
	} {
		r := to("c")
		test.forward.Clusters = r.Forward.Clusters
		r.Forward = &test.forward
		request := request("GET /", test.fields...)
		request.GRPC = test.grpc
		var got [3]time.Duration
		got[0], got[1], got[2] = outcome(r, request).Plan.Timeouts(request)
		if got != test.want {
			t.Errorf("%s: %v, want %v", test.name, got, test.want)
		}
	}
}

func TestTimeoutsOfGRPC(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"1H": time.Hour, "2M": 2 * time.Minute, "3S": 3 * time.Second, "4m": 4 * time.Millisecond, "5000u": 5 * time.Millisecond, "1u": time.Millisecond, "1n": time.Millisecond,
		"0m": 0, "99999999H": math.MaxInt64 / time.Hour * time.Hour, "": -1, "S": -1, "1": -1, "1s": -1, "-1S": -1, "1 S": -1, "123456789S": -1,
	} {
		got, ok := parseGRPCTimeout([]byte(text))
		if ok != (want >= 0) || ok && got != want {
			t.Errorf("%q: %v, %v, want %v", text, got, ok, want)
		}
	}
}

func TestClustersAreDrawnByTheirWeights(t *testing.T) {
	r := to("a")
	r.Forward.Clusters = []mesh.WeightedCluster{{Name: "a", Weight: 3}, {Name: "b"}, {Name: "c", Weight: 2}}
	got := ""
	for i := range uint64(10) {
		request := request("GET /")
		request.Random = draw(i)
		got += find(r, request).Cluster.Name
	}
	if got != "aaaccaaacc" {
		t.Errorf("%s", got)
	}
	counts := map[string]int{}
	for range 10_000 {
		counts[find(r, request("GET /")).Cluster.Name]++
	}
	if counts["b"] > 0 || counts["a"] < 5700 || counts["a"] > 6300 {
		t.Errorf("%v", counts)
	}
}

func TestWhatARouteLacksIsItsHostsOrItsTables(t *testing.T) {
	retry, mirror := &mesh.RetryPolicy{Retries: 7}, mesh.Mirror{Cluster: "m", Fraction: mesh.Fraction{Numerator: 1, Denominator: 2}}
	own := to("c")
	own.Forward.Retry, own.Forward.Mirrors, own.Operation = &mesh.RetryPolicy{}, []mesh.Mirror{{Cluster: "own"}}, "operation"
	own.Match.Path = "/own"
	table := everything(mesh.VirtualHost{Routes: []mesh.Route{own, to("c")}, Retry: retry, CountAttempts: true, CountInResponses: true})
	table.Mirrors = []mesh.Mirror{mirror}
	r := request("GET /")
	c := Of(table).Find(r)
	if p := c.Outcome(r, false).Plan; p.Retry != retry || len(p.Mirrors) != 1 || p.Mirrors[0].Cluster != "m" || !p.CountAttempts || !p.CountInResponses {
		t.Errorf("%+v", p)
	}
	r.Random = draw(0, 1)
	if !r.Drawn(&mirror) || r.Drawn(&mirror) || r.Drawn(&mesh.Mirror{}) {
		t.Error("the mirror is not drawn by its fraction")
	}
	r = request("GET /own")
	c = Of(table).Find(r)
	if p := c.Outcome(r, false).Plan; p.Retry != own.Forward.Retry || p.Mirrors[0].Cluster != "own" || p.Operation != "operation" {
		t.Errorf("%+v", p)
	}
	if c.Cluster.NotFound.Status != 503 || c.Cluster.NotFound.Flags != envoy.FlagNoClusterFound {
		t.Errorf("%+v", c.Cluster.NotFound)
	}
}

func TestThePolicyOfTheMostSpecificPartCounts(t *testing.T) {
	policies := func(name string) mesh.RouteFilters {
		return mesh.RouteFilters{Policies: []mesh.RoutePolicy{{Filter: "other"}, {Filter: "rbac", Requirement: name}}}
	}
	r, plain := to("c"), to("d")
	r.Match.Path = "/r"
	r.Filters = policies("route")
	table := everything(mesh.VirtualHost{Routes: []mesh.Route{r, plain}, Filters: policies("host")})
	table.Filters = mesh.RouteFilters{Policies: []mesh.RoutePolicy{{Filter: "jwt", Requirement: "table"}}}
	for path, want := range map[string]string{"/r": "route", "/": "host", "x": "host"} {
		c := Of(table).Find(request("GET " + path))
		if p := c.Policy("rbac"); p == nil || p.Requirement != want {
			t.Errorf("%s: %+v, want %s", path, p, want)
		}
		if p := c.Policy("jwt"); p == nil || p.Requirement != "table" || c.Policy("none") != nil {
			t.Errorf("%s: %+v", path, p)
		}
	}
}

// A value of an edit never ends its field, whatever its text and what clients and certificates have.
func FuzzEdits(f *testing.F) {
	f.Add("%REQ(user-agent?x):3%%%", "curl")
	f.Add("a%REQ(", "\x00")
	f.Add("%(%:%RESP(server):-1%%START_TIME(%Y)%", "")
	f.Fuzz(func(t *testing.T, value, field string) {
		if strings.ContainsAny(value+field, "\r\n\x00") {
			return // the routes' decoder and the codecs reject them
		}
		c := &context{request: request("GET http://host/path", "user-agent", field, "x", field), response: fieldList{"server", field}}
		e := compileEdit("name", value, mesh.AppendOrAdd, false)
		got := e.AppendValue([]byte("before"), c)
		if text, ok := strings.CutPrefix(string(got), "before"); !ok || strings.ContainsAny(text, "\r\n\x00") {
			t.Fatalf("%q with %q: %q", value, field, got)
		}
		if !strings.Contains(value, "%") && string(got) != "before"+value {
			t.Fatalf("%q: %q", value, got)
		}
	})
}
