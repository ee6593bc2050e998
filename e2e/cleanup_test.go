package e2e

import (
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// foreignRules are rules of another program in the tables that init changes.
var foreignRules = [][]string{
	{"-t", "nat", "-N", "SOMEBODY"},
	{"-t", "nat", "-A", "SOMEBODY", "-p", "tcp", "-m", "tcp", "--dport", "4242", "-j", "ACCEPT"},
	{"-t", "nat", "-A", "OUTPUT", "-m", "comment", "--comment", "somebody's own", "-j", "SOMEBODY"},
	{"-t", "nat", "-A", "PREROUTING", "-p", "udp", "-j", "RETURN"},
	{"-t", "filter", "-A", "INPUT", "-p", "tcp", "-m", "tcp", "--dport", "4243", "-j", "DROP"},
}

func TestInitIsIdempotentAndCleanupRestoresTheFormerState(t *testing.T) {
	t.Parallel()
	nettest.RequireRoot(t)
	for _, flavour := range []string{nft, legacy} {
		t.Run(flavour, func(t *testing.T) {
			pod, peer := nettest.PodAndPeer(t)
			for _, family := range []string{"iptables", "ip6tables"} {
				program := requireProgram(t, family+"-"+flavour)
				for _, rule := range foreignRules {
					pod.MustRun(t, program, rule...)
				}
			}
			before := savedRules(t, pod, flavour)
			addresses := pod.MustRun(t, "ip", "-o", "address", "show", "dev", "lo")

			initPod(t, pod, flavour)
			captured := savedRules(t, pod, flavour)
			if captured == before {
				t.Fatal("init changed nothing")
			}
			if missing := linesMissing(captured, before); len(missing) > 0 {
				t.Errorf("init removed foreign rules: %q", missing)
			}
			output := initPod(t, pod, flavour)
			if got := savedRules(t, pod, flavour); got != captured {
				t.Errorf("the second init changed the rules from\n%s\nto\n%s", captured, got)
			}
			if !strings.Contains(output, "nothing") && !strings.Contains(output, "unchanged") {
				t.Errorf("the second init does not report that nothing changed:\n%s", output)
			}

			// With both flavours in PATH and without arguments, cleanup finds the rules of init.
			stdout, stderr, code := execute(t, pod, nil, "cleanup")
			if code != 0 {
				t.Fatalf("cleanup: exit code %d\n%s%s", code, stdout, stderr)
			}
			if got := savedRules(t, pod, flavour); got != before {
				t.Errorf("cleanup left\n%s\nwant\n%s", got, before)
			}
			if got := pod.MustRun(t, "ip", "-o", "address", "show", "dev", "lo"); got != addresses {
				t.Errorf("cleanup left the addresses\n%s\nwant\n%s", got, addresses)
			}
			trafficIsDirect(t, pod, peer)
		})
	}
}

// In a namespace that had no rules, nftables is empty again afterwards. The legacy flavour cannot unload a table, so
// only its rules must be gone.
func TestCleanupLeavesAnEmptyNamespaceEmpty(t *testing.T) {
	t.Parallel()
	nettest.RequireRoot(t)
	for _, flavour := range []string{nft, legacy, native} {
		t.Run(flavour, func(t *testing.T) {
			pod, peer := nettest.PodAndPeer(t)
			initPod(t, pod, flavour)
			if _, stderr, code := execute(t, pod, nil, "cleanup"); code != 0 {
				t.Fatalf("cleanup: exit code %d\n%s", code, stderr)
			}
			if ruleset := pod.MustRun(t, "nft", "list", "ruleset"); flavour != legacy && ruleset != "" {
				t.Errorf("nftables holds\n%s", ruleset)
			}
			if flavour == legacy {
				for line := range strings.Lines(savedRules(t, pod, legacy)) {
					if strings.HasPrefix(line, "-A") || strings.Contains(line, "PILLION") {
						t.Errorf("legacy tables hold %s", line)
					}
				}
			}
			trafficIsDirect(t, pod, peer)
		})
	}
}

func TestCleanupWithoutRulesSucceedsSilently(t *testing.T) {
	t.Parallel()
	nettest.RequireRoot(t)
	pod, _ := nettest.PodAndPeer(t)
	stdout, stderr, code := execute(t, pod, nil, "cleanup")
	if code != 0 || stdout != "" || stderr != "" {
		t.Errorf("exit code %d, stdout %q, stderr %q; want 0 and no output", code, stdout, stderr)
	}
	if ruleset := pod.MustRun(t, "nft", "list", "ruleset"); ruleset != "" {
		t.Errorf("cleanup made\n%s", ruleset)
	}
}

func TestDryRunChangesNothingAndGivesReasons(t *testing.T) {
	t.Parallel()
	nettest.RequireRoot(t)
	pod, peer := nettest.PodAndPeer(t)
	stdout, stderr, code := execute(t, pod, nil, append(slices.Clone(initArguments), "--dry-run")...)
	if code != 0 {
		t.Fatalf("exit code %d\n%s", code, stderr)
	}
	for _, want := range []string{"15001", "15006", "outbound/self"} {
		if !strings.Contains(stdout, want) {
			t.Errorf("the dry run does not mention %s:\n%s", want, stdout)
		}
	}
	if ruleset := pod.MustRun(t, "nft", "list", "ruleset"); ruleset != "" {
		t.Errorf("the dry run made\n%s", ruleset)
	}
	trafficIsDirect(t, pod, peer)
}

var counters = regexp.MustCompile(`\[\d+:\d+\]`)

// savedRules lists every rule of both families in the flavour, without counters and times.
func savedRules(t *testing.T, ns *nettest.Namespace, flavour string) string {
	t.Helper()
	var text strings.Builder
	for _, family := range []string{"iptables", "ip6tables"} {
		program := requireProgram(t, family+"-"+flavour+"-save")
		for table := range strings.SplitAfterSeq(ns.MustRun(t, program), "COMMIT\n") {
			if !emptyTable(table) {
				for line := range strings.Lines(table) {
					if !strings.HasPrefix(line, "#") {
						text.WriteString(counters.ReplaceAllString(line, ""))
					}
				}
			}
		}
	}
	return text.String()
}

// emptyTable matches a table without effect. A legacy table cannot be removed.
func emptyTable(text string) bool {
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "-A") || strings.HasPrefix(line, ":") && !strings.Contains(line, " ACCEPT ") {
			return false
		}
	}
	return true
}

