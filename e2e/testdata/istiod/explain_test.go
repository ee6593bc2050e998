package istiod

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/pillion-proxy/pillion/internal/configview"
	"github.com/pillion-proxy/pillion/internal/nettest"
)

// bookinfo routes the requests to reviews as the samples of Bookinfo do: by user, by weight, with faults and time limits.
const bookinfo = `
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: reviews, namespace: default}
spec:
  host: reviews.default.svc.cluster.local
  trafficPolicy: {tls: {mode: DISABLE}, loadBalancer: {simple: ROUND_ROBIN}}
  subsets:
  - {name: v1, labels: {version: v1}}
  - {name: v2, labels: {version: v2}}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: reviews, namespace: default}
spec:
  hosts: [reviews.default.svc.cluster.local]
  http:
  - name: jason
    match:
    - {headers: {end-user: {exact: jason}}, uri: {prefix: /reviews}}
    - {headers: {cookie: {regex: "^(.*;)?user=jason(;.*)?$"}}, method: {exact: GET}}
    timeout: 2s
    retries: {attempts: 3, perTryTimeout: 1s, retryOn: "5xx,connect-failure"}
    route: [{destination: {host: reviews.default.svc.cluster.local, subset: v2}}]
  - name: debug
    match: [{queryParams: {debug: {exact: "1"}}, withoutHeaders: {x-quiet: {}}}]
    rewrite: {uri: /inside, authority: inside.example.test}
    route: [{destination: {host: reviews.default.svc.cluster.local, subset: v1}}]
  - name: aborted
    match: [{uri: {exact: /ratings}, ignoreUriCase: true}]
    fault: {abort: {percentage: {value: 100}, httpStatus: 418}}
    route: [{destination: {host: reviews.default.svc.cluster.local, subset: v1}}]
  - name: delayed
    match: [{uri: {regex: "/details/[0-9]+"}}]
    fault: {delay: {percentage: {value: 100}, fixedDelay: 1ms}}
    route: [{destination: {host: reviews.default.svc.cluster.local, subset: v2}}]
  - name: old
    match: [{uri: {prefix: /old}}]
    redirect: {uri: /new, authority: new.example.test, redirectCode: 302}
  - name: teapot
    match: [{uri: {exact: /teapot}, method: {exact: POST}}]
    directResponse: {status: 418, body: {string: "short and stout"}}
  - name: missing
    match: [{uri: {prefix: /missing}}]
    route: [{destination: {host: nosuch.default.svc.cluster.local}}]
  - name: shared
    match: [{uri: {prefix: /shared}}]
    route:
    - {destination: {host: reviews.default.svc.cluster.local, subset: v1}, weight: 60}
    - {destination: {host: reviews.default.svc.cluster.local, subset: v2}, weight: 40}
  - name: main
    match: [{headers: {x-lost: {exact: "1"}}, uri: {prefix: /}}, {withoutHeaders: {x-lost: {}}}]
    route: [{destination: {host: reviews.default.svc.cluster.local, subset: v1}}]
`

// happenedFormat is a line of the access log with the facts that an explanation foretells.
const happenedFormat = "HAPPENED %TRAFFIC_DIRECTION% %REQ(X-REQUEST-ID)% %RESPONSE_CODE% %UPSTREAM_CLUSTER% %ROUTE_NAME% %UPSTREAM_HOST%"

// newReader returns a pod of the workload nginx that calls the service reviews, whose two endpoints are in another namespace.
func newReader(t *testing.T, configs string) (d *pod, far *nettest.Namespace, p *plane) {
	t.Helper()
	return newReaderWith(t, happenedFormat, configs)
}

// newReaderWith is newReader with a format of the agent's access log and further objects of Kubernetes.
func newReaderWith(t *testing.T, format, configs string, objects ...string) (d *pod, far *nettest.Namespace, p *plane) {
	t.Helper()
	d = newPod(t)
	far = newFar(t, d)
	serveEcho(t, far, "0.0.0.0:8080")
	serveEcho(t, far, "198.51.100.200:9080") // of hosts that are not in the mesh
	p = startPlaneIn(t, d, configs, objects...)
	d.launch(t, p, "PILLION_ACCESS_LOG=/dev/stdout", "PILLION_ACCESS_LOG_FORMAT="+format)
	d.awaitReady(t)
	d.awaitConverged(t, p)
	return d, far, p
}

