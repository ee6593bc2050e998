package iptables

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/iptables/nft"
	"github.com/pillion-proxy/pillion/iptables/policy"
	"github.com/pillion-proxy/pillion/iptables/ruleset"
	"github.com/pillion-proxy/pillion/iptables/rulestest"
	"github.com/pillion-proxy/pillion/iptables/xtables"
)

func TestMain(m *testing.M) { os.Exit(rulestest.Main(m)) }

// breakProgram puts a script in the place of a program.
func breakProgram(t *testing.T, dir, name, script string) {
	t.Helper()
	os.Remove(filepath.Join(dir, name))
	nettest.WriteProgram(t, filepath.Join(dir, name), "#!/bin/sh\n"+script+"\n")
}

// initIn plans and commits in the namespace, and returns the plan that was committed.
func initIn(ns *nettest.Namespace, spec capture.Spec) (*Plan, error) {
	return initBy(ns, spec, Auto)
}

func initBy(ns *nettest.Namespace, spec capture.Spec, backend Backend) (*Plan, error) {
	return commitIn(ns, func(ctx context.Context) (*Plan, error) { return PlanInit(ctx, spec, backend) })
}

func cleanupIn(ns *nettest.Namespace) (*Plan, error) { return commitIn(ns, PlanCleanup) }

func commitIn(ns *nettest.Namespace, make func(context.Context) (*Plan, error)) (plan *Plan, err error) {
	err = ns.Try(func() error {
		if plan, err = make(context.Background()); err != nil {
			return err
		}
		return plan.Commit(context.Background())
	})
	return plan, err
}

func mustInit(t *testing.T, ns *nettest.Namespace, spec capture.Spec) *Plan {
	t.Helper()
	plan, err := initIn(ns, spec)
	if err != nil {
		t.Fatal(err)
	}
	return plan
}

// rulesIn reads a table the way people do.
func rulesIn(t *testing.T, ns *nettest.Namespace, family ruleset.Family, flavour ruleset.Flavour) ruleset.Ruleset {
	t.Helper()
	if flavour == ruleset.Native {
		var table nft.Table
		ns.Do(t, func() (err error) {
			table, err = nft.ReadNow()
			return err
		})
		return table.Of(family)
	}
	return ruleset.Parse(family, ns.MustRun(t, programName(family, flavour)+"-save"))
}

func programName(family ruleset.Family, flavour ruleset.Flavour) string {
	if family == ruleset.IPv6 {
		return "/usr/sbin/ip6tables-" + string(flavour)
	}
	return "/usr/sbin/iptables-" + string(flavour)
}

func TestInitInstallsWhatIsWantedAndASecondRunChangesNothing(t *testing.T) {
	rulestest.ForEachFlavour(t, func(t *testing.T, flavour ruleset.Flavour) {
		for _, sc := range rulestest.Scenarios {
			t.Run(sc.Name, func(t *testing.T) {
				dir := rulestest.UsePrograms(t, false, flavour)
				pod := nettest.New(t, "pod")
				plan := mustInit(t, pod, sc.Spec)
				if len(plan.Steps) != 2 || plan.Address != AddressAdded {
					t.Errorf("the first run did %d steps, address %q", len(plan.Steps), plan.Address)
				}
				for _, family := range ruleset.Families {
					if changes := ruleset.Diff(policy.Rules(sc.Spec, family), rulesIn(t, pod, family, flavour)); len(changes) > 0 {
						t.Errorf("%s: %v", family, changes)
					}
				}
				before := rulestest.Everything(t, pod)
				for _, family := range ruleset.Families {
					breakProgram(t, dir, filepath.Base(programName(family, flavour))+"-restore", "exit 9")
				}
				if plan := mustInit(t, pod, sc.Spec); !plan.Unchanged() {
					t.Errorf("the second run would change %v", plan)
				}
				if after := rulestest.Everything(t, pod); after != before {
					t.Errorf("the second run changed something\nbefore:\n%s\nafter:\n%s", before, after)
				}
			})
		}
	})
}

func TestANewSpecReplacesTheOldRules(t *testing.T) {
	rulestest.ForEachFlavour(t, func(t *testing.T, flavour ruleset.Flavour) {
		pod := nettest.New(t, "pod")
		for _, sc := range rulestest.Scenarios {
			mustInit(t, pod, sc.Spec)
			for _, family := range ruleset.Families {
				if changes := ruleset.Diff(policy.Rules(sc.Spec, family), rulesIn(t, pod, family, flavour)); len(changes) > 0 {
					t.Errorf("%s, %s: %v", sc.Name, family, changes)
				}
			}
		}
	})
}

