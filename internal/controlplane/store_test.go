package controlplane

import (
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/secure/securetest"
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
	s, err := NewStore(StoreConfig{Log: slog.New(slog.NewTextHandler(&r.log, &slog.HandlerOptions{Level: slog.LevelWarn})), Now: func() time.Time { return r.now }})
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
		if c.Refused {
			continue
		}
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

func (r *rig) mustBeInitialized() {
	r.t.Helper()
	select {
	case <-r.Initialized():
	default:
		r.t.Error("not initialized")
	}
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
		{"a change that is taken back while it waits", func(r *rig) {
			r.accepts(update(xds.Clusters, cluster("web", "other", "1")), update(xds.Clusters, cluster("web", "web", "1")))
			r.advance(time.Hour)
		}, "web=192.0.2.10 80→web http→80"},
		{"endpoints stay until they are not asked for any more", func(r *rig) {
			r.accepts(update(xds.Clusters, cluster("web", "other", "1")))
			r.advance(time.Hour)
			r.want("web=- 80→web http→80")
			r.accepts(update(xds.Clusters, cluster("web", "web", "1")))
		}, "web=192.0.2.10 80→web http→80"},
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
		{"a listener of inbound traffic does not wait for clusters", func(r *rig) {
			l := tcpListener("tcp", "tcp", "1")
			l.Value = join(l.Value, number(16, 1))
			r.accepts(update(xds.Clusters, cluster("tcp", "tcp", "1")), update(xds.Listeners, l))
		}, "web=192.0.2.10 80→web http→80 tcp→tcp"},
		{"routes do not wait for the endpoints of ever new clusters", func(r *rig) {
			for i := range 31 {
				name := string(rune('a' + i))
				r.accepts(update(xds.Clusters, cluster(name, name, "1")), update(xds.Routes, routes("80", "web", name)))
				r.advance(time.Second)
			}
			r.accepts(removal(xds.Clusters, strings.Split("abcdefghijklmnopqrstuvwxyz{|}~", "")...))
		}, "web=192.0.2.10 80→web,~ http→80"},
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
	r.mustBeInitialized()
}

func TestTheFirstSnapshotDoesNotWaitForever(t *testing.T) {
	r := newRig(t)
	r.accepts(update(xds.Clusters, cluster("web", "web", "1")), update(xds.Listeners, httpListener("http", "80", "1")))
	if took, ok := r.Initializing(); took != 0 || ok {
		t.Error("it is initialized at once")
	}
	r.advance(warmingTimeout)
	r.want("web=-")
	r.mustBeInitialized()
	if took, ok := r.Initializing(); took != warmingTimeout || !ok {
		t.Errorf("initialized after %v", took)
	}
}

// The configuration of an HTTP filter that is a resource of its own is asked for by the listener that names it. The listener
// waits for it, and is in force without it after 30 s: the filter refuses requests then, as one does that is not understood.
func TestConfigurationsOfFiltersAreAskedFor(t *testing.T) {
	const rbacType = "envoy.extensions.filters.http.rbac.v3.RBAC"
	extension := func(value []byte) xds.Resource {
		return resource(xds.Extensions, "e", join(text(1, "e"), nest(value, 2)))
	}
	r := begin(t)
	named := join(text(1, "e"), nest(text(4, rbacType), 5))
	router := join(text(1, "router"), nest(packed(routerType, nil), 4))
	outcome := r.Update(update(xds.Listeners, listenerOf("http", "2", managerType, join(nest(text(2, "80"), 3), nest(named, 5), nest(router, 5)))))
	if !slices.Equal(outcome.Wanted[xds.Extensions], []string{"e"}) || len(outcome.Rejected) > 0 {
		t.Fatalf("outcome %+v", outcome)
	}
	filters := func() []mesh.HTTPFilter { return r.Snapshot().Listener("http").Chains[0].HTTP.Filters }
	if r.advance(namingTimeout - 1); len(filters()) != 1 {
		t.Error("the listener does not wait")
	}
	r.advance(1)
	filter := &filters()[0]
	if f := r.Snapshot().Filter(filter); f != nil {
		t.Errorf("before it comes: %+v", f)
	}
	r.accepts(update(xds.Extensions, extension(packed(rbacType, nil))))
	if f := r.Snapshot().Filter(filter); f == nil || f.RBAC == nil || f.Refused {
		t.Errorf("when it has come: %+v", f)
	}
	if outcome := r.Update(update(xds.Extensions, extension(packed("x.Y", nil)))); len(outcome.Rejected) != 1 || r.Snapshot().Filter(filter).Refused {
		t.Errorf("another version that is not understood: outcome %+v, filter %+v", outcome, r.Snapshot().Filter(filter))
	}
	r = begin(t)
	r.Update(update(xds.Listeners, listenerOf("http", "2", managerType, join(nest(text(2, "80"), 3), nest(named, 5), nest(router, 5)))))
	r.Update(update(xds.Extensions, extension(packed("x.Y", nil))))
	if filter = &filters()[0]; filter.Name != "e" {
		t.Error("the listener waits for more than the configuration of its filter")
	}
	if f := r.Snapshot().Filter(filter); f == nil || !f.Refused {
		t.Errorf("without a good version: %+v", f)
	}
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

func TestWhatCannotBeUsedIsRejectedByName(t *testing.T) {
	malformed := func(r xds.Resource) xds.Resource {
		r.Value = append(slices.Clone(r.Value), 0xff)
		return r
	}
	renamed := cluster("web", "web", "2")
	renamed.Name = "other"
	mistyped := cluster("web", "web", "2")
	mistyped.TypeURL = xds.Listeners.URL()
	large := cluster("web", "web", strings.Repeat("x", maxResource))
	long := strings.Repeat("n", maxName+1)
	for _, test := range []struct {
		name   string
		update xds.Update
		want   string // resource: reason
	}{
		{"malformed bytes", update(xds.Clusters, malformed(cluster("web", "web", "2"))), "web: malformed"},
		{"another name in it", update(xds.Clusters, renamed), `other: the name in it is "web"`},
		{"another type", update(xds.Clusters, mistyped), `web: its type is "type.googleapis.com/envoy.config.listener.v3.Listener"`},
		{"twice in a response", update(xds.Clusters, cluster("web", "web", "2"), cluster("web", "web", "3")), "web: more than one"},
		{"a large resource", update(xds.Clusters, large), "web: "},
		{"a long name", update(xds.Clusters, cluster(long, "web", "1")), long + ": its name has"},
		{"malformed routes", update(xds.Routes, malformed(routes("80", "other"))), "80: malformed"},
		{"a malformed listener", update(xds.Listeners, malformed(httpListener("http", "81", "2"))), "http: malformed"},
		{"a finding of security", update(xds.Listeners, listenerOf("http", "", "x.Y", nil)), "http: "},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := begin(t)
			before := r.Snapshot()
			outcome := r.Update(test.update)
			if len(outcome.Rejected) != 1 || !strings.HasPrefix(outcome.Rejected[0].Name+": "+outcome.Rejected[0].Reason, test.want) {
				t.Errorf("outcome %.300v, want %.300s", outcome, test.want)
			}
			r.want("web=192.0.2.10 80→web http→80")
			for name, c := range before.Clusters() {
				if r.Snapshot().Cluster(name) != c {
					t.Errorf("another version of %s is in force", name)
				}
			}
			// The other resources of a response are used.
			good := cluster("good", "web", "1")
			if test.update.Type == xds.Clusters {
				test.update.Resources = append(test.update.Resources, good)
				r.Update(test.update)
				r.want("good=192.0.2.10 web=192.0.2.10 80→web http→80")
			}
		})
	}
}

