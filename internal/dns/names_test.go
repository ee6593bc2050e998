package dns

import (
	"cmp"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/miekg/dns"
)

var shop = Scope{Namespace: "shop", Domain: "svc.cluster.local", Search: "shop.svc.cluster.local"}

func ips(of ...string) (addresses []netip.Addr) {
	for _, text := range of {
		addresses = append(addresses, netip.MustParseAddr(text))
	}
	return addresses
}

func service(short, namespace, domain string, addresses ...string) Host {
	return Host{Name: short + "." + namespace + "." + domain, Addresses: ips(addresses...), Kubernetes: true, ShortName: short, Namespace: namespace}
}

func external(name string, addresses ...string) Host {
	return Host{Name: name, Addresses: ips(addresses...)}
}

// mesh is the table of the tests.
func mesh(t testing.TB) *Table {
	t.Helper()
	table, invalid := NewTable([]Host{
		service("cart", "shop", "svc.cluster.local", "10.96.0.1"),
		service("pay", "bank", "svc.cluster.local", "10.96.0.2", "fd00::2"),
		service("pay", "bank", "svc.remote.example", "10.96.0.3"),
		service("db-0.db", "shop", "svc.cluster.local", "10.1.0.1"),
		service("Upper", "Shop", "svc.cluster.local", "10.96.0.9"),
		external("www.example.com", "203.0.113.1"),
		external("six.example.com", "2001:db8::1"),
		external("*.wild.example", "203.0.113.2"),
		external("*.deep.wild.example", "203.0.113.3"),
		external("exact.wild.example", "203.0.113.4"),
		external("none.example"),
		// The name of a service, and at once that of a host below the search domain.
		service("www", "example", "svc.cluster.local", "10.96.0.4"),
		external("www.example.shop.svc.cluster.local", "203.0.113.5"),
		external("final.example.", "203.0.113.6"),
		external("*.shop.svc.cluster.local", "203.0.113.7"),
	}, shop)
	if len(invalid) > 0 {
		t.Fatalf("invalid: %q", invalid)
	}
	return table
}

// lookup returns the records that a table answers with, as text without TTL and class, or "upstream".
func lookup(t testing.TB, table *Table, name string, kind uint16) string {
	t.Helper()
	q, err := parse(pack(t, question(name, kind)))
	if err != nil {
		t.Fatal(err)
	}
	raw := table.answer(&q)
	if raw == nil {
		return "upstream"
	}
	var m dns.Msg
	if err := m.Unpack(raw); err != nil {
		t.Fatalf("%s: %v: % x", name, err, raw)
	}
	if !m.Authoritative || !m.Response || !m.RecursionAvailable || m.Rcode != dns.RcodeSuccess || m.Question[0].Name != name || len(m.Ns)+len(m.Extra) > 0 {
		t.Errorf("%s: %v", name, &m)
	}
	var records []string
	for _, rr := range m.Answer {
		h := rr.Header()
		if h.Ttl != 30 || h.Class != dns.ClassINET {
			t.Errorf("%s: %v", name, rr)
		}
		records = append(records, h.Name+" "+dns.TypeToString[h.Rrtype]+" "+strings.TrimPrefix(rr.String(), h.String()))
	}
	return strings.Join(records, ", ")
}

