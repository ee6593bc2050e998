package route

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

// pushes returns the routes that istiod pushed in each case. A test with generated types wrote the file.
func pushes(t testing.TB) map[string]*mesh.Routes {
	t.Helper()
	packed, err := os.ReadFile("testdata/pushes.gz")
	if err != nil {
		t.Fatal(err)
	}
	r, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		t.Fatal(err)
	}
	rest, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	next := func() []byte {
		size, n := binary.Uvarint(rest)
		part := rest[n : n+int(size)]
		rest = rest[n+int(size):]
		return part
	}
	all := map[string]*mesh.Routes{}
	for len(rest) > 0 {
		name := string(next())
		routes, findings, err := mesh.DecodeRoutes(next())
		if err != nil || len(findings) > 0 {
			t.Fatalf("%s: %v, %v", name, err, findings)
		}
		all[name] = routes
	}
	return all
}

// found describes what becomes of a request.
func found(table *Table, r *Request) string {
	c := table.Find(r)
	o := c.Outcome(r, false)
	s := result(c)
	if c.Reply != nil {
		return s
	}
	if c.Route.Name != "" {
		s = c.Route.Name + " " + s
	}
	if o.Delay > 0 {
		s += fmt.Sprint(" after ", o.Delay)
	}
	if o.Reply != nil {
		s += fmt.Sprint(" answers ", o.Reply.Status, " ", o.Reply.Body, o.Reply.Fields)
	}
	if o.Plan.RewritesHost || o.Plan.RewritesPath {
		s += fmt.Sprintf(" as %s%s", o.Plan.AppendHost(nil, r.Authority), o.Plan.AppendPath(nil, r.Path))
	}
	if total, try, _ := o.Plan.Timeouts(r); total > 0 {
		s += fmt.Sprint(" within ", total, " ", try)
	}
	c1 := &context{request: r}
	fields := r.Fields.(fieldList)
	if edits := slices.DeleteFunc(slices.Clone(o.Plan.RequestEdits), func(e Edit) bool { return e.Name == "x-envoy-original-path" }); len(edits) > 0 {
		s += fmt.Sprintf(" with %q", edited(edits, c1, fields))
	}
	if len(o.Plan.ResponseEdits) > 0 {
		s += fmt.Sprintf(" back with %q", edited(o.Plan.ResponseEdits, c1, nil))
	}
	for i := range o.Plan.Mirrors {
		s += fmt.Sprint(" and to ", o.Plan.Mirrors[i].Cluster, " ", r.Drawn(&o.Plan.Mirrors[i]))
	}
	return s
}

const (
	reviews1 = "outbound|9080|v1|reviews.default.svc.cluster.local"
	reviews2 = "outbound|9080|v2|reviews.default.svc.cluster.local"
	reviews  = "outbound|9080||reviews.default.svc.cluster.local"
	nginx    = "outbound|80||nginx-service.default.svc.cluster.local"
	headless = "outbound|8080||headless.default.svc.cluster.local"
	jason    = "jason " + reviews2 + ` with "x-routed: yes\nx-more: 1" back with "x-ver: v2"`
)