func TestChangedRulesAreRepaired(t *testing.T) {
	rulestest.ForEachProgram(t, func(t *testing.T, flavour ruleset.Flavour) {
		for _, m := range rulestest.Meddling {
			t.Run(m.Name, func(t *testing.T) {
				pod := nettest.New(t, "pod")
				mustInit(t, pod, rulestest.CaptureAll)
				for _, family := range ruleset.Families {
					text := m.Edit(policy.Rules(rulestest.CaptureAll, family).String())
					if family == ruleset.IPv6 {
						text = strings.ReplaceAll(text, "203.0.113.9/32", "2001:db8:2::9/128")
					}
					restore := pod.Command(0, 0, programName(family, flavour)+"-restore")
					restore.Stdin = strings.NewReader(text)
					if _, err := pod.Run(restore); err != nil {
						t.Fatal(err)
					}
				}
				plan := mustInit(t, pod, rulestest.CaptureAll)
				if got, want := len(plan.Steps) > 0, len(m.Want) > 0; got != want {
					t.Errorf("a change was planned: %t, want %t", got, want)
				}
				for _, step := range plan.Steps {
					if len(step.Changes) != len(m.Want) {
						t.Errorf("%s: changes %v, want %v", step.Family, step.Changes, m.Want)
					}
				}
				for _, family := range ruleset.Families {
					rules := rulesIn(t, pod, family, flavour)
					if changes := ruleset.Diff(policy.Rules(rulestest.CaptureAll, family), rules); len(changes) > 0 {
						t.Errorf("%s is not mended: %v", family, changes)
					}
					if strings.Contains(m.Name, "foreign rule") && !strings.Contains(rules.String(), "-j ACCEPT") {
						t.Errorf("%s: the foreign rule is gone", family)
					}
				}
			})
		}
	})
}

// foreignRules adds rules of others in every flavour of the list.
func foreignRules(t *testing.T, ns *nettest.Namespace, flavours ...ruleset.Flavour) {
	t.Helper()
	for _, flavour := range flavours {
		if flavour == ruleset.Native {
			ns.MustRun(t, "/usr/sbin/nft", "add table inet theirs; add chain inet theirs nat_output { type nat hook output priority -100; }; "+
				"add rule inet theirs nat_output ip daddr 203.0.113.9 accept comment \"pillion:outbound/all\"")
			foreignRules(t, ns, ruleset.NFT)
			continue
		}
		for family, network := range map[ruleset.Family]string{ruleset.IPv4: "203.0.113.9/32", ruleset.IPv6: "2001:db8:2::9/128"} {
			program := programName(family, flavour)
			ns.MustRun(t, program, "-t", "nat", "-N", "THEIRS")
			ns.MustRun(t, program, "-t", "nat", "-A", "OUTPUT", "-d", network, "-j", "THEIRS")
			ns.MustRun(t, program, "-t", "nat", "-A", "THEIRS", "-m", "comment", "--comment", `a "quoted" word`, "-j", "ACCEPT")
			ns.MustRun(t, program, "-t", "filter", "-A", "INPUT", "-s", network, "-j", "DROP")
		}
	}
}

func TestCleanupKeepsForeignRulesByteForByte(t *testing.T) {
	rulestest.ForEachFlavour(t, func(t *testing.T, flavour ruleset.Flavour) {
		pod := nettest.New(t, "pod")
		foreignRules(t, pod, flavour)
		before := rulestest.Everything(t, pod)
		mustInit(t, pod, rulestest.Scenarios[1].Spec)
		if rulestest.Everything(t, pod) == before {
			t.Fatal("init changed nothing")
		}
		if _, err := cleanupIn(pod); err != nil {
			t.Fatal(err)
		}
		if after := rulestest.Everything(t, pod); after != before {
			t.Errorf("before:\n%s\nafter:\n%s", before, after)
		}
		plan, err := cleanupIn(pod)
		if err != nil || !plan.Unchanged() {
			t.Errorf("a second cleanup: %v, %v", plan, err)
		}
	})
}