func TestTheSameBytesOfTheRightTypeAreAccepted(t *testing.T) {
	r := begin(t)
	mistyped := cluster("web", "web", "2")
	mistyped.TypeURL = xds.Listeners.URL()
	if outcome := r.Update(update(xds.Clusters, mistyped)); len(outcome.Rejected) != 1 {
		t.Errorf("outcome %+v", outcome)
	}
	r.accepts(update(xds.Clusters, cluster("web", "web", "2")))
}

func TestWithoutAGoodVersionARefusedOneCloses(t *testing.T) {
	r := newRig(t)
	r.accepts(update(xds.Clusters), update(xds.Listeners, httpListener("http", "80", "1")))
	bad := routes("80", "web")
	bad.Value = append(bad.Value, 0xff)
	if outcome := r.Update(update(xds.Routes, bad)); len(outcome.Rejected) != 1 {
		t.Errorf("outcome %+v", outcome)
	}
	if table := r.Snapshot().RouteTable("80"); table == nil || !table.Refused {
		t.Errorf("routes %+v", table)
	}
	badCluster := cluster("bad", "web", "1")
	badCluster.Value = append(badCluster.Value, 0xff)
	r.Update(update(xds.Clusters, badCluster))
	if c := r.Snapshot().Cluster("bad"); c == nil || !c.Refused {
		t.Errorf("cluster %+v", c)
	}
	refused := listenerOf("tcp", "", "x.Y", nil)
	r.Update(update(xds.Listeners, refused))
	l := r.Snapshot().Listener("tcp")
	if l == nil || !l.Chains[0].Refused {
		t.Errorf("listener %+v", l)
	}
	broken := refused
	broken.Value = append(slices.Clone(refused.Value), 0xff)
	r.Update(update(xds.Listeners, broken))
	l = r.Snapshot().Listener("tcp")
	if l == nil || !l.Refused || len(l.Addresses) != 1 {
		t.Errorf("a malformed listener does not refuse connections to its address: %+v", l)
	}
	whole := httpListener("whole", "none", "1")
	whole.Value = join(whole.Value, nest(nil, 32)) // filter_chain_matcher
	r.Update(update(xds.Listeners, whole))
	if l := r.Snapshot().Listener("whole"); l == nil || !l.Refused {
		t.Errorf("a listener that refuses everything waits for its routes: %+v", l)
	}
	for resource := range r.Resources() {
		if resource.Name == "tcp" && (resource.Bytes != nil || resource.Refusal == nil) {
			t.Errorf("shown as in force: %+v", resource)
		}
	}
	r.accepts(update(xds.Routes, routes("80", "web")), update(xds.Listeners, tcpListener("tcp", "web", "1")))
	if r.Snapshot().RouteTable("80").Refused || r.Snapshot().Listener("tcp").Refused {
		t.Error("a good version does not open it")
	}
}

