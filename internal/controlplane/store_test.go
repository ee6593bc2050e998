package controlplane

import (
	"log/slog"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/wire"
	"github.com/pillion-proxy/pillion/internal/xds"
)

// nest returns a message in which fields lead to inner: nest(inner, 10, 1) is a field 10 whose field 1 is inner.
func nest(inner []byte, numbers ...int) []byte {
	for i := len(numbers) - 1; i >= 0; i-- {
		inner = wire.AppendBytes(nil, numbers[i], inner)
	}
	return inner
}

func text(number int, s string) []byte { return wire.AppendString(nil, number, s) }

func number(number int, v uint64) []byte { return wire.AppendVarint(nil, number, v) }

func join(parts ...[]byte) []byte { return slices.Concat(parts...) }

// packed returns a google.protobuf.Any.
func packed(url string, value []byte) []byte {
	return join(text(1, "type.googleapis.com/"+url), nest(value, 2))
}

func resource(t xds.Type, name string, value []byte) xds.Resource {
	return xds.Resource{Name: name, TypeURL: t.URL(), Value: value}
}

// cluster returns a cluster by EDS whose endpoints have the name service. mark makes versions differ.
func cluster(name, service, mark string) xds.Resource {
	return resource(xds.Clusters, name, join(text(1, name), number(2, 3), nest(text(2, service), 3), text(28, mark)))
}

func assignment(service, address string) xds.Resource {
	host := join(text(2, address), number(3, 80))
	return resource(xds.Endpoints, service, join(text(1, service), nest(nest(host, 1, 1, 1), 2, 2)))
}

// routes returns a table whose routes forward to clusters.
func routes(name string, clusters ...string) xds.Resource {
	var list []byte
	for _, cluster := range clusters {
		list = append(list, nest(join(nest(text(1, "/"), 1), nest(text(1, cluster), 2)), 3)...)
	}
	return resource(xds.Routes, name, join(text(1, name), nest(join(text(1, "host"), text(2, "*"), list), 2)))
}

const (
	managerType  = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
	tcpProxyType = "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy"
	routerType   = "envoy.extensions.filters.http.router.v3.Router"
)

func listenerOf(name, mark, filterType string, filter []byte) xds.Resource {
	chain := nest(join(text(1, "f"), nest(packed(filterType, filter), 4)), 3)
	address := nest(join(text(2, "192.0.2.1"), number(3, 80)), 2, 1)
	return resource(xds.Listeners, name, join(text(1, name), address, nest(chain, 3), text(28, mark)))
}

// httpListener returns a listener whose routes are the table of that name.
func httpListener(name, table, mark string) xds.Resource {
	router := join(text(1, "router"), nest(packed(routerType, nil), 4))
	return listenerOf(name, mark, managerType, join(nest(text(2, table), 3), nest(router, 5)))
}

func tcpListener(name, cluster, mark string) xds.Resource {
	return listenerOf(name, mark, tcpProxyType, text(2, cluster))
}

func update(t xds.Type, resources ...xds.Resource) xds.Update {
	return xds.Update{Type: t, Resources: resources}
}

func removal(t xds.Type, names ...string) xds.Update { return xds.Update{Type: t, Removed: names} }

// rig is a store with a clock.
type rig struct {
	*Store
	t   *testing.T
	now time.Time
	log strings.Builder
}

func newRig(t *testing.T) *rig {
	t.Helper()
	r := &rig{t: t, now: time.Unix(1_000_000, 0)}
	s, err := NewStore(StoreConfig{Log: slog.New(slog.NewTextHandler(&r.log, nil)), Now: func() time.Time { return r.now }})
	if err != nil {
		t.Fatal(err)
	}
	r.Store = s
	return r
}

// accepts takes updates that must not be rejected.
func (r *rig) accepts(updates ...xds.Update) {
	r.t.Helper()
	for _, u := range updates {
		if outcome := r.Update(u); len(outcome.Rejected) > 0 {
			r.t.Fatalf("%v: rejected %+v", u.Type, outcome.Rejected)
		}
	}
}

func (r *rig) advance(d time.Duration) {
	r.now = r.now.Add(d)
	r.Tick()
}

// inForce returns what is in force: clusters with what their endpoints are, routes and listeners.
func (r *rig) inForce() string {
	s := r.Snapshot()
	if s == nil {
		return "nothing"
	}
	var all []string
	for name, c := range s.Clusters() {
		hosts := "-"
		if a := s.Hosts(c); a != nil && len(a.Localities) > 0 {
			hosts = a.Localities[0].Endpoints[0].Address.Addr().String()
		}
		all = append(all, name+"="+hosts)
	}
	for name, table := range s.RouteTables() {
		names := slices.Collect(table.ClusterNames())
		all = append(all, name+"→"+strings.Join(names, ","))
	}
	for name, l := range s.Listeners() {
		names := append(slices.Collect(l.RouteNames()), slices.Collect(l.ClusterNames())...)
		all = append(all, name+"→"+strings.Join(names, ","))
	}
	return strings.Join(all, " ")
}