func TestNamesOfTheMeshAreAnswered(t *testing.T) {
	table := mesh(t)
	for _, test := range []struct{ name, want string }{
		// A service of the own namespace.
		{"cart.shop.svc.cluster.local.", "cart.shop.svc.cluster.local. A 10.96.0.1"},
		{"cart.shop.svc.", "cart.shop.svc. A 10.96.0.1"},
		{"cart.shop.", "cart.shop. A 10.96.0.1"},
		{"cart.", "cart. A 10.96.0.1"},
		// The question is repeated as it was spelled.
		{"CaRt.Shop.svc.CLUSTER.local.", "CaRt.Shop.svc.CLUSTER.local. A 10.96.0.1"},
		{"upper.shop.svc.cluster.local.", "upper.shop.svc.cluster.local. A 10.96.0.9"},
		// Of another namespace.
		{"pay.bank.svc.cluster.local.", "pay.bank.svc.cluster.local. A 10.96.0.2"},
		{"pay.bank.svc.", "pay.bank.svc. A 10.96.0.2"},
		{"pay.bank.", "pay.bank. A 10.96.0.2"},
		{"pay.", "upstream"},
		// Of another cluster.
		{"pay.bank.svc.remote.example.", "pay.bank.svc.remote.example. A 10.96.0.3"},
		// A pod of a headless service.
		{"db-0.db.", "db-0.db. A 10.1.0.1"},
		{"db-0.db.shop.", "db-0.db.shop. A 10.1.0.1"},
		// Search lists. The target has the question's spelling.
		{"www.example.com.", "www.example.com. A 203.0.113.1"},
		{"WWW.example.com.shop.svc.cluster.local.", "WWW.example.com.shop.svc.cluster.local. CNAME WWW.example.com., WWW.example.com. A 203.0.113.1"},
		{"pay.bank.shop.svc.cluster.local.", "pay.bank.shop.svc.cluster.local. CNAME pay.bank., pay.bank. A 10.96.0.2"},
		{"pay.bank.svc.cluster.local.shop.svc.cluster.local.", "pay.bank.svc.cluster.local.shop.svc.cluster.local. CNAME pay.bank.svc.cluster.local., pay.bank.svc.cluster.local. A 10.96.0.2"},
		{"pay.bank.svc.shop.svc.cluster.local.", "pay.bank.svc.shop.svc.cluster.local. CNAME pay.bank.svc., pay.bank.svc. A 10.96.0.2"},
		{"www.example.shop.svc.cluster.local.", "www.example.shop.svc.cluster.local. A 203.0.113.5"},
		{"www.example.com.svc.cluster.local.", "upstream"},
		{"www.example.com.cluster.local.", "upstream"},
		// Wildcards, at any depth, the longest first; not the parent itself.
		{"a.wild.example.", "a.wild.example. A 203.0.113.2"},
		{"a.b.c.wild.example.", "a.b.c.wild.example. A 203.0.113.2"},
		{"a.b.Deep.wild.example.", "a.b.Deep.wild.example. A 203.0.113.3"},
		{"deep.wild.example.", "deep.wild.example. A 203.0.113.2"},
		{"exact.wild.example.", "exact.wild.example. A 203.0.113.4"},
		{"a.exact.wild.example.", "a.exact.wild.example. A 203.0.113.2"},
		{"*.wild.example.", "*.wild.example. A 203.0.113.2"},
		{"wild.example.", "upstream"},
		{"awild.example.", "upstream"},
		{"a.wild.example.shop.svc.cluster.local.", "a.wild.example.shop.svc.cluster.local. CNAME a.wild.example., a.wild.example. A 203.0.113.2"},
		{"x.shop.svc.cluster.local.", "x.shop.svc.cluster.local. A 203.0.113.7"},
		// Known names without an address of the type.
		{"six.example.com.", ""},
		{"six.example.com.shop.svc.cluster.local.", ""},
		// Unknown ones.
		{"none.example.", "upstream"},
		{"example.com.", "upstream"},
		{"com.", "upstream"},
		{".", "upstream"},
		{"shop.svc.cluster.local.", "upstream"},
		{"final.example.", "final.example. A 203.0.113.6"},
	} {
		if got := lookup(t, table, test.name, dns.TypeA); got != test.want {
			t.Errorf("%s: got  %s\nwant %s", test.name, got, test.want)
		}
	}
	for name, want := range map[string]string{
		"six.example.com.": "six.example.com. AAAA 2001:db8::1", "pay.bank.": "pay.bank. AAAA fd00::2", "cart.": "", "cart.shop.shop.svc.cluster.local.": "",
		"six.example.com.shop.svc.cluster.local.": "six.example.com.shop.svc.cluster.local. CNAME six.example.com., six.example.com. AAAA 2001:db8::1",
	} {
		if got := lookup(t, table, name, dns.TypeAAAA); got != want {
			t.Errorf("%s: got  %s\nwant %s", name, got, want)
		}
	}
	for _, kind := range []uint16{dns.TypeANY, dns.TypePTR, dns.TypeHTTPS, dns.TypeCNAME, dns.TypeSRV, dns.TypeTXT, dns.TypeMX} {
		if got := lookup(t, table, "cart.", kind); got != "upstream" {
			t.Errorf("type %s: %s", dns.TypeToString[kind], got)
		}
	}
	chaos := question("cart.", dns.TypeA)
	chaos.Question[0].Qclass = dns.ClassCHAOS
	if q, err := parse(pack(t, chaos)); err != nil || table.answer(&q) != nil {
		t.Error("a query of another class is answered")
	}
}