func TestOneTypeOfResourceIsBoundedInSum(t *testing.T) {
	s, err := NewStore(StoreConfig{Log: slog.New(slog.DiscardHandler), MaxBytes: 10_000})
	if err != nil {
		t.Fatal(err)
	}
	var resources []xds.Resource
	for i := range 100 {
		resources = append(resources, cluster(string(rune('a'+i%26))+string(rune('a'+i/26)), "web", strings.Repeat("x", 1000)))
	}
	outcome := s.Update(update(xds.Clusters, resources...))
	if n := len(outcome.Rejected); n != 91 || s.bytes > 10_000 {
		t.Errorf("%d are rejected, %d bytes are kept", n, s.bytes)
	}
	// A removed resource makes room.
	s.Update(removal(xds.Clusters, resources[0].Name, resources[1].Name))
	if outcome := s.Update(update(xds.Clusters, resources[99])); len(outcome.Rejected) > 0 {
		t.Errorf("rejected: %v", outcome.Rejected)
	}
}

// tlsListener ends TLS with certificates, and forwards to the cluster web.
func tlsListener(mark string, secrets ...string) xds.Resource {
	var all []byte
	for _, name := range secrets {
		all = append(all, nest(text(1, name), 6)...)
	}
	tls := nest(packed("envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext", nest(all, 1)), 3)
	l := tcpListener("tls", "web", mark)
	l.Value = join(l.Value, nest(join(nest(tls, 6), nest(join(text(1, "f"), nest(packed(tcpProxyType, text(2, "web")), 4)), 3), nest(text(9, "tls"), 1)), 3))
	return l
}

