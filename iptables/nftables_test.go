package iptables

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/iptables/nft"
	"github.com/pillion-proxy/pillion/iptables/policy"
	"github.com/pillion-proxy/pillion/iptables/ruleset"
	"github.com/pillion-proxy/pillion/iptables/rulestest"
	"github.com/pillion-proxy/pillion/iptables/trace"
)

var countersOfNFT = regexp.MustCompile(`counter packets \d+ bytes \d+`)

// listed is our table as nft lists it, without the numbers of counters.
func listed(t *testing.T, ns *nettest.Namespace) string {
	t.Helper()
	return countersOfNFT.ReplaceAllString(ns.MustRun(t, "/usr/sbin/nft", "list", "table", "inet", nft.TableName), "counter")
}

// The second judge again: nft itself reads what we wrote, and makes the same of the script.
func TestNFTReadsWhatWeWroteAndMakesTheSameOfTheScript(t *testing.T) {
	nettest.RequireRoot(t)
	rulestest.UsePrograms(t, false)
	for _, sc := range rulestest.Scenarios {
		t.Run(sc.Name, func(t *testing.T) {
			pod := nettest.New(t, "pod")
			plan := mustInit(t, pod, sc.Spec)
			got := listed(t, pod)
			rulestest.Golden(t, "golden/"+sc.Name+".nftables", got)
			if !strings.HasSuffix(plan.Input(0), got) || plan.Input(1) != "" {
				t.Errorf("the script is not what was carried out:\n%s", plan.Input(0))
			}

			byNFT := nettest.New(t, "by nft")
			nft := byNFT.Command(0, 0, "/usr/sbin/nft", "-f", "-")
			nft.Stdin = strings.NewReader(plan.Input(0))
			if _, err := byNFT.Run(nft); err != nil {
				t.Fatal(err)
			}
			if its := listed(t, byNFT); its != got {
				t.Errorf("nft makes something else of the script:\n%s\nwe made:\n%s", its, got)
			}
		})
	}
}

// meddlingWithNFT lists changes to our table by nft commands, and what Diff reports for both families together.
var meddlingWithNFT = []struct{ name, commands, want string }{
	{"nothing", "", ""},
	{"a rule tampered with", "flush chain inet pillion ipv4_nat_redirect; add rule inet pillion ipv4_nat_redirect meta l4proto tcp counter redirect to :15009 comment \"pillion:outbound/redirect\"",
		"tampered PILLION_REDIRECT outbound/redirect"},
	{"one more condition", "flush chain inet pillion ipv4_nat_redirect; add rule inet pillion ipv4_nat_redirect meta l4proto tcp limit rate 1/second counter redirect to :15001 comment \"pillion:outbound/redirect\"",
		"tampered PILLION_REDIRECT outbound/redirect"},
	{"a condition that the library cannot read", "flush chain inet pillion ipv6_nat_redirect; add rule inet pillion ipv6_nat_redirect meta l4proto tcp socket transparent 1 counter redirect to :15001 comment \"pillion:outbound/redirect\"",
		"tampered PILLION_REDIRECT outbound/redirect"},
	{"a comment gone", "flush chain inet pillion ipv4_nat_redirect; add rule inet pillion ipv4_nat_redirect meta l4proto tcp counter redirect to :15001",
		"missing PILLION_REDIRECT outbound/redirect, extra PILLION_REDIRECT [a rule of nftables"},
	{"a rule missing", "flush chain inet pillion ipv6_nat_redirect", "missing PILLION_REDIRECT outbound/redirect"},
	{"a rule in front", "insert rule inet pillion ipv4_nat_output counter accept", "extra PILLION_OUTPUT [a rule of nftables"},
	{"a rule twice", "add rule inet pillion ipv4_nat_redirect meta l4proto tcp counter redirect to :15001 comment \"pillion:outbound/redirect\"",
		"duplicate PILLION_REDIRECT"},
	{"a rule for all in a base chain", "insert rule inet pillion nat_output accept", "extra OUTPUT [a rule of nftables"},
	{"a rule for IPv6 in a base chain", "insert rule inet pillion nat_output meta nfproto ipv6 accept comment \"pillion:x\"", "extra OUTPUT"},
	{"the jumps gone", "flush chain inet pillion nat_output", "missing OUTPUT outbound/jump, missing OUTPUT outbound/jump"},
	{"a policy", "add chain inet pillion nat_output { policy drop; }", "extra OUTPUT [a chain of nftables that is not ours: nat_output"},
	{"a foreign base chain", "add chain inet pillion theirs { type filter hook input priority 0; policy drop; }", "extra theirs [a chain of nftables that is not ours"},
	{"a foreign chain", "add chain inet pillion theirs; add rule inet pillion theirs jump ipv4_nat_redirect", "extra theirs [a chain of nftables that is not ours, extra theirs [a rule of nftables"},
	{"a chain of an earlier version", "add chain inet pillion ipv4_nat_old", "extra PILLION_OLD"},
	{"a chain that is called elsewhere", "delete table inet pillion; add table inet pillion; add chain inet pillion nat_output { type nat hook output priority 5; }; add rule inet pillion nat_output accept comment \"pillion:x\"", "everything"},
	{"a table put to sleep", "add table inet pillion { flags dormant; }", "everything"},
	{"the table gone", "delete table inet pillion", "everything"},
	{"a table that is empty and asleep", "delete table inet pillion; add table inet pillion { flags dormant; }", "everything"},
}