func TestWithoutAScopeOnlyFullNamesAreAnswered(t *testing.T) {
	table, _ := NewTable([]Host{service("cart", "shop", "svc.cluster.local", "10.96.0.1")}, Scope{})
	for name, want := range map[string]string{"cart.shop.svc.cluster.local.": "cart.shop.svc.cluster.local. A 10.96.0.1", "cart.": "upstream", "cart.shop.": "upstream"} {
		if got := lookup(t, table, name, dns.TypeA); got != want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
	}
	empty, _ := NewTable(nil, Scope{})
	if got := lookup(t, empty, "cart.", dns.TypeA); got != "upstream" || empty.Hosts() != 0 {
		t.Errorf("an empty table answers %s", got)
	}
}

// When hosts share a name, a full name counts before a short one, then Kubernetes, then the order of the hosts.
func TestASharedNameHasOneHost(t *testing.T) {
	hosts := []Host{
		external("pay.bank", "203.0.113.1"), service("pay", "bank", "svc.cluster.local", "10.96.0.1"),
		service("a.b", "shop", "svc.cluster.local", "10.96.0.2"), service("a", "b", "svc.cluster.local", "10.96.0.3"),
		{Name: "same.example", Addresses: ips("203.0.113.2")}, {Name: "SAME.example", Kubernetes: true, Addresses: ips("10.96.0.4")},
	}
	for range 10 {
		hosts = append(hosts[1:], hosts[0])
		table, _ := NewTable(slices.Clone(hosts), shop)
		for name, want := range map[string]string{"pay.bank.": "203.0.113.1", "a.b.": "10.96.0.2", "same.example.": "10.96.0.4"} {
			if got := lookup(t, table, name, dns.TypeA); got != name+" A "+want {
				t.Errorf("%s: %s, want %s", name, got, want)
			}
		}
	}
}

func TestNamesThatDNSDoesNotHaveAreReturned(t *testing.T) {
	long := strings.Repeat("a.", 127)
	table, invalid := NewTable([]Host{
		external("a..example", "203.0.113.1"), external(".example", "203.0.113.1"), external("", "203.0.113.1"), external(strings.Repeat("a", 64)+".example", "203.0.113.1"),
		external(long+"a", "203.0.113.1"), external("good.example", "203.0.113.2"), external(long, "203.0.113.3"), external(".", "203.0.113.1"), external("*", "203.0.113.1"),
		external("empty..example"), // it has no address, either, and is left to upstreams
	}, Scope{})
	slices.Sort(invalid)
	want := []string{"", "*", ".", ".example", "a..example", long + "a", strings.Repeat("a", 64) + ".example"}
	slices.Sort(want)
	if !slices.Equal(invalid, want) || table.Hosts() != 2 {
		t.Errorf("%d hosts, invalid %q", table.Hosts(), invalid)
	}
	for name, address := range map[string]string{"good.example.": "203.0.113.2", long: "203.0.113.3"} {
		if got := lookup(t, table, name, dns.TypeA); got != name+" A "+address {
			t.Errorf("%s: %s", name, got)
		}
	}
}

// Addresses rotate: each comes first about as often as the others.
func TestAnswersRotate(t *testing.T) {
	table, _ := NewTable([]Host{external("many.example", "203.0.113.1", "203.0.113.2", "203.0.113.3")}, Scope{})
	first := map[string]int{}
	for range 3000 {
		records := strings.Split(lookup(t, table, "many.example.", dns.TypeA), ", ")
		if slices.Sort(records); len(slices.Compact(records)) != 3 {
			t.Fatalf("records %q", records)
		}
		first[lookup(t, table, "many.example.", dns.TypeA)[:30]]++
	}
	for record, n := range first {
		if n < 700 { // of 1,000 expected; less has a probability below 10⁻²⁰
			t.Errorf("%s came first %d times of 3,000", record, n)
		}
	}
	if len(first) != 3 {
		t.Errorf("first records %v", first)
	}
}

