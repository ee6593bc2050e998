package route

import (
	"math/bits"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/xxh64"
)

func text(s string) uint64 { return xxh64.Sum([]byte(s), 0) }

func TestAHashIsMadeOfThePoliciesInTheirOrder(t *testing.T) {
	day := 24 * time.Hour
	header, query, source := mesh.HashPolicy{Kind: mesh.HashHeader, Name: "User"}, mesh.HashPolicy{Kind: mesh.HashQuery, Name: "id"}, mesh.HashPolicy{Kind: mesh.HashSourceIP}
	cookie := mesh.HashPolicy{Kind: mesh.HashCookie, Name: "c"}
	given := mesh.HashPolicy{Kind: mesh.HashCookie, Name: "c", TTL: &day}
	last, rewritten := header, header
	last.Terminal = true
	rewritten.Rewrite = &mesh.RegexRewrite{Pattern: "(j)([a-z]*)", Substitution: `\2$\1`}
	both := bits.RotateLeft64(text("jason"), 1) ^ text("7")
	for _, test := range []struct {
		name     string
		policies []mesh.HashPolicy
		request  *Request
		want     uint64
		ok       bool
	}{
		{"no policy", nil, request("GET /"), 0, false},
		{"a field", []mesh.HashPolicy{header}, request("GET /", "user", "jason"), text("jason"), true},
		{"a missing field", []mesh.HashPolicy{header}, request("GET /"), 0, false},
		{"a pseudo-field", []mesh.HashPolicy{{Kind: mesh.HashHeader, Name: ":path"}}, request("GET /a?b"), text("/a?b"), true},
		{"several fields, in any order", []mesh.HashPolicy{header}, request("GET /", "user", "foo", "USER", "bar"), xxh64.Sum([]byte("foo"), text("bar")), true},
		{"a rewritten field", []mesh.HashPolicy{rewritten}, request("GET /", "user", "jason"), text("ason$j"), true},
		{"a parameter", []mesh.HashPolicy{query}, request("GET /?x=1&id=7&id=8"), text("7"), true},
		{"an empty parameter", []mesh.HashPolicy{query}, request("GET /?id"), text(""), true},
		{"the client's address", []mesh.HashPolicy{source}, request("GET /"), text("198.51.100.7"), true},
		{"nothing", []mesh.HashPolicy{{}}, request("GET /"), 0, false},
		{"two policies", []mesh.HashPolicy{header, query}, request("GET /?id=7", "user", "jason"), both, true},
		{"two policies, of which one yields nothing", []mesh.HashPolicy{header, query}, request("GET /?id=7"), text("7"), true},
		{"a terminal policy", []mesh.HashPolicy{last, query}, request("GET /?id=7", "user", "jason"), text("jason"), true},
		{"a terminal policy that yields nothing", []mesh.HashPolicy{last, query}, request("GET /?id=7"), text("7"), true},
		{"a cookie", []mesh.HashPolicy{cookie}, request("GET /", "cookie", `a=b; c="d"`), text("d"), true},
		{"a cookie in a second field", []mesh.HashPolicy{cookie}, request("GET /", "cookie", "a=b;x", "Cookie", "c=d"), text("d"), true},
		{"a missing cookie", []mesh.HashPolicy{cookie}, request("GET /", "cookie", "cc=d"), 0, false},
		{"an empty cookie", []mesh.HashPolicy{cookie}, request("GET /", "cookie", "c=; c=x"), 0, false},
		{"a missing cookie that is given", []mesh.HashPolicy{given}, request("GET /"), text(connectionCookie), true},
	} {
		r := to("c")
		r.Forward.Hash = test.policies
		if got, ok := find(r, test.request).Cluster.Hash(test.request); got != test.want || ok != test.ok {
			t.Errorf("%s: %x, %v, want %x", test.name, got, ok, test.want)
		}
	}
}

// connectionCookie is the cookie that a request of the tests is given: the hash of the text of both ends of its connection.
const connectionCookie = "5f2db87d2b14798f"

// A client gets the cookie of the hash once, if hosts are chosen by it.
func TestACookieIsSetThatTheHashIsMadeOf(t *testing.T) {
	day, session := 24*time.Hour, time.Duration(0)
	r := to("c")
	policy := mesh.HashPolicy{Kind: mesh.HashCookie, Name: "c", TTL: &day, Path: "/p", Attributes: []mesh.CookieAttribute{{Name: "SameSite", Value: "Lax"}, {Name: "Secure"}}}
	r.Forward.Hash = []mesh.HashPolicy{policy, policy, {Kind: mesh.HashCookie, Name: "s", TTL: &session}}
	first, second := request("GET /"), request("GET /", "cookie", "c=7; s=8")
	want := `set-cookie: c="` + connectionCookie + `"; Max-Age=86400; Path=/p; SameSite=Lax; Secure; HttpOnly` + "\n" + `set-cookie: s="` + connectionCookie + `"; HttpOnly`
	for _, test := range []struct {
		request *Request
		hashed  bool
		want    string
	}{{first, true, want}, {first, false, ""}, {second, true, ""}} {
		c := find(r, test.request)
		if got := edited(c.Outcome(test.request, test.hashed).Plan.ResponseEdits, &context{request: test.request}, nil); got != test.want {
			t.Errorf("hashed %v:\n%s\nwant\n%s", test.hashed, got, test.want)
		}
	}
	if text("198.51.100.7:41234203.0.113.1:80") != 0x5f2db87d2b14798f {
		t.Errorf("%x", text("198.51.100.7:41234203.0.113.1:80"))
	}
}