func TestOurTableIsRepairedAfterAnyChange(t *testing.T) {
	nettest.RequireRoot(t)
	rulestest.UsePrograms(t, false)
	for _, m := range meddlingWithNFT {
		t.Run(m.name, func(t *testing.T) {
			pod := nettest.New(t, "pod")
			mustInit(t, pod, rulestest.CaptureAll)
			before := rulestest.Everything(t, pod)
			if m.commands != "" {
				pod.MustRun(t, "/usr/sbin/nft", m.commands)
			}
			var got []string
			for _, step := range mustInit(t, pod, rulestest.CaptureAll).Steps {
				for _, c := range step.Changes {
					what := c.ID
					if what == "" {
						what = strings.TrimPrefix(c.Found, "-A "+c.Chain+" ")
					}
					got = append(got, strings.Join([]string{string(c.Kind), c.Chain, what}, " "))
				}
			}
			want := strings.Split(m.want, ", ")
			if m.want == "" {
				want = nil
			}
			same := len(got) == len(want) && !slices.ContainsFunc(got, func(g string) bool {
				return !slices.ContainsFunc(want, func(w string) bool { return strings.HasPrefix(g, w) })
			})
			if !same && (m.want != "everything" || len(got) < 20) {
				t.Errorf("differences:\n%s\nwant:\n%s", strings.Join(got, "\n"), m.want)
			}
			if plan := mustInit(t, pod, rulestest.CaptureAll); !plan.Unchanged() {
				t.Errorf("it is not mended: %v", plan)
			}
			if after := rulestest.Everything(t, pod); after != before {
				t.Errorf("before:\n%s\nafter:\n%s", before, after)
			}
			if m.commands != "" && !strings.HasPrefix(m.commands, "delete table") {
				pod.MustRun(t, "/usr/sbin/nft", m.commands)
			}
			if _, err := cleanupIn(pod); err != nil {
				t.Error(err)
			}
			if strings.Contains(pod.MustRun(t, "/usr/sbin/nft", "list", "ruleset"), nft.TableName) {
				t.Error("cleanup left something of the table")
			}
		})
	}
}

// A table of our name without a chain or rule of ours belongs to others: it neither decides about the back end nor is
// removed.
func TestATableOfOthersWithOurNameIsNamedAndKept(t *testing.T) {
	nettest.RequireRoot(t)
	for name, test := range map[string]struct{ commands, holds string }{
		"with a chain":           {"add table inet pillion; add chain inet pillion input { type filter hook input priority 0; }; add rule inet pillion input tcp dport 4242 drop", "chain input"},
		"with a set":             {"add table inet pillion; add set inet pillion s { type ipv4_addr; }", "1 sets, maps or other objects"},
		"with both":              {"add table inet pillion; add set inet pillion s { type ipv4_addr; }; add chain inet pillion c", "chain c, 1 sets, maps or other objects"},
		"asleep":                 {"add table inet pillion { flags dormant; }; add chain inet pillion input { type filter hook input priority 0; }", "chain input"},
		"with a chain like ours": {"add table inet pillion; add chain inet pillion nat_output { type nat hook output priority 5; }", "chain nat_output"},
	} {
		t.Run(name, func(t *testing.T) {
			rulestest.UsePrograms(t, false, ruleset.NFT)
			pod := nettest.New(t, "pod")
			pod.MustRun(t, "/usr/sbin/nft", test.commands)
			before, table := rulestest.Everything(t, pod), listed(t, pod)
			const named = "nftables has a table inet pillion that is not ours ("
			plan := mustInit(t, pod, rulestest.CaptureAll)
			if plan.Steps[0].Flavour != ruleset.NFT || !slices.Contains(plan.Warnings, named+test.holds+"): it stays unchanged") {
				t.Errorf("rules in %s, warnings %q", plan.Steps[0].Flavour, plan.Warnings)
			}
			if plan := mustInit(t, pod, rulestest.CaptureAll); !plan.Unchanged() {
				t.Errorf("a second run would change %v", plan)
			}
			plan, err := cleanupIn(pod)
			if err != nil || !slices.Contains(plan.Warnings, named+test.holds+"): it stays unchanged") {
				t.Errorf("cleanup: error %v, warnings %q", err, plan.Warnings)
			}
			_, err = initBy(pod, rulestest.CaptureAll, NFTables)
			if want := named + test.holds + "): rename or remove it, or use iptables"; err == nil || err.Error() != want {
				t.Errorf("by nftables: error %v, want %s", err, want)
			}
			rulestest.UsePrograms(t, false)
			if _, err := initIn(pod, rulestest.CaptureAll); err == nil || !strings.Contains(err.Error(), "no iptables") {
				t.Errorf("without iptables: error %v", err)
			}
			if after := rulestest.Everything(t, pod); after != before || listed(t, pod) != table {
				t.Errorf("before:\n%s\nafter:\n%s", before, after)
			}
		})
	}
}

