//go:build !race

package serve

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/pillion-proxy/pillion/internal/balance"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/httpforward"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// fields are header fields.
type fields [][2]string

func (f fields) Len() int                      { return len(f) }
func (f fields) At(i int) (name, value []byte) { return []byte(f[i][0]), []byte(f[i][1]) }

// newTestRouting makes the Router of a connection to 198.51.100.1:80, whose routes lead to two clusters with three endpoints
// each, reached by TLS.
func newTestRouting(t testing.TB) *routing {
	p := &plane{}
	edit := (*mesh.Snapshot)(nil).Edit()
	f := &mesh.Forward{NotFoundCode: 503}
	for _, name := range []string{"v1", "v2"} {
		l := mesh.Locality{}
		for i := range byte(3) {
			l.Endpoints = append(l.Endpoints, mesh.Endpoint{Address: netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, 113, i}), 80), Weight: 1, TLSMode: "istio"})
		}
		f.Clusters = append(f.Clusters, mesh.WeightedCluster{Name: name, Weight: 1})
		edit.SetCluster(name, &mesh.Cluster{
			Name: name, Discovery: mesh.ByEDS, Assignment: name, Balancing: mesh.Balancing{Policy: mesh.LeastRequest, Choices: 2},
			Breakers:   mesh.Breakers{Connections: 1024, Pending: 1024, Requests: 1024, Retries: 3},
			Transports: []mesh.Transport{{TLSMode: "istio", TLS: &mesh.UpstreamTLS{Certificate: "default", Roots: "ROOTCA"}}, {}},
		})
		edit.SetAssignment(name, &mesh.Assignment{Name: name, Localities: []mesh.Locality{l}})
	}
	edit.SetRoutes("80", &mesh.Routes{Name: "80", Hosts: []mesh.VirtualHost{{Name: "web", Domains: []mesh.Domain{{Kind: mesh.DomainExact, Text: "web"}}, Routes: []mesh.Route{
		{Name: "default", Match: mesh.RouteMatch{Path: "/"}, Forward: f},
	}}}})
	edit.SetListener("0.0.0.0_80", &mesh.Listener{
		Name: "0.0.0.0_80", Direction: mesh.Outbound, Virtual: true, Addresses: []netip.AddrPort{netip.MustParseAddrPort("0.0.0.0:80")},
		Default: &mesh.FilterChain{HTTP: &mesh.HTTPManager{RouteName: "80"}},
	})
	snapshot, _ := edit.Snapshot()
	p.current.Store(snapshot)
	role := &Role{direction: flow.Outbound, mesh: p, balancer: balance.New(balance.Config{Snapshot: p.Snapshot}), plains: map[upstream.Options]*upstream.Security{}}
	role.securities.Store(&map[secured]*upstream.Security{})
	t.Cleanup(role.Close)
	c := &Conn{role: role, Record: &flow.Record{OriginalDestination: netip.MustParseAddrPort("198.51.100.1:80")}}
	info := c.info()
	chain, refusal := role.meet(snapshot, &info)
	if chain == nil {
		t.Fatalf("there is no filter chain: %s", refusal)
	}
	return c.newRouting(&governed{snapshot: snapshot, chain: chain})
}

