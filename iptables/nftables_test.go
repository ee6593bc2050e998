package iptables

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/nettest"
)

func bothRulesets(spec capture.Spec) [2]Ruleset {
	return [2]Ruleset{Rules(spec, IPv4), Rules(spec, IPv6)}
}

// What is written in nftables is read back as the same, rule by rule and for any spec.
func TestRoundTripThroughExpressions(t *testing.T) {
	check := func(t *testing.T, rs Ruleset) {
		t.Helper()
		for _, table := range rs.Tables {
			for _, c := range table.Chains {
				at, of := Place{table.Name, c.Name}, Family(0)
				var encoded []nftRule
				for _, r := range c.Rules {
					encoded = append(encoded, encode(rs.Family, at, r)...)
				}
				if c.own() {
					of = rs.Family
				}
				decoded := decode(of, at, encoded)[rs.Family]
				if want := withoutReasons(Ruleset{Tables: []Table{{table.Name, []Chain{c}}}}).Tables[0].Chains[0].Rules; !reflect.DeepEqual(decoded, want) {
					t.Errorf("%v: got\n%+v\nwant\n%+v", at, decoded, want)
				}
				for i, r := range encoded {
					if len(r.comment) > 128 { // as much as nft shows
						t.Errorf("%v: the comment of rule %d has %d bytes", at, i, len(r.comment))
					}
				}
			}
		}
	}
	forEach(t, func(t *testing.T, sc scenario, a addresses) { check(t, Rules(sc.spec, a.family)) })
	random := rand.New(rand.NewPCG(1, 2))
	for range 120 {
		spec := randomSpec(random)
		for _, family := range Families {
			check(t, Rules(spec, family))
		}
	}
}

// Whatever a single byte of a rule is changed to, and whichever expression is missing or there twice, it is not taken for
// the rule that it was.
func TestARuleOfNFTablesThatIsAlmostOursIsNotOurs(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	seen := make(map[string]bool) // scenarios have many rules in common
	forEach(t, func(t *testing.T, sc scenario, a addresses) {
		for at, r := range Rules(sc.spec, a.family).All() {
			r.Why = ""
			if key := fmt.Sprint(a.family, at, r.line(at.Chain)); seen[key] {
				continue
			} else {
				seen[key] = true
			}
			check := func(what string, change func(*nftRule)) {
				rules := encode(a.family, at, r)
				change(&rules[0])
				of := a.family
				if !strings.HasPrefix(at.Chain, ownPrefix) {
					of = 0
				}
				if got := decode(of, at, rules)[a.family]; len(got) > 0 && reflect.DeepEqual(got[0], r) {
					t.Errorf("%s, %s: it still counts as %+v", r.ID, what, r)
				}
			}
			check("another comment", func(rule *nftRule) { rule.comment += "x" })
			for i, e := range encode(a.family, at, r)[0].expressions {
				check(e.name+" missing", func(rule *nftRule) { rule.expressions = slices.Delete(rule.expressions, i, i+1) })
				check(e.name+" twice", func(rule *nftRule) { rule.expressions = slices.Insert(rule.expressions, i, e) })
				for attribute := range e.attributes {
					check(fmt.Sprintf("attribute %d of %s changed", attribute, e.name), func(rule *nftRule) {
						if e.name == "counter" {
							rule.comment = "" // its numbers may be any
							return
						}
						value := rule.expressions[i].attributes[attribute]
						value[random.IntN(len(value))] ^= byte(1 + random.IntN(255))
					})
					check(fmt.Sprintf("attribute %d of %s missing", attribute, e.name), func(rule *nftRule) {
						if delete(rule.expressions[i].attributes, attribute); e.name == "counter" {
							rule.comment = ""
						}
					})
				}
			}
		}
	})
}

func TestCommentsOfStrangersAreReadWithinTheirBounds(t *testing.T) {
	for _, test := range []struct{ data, want string }{
		{"", ""}, {"\x00", ""}, {"\x00\x05abcd\x00", "abcd"}, {"\x00\x05abcd", ""}, {"\x07\x01x\x00\x02y\x00", "y"},
		{"\x00\xff" + strings.Repeat("z", 255), strings.Repeat("z", 255)}, {"\x07\xff", ""}, {"\x00\x00", ""}, {"\x07\xfe" + strings.Repeat("z", 254) + "\x00", ""},
	} {
		if got := nftComment([]byte(test.data)); got != test.want {
			t.Errorf("%q: got %q, want %q", test.data, got, test.want)
		}
	}
}

