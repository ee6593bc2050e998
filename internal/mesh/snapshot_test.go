package mesh

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"testing"
)

// snapshot returns a snapshot with n clusters.
func snapshot(n int) *Snapshot {
	edit := (*Snapshot)(nil).Edit()
	for i := range n {
		name := fmt.Sprint("cluster ", i)
		edit.SetCluster(name, &Cluster{Name: name})
	}
	s, _ := edit.Snapshot()
	return s
}

func TestASnapshotDoesNotChange(t *testing.T) {
	const n = 1000
	before := snapshot(n)
	want := maps.Collect(before.Clusters())
	edit := before.Edit()
	for i := range n {
		name := fmt.Sprint("cluster ", i)
		switch i % 3 {
		case 0:
			edit.SetCluster(name, &Cluster{Name: name})
		case 1:
			edit.SetCluster(name, nil)
		}
		edit.SetCluster("new "+name, &Cluster{})
	}
	edit.SetNames(&Names{})
	edit.SetTrustBundle([]string{"root"})
	edit.SetListener("l", &Listener{Addresses: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:80")}})
	edit.SetRoutes("r", &Routes{})
	edit.SetSecret("s", &Secret{})
	edit.SetAssignment("a", &Assignment{})
	after, changed := edit.Snapshot()
	if got := maps.Collect(before.Clusters()); !changed || !maps.Equal(got, want) {
		t.Errorf("changed %v, %d clusters", changed, len(got))
	}
	if before.Names() != nil || before.TrustBundle() != nil || before.Listener("l") != nil || before.RouteTable("r") != nil || before.Secret("s") != nil ||
		before.Assignment("a") != nil || before.Destination(netip.MustParseAddrPort("192.0.2.1:80")) != nil {
		t.Error("another part changed")
	}
	if len(maps.Collect(after.Clusters())) != 2*n-n/3 || after.Names() == nil || after.Listener("l") == nil || after.RouteTable("r") == nil ||
		after.Secret("s") == nil || after.Assignment("a") == nil || len(after.TrustBundle()) != 1 {
		t.Error("the changes are not in the new snapshot")
	}
}

func TestSnapshotsShareWhatDidNotChange(t *testing.T) {
	before := snapshot(1000)
	edit := before.Edit()
	edit.SetCluster("cluster 7", &Cluster{})
	after, _ := edit.Snapshot()
	for name, c := range before.Clusters() {
		if same := after.Cluster(name) == c; same != (name != "cluster 7") {
			t.Errorf("%s is the same: %v", name, same)
		}
	}
	edit = before.Edit()
	edit.SetCluster("cluster 7", before.Cluster("cluster 7"))
	edit.SetCluster("none", nil)
	edit.SetNames(nil)
	if _, changed := edit.Snapshot(); changed {
		t.Error("an edit that sets what is there is a change")
	}
}

func TestAnEditCopiesAPartOnce(t *testing.T) {
	const n = 1000
	before, clusters := snapshot(n), make([]Cluster, n)
	names := slices.Collect(maps.Keys(maps.Collect(before.Clusters())))
	allocations := testing.AllocsPerRun(10, func() {
		edit := before.Edit()
		for i, name := range names {
			edit.SetCluster(name, &clusters[i])
		}
	})
	if allocations > 10*shards {
		t.Errorf("%v allocations for %d clusters", allocations, n)
	}
}

func TestValuesComeInTheOrderOfTheirNames(t *testing.T) {
	var names []string
	for name := range snapshot(1000).Clusters() {
		names = append(names, name)
	}
	if len(names) != 1000 || !slices.IsSorted(names) {
		t.Errorf("%d names: %q", len(names), names)
	}
}

func TestListenersAreFoundByDestination(t *testing.T) {
	edit := (*Snapshot)(nil).Edit()
	for _, l := range []*Listener{
		{Name: "virtualOutbound", Addresses: addresses("0.0.0.0:15001"), UseOriginalDst: true},
		{Name: "virtualInbound", Addresses: addresses("0.0.0.0:15006"), Direction: Inbound},
		{Name: "exact", Addresses: addresses("192.0.2.1:80", "[2001:db8::1]:80"), Virtual: true},
		{Name: "wildcard", Addresses: addresses("0.0.0.0:80"), Virtual: true},
		{Name: "wildcard6", Addresses: addresses("[::]:81"), Virtual: true},
		{Name: "zz, of an address that is taken", Addresses: addresses("0.0.0.0:80", "0.0.0.0:15006")},
	} {
		edit.SetListener(l.Name, l)
	}
	s, _ := edit.Snapshot()
	for destination, want := range map[string]string{
		"192.0.2.1:80":          "exact",
		"[2001:db8::1]:80":      "exact",
		"[::ffff:192.0.2.1]:80": "exact",
		"192.0.2.2:80":          "wildcard",
		"[2001:db8::2]:80":      "",
		"[2001:db8::2]:81":      "wildcard6",
		"192.0.2.2:81":          "",
		"192.0.2.2:15001":       "",
		"192.0.2.2:15006":       "zz, of an address that is taken",
	} {
		if got := listenerName(s.Destination(netip.MustParseAddrPort(destination))); got != want {
			t.Errorf("%s: %q, want %q", destination, got, want)
		}
	}
	for port, want := range map[uint16]string{15001: "virtualOutbound", 15006: "virtualInbound", 80: "zz, of an address that is taken", 81: ""} {
		if got := listenerName(s.Bound(port)); got != want {
			t.Errorf("bound at %d: %q, want %q", port, got, want)
		}
	}
}

func addresses(texts ...string) (list []netip.AddrPort) {
	for _, text := range texts {
		list = append(list, netip.MustParseAddrPort(text))
	}
	return list
}

func listenerName(l *Listener) string {
	if l == nil {
		return ""
	}
	return l.Name
}

func TestEndpointsAndRoutesMayBeTheResourcesOwn(t *testing.T) {
	own, shared := &Assignment{}, &Assignment{}
	table, inline := &Routes{}, &Routes{}
	edit := (*Snapshot)(nil).Edit()
	edit.SetAssignment("service", shared)
	edit.SetRoutes("80", table)
	s, _ := edit.Snapshot()
	if s.Hosts(&Cluster{Discovery: ByEDS, Assignment: "service"}) != shared || s.Hosts(&Cluster{Discovery: StrictDNS, Assignment: "service", Hosts: own}) != own ||
		s.Hosts(&Cluster{Discovery: ByEDS, Assignment: "other"}) != nil {
		t.Error("other endpoints")
	}
	if s.Routes(&HTTPManager{RouteName: "80"}) != table || s.Routes(&HTTPManager{Routes: inline}) != inline || s.Routes(&HTTPManager{RouteName: "81"}) != nil {
		t.Error("other routes")
	}
}

// Receivers of spans whose listeners are gone are left, so those of all chains count.
func TestTracingsAreThoseOfAllChains(t *testing.T) {
	all := []*Tracing{{MaxPath: 1}, {MaxPath: 2}, {MaxPath: 3}}
	traced := func(i int) *FilterChain { return &FilterChain{HTTP: &HTTPManager{Tracing: all[i]}} }
	edit := new(Snapshot).Edit()
	edit.SetListener("a", &Listener{Default: traced(0), Chains: []*FilterChain{{}, {HTTP: &HTTPManager{}}, traced(1)}})
	edit.SetListener("b", &Listener{Chains: []*FilterChain{traced(2)}})
	s, _ := edit.Snapshot()
	seen := map[*Tracing]bool{}
	for one := range s.Tracings() {
		seen[one] = true
	}
	for _, one := range all {
		if !seen[one] {
			t.Errorf("the tracing with paths of %d is not yielded", one.MaxPath)
		}
	}
	for i := range all { // an iteration may end anywhere: going on after it panics
		n := 0
		for range s.Tracings() {
			if n++; n > i {
				break
			}
		}
	}
	if len(seen) != len(all) {
		t.Errorf("%d tracings, want %d", len(seen), len(all))
	}
}
