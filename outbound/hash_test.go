package outbound

import (
	"context"
	"fmt"
	"io"
	"math/bits"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/balance"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/xxh64"
)

// The policies that hash, by their names.
var hashingPolicies = map[string]mesh.Policy{"ring": mesh.RingHash, "Maglev": mesh.Maglev}

// hashedPorts are the endpoints of a cluster that chooses by hash.
var hashedPorts = []uint16{82, 83, 84, 85, 86}

// newHashed starts an agent whose requests go to the endpoints of a cluster by the hashes of a route.
func newHashed(t *testing.T, balancing mesh.Policy, hash []mesh.HashPolicy, retry *mesh.RetryPolicy) *routed {
	t.Helper()
	route := to("v1")
	route.Forward.Hash, route.Forward.Retry = hash, retry
	r := newRouted(t, route)
	r.cluster("v1", func(c *mesh.Cluster) {
		c.Balancing = mesh.Balancing{Policy: balancing, MinRing: 1024, MaxRing: 8 << 20}
	}, hashedPorts...)
	return r
}

// place returns the port that has a hash. The tables of package balance are those of Envoy's tests.
func (r *routed) place(t *testing.T, hash uint64) string {
	t.Helper()
	s := r.plane.InForce.Load()
	b := balance.New(balance.Config{})
	defer b.Close()
	choice, failed := b.Cluster(s, s.Cluster("v1")).Pick(&balance.Request{Hash: hash, Hashed: true})
	if failed != balance.None {
		t.Fatal(failed)
	}
	choice.Lease.End(balance.Outcome{GRPC: -1})
	return fmt.Sprint(choice.Address.Port())
}

func hashOf(text string) uint64 { return xxh64.Sum([]byte(text), 0) }

// asker makes requests of one connection.
type asker struct {
	*http.Client
	ends string // the addresses of the connection, as the text that a cookie is made of
}

// asker returns a client with a connection to port 81 of its own.
func (r *routed) asker(t *testing.T, two bool) *asker {
	t.Helper()
	conn := r.Dial(t, r.At(81))
	transport := &http.Transport{Protocols: new(http.Protocols), MaxConnsPerHost: 1}
	transport.Protocols.SetUnencryptedHTTP2(two)
	transport.Protocols.SetHTTP1(!two)
	transport.DialContext = func(context.Context, string, string) (net.Conn, error) { return conn, nil }
	t.Cleanup(transport.CloseIdleConnections)
	return &asker{&http.Client{Transport: transport, Timeout: nettest.Patience}, conn.LocalAddr().String() + r.At(81).String()}
}

// ask sends a request with fields as "name: value", and returns the body and the header of the response.
func (a *asker) ask(t *testing.T, target string, fields ...string) (string, http.Header) {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), "GET", "http://web"+target, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, field := range fields {
		name, value, _ := strings.Cut(field, ": ")
		request.Header.Add(name, value)
	}
	response, err := a.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil || response.StatusCode != 200 {
		t.Fatalf("status %d, %v", response.StatusCode, err)
	}
	return string(body), response.Header
}

// A request goes to the endpoint that Envoy chooses by the policies of its route, with either balancing and over both versions of
// HTTP. Each policy is tested with several values.
func TestRequestsGoToTheEndpointsOfTheirHashes(t *testing.T) {
	header, query := mesh.HashPolicy{Kind: mesh.HashHeader, Name: "user"}, mesh.HashPolicy{Kind: mesh.HashQuery, Name: "user"}
	cookie, source := mesh.HashPolicy{Kind: mesh.HashCookie, Name: "user"}, mesh.HashPolicy{Kind: mesh.HashSourceIP}
	last := header
	last.Terminal = true
	mixed := func(a, b uint64) uint64 { return bits.RotateLeft64(a, 1) ^ b }
	type sent struct {
		target string
		fields []string
		hash   uint64
	}
	for name, c := range map[string]struct {
		policies []mesh.HashPolicy
		request  func(user string) sent
	}{
		"header": {[]mesh.HashPolicy{header}, func(user string) sent {
			return sent{"/", []string{"User: " + user}, hashOf(user)}
		}},
		"header with two values": {[]mesh.HashPolicy{header}, func(user string) sent {
			return sent{"/", []string{"User: z" + user, "User: a" + user}, xxh64.Sum([]byte("z"+user), hashOf("a"+user))}
		}},
		"cookie": {[]mesh.HashPolicy{cookie}, func(user string) sent {
			return sent{"/", []string{"Cookie: other=1; user=" + user + "; more=2"}, hashOf(user)}
		}},
		"parameter": {[]mesh.HashPolicy{query}, func(user string) sent {
			return sent{"/path?other=1&user=" + user, nil, hashOf(user)}
		}},
		"source address": {[]mesh.HashPolicy{source}, func(user string) sent {
			return sent{"/?" + user, nil, hashOf(nettest.PodIP4.String())}
		}},
		"two policies": {[]mesh.HashPolicy{header, query}, func(user string) sent {
			return sent{"/?user=" + user, []string{"User: jason"}, mixed(hashOf("jason"), hashOf(user))}
		}},
		"a policy twice, as istiod sends it for two destinations": {[]mesh.HashPolicy{header, header}, func(user string) sent {
			return sent{"/", []string{"User: " + user}, mixed(hashOf(user), hashOf(user))}
		}},
		"a policy without a value": {[]mesh.HashPolicy{cookie, query, source}, func(user string) sent {
			return sent{"/?user=" + user, nil, mixed(hashOf(user), hashOf(nettest.PodIP4.String()))}
		}},
		"terminal": {[]mesh.HashPolicy{last, query}, func(user string) sent {
			return sent{"/?user=x" + user, []string{"User: " + user}, hashOf(user)}
		}},
		"terminal without a value": {[]mesh.HashPolicy{last, query}, func(user string) sent {
			return sent{"/?user=" + user, nil, hashOf(user)}
		}},
	} {
		for balancing, policy := range hashingPolicies {
			t.Run(name+", "+balancing, func(t *testing.T) {
				r := newHashed(t, policy, c.policies, nil)
				r.serve(t, hashedPorts...)
				for two, client := range map[bool]*asker{false: r.asker(t, false), true: r.asker(t, true)} {
					for i := range 10 {
						s := c.request(fmt.Sprint("user-", i))
						if got, _ := client.ask(t, s.target, s.fields...); got != r.place(t, s.hash) {
							t.Errorf("HTTP/2 %v, %s %q: port %s, want %s", two, s.target, s.fields, got, r.place(t, s.hash))
						}
						r.Await(t)
					}
				}
			})
		}
	}
}

