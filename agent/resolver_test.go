package agent

import (
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	miekg "github.com/miekg/dns"

	"github.com/pillion-proxy/pillion/internal/dns"
	"github.com/pillion-proxy/pillion/internal/istiod"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/nettest"
)

func TestNameServersAreThoseOfTheFlagOrOfTheFile(t *testing.T) {
	here := filepath.Join(t.TempDir(), "resolv.conf")
	given := []netip.AddrPort{netip.MustParseAddrPort("198.51.100.53:5353")}
	for _, c := range []struct {
		name, text string
		given      []netip.AddrPort
		want       string // of the servers, or of the error
	}{
		{"the file's", "nameserver 192.0.2.53\n", nil, "[192.0.2.53:53]"},
		{"the flag's", "nameserver 192.0.2.53\n", given, "[198.51.100.53:5353]"},
		{"a file without any", "search example\n", nil, here + " names no server; set the servers to ask"},
	} {
		if err := os.WriteFile(here, []byte(c.text), 0o600); err != nil {
			t.Fatal(err)
		}
		a := &Agent{config: Config{DNS: DNS{Servers: c.given}}}
		servers, err := a.nameServers(here)
		got := fmt.Sprint(servers)
		if err != nil {
			got = err.Error()
		}
		if got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
	a := &Agent{}
	if _, err := a.nameServers(here + ".none"); err == nil || !strings.Contains(err.Error(), here) {
		t.Errorf("without a file: %v", err)
	}
}

func TestHostsOfTheControlPlaneAreResolved(t *testing.T) {
	resolver, err := dns.New(dns.Config{
		Listen: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:0")}, Upstreams: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:9")},
		AwaitNames: true, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	resolver.Start()
	defer resolver.Shutdown(t.Context())
	var log strings.Builder
	a := &Agent{log: slog.New(slog.NewTextHandler(&log, nil)), resolver: resolver}
	a.config.ControlPlane.Pod = &istiod.Pod{Node: istiod.Node{Namespace: "shop"}}
	a.setNames(&mesh.Names{Hosts: map[string]mesh.Name{
		"cart.shop.svc.cluster.local": {Addresses: []netip.Addr{netip.MustParseAddr("10.96.0.1")}, Registry: "Kubernetes", ShortName: "cart", Namespace: "shop"},
		"bad..example":                {Addresses: []netip.Addr{netip.MustParseAddr("10.96.0.2")}, Registry: "External"},
	}})
	for _, name := range []string{"cart.", "cart.shop.svc.cluster.local."} {
		client := miekg.Client{Timeout: nettest.Patience}
		answer, _, err := client.Exchange(new(miekg.Msg).SetQuestion(name, miekg.TypeA), resolver.UDP[0].LocalAddr().String())
		if err != nil || len(answer.Answer) != 1 || !strings.Contains(answer.Answer[0].String(), "10.96.0.1") {
			t.Errorf("%s: %v, error %v", name, answer, err)
		}
	}
	if !strings.Contains(log.String(), "count=1 first=bad..example") {
		t.Errorf("log: %s", &log)
	}
	(&Agent{}).setNames(nil) // without a resolver
}