// Chains and sets that others have added to our table are named when they are removed.
func TestWhatIsRemovedFromOurTableIsNamed(t *testing.T) {
	nettest.RequireRoot(t)
	rulestest.UsePrograms(t, false)
	for name, test := range map[string]struct {
		commands, named string
		byInit          bool
	}{
		"a chain": {"add chain inet pillion theirs { type filter hook input priority 0; }", "chain theirs", true},
		"a set":   {"add set inet pillion s { type ipv4_addr; }", "1 sets, maps or other objects", false},
	} {
		pod := nettest.New(t, "pod")
		mustInit(t, pod, rulestest.CaptureAll)
		pod.MustRun(t, "/usr/sbin/nft", test.commands)
		want := "the nftables table inet pillion is ours alone; init and cleanup remove from it: " + test.named
		plan := mustInit(t, pod, rulestest.CaptureAll)
		if slices.Contains(plan.Warnings, want) != test.byInit {
			t.Errorf("%s: init's warnings: %q", name, plan.Warnings)
		}
		if !test.byInit {
			if plan, err := cleanupIn(pod); err != nil || !slices.Contains(plan.Warnings, want) {
				t.Errorf("%s: cleanup's warnings: %q, error %v", name, plan.Warnings, err)
			}
		}
	}
}

func TestAHundredInitsAndCleanupsLeaveNoTrace(t *testing.T) {
	nettest.RequireRoot(t)
	rulestest.UsePrograms(t, false)
	pod := nettest.New(t, "pod")
	foreignRules(t, pod, ruleset.Native)
	before := rulestest.Everything(t, pod)
	for i := range 100 {
		mustInit(t, pod, rulestest.Scenarios[i%len(rulestest.Scenarios)].Spec)
		if _, err := cleanupIn(pod); err != nil {
			t.Fatal(err)
		}
		if i%10 == 0 {
			if after := rulestest.Everything(t, pod); after != before {
				t.Fatalf("run %d: before:\n%s\nafter:\n%s", i, before, after)
			}
		}
	}
	if after := rulestest.Everything(t, pod); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

// Thousands of networks make a transaction that is larger than a socket takes by itself.
func TestManyRulesAreOneTransaction(t *testing.T) {
	nettest.RequireRoot(t)
	rulestest.UsePrograms(t, false)
	pod := nettest.New(t, "pod")
	spec := rulestest.CaptureAll
	for i := range 3000 {
		address := netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0})
		spec.OutboundExcluded = append(spec.OutboundExcluded, netip.PrefixFrom(address, 24))
	}
	mustInit(t, pod, spec)
	if plan := mustInit(t, pod, spec); !plan.Unchanged() {
		t.Error("a second run would change something")
	}
}

