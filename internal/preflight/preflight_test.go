package preflight

import (
	"context"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/checklist"
	"github.com/pillion-proxy/pillion/internal/live"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/iptables"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

func config() Config {
	return Config{
		Version:     "v1.2.3",
		Admin:       "127.0.0.1:15000",
		Ports:       []Port{{15001, "--outbound-port"}, {15006, "--inbound-port"}},
		MemoryLimit: func() (int64, error) { return 128 << 20, nil },
		HowToLook:   func(err error) error { return errors.New("how to look") },
	}
}

// run checks in a namespace.
func run(t *testing.T, ns *nettest.Namespace, config Config) map[string]checklist.Check {
	t.Helper()
	var list checklist.List
	ns.Do(t, func() error {
		list = Run(context.Background(), config)
		return nil
	})
	byName := make(map[string]checklist.Check)
	for _, c := range list {
		byName[c.Name] = c
	}
	return byName
}

func expect(t *testing.T, got map[string]checklist.Check, name string, state checklist.State, words ...string) {
	t.Helper()
	c := got[name]
	if c.State != state {
		t.Errorf("%s is %+v, want %s", name, c, state)
	}
	for _, word := range words {
		if !strings.Contains(c.Text+": "+c.Remedy, word) {
			t.Errorf("%s lacks %q: %+v", name, word, c)
		}
	}
}

// In a new namespace everything is ready for init, and afterwards it is as before.
func TestANamespaceIsCheckedAndLeftAsItWas(t *testing.T) {
	nettest.RequireRoot(t)
	ns := nettest.New(t, "pod")
	state := func() string {
		return ns.MustRun(t, "sh", "-c", "nft list ruleset; ip rule; ip -o addr; cat /proc/net/ip_tables_names /proc/net/ip6_tables_names")
	}
	before := state()
	got := run(t, ns, config())
	expect(t, got, "versions", checklist.OK, "pillion v1.2.3, Linux ")
	expect(t, got, "agent", checklist.Skipped, "nothing listens at 127.0.0.1:15000")
	expect(t, got, "capabilities", checklist.OK, "NET_ADMIN, NET_RAW")
	expect(t, got, "rules: REDIRECT", checklist.OK, "ipv4 rules installed")
	expect(t, got, "rules: TPROXY", checklist.OK, "policy routing")
	expect(t, got, "rules: DNS", checklist.OK, "ipv4 rules installed")
	expect(t, got, "rules in force", checklist.OK, "no rules of pillion")
	expect(t, got, "ports", checklist.OK, "15001, 15006 are free")
	expect(t, got, "ephemeral ports", checklist.OK, " to ")
	expect(t, got, "memory limit", checklist.OK, "128 MiB")
	expect(t, got, "file descriptors", checklist.OK)
	if after := state(); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

func TestTakenPortsAndRangesAreNamedWithTheirSettings(t *testing.T) {
	nettest.RequireRoot(t)
	ns := nettest.New(t, "pod")
	ns.MustRun(t, "ip", "link", "set", "lo", "up")
	ns.MustRun(t, "sysctl", "-qw", "net.ipv4.ip_local_port_range=15000 30000")
	ns.Listen(t, "tcp4", "127.0.0.1:15006")
	c := config()
	c.MemoryLimit = func() (int64, error) { return 32 << 20, nil }
	got := run(t, ns, c)
	expect(t, got, "ports", checklist.Failed, "15006 (--inbound-port) is in use")
	if strings.Contains(got["ports"].Text, "15001") {
		t.Errorf("a free port is named: %+v", got["ports"])
	}
	expect(t, got, "ephemeral ports", checklist.Warning, "15000 to 30000 contain 15001, 15006", "ip_local_reserved_ports")
	expect(t, got, "memory limit", checklist.Warning, "32 MiB", "64 MiB or more")
	ns.MustRun(t, "sysctl", "-qw", "net.ipv4.ip_local_reserved_ports=15001,15005-15010")
	expect(t, run(t, ns, c), "ephemeral ports", checklist.OK)
}

// answering serves a view at the admin port of the namespace.
func answering(t *testing.T, ns *nettest.Namespace, version string, gates []live.Gate) {
	t.Helper()
	view := live.New(live.Config{Version: version})
	server := &http.Server{Handler: view.Handler(live.Sources{Gates: func() []live.Gate { return gates }})}
	listener := ns.Listen(t, "tcp4", "127.0.0.1:15000")
	done := make(chan struct{})
	go func() { defer close(done); server.Serve(listener) }()
	t.Cleanup(func() { server.Close(); <-done })
}

func TestARunningAgentIsAsked(t *testing.T) {
	nettest.RequireRoot(t)
	ns := nettest.New(t, "pod")
	ns.MustRun(t, "ip", "link", "set", "lo", "up")
	answering(t, ns, "v1.2.2", []live.Gate{{Name: "inbound", Open: true}, {Name: "addresses", Why: "not listed yet"}})
	got := run(t, ns, config())
	expect(t, got, "versions", checklist.Warning, "the agent is v1.2.2")
	expect(t, got, "agent", checklist.Failed, "not ready: addresses: not listed yet")
	expect(t, got, "rules in force", checklist.Failed, "its traffic is not captured", "run pillion init")
	expect(t, got, "ports", checklist.Skipped)

	ns.Do(t, func() error {
		spec := capture.Default()
		spec.Outbound.All = true
		plan, err := iptables.PlanInit(context.Background(), spec, iptables.Auto)
		if err == nil {
			err = plan.Commit(context.Background())
		}
		return err
	})
	expect(t, run(t, ns, config()), "rules in force", checklist.OK, "rules of pillion in ipv4 nft")
}

func TestAReadyAgentOfTheSameVersionPasses(t *testing.T) {
	nettest.RequireRoot(t)
	ns := nettest.New(t, "pod")
	ns.MustRun(t, "ip", "link", "set", "lo", "up")
	answering(t, ns, "v1.2.3", nil)
	got := run(t, ns, config())
	expect(t, got, "versions", checklist.OK)
	expect(t, got, "agent", checklist.OK, "ready, up ")
}

func TestAnotherProgramAtTheAdminPortIsReported(t *testing.T) {
	nettest.RequireRoot(t)
	ns := nettest.New(t, "pod")
	ns.MustRun(t, "ip", "link", "set", "lo", "up")
	listener := ns.Listen(t, "tcp4", "127.0.0.1:15000")
	server := &http.Server{Handler: http.NotFoundHandler()}
	done := make(chan struct{})
	go func() { defer close(done); server.Serve(listener) }()
	defer func() { server.Close(); <-done }()
	expect(t, run(t, ns, config()), "agent", checklist.Failed, "127.0.0.1:15000 does not answer as an agent: it answered 404 Not Found", "is --admin right?")
}

// A table of connections that is nearly full is a warning.
func TestAFullConnectionTrackingIsAWarning(t *testing.T) {
	directory := filepath.Join(t.TempDir(), "sys", "net", "netfilter")
	if err := os.MkdirAll(directory, 0o755); err != nil {
		t.Fatal(err)
	}
	for count, want := range map[string]checklist.State{"100\n": checklist.OK, "801\n": checklist.Warning} {
		for name, text := range map[string]string{"nf_conntrack_count": count, "nf_conntrack_max": "1000\n"} {
			if err := os.WriteFile(filepath.Join(directory, name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		c := &checker{root: filepath.Join(directory, "..", "..", "..")}
		if c.conntrack(); c.list[0].State != want {
			t.Errorf("%s: %+v", strings.TrimSpace(count), c.list)
		}
	}
}
