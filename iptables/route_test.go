package iptables

import (
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/nettest"
)

var tproxyAll = specOf(func(s *capture.Spec) { s.Mode, s.Inbound.All, s.Outbound.All = capture.TPROXY, true, true })

func TestRoutesAreNeededByTPROXYOfInboundPortsAlone(t *testing.T) {
	route4, rule4 := Route{IPv4, 0, 133}, Route{IPv4, 1337, 133}
	route6, rule6 := Route{IPv6, 0, 133}, Route{IPv6, 1337, 133}
	outboundOnly := tproxyAll
	outboundOnly.Inbound = capture.Ports{}
	for _, test := range []struct {
		spec     capture.Spec
		families []Family
		want     []Route
	}{
		{tproxyAll, Families, []Route{route4, rule4, route6, rule6}},
		{tproxyAll, Families[:1], []Route{route4, rule4}},
		{outboundOnly, Families, nil},
		{captureAll, Families, nil},
	} {
		if got := routesFor(test.spec, test.families); !reflect.DeepEqual(got, test.want) {
			t.Errorf("got %v, want %v", got, test.want)
		}
	}
}

func TestOfRoutesOnlyTheDifferenceIsChanged(t *testing.T) {
	rule, other := Route{IPv4, 1337, 133}, Route{IPv4, 7, 200}
	ours, theirs := installed{rule, true, 5}, installed{rule, false, 6}
	for _, test := range []struct {
		name string
		want []Route
		have []installed
		says string
	}{
		{"nothing is there", []Route{rule}, nil, "add fwmark 0x539 lookup 133"},
		{"ours is there", []Route{rule}, []installed{ours}, ""},
		{"somebody else's does as well", []Route{rule}, []installed{theirs}, ""},
		{"ours is there twice", []Route{rule}, []installed{ours, ours}, "remove fwmark 0x539 lookup 133"},
		{"ours is not wanted any more", []Route{other}, []installed{ours}, "add fwmark 0x7 lookup 200; remove fwmark 0x539 lookup 133"},
		{"somebody else's is not wanted", nil, []installed{theirs}, ""},
	} {
		var says []string
		for _, c := range diffRoutes(test.want, test.have) {
			says = append(says, string(c.Action)+" "+c.Route.String())
		}
		if got := strings.Join(says, "; "); got != test.says {
			t.Errorf("%s: %q, want %q", test.name, got, test.says)
		}
	}
}

// routing is what ip(8) shows of the two tables of these tests.
func routing(t *testing.T, ns *nettest.Namespace) string {
	t.Helper()
	return ns.MustRun(t, "/bin/sh", "-c", `PATH=/usr/sbin:/usr/bin:/sbin:/bin
		for family in -4 -6; do ip $family rule | grep fwmark; for table in 133 200; do ip $family route show table $table; done; done 2>/dev/null; true`)
}

func TestRoutesComeOnceAndGoWithTheMode(t *testing.T) {
	nettest.RequireRoot(t)
	usePrograms(t, false, NFT)
	pod := nettest.New(t, "pod")
	before := everything(t, pod)
	mustInit(t, pod, tproxyAll)
	got := routing(t, pod)
	for what, want := range map[string]int{"from all fwmark 0x539 lookup 133": 2, "local default dev lo": 2} {
		if strings.Count(got, what) != want {
			t.Errorf("%q is not there %d times:\n%s", what, want, got)
		}
	}
	if plan := mustInit(t, pod, tproxyAll); !plan.Unchanged() {
		t.Errorf("a second run would change %v", plan)
	}
	elsewhere := tproxyAll
	elsewhere.TPROXYMark, elsewhere.TPROXYTable = 0x7b, 200
	mustInit(t, pod, elsewhere)
	if got := routing(t, pod); strings.Contains(got, "133") || strings.Count(got, "fwmark 0x7b lookup 200") != 2 {
		t.Errorf("with another mark and table:\n%s", got)
	}
	mustInit(t, pod, captureAll)
	if got := routing(t, pod); got != "" {
		t.Errorf("with REDIRECT there is still:\n%s", got)
	}
	mustInit(t, pod, tproxyAll)
	if _, err := cleanupIn(pod); err != nil {
		t.Fatal(err)
	}
	if after := everything(t, pod); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

func TestRoutesOfOtherPeopleServeAndStay(t *testing.T) {
	nettest.RequireRoot(t)
	usePrograms(t, false, NFT)
	pod := nettest.New(t, "pod")
	pod.MustRun(t, "/sbin/ip", "rule", "add", "fwmark", "1337", "lookup", "133")
	pod.MustRun(t, "/sbin/ip", "route", "add", "local", "default", "dev", "lo", "table", "133")
	before := everything(t, pod)
	plan := mustInit(t, pod, tproxyAll)
	for _, c := range plan.Routes {
		if c.Route.Family == IPv4 {
			t.Errorf("%s %v", c.Action, c.Route)
		}
	}
	if _, err := cleanupIn(pod); err != nil {
		t.Fatal(err)
	}
	if after := everything(t, pod); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

func TestATableOfSomebodyElseIsRefused(t *testing.T) {
	nettest.RequireRoot(t)
	usePrograms(t, false, NFT)
	pod, _ := nettest.PodAndPeer(t)
	pod.MustRun(t, "/sbin/ip", "route", "add", "default", "via", nettest.PeerIP4.String(), "table", "133")
	before := everything(t, pod)
	if _, err := initIn(pod, tproxyAll); err == nil || !strings.Contains(err.Error(), "the table belongs to somebody else; choose another with -r") {
		t.Errorf("got error %v", err)
	}
	if after := everything(t, pod); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

// A change of the mode changes both tables and the routes, in both families.
func TestAFailedChangeOfTheModeLeavesTheOldOne(t *testing.T) {
	forEachProgram(t, func(t *testing.T, flavour Flavour) {
		for name, specs := range map[string][2]capture.Spec{
			"to TPROXY": {captureAll, tproxyAll}, "to REDIRECT": {tproxyAll, captureAll},
		} {
			t.Run(name, func(t *testing.T) {
				dir := usePrograms(t, false, flavour)
				pod, _ := nettest.PodAndPeer(t)
				mustInit(t, pod, specs[0])
				before := [2]Ruleset{rulesIn(t, pod, IPv4, flavour), rulesIn(t, pod, IPv6, flavour)}
				routes := withoutPriorities(routing(t, pod))
				breakProgram(t, dir, filepath.Base(programName(IPv6, flavour))+"-restore", "exit 1")
				if _, err := initIn(pod, specs[1]); err == nil || !strings.Contains(err.Error(), "everything is as it was") {
					t.Errorf("got error %v", err)
				}
				for i, family := range Families {
					if changes := Diff(before[i].Own(), rulesIn(t, pod, family, flavour)); len(changes) > 0 {
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

// withoutPriorities takes away what the kernel chooses anew when a routing rule comes back.
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