// Where the listener of TPROXY is gone its connections are dropped, and do not reach the workload past the agent.
func TestWithoutTheAgentTPROXYDropsConnections(t *testing.T) {
	nettest.RequireRoot(t)
	rulestest.UsePrograms(t, false)
	pod, peer := nettest.PodAndPeer(t)
	mustInit(t, pod, rulestest.SpecOf(func(s *capture.Spec) { s.Inbound.All, s.Mode = true, capture.TPROXY }))
	for _, a := range rulestest.Families {
		pod.Listen(t, "tcp", netip.AddrPortFrom(a.Pod, 8080).String())
		dropped := func() int {
			text := pod.MustRun(t, "/usr/sbin/nft", "list", "chain", "inet", nft.TableName, a.Family.String()+"_mangle_tproxy")
			var packets, size int
			for line := range strings.Lines(text) {
				if _, count, found := strings.Cut(line, "counter packets "); found && strings.Contains(line, " drop ") {
					fmt.Sscanf(count, "%d bytes %d", &packets, &size)
				}
			}
			return packets
		}
		if before := dropped(); before != 0 {
			t.Fatalf("%d packets dropped already", before)
		}
		dialled := make(chan error)
		go func() {
			conn, err := peer.Dial("tcp", netip.AddrPortFrom(a.Pod, 8080).String(), time.Second)
			if err == nil {
				conn.Close()
			}
			dialled <- err
		}()
		if err := <-dialled; err == nil {
			t.Errorf("%s: the workload was reached", a.Family)
		}
		if dropped() == 0 {
			t.Errorf("%s: something else than our rule dropped it", a.Family)
		}
	}
}

// In between, when rules move from one place to another, both are there. They say the same.
func TestRulesInTwoPlacesHaveTheVerdictsOfEach(t *testing.T) {
	nettest.RequireRoot(t)
	for i, sc := range rulestest.Scenarios {
		other := []Backend{IPTablesNFT, IPTablesLegacy}[i%2]
		t.Run(string(other)+"/"+sc.Name, func(t *testing.T) {
			rulestest.UsePrograms(t, false, ruleset.NFT, ruleset.Legacy)
			world := rulestest.NewWorld(t)
			if _, err := initBy(world.Pod, sc.Spec, other); err != nil {
				t.Fatal(err)
			}
			world.Pod.Do(t, func() error {
				return nft.Transition([2]ruleset.Ruleset{policy.Rules(sc.Spec, ruleset.IPv4), policy.Rules(sc.Spec, ruleset.IPv6)}, nft.Table{}).Apply()
			})
			for _, a := range rulestest.Families {
				for _, s := range sc.AllStories(a) {
					if rulestest.CanBeDialled(s.Packet) {
						if got := world.Dial(t, s.Packet); got != s.Want.String() {
							t.Errorf("%s, %s: %s, want: %v", a.Family, s.Name, got, s.Want)
						}
					}
				}
			}
		})
	}
}

// While rules move, or are replaced, no connection escapes that is captured before and after.
func TestNoConnectionEscapesWhileRulesMove(t *testing.T) {
	nettest.RequireRoot(t)
	backends := []Backend{NFTables, IPTablesNFT, NFTables, IPTablesLegacy}
	for mode, incoming := range map[capture.Mode]trace.Verdict{capture.Redirect: rulestest.Inbound, capture.TPROXY: rulestest.Given} {
		t.Run(fmt.Sprint(mode), func(t *testing.T) {
			rulestest.UsePrograms(t, false, ruleset.NFT, ruleset.Legacy)
			world := rulestest.NewWorld(t)
			spec := rulestest.CaptureAll
			spec.Mode = mode
			other := spec
			other.OutboundExcluded = rulestest.Networks("192.0.2.99/32,2001:db8:99::/64")
			if _, err := initBy(world.Pod, spec, IPTablesLegacy); err != nil {
				t.Fatal(err)
			}
			moved := make(chan error, 1)
			go func() {
				for i := range 16 {
					if _, err := initBy(world.Pod, []capture.Spec{other, spec}[i/2%2], backends[i/2%4]); err != nil {
						moved <- err
						return
					}
				}
				moved <- nil
			}()
			for dials := 0; ; dials++ {
				for _, a := range rulestest.Families {
					for _, s := range []rulestest.Story{{Name: "out", Packet: rulestest.Sends(rulestest.Workload, rulestest.Workload, a.Elsewhere, 8080), Want: rulestest.Outbound}, {Name: "in", Packet: rulestest.Arrives(a, 8080), Want: incoming}} {
						if got := world.Dial(t, s.Packet); got != s.Want.String() {
							t.Fatalf("dial %d, %s %s: %s", dials, a.Family, s.Name, got)
						}
					}
				}
				select {
				case err := <-moved:
					if err != nil {
						t.Fatal(err)
					}
					t.Logf("%d rounds", dials)
					return
				default:
				}
			}
		})
	}
}

// A family that gets rules later gets them where the other one's are.
func TestBothFamiliesShareOurTable(t *testing.T) {
	nettest.RequireRoot(t)
	rulestest.UsePrograms(t, false, ruleset.NFT)
	pod, _ := nettest.PodAndPeer(t)
	spec := rulestest.CaptureAll
	spec.IPv6 = capture.IPv6WhenFirst
	if plan, err := initBy(pod, spec, NFTables); err != nil || len(plan.Steps) != 1 {
		t.Fatal(plan, err)
	}
	if plan := mustInit(t, pod, rulestest.CaptureAll); len(plan.Steps) != 1 || plan.Steps[0].Flavour != ruleset.Native {
		t.Errorf("got %v", plan.Summary())
	}
}