// Requests go where the control plane's routes send them.
func TestRequestsOfRecordedPushes(t *testing.T) {
	all := pushes(t)
	if len(all) < 80 {
		t.Errorf("only %d tables", len(all))
	}
	for _, test := range []struct {
		table   string
		request *Request
		draws   []uint64
		want    string
	}{
		{"00-plain/9080", request("GET http://reviews:9080/x"), nil, "default " + reviews},
		{"00-plain/9080", request("GET http://Reviews.Default.svc.cluster.local./x"), nil, "default " + reviews},
		{"00-plain/9080", request("GET http://198.51.100.200:9080/x"), nil, "default " + reviews},
		{"00-plain/9080", request("GET http://reviews.other:9080/x"), nil, "allow_any PassthroughCluster"},
		{"00-plain/9080", request("CONNECT "), nil, "no route"},
		{"00-plain/8080", request("GET http://pod-0.headless.default/"), nil, "default " + headless},
		{"00-plain/8080", request("GET http://.headless.default/"), nil, "allow_any PassthroughCluster"},
		{"01-weighted/9080", request("GET http://reviews/"), []uint64{89}, reviews1},
		{"01-weighted/9080", request("GET http://reviews/"), []uint64{90}, reviews2},
		{"01-weighted/9080", request("GET http://reviews/"), []uint64{199}, reviews2},
		{"01-weighted/9080", request("GET http://reviews/"), []uint64{200}, reviews1},
		{"02-header-match/9080", request("GET http://reviews/api/x", "End-User", "jason", "X-Routed", "no", "x-drop", "1"), nil,
			"jason " + reviews2 + ` with "End-User: jason\nx-routed: yes\nx-more: 1" back with "x-ver: v2"`},
		{"02-header-match/9080", request("GET http://reviews/apix", "end-user", "jason"), nil, reviews1},
		{"02-header-match/9080", request("GET http://reviews/", "x-canary", "v12"), nil, strings.Replace(jason, `with "`, `with "x-canary: v12\n`, 1)},
		{"02-header-match/9080", request("GET http://reviews/", "x-canary", "v12x"), nil, reviews1},
		{"02-header-match/9080", request("GET http://reviews/", "x-canary", "v1", "x-canary", "v2"), nil, reviews1},
		{"02-header-match/9080", request("POST http://reviews/", "x-canary", "v12"), nil, reviews1},
		{"02-header-match/9080", request("GET http://reviews/?a=b&debug=1"), nil, jason},
		{"02-header-match/9080", request("GET http://reviews/?debug=1", "x-skip", ""), nil, reviews1},
		{"02-header-match/9080", request("GET http://reviews/?debug=11"), nil, reviews1},
		{"02-header-match/9080", request("GET http://reviews/EXACT?q"), nil, jason},
		{"02-header-match/9080", request("GET http://reviews/exact/"), nil, reviews1},
		{"02-header-match/9080", request("GET http://reviews:9080/old?q=1"), nil, "redirect  answers 302 [{location http://new.example.test/new?q=1}]"},
		{"02-header-match/9080", request("GET http://reviews/teapot"), nil, "direct  answers 418 short and stout[]"},
		{"02-header-match/9080", request("GET http://reviews/v1/a?b"), []uint64{250_000}, "rewrite " + reviews1 + " as internal.example.test/a?b and to " + reviews2 + " false"},
		{"02-header-match/9080", request("GET http://reviews/v1/a?b"), []uint64{249_999}, "rewrite " + reviews1 + " as internal.example.test/a?b and to " + reviews2 + " true"},
		{"02-header-match/9080", request("OPTIONS http://reviews/v1/a", "origin", "https://example.test", "access-control-request-method", "GET"), nil,
			"rewrite " + reviews1 + " answers 200 [{access-control-allow-origin https://example.test} {access-control-allow-methods GET} {access-control-max-age 86400}] as internal.example.test/a" +
				` back with "access-control-allow-origin: https://example.test" and to ` + reviews2 + " true"},
		{"03-fault/9080", request("GET http://reviews/", "end-user", "jason"), nil, reviews1 + " after 7s"},
		{"03-fault/9080", request("GET http://reviews/"), []uint64{99_999}, reviews1 + " answers 503 fault filter abort[]"},
		{"03-fault/9080", request("GET http://reviews/"), []uint64{100_000}, reviews1},
		{"04-retries-timeouts/9080", request("GET http://reviews/never"), nil, reviews},
		{"04-retries-timeouts/9080", request("GET http://reviews/"), nil, reviews + " within 3s 1s"},
		{"08-serviceentry/80", request("GET http://api.example.test/"), nil, "default outbound|80||api.example.test"},
		{"08-serviceentry/80", request("GET http://a.b.wild.example.test/"), nil, "default outbound|80||*.wild.example.test"},
		{"08-serviceentry/80", request("GET http://240.240.0.1/"), nil, "default outbound|80||api.example.test"},
		{"09-sidecar/15010", request("GET http://example.org/"), nil, "block_all  answers 502 []"},
		{"10-gateway/gateway/http.80", request("GET http://www.example.test:8080/"), nil, nginx},
		{"10-gateway/gateway/http.80", request("GET http://other.example.test/"), nil, "no route"},
		{"11-gateway-tls/gateway/http.80", request("GET http://shop.example.test/reviews"), nil, "301 [{location https://shop.example.test/reviews}]"},
		{"11-gateway-tls/gateway/https.443.https.ingress.default", request("GET https://shop.example.test/reviewsx"), nil, reviews},
	} {
		routes := all[test.table]
		if routes == nil {
			t.Fatalf("no table %s", test.table)
		}
		test.request.Random = draw(test.draws...)
		got := strings.Replace(found(Of(routes), test.request), "301[", "301 [", 1)
		if got != test.want {
			t.Errorf("%s: %s %s%s %q:\n%s\nwant\n%s", test.table, test.request.Method, test.request.Authority, test.request.Path, test.request.Fields, got, test.want)
		}
	}
}