func TestSecretsOfTheControlPlaneAreAskedFor(t *testing.T) {
	const name = "kubernetes://cert"
	authority := securetest.New(t, "root")
	certificate := func() xds.Resource {
		return resource(xds.Secrets, name, securetest.Secret(t, name, authority.ECDSA(t, "shop.example")))
	}
	r := begin(t)
	r.advance(time.Hour)
	outcome := r.Update(update(xds.Listeners, tlsListener("1", "default", name, "ROOTCA", "file-cert:a~b", "file-root:c")))
	if !slices.Equal(outcome.Wanted[xds.Secrets], []string{name}) || len(outcome.Rejected) > 0 {
		t.Errorf("outcome %+v", outcome)
	}
	if absent := r.Absent(); len(absent) != 1 || absent[0].Name != name {
		t.Errorf("absent: %+v", absent)
	}
	r.advance(warmingTimeout - 1)
	if r.Snapshot().Listener("tls") != nil {
		t.Error("the listener does not wait for its secret")
	}
	r.advance(1)
	if line := r.log.String(); strings.Count(line, "\n") != 1 || !strings.Contains(line, name) {
		t.Errorf("logged %s", line)
	}
	if r.Snapshot().Listener("tls") == nil || r.Snapshot().Secret(name) != nil {
		t.Error("the listener is not in force without its secret")
	}
	// A secret that has not come in time delays the next version no more.
	first := r.Snapshot().Listener("tls")
	r.accepts(update(xds.Listeners, tlsListener("2", name)))
	if r.Snapshot().Listener("tls") == first {
		t.Error("the next version of the listener waits")
	}
	r.advance(time.Hour)
	r.accepts(update(xds.Secrets, certificate()))
	good := r.Snapshot().Secret(name)
	if good == nil || len(r.Absent()) != 0 || strings.Count(r.log.String(), "\n") != 1 {
		t.Errorf("secret %v, absent %v, logged %s", good, r.Absent(), r.log.String())
	}
	r.accepts(update(xds.Secrets, certificate()))
	rotated := r.Snapshot().Secret(name)
	if rotated == good {
		t.Error("the first certificate is still in force")
	}
	r.accepts(removal(xds.Secrets, name))
	if r.Snapshot().Secret(name) != rotated {
		t.Error("a secret that is named was removed")
	}
	r.Update(removal(xds.Listeners, "tls"))
	if r.Snapshot().Secret(name) != nil {
		t.Error("a secret that is not named any more is in force")
	}
}

// A listener with another certificate takes the place of the one before when that certificate has come.
func TestAListenerWaitsForTheCertificateThatItChangesTo(t *testing.T) {
	authority := securetest.New(t, "root")
	secret := func(name string) xds.Update {
		return update(xds.Secrets, resource(xds.Secrets, name, securetest.Secret(t, name, authority.ECDSA(t, "shop.example"))))
	}
	r := begin(t)
	r.accepts(update(xds.Listeners, tlsListener("1", "a")), secret("a"))
	before := r.Snapshot().Listener("tls")
	if before == nil {
		t.Fatal("the listener is not in force with its certificate")
	}
	r.accepts(update(xds.Listeners, tlsListener("2", "b")))
	r.advance(warmingTimeout - 1)
	if r.Snapshot().Listener("tls") != before || r.Snapshot().Secret("a") == nil {
		t.Error("the listener before, or its certificate, is not in force any more")
	}
	r.accepts(secret("b"))
	if r.Snapshot().Listener("tls") == before || r.Snapshot().Secret("b") == nil || r.Snapshot().Secret("a") != nil {
		t.Error("the next listener is not in force with its certificate alone")
	}
}