func TestAFailedMoveLeavesTheOldRules(t *testing.T) {
	nettest.RequireRoot(t)
	dir := rulestest.UsePrograms(t, false, ruleset.NFT)
	pod, _ := nettest.PodAndPeer(t)
	mustInit(t, pod, rulestest.CaptureAll)
	before := rulestest.Everything(t, pod)
	real := programName(ruleset.IPv4, ruleset.NFT) + "-restore"
	breakProgram(t, dir, "iptables-nft-restore", fmt.Sprintf(`if [ -e %[1]s/ran ]; then exec %[2]s "$@"; fi; : > %[1]s/ran; exit 1`, dir, real))
	if _, err := initBy(pod, rulestest.Scenarios[0].Spec, NFTables); err == nil || !strings.Contains(err.Error(), "the former state is restored") {
		t.Errorf("got error %v", err)
	}
	if after := rulestest.Everything(t, pod); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
	os.Remove(filepath.Join(dir, "ran"))
	rulestest.UsePrograms(t, false, ruleset.NFT)
	if _, err := initBy(pod, rulestest.CaptureAll, NFTables); err != nil {
		t.Fatal(err)
	}
	before = rulestest.Everything(t, pod)
	dir = rulestest.UsePrograms(t, false, ruleset.NFT)
	breakProgram(t, dir, "ip6tables-nft-restore", "exit 1")
	if _, err := initBy(pod, rulestest.Scenarios[0].Spec, IPTablesNFT); err == nil || !strings.Contains(err.Error(), "the former state is restored") {
		t.Errorf("got error %v", err)
	}
	if after := rulestest.Everything(t, pod); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

// Whether the kernel has what iptables needs is known when it is asked for, and not before.
func TestNFTablesReplaceIPTablesWithoutKernelSupport(t *testing.T) {
	nettest.RequireRoot(t)
	for _, complaint := range []string{
		"iptables v1.8.9 (legacy): can't initialize iptables table: Table does not exist (do you need to insmod?)",
		"iptables-restore: line 9 failed: No chain/target/match by that name",
		"iptables-restore v1.8.9 (legacy): Couldn't load match `owner':No such file or directory",
		"Fatal: can't open lock file /run/xtables.lock: Read-only file system",
	} {
		pod, _ := nettest.PodAndPeer(t)
		rulestest.UsePrograms(t, false)
		if _, err := initIn(pod, rulestest.CaptureAll); err != nil {
			t.Fatal(err)
		}
		want := rulestest.Everything(t, pod)
		if _, err := cleanupIn(pod); err != nil {
			t.Fatal(err)
		}
		// IPv4 is made, and taken back when IPv6 fails.
		breakProgram(t, rulestest.UsePrograms(t, false, ruleset.Legacy), "ip6tables-legacy-restore", fmt.Sprintf(`echo "%s" >&2; exit 3`, strings.ReplaceAll(complaint, "`", "\\`")))
		if _, err := initBy(pod, rulestest.CaptureAll, IPTables); err == nil || !strings.HasSuffix(err.Error(), "; the former state is restored") {
			t.Errorf("iptables is required: got error %v", err)
		}
		plan, err := initIn(pod, rulestest.CaptureAll)
		if err != nil {
			t.Fatal(err)
		}
		if len(plan.Steps) != 2 || plan.Steps[0].Flavour != ruleset.Native || len(plan.Warnings) != 1 || !strings.Contains(plan.Warnings[0], "because iptables is not usable: changing ipv6 rules") {
			t.Errorf("plan: %v, warnings %q", plan.Summary(), plan.Warnings)
		}
		if after := withoutLegacy(rulestest.Everything(t, pod)); after != want {
			t.Errorf("got:\n%s\nwant:\n%s", after, want)
		}
		if plan := mustInit(t, pod, rulestest.CaptureAll); !plan.Unchanged() {
			t.Errorf("a second run would do %v", plan)
		}
	}
}

// withoutLegacy leaves out the empty legacy tables that the kernel cannot unmake.
func withoutLegacy(state string) string {
	before, rest, found := strings.Cut(state, "legacy ip:")
	if !found || strings.Contains(rest, ruleset.OwnPrefix) {
		return state
	}
	return before + rest[strings.Index(rest, "1: lo"):]
}