func (r *rig) want(want string) {
	r.t.Helper()
	if got := r.inForce(); got != want {
		r.t.Errorf("in force:\n%s\nwant:\n%s", got, want)
	}
}

// begin brings a cluster with its endpoints, and a listener with its routes.
func begin(t *testing.T) *rig {
	t.Helper()
	r := newRig(t)
	r.accepts(
		update(xds.Clusters, cluster("web", "web", "1")),
		update(xds.Endpoints, assignment("web", "192.0.2.10")),
		update(xds.Listeners, httpListener("http", "80", "1")),
		update(xds.Routes, routes("80", "web")),
	)
	r.want("web=192.0.2.10 80→web http→80")
	return r
}

func TestNamesAreAskedForInTheirTurn(t *testing.T) {
	r := newRig(t)
	for _, step := range []struct {
		update xds.Update
		want   map[xds.Type][]string
	}{
		{update(xds.Clusters, cluster("a", "s", "1"), cluster("b", "", "1")),
			map[xds.Type][]string{xds.Endpoints: {"b", "s"}, xds.Listeners: nil, xds.Names: nil, xds.ProxyConfigs: nil}},
		{update(xds.Endpoints, assignment("s", "192.0.2.1")), map[xds.Type][]string{}},
		{update(xds.Listeners, httpListener("l", "80", "1")), map[xds.Type][]string{xds.Routes: {"80"}}},
		{update(xds.Clusters, cluster("a", "s", "2")), map[xds.Type][]string{}},
		{removal(xds.Clusters, "b"), map[xds.Type][]string{xds.Endpoints: {"s"}}},
		{removal(xds.Listeners, "l"), map[xds.Type][]string{xds.Routes: {}}},
	} {
		outcome := r.Update(step.update)
		if !maps.EqualFunc(outcome.Wanted, step.want, slices.Equal) || len(outcome.Rejected) > 0 {
			t.Errorf("%v: outcome %+v, want %v", step.update.Type, outcome, step.want)
		}
	}
}

func TestChangesAreMadeBeforeWhatTheyReplaceIsBroken(t *testing.T) {
	for _, test := range []struct {
		name string
		do   func(r *rig)
		want string
	}{
		{"a new cluster waits for its endpoints", func(r *rig) {
			r.accepts(update(xds.Clusters, cluster("pay", "pay", "1")))
		}, "web=192.0.2.10 80→web http→80"},
		{"and is in force with them", func(r *rig) {
			r.accepts(update(xds.Clusters, cluster("pay", "pay", "1")), update(xds.Endpoints, assignment("pay", "192.0.2.20")))
		}, "pay=192.0.2.20 web=192.0.2.10 80→web http→80"},
		{"or after 15 s", func(r *rig) {
			r.accepts(update(xds.Clusters, cluster("pay", "pay", "1")))
			r.advance(14 * time.Second)
			r.want("web=192.0.2.10 80→web http→80")
			r.advance(time.Second)
		}, "pay=- web=192.0.2.10 80→web http→80"},
		{"a cluster with other endpoints keeps its last version", func(r *rig) {
			r.accepts(update(xds.Clusters, cluster("web", "other", "1")))
			r.want("web=192.0.2.10 80→web http→80")
			r.accepts(update(xds.Endpoints, assignment("other", "192.0.2.20")))
		}, "web=192.0.2.20 80→web http→80"},
		{"routes wait for a cluster that waits", func(r *rig) {
			r.accepts(update(xds.Clusters, cluster("pay", "pay", "1")), update(xds.Routes, routes("80", "pay")))
			r.want("web=192.0.2.10 80→web http→80")
			r.accepts(update(xds.Endpoints, assignment("pay", "192.0.2.20")))
		}, "pay=192.0.2.20 web=192.0.2.10 80→pay http→80"},
		{"routes do not wait for a cluster that does not exist", func(r *rig) {
			r.accepts(update(xds.Routes, routes("80", "nowhere")))
		}, "web=192.0.2.10 80→nowhere http→80"},
		{"a cluster that was removed stays until routes change", func(r *rig) {
			r.accepts(removal(xds.Clusters, "web"))
			r.want("web=192.0.2.10 80→web http→80")
			r.accepts(update(xds.Routes, routes("80", "nowhere")))
		}, "80→nowhere http→80"},
		{"and at most one minute", func(r *rig) {
			r.accepts(removal(xds.Clusters, "web"))
			r.advance(time.Minute)
		}, "80→web http→80"},
		{"a cluster that comes back while it stays", func(r *rig) {
			r.accepts(removal(xds.Clusters, "web"), update(xds.Clusters, cluster("web", "web", "1")))
			r.advance(time.Hour)
		}, "web=192.0.2.10 80→web http→80"},
		{"a listener keeps its last version until its routes come", func(r *rig) {
			r.accepts(update(xds.Listeners, httpListener("http", "81", "2")))
			r.advance(time.Hour)
			r.want("web=192.0.2.10 80→web http→80")
			r.accepts(update(xds.Routes, routes("81", "web")))
		}, "web=192.0.2.10 81→web http→81"},
		{"a new listener waits for its routes", func(r *rig) {
			r.accepts(update(xds.Listeners, httpListener("more", "81", "2")))
			r.want("web=192.0.2.10 80→web http→80")
			r.accepts(update(xds.Routes, routes("81", "web")))
		}, "web=192.0.2.10 80→web 81→web http→80 more→81"},
		{"a listener waits for its clusters", func(r *rig) {
			r.accepts(update(xds.Clusters, cluster("tcp", "tcp", "1")), update(xds.Listeners, tcpListener("tcp", "tcp", "1")))
			r.want("web=192.0.2.10 80→web http→80")
			r.accepts(update(xds.Endpoints, assignment("tcp", "192.0.2.30")))
		}, "tcp=192.0.2.30 web=192.0.2.10 80→web http→80 tcp→tcp"},
		{"a listener that is removed goes at once, and with it its routes", func(r *rig) {
			r.accepts(removal(xds.Listeners, "http"))
		}, "web=192.0.2.10"},
		{"endpoints and routes stay while they are named", func(r *rig) {
			r.accepts(removal(xds.Endpoints, "web"), removal(xds.Routes, "80"))
		}, "web=192.0.2.10 80→web http→80"},
		{"a whole service is replaced", func(r *rig) {
			r.accepts(xds.Update{Type: xds.Clusters, Resources: []xds.Resource{cluster("new", "new", "1")}, Removed: []string{"web"}},
				update(xds.Routes, routes("80", "new")))
			r.want("web=192.0.2.10 80→web http→80")
			r.accepts(update(xds.Endpoints, assignment("new", "192.0.2.40")))
		}, "new=192.0.2.40 80→new http→80"},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := begin(t)
			test.do(r)
			r.want(test.want)
		})
	}
}