func linesMissing(from, want string) []string {
	var missing []string
	for line := range strings.Lines(want) {
		if !strings.Contains(from, line) {
			missing = append(missing, line)
		}
	}
	return missing
}

// trafficIsDirect checks that in both families and directions the listener sees the client's own address and port.
func trafficIsDirect(t *testing.T, pod, peer *nettest.Namespace) {
	t.Helper()
	s := &stage{pod: pod, peer: peer}
	for _, w := range s.ways() {
		listener := w.to.Listen(t, "tcp", netip.AddrPortFrom(w.address, 0).String())
		conn := w.dial(t, listener.Addr().String())
		upstream, err := listener.(*net.TCPListener).AcceptTCP()
		if err != nil {
			t.Fatal(err)
		}
		if got, want := upstream.RemoteAddr().String(), conn.LocalAddr().String(); got != want {
			t.Errorf("%s: seen as %s, want %s itself", w.name, got, want)
		}
		upstream.Close()
		conn.Close()
	}
}

// Injectors run the program of the init container under this name. With init's defaults it installs init's rules,
// except those for processes that have only the agent's group.
func TestInitWorksUnderTheNameIstioIPTables(t *testing.T) {
	t.Parallel()
	nettest.RequireRoot(t)
	pod, _ := nettest.PodAndPeer(t)
	arguments := append([]string{"istio-iptables", "--dual-stack", "--drop-invalid"}, initArguments[1:]...)
	if stdout, stderr, code := execute(t, pod, []string{pathWith(t, nft)}, arguments...); code != 0 {
		t.Fatalf("exit code %d\n%s%s", code, stdout, stderr)
	}
	before := savedRules(t, pod, nft)
	initPod(t, pod, nft)
	after := savedRules(t, pod, nft)
	more := slices.DeleteFunc(linesMissing(before, after), func(line string) bool { return strings.Contains(line, "pillion:outbound/self/gid/1337") })
	if len(more) > 0 || len(linesMissing(after, before)) > 0 || !strings.Contains(after, "15006") {
		t.Errorf("istio-iptables made\n%s\nand init makes\n%s", before, after)
	}
}