// A client without the cookie gets one with the hash of both ends of its connection, and keeps its endpoint with it on other
// connections and in the other version of HTTP.
func TestAClientKeepsItsEndpointByItsCookie(t *testing.T) {
	ttl := time.Hour
	for balancing, policy := range hashingPolicies {
		r := newHashed(t, policy, []mesh.HashPolicy{{Kind: mesh.HashCookie, Name: "user", Path: "/", TTL: &ttl}}, nil)
		r.serve(t, hashedPorts...)
		for _, two := range []bool{false, true} {
			for range 5 {
				client := r.asker(t, two)
				value := fmt.Sprintf("%016x", hashOf(client.ends))
				for range 2 { // requests that race on a connection get the same cookie
					got, header := client.ask(t, "/")
					if want := `user="` + value + `"; Max-Age=3600; Path=/; HttpOnly`; got != r.place(t, hashOf(value)) || header.Get("Set-Cookie") != want {
						t.Errorf("%s, HTTP/2 %v: port %s, want %s; cookie %s, want %s", balancing, two, got, r.place(t, hashOf(value)), header.Get("Set-Cookie"), want)
					}
					r.Await(t)
				}
				for _, two := range []bool{false, true} {
					got, header := r.asker(t, two).ask(t, "/", `Cookie: user="`+value+`"`)
					if got != r.place(t, hashOf(value)) || header["Set-Cookie"] != nil {
						t.Errorf("%s, HTTP/2 %v: port %s with the cookie, want %s; fields %v", balancing, two, got, r.place(t, hashOf(value)), header)
					}
					r.Await(t)
				}
			}
		}
	}
}

// Without a hash, requests are spread.
func TestRequestsWithoutAHashAreSpread(t *testing.T) {
	for balancing, policy := range hashingPolicies {
		r := newHashed(t, policy, []mesh.HashPolicy{{Kind: mesh.HashHeader, Name: "user"}}, nil)
		r.serve(t, hashedPorts...)
		for two, client := range map[bool]*asker{false: r.asker(t, false), true: r.asker(t, true)} {
			seen := map[string]bool{}
			for range 60 {
				got, _ := client.ask(t, "/")
				seen[got] = true
				r.Await(t)
			}
			if len(seen) < 2 { // the probability is 5⁻⁵⁹
				t.Errorf("%s, HTTP/2 %v: all requests reached %v", balancing, two, seen)
			}
		}
	}
}

// Another attempt has the hash of its own request, whatever requests the connection has made meanwhile.
func TestARetryKeepsItsHash(t *testing.T) {
	for _, two := range []bool{false, true} {
		r := newHashed(t, mesh.RingHash, []mesh.HashPolicy{{Kind: mesh.HashHeader, Name: "user"}}, &mesh.RetryPolicy{On: mesh.Retry5xx, Retries: 1})
		arrived, release := make(chan bool, 1), make(chan bool)
		var attempts atomic.Int32
		for _, port := range hashedPorts {
			r.handle(t, port, func(w http.ResponseWriter, q *http.Request) {
				if q.Header.Get("user") == "jason" && attempts.Add(1) == 1 {
					arrived <- true
					<-release
					w.WriteHeader(503)
				}
				fmt.Fprint(w, port)
			})
		}
		other := ""
		for i := 0; other == "" || r.place(t, hashOf(other)) == r.place(t, hashOf("jason")); i++ {
			other = fmt.Sprint("user-", i)
		}
		client, got := r.asker(t, two), make(chan string, 1)
		go func() {
			defer close(got)
			body, _ := client.ask(t, "/", "User: jason")
			got <- body
		}()
		select {
		case <-arrived:
		case <-got:
			t.Fatal("no attempt arrived")
		}
		if !two {
			client = r.asker(t, false)
		}
		client.ask(t, "/", "User: "+other)
		close(release)
		if got := <-got; got != r.place(t, hashOf("jason")) || attempts.Load() != 2 {
			t.Errorf("HTTP/2 %v: attempt %d reached %s, want %s", two, attempts.Load(), got, r.place(t, hashOf("jason")))
		}
	}
}
