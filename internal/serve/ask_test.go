package serve

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/authz"
	"github.com/pillion-proxy/pillion/internal/balance"
	"github.com/pillion-proxy/pillion/internal/budget"
	"github.com/pillion-proxy/pillion/internal/callout"
	"github.com/pillion-proxy/pillion/internal/extauthz"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/httpforward"
	"github.com/pillion-proxy/pillion/internal/jwks"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/route"
)

// silentIssuer answers no request for keys.
type silentIssuer struct{}

func (silentIssuer) Get(ctx context.Context, _, _ string, _ int) (*callout.Answer, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

// ended waits for the end of a question.
func ended(t *testing.T, q *question) {
	t.Helper()
	end := make(chan struct{}, 1)
	q.Notify(func() { end <- struct{}{} })
	select {
	case <-end:
	case <-time.After(nettest.Patience):
		t.Fatal("the question does not end")
	}
}

// While an issuer does not answer, a bounded number of requests waits for it. Further ones are denied at once.
func TestRequestsThatWaitForKeysAreBounded(t *testing.T) {
	role := &Role{keys: jwks.New(silentIssuer{}, nil)}
	defer role.keys.Close()
	filter := &mesh.JWT{
		Providers: []mesh.JWTProvider{{Name: "me", Remote: &mesh.RemoteKeys{
			Service: mesh.HTTPService{URI: "http://issuer/keys", Cluster: "c", Timeout: nettest.Patience}, CacheFor: time.Minute,
		}}},
		Rules: []mesh.JWTRule{{Match: mesh.RouteMatch{Path: "/"}, Requires: mesh.JWTRequirement{Kind: mesh.JWTProvided, Name: "me"}}},
	}
	r := &httpforward.Request{
		Connection: &flow.Record{}, Method: []byte("GET"), Path: []byte("/"), Authority: []byte("a"),
		Fields: oneField{"authorization", "Bearer eyJhbGciOiJFUzI1NiJ9.e30.AAAA"},
	}
	role.asking.keys.Store(maxQuestions - 1)
	reply, waits := (&gate{role: role}).authenticate(r, filter, nil)
	if reply != nil || waits == nil || waits.Answered() {
		t.Fatalf("the last request that may wait: %+v, %v", reply, waits)
	}
	if reply, beyond := (&gate{role: role}).authenticate(r, filter, nil); reply == nil || reply.Status != 401 || beyond != nil {
		t.Errorf("a request beyond the bound: %+v, %v", reply, beyond)
	}
	waits.Cancel()
	ended(t, waits)
	if n := role.asking.keys.Load(); n != maxQuestions-1 {
		t.Errorf("after the end of a wait, %d requests wait", n)
	}
}

// askingRole returns a role whose server accepts connections and answers nothing.
func askingRole(t *testing.T, memory *budget.Budget) (*Role, *mesh.ExtAuthz) {
	t.Helper()
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { silent.Close() })
	edit := (*mesh.Snapshot)(nil).Edit()
	edit.SetCluster("c", &mesh.Cluster{
		Name: "c", Discovery: mesh.Static, ConnectTimeout: nettest.Patience,
		Breakers: mesh.Breakers{Connections: 1024, Pending: 1024, Requests: 1024},
		Hosts: &mesh.Assignment{Localities: []mesh.Locality{{Endpoints: []mesh.Endpoint{{
			Address: silent.Addr().(*net.TCPAddr).AddrPort(), Weight: 1,
		}}}}},
	})
	s, _ := edit.Snapshot()
	snapshot := func() *mesh.Snapshot { return s }
	client := callout.New(callout.Config{Snapshot: snapshot, Balancer: balance.New(balance.Config{Snapshot: snapshot})})
	t.Cleanup(client.Close)
	return &Role{callouts: client, budget: memory}, &mesh.ExtAuthz{
		StatusOnError: 403, HTTP: &mesh.HTTPAuthz{Service: mesh.HTTPService{Cluster: "c", Timeout: nettest.Patience}},
	}
}