func TestARoutedRequestDoesNotAllocate(t *testing.T) {
	r := newTestRouting(t)
	q := &httpforward.Request{Method: []byte("GET"), Path: []byte("/a"), Authority: []byte("web"), Scheme: []byte("http"), Fields: fields(nil)}
	if n := testing.AllocsPerRun(1000, func() {
		d := r.Route(q)
		if d.Reply != nil || d.Lease == nil || !d.Target.Secured() {
			t.Fatalf("%+v", d)
		}
		d.Lease.End(httpforward.Outcome{Status: 200, GRPC: -1, Connected: true})
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// A retry may verify its server by the authority. The bytes of the first attempt belong to a buffer that has other ones by then.
func TestARetryIsRoutedByItsOwnBytes(t *testing.T) {
	r := newTestRouting(t)
	buffer := []byte("web")
	q := &httpforward.Request{Method: []byte("GET"), Path: []byte("/a"), Authority: buffer, Scheme: []byte("http"), Fields: fields(nil)}
	first := r.Route(q)
	first.Lease.End(httpforward.Outcome{Status: 503, GRPC: -1, Connected: true})
	copy(buffer, "bad")
	q.Authority, q.Attempt, q.Previous = []byte("web"), 1, &first
	second := r.Route(q)
	second.Lease.End(httpforward.Outcome{Status: 200, GRPC: -1, Connected: true})
	if string(r.request.Authority) != "web" {
		t.Errorf("the retry is routed by %q", r.request.Authority)
	}
}

// The state of a cluster may be that of another snapshot than the one whose lookup is remembered: a goroutine that has read an
// older one brings it back. The next request brings it up to date.
func TestARememberedClusterFollowsItsSnapshot(t *testing.T) {
	r := newTestRouting(t)
	p := r.role.mesh.(*plane)
	before := p.Snapshot()
	q := &httpforward.Request{Method: []byte("GET"), Path: []byte("/a"), Authority: []byte("web"), Scheme: []byte("http"), Fields: fields(nil)}
	address := func() netip.AddrPort {
		t.Helper()
		d := r.Route(q)
		if d.Lease == nil {
			t.Fatalf("%+v", d)
		}
		d.Lease.End(httpforward.Outcome{Status: 200, GRPC: -1, Connected: true})
		return d.Target.Address
	}
	address()
	edit, moved := before.Edit(), netip.MustParseAddrPort("203.0.113.9:80")
	names := []string{"v1", "v2"}
	for _, name := range names {
		l := mesh.Locality{Endpoints: []mesh.Endpoint{{Address: moved, Weight: 1, TLSMode: "istio"}}}
		edit.SetAssignment(name, &mesh.Assignment{Name: name, Localities: []mesh.Locality{l}})
	}
	after, _ := edit.Snapshot()
	for range 100 {
		p.current.Store(after)
		if got := address(); got != moved {
			t.Fatalf("after the push: %v", got)
		}
		p.current.Store(before)
		for _, name := range names {
			r.role.balancer.Cluster(before, before.Cluster(name))
		}
		p.current.Store(after)
		if got := address(); got != moved {
			t.Fatalf("after a state that went back: %v", got)
		}
	}
}

// A copy of a request has the host of its mirror. Where the host decides which server is expected, it is that one.
func TestTheHostOfACopyIsVerified(t *testing.T) {
	r := newTestRouting(t)
	p := r.role.mesh.(*plane)
	policies := []mesh.Mirror{{}, {KeepHost: true}, {HostRewrite: "Copies.example:81"}, {KeepHost: true, HostRewrite: "copies.example"}}
	for i := range policies {
		policies[i].Cluster, policies[i].Fraction = "mirror", mesh.Fraction{Numerator: 1, Denominator: 1}
	}
	for rewrite, want := range map[string][]string{
		"":                {"web-shadow", "web", "copies.example", "copies.example"},
		"Other.example:1": {"other.example-shadow", "other.example", "copies.example", "copies.example"},
	} {
		edit := p.Snapshot().Edit()
		edit.SetCluster("mirror", &mesh.Cluster{
			Name: "mirror", Discovery: mesh.OriginalDestination, Breakers: mesh.Breakers{Connections: 10, Pending: 10, Requests: 10},
			Transports: []mesh.Transport{{TLS: &mesh.UpstreamTLS{Roots: "ca", HostSNI: true, HostName: true}}},
		})
		f := &mesh.Forward{Clusters: []mesh.WeightedCluster{{Name: "v1", Weight: 1}}, HostRewrite: rewrite, Mirrors: policies}
		edit.SetRoutes("80", &mesh.Routes{Name: "80", Hosts: []mesh.VirtualHost{{Name: "web", Domains: []mesh.Domain{{Kind: mesh.DomainAny}}, Routes: []mesh.Route{
			{Name: "default", Match: mesh.RouteMatch{Path: "/"}, Forward: f},
		}}}})
		snapshot, _ := edit.Snapshot()
		p.current.Store(snapshot)
		d := r.Route(&httpforward.Request{Method: []byte("GET"), Path: []byte("/a"), Authority: []byte("web"), Scheme: []byte("http"), Fields: fields(nil)})
		if d.Lease == nil {
			t.Fatalf("%+v", d)
		}
		d.Lease.End(httpforward.Outcome{Status: 200, GRPC: -1, Connected: true})
		var got []string
		for _, m := range d.Mirrors {
			m.Lease.End(httpforward.Outcome{Status: 200, GRPC: -1, Connected: true})
			for key, made := range *r.role.securities.Load() {
				if made == m.Target.Security {
					got = append(got, key.host)
				}
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("rewritten to %q: the copies verify %q, want %q", rewrite, got, want)
		}
	}
}

// A request may ask for any number of retries. What is remembered of them are the last endpoints.
func TestRetriesRememberTheLastEndpoints(t *testing.T) {
	r := newTestRouting(t)
	q := &httpforward.Request{Method: []byte("GET"), Path: []byte("/a"), Authority: []byte("web"), Scheme: []byte("http"), Fields: fields(nil)}
	var tried []netip.AddrPort
	for ; q.Attempt < 2*maxTried; q.Attempt++ {
		d := r.Route(q)
		if last := tried[max(0, len(tried)-maxTried):]; !slices.Equal(d.Tried, last) {
			t.Fatalf("retry %d avoids %v, want %v", q.Attempt, d.Tried, last)
		}
		tried, q.Previous = append(tried, d.Target.Address), &d
		d.Lease.End(httpforward.Outcome{Status: 503, GRPC: -1, Connected: true})
	}
}

func BenchmarkRoute(b *testing.B) {
	r := newTestRouting(b)
	q := &httpforward.Request{Method: []byte("GET"), Path: []byte("/a"), Authority: []byte("web"), Scheme: []byte("http"), Fields: fields(nil)}
	b.ReportAllocs()
	for b.Loop() {
		d := r.Route(q)
		d.Lease.End(httpforward.Outcome{Status: 200, GRPC: -1, Connected: true})
	}
}