func TestChainsHaveNamesOfTheirOwn(t *testing.T) {
	for name, want := range map[string]Place{
		"nat_output": {NAT, chainBuiltOutput}, "mangle_prerouting": {Mangle, chainPrerouting},
		"ipv4_nat_in_redirect": {NAT, chainInboundRedirect}, "ipv6_raw_dns_passed": {Raw, chainDNSPassed},
	} {
		if _, at, ok := nftPlace(name); !ok || at != want {
			t.Errorf("%s: got %v, %t", name, at, ok)
		}
	}
	for _, name := range []string{"", "nat", "nat_", "nat_input", "filter_output", "ipv4", "ipv4_nat", "ipv4_filter_x", "NAT_OUTPUT", "ipv5_nat_x", "theirs"} {
		if family, at, ok := nftPlace(name); ok {
			t.Errorf("%s is taken for %s %v", name, family, at)
		}
	}
}

var countersOfNFT = regexp.MustCompile(`counter packets \d+ bytes \d+`)

// listed is our table as nft lists it, without the numbers of counters.
func listed(t *testing.T, ns *nettest.Namespace) string {
	t.Helper()
	return countersOfNFT.ReplaceAllString(ns.MustRun(t, "/usr/sbin/nft", "list", "table", "inet", nftTable), "counter")
}

// The second judge again: nft itself reads what we wrote, and makes the same of the script.
func TestNFTReadsWhatWeWroteAndMakesTheSameOfTheScript(t *testing.T) {
	nettest.RequireRoot(t)
	usePrograms(t, false)
	for _, sc := range scenarios {
		t.Run(sc.name, func(t *testing.T) {
			pod := nettest.New(t, "pod")
			plan := mustInit(t, pod, sc.spec)
			got := listed(t, pod)
			file := filepath.Join("testdata", "golden", sc.name+".nftables")
			if *update {
				if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("rules changed; if that is meant, run the test with -update\ngot:\n%s\nwant:\n%s", got, want)
			}
			if !strings.HasSuffix(plan.Steps[0].Input, got) || plan.Steps[1].Input != "" {
				t.Errorf("the script is not what was carried out:\n%s", plan.Steps[0].Input)
			}

			byNFT := nettest.New(t, "by nft")
			nft := byNFT.Command(0, 0, "/usr/sbin/nft", "-f", "-")
			nft.Stdin = strings.NewReader(plan.Steps[0].Input)
			if _, err := byNFT.Run(nft); err != nil {
				t.Fatal(err)
			}
			if its := listed(t, byNFT); its != got {
				t.Errorf("nft makes something else of the script:\n%s\nwe made:\n%s", its, got)
			}
		})
	}
}

// meddlingWithNFT is what can happen to our table, by nft's commands, and what Diff says of it, in both families together.
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
	{"a base chain of somebody else", "add chain inet pillion theirs { type filter hook input priority 0; policy drop; }", "extra theirs [a chain of nftables that is not ours"},
	{"a chain of somebody else", "add chain inet pillion theirs; add rule inet pillion theirs jump ipv4_nat_redirect", "extra theirs [a chain of nftables that is not ours, extra theirs [a rule of nftables"},
	{"a chain of an earlier version", "add chain inet pillion ipv4_nat_old", "extra PILLION_OLD"},
	{"a chain that is called elsewhere", "delete table inet pillion; add table inet pillion; add chain inet pillion nat_output { type nat hook output priority 5; }", "everything"},
	{"a table put to sleep", "add table inet pillion { flags dormant; }", "everything"},
	{"the table gone", "delete table inet pillion", "everything"},
	{"a table that is empty and asleep", "delete table inet pillion; add table inet pillion { flags dormant; }", "everything"},
}

