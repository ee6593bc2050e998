package metrics

import (
	"cmp"
	"fmt"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/flow"
)

const (
	idOfClient = "spiffe://cluster.local/ns/shop/sa/client"
	idOfServer = "spiffe://cluster.local/ns/shop/sa/server"
)

// between describes mutual TLS of this pod with a peer.
func between(peer string) *flow.Security {
	return &flow.Security{Peer: peer, Own: idOfServer, Mutual: true}
}

// Requests and connections by TLS have the principals of both ends. The destination reports the policy, as in Istio.
func TestTLSGivesPrincipals(t *testing.T) {
	const unknown = "source_principal=unknown destination_principal=unknown"
	for _, c := range []struct {
		direction flow.Direction
		security  *flow.Security
		want      string
	}{
		{flow.Inbound, between(idOfClient), "source_principal=" + idOfClient + " destination_principal=" + idOfServer + " connection_security_policy=mutual_tls"},
		{flow.Inbound, &flow.Security{Own: idOfServer}, "source_principal=unknown destination_principal=" + idOfServer + " connection_security_policy=none"},
		{flow.Inbound, &flow.Security{Mutual: true}, unknown + " connection_security_policy=mutual_tls"},
		{flow.Inbound, nil, unknown + " connection_security_policy=none"},
		{flow.Outbound, between(idOfClient), "source_principal=" + idOfServer + " destination_principal=" + idOfClient + " connection_security_policy=unknown"},
		{flow.Outbound, &flow.Security{}, unknown + " connection_security_policy=unknown"},
		{flow.Outbound, nil, unknown + " connection_security_policy=unknown"},
	} {
		m := New(pod, Options{Version: "v"})
		table := flow.NewTable(m)
		r := request(connection(table, c.direction, flow.HTTP11), "a.example", 200)
		r.Security = c.security
		m.Closed(r)
		r.Security = nil // on the same connection
		m.Closed(r)
		r.Security = c.security
		m.Closed(r)
		tcp := flow.Open(c.direction, peer)
		tcp.Security = c.security
		table.List(tcp)
		table.Carry(tcp, flow.Opaque, flow.Hello{})
		tcp.Sent.Add(7)
		tcp.Close(table, flow.Completed, nil)
		requests := 2.0
		if c.security == nil || *c.security == (flow.Security{}) {
			requests = 3
		}
		for name, want := range map[string]float64{
			"istio_requests_total": requests, "istio_tcp_connections_opened_total": 1, "istio_tcp_connections_closed_total": 1, "istio_tcp_sent_bytes_total": 7,
		} {
			if got := value(t, m, name, strings.Fields(c.want)...); got != want {
				t.Errorf("%v, %+v: %s is %v with %s, want %v", c.direction, c.security, name, got, c.want, want)
			}
		}
	}
}

// However many peers there are, series are bounded, and peers without a place are counted without their principals.
func TestPrincipalsAreBounded(t *testing.T) {
	for _, direction := range []flow.Direction{flow.Inbound, flow.Outbound} {
		m := New(pod, Options{Version: "v"})
		table := flow.NewTable(m)
		c := connection(table, direction, flow.HTTP11)
		series := 0
		for i := range 1000 {
			r := request(c, "a.example", 200+i%300)
			r.Security = between(fmt.Sprintf("spiffe://cluster.local/ns/shop/sa/%d", i))
			m.Closed(r)
			tcp := flow.Open(direction, peer)
			tcp.Security = r.Security
			tcp.Close(m, flow.Explanations[i%len(flow.Explanations)].Reason, nil)
			if i == 499 {
				series = strings.Count(text(t, m), "\n")
			}
		}
		if again := strings.Count(text(t, m), "\n"); again > series+100 || again > 10_000 {
			t.Errorf("%v: %d lines, and %d of half of the peers", direction, again, series)
		}
		if got := value(t, m, "istio_requests_total"); got != 1000 {
			t.Errorf("%v: %v requests, want 1000", direction, got)
		}
		policy := map[flow.Direction]string{flow.Inbound: "mutual_tls", flow.Outbound: "unknown"}[direction]
		if value(t, m, "istio_requests_total", "source_principal=unknown", "destination_principal=unknown", "connection_security_policy="+policy) == 0 {
			t.Errorf("%v: no request is counted without principals", direction)
		}
	}
}

// Requests whose labels are not those of their TLS resemble each other as well as others do.
func TestTheCountersOfRequestsWithoutPrincipalsAreCached(t *testing.T) {
	m := New(pod, Options{Version: "v"})
	table := flow.NewTable(m)
	for i := range 2 * m.directions[flow.Outbound].budget.peers {
		for _, c := range []struct {
			direction flow.Direction
			security  *flow.Security
		}{
			{flow.Inbound, between(fmt.Sprintf("spiffe://cluster.local/ns/shop/sa/%d", i))},
			{flow.Outbound, between(fmt.Sprintf("spiffe://cluster.local/ns/shop/sa/%d", i))},
			{flow.Outbound, &flow.Security{}},
			{flow.Outbound, &flow.Security{Mutual: true}},
			{flow.Outbound, nil},
		} {
			r := request(connection(table, c.direction, flow.HTTP11), "a.example", 200)
			r.Security = c.security
			m.Closed(r)
			last := place.Get(r.Connection).(*lastRequest)
			if !last.like(r) {
				t.Errorf("%v, peer %d, %+v: the counters are looked up again", c.direction, i, c.security)
			}
			if r.Security = between("another"); last.like(r) {
				t.Errorf("%v, peer %d, %+v: the counters are those of another peer", c.direction, i, c.security)
			}
		}
	}
}

