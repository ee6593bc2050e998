package istiod

import (
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	miekg "github.com/miekg/dns"

	istiodns "istio.io/istio/pkg/dns/client"
	dnsproto "istio.io/istio/pkg/dns/proto"

	"github.com/pillion-proxy/pillion/internal/dns"
	"github.com/pillion-proxy/pillion/internal/nettest"
)

// inOracle is set in the process that runs Istio's resolver. It reads /etc/resolv.conf and queries port 53, so it has
// namespaces of its own.
const inOracle = "PILLION_TEST_ORACLE"

// Istio's own resolver and pillion's answer the same names in the same way.
func TestNamesAreAnsweredAsByIstiosResolver(t *testing.T) {
	if os.Getenv(inOracle) != "" {
		compareResolvers(t)
		return
	}
	nettest.RequireRoot(t)
	conf := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(conf, []byte("search shop.svc.cluster.local svc.cluster.local cluster.local\nnameserver 127.0.0.1\noptions ndots:5\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	script := "mount --bind \"$0\" /etc/resolv.conf && ip link set lo up && exec \"$@\""
	cmd := exec.Command("unshare", "--net", "--mount", "--propagation", "private", "sh", "-c", script, conf,
		os.Args[0], "-test.run=^TestNamesAreAnsweredAsByIstiosResolver$", "-test.v")
	cmd.Env = append(os.Environ(), inOracle+"=1")
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "questions compared") {
		t.Fatalf("%v\n%s", err, out)
	}
}

// oracleTable is a table of names, as istiod makes it.
func oracleTable() map[string]*dnsproto.NameTable_NameInfo {
	kubernetes := func(short, namespace string, ips ...string) *dnsproto.NameTable_NameInfo {
		return &dnsproto.NameTable_NameInfo{Ips: ips, Registry: "Kubernetes", Shortname: short, Namespace: namespace}
	}
	external := func(ips ...string) *dnsproto.NameTable_NameInfo {
		return &dnsproto.NameTable_NameInfo{Ips: ips, Registry: "External"}
	}
	return map[string]*dnsproto.NameTable_NameInfo{
		"cart.shop.svc.cluster.local":       kubernetes("cart", "shop", "10.96.0.1"),
		"pay.bank.svc.cluster.local":        kubernetes("pay", "bank", "10.96.0.2", "fd00::2", "10.96.0.12"),
		"ledger.bank.svc.remote.example":    kubernetes("ledger", "bank", "10.96.0.3"),
		"db-0.db.shop.svc.cluster.local":    kubernetes("db-0.db", "shop", "10.1.0.1"),
		"six.shop.svc.cluster.local":        kubernetes("six", "shop", "fd00::6"),
		"cart.shop.svc.clusterset.local":    {Ips: []string{"10.96.0.7"}, Registry: "Kubernetes"},
		"www.example.com":                   external("203.0.113.1", "2001:db8::1"),
		"Upper.Example.com":                 external("203.0.113.8"),
		"*.wild.example":                    external("203.0.113.2"),
		"*.deep.wild.example":               external("203.0.113.3", "2001:db8::3"),
		"exact.wild.example":                external("203.0.113.4"),
		"none.example":                      external(),
		"bad.example":                       external("not an address"),
		"inside.shop.svc.cluster.local":     external("203.0.113.5"),
		"final.example.":                    external("203.0.113.6"),
		"a.very.long.name.of.a.service.org": external("203.0.113.7"),
	}
}

// questions are names of the table and variants of them.
func questions() (names []string) {
	heads := []string{"x.", "x.y.", "deep.", ""}
	tails := []string{"", "shop.svc.cluster.local.", "svc.cluster.local.", "cluster.local.", "shop.", "bank.", "shop.svc.", "bank.svc."}
	for host, info := range oracleTable() {
		bases := []string{strings.TrimSuffix(strings.TrimPrefix(host, "*."), ".") + "."}
		if info.Shortname != "" {
			bases = append(bases, info.Shortname+".", info.Shortname+"."+info.Namespace+".")
		}
		for _, base := range bases {
			for _, head := range heads {
				for _, tail := range tails {
					names = append(names, head+base+tail, strings.ToUpper(head+base+tail))
				}
			}
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

func compareResolvers(t *testing.T) {
	for _, network := range []string{"udp", "tcp"} {
		upstream := &miekg.Server{Addr: "127.0.0.1:53", Net: network, Handler: miekg.HandlerFunc(func(w miekg.ResponseWriter, r *miekg.Msg) {
			w.WriteMsg(new(miekg.Msg).SetRcode(r, miekg.RcodeNameError))
		})}
		started := make(chan struct{})
		upstream.NotifyStartedFunc = func() { close(started) }
		go upstream.ListenAndServe()
		<-started
		defer upstream.Shutdown()
	}

	theirs, err := istiodns.NewLocalDNSServer("shop", "shop.svc.cluster.local", "127.0.0.1:15153")
	if err != nil {
		t.Fatal(err)
	}
	theirs.StartDNS()
	defer theirs.Close()
	theirs.UpdateLookupTable(&dnsproto.NameTable{Table: oracleTable()})
	ours := startOurs(t)

	count := 0
	for _, name := range questions() {
		for _, kind := range []uint16{miekg.TypeA, miekg.TypeAAAA, miekg.TypeTXT} {
			want, got := ask(t, "127.0.0.1:15153", name, kind), ask(t, ours, name, kind)
			if got != want {
				t.Errorf("%s %s:\ngot  %s\nwant %s", name, miekg.TypeToString[kind], got, want)
			}
			count++
		}
	}
	t.Logf("%d questions compared", count)
}

// startOurs starts pillion's resolver with the same table.
func startOurs(t *testing.T) (address string) {
	var hosts []dns.Host
	for name, info := range oracleTable() {
		host := dns.Host{Name: name, Kubernetes: info.Registry == "Kubernetes", ShortName: info.Shortname, Namespace: info.Namespace}
		for _, text := range info.Ips {
			if address, err := netip.ParseAddr(text); err == nil {
				host.Addresses = append(host.Addresses, address)
			}
		}
		hosts = append(hosts, host)
	}
	table, invalid := dns.NewTable(hosts, dns.Scope{Namespace: "shop", Domain: "svc.cluster.local", Search: "shop.svc.cluster.local"})
	if len(invalid) > 0 {
		t.Errorf("invalid: %q", invalid)
	}
	resolver, err := dns.New(dns.Config{
		Listen: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:15253")}, Upstreams: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:53")},
		AwaitNames: true, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	resolver.Start()
	t.Cleanup(func() { resolver.Shutdown(t.Context()) })
	resolver.SetNames(table)
	return "127.0.0.1:15253"
}

// ask returns an answer as text, with its records in order. Names are in lower case: Istio's resolver answers in lower case,
// except below a wildcard. Its target of an alias below a wildcard is the wildcard; a resolver of a C library refuses that.
func ask(t *testing.T, address, name string, kind uint16) string {
	t.Helper()
	client := miekg.Client{Net: "tcp", Timeout: patience}
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	m, _, err := client.ExchangeWithConn(new(miekg.Msg).SetQuestion(name, kind), &miekg.Conn{Conn: conn})
	if err != nil {
		t.Fatalf("%s at %s: %v", name, address, err)
	}
	records := []string{}
	star := ""
	for _, rr := range m.Answer {
		text := strings.ToLower(rr.String())
		if alias, ok := rr.(*miekg.CNAME); ok {
			if strings.HasPrefix(alias.Target, "*.") {
				star = alias.Target
			}
		}
		if star != "" {
			text = strings.ReplaceAll(text, star, strings.TrimSuffix(strings.ToLower(name), "shop.svc.cluster.local."))
		}
		records = append(records, text)
	}
	slices.Sort(records)
	return fmt.Sprintf("%s aa=%v %q", miekg.RcodeToString[m.Rcode], m.Authoritative, records)
}