// A secret that cannot be used is rejected by its name, and the last good one stays. Its content is in no text.
func TestASecretThatCannotBeUsedIsRejected(t *testing.T) {
	authority := securetest.New(t, "root")
	good, other := securetest.Secret(t, "s", authority.ECDSA(t, "shop.example")), securetest.Secret(t, "s", authority.RSA(t, "shop.example"))
	parts := func(secret []byte) (chain, key []byte) {
		s, _, err := mesh.DecodeSecret(secret)
		if err != nil {
			t.Fatal(err)
		}
		return s.Certificate.Chain, s.Certificate.Key.PEM()
	}
	chain, key := parts(good)
	_, otherKey := parts(other)
	pair := func(chain, key []byte) []byte {
		return join(text(1, "s"), nest(join(nest(wire.AppendBytes(nil, 2, chain), 1), nest(wire.AppendBytes(nil, 2, key), 2)), 2))
	}
	leaked := "-----BEGIN " + strings.Repeat("SECRET", 8) + "-----\nAAAA\n-----END " + strings.Repeat("SECRET", 8) + "-----\n"
	for name, test := range map[string]struct {
		secret []byte
		want   string
	}{
		"a chain that is not PEM":  {pair([]byte("chain"), key), "tls_certificate: tls: failed to find any PEM data in certificate input"},
		"a key that is not PEM":    {pair(chain, []byte(strings.Repeat("SECRET", 8))), "tls_certificate: tls: failed to find any PEM data in key input"},
		"a key of another type":    {pair(chain, []byte(leaked)), "tls_certificate: tls: failed to find PEM block"},
		"the key of another chain": {pair(chain, otherKey), "tls_certificate: tls: private key type does not match public key type"},
		"both exchanged":           {pair(key, chain), "tls_certificate: tls: failed to find certificate PEM data"},
		"roots that are not PEM":   {join(text(1, "s"), nest(nest(text(2, "roots"), 1), 4)), "validation_context.trusted_ca: no certificate"},
		"a list that is not one":   {securetest.RootsSecret("s", authority.Roots, []byte("list")), "validation_context.crl: "},
	} {
		t.Run(name, func(t *testing.T) {
			refuse := func(r *rig) {
				t.Helper()
				outcome := r.Update(update(xds.Secrets, resource(xds.Secrets, "s", test.secret)))
				if len(outcome.Rejected) != 1 || outcome.Rejected[0].Name != "s" || !strings.HasPrefix(outcome.Rejected[0].Reason, test.want) {
					t.Errorf("outcome %+v, want %q", outcome, test.want)
				}
				if text := fmt.Sprint(outcome, r.Findings(), r.log.String()); strings.Contains(text, "SECRET") {
					t.Errorf("part of the key is in %s", text)
				}
			}
			r := begin(t)
			r.accepts(update(xds.Listeners, tlsListener("1", "s")))
			refuse(r)
			if s := r.Snapshot().Secret("s"); s == nil || !s.Refused || r.Snapshot().Listener("tls") == nil {
				t.Errorf("%v is in force, or the listener is not", s)
			}
			r.accepts(update(xds.Secrets, resource(xds.Secrets, "s", good)))
			kept := r.Snapshot().Secret("s")
			refuse(r)
			if r.Snapshot().Secret("s") != kept || kept.Refused {
				t.Error("the last good secret is not in force")
			}
		})
	}
}

func TestAFindingIsLoggedOnceWithItsOrigin(t *testing.T) {
	r := newRig(t)
	origin := nest(join(text(1, "istio"), nest(nest(join(text(1, "config"), nest(text(3, "/apis/networking.istio.io/v1/namespaces/shop/destination-rule/web"), 2)), 1), 2)), 25, 1)
	var resources []xds.Resource
	for _, name := range []string{"a", "b", "c"} {
		c := cluster(name, "web", "1")
		c.Value = join(c.Value, origin, nest(nil, 22), nest(nil, 22), nest(nil, 50)) // lb_subset_config twice, preconnect_policy
		resources = append(resources, c)
	}
	r.accepts(update(xds.Clusters, resources...))
	resources[0].Value = join(resources[0].Value, text(28, "2"))
	r.accepts(update(xds.Clusters, resources...))
	line := r.log.String()
	for _, want := range []string{"lb_subset_config", "class=traffic", "resource=a", `origin="destination-rule shop/web"`} {
		if !strings.Contains(line, want) {
			t.Errorf("%s is not in the log", want)
		}
	}
	if strings.Count(line, "\n") != 1 {
		t.Errorf("logged more than once:\n%s", line)
	}
	findings := r.Findings()
	if len(findings) != 9 || findings[0].Name != "a" || findings[0].Type != xds.Clusters || findings[0].Origin == "" {
		t.Errorf("findings %+v", findings)
	}
}

func TestTheLogOfFindingsIsBounded(t *testing.T) {
	r := newRig(t)
	for i := range 2 * maxLogged {
		c := cluster("web", "web", "1")
		c.Value = join(c.Value, number(1000+i, 1))
		r.accepts(update(xds.Clusters, c))
	}
	if n := strings.Count(r.log.String(), "\n"); n != maxLogged+1 {
		t.Errorf("%d lines, want %d", n, maxLogged+1)
	}
}

func TestNamesAndRootsAreInForceAtOnce(t *testing.T) {
	r := begin(t)
	host := nest(join(text(1, "web.shop"), nest(text(1, "192.0.2.1"), 2)), 1)
	r.accepts(
		update(xds.Names, resource(xds.Names, "", host)),
		update(xds.ProxyConfigs, resource(xds.ProxyConfigs, "a name that does not count", text(34, "root"))),
	)
	if s := r.Snapshot(); len(s.Names().Hosts) != 1 || !slices.Equal(s.TrustBundle(), []string{"root"}) {
		t.Errorf("names %v, roots %v", s.Names(), s.TrustBundle())
	}
}