// newFar returns a namespace that is joined to the pod and has the addresses of reviews and of its endpoints.
func newFar(t *testing.T, d *pod) *nettest.Namespace {
	t.Helper()
	far := nettest.New(t, "far")
	nettest.Join(t, d.Namespace, far)
	d.MustRun(t, "ip", "address", "add", d.ip+"/32", "dev", "eth0")
	for _, address := range []string{"203.0.113.6", "203.0.113.7", "198.51.100.200"} {
		far.AddAddress(t, "lo", netip.MustParsePrefix(address+"/32"))
		d.MustRun(t, "ip", "route", "add", address+"/32", "dev", "eth0", "src", d.ip)
	}
	far.MustRun(t, "ip", "route", "add", d.ip+"/32", "dev", "eth0", "src", "203.0.113.6")
	return far
}

// serveEcho answers requests with the host and the target that they arrive with, and those of paths ending in /fails with 503.
func serveEcho(t *testing.T, ns *nettest.Namespace, address string) {
	t.Helper()
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "/fails") {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		fmt.Fprintf(w, "http://%s%s", r.Host, r.RequestURI)
	})}
	listener, ended := ns.Listen(t, "tcp", address), make(chan struct{})
	go func() { defer close(ended); server.Serve(listener) }()
	t.Cleanup(func() { server.Close(); <-ended })
}

// question is a request that is explained and sent.
type question struct {
	method, url string
	fields      []string // as "name: value"
}

func (q *question) String() string {
	return strings.Join(append([]string{q.method, q.url}, q.fields...), " ")
}

// combinations returns a request for each combination of hosts, paths, fields and methods.
func combinations() (all []question) {
	for _, host := range []string{"reviews:9080", "reviews.default.svc.cluster.local:9080", "REVIEWS.default:9080", "198.51.100.200:9080", "other.example.test:9080"} {
		for _, path := range []string{"/", "/reviews/1", "/Ratings", "/details/7", "/details/x", "/old/er?a=b", "/teapot", "/missing", "/shared/x", "/x?debug=1", "/x?debug=2&debug=1", "/reviews?debug=1"} {
			for _, fields := range [][]string{nil, {"end-user: jason"}, {"end-user: json"}, {"cookie: a=b;user=jason;c=d"}, {"x-quiet: "}, {"x-lost: 2"}} {
				for _, method := range []string{"GET", "POST"} {
					all = append(all, question{method, "http://" + host + path, fields})
				}
			}
		}
	}
	return all
}

// explain returns what the agent foretells.
func (d *pod) explain(q *question, values url.Values) (*configview.Explanation, error) {
	if values == nil {
		values = url.Values{}
	}
	values.Set("method", q.method)
	values.Set("url", q.url)
	values["header"] = q.fields
	text, err := d.get(adminPort, "explain?"+values.Encode())
	if err != nil {
		return nil, err
	}
	var e configview.Explanation
	return &e, json.Unmarshal([]byte(text), &e)
}

// happened is what became of a request.
type happened struct {
	status               string
	cluster, route, host string // -: not logged
	body                 string // of the echo
}

// send sends a request on a connection, and returns the status and the body of its response.
func (q *question) send(conn net.Conn, in *bufio.Reader, id string) (status, body string, err error) {
	u, err := url.Parse(q.url)
	if err != nil {
		return "", "", err
	}
	lines := append([]string{q.method + " " + u.RequestURI() + " HTTP/1.1", "host: " + u.Host, "content-length: 0", "x-request-id: " + id}, q.fields...)
	if _, err := io.WriteString(conn, strings.Join(append(lines, "", ""), "\r\n")); err != nil {
		return "", "", err
	}
	response, err := http.ReadResponse(in, nil)
	if err != nil {
		return "", "", err
	}
	text, err := io.ReadAll(response.Body)
	return fmt.Sprint(response.StatusCode), string(text), err
}

