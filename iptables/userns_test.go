package iptables

import (
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/iptables/ruleset"
	"github.com/pillion-proxy/pillion/iptables/rulestest"
)

// In a user namespace the capabilities of root do not extend to the machine, for example to SO_SNDBUFFORCE.
func TestRulesComeAndGoInAUserNamespace(t *testing.T) {
	if !nettest.InUserNamespace(t) {
		return
	}
	dns := rulestest.TPROXYAll
	dns.RedirectDNS, dns.DNSServers = true, []netip.Addr{nettest.Elsewhere4, nettest.Elsewhere6}
	for i := range 300 {
		dns.OutboundExcluded = append(dns.OutboundExcluded, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0}), 24))
	}
	rulestest.ForEachFlavour(t, func(t *testing.T, flavour ruleset.Flavour) {
		world := rulestest.NewWorld(t)
		if flavour == ruleset.Legacy { // the kernel cannot remove legacy tables
			mustInit(t, world.Pod, dns)
			if _, err := cleanupIn(world.Pod); err != nil {
				t.Fatal(err)
			}
		}
		before := rulestest.Everything(t, world.Pod)
		for _, spec := range []capture.Spec{rulestest.CaptureAll, dns, rulestest.CaptureAll} {
			if plan := mustInit(t, world.Pod, spec); plan.Unchanged() || len(plan.Warnings) > 0 {
				t.Errorf("init did %q, warnings %q", plan.Summary(), plan.Warnings)
			}
			if plan := mustInit(t, world.Pod, spec); !plan.Unchanged() {
				t.Errorf("a second init would change %v", plan)
			}
			for _, a := range rulestest.Families {
				packet := rulestest.Sends(rulestest.Workload, rulestest.Workload, a.Elsewhere, 80)
				if got := world.Dial(t, packet); got != rulestest.Outbound.String() {
					t.Errorf("%s: %s, want %v", a.Family, got, rulestest.Outbound)
				}
			}
		}
		if _, err := cleanupIn(world.Pod); err != nil {
			t.Fatal(err)
		}
		if after := rulestest.Everything(t, world.Pod); after != before {
			t.Errorf("before:\n%s\nafter:\n%s", before, after)
		}
	})
}

// Root of a user namespace has every capability, and still no right to the network namespace of others. An error must not
// tell it to get a capability or to become root.
func TestRulesOfANetworkNamespaceThatBelongsToOthers(t *testing.T) {
	const inside = "PILLION_TEST_FOREIGN"
	if os.Getenv(inside) != "" {
		ctx := t.Context()
		_, errLook := Look(ctx)
		plan, err := PlanInit(ctx, rulestest.CaptureAll, Auto)
		if err != nil {
			t.Fatal(err)
		}
		for what, err := range map[string]error{"looking": errLook, "init": plan.Commit(ctx)} {
			if err == nil || !strings.Contains(err.Error(), "this network namespace belongs to another user namespace") {
				t.Errorf("%s: got error %v", what, err)
			}
		}
		return
	}
	nettest.RequireRoot(t)
	cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.count=1")
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.SysProcAttr = nettest.UserNamespace(t)
	cmd.SysProcAttr.Setpgid = true
	if _, err := nettest.New(t, "of others").Run(cmd); err != nil {
		t.Error(err)
	}
}