// The end of an alias' target that the question has as well is a pointer.
func TestTheTargetOfAnAliasIsCompressed(t *testing.T) {
	table := mesh(t)
	for name, target := range map[string]int{
		"pay.bank.svc.cluster.local.shop.svc.cluster.local.": len("\x03pay\x04bank") + 2,
		"pay.bank.shop.svc.cluster.local.":                   len("\x03pay\x04bank") + 1,
	} {
		q, err := parse(pack(t, question(name, dns.TypeA)))
		if err != nil {
			t.Fatal(err)
		}
		want := headerSize + len(q.question) + recordSize + target + recordSize + 4
		if got := len(table.answer(&q)); got != want {
			t.Errorf("%s: %d bytes, want %d", name, got, want)
		}
	}
}

// many returns an external host with n addresses of each family.
func many(name string, n int) Host {
	host := Host{Name: name}
	for i := range n {
		host.Addresses = append(host.Addresses, netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), netip.AddrFrom16([16]byte{0xfd, 14: byte(i >> 8), 15: byte(i)}))
	}
	return host
}

func TestTheServerAnswersNamesOfTheMesh(t *testing.T) {
	r := serve(t, addrs(standing(t, fixed("upstream.example. 60 A 192.0.2.1"))), func(c *Config) {
		c.Sink = func(q Query) {
			if q.Named && (q.Upstream.IsValid() || q.Cached) {
				t.Errorf("query %+v", q)
			}
		}
	})
	table, _ := NewTable([]Host{many("many.example", 60), many("endless.example", 5000), external("one.example", "203.0.113.1")}, shop)
	if got := r.ask(t, "udp", question("one.example.", dns.TypeA)); got.Authoritative || got.Answer[0].Header().Name != "upstream.example." {
		t.Errorf("before any table: %v", got)
	}
	r.SetNames(table)
	for _, network := range []string{"udp", "tcp"} {
		q := question("oNe.example.", dns.TypeA).SetEdns0(1232, true)
		if got := r.ask(t, network, q); len(got.Answer) != 1 || got.Question[0].Name != "oNe.example." || got.IsEdns0() == nil || !got.IsEdns0().Do() {
			t.Errorf("over %s: %v", network, got)
		}
		if got := r.ask(t, network, question("upstream.example.", dns.TypeA)); got.Authoritative || len(got.Answer) != 1 {
			t.Errorf("an unknown name over %s: %v", network, got)
		}
		if got := r.ask(t, network, question("one.example.", dns.TypeTXT)); got.Authoritative {
			t.Errorf("another type over %s: %v", network, got)
		}
	}
	plain := r.ask(t, "udp", question("many.example.", dns.TypeA))
	if !plain.Truncated || len(plain.Answer) < 20 || len(plain.Answer) > 31 {
		t.Errorf("without EDNS %d records, truncated: %v", len(plain.Answer), plain.Truncated)
	}
	alias := r.ask(t, "udp", question("many.example.shop.svc.cluster.local.", dns.TypeAAAA))
	if !alias.Truncated || len(alias.Answer) < 2 || alias.Answer[0].Header().Rrtype != dns.TypeCNAME {
		t.Errorf("an alias without EDNS: %v", alias)
	}
	if large := r.ask(t, "udp", question("many.example.", dns.TypeA).SetEdns0(1232, false)); large.Truncated || len(large.Answer) != 60 {
		t.Errorf("with EDNS %d records, truncated: %v", len(large.Answer), large.Truncated)
	}
	for kind, least := range map[uint16]int{dns.TypeA: 4000, dns.TypeAAAA: 2200} {
		if all := r.ask(t, "tcp", question("endless.example.", kind).SetEdns0(4096, true)); all.Truncated || len(all.Answer) < least {
			t.Errorf("over TCP %d records, truncated: %v", len(all.Answer), all.Truncated)
		}
	}
	replaced, _ := NewTable([]Host{external("one.example", "203.0.113.9")}, shop)
	r.SetNames(replaced)
	if got := r.ask(t, "udp", question("one.example.", dns.TypeA)); len(got.Answer) != 1 || !strings.Contains(got.Answer[0].String(), "203.0.113.9") {
		t.Errorf("after a new table: %v", got)
	}
	if named, hosts := r.Stats.Named.Load(), r.Stats.Hosts.Load(); named != 8 || hosts != 1 {
		t.Errorf("%d named answers, %d hosts", named, hosts)
	}
}