// foretold returns an error if an explanation and what happened are different.
func foretold(e *configview.Explanation, h happened) error {
	route := "-"
	if e.Route != nil && e.Route.Name != "" {
		route = e.Route.Name
	}
	if route != h.route {
		return fmt.Errorf("the route is %s, explained as %s", h.route, route)
	}
	if status, answered := strings.CutPrefix(e.Result, "answered "); answered {
		if status, _, _ = strings.Cut(status, ","); !strings.HasPrefix(status, h.status) {
			return fmt.Errorf("status %s", h.status)
		}
		return nil
	}
	if !strings.HasPrefix(e.Result, "sent to ") {
		return fmt.Errorf("status %s", h.status)
	}
	i := slices.IndexFunc(e.Clusters, func(t configview.Target) bool { return t.Name == h.cluster })
	if i < 0 {
		return fmt.Errorf("the cluster is %s", h.cluster)
	}
	if h.cluster == "PassthroughCluster" {
		return nil
	}
	if !slices.ContainsFunc(e.Clusters[i].Hosts, func(host configview.Endpoint) bool { return host.Address == h.host && host.Usable }) {
		return fmt.Errorf("the endpoint is %s, not one of %+v", h.host, e.Clusters[i].Hosts)
	}
	asSent := e.SentAs
	if asSent == "" {
		_, asSent, _ = strings.Cut(e.Request, " ")
	}
	if h.body != asSent {
		return fmt.Errorf("the server received %s, explained as %s", h.body, asSent)
	}
	return nil
}

// An explanation is what happens: for requests of many kinds, the route, the cluster, the endpoint, the rewritten URL and the
// status are those that the access log, the client and the server see.
func TestExplanationsAreWhatHappens(t *testing.T) {
	d, _, _ := newReader(t, bookinfo)
	conn, err := d.Dial("tcp", "198.51.100.200:9080", patience)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	in := bufio.NewReader(conn)
	all := combinations()
	explained, sent := make([]*configview.Explanation, len(all)), make([]happened, len(all))
	for i := range all {
		if explained[i], err = d.explain(&all[i], url.Values{"destination": {"198.51.100.200:9080"}}); err != nil {
			t.Fatal(err)
		}
		if sent[i].status, sent[i].body, err = all[i].send(conn, in, fmt.Sprint("question-", i)); err != nil {
			t.Fatalf("%v: %v", &all[i], err)
		}
	}
	lines := d.happenings(t, "OUTBOUND", len(all))
	outcomes := map[string]int{}
	for i, q := range all {
		line := lines[fmt.Sprint("question-", i)]
		sent[i].cluster, sent[i].route, sent[i].host = line[1], line[2], line[3]
		if line[0] != sent[i].status {
			t.Errorf("%v: status %s, logged %s", &q, sent[i].status, line[0])
		}
		if err := foretold(explained[i], sent[i]); err != nil {
			t.Errorf("%v: %v; explained: %s", &q, err, explained[i].Result)
		}
		outcomes[sent[i].route+" "+sent[i].status]++
	}
	for _, want := range []string{"jason 200", "debug 200", "aborted 418", "delayed 200", "old 302", "teapot 418", "missing 503", "shared 200", "main 200", "allow_any 200", "- 404"} {
		if outcomes[want] == 0 {
			t.Errorf("no request had the outcome %q: %v", want, slices.Sorted(maps.Keys(outcomes)))
		}
	}
}

// happenings returns n lines of the access log by the requests' identifiers: status, cluster, route and endpoint.
func (d *pod) happenings(t *testing.T, direction string, n int) map[string][]string {
	t.Helper()
	lines := make(map[string][]string)
	await(t, func() error {
		for line := range strings.Lines(d.log.String()) {
			if words := strings.Fields(line); len(words) == 7 && words[0] == "HAPPENED" && words[1] == direction {
				lines[words[2]] = words[3:]
			}
		}
		if len(lines) < n {
			return fmt.Errorf("%d of %d requests are in the access log", len(lines), n)
		}
		return nil
	})
	return lines
}

// inboundPolicies are policies of the pod, with something for requests of each kind.
const inboundPolicies = `
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: allow, namespace: default}
spec:
  selector: {matchLabels: {app: nginx}}
  action: ALLOW
  rules:
  - from: [{source: {principals: ["cluster.local/ns/default/sa/client"]}}]
    to: [{operation: {methods: [GET], paths: ["/info*", "/exact"], ports: ["8080"]}}]
    when: [{key: "request.headers[x-token]", values: ["a*"]}]
  - to: [{operation: {hosts: ["open.example.test"], notPaths: ["/admin*"]}}]
  - from: [{source: {ipBlocks: ["203.0.113.6/32"]}}]
    to: [{operation: {paths: ["/near"]}}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: deny, namespace: default}
spec:
  selector: {matchLabels: {app: nginx}}
  action: DENY
  rules:
  - to: [{operation: {methods: [DELETE]}}]
  - from: [{source: {notPrincipals: ["*"]}}]
    to: [{operation: {paths: ["/secret"]}}]
`