// Requests are copied for servers within the budget of the process. Beyond it, the peer that has most of them loses one: its
// server counts as unreachable.
func TestQuestionsAreHeldInTheBudget(t *testing.T) {
	const large = 64 << 10
	memory := budget.New(5 * large)
	role, e := askingRole(t, memory)
	ask := func(from string, size int) *question {
		return role.ask(e, &extauthz.Question{
			Source:  netip.AddrPortFrom(netip.MustParseAddr(from), 1),
			Request: &extauthz.Request{Method: "GET", Host: "a", Path: "/", Fields: []route.Field{{Name: "x", Value: strings.Repeat("x", size)}}},
		}, nil)
	}
	first := ask("198.51.100.1", large)
	if held := memory.Used(); held < 2*large {
		t.Errorf("a question about %d bytes holds %d", large, held)
	}
	modest, second := ask("198.51.100.2", 1), ask("198.51.100.1", large)
	third := ask("198.51.100.1", large)
	ended(t, first)
	if a := first.answer(e); !a.Denied || !errors.Is(a.Err, budget.ErrEvicted) {
		t.Errorf("the question that was evicted: %+v", a)
	}
	if modest.Answered() || second.Answered() || third.Answered() {
		t.Error("another question has ended")
	}
	for _, q := range []*question{modest, second, third} {
		q.Cancel()
		ended(t, q)
	}
	if held := memory.Used(); held != 0 {
		t.Errorf("after all questions, %d bytes are held", held)
	}
}

// A filter asks about a share of the requests. It does not draw again when the request is decided about again, or when
// another filter needs the body.
func TestASeedDecidesWhetherAFilterAsks(t *testing.T) {
	share := func(n, of uint32) *mesh.ExtAuthz {
		return &mesh.ExtAuthz{Enabled: mesh.Fraction{Numerator: n, Denominator: of}, StatusOnError: 403}
	}
	never, half, other := share(0, 100), share(50, 100), share(50, 100)
	g := &gate{}
	asks := func(e *mesh.ExtAuthz, seed uint64, collected *httpforward.Collected) bool {
		reply, _ := g.ext(&httpforward.Request{Connection: &flow.Record{}, Seed: seed, Collected: collected}, e, nil)
		return reply != nil // without a role, its server cannot be asked
	}
	const requests = 2000
	body := &httpforward.Collected{Wanted: 1, Whole: true}
	drawn, both := 0, 0
	for seed := range uint64(requests) {
		if asks(never, seed, nil) || asks(never, seed, body) {
			t.Fatal("a filter that is never enabled asks")
		}
		first := asks(half, seed, nil)
		if again := asks(half, seed, body); again != first {
			t.Fatalf("a filter asks: %v, then %v", first, again)
		}
		if first {
			drawn++
			if asks(other, seed, nil) {
				both++
			}
		}
	}
	if drawn < requests*4/10 || drawn > requests*6/10 || both < requests*15/100 || both > requests*35/100 {
		t.Errorf("of %d requests, a filter for half of them asks about %d, and two such filters about %d", requests, drawn, both)
	}
}

// The certificate of an older connection is not known. A server that sees certificates would take it for a client without one, also
// if the certificate has neither names nor a subject.
func TestACertificateThatIsNotKnownIsNotShownAsNone(t *testing.T) {
	role, e := askingRole(t, budget.New(1<<20))
	role.mesh = &inForce{}
	e.PeerCert = true
	for _, c := range []struct {
		names []string
		fails bool
	}{{nil, false}, {[]string{""}, true}, {[]string{"spiffe://a"}, true}} {
		about := connectionQuestion(role, &authz.Subject{Names: c.names}, &flow.Record{})
		about.Request = &extauthz.Request{Method: "GET", Host: "a", Path: "/"}
		q := role.ask(e, about, nil)
		q.Cancel()
		ended(t, q)
		if a := q.answer(e); !a.Denied || errors.Is(a.Err, errNoCertificate) != c.fails {
			t.Errorf("names %q: %+v", c.names, a)
		}
	}
}