func TestNoQueryIsAnsweredBeforeAwaitedNames(t *testing.T) {
	r := serve(t, addrs(standing(t, fixed("one.example. 60 A 192.0.2.1"))), func(c *Config) { c.AwaitNames = true })
	for _, kind := range []uint16{dns.TypeA, dns.TypeTXT} {
		if got := r.ask(t, "udp", question("one.example.", kind)); got.Rcode != dns.RcodeServerFailure {
			t.Errorf("before the names: %v", got)
		}
	}
	empty, _ := NewTable(nil, Scope{})
	r.SetNames(empty)
	if got := r.ask(t, "udp", question("one.example.", dns.TypeA)); got.Rcode != dns.RcodeSuccess || len(got.Answer) != 1 {
		t.Errorf("after the names: %v", got)
	}
	if early := r.Stats.Early.Load(); early != 2 {
		t.Errorf("%d early queries, want 2", early)
	}
}

// services returns n services in ten namespaces.
func services(n int) []Host {
	hosts := make([]Host, n)
	for i := range hosts {
		address := netip.AddrFrom4([4]byte{10, 96, byte(i >> 8), byte(i)})
		hosts[i] = service(fmt.Sprintf("service-%d", i), fmt.Sprintf("namespace-%d", i%10), "svc.cluster.local", address.String())
	}
	return hosts
}

var kept *Table

// 10,000 services have 31,000 names, and take about 100 bytes each.
func TestATableIsCompact(t *testing.T) {
	const n = 10_000
	hosts := services(n)
	heap := func() int64 {
		var stats runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&stats)
		return int64(stats.HeapAlloc)
	}
	before := heap()
	kept, _ = NewTable(hosts, Scope{Namespace: "namespace-3", Domain: "svc.cluster.local", Search: "namespace-3.svc.cluster.local"})
	perHost := (heap() - before) / n
	if kept.Hosts() != n || len(kept.exact) != 3*n+n/10 {
		t.Fatalf("%d hosts, %d names", kept.Hosts(), len(kept.exact))
	}
	kept = nil
	runtime.KeepAlive(hosts)
	if perHost > 120 {
		t.Errorf("%d bytes per host, want at most 120", perHost)
	}
}

// model answers as Istio's resolver does, from maps of strings. In three points it follows this package: the host of a
// shared name is not a random one, an appended search domain never hides a name of the table, and the target of an alias
// below a wildcard is the name without the search domain, where Istio has the wildcard itself.
type model struct {
	exact  map[string]*Host
	search string
}

func newModel(hosts []Host, scope Scope) *model {
	m := &model{exact: map[string]*Host{}, search: "." + scope.Search + "."}
	type offer struct {
		name     string
		priority string
		host     *Host
	}
	var offers []offer
	for i := range hosts {
		h := &hosts[i]
		if len(h.Addresses) == 0 {
			continue
		}
		registry := map[bool]string{true: "0", false: "1"}[h.Kubernetes]
		offers = append(offers, offer{strings.ToLower(h.Name) + ".", "0" + registry + h.Name, h})
		if h.Kubernetes && h.ShortName != "*" && strings.HasSuffix(h.Name, "."+scope.Domain) {
			short := []string{h.ShortName + "." + h.Namespace + ".", h.ShortName + "." + h.Namespace + ".svc."}
			if h.Namespace == scope.Namespace {
				short = append(short, h.ShortName+".")
			}
			for _, name := range short {
				offers = append(offers, offer{strings.ToLower(name), "1" + registry + h.Name, h})
			}
		}
	}
	slices.SortFunc(offers, func(a, b offer) int { return cmp.Compare(a.priority, b.priority) })
	for _, o := range offers {
		if m.exact[o.name] == nil {
			m.exact[o.name] = o.host
		}
	}
	return m
}