// In nftables nothing stays behind, not even the empty tables that iptables leaves. A legacy table cannot be unmade.
func TestCleanupOfAFreshNamespaceLeavesItFresh(t *testing.T) {
	nettest.RequireRoot(t)
	rulestest.UsePrograms(t, false, ruleset.NFT, ruleset.Legacy)
	pod := nettest.New(t, "pod")
	before := rulestest.Everything(t, pod)
	if plan, err := cleanupIn(pod); err != nil || !plan.Unchanged() || plan.Summary() != "" || plan.String() != "" {
		t.Errorf("cleanup of nothing: %q, %v", plan, err)
	}
	mustInit(t, pod, rulestest.CaptureAll)
	if _, err := cleanupIn(pod); err != nil {
		t.Fatal(err)
	}
	if after := rulestest.Everything(t, pod); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

func TestCleanupFindsBothFlavoursAndKeepsAnAddressThatIsNotOurs(t *testing.T) {
	nettest.RequireRoot(t)
	pod := nettest.New(t, "pod")
	pod.MustRun(t, "ip", "addr", "add", "::6/128", "dev", "lo", "nodad")
	foreignRules(t, pod, ruleset.NFT, ruleset.Legacy)
	before := rulestest.Everything(t, pod)
	for _, flavour := range []ruleset.Flavour{ruleset.NFT, ruleset.Legacy} {
		for _, family := range ruleset.Families {
			restore := pod.Command(0, 0, programName(family, flavour)+"-restore", "--noflush")
			restore.Stdin = strings.NewReader(xtables.RestoreInput(policy.Rules(rulestest.CaptureAll, family), ruleset.Ruleset{}))
			if _, err := pod.Run(restore); err != nil {
				t.Fatal(err)
			}
		}
	}
	rulestest.UsePrograms(t, false, ruleset.NFT, ruleset.Legacy)
	plan, err := cleanupIn(pod)
	if err != nil {
		t.Fatal(err)
	}
	if len(plan.Steps) != 4 || plan.Address != AddressKept {
		t.Errorf("plan: %v", plan)
	}
	if after := rulestest.Everything(t, pod); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

func TestTheFlavourThatHoldsOurRulesIsKept(t *testing.T) {
	nettest.RequireRoot(t)
	for _, test := range []struct {
		name    string
		prepare func(t *testing.T, pod *nettest.Namespace)
		want    ruleset.Flavour
	}{
		{"a fresh namespace gets nft", func(*testing.T, *nettest.Namespace) {}, ruleset.NFT},
		{"an empty legacy table, such as a probe leaves, changes nothing", func(t *testing.T, pod *nettest.Namespace) {
			pod.MustRun(t, "/usr/sbin/iptables-legacy-save", "-t", "nat")
			pod.MustRun(t, "/usr/sbin/ip6tables-legacy-save", "-t", "nat")
		}, ruleset.NFT},
		{"other people use legacy", func(t *testing.T, pod *nettest.Namespace) { foreignRules(t, pod, ruleset.Legacy) }, ruleset.Legacy},
		{"other people use both", func(t *testing.T, pod *nettest.Namespace) { foreignRules(t, pod, ruleset.NFT, ruleset.Legacy) }, ruleset.Legacy},
		{"ours are in nft, and then other people use legacy", func(t *testing.T, pod *nettest.Namespace) {
			mustInit(t, pod, rulestest.CaptureAll)
			foreignRules(t, pod, ruleset.Legacy)
		}, ruleset.NFT},
		{"ours are in legacy, without others", func(t *testing.T, pod *nettest.Namespace) {
			path := os.Getenv("PATH")
			rulestest.UsePrograms(t, false, ruleset.Legacy)
			mustInit(t, pod, rulestest.CaptureAll)
			t.Setenv("PATH", path)
		}, ruleset.Legacy},
		{"only legacy is there, under its plain name", func(t *testing.T, _ *nettest.Namespace) { rulestest.UsePrograms(t, true, ruleset.Legacy) }, ruleset.Legacy},
		{"only nft is there, under its plain name", func(t *testing.T, _ *nettest.Namespace) { rulestest.UsePrograms(t, true, ruleset.NFT) }, ruleset.NFT},
	} {
		t.Run(test.name, func(t *testing.T) {
			rulestest.UsePrograms(t, false, ruleset.NFT, ruleset.Legacy)
			pod := nettest.New(t, "pod")
			test.prepare(t, pod)
			for run := range 2 {
				for _, step := range mustInit(t, pod, rulestest.Scenarios[0].Spec).Steps {
					if step.Flavour != test.want {
						t.Errorf("run %d: %s went to %s, want %s", run+1, step.Family, step.Flavour, test.want)
					}
				}
			}
			for _, family := range ruleset.Families {
				if changes := ruleset.Diff(policy.Rules(rulestest.Scenarios[0].Spec, family), rulesIn(t, pod, family, test.want)); len(changes) > 0 {
					t.Errorf("%s: %v", family, changes)
				}
			}
		})
	}
}

// Some images have a script in the place of the link. It is asked what it is.
func TestAScriptUnderThePlainNameIsAskedForItsFlavour(t *testing.T) {
	nettest.RequireRoot(t)
	for _, flavour := range []ruleset.Flavour{ruleset.NFT, ruleset.Legacy} {
		dir := t.TempDir()
		for _, family := range ruleset.Families {
			real := programName(family, flavour)
			plain := strings.TrimSuffix(filepath.Base(real), "-"+string(flavour))
			for _, suffix := range []string{"", "-save", "-restore"} {
				breakProgram(t, dir, plain+suffix, "exec "+real+suffix+` "$@"`)
			}
		}
		t.Setenv("PATH", dir)
		for _, step := range mustInit(t, nettest.New(t, "pod"), rulestest.CaptureAll).Steps {
			if step.Flavour != flavour {
				t.Errorf("%s went to %s, want %s", step.Family, step.Flavour, flavour)
			}
		}
	}
}

func TestATooOldProgramIsRefusedBeforeAnyChange(t *testing.T) {
	nettest.RequireRoot(t)
	dir := rulestest.UsePrograms(t, false, ruleset.NFT)
	pod := nettest.New(t, "pod")
	before := rulestest.Everything(t, pod)
	breakProgram(t, dir, "iptables-nft", "echo 'iptables v1.6.1'")
	if _, err := initBy(pod, rulestest.CaptureAll, IPTables); err == nil || !strings.Contains(err.Error(), "is version 1.6.1: 1.6.2 or later is needed") {
		t.Errorf("got error %v", err)
	}
	if after := rulestest.Everything(t, pod); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
	if steps := mustInit(t, pod, rulestest.CaptureAll).Steps; !slices.ContainsFunc(steps, func(s Step) bool { return s.Family == ruleset.IPv4 && s.Flavour == ruleset.Native }) {
		t.Errorf("where nftables may be chosen: %v", steps)
	}
}

// Rules in both flavours would both act. One copy is kept, the other removed.
func TestOurRulesInTheOtherFlavourAreRemoved(t *testing.T) {
	nettest.RequireRoot(t)
	rulestest.UsePrograms(t, false, ruleset.NFT, ruleset.Legacy)
	pod := nettest.New(t, "pod")
	for _, flavour := range []ruleset.Flavour{ruleset.NFT, ruleset.Legacy} {
		restore := pod.Command(0, 0, programName(ruleset.IPv4, flavour)+"-restore", "--noflush")
		restore.Stdin = strings.NewReader(xtables.RestoreInput(policy.Rules(rulestest.CaptureAll, ruleset.IPv4), ruleset.Ruleset{}))
		if _, err := pod.Run(restore); err != nil {
			t.Fatal(err)
		}
	}
	mustInit(t, pod, rulestest.CaptureAll)
	if rest := rulesIn(t, pod, ruleset.IPv4, ruleset.Legacy).Own().Tables; len(rest) > 0 {
		t.Errorf("legacy still holds %v", rest)
	}
	if changes := ruleset.Diff(policy.Rules(rulestest.CaptureAll, ruleset.IPv4), rulesIn(t, pod, ruleset.IPv4, ruleset.NFT)); len(changes) > 0 {
		t.Errorf("nft: %v", changes)
	}
}

func TestRulesThatNoProgramCanReachAreAnError(t *testing.T) {
	nettest.RequireRoot(t)
	rulestest.UsePrograms(t, false, ruleset.NFT, ruleset.Legacy)
	pod := nettest.New(t, "pod")
	mustInit(t, pod, rulestest.CaptureAll)
	before := rulestest.Everything(t, pod)
	rulestest.UsePrograms(t, false, ruleset.Legacy)
	for name, commit := range map[string]func() (*Plan, error){
		"init":    func() (*Plan, error) { return initIn(pod, rulestest.Scenarios[0].Spec) },
		"cleanup": func() (*Plan, error) { return cleanupIn(pod) },
	} {
		_, err := commit()
		if err == nil || !strings.Contains(err.Error(), "iptables-nft (with -save and -restore): not found in PATH") {
			t.Errorf("%s: got error %v, want one that names the program", name, err)
		}
	}
	if after := rulestest.Everything(t, pod); after != before {
		t.Error("something was changed")
	}
}

func TestAFailureRestoresTheFormerState(t *testing.T) {
	nettest.RequireRoot(t)
	for _, flavour := range []ruleset.Flavour{ruleset.NFT, ruleset.Legacy} {
		name6 := filepath.Base(programName(ruleset.IPv6, flavour))
		for _, test := range []struct {
			name   string
			breaks func(t *testing.T, dir string)
			want   string
		}{
			{"IPv6 cannot be committed", func(t *testing.T, dir string) {
				breakProgram(t, dir, name6+"-restore", "echo 'line 2 failed' >&2; exit 1")
			}, "changing ipv6 rules: running " + name6 + "-restore: exit status 1: line 2 failed (in: :PILLION_INBOUND - [0:0])"},
			{"IPv6 is committed, but is not there when read back", func(t *testing.T, dir string) {
				breakProgram(t, dir, name6+"-restore", "while read line; do :; done")
			}, "reading ipv6 rules back: the rules differ after the commit (15 changes)"},
			{"IPv6 is committed by half", func(t *testing.T, dir string) {
				real := programName(ruleset.IPv6, flavour) + "-restore"
				// Only the first run fails: the one that installs.
				breakProgram(t, dir, name6+"-restore", fmt.Sprintf(
					`if [ -e %[1]s/ran ]; then exec %[2]s "$@"; fi; : > %[1]s/ran; /bin/sed '/inbound.all/d' | %[2]s "$@"`, dir, real))
			}, "reading ipv6 rules back: the rules differ after the commit (1 change), first: missing in PILLION_INBOUND"},
		} {
			for _, earlier := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s/%s/over earlier rules %t", flavour, test.name, earlier), func(t *testing.T) {
					dir := rulestest.UsePrograms(t, false, flavour)
					pod, _ := nettest.PodAndPeer(t)
					foreignRules(t, pod, flavour)
					if earlier {
						mustInit(t, pod, rulestest.Scenarios[1].Spec)
					}
					before := rulestest.Everything(t, pod)
					test.breaks(t, dir)
					_, err := initIn(pod, rulestest.CaptureAll)
					if err == nil || !earlier && !strings.Contains(err.Error(), test.want) {
						t.Errorf("got error %v, want %q", err, test.want)
					}
					if strings.Contains(err.Error(), "taking it back failed") {
						t.Error(err)
					}
					if after := rulestest.Everything(t, pod); after != before {
						t.Errorf("before:\n%s\nafter:\n%s", before, after)
					}
				})
			}
		}
	}
}

