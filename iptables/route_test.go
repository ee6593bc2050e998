package iptables

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/iptables/ruleset"
	"github.com/pillion-proxy/pillion/iptables/rulestest"
)

// routing is what ip(8) shows of the two tables of these tests.
func routing(t *testing.T, ns *nettest.Namespace) string {
	t.Helper()
	return ns.MustRun(t, "/bin/sh", "-c", `PATH=/usr/sbin:/usr/bin:/sbin:/bin
		for family in -4 -6; do ip $family rule | grep fwmark; for table in 133 200; do ip $family route show table $table; done; done 2>/dev/null; true`)
}

func TestRoutesComeOnceAndGoWithTheMode(t *testing.T) {
	nettest.RequireRoot(t)
	rulestest.UsePrograms(t, false, ruleset.NFT)
	pod := nettest.New(t, "pod")
	before := rulestest.Everything(t, pod)
	mustInit(t, pod, rulestest.TPROXYAll)
	got := routing(t, pod)
	for what, want := range map[string]int{"from all fwmark 0x539 lookup 133": 2, "local default dev lo": 2} {
		if strings.Count(got, what) != want {
			t.Errorf("%q is not there %d times:\n%s", what, want, got)
		}
	}
	if plan := mustInit(t, pod, rulestest.TPROXYAll); !plan.Unchanged() {
		t.Errorf("a second run would change %v", plan)
	}
	elsewhere := rulestest.TPROXYAll
	elsewhere.TPROXYMark, elsewhere.TPROXYTable = 0x7b, 200
	mustInit(t, pod, elsewhere)
	if got := routing(t, pod); strings.Contains(got, "133") || strings.Count(got, "fwmark 0x7b lookup 200") != 2 {
		t.Errorf("with another mark and table:\n%s", got)
	}
	mustInit(t, pod, rulestest.CaptureAll)
	if got := routing(t, pod); got != "" {
		t.Errorf("with REDIRECT there is still:\n%s", got)
	}
	mustInit(t, pod, rulestest.TPROXYAll)
	if _, err := cleanupIn(pod); err != nil {
		t.Fatal(err)
	}
	if after := rulestest.Everything(t, pod); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

func TestForeignRoutesAreUsedAndKept(t *testing.T) {
	nettest.RequireRoot(t)
	rulestest.UsePrograms(t, false, ruleset.NFT)
	pod := nettest.New(t, "pod")
	pod.MustRun(t, "/sbin/ip", "rule", "add", "fwmark", "1337", "lookup", "133")
	pod.MustRun(t, "/sbin/ip", "route", "add", "local", "default", "dev", "lo", "table", "133")
	before := rulestest.Everything(t, pod)
	plan := mustInit(t, pod, rulestest.TPROXYAll)
	for _, c := range plan.Routes {
		if c.Route.Family == ruleset.IPv4 {
			t.Errorf("%s %v", c.Action, c.Route)
		}
	}
	if _, err := cleanupIn(pod); err != nil {
		t.Fatal(err)
	}
	if after := rulestest.Everything(t, pod); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

func TestAForeignRoutingTableIsRefused(t *testing.T) {
	nettest.RequireRoot(t)
	rulestest.UsePrograms(t, false, ruleset.NFT)
	pod, _ := nettest.PodAndPeer(t)
	pod.MustRun(t, "/sbin/ip", "route", "add", "default", "via", nettest.PeerIP4.String(), "table", "133")
	before := rulestest.Everything(t, pod)
	if _, err := initIn(pod, rulestest.TPROXYAll); err == nil || !strings.Contains(err.Error(), "TPROXYTable 133: file exists: another program uses this routing table; use another one") {
		t.Errorf("got error %v", err)
	}
	if after := rulestest.Everything(t, pod); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

// A change of the mode changes both tables and the routes, in both families.
func TestAFailedChangeOfTheModeLeavesTheOldOne(t *testing.T) {
	rulestest.ForEachProgram(t, func(t *testing.T, flavour ruleset.Flavour) {
		for name, specs := range map[string][2]capture.Spec{
			"to TPROXY": {rulestest.CaptureAll, rulestest.TPROXYAll}, "to REDIRECT": {rulestest.TPROXYAll, rulestest.CaptureAll},
		} {
			t.Run(name, func(t *testing.T) {
				dir := rulestest.UsePrograms(t, false, flavour)
				pod, _ := nettest.PodAndPeer(t)
				mustInit(t, pod, specs[0])
				before := [2]ruleset.Ruleset{rulesIn(t, pod, ruleset.IPv4, flavour), rulesIn(t, pod, ruleset.IPv6, flavour)}
				routes := withoutPriorities(routing(t, pod))
				breakProgram(t, dir, filepath.Base(programName(ruleset.IPv6, flavour))+"-restore", "exit 1")
				if _, err := initIn(pod, specs[1]); err == nil || !strings.Contains(err.Error(), "the former state is restored") {
					t.Errorf("got error %v", err)
				}
				for i, family := range ruleset.Families {
					if changes := ruleset.Diff(before[i].Own(), rulesIn(t, pod, family, flavour)); len(changes) > 0 {
						t.Errorf("%s: %v", family, changes)
					}
				}
				if after := withoutPriorities(routing(t, pod)); after != routes {
					t.Errorf("routing before:\n%s\nafter:\n%s", routes, after)
				}
			})
		}
	})
}

// withoutPriorities removes priorities: the kernel assigns a new one to a restored routing rule.
func withoutPriorities(text string) string {
	var lines []string
	for line := range strings.Lines(text) {
		if _, rule, found := strings.Cut(line, ":\tfrom all fwmark"); found {
			line = "from all fwmark" + rule
		}
		lines = append(lines, line)
	}
	return strings.Join(lines, "")
}