func TestRetriesOfRecordedPushes(t *testing.T) {
	all := pushes(t)
	for path, want := range map[string]string{"/never": "0", "/": "3 1s 5xx"} {
		r := request("GET http://reviews" + path)
		c := Of(all["04-retries-timeouts/9080"]).Find(r)
		retry := c.Outcome(r, false).Plan.Retry
		got := "0"
		if retry != nil && retry.On&mesh.Retry5xx != 0 {
			got = fmt.Sprint(retry.Retries, " ", retry.TryTimeout, " 5xx")
		}
		if got != want {
			t.Errorf("%s: %s, want %s", path, got, want)
		}
	}
	r := request("GET http://reviews/", "x-user", "jason")
	c := Of(all["04-retries-timeouts/9080"]).Find(r)
	if hash, ok := c.Cluster.Hash(r); !ok || hash != text("jason") {
		t.Errorf("hash %x, %v", hash, ok)
	}
}

// Each table has an outcome for every request, and its route is that of the reference.
func FuzzRequests(f *testing.F) {
	var tables []*mesh.Routes
	all := pushes(f)
	names := slices.Sorted(maps.Keys(all))
	for _, name := range names {
		tables = append(tables, all[name])
	}
	f.Add("GET", "reviews", "/v1/a?b#c", "End-User", "jason")
	f.Add("OPTIONS", "[::1]:80", "http://x/old", "origin", "https://example.test")
	f.Add("", ":", "*", ":path", "")
	f.Fuzz(func(t *testing.T, method, authority, path, name, value string) {
		r := request(method + " ")
		r.Path, r.Authority = []byte(path), []byte(authority)
		r.Fields = fieldList{name, value, "access-control-request-method", "PUT", "cookie", value, name, value}
		r.Random = draw() // of weighted clusters the first
		for i, routes := range tables {
			c := Of(routes).Find(r)
			o := c.Outcome(r, true)
			if want := referenceFind(routes, r); path[:min(1, len(path))] == "/" && utf8.ValidString(authority+path+name+value) && c.Host != nil && c.Host.RequireTLS == 0 && result(c) != want {
				t.Fatalf("%s: %s, want %s", names[i], result(c), want)
			}
			if o.Reply == nil && (o.Plan == nil || c.Cluster == nil || c.Cluster.Name == "") {
				t.Fatalf("%s: neither reply nor cluster", names[i])
			}
			if o.Plan != nil {
				o.Plan.AppendPath(nil, r.Path)
				edited(o.Plan.RequestEdits, &context{request: r}, nil)
				edited(o.Plan.ResponseEdits, &context{request: r}, nil)
				o.Plan.Timeouts(r)
				c.Cluster.Hash(r)
			}
		}
	})
}