func (m *model) find(name string) (host *Host, alias string) {
	unexpanded := func(name string) string {
		base, ok := strings.CutSuffix(name, m.search)
		if !ok || base == "" || strings.HasSuffix("."+base+".", m.search) {
			return ""
		}
		return base + "."
	}
	if h := m.exact[name]; h != nil {
		return h, ""
	}
	if base := unexpanded(name); base != "" && m.exact[base] != nil {
		return m.exact[base], base
	}
	for rest := name; ; {
		_, after, _ := strings.Cut(rest, ".")
		if after == "" {
			return nil, ""
		}
		if h := m.exact["*."+after]; h != nil {
			return h, ""
		}
		if base := unexpanded(after); base != "" && m.exact["*."+base] != nil {
			return m.exact["*."+base], strings.TrimSuffix(name, m.search) + "."
		}
		rest = after
	}
}

func (m *model) answer(name string, kind uint16) []string {
	host, alias := m.find(strings.ToLower(name))
	if host == nil {
		return []string{"upstream"}
	}
	owner, records := name, []string{}
	if alias != "" {
		owner = name[:len(alias)]
	}
	for _, address := range host.Addresses {
		if address.Is4() == (kind == dns.TypeA) {
			records = append(records, owner+" "+dns.TypeToString[kind]+" "+address.String())
		}
	}
	if slices.Sort(records); len(records) > 0 && alias != "" {
		records = append([]string{name + " CNAME " + owner}, records...)
	}
	return records
}

// FuzzNames compares the model with tables and questions made from so few labels that names collide.
func FuzzNames(f *testing.F) {
	f.Add([]byte{0x11, 0x22, 0x31, 0x55, 0x92, 0xf1, 0x42, 0x12}, []byte{1, 2, 3}, false)
	f.Add([]byte{0xff, 0x01, 0x0f, 0x10}, []byte{9, 9, 3, 4, 5, 9, 3, 4, 5}, true)
	labels := []string{"a", "B", "*", "shop", "svc", "cluster", "local", "bank", "long-label-of-a-service", "shop.svc.cluster.local", "A", "b"}
	f.Fuzz(func(t *testing.T, table, asked []byte, six bool) {
		var hosts []Host
		seen := map[string]bool{}
		for i := 0; i+1 < len(table) && len(hosts) < 20; i += 2 {
			one, two := labels[int(table[i]&0xf)%len(labels)], labels[int(table[i]>>4)%len(labels)]
			var h Host
			switch kind := table[i+1]; kind % 4 {
			case 0:
				h = external(one + "." + two)
			case 1:
				h = external(one + "." + two + "." + labels[int(kind>>4)%len(labels)])
			case 2:
				h = service(one, two, "svc.cluster.local")
			default:
				h = service(one, two, "svc.remote")
			}
			if table[i+1]&4 == 0 {
				h.Addresses = append(h.Addresses, netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}), netip.AddrFrom4([4]byte{10, 0, 1, byte(i)}))
			}
			if table[i+1]&8 == 0 {
				h.Addresses = append(h.Addresses, netip.AddrFrom16([16]byte{0xfd, 15: byte(i)}))
			}
			if !seen[h.Name] {
				seen[h.Name] = true
				hosts = append(hosts, h)
			}
		}
		name := ""
		for _, b := range asked {
			if name += labels[int(b)%len(labels)] + "."; len(name) > 150 {
				break
			}
		}
		if name == "" {
			name = "."
		}
		kind := dns.TypeA
		if six {
			kind = dns.TypeAAAA
		}
		want := newModel(hosts, shop).answer(name, kind)
		compiled, _ := NewTable(hosts, shop)
		got := strings.Split(lookup(t, compiled, name, kind), ", ")
		if got[0] == "" {
			got = []string{}
		}
		rest := got
		if len(got) > 0 && strings.Contains(got[0], " CNAME ") {
			rest = got[1:]
		}
		slices.Sort(rest)
		if !slices.Equal(got, want) {
			t.Errorf("%s\ngot  %q\nwant %q\nof %+v", name, got, want, hosts)
		}
	})
}

func BenchmarkNames(b *testing.B) {
	table, _ := NewTable(services(10_000), shop)
	for _, name := range []string{"service-77.namespace-7.svc.cluster.local.", "www.example.com.shop.svc.cluster.local."} {
		q, err := parse(pack(b, question(name, dns.TypeA)))
		if err != nil {
			b.Fatal(err)
		}
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				table.answer(&q)
			}
		})
	}
}

func BenchmarkNewTable(b *testing.B) {
	hosts := services(10_000)
	for b.Loop() {
		NewTable(slices.Clone(hosts), shop)
	}
}