// The verdicts of policies about inbound requests are explained as they fall, for clients with and without mutual TLS.
func TestExplainedVerdictsAreWhatHappens(t *testing.T) {
	d, far, p := newReader(t, inboundPolicies)
	d.awaitIdentity(t)
	serveEcho(t, d.Namespace, "0.0.0.0:8080")
	outcomes := map[string]int{}
	n := 0
	for _, account := range []string{"", "client", "other"} {
		values := url.Values{"from": {"inbound"}, "destination": {d.ip + ":8080"}, "source": {"203.0.113.6"}}
		var conn net.Conn
		if account == "" {
			var err error
			if conn, err = far.Dial("tcp", d.ip+":8080", patience); err != nil {
				t.Fatal(err)
			}
		} else {
			values.Set("peer", "spiffe://cluster.local/ns/default/sa/"+account)
			conn = secureClient(t, far, d.ip+":8080", issue(t, p, account).config(t), "istio-http/1.1", "istio", "http/1.1")
		}
		defer conn.Close()
		in := bufio.NewReader(conn)
		for _, host := range []string{"nginx-service:8080", "open.example.test"} {
			for _, path := range []string{"/info/1", "/exact", "/near", "/secret", "/admin", "/x"} {
				for _, method := range []string{"GET", "POST", "DELETE"} {
					for _, fields := range [][]string{nil, {"x-token: abc"}, {"x-token: b"}} {
						q := question{method, "http://" + host + path, fields}
						e, err := d.explain(&q, values)
						if err != nil {
							t.Fatal(err)
						}
						n++
						status, _, err := q.send(conn, in, fmt.Sprint("inbound-", n))
						if err != nil {
							t.Fatal(err)
						}
						want := map[bool]string{true: "200", false: "403"}[e.Result == "sent to inbound|8080||"]
						if status != want {
							t.Errorf("%q %v: status %s; explained: %s %+v", account, &q, status, e.Result, e.Verdicts)
						}
						outcomes[account+" "+status]++
					}
				}
			}
		}
	}
	if len(outcomes) != 6 {
		t.Errorf("the outcomes are %v", outcomes)
	}
}

// pillion explain names each step of a request, and pillion tap the same route, cluster and endpoint when it is sent.
func TestExplainAndTapNameTheSame(t *testing.T) {
	d, _, _ := newReader(t, bookinfo)
	run := func(words ...string) string {
		t.Helper()
		out, err := d.Run(d.Command(0, 0, d.program, words...))
		if err != nil {
			t.Fatalf("%q: %v\n%s", words, err, out)
		}
		return string(out)
	}
	const v2 = "outbound|9080|v2|reviews.default.svc.cluster.local"
	text := run("explain", "GET", "http://reviews:9080/details/7", "-H", "end-user: jason")
	for _, want := range []string{
		"result       sent to " + v2 + " after 1ms", "destination  198.51.100.200:9080, outbound", "listener     0.0.0.0_9080: it is for 0.0.0.0:9080",
		"chain        plain HTTP", "routes       9080", "host         reviews.default.svc.cluster.local:9080: its domain is reviews",
		`not          debug, /*, no x-quiet, ?debug=1, virtual-service reviews.default: parameter debug is absent, must be "1"`,
		"not          2 routes for other paths; --all lists them", "route        delayed, ~/details/[0-9]+, virtual-service reviews.default",
		"timeouts     unlimited", "retries      2, on ", "origin       destination-rule reviews.default", "balancing    round robin", "TLS          plain",
		"endpoints    1 of 1 healthy", "203.0.113.7:8080, HEALTHY, weight 1, reviews-v2-68d4d6fb8c-bbbbb.default",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is not in\n%s", want, text)
		}
	}
	if all := run("explain", "GET", "http://reviews:9080/details/7", "--all"); !strings.Contains(all, "end-user=jason, virtual-service reviews.default: path /details/7 does not begin with /reviews") {
		t.Errorf("--all prints\n%s", all)
	}
	d.awaitTapped(t, []string{"tap", "--path", "/details/"}, func(line string) bool {
		return strings.HasSuffix(line, "GET /details/7 → "+v2+", route delayed, 203.0.113.7:8080\n")
	})
}