func TestResourcesAreShownWithTheirBytes(t *testing.T) {
	r := begin(t)
	waiting := cluster("web", "other", "2")
	r.accepts(update(xds.Clusters, waiting))
	bad := httpListener("http", "80", "3")
	bad.Value = append(bad.Value, 0xff)
	r.Update(update(xds.Listeners, bad))
	want := map[string][]byte{
		"CDS web":         cluster("web", "web", "1").Value,
		"CDS web warming": waiting.Value,
		"EDS web":         assignment("web", "192.0.2.10").Value,
		"LDS http":        httpListener("http", "80", "1").Value,
		"RDS 80":          routes("80", "web").Value,
	}
	for resource := range r.Resources() {
		key := resource.Type.String() + " " + resource.Name
		if resource.Warming {
			key += " warming"
		}
		b, err := resource.Bytes()
		if err != nil || string(b) != string(want[key]) || !resource.Updated.Equal(r.now) || resource.Version == "" {
			t.Errorf("%s: error %v, bytes %q, want %q; %+v", key, err, b, want[key], resource)
		}
		delete(want, key)
		if refused := resource.Refusal != nil; refused != (key == "LDS http") {
			t.Errorf("%s: refusal %+v", key, resource.Refusal)
		} else if refused {
			if b, err := resource.Refusal.Bytes(); err != nil || string(b) != string(bad.Value) {
				t.Errorf("refused bytes %q, error %v", b, err)
			}
		}
	}
	if len(want) > 0 {
		t.Errorf("not shown: %v", slices.Collect(maps.Keys(want)))
	}
}

func TestFindingsAreBoundedInSum(t *testing.T) {
	s := quietStore(t)
	unknown := func(name string) xds.Resource {
		c := cluster(name, "web", "1")
		for i := range 50 {
			c.Value = append(c.Value, number(1000+i, 1)...)
		}
		return c
	}
	var resources []xds.Resource
	for i := range 300 {
		resources = append(resources, unknown(fmt.Sprint(i)))
	}
	for range 2 { // the same findings do not count twice
		s.Update(update(xds.Clusters, resources...))
		if n := s.TypeCounts()[xds.Clusters].Findings[mesh.Traffic]; n != len(s.Findings()) {
			t.Errorf("%d findings by class", n)
		}
		if n := len(s.Findings()); n != maxFindings+100 || s.findings != n {
			t.Errorf("%d findings, %d are counted", n, s.findings)
		}
	}
	for _, f := range s.Findings() {
		if many := strings.Contains(f.Problem, "and 49 more findings"); many != (len(f.Name) == 3 && f.Name >= "200") {
			t.Errorf("finding %+v", f)
		}
	}
	s.Update(removal(xds.Clusters, "0", "1"))
	s.Update(update(xds.Clusters, unknown("1")))
	var names []string
	for i := range resources {
		names = append(names, resources[i].Name)
	}
	s.Update(removal(xds.Clusters, names...))
	if s.findings != 0 || s.bytes != 0 {
		t.Errorf("%d findings and %d bytes are counted of no resources", s.findings, s.bytes)
	}
}

func TestResourcesAreCounted(t *testing.T) {
	r := begin(t)
	bad := httpListener("http", "80", "3")
	bad.Value = join(bad.Value, nest(nil, 32)) // filter_chain_matcher
	r.accepts(update(xds.Clusters, cluster("pay", "pay", "1"), cluster("web", "other", "1")))
	r.Update(update(xds.Listeners, bad))
	counts := r.TypeCounts()
	if c := counts[xds.Clusters]; c.InForce != 1 || c.Warming != 2 || c.Refused != 0 {
		t.Errorf("clusters %+v", c)
	}
	if l := counts[xds.Listeners]; l.InForce != 1 || l.Warming != 0 || l.Refused != 1 || l.Findings[mesh.Security] != 1 {
		t.Errorf("listeners %+v", l)
	}
	if allocations := testing.AllocsPerRun(10, func() { r.TypeCounts() }); allocations > 0 {
		t.Errorf("%v allocations", allocations)
	}
}