// reviews is a workload that has described itself.
var reviews = &flow.Workload{
	Name: "reviews-v2", Namespace: "shop", Cluster: "east", App: "reviews", Version: "v2", CanonicalService: "reviews", CanonicalRevision: "v2",
}

// The labels of the other side are those that its proxy has sent; without them they are unknown, as in Istio.
func TestPeersDescribeTheirWorkloads(t *testing.T) {
	for direction, side := range map[flow.Direction]string{flow.Inbound: "source_", flow.Outbound: "destination_"} {
		for _, w := range []*flow.Workload{reviews, {Name: "reviews-v2"}, nil} {
			m := New(pod, Options{Version: "v"})
			table := flow.NewTable(m)
			r := request(connection(table, direction, flow.HTTP11), "a.example", 200)
			r.Workload.Set(w)
			m.Closed(r)
			tcp := flow.Open(direction, peer)
			tcp.Workload.Set(w)
			table.List(tcp)
			table.Carry(tcp, flow.Opaque, flow.Hello{})
			tcp.Sent.Add(7)
			tcp.Close(table, flow.Completed, nil)
			var known flow.Workload
			if w != nil {
				known = *w
			}
			want := []string{
				"workload=" + orUnknown(known.Name), "workload_namespace=" + orUnknown(known.Namespace), "cluster=" + orUnknown(known.Cluster),
				"app=" + orUnknown(known.App), "version=" + orUnknown(known.Version), "canonical_service=" + orUnknown(known.CanonicalService),
				"canonical_revision=" + cmp.Or(known.CanonicalRevision, "latest"),
			}
			for i := range want {
				want[i] = side + want[i]
			}
			for name, sum := range map[string]float64{
				"istio_requests_total": 1, "istio_tcp_connections_opened_total": 1, "istio_tcp_connections_closed_total": 1, "istio_tcp_sent_bytes_total": 7,
			} {
				if got := value(t, m, name, want...); got != sum {
					t.Errorf("%v: %s is %v with %q, want %v", direction, name, got, want, sum)
				}
			}
		}
	}
}

func orUnknown(name string) string { return cmp.Or(name, "unknown") }

// A peer of a connection may describe itself after the connection has begun. All of it is counted with one workload.
func TestAWorkloadThatIsDescribedLateIsCounted(t *testing.T) {
	for name, scraped := range map[string]bool{"before the first scrape": false, "after it": true} {
		m := New(pod, Options{Version: "v"})
		table := flow.NewTable(m)
		m.Watch(table, Sources{})
		tcp := flow.Open(flow.Inbound, peer)
		tcp.Security = between(idOfClient)
		tcp.Security.Exchanges = true
		table.List(tcp)
		table.Carry(tcp, flow.Opaque, flow.Hello{})
		opened := func(workload string) float64 {
			return value(t, m, "istio_tcp_connections_opened_total", "source_workload="+workload, "source_principal="+idOfClient)
		}
		want := "reviews-v2"
		if scraped {
			if want = "unknown"; opened(want) != 1 {
				t.Errorf("%s: an open connection is not counted", name)
			}
		}
		tcp.Workload.Set(reviews)
		tcp.Sent.Add(7)
		if got := opened(want); got != 1 {
			t.Errorf("%s: %v connections opened, want 1", name, got)
		}
		tcp.Close(table, flow.Completed, nil)
		if got := value(t, m, "istio_tcp_sent_bytes_total", "source_workload="+want); got != 7 {
			t.Errorf("%s: %v bytes, want 7", name, got)
		}
		if got := value(t, m, "istio_tcp_connections_closed_total", "source_workload="+reviews.Name); got != 1 {
			t.Errorf("%s: %v connections closed, want 1", name, got)
		}
	}
}

// Clients without TLS can make up any number of workloads. They leave places for those that TLS verifies.
func TestMadeUpWorkloadsLeaveRoomForOthers(t *testing.T) {
	for _, direction := range []flow.Direction{flow.Inbound, flow.Outbound} {
		m := New(pod, Options{Version: "v"})
		table := flow.NewTable(m)
		c := connection(table, direction, flow.HTTP11)
		for i := range 1000 {
			r := request(c, "a.example", 200)
			r.Workload.Set(&flow.Workload{Name: fmt.Sprint("junk", i)})
			m.Closed(r)
		}
		if got, most := len(m.directions[direction].known), m.directions[direction].budget.peers/2; got > most {
			t.Errorf("%v: %d made-up workloads have places, at most %d may", direction, got, most)
		}
		r := request(c, "a.example", 200)
		r.Security = between(idOfClient)
		r.Workload.Set(reviews)
		m.Closed(r)
		side := map[flow.Direction]string{flow.Inbound: "source_workload=", flow.Outbound: "destination_workload="}[direction]
		if got := value(t, m, "istio_requests_total", side+reviews.Name); got != 1 {
			t.Errorf("%v: %v requests of a verified peer, want 1", direction, got)
		}
		if got := value(t, m, "istio_requests_total"); got != 1001 {
			t.Errorf("%v: %v requests, want 1001", direction, got)
		}
	}
}