func TestOurTableIsRepairedWhateverHappensToIt(t *testing.T) {
	nettest.RequireRoot(t)
	usePrograms(t, false)
	for _, m := range meddlingWithNFT {
		t.Run(m.name, func(t *testing.T) {
			pod := nettest.New(t, "pod")
			mustInit(t, pod, captureAll)
			before := everything(t, pod)
			if m.commands != "" {
				pod.MustRun(t, "/usr/sbin/nft", m.commands)
			}
			var got []string
			for _, step := range mustInit(t, pod, captureAll).Steps {
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
			if plan := mustInit(t, pod, captureAll); !plan.Unchanged() {
				t.Errorf("it is not mended: %v", plan)
			}
			if after := everything(t, pod); after != before {
				t.Errorf("before:\n%s\nafter:\n%s", before, after)
			}
			if m.commands != "" && !strings.HasPrefix(m.commands, "delete table") {
				pod.MustRun(t, "/usr/sbin/nft", m.commands)
			}
			if _, err := cleanupIn(pod); err != nil {
				t.Error(err)
			}
			if strings.Contains(everything(t, pod), nftTable) {
				t.Error("cleanup left something of the table")
			}
		})
	}
}

func TestAHundredTimesInitAndCleanupLeaveNothing(t *testing.T) {
	nettest.RequireRoot(t)
	usePrograms(t, false)
	pod := nettest.New(t, "pod")
	strangers(t, pod, Native)
	before := everything(t, pod)
	for i := range 100 {
		mustInit(t, pod, scenarios[i%len(scenarios)].spec)
		if _, err := cleanupIn(pod); err != nil {
			t.Fatal(err)
		}
		if i%10 == 0 {
			if after := everything(t, pod); after != before {
				t.Fatalf("run %d: before:\n%s\nafter:\n%s", i, before, after)
			}
		}
	}
	if after := everything(t, pod); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

// Thousands of networks make a transaction that is larger than a socket takes by itself.
func TestManyRulesAreOneTransaction(t *testing.T) {
	nettest.RequireRoot(t)
	usePrograms(t, false)
	pod := nettest.New(t, "pod")
	spec := captureAll
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
func TestWithoutTheAgentTPROXYLetsNothingThrough(t *testing.T) {
	nettest.RequireRoot(t)
	usePrograms(t, false)
	pod, peer := nettest.PodAndPeer(t)
	mustInit(t, pod, specOf(func(s *capture.Spec) { s.Inbound.All, s.Mode = true, capture.TPROXY }))
	for _, a := range families {
		pod.Listen(t, "tcp", netip.AddrPortFrom(a.pod, 8080).String())
		dropped := func() int {
			text := pod.MustRun(t, "/usr/sbin/nft", "list", "chain", "inet", nftTable, a.family.String()+"_mangle_tproxy")
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
			conn, err := peer.Dial("tcp", netip.AddrPortFrom(a.pod, 8080).String(), time.Second)
			if err == nil {
				conn.Close()
			}
			dialled <- err
		}()
		if err := <-dialled; err == nil {
			t.Errorf("%s: the workload was reached", a.family)
		}
		if dropped() == 0 {
			t.Errorf("%s: something else than our rule dropped it", a.family)
		}
	}
}

// In between, when rules move from one place to another, both are there. They say the same.
func TestRulesInTwoPlacesSayWhatEachSays(t *testing.T) {
	nettest.RequireRoot(t)
	for i, sc := range scenarios {
		other := []Backend{IPTablesNFT, IPTablesLegacy}[i%2]
		t.Run(string(other)+"/"+sc.name, func(t *testing.T) {
			usePrograms(t, false, NFT, Legacy)
			world := newWorld(t)
			if _, err := initBy(world.pod, sc.spec, other); err != nil {
				t.Fatal(err)
			}
			world.pod.Do(t, func() error { return planNFTables(bothRulesets(sc.spec), nftState{}).apply() })
			for _, a := range families {
				for _, s := range sc.allStories(a) {
					if canBeDialled(s.packet) {
						if got := world.dial(t, s.packet); got != s.want.String() {
							t.Errorf("%s, %s: %s, want: %v", a.family, s.name, got, s.want)
						}
					}
				}
			}
		})
	}
}

// While rules move, or are replaced, no connection escapes that is captured before and after.
func TestNothingEscapesWhileRulesMove(t *testing.T) {
	nettest.RequireRoot(t)
	backends := []Backend{NFTables, IPTablesNFT, NFTables, IPTablesLegacy}
	for mode, incoming := range map[capture.Mode]Verdict{capture.Redirect: inbound, capture.TPROXY: given} {
		t.Run(fmt.Sprint(mode), func(t *testing.T) {
			usePrograms(t, false, NFT, Legacy)
			world := newWorld(t)
			spec := captureAll
			spec.Mode = mode
			other := spec
			other.OutboundExcluded = networks("192.0.2.99/32,2001:db8:99::/64")
			if _, err := initBy(world.pod, spec, IPTablesLegacy); err != nil {
				t.Fatal(err)
			}
			moved := make(chan error, 1)
			go func() {
				for i := range 16 {
					if _, err := initBy(world.pod, []capture.Spec{other, spec}[i/2%2], backends[i/2%4]); err != nil {
						moved <- err
						return
					}
				}
				moved <- nil
			}()
			for dials := 0; ; dials++ {
				for _, a := range families {
					for _, s := range []story{{"out", sends(workload, workload, a.elsewhere, 8080), outbound}, {"in", arrives(a, 8080), incoming}} {
						if got := world.dial(t, s.packet); got != s.want.String() {
							t.Fatalf("dial %d, %s %s: %s", dials, a.family, s.name, got)
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
	usePrograms(t, false, NFT)
	pod, _ := nettest.PodAndPeer(t)
	spec := captureAll
	spec.IPv6 = capture.IPv6WhenFirst
	if plan, err := initBy(pod, spec, NFTables); err != nil || len(plan.Steps) != 1 {
		t.Fatal(plan, err)
	}
	if plan := mustInit(t, pod, captureAll); len(plan.Steps) != 1 || plan.Steps[0].Flavour != Native {
		t.Errorf("got %v", plan.Summary())
	}
}

func TestAFailedMoveLeavesTheOldRules(t *testing.T) {
	nettest.RequireRoot(t)
	dir := usePrograms(t, false, NFT)
	pod, _ := nettest.PodAndPeer(t)
	mustInit(t, pod, captureAll)
	before := everything(t, pod)
	real := programName(IPv4, NFT) + "-restore"
	breakProgram(t, dir, "iptables-nft-restore", fmt.Sprintf(`if [ -e %[1]s/ran ]; then exec %[2]s "$@"; fi; : > %[1]s/ran; exit 1`, dir, real))
	if _, err := initBy(pod, scenarios[0].spec, NFTables); err == nil || !strings.Contains(err.Error(), "everything is as it was") {
		t.Errorf("got error %v", err)
	}
	if after := everything(t, pod); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
	os.Remove(filepath.Join(dir, "ran"))
	usePrograms(t, false, NFT)
	if _, err := initBy(pod, captureAll, NFTables); err != nil {
		t.Fatal(err)
	}
	before = everything(t, pod)
	dir = usePrograms(t, false, NFT)
	breakProgram(t, dir, "ip6tables-nft-restore", "exit 1")
	if _, err := initBy(pod, scenarios[0].spec, IPTablesNFT); err == nil || !strings.Contains(err.Error(), "everything is as it was") {
		t.Errorf("got error %v", err)
	}
	if after := everything(t, pod); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

// Whether the kernel has what iptables needs is known when it is asked for, and not before.
func TestWhereIPTablesFindsNoSupportNFTablesTakeItsPlace(t *testing.T) {
	nettest.RequireRoot(t)
	for _, complaint := range []string{
		"iptables v1.8.9 (legacy): can't initialize iptables table: Table does not exist (do you need to insmod?)",
		"iptables-restore: line 9 failed: No chain/target/match by that name",
		"iptables-restore v1.8.9 (legacy): Couldn't load match `owner':No such file or directory",
		"Fatal: can't open lock file /run/xtables.lock: Read-only file system",
	} {
		pod, _ := nettest.PodAndPeer(t)
		usePrograms(t, false)
		if _, err := initIn(pod, captureAll); err != nil {
			t.Fatal(err)
		}
		want := everything(t, pod)
		if _, err := cleanupIn(pod); err != nil {
			t.Fatal(err)
		}
		// IPv4 is made, and taken back when IPv6 fails.
		breakProgram(t, usePrograms(t, false, Legacy), "ip6tables-legacy-restore", fmt.Sprintf(`echo "%s" >&2; exit 3`, strings.ReplaceAll(complaint, "`", "\\`")))
		if _, err := initBy(pod, captureAll, IPTables); err == nil || !strings.HasSuffix(err.Error(), "; everything is as it was") {
			t.Errorf("iptables was asked for: got error %v", err)
		}
		plan, err := initIn(pod, captureAll)
		if err != nil {
			t.Fatal(err)
		}
		if len(plan.Steps) != 2 || plan.Steps[0].Flavour != Native || len(plan.Warnings) != 1 || !strings.Contains(plan.Warnings[0], "because iptables cannot be used: changing ipv6 rules") {
			t.Errorf("plan: %v, warnings %q", plan.Summary(), plan.Warnings)
		}
		if after := withoutLegacy(everything(t, pod)); after != want {
			t.Errorf("got:\n%s\nwant:\n%s", after, want)
		}
		if plan := mustInit(t, pod, captureAll); !plan.Unchanged() {
			t.Errorf("a second run would do %v", plan)
		}
	}
}

// withoutLegacy leaves out the empty legacy tables that the kernel cannot unmake.
func withoutLegacy(state string) string {
	before, rest, found := strings.Cut(state, "legacy ip:")
	if !found || strings.Contains(rest, ownPrefix) {
		return state
	}
	return before + rest[strings.Index(rest, "1: lo"):]
}

func TestARefusalOfTheKernelNamesTheRuleAndWhatIsMissing(t *testing.T) {
	rule := func(r Rule) nftSubject {
		return nftSubject{id: r.ID, rule: encode(IPv4, Place{NAT, chainOutput}, r)[0]}
	}
	for _, test := range []struct {
		subject nftSubject
		err     error
		want    string
	}{
		{rule(Rule{ID: "a", Target: Redirect(1)}), unix.ENOENT, "rule a: no such file or directory: " + errNoKernelSupport.Error() + "; load nft_redir on the node, or use --backend iptables"},
		{rule(Rule{ID: "a", Target: ToSocket{}}), unix.EOPNOTSUPP, "load nft_tproxy on the node"},
		{rule(Rule{ID: "a", Target: Zone(1)}), unix.EOPNOTSUPP, "load nft_ct, with marks and zones of connection tracking on the node"},
		{rule(Rule{ID: "a", Target: Return{}}), unix.ENOENT, "load nf_tables on the node"},
		{rule(Rule{ID: "a", Target: Return{}}), unix.EINVAL, "rule a: invalid argument"},
		{nftSubject{hook: nftHooks[Place{NAT, chainBuiltOutput}]}, unix.EOPNOTSUPP, "a chain of type nat in family inet: operation not supported: "},
		{nftSubject{}, unix.EPERM, "capability CAP_NET_ADMIN is missing"},
		{nftSubject{}, unix.EBUSY, "device or resource busy"},
	} {
		err := test.subject.explain(test.err)
		if !strings.Contains(err.Error(), test.want) {
			t.Errorf("got %q, want %q", err, test.want)
		}
		if lacks := strings.Contains(test.want, "load"); lacks != errors.Is(err, errNoKernelSupport) && test.subject.hook.kind == "" {
			t.Errorf("%v: blamed on the kernel: %t", err, !lacks)
		}
	}
}

// The kernel's answer is about the request that it refused, however many there are.
func TestTheRefusedRequestIsFound(t *testing.T) {
	nettest.RequireRoot(t)
	pod := nettest.New(t, "pod")
	change := planNFTables(bothRulesets(captureAll), nftState{})
	bad := encode(IPv4, Place{NAT, chainOutput}, Rule{ID: "bad", Target: Jump("PILLION_NOWHERE")})[0]
	change.addRule(Rule{ID: "bad"}, bad)
	err := pod.Try(change.apply)
	if !errors.Is(err, unix.ENOENT) || !strings.Contains(err.Error(), "rule bad: ") {
		t.Errorf("got error %v", err)
	}
	if strings.Contains(everything(t, pod), nftTable) {
		t.Error("something was made")
	}
}

// A change by somebody else while the kernel lists chains makes the list useless, and it is asked for again.
func TestAListThatAChangeInterruptsIsAskedForAgain(t *testing.T) {
	nettest.RequireRoot(t)
	pod := nettest.New(t, "pod")
	table := func(name string) *nl.NetlinkRequest {
		return nftRequest(unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, unix.NFPROTO_IPV4, nftName(unix.NFTA_TABLE_NAME, name))
	}
	const others = 2000 // more than one answer of the kernel holds
	requests := []*nl.NetlinkRequest{table("many")}
	for i := range others {
		requests = append(requests, nftRequest(unix.NFT_MSG_NEWCHAIN, unix.NLM_F_CREATE, unix.NFPROTO_IPV4,
			nftName(unix.NFTA_CHAIN_TABLE, "many"), nftName(unix.NFTA_CHAIN_NAME, fmt.Sprint("chain", i))))
	}
	pod.Do(t, func() error { return nftTransaction(requests) })
	done, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		ended <- pod.Try(func() error {
			for {
				select {
				case <-done:
					return nil
				default:
				}
				if err := nftTransaction([]*nl.NetlinkRequest{table("restless"),
					nftRequest(unix.NFT_MSG_DELTABLE, 0, unix.NFPROTO_IPV4, nftName(unix.NFTA_TABLE_NAME, "restless"))}); err != nil {
					return err
				}
			}
		})
	}()
	pod.Do(t, func() error {
		for range 30 {
			if found, err := nftChains(); err != nil || len(found) != others {
				t.Errorf("%d chains: %v", len(found), err)
			}
		}
		return nil
	})
	close(done)
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