// A fresh namespace is fresh again after a failure: the tables that the commit made are gone.
func TestAFailureInAFreshNamespaceLeavesItFresh(t *testing.T) {
	nettest.RequireRoot(t)
	dir := rulestest.UsePrograms(t, false, ruleset.NFT, ruleset.Legacy)
	pod, _ := nettest.PodAndPeer(t)
	before := rulestest.Everything(t, pod)
	breakProgram(t, dir, "ip6tables-nft-restore", "exit 1")
	if _, err := initIn(pod, rulestest.CaptureAll); err == nil {
		t.Fatal("init succeeded")
	}
	if after := rulestest.Everything(t, pod); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

// ruleMadeWithNFT makes a rule in iptables' own table with nft, in a way that iptables cannot show: it then shows
// nothing at all.
func ruleMadeWithNFT(t *testing.T, ns *nettest.Namespace) {
	t.Helper()
	ns.MustRun(t, "/usr/sbin/iptables-nft", "-t", "nat", "-A", "OUTPUT", "-d", "203.0.113.9/32", "-j", "ACCEPT")
	ns.MustRun(t, "/usr/sbin/nft", "add", "rule", "ip", "nat", "OUTPUT", "ct", "state", "new", "counter", "accept")
}

func TestATableThatIPTablesCannotShowIsUnchanged(t *testing.T) {
	nettest.RequireRoot(t)
	rulestest.UsePrograms(t, false, ruleset.NFT)
	pod := nettest.New(t, "pod")
	ruleMadeWithNFT(t, pod)
	before := rulestest.Everything(t, pod)
	if _, err := initBy(pod, rulestest.CaptureAll, IPTables); !errors.Is(err, xtables.ErrIncompatible) {
		t.Errorf("got error %v", err)
	}
	if after := rulestest.Everything(t, pod); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
	for _, test := range []struct {
		programs []ruleset.Flavour
		want     ruleset.Flavour
	}{{[]ruleset.Flavour{ruleset.NFT}, ruleset.Native}, {[]ruleset.Flavour{ruleset.NFT, ruleset.Legacy}, ruleset.Legacy}} {
		rulestest.UsePrograms(t, false, test.programs...)
		steps := mustInit(t, pod, rulestest.CaptureAll).Steps
		if !slices.ContainsFunc(steps, func(s Step) bool { return s.Family == ruleset.IPv4 && s.Flavour == test.want }) ||
			!slices.ContainsFunc(steps, func(s Step) bool { return s.Family == ruleset.IPv6 && s.Flavour == ruleset.NFT }) {
			t.Errorf("with %v at hand: %v", test.programs, steps)
		}
		if _, err := cleanupIn(pod); err != nil {
			t.Error(err)
		}
	}
}

func TestOurRulesInATableThatIPTablesCannotShowAreAnError(t *testing.T) {
	nettest.RequireRoot(t)
	rulestest.UsePrograms(t, false, ruleset.NFT, ruleset.Legacy)
	pod := nettest.New(t, "pod")
	mustInit(t, pod, rulestest.CaptureAll)
	ruleMadeWithNFT(t, pod)
	before := rulestest.Everything(t, pod)
	if _, err := initIn(pod, rulestest.CaptureAll); !errors.Is(err, xtables.ErrIncompatible) {
		t.Errorf("init: got error %v", err)
	}
	if _, err := cleanupIn(pod); !errors.Is(err, xtables.ErrIncompatible) {
		t.Errorf("cleanup: got error %v", err)
	}
	if after := rulestest.Everything(t, pod); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

func TestPlanningChangesNothing(t *testing.T) {
	nettest.RequireRoot(t)
	for _, flavours := range [][]ruleset.Flavour{{ruleset.NFT}, {ruleset.Legacy}, {ruleset.NFT, ruleset.Legacy}} {
		rulestest.UsePrograms(t, false, flavours...)
		pod := nettest.New(t, "pod")
		before := rulestest.Everything(t, pod)
		pod.Do(t, func() error {
			plan, err := PlanInit(context.Background(), rulestest.CaptureAll, "")
			if err == nil && (plan.Unchanged() || plan.String() == "") {
				t.Error("the plan has no text")
			}
			return err
		})
		if after := rulestest.Everything(t, pod); after != before {
			t.Errorf("%v: before:\n%s\nafter:\n%s", flavours, before, after)
		}
	}
}

// Without a program for existing tables, rules of an earlier run may be in them, and a warning must name the tables.
func TestUnreadTablesAreNamed(t *testing.T) {
	nettest.RequireRoot(t)
	rulestest.UsePrograms(t, false, ruleset.NFT)
	pod := nettest.New(t, "pod")
	pod.MustRun(t, "/usr/sbin/iptables-legacy-save", "-t", "nat")
	plan, err := cleanupIn(pod)
	if err != nil {
		t.Fatal(err)
	}
	if len(plan.Warnings) != 1 || !strings.HasPrefix(plan.Warnings[0], "ipv4 has legacy tables that were not read: iptables-legacy ") {
		t.Errorf("warnings: %q", plan.Warnings)
	}
}

func TestAPodWithoutIPv6GetsOnlyIPv4Rules(t *testing.T) {
	nettest.RequireRoot(t)
	rulestest.UsePrograms(t, false, ruleset.NFT)
	pod := nettest.New(t, "pod")
	pod.Do(t, func() error {
		return os.WriteFile("/proc/sys/net/ipv6/conf/all/disable_ipv6", []byte("1"), 0)
	})
	plan := mustInit(t, pod, rulestest.CaptureAll)
	if len(plan.Steps) != 1 || plan.Steps[0].Family != ruleset.IPv4 || plan.Address != AddressKept || len(plan.Warnings) > 0 {
		t.Errorf("plan: %v, warnings %q", plan, plan.Warnings)
	}
}

// The kernel judges each interface for itself. "all" only shows what was last written to all interfaces.
func TestIPv6IsJudgedByEachInterface(t *testing.T) {
	rulestest.ForEachFlavour(t, func(t *testing.T, flavour ruleset.Flavour) {
		for _, test := range []struct {
			name     string
			disabled string // sysctls, in this order
			address  string // of eth0 afterwards
			families int    // with rules
			problem  string // the error if there are no rules, else the warning
		}{
			{"everywhere", "all=1", "", 1, ""},
			{"on no interface that exists", "all=1 lo=0 eth0=0", "2001:db8:1::2/64", 2, ""},
			{"on eth0 alone", "eth0=1", "", 2, ""},
			{"on all but the loopback", "all=1 lo=0", "", 2, ""},
			{"on all but eth0", "all=1 eth0=0", "2001:db8:1::2/64", 0,
				"IPv6 cannot be captured: it is disabled on lo (net.ipv6.conf.lo.disable_ipv6) but not elsewhere (2001:db8:1::2 on eth0): set net.ipv6.conf.lo.disable_ipv6=0, or disable IPv6 on every interface"},
			{"on the loopback alone", "lo=1", "fd00::2/64", 0, "IPv6 cannot be captured: it is disabled on lo"},
			{"on all but eth0, which has no global address", "all=1 eth0=0", "fe80::2/64", 1,
				"IPv6 is not captured: it is disabled on lo (net.ipv6.conf.lo.disable_ipv6) but not on eth0, which has no global address now"},
		} {
			t.Run(test.name, func(t *testing.T) {
				pod, peer := nettest.New(t, "pod"), nettest.New(t, "peer")
				nettest.Join(t, pod, peer)
				disableIPv6(t, pod, test.disabled)
				if test.address != "" {
					pod.AddAddress(t, "eth0", netip.MustParsePrefix(test.address))
				}
				before := rulestest.Everything(t, pod)
				plan, err := initIn(pod, rulestest.CaptureAll)
				if test.families == 0 {
					if err == nil || !strings.HasPrefix(err.Error(), test.problem) {
						t.Errorf("error %v, want %s", err, test.problem)
					}
					if after := rulestest.Everything(t, pod); after != before {
						t.Errorf("before:\n%s\nafter:\n%s", before, after)
					}
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				if len(plan.Steps) != test.families || strings.Join(plan.Warnings, "\n") != test.problem {
					t.Errorf("rules in %d families, want %d; warnings %q", len(plan.Steps), test.families, plan.Warnings)
				}
			})
		}
	})
}

// disableIPv6 writes to net.ipv6.conf.*.disable_ipv6.
func disableIPv6(t *testing.T, ns *nettest.Namespace, settings string) {
	t.Helper()
	ns.Do(t, func() error {
		for setting := range strings.FieldsSeq(settings) {
			name, value, _ := strings.Cut(setting, "=")
			if err := os.WriteFile("/proc/sys/net/ipv6/conf/"+name+"/disable_ipv6", []byte(value), 0); err != nil {
				return err
			}
		}
		return nil
	})
}

// istio-iptables makes rules for IPv6 only when the first global address is of IPv6, and with --dual-stack when any is. The
// address that a run puts on the loopback must not change that for the next one, as it does there.
func TestIPv6IsChosenByAddressesLikeIstioIPTables(t *testing.T) {
	nettest.RequireRoot(t)
	rulestest.UsePrograms(t, false, ruleset.NFT)
	for name, test := range map[string]struct {
		addresses   []string
		first, used int // families with rules, by the choice
	}{
		"no address":   {nil, 1, 1},
		"IPv4":         {[]string{"198.51.100.2/24"}, 1, 1},
		"IPv6":         {[]string{"2001:db8:1::2/64"}, 2, 2},
		"both":         {[]string{"2001:db8:1::2/64", "198.51.100.2/24"}, 1, 2},
		"link-local":   {[]string{"169.254.0.1/16", "fe80::2/64"}, 1, 1},
		"IPv6 at last": {[]string{"169.254.0.1/16", "fd00::2/64"}, 2, 2},
	} {
		for choice, families := range map[capture.IPv6Choice]int{capture.IPv6WhenFirst: test.first, capture.IPv6WhenUsed: test.used} {
			t.Run(fmt.Sprint(name, " ", choice), func(t *testing.T) {
				spec := rulestest.CaptureAll
				spec.IPv6 = choice
				pod, peer := nettest.New(t, "pod"), nettest.New(t, "peer")
				nettest.Join(t, pod, peer)
				for _, address := range test.addresses {
					pod.AddAddress(t, "eth0", netip.MustParsePrefix(address))
				}
				if plan := mustInit(t, pod, spec); len(plan.Steps) != families {
					t.Errorf("rules in %d families, want %d", len(plan.Steps), families)
				}
				if plan := mustInit(t, pod, spec); !plan.Unchanged() {
					t.Errorf("a second run would change %v", plan)
				}
				mustInit(t, pod, rulestest.CaptureAll)
				if plan := mustInit(t, pod, spec); plan.Unchanged() != (families == 2) {
					t.Errorf("after rules for both families: %v", plan)
				}
				if strings.Contains(rulestest.Everything(t, pod), "::6/128") != (families == 2) {
					t.Error("::6 is there without rules, or not there with them")
				}
			})
		}
	}
}

// Each table is a commit of its own. When a later one fails the earlier ones are taken back.
func TestAFailureBetweenTwoTablesRestoresTheFirst(t *testing.T) {
	nettest.RequireRoot(t)
	for _, flavour := range []ruleset.Flavour{ruleset.NFT, ruleset.Legacy} {
		dir := rulestest.UsePrograms(t, false, flavour)
		pod, _ := nettest.PodAndPeer(t)
		foreignRules(t, pod, flavour)
		for _, table := range ruleset.TableNames { // a legacy one cannot be unmade
			if flavour == ruleset.Legacy {
				pod.MustRun(t, programName(ruleset.IPv4, flavour)+"-save", "-t", string(table))
				pod.MustRun(t, programName(ruleset.IPv6, flavour)+"-save", "-t", string(table))
			}
		}
		before := rulestest.Everything(t, pod)
		real := programName(ruleset.IPv6, flavour) + "-restore"
		breakProgram(t, dir, filepath.Base(real), fmt.Sprintf(
			`if [ -e %[1]s/ran ]; then exec %[2]s "$@"; fi; : > %[1]s/ran; /bin/sed 's/--to-ports 15001/--to-ports nowhere/' | %[2]s "$@"`, dir, real))
		if _, err := initIn(pod, rulestest.TPROXYAll); err == nil || !strings.Contains(err.Error(), "the former state is restored") {
			t.Errorf("%s: got error %v", flavour, err)
		}
		if after := rulestest.Everything(t, pod); after != before {
			t.Errorf("%s: before:\n%s\nafter:\n%s", flavour, before, after)
		}
	}
}

func TestAForcedFlavourIsTakenWhateverIsThere(t *testing.T) {
	nettest.RequireRoot(t)
	rulestest.UsePrograms(t, false, ruleset.NFT, ruleset.Legacy)
	pod := nettest.New(t, "pod")
	flavours := map[Backend]ruleset.Flavour{IPTables: ruleset.NFT, IPTablesNFT: ruleset.NFT, IPTablesLegacy: ruleset.Legacy, NFTables: ruleset.Native}
	for _, backend := range []Backend{IPTablesNFT, IPTablesLegacy, NFTables, IPTablesLegacy, IPTablesNFT, NFTables, IPTables} {
		if _, err := initBy(pod, rulestest.CaptureAll, backend); err != nil {
			t.Fatal(err)
		}
		for _, family := range ruleset.Families {
			for _, flavour := range []ruleset.Flavour{ruleset.NFT, ruleset.Legacy, ruleset.Native} {
				var want ruleset.Ruleset
				if flavour == flavours[backend] {
					want = policy.Rules(rulestest.CaptureAll, family)
				}
				if changes := ruleset.Diff(want, rulesIn(t, pod, family, flavour)); len(changes) > 0 {
					t.Errorf("%s by %s: %s differs: %v", family, backend, flavour, changes)
				}
			}
		}
	}
	rulestest.UsePrograms(t, false, ruleset.Legacy)
	err := pod.Try(func() error {
		_, err := PlanInit(context.Background(), rulestest.CaptureAll, IPTablesNFT)
		return err
	})
	if err == nil || !strings.Contains(err.Error(), "not found in PATH") {
		t.Errorf("without the program: got error %v", err)
	}
}

func TestMissingSupportForIPv6MattersOnlyToAPodThatUsesIt(t *testing.T) {
	nettest.RequireRoot(t)
	for name, breaks := range map[string]func(t *testing.T, dir string){
		"no program": func(t *testing.T, dir string) { os.Remove(filepath.Join(dir, "ip6tables-nft")) },
		"no kernel support": func(t *testing.T, dir string) {
			breakProgram(t, dir, "ip6tables-nft-restore",
				`echo "ip6tables-restore v1.8.9 (nf_tables): line 2: TABLE_ADD failed (Operation not supported): table nat" >&2; exit 4`)
		},
	} {
		t.Run(name, func(t *testing.T) {
			breaks(t, rulestest.UsePrograms(t, false, ruleset.NFT))
			alone := nettest.New(t, "without a global address")
			plan, err := initBy(alone, rulestest.CaptureAll, IPTables)
			if err != nil {
				t.Fatal(err)
			}
			if len(plan.Steps) != 1 || len(plan.Warnings) != 1 || plan.Address != AddressKept {
				t.Errorf("plan: %v, warnings %q", plan, plan.Warnings)
			}
			if strings.Contains(rulestest.Everything(t, alone), "::6") {
				t.Error("::6 is there for no use")
			}
			pod, _ := nettest.PodAndPeer(t)
			before := rulestest.Everything(t, pod)
			if _, err := initBy(pod, rulestest.CaptureAll, IPTables); err == nil {
				t.Error("init succeeded in a pod with an IPv6 address")
			}
			if after := rulestest.Everything(t, pod); after != before {
				t.Errorf("before:\n%s\nafter:\n%s", before, after)
			}
		})
	}
}

func TestTheSourceAddressIsNeverChosenByItself(t *testing.T) {
	nettest.RequireRoot(t)
	rulestest.UsePrograms(t, false, ruleset.NFT)
	pod := nettest.New(t, "pod")
	mustInit(t, pod, rulestest.CaptureAll)
	pod.Do(t, func() error {
		link, err := netlink.LinkByIndex(1)
		if err != nil || link.Attrs().Name != ruleset.Loopback {
			return fmt.Errorf("interface 1, which init takes for the loopback, is %v: %w", link, err)
		}
		addresses, err := netlink.AddrList(link, netlink.FAMILY_V6)
		for _, a := range addresses {
			if a.IP.Equal(capture.InboundSource6.AsSlice()) && a.PreferedLft == 0 {
				return nil
			}
		}
		return fmt.Errorf("no deprecated %v among %v: %w", capture.InboundSource6, addresses, err)
	})
}

func TestACancelledInitRestoresTheFormerState(t *testing.T) {
	nettest.RequireRoot(t)
	dir := rulestest.UsePrograms(t, false, ruleset.NFT)
	pod, _ := nettest.PodAndPeer(t)
	before := rulestest.Everything(t, pod)
	started := filepath.Join(dir, "started")
	if out, err := exec.Command("/usr/bin/mkfifo", started).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	breakProgram(t, dir, "ip6tables-nft-restore", "echo now > "+started+"; exec /bin/sleep 60")
	ctx, cancel := context.WithCancel(context.Background())
	cancelled := make(chan struct{})
	go func() {
		defer close(cancelled)
		os.ReadFile(started)
		cancel()
	}()
	err := pod.Try(func() error {
		plan, err := PlanInit(ctx, rulestest.CaptureAll, "")
		if err != nil {
			return err
		}
		return plan.Commit(ctx)
	})
	<-cancelled
	if err == nil || strings.Contains(err.Error(), "taking it back failed") {
		t.Errorf("got error %v", err)
	}
	if after := rulestest.Everything(t, pod); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

func TestTheLockIsHeldUntilItIsReleased(t *testing.T) {
	nettest.RequireRoot(t)
	pod, other := nettest.New(t, "pod"), nettest.New(t, "another pod")
	lock := func(ctx context.Context, ns *nettest.Namespace) (release func(), err error) {
		err = ns.Try(func() error {
			release, err = Lock(ctx)
			return err
		})
		return release, err
	}
	release, err := lock(context.Background(), pod)
	if err != nil {
		t.Fatal(err)
	}
	if releaseOther, err := lock(context.Background(), other); err != nil {
		t.Errorf("another namespace is locked, too: %v", err)
	} else {
		releaseOther()
	}
	cancelled, cancel := context.WithTimeout(context.Background(), time.Millisecond)
	defer cancel()
	if _, err := lock(cancelled, pod); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a second holder: %v", err)
	}
	second := make(chan error)
	go func() {
		releaseSecond, err := lock(context.Background(), pod)
		if err == nil {
			releaseSecond()
		}
		second <- err
	}()
	release()
	if err := <-second; err != nil {
		t.Error(err)
	}
}

// The script of a dry run has the same effect as init: after it, init has nothing to do. The exception is ranges, which some
// versions of nft rewrite to an equivalent form.
func TestTheScriptLeavesNothingToDo(t *testing.T) {
	nettest.RequireRoot(t)
	aRange := regexp.MustCompile(`(port|owner) \d+[:-]\d+ `)
	for _, backend := range []Backend{IPTablesNFT, IPTablesLegacy, NFTables} {
		rulestest.UsePrograms(t, false, ruleset.NFT, ruleset.Legacy)
		pod, _ := nettest.PodAndPeer(t)
		before := withoutLegacy(rulestest.Everything(t, pod))
		run := func(plan func(context.Context) (*Plan, error)) {
			var script string
			pod.Do(t, func() error {
				planned, err := plan(context.Background())
				if err == nil {
					script = planned.Script()
				}
				return err
			})
			cmd := pod.Command(0, 0, "/bin/sh", "-e", "-c", script)
			cmd.Env = []string{"PATH=" + rulestest.MachinePath}
			if out, err := pod.Run(cmd); err != nil {
				t.Fatalf("%v: %s\n%s", err, out, script)
			}
		}
		for _, sc := range rulestest.Scenarios {
			toInit := func(ctx context.Context) (*Plan, error) { return PlanInit(ctx, sc.Spec, backend) }
			run(toInit)
			pod.Do(t, func() error {
				plan, err := toInit(context.Background())
				if err != nil {
					return err
				}
				for _, step := range plan.Steps {
					step.Changes = slices.DeleteFunc(step.Changes, func(c ruleset.Change) bool { return backend == NFTables && aRange.MatchString(c.Rule) })
					if len(step.Changes) > 0 {
						t.Errorf("%s, %s: %v", backend, sc.Name, step.Changes)
					}
				}
				if len(plan.Routes) > 0 || plan.Address != AddressKept {
					t.Errorf("%s, %s: %v", backend, sc.Name, plan)
				}
				return nil
			})
		}
		run(PlanCleanup)
		if _, err := cleanupIn(pod); err != nil {
			t.Fatal(err)
		}
		// The script does not look for the empty chains that iptables-nft leaves.
		if after := withoutLegacy(rulestest.Everything(t, pod)); backend != IPTablesNFT && after != before {
			t.Errorf("before:\n%s\nafter:\n%s", before, after)
		}
	}
}