func TestTheFirstSnapshotIsWhole(t *testing.T) {
	r := newRig(t)
	for _, u := range []xds.Update{
		update(xds.Clusters, cluster("web", "web", "1")),
		update(xds.Listeners, httpListener("http", "80", "1")),
		update(xds.Routes, routes("80", "web")),
	} {
		r.accepts(u)
		r.want("nothing")
	}
	r.accepts(update(xds.Endpoints, assignment("web", "192.0.2.10")))
	r.want("web=192.0.2.10 80→web http→80")
	<-r.Initialized()
}

func TestTheFirstSnapshotDoesNotWaitForever(t *testing.T) {
	r := newRig(t)
	r.accepts(update(xds.Clusters, cluster("web", "web", "1")), update(xds.Listeners, httpListener("http", "80", "1")))
	r.advance(warmingTimeout)
	r.want("web=-")
	<-r.Initialized()
}

func TestTheLastGoodVersionStaysInForce(t *testing.T) {
	refused := cluster("web", "web", "2")
	refused.Value = append(refused.Value, nest(nil, 59)...) // transport_socket_matcher
	r := begin(t)
	good := r.Snapshot().Cluster("web")
	outcome := r.Update(update(xds.Clusters, refused))
	if len(outcome.Rejected) != 1 || outcome.Rejected[0].Name != "web" || !strings.Contains(outcome.Rejected[0].Reason, "transport_socket_matcher") {
		t.Errorf("outcome %+v", outcome)
	}
	if r.Snapshot().Cluster("web") != good {
		t.Error("another version is in force")
	}
	if outcome := r.Update(update(xds.Clusters, refused)); len(outcome.Rejected) != 1 {
		t.Error("it is accepted when it comes again")
	}
	r.accepts(update(xds.Clusters, cluster("web", "web", "1")))
	for resource := range r.Resources() {
		if resource.Refusal != nil {
			t.Errorf("%s is still refused", resource.Name)
		}
	}
	if r.Snapshot().Cluster("web") != good {
		t.Error("the same version was compiled again")
	}
}

func TestHostsForDNSArePassedOnWhenTheyChange(t *testing.T) {
	var got []*mesh.Names
	s, err := NewStore(StoreConfig{Log: slog.New(slog.DiscardHandler), Names: func(n *mesh.Names) { got = append(got, n) }})
	if err != nil {
		t.Fatal(err)
	}
	table := func(host string) xds.Update {
		entry := join(text(1, host), nest(text(1, "10.96.0.1"), 2))
		return xds.Update{Type: xds.Names, Resources: []xds.Resource{resource(xds.Names, "", nest(entry, 1))}}
	}
	s.Update(table("a.example"))
	s.Update(table("a.example"))
	s.Update(xds.Update{Type: xds.Clusters})
	s.Update(table("b.example"))
	s.Update(xds.Update{Type: xds.Names, Resources: []xds.Resource{resource(xds.Names, "", []byte{0xff})}})
	if len(got) != 2 || len(got[0].Hosts["a.example"].Addresses) != 1 || len(got[1].Hosts["b.example"].Addresses) != 1 {
		t.Errorf("passed on: %+v", got)
	}
	if s.Snapshot() != nil {
		t.Error("the store is initialized")
	}
}