func TestTheNumberOfResourcesIsBounded(t *testing.T) {
	r := begin(t)
	for i := range maxResources {
		name := fmt.Sprint("other ", i)
		r.entries[xds.Names][name] = &entry{name: name}
	}
	outcome := r.Update(update(xds.Clusters, cluster("web", "web", "2"), cluster("more", "web", "1")))
	if len(outcome.Rejected) != 1 || outcome.Rejected[0].Name != "more" {
		t.Errorf("outcome %+v", outcome)
	}
}

func TestNamesThatWereNotAskedForAreIgnored(t *testing.T) {
	r := begin(t)
	r.accepts(update(xds.Endpoints, assignment("other", "192.0.2.1")), update(xds.Routes, routes("other", "web")))
	if r.entries[xds.Endpoints]["other"] != nil || r.entries[xds.Routes]["other"] != nil {
		t.Error("they are kept")
	}
}

func TestRemovedResourcesAreNotGood(t *testing.T) {
	r := begin(t)
	r.accepts(removal(xds.Clusters, "web"))
	r.want("web=192.0.2.10 80→web http→80")
	for resource := range r.LastGood() {
		if resource.Type == xds.Clusters {
			t.Errorf("%s is kept for a restart", resource.Name)
		}
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

// Endpoints that may require TLS in a way that is not understood must not be reached without it.
func TestRefusedEndpointsAreNotUsed(t *testing.T) {
	r := newRig(t)
	r.accepts(update(xds.Clusters, cluster("web", "web", "1")), update(xds.Listeners))
	match := join(text(1, "envoy.transport_socket_match"), nest(nest(join(text(1, "other"), nest(text(3, "v"), 2)), 1), 2))
	host := join(nest(nest(join(text(2, "192.0.2.1"), number(3, 80)), 1, 1), 1), nest(match, 3, 1))
	refused := resource(xds.Endpoints, "web", join(text(1, "web"), nest(host, 2, 2)))
	if outcome := r.Update(update(xds.Endpoints, refused)); len(outcome.Rejected) != 1 {
		t.Errorf("outcome %+v", outcome)
	}
	r.want("web=-")
	r.accepts(update(xds.Endpoints, assignment("web", "192.0.2.10")))
	r.Update(update(xds.Endpoints, refused))
	r.want("web=192.0.2.10")
}

// What follows the listeners has followed when connections meet the next ones.
func TestListenersAreReportedBeforeTheyAreInForce(t *testing.T) {
	var s *Store
	reported := 0
	s, err := NewStore(StoreConfig{Log: slog.New(slog.DiscardHandler), Listeners: func(next *mesh.Snapshot) {
		reported++
		if s.Snapshot() == next {
			t.Error("the listeners are in force before they are reported")
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	s.Update(update(xds.Clusters, cluster("web", "web", "1")))
	s.Update(update(xds.Endpoints, assignment("web", "192.0.2.1")))
	for _, mark := range []string{"1", "2", "3"} {
		s.Update(update(xds.Listeners, tcpListener("virtualInbound", "web", mark)))
	}
	if reported != 2 {
		t.Errorf("reported %d times, want 2", reported)
	}
}

// Another inbound listener is told of once it is in force, and the same one is not.
func TestAnotherInboundListenerIsReported(t *testing.T) {
	reported := 0
	s, err := NewStore(StoreConfig{Log: slog.New(slog.DiscardHandler), Bound: func() { reported++ }})
	if err != nil {
		t.Fatal(err)
	}
	virtual := func(mark string) xds.Update {
		return update(xds.Listeners, tcpListener("virtualInbound", "web", mark))
	}
	s.Update(update(xds.Clusters, cluster("web", "web", "1")))
	s.Update(update(xds.Endpoints, assignment("web", "192.0.2.1")))
	for i, c := range []struct {
		update xds.Update
		want   int
	}{
		{virtual("1"), 0}, // the first configuration: connections are held for it and woken by it
		{virtual("1"), 0},
		{virtual("2"), 1},
		{update(xds.Clusters, cluster("web", "web", "2")), 1},
	} {
		if s.Update(c.update); reported != c.want {
			t.Errorf("update %d: reported %d times, want %d", i, reported, c.want)
		}
	}
}