// An explanation has the endpoints as they are chosen: those of the first priority, those of the next one when these are ejected, and
// in a panic all of them. The requests follow.
func TestExplanationsFollowEjections(t *testing.T) {
	d, _, _ := newReader(t, strings.Replace(places, "maxEjectionPercent: 100", "maxEjectionPercent: 100, minHealthPercent: 50", 1))
	conn, err := d.Dial("tcp", "203.0.113.6:9080", patience)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	in, sent := bufio.NewReader(conn), 0
	send := func(path, status string) {
		t.Helper()
		q := question{"GET", "http://places.test:9080" + path, nil}
		got, _, err := q.send(conn, in, fmt.Sprint("ejected-", sent))
		if sent++; err != nil || got != status {
			t.Fatalf("%v: %s, %v; want %s", &q, got, err, status)
		}
	}
	explained := func(want string) {
		t.Helper()
		q := question{"GET", "http://places.test:9080/", nil}
		await(t, func() error {
			e, err := d.explain(&q, url.Values{"destination": {"203.0.113.6:9080"}})
			if err != nil || len(e.Clusters) != 1 {
				return fmt.Errorf("%+v, %v", e, err)
			}
			var hosts []string
			for _, h := range e.Clusters[0].Hosts {
				hosts = append(hosts, fmt.Sprint(h.Address, " ", h.Health, " ", h.Load, " ", h.Panic))
			}
			if got := strings.Join(hosts, ", "); got != want {
				return fmt.Errorf("the endpoints are %s, want %s", got, want)
			}
			return nil
		})
	}
	const near, far = "203.0.113.6:8080", "203.0.113.7:8080"
	send("/", "200")
	explained(near + " UNKNOWN 100% false, " + far + " UNKNOWN 0% false")
	send("/fails", "503")
	send("/fails", "503")
	explained(near + " EJECTED 0% false, " + far + " UNKNOWN 100% false")
	send("/", "200")
	send("/fails", "503")
	send("/fails", "503")
	explained(near + " EJECTED 50% true, " + far + " EJECTED 50% true")
	for range 30 {
		send("/", "200")
	}
	reached := map[string]int{}
	for id, line := range d.happenings(t, "OUTBOUND", sent) {
		var n int
		if fmt.Sscanf(id, "ejected-%d", &n); n >= sent-30 {
			reached[line[3]]++
		}
	}
	if reached[near] == 0 || reached[far] == 0 {
		t.Errorf("in the panic requests reached %v", reached)
	}
	q := question{"GET", "http://places.test:9080/", nil}
	out, err := d.Run(d.Command(0, 0, d.program, "explain", q.method, q.url, "--destination", "203.0.113.6:9080"))
	if want := far + ", EJECTED, weight 3, priority 1 with 50%, in a panic"; err != nil || !strings.Contains(string(out), want) {
		t.Errorf("%v: %q is not in\n%s", err, want, out)
	}
}

// awaitTapped runs pillion tap, and sends requests until it prints a line.
func (d *pod) awaitTapped(t *testing.T, words []string, is func(line string) bool) {
	t.Helper()
	printed := &output{}
	cmd := d.Command(0, 0, d.program, words...)
	cmd.Stdout = printed
	tap := d.Start(t, cmd)
	q := question{"GET", "http://reviews:9080/details/7", nil}
	await(t, func() error {
		conn, err := d.Dial("tcp", "198.51.100.200:9080", patience)
		if err != nil {
			return err
		}
		defer conn.Close()
		if _, _, err := q.send(conn, bufio.NewReader(conn), "tapped"); err != nil {
			return err
		}
		for line := range strings.Lines(printed.String()) {
			if is(line) {
				return nil
			}
		}
		return fmt.Errorf("pillion tap prints %q", printed)
	})
	tap.Signal(syscall.SIGTERM)
	if code, err := tap.Wait(patience); code != 0 || err != nil {
		t.Errorf("pillion tap ended with %d, %v", code, err)
	}
}
